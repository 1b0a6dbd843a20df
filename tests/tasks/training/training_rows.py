"""Rows of a training set (sft/2) for tests."""

import json
from typing import Any

TOOLS = json.dumps([{"type": "function", "function": {"name": "search_documents"}}])


def row(question: str, *turns: str, split: str = "train", tools: str | None = None, **values: Any) -> dict[str, Any]:
    """A row of sft/2 whose completion alternates between the assistant's turns and what it is shown."""
    role = "tool" if tools else "user"
    return {
        "question_id": question,
        "split": split,
        "format": "sft_best",
        "prompt": [
            {"role": "system", "content": "You search a collection of documents. Think first, then ask for pages."},
            {"role": "user", "content": question},
        ],
        "completion": [{"role": role if i % 2 else "assistant", "content": text} for i, text in enumerate(turns)],
        "tools": tools,
        "rank_score": 1.0,
        "effort": 1.0,
        "gt_rank": 1,
        "prompt_fingerprint": "prompt",
        **values,
    }


def rows(count: int) -> list[dict[str, Any]]:
    """Questions of very different lengths, every sixth of them held out."""
    return [
        row(
            f"What was the {'net income, the ' * (i * i % 7)} revenue of 20{i:02}?",
            f"<think>year {i}</think>\n<search>revenue 20{i:02}</search>",
            split="train" if i % 6 else "val",
        )
        for i in range(count)
    ]
