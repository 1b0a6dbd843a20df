"""What a model is trained on is what it is served, byte for byte, and the masks are exact."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.config import Finetune
from tasks.training import sft
from tasks.training.examples import Example, encode, sequences, unusable
from tests.tasks.training.training_rows import TOOLS, row

END = "<|im_end|>"
# no tag and no special token inside what stands for a model's words
WORDS = st.text(st.characters(exclude_characters="<>|{}", exclude_categories=["Cs"]), max_size=40)


def learned(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode([example.ids[i] for i in example.targets])


def tool_call(query: str) -> str:
    call = {"name": "search_documents", "arguments": {"query": query}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


@settings(max_examples=40, deadline=None)
@given(question=WORDS, thought=WORDS, query=WORDS, tools=st.booleans())
def test_masks_are_exact(tokenizer: Any, question: str, thought: str, query: str, tools: bool) -> None:
    reasoning = f"<think>{thought}</think>\n"
    search = tool_call(query) if tools else f"<search>{query}</search>"
    example = row(question, reasoning + search, tools=TOOLS if tools else None)
    expected = {
        "search-only": search + END,
        "search-think": reasoning + search + END,
        "assistant": reasoning + search + END,
    }
    for strategy, text in expected.items():
        (encoded,) = encode(example, tokenizer, strategy)
        assert learned(tokenizer, encoded).lstrip("\n") == text.lstrip("\n")
        assert encoded.targets == tuple(range(encoded.targets[0], len(encoded.ids)))
    (encoded,) = encode(example, tokenizer, "none")
    assert encoded.targets == tuple(range(1, len(encoded.ids)))


@settings(max_examples=40, deadline=None)
@given(question=WORDS, answer=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), tools=st.booleans())
def test_training_text_is_the_serving_prompt_and_the_answer(
    tokenizer: Any, question: str, answer: str, tools: bool
) -> None:
    example = row(question, answer, tools=TOOLS if tools else None)
    # exactly what a server does with a request
    prompt = tokenizer.apply_chat_template(
        example["prompt"], tools=json.loads(TOOLS) if tools else None, tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (encoded,) = encode(example, tokenizer, "assistant")
    assert list(encoded.ids[: len(prompt_ids)]) == prompt_ids
    assert tokenizer.decode(encoded.ids) == prompt + answer + END
    assert encoded.targets == tuple(range(len(prompt_ids), len(encoded.ids)))


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_trajectory_is_one_sequence_and_nothing_shown_is_learned(tokenizer: Any, tools: str | None) -> None:
    call = tool_call if tools else "<search>{}</search>".format
    turns = [
        call("pump"),
        f"page 1 says {call('nothing')}",
        "Hm.\n" + call("pump warranty") + "\n",
        "page 2",
        "24 months",
    ]
    example = row("How long is the warranty?", *turns, tools=tools)
    (pieces,) = sequences(example, tokenizer)
    messages = example["prompt"] + example["completion"][:-1]
    serving = tokenizer.apply_chat_template(
        messages, tools=json.loads(tools) if tools else None, tokenize=False, add_generation_prompt=True
    )
    assert "".join(pieces) == serving + "24 months" + END
    (searches,) = encode(example, tokenizer, "search-only")
    assert learned(tokenizer, searches) == call("pump") + END + call("pump warranty") + "\n" + END
    (assistant,) = encode(example, tokenizer, "assistant")
    assert learned(tokenizer, assistant) == "".join(turns[i] + END for i in (0, 2, 4))


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_of_a_search_that_followed_others_it_alone_is_learned_and_weighs_what_it_found(
    tokenizer: Any, tools: str | None
) -> None:
    """A row of sft_context: what was searched before, and found, is in its prompt."""
    call = tool_call if tools else "<search>{}</search>".format
    earlier = [
        {"role": "assistant", "content": "<think>first</think>\n" + call("pump")},
        {"role": "tool" if tools else "user", "content": f"page 1 says {call('nothing')}"},
    ]
    rows = [
        row("How long?", "<think>so</think>\n" + call(query), tools=tools, rank_score=score)
        for query, score in (("pump warranty", 1.0), ("warranty", 0.5))
    ]
    rows = [made | {"format": "sft_context", "prompt": made["prompt"] + earlier} for made in rows]
    for strategy, thought in (
        ("search-only", ""),
        ("search-think", "<think>so</think>\n"),
        ("assistant", "<think>so</think>\n"),
    ):
        items = sft.load(rows, tokenizer, Finetune(mask_strategy=strategy, weight_scheme="rank-score"))
        examples = [item.examples[0] for item in items.train]
        expected = [thought + call(query) + END for query in ("pump warranty", "warranty")]
        assert [learned(tokenizer, example).lstrip("\n") for example in examples] == expected
        assert [example.weight for example in examples] == pytest.approx([4 / 3, 2 / 3])
        assert "page 1 says" in tokenizer.decode(examples[0].ids)


def test_a_template_that_drops_earlier_reasoning_gives_one_sequence_a_turn(tokenizer: Any) -> None:
    kept = tokenizer.chat_template
    tokenizer.chat_template = kept.replace("+ message.content }}", "+ message.content.split('</think>')[-1] }}")
    turns = ["<think>a</think><search>pump</search>", "page 1", "<think>b</think><search>pump warranty</search>"]
    try:
        encoded = encode(row("How long?", *turns), tokenizer, "assistant")
    finally:
        tokenizer.chat_template = kept
    assert [learned(tokenizer, example) for example in encoded] == [turns[0] + END, turns[2] + END]
    assert "<think>a" not in tokenizer.decode(encoded[1].ids)


def test_what_is_no_search_call_is_not_learned_as_one(tokenizer: Any) -> None:
    answer = '<tool_call>{"name": "provide_answer", "arguments": {"answer": ["x"]}}</tool_call>'
    for text in ("It lasts 24 months.", answer, "<think>try <search>pump</search></think>\nI give up."):
        for strategy in ("search-only", "search-think"):
            assert encode(row("How long?", text), tokenizer, strategy)[0].targets == ()
    # words after the call are not learned, nor that the turn ends with them
    (encoded,) = encode(row("How long?", "So: <search>pump</search> I think"), tokenizer, "search-only")
    assert learned(tokenizer, encoded).strip() == "<search>pump</search>"


def test_reasoning_whose_opening_tag_the_template_wrote(tokenizer: Any) -> None:
    text = "The pump.</think>\n\n<search>pump</search>"
    (encoded,) = encode(row("How long?", text), tokenizer, "search-think")
    assert learned(tokenizer, encoded) == text + END


def test_set_aside_never_cut(tokenizer: Any) -> None:
    given_rows = [
        row("How long?", "<search>pump</search>"),
        row("How " + "very " * 60 + "long?", "<search>pump</search>"),
        row("How long?", "No idea."),
        row("How long?", "<search>manual</search>", gt_rank=2),
        row("How long?", "<search>pump</search>", split="val", gt_rank=3),
    ]
    items = sft.load(given_rows, tokenizer, Finetune(max_length=100, weight_scheme="binary"))
    assert items.set_aside == {"too long": 1, "nothing to learn": 1, "weight 0": 1}
    assert len(items.train) == len(items.val) == 1
    assert items.val[0].examples[0].weight == 1
    assert re.search(r"How long\?", tokenizer.decode(items.train[0].examples[0].ids))

    half = row("How " + "very " * 60 + "long?", "<search>pump</search>", rank_score=0.5)
    items = sft.load([half, given_rows[0]], tokenizer, Finetune(max_length=100, weight_scheme="rank-score"))
    assert [item.examples[0].weight for item in items.train] == [1.0]  # what is set aside has no part in the mean


def test_an_example_of_just_the_most_tokens_is_learned() -> None:
    assert unusable(Example((1, 2, 3), (1,)), 3) is None
    assert unusable(Example((1, 2, 3), (1,)), 2) == "too long"


def test_behind_a_prompt_that_opens_the_thought_nothing_opens_it_again(tokenizer: Any) -> None:
    """A template of Qwen's Thinking kind, as TRL carries it; a turn is what its model says behind `<think>`."""
    kept = tokenizer.chat_template
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3_6.jinja").read_text()
    call = tool_call("pump")
    turns = {
        f"<think>\nThe pump.\n</think>\n\n{call}": f"The pump.\n</think>\n\n{call}",
        f"<think>The pump.</think>\n{call}": f"The pump.\n</think>\n\n{call}",
        f"The pump.\n</think>\n\n{call}": f"The pump.\n</think>\n\n{call}",
        call: f"\n</think>\n\n{call}",
        "<think>The pu": "The pu",
    }
    try:
        for stored, said in turns.items():
            (encoded,) = encode(row("How long?", stored, tools=TOOLS), tokenizer, "assistant")
            assert learned(tokenizer, encoded) == said + END
            assert tokenizer.decode(encoded.ids).endswith(f"assistant\n<think>\n{said}{END}")
        # a template that keeps a thought keeps it as the model wrote it, so that a conversation is one sequence
        tokenizer.chat_template = tokenizer.chat_template.replace("(loop.index0 > ns.last_query_index)", "true")
        conversation = row("How long?", f"<think>a</think>\n{call}", "page 1", f"<think>b</think>\n{call}", tools=TOOLS)
        (pieces,) = sequences(conversation, tokenizer)
        assert pieces[1::2] == [f"{thought}\n</think>\n\n{call}{END}" for thought in "ab"]
    finally:
        tokenizer.chat_template = kept
