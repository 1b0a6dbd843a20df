"""Rows of training sets (sft/2, dpo/3, reward/3) for tests."""

import json
from itertools import combinations
from typing import Any

from tasks.agent.message import scored_query

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


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Three pairs of three queries for each question, of which the one with the year is best; every sixth question held out."""
    found = []
    for i in range(count):
        made = row(f"What was the {'net ' * (i % 4)}revenue of 20{i:02}?", split="train" if i % 6 else "val")
        common = {name: made[name] for name in ("question_id", "split", "prompt", "tools", "prompt_fingerprint")}
        queries = {f"revenue 20{i:02}": 1.0, "revenue": 2 / 3, "the company": 0.0}
        for chosen, rejected in combinations(queries, 2):
            sides = {
                side: [{"role": "assistant", "content": f"<think>year {i}</think>\n<search>{query}</search>"}]
                for side, query in (("chosen", chosen), ("rejected", rejected))
            }
            scores = {"chosen_score": queries[chosen], "rejected_score": queries[rejected]}
            found.append(common | sides | scores | {"rank_score": queries[chosen], "effort": 1.0, "gt_rank": 1})
    return found


def asked_and_searched(row: dict[str, Any]) -> tuple[str, str]:
    """Question and query of a row of reward/3."""
    return row["prompt"][0]["content"], row["completion"][0]["content"]


def reward_rows(count: int) -> list[dict[str, Any]]:
    """Queries for questions about years: the year is what counts, then the measure; every fourth question held out."""
    found = []
    for i in range(count):
        measure = ("revenue", "income", "pressure", "voltage")[i % 4]
        question = f"What was the {measure} of 20{i:02}?"
        for query, score in ((f"{measure} 20{i:02}", 1.0), (f"{measure} total", 1 / 3), ("the annual report", 0.0)):
            rest = {"effort": score, "gt_rank": None, "prompt_fingerprint": "prompt"}
            split = "val" if i // 4 % 4 == 0 else "train"
            found.append(
                {"question_id": question, "split": split, "score": score, **scored_query(question, query)} | rest
            )
    return found
