"""Trajectories → scored rollouts, preference pairs and statistics.

Ranks are taken from the stored results and the answer locations, so a change of the reward needs no new collection.

    <uri>/processed.parquet   <uri>/pairs.parquet   <uri>/statistics.parquet   <uri>/statistics.json, the same for people
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from tasks import artifact, fate, pairs, reward, statistics, storage
from tasks.agent.message import Message
from tasks.agent.trajectory import as_answered, turn_messages
from tasks.artifact import Artifact
from tasks.config import Process, RewardName
from tasks.errors import ConfigError, EmptyError
from tasks.schemas import TABLES
from tasks.statistics import Rollout

Row = dict[str, Any]
_State = tuple[str, str]  # id of the question, and of the conversation gone on from, "" for the question alone

_IN, _OUT, _PAIRS = "trajectories/2", "processed/4", "pairs/3"
# Conversations go from table to table as Arrow columns; only what is scored becomes Python objects.
_UNREAD = ("messages", "tools")
_COPIED = [name for name in TABLES[_OUT].names if name in TABLES[_IN].names]
_MADE = [name for name in TABLES[_OUT].names if name not in _COPIED]


def process(trajectories: Mapping[str, Artifact], settings: Process, uri: str) -> tuple[Artifact, Artifact, Artifact]:
    """Score every finished rollout, filter, and pair the queries of each state: a question, or a conversation gone on from.

    The filters decide which rollouts become training examples; pairs are made of all finished rollouts, because a query
    that failed is what a better one is preferred to. Processed rows keep the order of the trajectories; pairs and
    statistics do not depend on it. Conversations pass through in batches, never all in memory. Collections are read one after
    the other; a rollout that is in several, because a night was repeated with other choices, counts once.

    Args:
        trajectories: collections by name; the names go into the provenance.
        uri: folder for what is written.

    Returns:
        The processed rollouts, the pairs, and the statistics (tasks/statistics.py).

    Raises:
        ConfigError: the collections searched otherwise or to different depths, so that their scores cannot be compared.
        EmptyError: no rollout is left.
    """
    _refuse_other_depths(trajectories)
    _refuse_other_searches(trajectories)
    rollouts: list[Rollout] = []
    questions: dict[str, Row] = {}
    candidates: dict[_State, dict[str, pairs.Candidate]] = {}
    earlier: dict[_State, list[Message]] = {}  # the messages of each state that is not the question alone

    def kept_tables() -> Iterator[pa.Table]:
        columns = list(dict.fromkeys([*_COPIED, "status", "turns", "answer"]))
        for table in _once(trajectories, columns):
            rows = table.drop_columns(list(_UNREAD)).to_pylist()
            roles = _roles(table["messages"])
            made, mask = [], []
            for at, (row, row_roles) in enumerate(zip(rows, roles, strict=True)):
                finished = row["status"] == "finished"
                scored = _score(row, row_roles, settings.reward) if finished else None
                keep = scored is not None and _keep(scored, settings)
                rollouts.append(_measure(row, scored, keep))
                mask.append(keep)
                if scored is None:
                    continue
                if keep:
                    gave_way = any(turn["images_replaced"] for turn in row["turns"])
                    said = table["messages"][at].as_py() if gave_way else ()
                    scored["as_answered"] = as_answered(row["turns"], said)
                    made.append({name: scored[name] for name in _MADE})
                questions.setdefault(row["question_id"], {name: row[name] for name in ("question", "split")})
                state = row["question_id"], row["state"] or ""
                if row["state"] and state not in earlier:
                    start = scored["prompt_messages"]
                    earlier[state] = table["messages"][at].as_py()[start : start + row["state_messages"]]
                pairs.add(candidates.setdefault(state, {}), candidates_of(row, scored))
            if made:
                kept = table.select(_COPIED).filter(pa.array(mask))
                new = pa.Table.from_pylist(made, schema=pa.schema([TABLES[_OUT].field(name) for name in _MADE]))
                for name in _MADE:
                    kept = kept.append_column(TABLES[_OUT].field(name), new[name])
                yield kept
        if not any(r.kept for r in rollouts):
            raise EmptyError(_nothing_left(rollouts, settings))

    # how pages were shown matters to whoever trains on whole conversations
    agents = [artifact.read_provenance(a).get("settings", {}).get("agent", {}) for a in trajectories.values()]
    facts = artifact.provenance(trajectories, settings=settings.model_dump(mode="json"), agent=_common(agents))
    processed = artifact.write_tables(kept_tables(), storage.join(uri, "processed.parquet"), _OUT, facts)
    made = [(state, pair) for state in sorted(candidates) for pair in pairs.make(candidates[state], settings.max_pairs)]
    pair_rows = (pair_row(state, questions[state[0]], earlier.get(state, []), pair) for state, pair in made)
    paired = artifact.write_tables(
        (artifact.table_of(rows, _PAIRS) for rows in chunks(pair_rows)),
        storage.join(uri, "pairs.parquet"),
        _PAIRS,
        facts,
    )
    found = statistics.summarize(rollouts, [pair.source for _, pair in made])
    storage.write_bytes(storage.join(uri, "statistics.json"), json.dumps(found, indent=1).encode())
    counted = artifact.write_table(
        statistics.table_of(found), storage.join(uri, "statistics.parquet"), statistics.SCHEMA, facts
    )
    return processed, paired, counted


def _refuse_other_depths(trajectories: Mapping[str, Artifact]) -> None:
    """The same rank scores more where a search returned more pages, (k − rank + 1) / k say, and where fewer are missed."""
    depths = {
        name: {k for table in artifact.read_batches(stored, ["top_k"]) for k in table["top_k"].to_pylist()} - {None}
        for name, stored in trajectories.items()
    }
    if len(set().union(*depths.values())) > 1:
        raise ConfigError(
            "rank scores of searches with different top_k cannot be compared: "
            + "; ".join(f"{name} has {', '.join(map(str, sorted(found)))}" for name, found in depths.items() if found)
            + "; collect and mine with the same top_k, or process them apart (source, since, until); import each top_k by itself"
        )


def _refuse_other_searches(trajectories: Mapping[str, Artifact]) -> None:
    """How good a query is depends on how it is searched: one that finds nothing may find all beside the question's words."""
    stated = {name: artifact.read_provenance(stored).get("settings", {}) for name, stored in trajectories.items()}
    searched = {
        name: settings["search"] for name, settings in stated.items() if "search" in settings
    }  # not in imported ones
    for setting in sorted({setting for settings in searched.values() for setting in settings}):
        values = {name: settings.get(setting) for name, settings in searched.items()}
        if len(set(values.values())) > 1:
            raise ConfigError(
                f"rank scores of searches with different {setting} cannot be compared: "
                + "; ".join(f"{name} has {value}" for name, value in values.items())
                + f"; collect and mine with the same {setting}, or process them apart (source, since, until)"
            )


def _once(trajectories: Mapping[str, Artifact], columns: list[str]) -> Iterator[pa.Table]:
    """The rows of all collections, in batches, without those of a rollout that another row stands for.

    A rollout's row is the first finished one, else the last.
    """
    if len(trajectories) == 1:
        yield from artifact.read_batches(next(iter(trajectories.values())), columns)
        return

    def stated() -> Iterator[tuple[str, str]]:
        for stored in trajectories.values():
            for table in artifact.read_batches(stored, ["rollout_id", "status"]):
                yield from zip(table["rollout_id"].to_pylist(), table["status"].to_pylist(), strict=True)

    chosen: dict[str, tuple[bool, int]] = {}  # whether a rollout's row is finished, and its place among all rows
    for place, (rollout_id, status) in enumerate(stated()):
        if rollout_id not in chosen or not chosen[rollout_id][0]:
            chosen[rollout_id] = status == "finished", place
    taken, places = {place for _, place in chosen.values()}, itertools.count()
    for stored in trajectories.values():
        for table in artifact.read_batches(stored, columns):
            yield table.filter(pa.array([next(places) in taken for _ in range(table.num_rows)]))


def _common(agents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that the collections share; where they differ, the list of all, which is nobody's setting."""
    shared: dict[str, Any] = {}
    for name in dict.fromkeys(name for agent in agents for name in agent):
        values = [agent.get(name) for agent in agents]
        shared[name] = values[0] if all(value == values[0] for value in values) else values
    return shared


def _roles(messages: pa.ChunkedArray) -> list[list[str]]:
    """Who wrote each message of each conversation, without making Python strings of what they wrote."""
    roles: list[list[str]] = []
    for chunk in messages.chunks:
        flat = chunk.flatten().field("role").to_pylist()
        at = 0
        for length in chunk.value_lengths().to_pylist():
            roles.append(flat[at : at + (length or 0)])
            at += length or 0
    return roles


def _score(row: Row, roles: list[str], name: RewardName) -> Row:
    """What processed/4 has beyond the trajectory."""
    wanted, k = reward.pages_wanted(row), row["top_k"]
    spoken = turn_messages(roles, len(row["turns"]))
    searches, reasonings, places = [], [], []
    for turn, place in zip(row["turns"], spoken, strict=True):
        for search in turn["searches"]:
            results = reward.pages_found(search)[:k]
            score = reward.score(name, results, wanted, k)
            searches.append({**search, "gt_rank": reward.gt_rank(results, wanted), "rank_score": score})
            reasonings.append(turn["reasoning"])
            places.append(place)
    ranks = [search["gt_rank"] for search in searches]
    best = reward.best_search([search["rank_score"] for search in searches])
    return {
        "searches": searches,
        "reasonings": reasonings,
        "search_messages": places,
        "prompt_messages": (spoken[0] if spoken else len(roles)) - (row["state_messages"] or 0),
        "best_search": best,
        "best_query": None if best is None else searches[best]["query"],
        "best_rank": None if best is None else ranks[best],
        "rank_score": 0.0 if best is None else searches[best]["rank_score"],
        "reasoning": None if best is None else reasonings[best],
        "right": fate.answered_right(row["answer"], row["answers"]),
        "first_success": reward.first_success(ranks),
        "effort": reward.effort_score(ranks, k),
    }


def _keep(scored: Row, settings: Process) -> bool:
    if scored["best_search"] is None:
        return settings.include_failed
    return scored["rank_score"] >= settings.min_rank_score


def _measure(row: Row, scored: Row | None, kept: bool) -> Rollout:
    searches = scored["searches"] if scored else []
    return Rollout(
        question_id=row["question_id"],
        sampling=row["sampling"],
        finished=scored is not None,
        outcome=row["outcome"],
        kept=kept,
        top_k=row["top_k"],
        best_rank=scored["best_rank"] if scored else None,
        rank_score=scored["rank_score"] if scored else 0.0,
        first_success=scored["first_success"] if scored else None,
        effort=scored["effort"] if scored else 0.0,
        read_as=tuple(search["read_as"] for search in searches),
        empty_searches=sum(not search["results"] for search in searches),
        turns=len(row["turns"]),
        valid_turns=sum(turn["failure"] is None for turn in row["turns"]),
        turn_failures=tuple(turn["failure"] for turn in row["turns"] if turn["failure"]),
        read_by=tuple(statistics.reader(turn) for turn in row["turns"] if turn["read_by"]),
    )


def candidates_of(row: Row, scored: Row) -> Iterator[pairs.Candidate]:
    """The queries of a rollout, scored, each with the thought that came first: what was thought later is about pages that a state
    does not show.

    Args:
        row: of trajectories or processed.
        scored: its searches, reasonings and effort as processed has them.
    """
    for search in scored["searches"]:
        yield pairs.Candidate(
            search["query"],
            scored["reasonings"][0],
            search["rank_score"],
            frozenset([row["rollout_id"]]),
            row["prompt_fingerprint"],
            search["gt_rank"],
            scored["effort"],
        )


def chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in lists that are small enough to be held in memory."""
    while chunk := list(itertools.islice(rows, 1024)):
        yield chunk


def pair_row(state: _State, question: Row, earlier: list[Message], pair: pairs.Pair) -> Row:
    """A pair as a row of pairs."""
    return {
        "question_id": state[0],
        **question,
        "state": state[1] or None,
        "earlier": earlier,
        "source": pair.source,
        "chosen": pair.chosen.query,
        "rejected": pair.rejected.query,
        "chosen_reasoning": pair.chosen.reasoning,
        "rejected_reasoning": pair.rejected.reasoning,
        "chosen_score": pair.chosen.score,
        "rejected_score": pair.rejected.score,
        "chosen_rank": pair.chosen.rank,
        "rejected_rank": pair.rejected.rank,
        "chosen_effort": pair.chosen.effort,
        "rejected_effort": pair.rejected.effort,
        "prompt_fingerprint": pair.chosen.prompt_fingerprint,
    }


def _nothing_left(rollouts: list[Rollout], settings: Process) -> str:
    finished = [r for r in rollouts if r.finished]
    found = [r for r in finished if r.best_rank is not None]
    if not rollouts:
        return "there are no rollouts: collect with a larger limit or another split"
    if not finished:
        return f"all {len(rollouts)} rollouts failed: collect again, which redoes only those that failed"
    if not found:
        return (
            f"none of the {len(finished)} finished rollouts found its page: collect more samples or a more varied sampling "
            "configuration, let the prompt hold worked examples, search with operator 'or', raise top_k, or keep such "
            "rollouts with include_failed"
        )
    best = max(r.rank_score for r in found)
    return (
        f"{len(found)} of {len(finished)} finished rollouts found their page, but none scores {settings.min_rank_score}: "
        f"the best has {best:.2f}; lower min_rank_score"
    )
