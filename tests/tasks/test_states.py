"""States of conversations that the real agent loop had: which there are, and that the model goes on from what it was sent."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as tune
from hypothesis import strategies as st

from tasks import artifact, pairs, states, storage
from tasks.agent.completion import Completion
from tasks.agent.prompts import prompt_messages
from tasks.agent.protocol import as_stored
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Question
from tasks.artifact import Artifact
from tasks.config import Agent, Format, Mine, Process, Sampling
from tasks.errors import ConfigError, EmptyError
from tasks.formats import format_training
from tasks.process import process
from tasks.search.index import Searcher
from tests.tasks.test_formats import PAGES, QUESTIONS, SCRIPTS, converse, searcher
from tests.tasks.test_process import inputs, store, trajectory

__all__ = ["searcher"]
FOUND = {"budget", "common"}


def _collected(searcher: Searcher, root: str, agent: Agent) -> tuple[Artifact, Artifact, list[Any]]:
    """Questions, their trajectories, and of each (question, script, what the model was sent in each turn)."""
    asked = [{"question_id": id_, "question": f"What is the figure of {id_}?", "split": "train"} for id_ in QUESTIONS]
    questions = artifact.write_table(
        artifact.table_of(asked, "questions/1"), storage.join(root, "questions.parquet"), "questions/1", {}
    )
    rows, told = [], []
    for question in QUESTIONS[:3]:
        for script in SCRIPTS:
            row, sent = converse(searcher, question, script, agent)
            # the same conversation, had twice
            rows += [row, row | {"rollout_id": row["rollout_id"] + " again"}]
            told.append((question, script, sent))
    facts = {"settings": {"agent": agent.model_dump(mode="json")}}
    uri = storage.join(root, "trajectories.parquet")
    return (
        questions,
        artifact.write_table(artifact.table_of(rows, "trajectories/2"), uri, "trajectories/2", facts),
        told,
    )


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@pytest.mark.parametrize("found", [False, True])
def test_states_are_what_the_model_was_sent_before_each_later_turn_that_may_search(
    searcher: Searcher, storage_root: str, protocol: Any, found: bool
) -> None:
    had = Agent(protocol=protocol, examples=True)
    agent = Agent(protocol=protocol)
    questions, stored, told = _collected(searcher, storage_root, had)
    settings = Mine(states="trajectories", found=found)
    made = states.find(questions, {"trajectories": stored}, settings, agent, storage_root)
    rows = artifact.read_rows(made)
    prompt = len(prompt_messages("", had))
    expected = []
    for question, script, sent in told:
        for turn in range(2, min(len(sent), had.max_iterations - 1) + 1):
            if found or not FOUND & {said.lower() for said in SCRIPTS[script][: turn - 1]}:
                expected.append((question, turn, sent[turn - 1][prompt:]))
    assert len({row["state"] for row in rows}) == len(rows)
    distinct = [one for n, one in enumerate(expected) if one not in expected[:n]]
    assert [(row["question_id"], row["turn"], row["messages"]) for row in rows] == distinct
    of_questions = states.of_questions(made)
    assert {id_ for ids in of_questions.values() for id_ in ids} == set(states.conversations(made))

    few = states.find(questions, {"t": stored}, settings.model_copy(update={"max_states": 1}), agent, storage_root)
    assert states.of_questions(few) == {id_: names[:1] for id_, names in of_questions.items()}
    both = states.find(questions, {"t": stored}, settings.model_copy(update={"states": "both"}), agent, storage_root)
    assert states.of_questions(both) == {id_: [None, *of_questions.get(id_, [])] for id_ in QUESTIONS}


@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_the_model_goes_on_from_exactly_what_was_stored(searcher: Searcher, tmp_path: Path, protocol: Any) -> None:
    had = Agent(protocol=protocol)
    questions, stored, _ = _collected(searcher, str(tmp_path), had)
    made = states.find(questions, {"t": stored}, Mine(states="trajectories", found=True), had, str(tmp_path))
    agent = Agent(protocol=protocol, examples=True, max_iterations=1, answer=False)
    for row in artifact.read_rows(made):
        sent: list[Any] = []

        async def complete(messages: Any, options: Any, sampling: Any, seed: int, sent: list[Any] = sent) -> Completion:
            sent.append(list(messages))
            said = prompt_messages("", agent)[2]["content"] if protocol == "tags" else '{"name": "search_documents"}'
            return Completion(said, None, (), "stop", 10, 5, 0.0)

        asked = f"What is the figure of {row['question_id']}?"
        went_on = asyncio.run(
            rollout(
                Question(row["question_id"], asked, answer_locations=[("plan.pdf", 1)]),
                settings=agent,
                sampling=resolve("default", Sampling()),
                seed=0,
                complete=complete,
                search=search_with(searcher, 3),
                page_text=lambda file, page: PAGES[file],
                deadline_s=60,
                earlier=row["messages"],
            )
        )
        (messages,) = sent
        told = [*prompt_messages(asked, agent), *map(as_stored, row["messages"])]
        assert [as_stored(message) for message in messages] == told == went_on.messages[:-1]
        assert (len(went_on.turns), went_on.state_messages) == (1, len(row["messages"]))
        called = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        assert called == answered or protocol == "tags"


def test_conversations_of_another_kind_or_none_at_all_are_told(searcher: Searcher, tmp_path: Path) -> None:
    questions, stored, _ = _collected(searcher, str(tmp_path), Agent(protocol="tags"))
    mine = Mine(states="trajectories")
    for other in (Agent(protocol="tools"), Agent(observation="none"), Agent(top_k=5)):
        with pytest.raises(ConfigError, match="conversations were collected with"):
            states.find(questions, {"t": stored}, mine, other, str(tmp_path))
    with pytest.raises(EmptyError, match="max_iterations of 3 or more"):
        states.find(questions, {"t": stored}, Mine(states="trajectories", split="dev"), Agent(), str(tmp_path))
    alone = states.find(questions, {"t": stored}, Mine(states="both", split="dev"), Agent(), str(tmp_path))
    assert states.of_questions(alone) == {id_: [None] for id_ in QUESTIONS}


@pytest.mark.parametrize("name", ["sft_best", "dpo"])
def test_what_was_mined_in_a_conversation_is_not_taught_where_it_would_look_otherwise(
    tmp_path: Path, name: Any
) -> None:
    rows = [trajectory(f"r{n}", "q1", [(query, rank)]) for n, (query, rank) in enumerate([("a", 1), ("b", None)])]
    for row in rows:
        row["messages"][2:2] = _said("s")
        row |= {"state": "s", "state_messages": len(_said("s"))}
    facts = {"settings": {"agent": Agent().model_dump(mode="json")}}
    table = artifact.table_of(rows, "trajectories/2")
    stored = artifact.write_table(table, str(tmp_path / "mined.parquet"), "trajectories/2", facts)
    processed, paired, _ = process({"mined": stored}, Process(), str(tmp_path / "processed"))
    settings = Format(formats=[name], train_ratio=1)
    assert format_training(processed, paired, settings, Agent(), str(tmp_path / "same"))[name].rows == 1
    with pytest.raises(ConfigError, match="collected with top_k 3"):
        format_training(processed, paired, settings, Agent(top_k=5), str(tmp_path / "other"))


_mined = st.lists(
    st.tuples(
        st.sampled_from(["q1", "q2"]),
        st.sampled_from([None, "s1", "s2"]),
        st.sampled_from(["a", "b", "A ", "c d", "c  D", "e"]),
        st.none() | st.integers(1, 3),
    ),
    max_size=12,
)


@tune(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_mined, st.integers(0, 4))
def test_queries_are_paired_within_a_state(
    tmp_path_factory: pytest.TempPathFactory, found: list[Any], max_pairs: int
) -> None:
    """Every ordered pair of a state's distinct queries, and no other, cut to so many a state."""
    found = [*found, ("q1", None, "sure", 1)]
    rows, scores = [], {}
    for n, (question, name, query, rank) in enumerate(found):
        row = trajectory(f"r{n}", question, [(query, rank)], examples=1)
        if state := name and f"{question} {name}":
            at = 4  # after the prompt: system, an example of two messages, the question
            row["messages"][at:at] = _said(state)
            row |= {"state": state, "state_messages": len(_said(state))}
        rows.append(row)
        of_state = scores.setdefault((question, state), {})
        score = 0.0 if rank is None else (4 - rank) / 3
        of_state[pairs.fold(query)] = max(score, of_state.get(pairs.fold(query), 0.0))
    root = str(tmp_path_factory.mktemp("mined"))
    stored = inputs(store(root, rows))
    _, everything, _ = process(stored, Process(max_pairs=1000), root + "/all")
    made: dict[Any, set[tuple[str, str]]] = {}
    for pair in artifact.read_rows(everything):
        state = pair["question_id"], pair["state"]
        assert [as_stored(message) for message in pair["earlier"]] == (_said(pair["state"]) if pair["state"] else [])
        assert pair["chosen_score"] == pytest.approx(scores[state][pairs.fold(pair["chosen"])])
        made.setdefault(state, set()).add((pairs.fold(pair["chosen"]), pairs.fold(pair["rejected"])))
    ordered = {s: {(a, b) for a in own for b in own if own[a] > own[b] + 1e-9} for s, own in scores.items()}
    assert made == {state: wanted for state, wanted in ordered.items() if wanted}
    _, cut, _ = process(stored, Process(max_pairs=max_pairs), root + "/cut")
    counts: dict[Any, int] = {}
    for pair in artifact.read_rows(cut):
        state = pair["question_id"], pair["state"]
        counts[state] = counts.get(state, 0) + 1
    assert counts == {s: min(len(w), max_pairs) for s, w in ordered.items() if w and max_pairs}


def _said(state: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f"searched {state}"}, {"role": "user", "content": "nothing"}]
