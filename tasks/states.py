"""States: conversations before one of their turns, from which queries are sampled without running the rollout to its end.

    <uri>/states.parquet

A state is named by its question and its messages, so the same conversation had by two rollouts is one. The question alone,
before the first turn, is a state too; it has no name.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from tasks import artifact, config, reward, storage
from tasks.agent.message import Message
from tasks.agent.prompts import refuse_other_conversations
from tasks.agent.trajectory import as_answered, turn_messages
from tasks.artifact import Artifact
from tasks.errors import EmptyError

SCHEMA = "states/1"
_COLUMNS = ["rollout_id", "status", "question_id", "split", "answer_locations", "turns", "messages"]

Row = dict[str, Any]


def find(
    questions: Artifact,
    trajectories: Mapping[str, Artifact],
    settings: config.Mine,
    agent: config.Agent,
    uri: str,
) -> Artifact:
    """The states of trajectories in which an agent searches on, each once; with states="both" also the questions alone.

    A conversation's first turn is the question's own, and in a turn that must answer nothing is searched.

    Args:
        trajectories: collections by name.
        agent: who is to go on.
        uri: folder for what is written.

    Raises:
        ConfigError: the conversations are of another protocol or view of pages than the agent's.
        EmptyError: no trajectory has such a state.
    """
    had_by = {
        name: artifact.read_provenance(a).get("settings", {}).get("agent", {}) for name, a in trajectories.items()
    }
    for collected in had_by.values():
        refuse_other_conversations(collected, agent)
    known: set[str] = set()
    per_question: Counter[str] = Counter()

    def new(row: Row, collected: Mapping[str, Any]) -> Iterator[Row]:
        for state in _states(row, collected, settings.found):
            full = settings.max_states is not None and per_question[row["question_id"]] >= settings.max_states
            if not full and state["state"] not in known:
                known.add(state["state"])
                per_question[row["question_id"]] += 1
                yield state

    def tables() -> Iterator[pa.Table]:
        if settings.states == "both":
            alone = artifact.read_table(questions, ["question_id"])["question_id"].to_pylist()
            rows = [{"state": None, "question_id": id_, "messages": [], "turn": 1} for id_ in alone]
            yield artifact.table_of(rows, SCHEMA)
        for name, stored in trajectories.items():
            for table in artifact.read_batches(stored, _COLUMNS, rows=128):
                finished = (row for row in table.to_pylist() if row["status"] == "finished")
                asked = (row for row in finished if settings.split in ("all", row["split"]))
                yield artifact.table_of([state for row in asked for state in new(row, had_by[name])], SCHEMA)
        if not known and settings.states == "trajectories":
            raise EmptyError(
                "no trajectory has a conversation to go on from: collect with max_iterations of 3 or more, take those that "
                "have found the page too (found), or mine questions alone"
            )

    facts = artifact.provenance(
        {"questions": questions, **trajectories}, settings=settings.model_dump(mode="json"), agent=agent.model_dump()
    )
    return artifact.write_tables(tables(), storage.join(uri, "states.parquet"), SCHEMA, facts)


def _states(row: Row, collected: Mapping[str, Any], found: bool) -> Iterator[Row]:
    """The states of a trajectory before its second and later turns, but for a turn that had to answer.

    Nor those whose images have given way to text since.
    """
    messages, turns = row["messages"], row["turns"]
    spoken = turn_messages((message["role"] for message in messages), len(turns))
    wanted = reward.pages_wanted(row)
    unchanged = as_answered(turns, messages)
    must_answer = collected.get("max_iterations") if collected.get("answer") else None
    for number, turn in enumerate(turns[:-1], start=2):
        ranks = [reward.gt_rank(reward.pages_found(search), wanted) for search in turn["searches"]]
        if number == must_answer or (not found and reward.first_success(ranks)):
            return
        if spoken[number - 1] < unchanged:
            continue
        earlier = messages[spoken[0] : spoken[number - 1]]
        yield {
            "state": _name(row["question_id"], earlier),
            "question_id": row["question_id"],
            "messages": earlier,
            "rollout_id": row["rollout_id"],
            "turn": number,
        }


def _name(question_id: str, messages: list[Message]) -> str:
    return hashlib.sha256(json.dumps([question_id, messages], ensure_ascii=False).encode()).hexdigest()[:24]


def of_questions(states: Artifact) -> dict[str, list[str | None]]:
    """The states of each question; None is the question alone."""
    found: dict[str, list[str | None]] = {}
    for table in artifact.read_batches(states, ["question_id", "state"]):
        for question_id, state in zip(table["question_id"].to_pylist(), table["state"].to_pylist(), strict=True):
            found.setdefault(question_id, []).append(state)
    return found


def conversations(states: Artifact) -> dict[str, list[Message]]:
    """The messages of each state that is not a question alone, by its name."""
    rows = artifact.read_rows(states, ["state", "messages"])
    return {row["state"]: row["messages"] for row in rows if row["state"] is not None}
