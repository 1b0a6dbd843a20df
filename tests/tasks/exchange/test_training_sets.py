"""Training sets out as the reference's JSONL and back in: the texts stay, and what is learned is the agent's own form."""

import contextlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import artifact
from tasks.agent import prompts
from tasks.agent.protocol import Answer, as_stored, tell_last_turn
from tasks.config import Agent, Format, FormatName
from tasks.errors import ArtifactError, InputError
from tasks.exchange import training_sets
from tasks.exchange.export import export_tables
from tasks.exchange.importing import import_rows
from tasks.exchange.rows import schema_of
from tasks.formats import format_training
from tasks.set_aside import Refused
from tests.tasks.exchange.test_rollouts import asked, imported
from tests.tasks.test_formats import prepared, searcher

__all__ = ["searcher"]  # a fixture
NAMES = get_args(FormatName)
LINE = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>\N{OBJECT REPLACEMENT CHARACTER}"))
WORDS = LINE.filter(lambda text: text == text.strip() != "")
QUERY = WORDS.map(lambda text: " ".join(text.split()))  # as the agent reads one
THOUGHT = st.none() | st.builds("\n".join, st.lists(LINE, max_size=3)).filter(lambda text: text == text.strip() != "")


@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_what_is_exported_is_what_format_writes_and_comes_back(searcher: Any, tmp_path: Path, protocol: Any) -> None:
    agent = Agent(protocol=protocol, examples=True)
    processed, pairs = prepared(searcher, str(tmp_path), agent)
    settings = Format(formats=list(NAMES), jsonl=True)
    made = format_training(processed, pairs, settings, agent, str(tmp_path / "made"))
    theirs = artifact.fetch_folder(made.pop("jsonl"))
    out = tmp_path / "out"
    out.mkdir()
    written = export_tables(made, "jsonl", out, str(tmp_path))
    assert set(written) == {f"{name}_{part}.jsonl" for name in NAMES for part in ("train", "val")}
    for file in written:
        assert (out / file).read_text() == (theirs / file).read_text(), file

    again = tmp_path / "again"
    again.mkdir()
    for name in NAMES:
        files = [str(out / f"{name}_{part}.jsonl") for part in ("train", "val")]
        back = import_rows(name, files, agent, None, None, str(tmp_path / "back" / name), str(tmp_path))
        assert artifact.read_rows(back["set_aside_import"]) == []
        ours = artifact.read_table(made[name])
        came = artifact.read_table(back[name])
        order = [("split", "ascending")]
        assert came.sort_by(order).equals(ours.sort_by(order)), name
        export_tables({name: back[name]}, "jsonl", again, str(tmp_path))
    for file in written:
        assert (again / file).read_text() == (out / file).read_text(), file


def test_a_data_set_is_read_by_its_library_and_comes_back(
    searcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    agent = Agent(protocol="tools")
    processed, pairs = prepared(searcher, str(tmp_path), agent)
    made = format_training(processed, pairs, Format(formats=list(NAMES)), agent, str(tmp_path / "made"))
    out = tmp_path / "out"
    out.mkdir()
    export_tables(made, "hf", out, str(tmp_path))
    assert datasets.get_dataset_config_names(str(out)) == list(NAMES)
    for name in NAMES:
        loaded = datasets.load_dataset(str(out), name)
        ours = artifact.read_rows(made[name])
        assert {split: len(rows) for split, rows in loaded.items()} == Counter(row["split"] for row in ours)
        back = import_rows(name, [str(out)], agent, None, None, str(tmp_path / "back" / name), str(tmp_path))[name]
        order = [("split", "ascending")]
        assert artifact.read_table(back).sort_by(order).equals(artifact.read_table(made[name]).sort_by(order))
    card = (out / "README.md").read_text()
    assert "| protocol | tools |" in card
    assert str(tmp_path) not in card + (out / "provenance.json").read_text()


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@given(question=WORDS, thought=THOUGHT, query=QUERY, score=st.floats(0, 1))
def test_a_search_is_learned_as_the_agent_says_it(
    protocol: Any, question: str, thought: str | None, query: str, score: float
) -> None:
    agent, unknown = Agent(protocol=protocol), Counter[str]()
    said = (f"<think>{thought}</think>\n" if thought else "") + f"<search>{query}</search>"
    line = {"input": f"<question>{question}</question>", "output": said, "rank_score": score, "question_id": "q"}
    row = training_sets.read(line, "sft_best", "train", agent, unknown)
    assert row["prompt"] == prompts.prompt_messages(question, agent)
    assert row["completion"] == [as_stored(prompts.PROTOCOLS[protocol].search(thought, query))]
    assert training_sets.write(row) == line | {"effort": None, "gt_rank": None}
    assert not unknown


def test_a_trace_becomes_turns(tmp_path: Path) -> None:
    page = "<results>\n[1] a.pdf page 2\nWrite <search>words</search> or <answer>so</answer>.\n</results>"
    trace = f'<think>Hm.</think>\n<search>fee</search>\n{page}\n<answer>5 <cite file="a.pdf" page="2"/></answer>'
    line = {"input": "<question>How much?</question>", "output": trace}
    row = training_sets.read(line, "sft_trajectory", "train", Agent(protocol="tools"), Counter())
    assert [message["role"] for message in row["completion"]] == ["assistant", "tool", "assistant"]
    assert row["completion"][1]["content"] == page
    assert '"name": "search_documents", "arguments": {"query": "fee"}' in row["completion"][0]["content"]
    assert '"citations": [{"file": "a.pdf", "page": 2}]' in row["completion"][2]["content"]
    assert training_sets.write(row)["output"] == trace


@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_what_the_agent_asks_for_in_the_last_turn_is_not_said(protocol: Any) -> None:
    agent, speaking = Agent(protocol=protocol), prompts.PROTOCOLS[protocol]
    conversation = [
        speaking.search(None, "fee"),
        {"role": "tool" if protocol == "tools" else "user", "content": "<results>\n[1] a.pdf page 2\n</results>"},
    ]
    tell_last_turn(conversation, speaking)
    conversation.append(speaking.answer("So.", Answer(("5",), (("a.pdf", 2),))))
    completion = [as_stored(message) for message in conversation]
    row = {"question_id": "q", "prompt": prompts.prompt_messages("How much?", agent), "completion": completion}
    line = training_sets.write(row)
    assert (speaking.last_turn or "") in line["output"]
    assert training_sets.read(line, "sft_trajectory", "train", agent, Counter())["completion"] == completion


@pytest.mark.parametrize(
    "complaint",
    [
        "Error: neither <search> nor <answer> was written.",
        "Error: there are no words in <search>.",
        "Error: there is nothing in <answer>.",
        "Error: <search> was cut off before its end.",
    ],
)
@pytest.mark.parametrize("thought", ["<think>Once more.</think>\n", ""])
def test_what_the_agent_complains_of_is_not_said(complaint: str, thought: str) -> None:
    before = f"<question>How much?</question>\n<search>fee</search>\nhm\n{complaint}"
    line = {
        "input": f"{before}\n{thought}<search>price</search>\n<results>\n</results>",
        "output": "<answer>5</answer>",
    }
    row = training_sets.read(line, "sft_context", "train", Agent(protocol="tags"), Counter())
    said = [m["content"] for m in row["prompt"] if m["role"] == "assistant"]
    assert said[-2:] == ["<search>fee</search>", f"{thought}<search>price</search>"]
    written = training_sets.write(row)
    assert {name: written[name] for name in line} == line


def test_plain_questions_and_queries_are_taken_and_what_is_no_example_is_refused(tmp_path: Path) -> None:
    lines = [
        {"input": "How much?", "output": "annual fee", "prompt_tokens": 3},
        {"input": "<question>How much?</question>", "output": "<think>I do not know.</think>"},
        {"input": "<question> </question>", "output": "<search>a</search>"},
        {"input": "<question>How much?</question>"},
        {"input": "<question>How much?</question>", "output": "<search>a</search>", "rank_score": "high"},
    ]
    file = tmp_path / "sft_best_train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = import_rows("sft_best", [str(file)], Agent(), None, None, str(tmp_path / "made"), str(tmp_path))
    (row,) = artifact.read_rows(made["sft_best"])
    assert row["completion"][0]["content"] == "<search>annual fee</search>"
    aside = [(found["row"], found["reason"]) for found in artifact.read_rows(made["set_aside_import"])]
    assert aside == [
        *[(None, "unknown_field"), (2, "bad_example"), (3, "empty_question"), (4, "missing_field"), (5, "wrong_type")]
    ]
    file.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(InputError, match=r"no row can be used; sft_best_train\.jsonl, row 1: bad_example"):
        import_rows("sft_best", [str(file)], Agent(), None, None, str(tmp_path / "none"), str(tmp_path))


def test_questions_that_are_measured_on_are_not_learned_from(searcher: Any, tmp_path: Path) -> None:
    asked = [
        {"question_id": "q1", "question": "How much?", "split": "test"},
        {"question_id": "q2", "question": "How old?", "split": "dev"},
        {"question_id": "q3", "question": "How long?", "split": "train"},
    ]
    schema = schema_of("questions")
    questions = artifact.write_table(artifact.table_of(asked, schema), str(tmp_path / "q.parquet"), schema, {})
    agent = Agent()
    theirs = tmp_path / "sft_best_train.jsonl"
    lines = [{"input": row["question"], "output": "<search>a</search>"} for row in asked]
    theirs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = import_rows("sft_best", [str(theirs)], agent, None, questions, str(tmp_path / "theirs"), str(tmp_path))
    assert [row["prompt"][-1]["content"] for row in artifact.read_rows(made["sft_best"])] == ["Question: How long?"]
    aside = [(found["row"], found["reason"]) for found in artifact.read_rows(made["set_aside_import"])]
    assert aside == [(1, "held_out"), (2, "held_out")]

    ours = format_training(*prepared(searcher, str(tmp_path), agent), Format(), agent, str(tmp_path / "ours"))
    learned = {row["question_id"] for row in artifact.read_rows(ours["sft_best"])}
    held = min(learned)
    asked = [{"question_id": held, "question": "Put in other words?", "split": "test"}]
    questions = artifact.write_table(artifact.table_of(asked, schema), str(tmp_path / "r.parquet"), schema, {})
    out = tmp_path / "out"
    out.mkdir()
    written = [str(out / file) for file in export_tables(ours, "hf", out, str(tmp_path)) if file.endswith(".parquet")]
    back = import_rows("sft_best", written, agent, None, questions, str(tmp_path / "back"), str(tmp_path))
    assert {row["question_id"] for row in artifact.read_rows(back["sft_best"])} == learned - {held} != set()


def test_a_question_that_is_measured_on_is_known_by_its_text_in_a_reward_set_too(tmp_path: Path) -> None:
    held = asked(tmp_path, "How much?", "test")
    lines = [
        {"input": f"<question>{question}</question>\n<search>a</search>", "score": 1.0}
        for question in ("How much?", "How long?")
    ]
    rows, aside = imported("reward", lines, tmp_path, held)
    assert [row["prompt"][0]["content"] for row in rows] == ["How long?"]
    assert aside == {1: "held_out"}


def test_a_number_that_no_column_holds_sets_its_example_aside_alone(tmp_path: Path) -> None:
    line = {"input": "Why?", "output": "a"}
    wrong = [{"gt_rank": 2**40}, *({"rank_score": score} for score in (10**400, math.nan, math.inf))]
    rows, aside = imported("sft_best", [*({**line, **field} for field in wrong), line], tmp_path)
    assert len(rows) == 1
    assert aside == dict.fromkeys(range(1, len(wrong) + 1), "bad_number")
    (row,), aside = imported("sft_best", [{**line, "id": "\ud800"}, {**line, "id": 7}], tmp_path)
    assert (row["question_id"], aside) == ("7", {1: "broken_utf8"})


def test_a_pair_weighs_what_its_chosen_query_scored_unless_it_says_otherwise(tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "chosen": "a", "rejected": "b", "chosen_score": 0.5, "rejected_score": 0.0}
    rows, _ = imported("dpo", [pair, {**pair, "rank_score": 1.0}], tmp_path)
    assert [row["rank_score"] for row in rows] == [0.5, 1.0]


def test_several_turns_are_no_one_thing_to_say(tmp_path: Path) -> None:
    trace = "<search>a</search>\n<results>\n</results>\n<search>b</search>"
    lines = [{"input": "Why?", "output": said} for said in (trace, "a")]
    rows, aside = imported("sft_best", lines, tmp_path)
    assert (len(rows), aside) == (1, {1: "bad_example"})


@given(st.dictionaries(st.sampled_from(["input", "output", "prompt", "chosen", "rejected", "score", "id"]), st.text()))
def test_nothing_breaks_the_reader(line: dict[str, str]) -> None:
    for kind in NAMES:
        with contextlib.suppress(Refused):
            row = training_sets.read(line, kind, "train", Agent(protocol="tools"), Counter())
            assert artifact.table_of([row], schema_of(training_sets.table_of(kind))).num_rows == 1


def test_a_row_of_ours_that_nobody_can_learn_from_is_refused(tmp_path: Path) -> None:
    line = {"input": "<question>How much?</question>", "output": "<search>fee</search>", "question_id": "q"}
    row = training_sets.read(line, "sft_best", "train", Agent(), Counter())
    image = "\N{OBJECT REPLACEMENT CHARACTER}"
    unasked = {**row, "prompt": row["prompt"][:1]}
    rows = [
        row,
        {**row, "split": "test"},
        unasked,
        {**row, "completion": [{"role": "assistant", "content": f"<search>{image}</search>"}]},
        {**row, "completion": [{"role": "assistant", "content": None}]},
    ]
    file = tmp_path / "sft_best.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    made = import_rows("sft_best", [str(file)], Agent(), None, None, str(tmp_path / "made"), str(tmp_path))
    assert made["sft_best"].rows == 1
    aside = {found["row"]: found["reason"] for found in artifact.read_rows(made["set_aside_import"])}
    assert aside == {2: "bad_example", **dict.fromkeys((3, 4, 5), "bad_conversation")}
    with pytest.raises(ArtifactError, match="its question is not known"):
        training_sets.write(unasked)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_query_to_compare_is_one_message_of_the_assistant(name: FormatName, searcher: Any, tmp_path: Path) -> None:
    processed, pairs = prepared(searcher, str(tmp_path), Agent())
    made = format_training(processed, pairs, Format(formats=[name]), Agent(), str(tmp_path / "made"))
    row = next(iter(artifact.read_rows(made[name])))
    column = "chosen" if name == "dpo" else "completion"
    twice, asked = row[column] * 2, [{**row[column][0], "role": "user"}]
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row | {column: said}) + "\n" for said in (row[column], [], twice, asked)))
    back = import_rows(name, [str(file)], Agent(), None, None, str(tmp_path / "back"), str(tmp_path))
    assert back[name].rows == 1
    aside = {found["row"]: found["reason"] for found in artifact.read_rows(back["set_aside_import"])}
    assert aside == dict.fromkeys((2, 3, 4), "bad_example")
