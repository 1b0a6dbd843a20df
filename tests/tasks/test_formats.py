"""Training sets, made of conversations that the real agent loop has with a scripted model over a real index."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import settings as tune
from hypothesis import strategies as st

from tasks import artifact, formats, storage
from tasks.agent import prompts
from tasks.agent.completion import Completion
from tasks.agent.protocol import Answer, as_stored, call_text
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Question, to_row
from tasks.artifact import Artifact
from tasks.config import Agent, Format, FormatName, Index, Process, Sampling, Search
from tasks.errors import ConfigError, EmptyError
from tasks.formats import format_training
from tasks.pairs import fold
from tasks.process import process
from tasks.search.index import Searcher, build_index, open_index

# "budget" finds the answer page (plan.pdf, 1) at rank 1, "common" at rank 3, "weather" not at all
PAGES = {
    "plan.pdf": "The budget is forty two, says the common plan of the town, with many further words about it.",
    "a.pdf": "common common common",
    "b.pdf": "common common filler",
    "c.pdf": "weather",
}
# what the model says in each turn: a query, an answer ("=…"), or anything else ("!…")
SCRIPTS: dict[str, Sequence[str]] = {
    "improves": ["weather", "common", "Budget", "=42"],
    "wastes": ["!hm", "budget", "=42"],
    "talks": ["common", "!a", "!b", "!c", "!d"],
    "at once": ["budget", "=42"],
    "fails": ["weather", "=7"],
}
QUESTIONS = [f"q{n}" for n in range(12)]


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    root = str(tmp_path_factory.mktemp("index"))
    rows = [{"file": file, "page_number": 1, "total_pages": 1, "text": text} for file, text in PAGES.items()]
    pages = artifact.write_table(artifact.table_of(rows, "pages/2"), root + "/pages.parquet", "pages/2", {})
    return open_index(build_index(pages, Index(), root + "/index"), Search())


def _said(step: str, agent: Agent) -> str:
    if step.startswith("!"):
        return step
    if step.startswith("="):
        given = Answer((step[1:],), (("plan.pdf", 1),))
        return as_stored(prompts.PROTOCOLS[agent.protocol].answer("Seen.", given))["content"]
    return prompts.search_message(f"I need {step}.", step, agent)["content"]


def converse(
    searcher: Searcher, question: str, script: str, agent: Agent, page_image: Any = None
) -> tuple[dict[str, Any], list[Any]]:
    """A rollout of the scripted model: its row, and what the model was sent at each call, as stored."""
    sent: list[Any] = []

    async def complete(messages: Any, options: Any, sampling: Any, seed: int) -> Completion:
        text = _said(SCRIPTS[script][len(sent)], agent)
        sent.append([{"images": None, **as_stored(message)} for message in messages])
        return Completion(text, None, (), "stop", 10, 5, 0.0)

    trajectory = asyncio.run(
        rollout(
            Question(question, f"What is the figure of {question}?", [["42"]], [("plan.pdf", 1)], split="train"),
            settings=agent,
            sampling=resolve("default", Sampling()),
            seed=0,
            complete=complete,
            search=search_with(searcher, agent.top_k),
            page_text=lambda file, page: PAGES[file],
            page_image=page_image,
            deadline_s=60,
        )
    )
    names = dict.fromkeys(("model", "model_fingerprint", "index_fingerprint", "code_fingerprint"), "x")
    return to_row(trajectory, rollout_id=f"{question} {script}", attempt=1, sample=0, **names), sent


def prepared(searcher: Searcher, root: str, agent: Agent, scripts: Sequence[str] = tuple(SCRIPTS)) -> Any:
    rows = [converse(searcher, question, script, agent)[0] for question in QUESTIONS for script in scripts]
    facts = {"settings": {"agent": agent.model_dump(mode="json")}}
    stored = artifact.write_table(
        artifact.table_of(rows, "trajectories/2"), storage.join(root, "t.parquet"), "trajectories/2", facts
    )
    return process({"trajectories": stored}, Process(), storage.join(root, "processed"))[:2]


def test_what_only_the_worked_examples_speak_of_is_not_learned(searcher: Searcher, tmp_path: Path, monkeypatch) -> None:
    agent = Agent(examples=True)
    names = [word for example in prompts.EXAMPLES for word in example.query.split() if word[0].isupper()]
    monkeypatch.setitem(SCRIPTS, "repeats", [f"{names[0]} budget", "=42"])
    settings = Format(formats=["sft_best", "sft_trajectory", "dpo", "reward"])
    processed, pairs = prepared(searcher, str(tmp_path), agent, ["repeats", "improves"])
    made = format_training(processed, pairs, settings, Agent(), str(tmp_path / "out"))
    for name, learned in {"sft_best": "completion", "sft_trajectory": "completion", "dpo": "chosen"}.items():
        rows = _rows(made, name)
        assert rows
        assert not [row for row in rows if names[0] in json.dumps(row[learned])], name
    assert any(names[0] in row["completion"][0]["content"] for row in _rows(made, "reward"))
    assert prompts.repeats_examples(f"{names[0]} budget", "What is the budget?")
    assert prompts.repeats_examples(f"{names[0].lower()} budget", "What is the budget?")
    assert not prompts.repeats_examples("Kraft Foods revenue May 2021", "What was Kraft's revenue?")
    assert not prompts.repeats_examples(f"{names[0]} budget", f"What is the budget of {names[0]}?")


def test_how_long_an_agent_goes_on_changes_no_training_set(searcher: Searcher, tmp_path: Path) -> None:
    """Or another number of turns to measure with would train every adapter again."""
    processed, pairs = prepared(searcher, str(tmp_path), Agent(examples=True))
    settings = Format(formats=["sft_best", "sft_trajectory"])
    agents = [Agent(), Agent(max_iterations=9, guided=True, image_dpi=72), Agent(examples=True)]
    made = [format_training(processed, pairs, settings, a, str(tmp_path / str(n))) for n, a in enumerate(agents)]
    for name in settings.formats:
        one, other, prompted = (found[name].sha256 for found in made)
        assert one == other != prompted


def test_nor_is_it_behind_other_searches(searcher: Searcher, tmp_path: Path, monkeypatch) -> None:
    name = prompts.EXAMPLES[0].query.split()[0]
    monkeypatch.setitem(SCRIPTS, "repeats later", ["weather", f"{name} budget", "=42"])
    processed, pairs = prepared(searcher, str(tmp_path), Agent(), ["repeats later", "improves"])
    made = format_training(processed, pairs, Format(formats=["sft_context"]), Agent(), str(tmp_path / "out"))
    assert not [row for row in _rows(made, "sft_context") if name in json.dumps(row["completion"])]


def _rows(made: dict[str, Artifact], name: str) -> list[dict[str, Any]]:
    return artifact.read_rows(made[name])


@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_every_format_says_what_was_found_under_the_prompt_that_is_served(searcher, storage_root, protocol):
    collected = Agent(protocol=protocol, examples=True)
    served = Agent(protocol=protocol)
    processed, pairs = prepared(searcher, storage_root, collected)
    made = format_training(
        processed, pairs, Format(formats=list(get_args(FormatName))), served, storage.join(storage_root, "out")
    )
    assert list(made) == list(get_args(FormatName))
    _, sent = converse(searcher, "q0", "improves", served)  # what the served model would see in the same conversation

    best = [row for row in _rows(made, "sft_best") if row["question_id"] == "q0"]
    said = {row["completion"][0]["content"]: row for row in best}
    assert set(said) == {_said("budget", served), _said("common", served)}  # "Budget" is the same query as "budget"
    row = said[_said("budget", served)]
    assert (row["rank_score"], row["effort"], row["gt_rank"], row["format"]) == (1.0, 1.0, 1, "sft_best")
    assert row["prompt"] == sent[0]
    assert row["prompt_fingerprint"] == prompts.prompt_fingerprint(served) != prompts.prompt_fingerprint(collected)
    assert (None if row["tools"] is None else json.loads(row["tools"])) == prompts.tool_definitions(served)

    trajectories = [row for row in _rows(made, "sft_trajectory") if row["question_id"] == "q0"]
    assert [len(row["completion"]) for row in trajectories] == [7, 3]  # neither wasted turns nor talk without an answer
    assert trajectories[0]["prompt"] == sent[0]
    assert trajectories[0]["prompt"] + trajectories[0]["completion"][:-1] == sent[3]
    assert trajectories[0]["completion"][-1]["content"] == _said("=42", served)

    context = [row for row in _rows(made, "sft_context") if row["question_id"] == "q0"]
    assert [row["prompt"] for row in context] == [sent[1], sent[2]]
    assert [row["completion"][0]["content"] for row in context] == [_said("common", served), _said("Budget", served)]
    assert [row["gt_rank"] for row in context] == [3, 1]

    preferred = [row for row in _rows(made, "dpo") if row["question_id"] == "q0"]
    budget = prompts.search_message("I need weather.", "Budget", served)[
        "content"
    ]  # behind the thought that came first
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in preferred} == {
        (budget, _said("weather", served)),
        (budget, _said("common", served)),
        (_said("common", served), _said("weather", served)),
    }
    assert all(row["prompt"] == sent[0] and row["chosen_score"] > row["rejected_score"] for row in preferred)

    queries = [row for row in _rows(made, "reward") if row["question_id"] == "q0"]
    assert {row["prompt"][0]["content"] for row in queries} == {"What is the figure of q0?"}
    scored = {fold(row["completion"][0]["content"]): row["score"] for row in queries}
    assert scored == {"budget": 1.0, "common": pytest.approx(1 / 3), "weather": 0.0}

    sides: dict[str, set[str]] = {}
    for name in get_args(FormatName):
        for row in _rows(made, name):
            sides.setdefault(row["question_id"], set()).add(row["split"])
    assert set(sides) == set(QUESTIONS)
    assert {len(found) for found in sides.values()} == {1}
    assert set.union(*sides.values()) == {"train", "val"}


def test_behind_a_question_no_thought_is_learned_that_is_about_pages_which_it_does_not_show(
    searcher, tmp_path, monkeypatch
):
    monkeypatch.setitem(SCRIPTS, "sees", ["common", "Budget", "=42"])
    agent = Agent(protocol="tags")
    processed, pairs = prepared(searcher, str(tmp_path), agent, ["sees"])
    settings = Format(formats=["sft_best", "sft_context", "dpo"])
    made = format_training(processed, pairs, settings, agent, str(tmp_path / "out"))
    first = prompts.search_message("I need common.", "Budget", agent)["content"]
    assert {row["completion"][0]["content"] for row in _rows(made, "sft_best")} == {first}
    said = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in _rows(made, "dpo")}
    assert said == {(first, _said("common", agent))}
    # there the pages are shown
    assert {row["completion"][0]["content"] for row in _rows(made, "sft_context")} == {_said("Budget", agent)}


def test_a_wrong_answer_is_not_learned_nor_what_led_from_the_search_to_it(searcher, tmp_path, monkeypatch):
    monkeypatch.setitem(SCRIPTS, "wrong", ["weather", "budget", "=bananas"])
    agent = Agent(protocol="tags")
    processed, pairs = prepared(searcher, str(tmp_path), agent, ["wrong", "at once"])
    right = {row["rollout_id"]: row["right"] for row in artifact.read_rows(processed)}
    assert (right["q0 wrong"], right["q0 at once"]) == (False, True)
    made = format_training(processed, pairs, Format(formats=["sft_trajectory"]), agent, str(tmp_path / "out"))
    learned = [row["completion"] for row in _rows(made, "sft_trajectory") if row["question_id"] == "q0"]
    ends = {(completion[0]["content"], completion[-1]["content"]) for completion in learned}
    weather, budget, answer = (_said(step, agent) for step in ("weather", "budget", "=42"))
    assert ends == {(weather, budget), (budget, answer)}


def test_a_search_that_found_less_than_one_before_it_is_not_learned(searcher, tmp_path, monkeypatch):
    """Though it found more than the last one."""
    monkeypatch.setitem(SCRIPTS, "falls back", ["budget", "weather", "common", "=42"])
    processed, pairs = prepared(searcher, str(tmp_path), Agent(), ["falls back"])
    with pytest.raises(EmptyError, match="searched again and found more"):
        format_training(processed, pairs, Format(formats=["sft_context"]), Agent(), str(tmp_path / "out"))


def test_of_several_searches_in_a_turn_the_best_is_learned_with_its_own_score(searcher, tmp_path, monkeypatch):
    agent = Agent(protocol="tools")
    both = "\n".join(call_text("search_documents", json.dumps({"query": query})) for query in ("common", "budget"))
    monkeypatch.setitem(SCRIPTS, "both", ["weather", f"!{both}", "=42"])
    processed, pairs = prepared(searcher, str(tmp_path), agent, ["both", "improves"])
    made = format_training(processed, pairs, Format(formats=["sft_context"]), agent, str(tmp_path / "out"))
    rows = [row for row in _rows(made, "sft_context") if row["question_id"] == "q0"]
    assert [(row["gt_rank"], row["rank_score"]) for row in rows] == [(1, 1.0), (3, pytest.approx(1 / 3)), (1, 1.0)]
    assert '{"query": "budget"}' in rows[0]["completion"][0]["content"]


def test_queries_of_rollouts_that_were_filtered_out_are_scored_too(searcher, tmp_path):
    agent = Agent()
    processed, pairs = prepared(searcher, str(tmp_path), agent, ["at once", "fails"])
    made = format_training(processed, pairs, Format(formats=["reward", "dpo"]), agent, str(tmp_path / "out"))
    rows = [row for row in _rows(made, "reward") if row["question_id"] == "q0"]
    told = {row["completion"][0]["content"]: (row["score"], row["effort"], row["gt_rank"]) for row in rows}
    assert told == {"budget": (1.0, 1.0, 1), "weather": (0.0, 0.0, None)}
    assert {row["effort"] for row in _rows(made, "dpo")} == {1.0}  # of the better query


def test_jsonl_of_the_reference(searcher, storage_root):
    agent = Agent(protocol="tools")
    processed, pairs = prepared(searcher, storage_root, agent)
    settings = Format(formats=list(get_args(FormatName)), jsonl=True)
    made = format_training(processed, pairs, settings, agent, storage.join(storage_root, "out"))
    folder = artifact.fetch_folder(made["jsonl"])
    names = {f"{name}_{part}.jsonl" for name in get_args(FormatName) for part in ("train", "val")}
    assert names <= {path.name for path in folder.iterdir()}
    lines = {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names}
    assert made["jsonl"].rows == sum(map(len, lines.values())) == sum(made[name].rows for name in get_args(FormatName))
    for name in get_args(FormatName):
        for part in ("train", "val"):
            there = sorted(row["question_id"] for row in _rows(made, name) if row["split"] == part)
            assert sorted(line["question_id"] for line in lines[f"{name}_{part}.jsonl"]) == there
    best = next(line for line in lines["sft_best_train.jsonl"] if line["rank_score"] == 1)
    asked = f"<question>What is the figure of {best['question_id']}?</question>"
    assert best == {
        "input": asked,
        "output": "<think>I need budget.</think>\n<search>budget</search>",
        "rank_score": 1.0,
        "effort": 1.0,
        "gt_rank": 1,
        "question_id": best["question_id"],
    }
    everything = "".join((folder / name).read_text() for name in names)
    assert "tool_call" not in everything
    traces = [line["output"] for part in ("train", "val") for line in lines[f"sft_trajectory_{part}.jsonl"]]
    trace = next(trace for trace in traces if "weather" in trace)
    assert trace.startswith("<think>I need weather.</think>\n<search>weather</search>\n<results>")
    assert trace.endswith('</results>\n<think>Seen.</think>\n<answer>42 <cite file="plan.pdf" page="1"/></answer>')
    context = [line["input"] for part in ("train", "val") for line in lines[f"sft_context_{part}.jsonl"]]
    assert all("<search>weather</search>\n<results>" in text for text in context)
    pair = lines["dpo_train.jsonl"][0]
    weights = {"rank_score", "effort", "gt_rank"}
    texts = {"prompt", "chosen", "rejected"}
    assert set(pair) == {*texts, "chosen_score", "rejected_score", "question_id", *weights}
    assert (pair["rank_score"], pair["gt_rank"]) == (pair["chosen_score"], round(3 * (1 - pair["chosen_score"])) + 1)
    scored = lines["reward_train.jsonl"][0]
    assert set(scored) == {"input", "score", "effort", "gt_rank", "question_id"}
    assert scored["input"].endswith(f"</question>\n<search>{scored['input'].split('<search>')[1]}")
    assert 0 <= scored["score"] <= 1


def test_best_per_question_keeps_the_best(searcher, tmp_path):
    agent = Agent(protocol="tags")
    processed, pairs = prepared(searcher, str(tmp_path), agent)
    made = format_training(processed, pairs, Format(best_per_question=1), agent, str(tmp_path / "out"))
    rows = _rows(made, "sft_best")
    assert [row["question_id"] for row in rows] == sorted(QUESTIONS)
    assert {row["completion"][0]["content"] for row in rows} == {_said("budget", agent)}


def test_the_same_input_gives_the_same_bytes_in_any_order_of_rollouts(searcher, tmp_path):
    agent = Agent(protocol="tags")
    names = ["sft_best", "dpo", "reward"]
    hashes = []
    for place, scripts in (("a", tuple(SCRIPTS)), ("b", tuple(reversed(SCRIPTS)))):
        root = str(tmp_path / place)
        processed, pairs = prepared(searcher, root, agent, scripts)
        made = format_training(processed, pairs, Format(formats=names), agent, root + "/out")
        hashes.append([artifact.read_table(made[name]) for name in names])
    assert all(one.equals(other) for one, other in zip(*hashes, strict=True))


@pytest.mark.parametrize(
    ("name", "scripts", "says"),
    [
        ("sft_trajectory", ["talks"], "wasted no turn"),
        ("sft_context", ["at once"], "max_iterations"),
        ("dpo", ["at once"], "no preference pairs"),
    ],
)
def test_an_empty_training_set_says_what_to_change(searcher, tmp_path, name, scripts, says):
    agent = Agent(protocol="tags")
    processed, pairs = prepared(searcher, str(tmp_path), agent, scripts)
    with pytest.raises(EmptyError, match=says):
        format_training(processed, pairs, Format(formats=[name]), agent, str(tmp_path / "out"))
    with pytest.raises(EmptyError, match="raise train_ratio"):
        format_training(processed, pairs, Format(train_ratio=0), agent, str(tmp_path / "out"))
    assert not storage.exists(str(tmp_path / "out"))


@pytest.mark.parametrize(
    "served", [{"protocol": "tools"}, {"observation": "none"}, {"top_k": 5}, {"max_page_chars": 99}]
)
def test_conversations_are_not_taught_where_they_would_look_otherwise(searcher, tmp_path: Path, served):
    processed, pairs = prepared(searcher, str(tmp_path), Agent(protocol="tags"), ["improves"])
    other = Agent(**{"protocol": "tags", **served})
    for name in ("sft_trajectory", "sft_context"):
        with pytest.raises(ConfigError, match=f"collected with {next(iter(served))}"):
            format_training(processed, pairs, Format(formats=[name]), other, str(tmp_path / "out"))
    assert format_training(processed, pairs, Format(), other, str(tmp_path / "out"))["sft_best"].rows


@tune(max_examples=60, deadline=None)
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_train_ratio_only_adds_questions_to_train(question, one, other):
    low, high = sorted((one, other))
    assert formats.side(question, low) == "val" or formats.side(question, high) == "train"
    assert formats.side(question, 1) == "train"
    assert formats.side(question, 0) == "val"


def test_sides_follow_the_ratio():
    share = sum(formats.side(f"question {n}", 0.9) == "train" for n in range(2000)) / 2000
    assert share == pytest.approx(0.9, abs=0.03)


def test_questions_of_another_split_are_not_learned_from(searcher, tmp_path):
    agent = Agent(protocol="tags")
    processed, pairs = prepared(searcher, str(tmp_path), agent)
    for name in get_args(FormatName):
        settings = Format(formats=[name], split="dev")
        with pytest.raises(EmptyError, match="is empty for the dev questions, which alone are learned from: "):
            format_training(processed, pairs, settings, agent, str(tmp_path / "out"))
    assert Format(formats="all").formats == Format(formats=["all"]).formats == list(get_args(FormatName))
