"""Stored trajectories, read again by today's parser: no model is asked, and nothing is written of what it did not say.

Each turn's raw text is parsed anew, as if the server had parsed nothing. Where that gives what the row says, the turn stays as it
is, so reading again with the parser that read it first gives the same rows. Where it gives something else, the turn says
read_by "reparse", and

- a search that the turn had made keeps its results. One that it had not made is searched now, in the index and with the search
  settings that the trajectories were collected with, for its rank alone: `shown` is false, as the model never saw what it found.
- an answer ends the rollout there, with what came after it cut off, and the rollout is "answered" whatever it was before.
- a rollout whose answer is none any more is "out_of_turns", or "searched" where no answer was asked for.
- the rest of the conversation stands as it was, also where it answers another reading: with a complaint about a call that
  now can be read, say, or with results of a query that now is another. What the model wrote next, it wrote after that.

A search in a turn that answers, or must, is not run, as it is not in a rollout. So a search that is read now counts as one that
was tried (its query can be learned from and paired), but sft_trajectory leaves such conversations out.

    <uri>/trajectories.parquet   <uri>/changes.parquet, how many turns and rollouts became what
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from tasks import artifact, config, storage
from tasks.agent.completion import Completion
from tasks.agent.prompts import PROTOCOLS
from tasks.agent.protocol import Answer, Step
from tasks.agent.rollout import outcome_of, search_record
from tasks.agent.trajectory import Outcome, cited, search_row, tokens, turn_messages
from tasks.artifact import Artifact
from tasks.cache import code_version
from tasks.errors import ArtifactError
from tasks.markdown import markdown_table
from tasks.reward import pages_wanted
from tasks.search.index import open_index

SCHEMA, CHANGES = "trajectories/2", "statistics/1"

Row = dict[str, Any]
Search = Callable[[Row, str], Row]
"""(row of the rollout, query) → the search as it stands in a row, not shown to the model."""


def reparse(trajectories: Artifact, index: Artifact, uri: str) -> tuple[Artifact, Artifact]:
    """Read all turns again; returns the trajectories and what has changed.

    Args:
        index: the one that the rollouts searched.
        uri: folder for what is written.

    Raises:
        ArtifactError: a search has to be run that was not, and the rollouts searched another index.
    """
    made = artifact.read_provenance(trajectories)
    search = _searching(index, made)
    # files of others do not say; their rollouts were to answer
    without_answer: Outcome = (
        "out_of_turns" if made.get("settings", {}).get("agent", {}).get("answer", True) else "searched"
    )
    changes: Counter[tuple[str, str]] = Counter()

    def tables() -> Iterator[pa.Table]:
        for table in artifact.read_batches(trajectories):
            rows = []
            for row in table.to_pylist():
                rows.append(read_again(row, search, without_answer))
                changes.update(_changes(row, rows[-1]))
            yield artifact.table_of(rows, SCHEMA)

    # what the trajectories were collected with goes on to say so
    facts = {**made, "reparsed": {"trajectories": trajectories.sha256, "code": code_version("tasks.reparse")}}
    again = artifact.write_tables(tables(), storage.join(uri, "trajectories.parquet"), SCHEMA, facts)
    counted = [{"section": section, "name": name, "count": n} for (section, name), n in sorted(changes.items())]
    table = artifact.table_of(counted, CHANGES)
    changed = artifact.write_table(table, storage.join(uri, "changes.parquet"), CHANGES, artifact.provenance())
    return again, changed


def _searching(index: Artifact, made: Mapping[str, Any]) -> Search:
    searcher = open_index(index, config.Search.model_validate(made.get("settings", {}).get("search", {})))

    def search(row: Row, query: str) -> Row:
        if row["index_fingerprint"] != index.sha256:
            raise ArtifactError(
                "the trajectories were collected with another index than the storage holds now, so what is read anew "
                "cannot be searched as they searched: ingest what they were collected with, or collect again"
            )
        wanted = pages_wanted(row)
        found = searcher.search(query, row["top_k"], row["question"])
        return search_row(search_record(query, found, wanted, row["top_k"], shown=False))

    return search


def read_again(row: Row, search: Search, without_answer: Outcome) -> Row:
    """A row of trajectories, its turns read by today's parser.

    Args:
        without_answer: how a rollout of this collection ended that gave no answer.
    """
    protocol = PROTOCOLS[row["protocol"]]
    turns: list[Row] = []
    answer: Answer | None = None
    for stored in row["turns"]:
        step = protocol.parse(Completion(stored["raw_text"], finish_reason=stored["finish_reason"]))
        is_final = len(turns) + 1 == len(row["turns"])
        out_of_turns = row["outcome"] == "out_of_turns" or stored["failure"] == "not_an_answer"
        # a turn that must answer makes no search: one that did is the last that is known of an imported rollout
        must_answer = is_final and out_of_turns and not stored["searches"]
        turns.append(_turn(row, stored, step, must_answer, search))
        if answer := step.answer:
            break
    dropped = row["turns"][len(turns) :]
    again = {**row, "turns": turns}
    if answer:
        citations = cited(answer.citations, row["turns"][: len(turns) - 1], row["state_messages"])  # as it was told
        again |= {"status": "finished", "outcome": "answered", "failure_detail": None}
        again |= {"answer": list(answer.texts), "citations": citations}
    elif row["outcome"] == "answered":
        again |= {"outcome": without_answer, "answer": [], "citations": []}
    if dropped:
        for name in ("prompt_tokens", "completion_tokens"):
            again[name] = tokens(turn[name] for turn in turns)
        again["elapsed_s"] = max(0.0, row["elapsed_s"] - sum(turn["latency_s"] for turn in dropped))
        spoken = turn_messages((message["role"] for message in row["messages"]), len(row["turns"]))
        again["messages"] = row["messages"][: spoken[-len(dropped) - 1] + 1]
    return again


def _turn(row: Row, stored: Row, step: Step, must_answer: bool, search: Search) -> Row:
    action, failure, detail = outcome_of(step, must_answer)
    queries = [] if must_answer or step.answer else step.queries
    made = list(stored["searches"])
    same = action == stored["action"] and queries == [old["query"] for old in made] and _answers_alike(row, step)
    searches = []
    for query in queries:
        old = next((old for old in made if old["query"] == query), None)
        if old is not None:
            made.remove(old)
        searches.append(old if old is not None else search(row, query))
    return {
        **stored,
        "reasoning": step.reasoning,
        "action": action,
        "searches": searches,
        "failure": failure,
        "failure_detail": detail,
        "read_by": stored["read_by"] if same else step.read_by and "reparse",
        "repaired": step.repaired,
    }


def _answers_alike(row: Row, step: Step) -> bool:
    if step.answer is None:
        return True
    cites = tuple((place["file"], place["page"]) for place in row["citations"])
    return (tuple(row["answer"]), cites) == (step.answer.texts, step.answer.citations)


def _changes(before: Row, after: Row) -> Iterator[tuple[str, str]]:
    """What to count of a rollout, as (section, name)."""
    yield "rollouts", "all"
    if before != after:
        yield "rollouts", "changed"
    if before["outcome"] != after["outcome"]:
        yield "outcomes", f"{before['outcome']} → {after['outcome']}"
    for old, new in zip(before["turns"], after["turns"], strict=False):
        if new["read_by"] == "reparse" or old["action"] != new["action"]:
            yield "turns", f"{old['action']} → {new['action']}"
    if len(after["turns"]) < len(before["turns"]):
        yield from [("turns", "cut off")] * (len(before["turns"]) - len(after["turns"]))
    for name, row in (("before", before), ("after", after)):
        yield from [(name, "turns")] * len(row["turns"])
        yield from [(name, "valid")] * sum(turn["failure"] is None for turn in row["turns"])


def markdown(changes: Mapping[str, Mapping[str, int]]) -> str:
    """What has changed, as a page of Markdown; `changes` is {section: {name: count}}."""
    rollouts = changes.get("rollouts", {})
    rows = [("Rollouts", str(rollouts.get("all", 0))), ("Rollouts that changed", str(rollouts.get("changed", 0)))]
    for name in ("before", "after"):
        turns, valid = (changes.get(name, {}).get(what, 0) for what in ("turns", "valid"))
        share = f"{valid / turns:.1%}" if turns else "–"
        rows.append((f"Turns with a valid action, {name}", f"{valid} of {turns} ({share})"))
    for section in ("turns", "outcomes"):
        rows += [(f"{section.capitalize()}: {name}", str(n)) for name, n in changes.get(section, {}).items()]
    return markdown_table(("", "n"), rows) + "\n"


def read_changes(changes: Artifact) -> dict[str, dict[str, int]]:
    """{section: {name: count}} of a changes artifact."""
    read: dict[str, dict[str, int]] = {}
    for row in artifact.read_rows(changes):
        read.setdefault(row["section"], {})[row["name"]] = row["count"]
    return read
