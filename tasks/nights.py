"""Nights: collections that belong to a date, a partition each, and the order in which a night takes its questions.

    <root>/nights/dt=2026-11-24/<key>/trajectories.parquet   what one run of the night gathered; other settings, another key
                                      scores/<its own key>/  how each of its questions fared: all that later nights read
                                      refs/                  references to both, written last: without them it is no partition
    <root>/rollouts/<run key>/order/<content>.parquet        in which order the night takes questions, fixed when it first ran

A night's order depends on earlier dates alone, and is fixed when the night first runs: repeated, retried, or with a larger
limit it takes the same questions, whatever became of other nights meanwhile.
"""

import hashlib
import json
import math
import re
import zoneinfo
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, NamedTuple

from tasks import artifact, refs, storage
from tasks.artifact import Artifact
from tasks.config import Source
from tasks.errors import ArtifactError, EmptyError
from tasks.logs import run_logger
from tasks.reward import reciprocal_rank

SCORES, ORDER = "night-scores/2", "order/2"
_FOLDER = "nights"
_REF = re.compile(r"dt=(\d{4}-\d{2}-\d{2})/([0-9a-f]+)/refs/(\w+)\.json")
_SCORED = ["question_id", "sampling", "status", "turns.list.element.searches.list.element.gt_rank"]


class Partition(NamedTuple):
    """One run of one night."""

    night: date
    key: str
    uri: str


@dataclass(frozen=True)
class Score:
    """How a question fared on earlier nights: the mean, over its finished rollouts, of the best search's reciprocal rank.

    Not of its rank score, which says other things of a rank where other numbers of pages are searched for.
    """

    rollouts: int
    mean: float


def night_of(scheduled: datetime, time_zone: str) -> date:
    """The day, in a time zone, of a moment."""
    return scheduled.astimezone(zoneinfo.ZoneInfo(time_zone)).date()


def partition_uri(root: str, night: str, key: str) -> str:
    """The folder of one run of a night."""
    return storage.join(root, _FOLDER, f"dt={night}", key)


def publish(root: str, uri: str, made: Mapping[str, Artifact]) -> None:
    """Make what a run has written, in its folder, part of its night."""
    for name, stored in made.items():
        refs.save_ref(root, name, stored, uri)


def partitions(root: str, name: str) -> Iterator[Partition]:
    """The runs of all nights that have published `name`, by date, then key."""
    nights = storage.join(root, _FOLDER)
    for file in storage.iter_files(nights):
        found = _REF.fullmatch(storage.relative(file, nights))
        if found and found[3] == name:
            night, key = date.fromisoformat(found[1]), found[2]
            yield Partition(night, key, partition_uri(root, found[1], key))


def gathered(source: Source) -> list[str]:
    """The names of what was gathered from a source."""
    return ["trajectories", "mined"] if source == "both" else [source]


def collections(root: str, names: Sequence[str], since: date | None, until: date | None) -> dict[str, Artifact]:
    """The newest collections of these names, or with a date those of all nights from `since` to `until`, both inclusive.

    Args:
        names: what was gathered: "trajectories", "mined".

    Returns:
        The collections by name; those of nights by the name of their partition.

    Raises:
        EmptyError: no night lies in the range.
        ArtifactError: nothing was gathered, or only nights were and no range chooses among them.
    """
    if since or until:
        return between(root, names, since, until)
    for name in names:
        if not refs.has_ref(root, name) and next(partitions(root, name), None):
            raise ArtifactError(f"{root} holds {name} of nights: say of which by since and until")
    return {name: refs.load_ref(root, name) for name in names}


def between(root: str, names: Sequence[str], since: date | None, until: date | None) -> dict[str, Artifact]:
    """The collections of these names of all nights in a range, by the name of their partition.

    Raises:
        EmptyError: there is none.
    """
    chosen = in_range(root, names, since, until)
    return {f"{name}/dt={p.night}/{p.key}": refs.load_ref(root, name, p.uri) for name, p in chosen}


def in_range(root: str, names: Sequence[str], since: date | None, until: date | None) -> list[tuple[str, Partition]]:
    """The runs of all nights from `since` to `until`, both inclusive, that have published one of these names, with the name.

    Raises:
        EmptyError: there is none.
    """
    stored = [(name, p) for name in names for p in partitions(root, name)]
    chosen = [
        (name, p) for name, p in stored if (since is None or p.night >= since) and (until is None or p.night <= until)
    ]
    if not chosen:
        held_nights = [p.night for _, p in stored]
        held = f"it holds nights from {min(held_nights)} to {max(held_nights)}" if stored else "it holds no night yet"
        raise EmptyError(
            f"{root} holds no night from {since or 'the first'} to {until or 'the last'}; {held}: take another range, or "
            "collect with --dt"
        )
    return chosen


def write_scores(trajectories: Artifact, run: str, uri: str) -> Artifact:
    """Write how each question of a run fared, at `uri` (ends in .parquet): some bytes a question, for later nights to read.

    Args:
        run: key of the run, which the same rollouts have in common, however many of them were asked for.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for table in artifact.read_batches(trajectories, _SCORED):
        for row in table.to_pylist():
            if row["status"] == "finished":
                ranks = [search["gt_rank"] for turn in row["turns"] for search in turn["searches"]]
                found[row["question_id"], row["sampling"]].append(max(map(reciprocal_rank, ranks), default=0.0))
    rows = [
        {"run": run, "question_id": id_, "sampling": sampling, "rollouts": len(best), "reciprocal_rank": _mean(best)}
        for (id_, sampling), best in sorted(found.items())
    ]
    facts = artifact.provenance({"trajectories": trajectories})
    return artifact.write_table(artifact.table_of(rows, SCORES), uri, SCORES, facts)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def combined(rows: Iterable[Mapping[str, Any]]) -> dict[str, Score]:
    """The score of each question, over the rows of any number of score tables.

    A run that was repeated with a larger limit, more samples or fewer failures has its first rollouts in both tables; of
    such rows the one of most rollouts counts, as it holds those of the other.
    """
    most: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = row["question_id"], row["run"], row["sampling"]
        if key not in most or row["rollouts"] > most[key]["rollouts"]:
            most[key] = row
    of_question: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for (question_id, _, _), row in most.items():
        of_question[question_id].append(row)
    scores = {}
    for question_id, own in of_question.items():
        rollouts = sum(row["rollouts"] for row in own)
        total = math.fsum(row["rollouts"] * row["reciprocal_rank"] for row in own)
        scores[question_id] = Score(rollouts, total / rollouts)
    return scores


def new_and_hardest(question_ids: Sequence[str], scores: Mapping[str, Score]) -> list[str]:
    """Questions without a score first, then those with the lowest; those that are alike stay in the order given."""
    return sorted(question_ids, key=lambda id_: scores[id_].mean if id_ in scores else -1.0)


def order(question_ids: Sequence[str], root: str, night: str, run_uri: str) -> Artifact:
    """In which order a night takes questions, as it was fixed when the night first ran; fixed now if it was not yet.

    Args:
        question_ids: all that may be asked, in the order that decides between those that are alike.
        run_uri: folder of the run, where the order lies.
    """
    folder = storage.join(run_uri, "order")
    if refs.has_ref(root, "order", folder):
        return refs.load_ref(root, "order", folder)
    earlier = [p for p in partitions(root, "scores") if p.night < date.fromisoformat(night)]
    stored = {f"scores/dt={p.night}/{p.key}": refs.load_ref(root, "scores", p.uri) for p in earlier}
    tables = {name: table for name, table in stored.items() if table.schema == SCORES}
    if others := len(stored) - len(tables):
        run_logger().warning("another version scored %d runs of earlier nights: what they asked counts as new", others)
    scores = combined(row for table in tables.values() for row in artifact.read_rows(table))
    rows = []
    for question_id in new_and_hardest(question_ids, scores):
        score = scores.get(question_id, Score(0, math.nan))
        mean = score.mean if score.rollouts else None
        rows.append({"question_id": question_id, "rollouts": score.rollouts, "reciprocal_rank": mean})
    table, facts = artifact.table_of(rows, ORDER), artifact.provenance(tables)
    # Two starts of a night may find other scores. Each writes a file of its own, and the reference, which comes last, says which
    # of them holds: later starts take that one, and nothing that a reference points to is ever written over.
    content = hashlib.sha256(json.dumps([rows, facts], sort_keys=True).encode()).hexdigest()[:16]
    fixed = artifact.write_table(table, storage.join(folder, f"{content}.parquet"), ORDER, facts)
    if refs.has_ref(root, "order", folder):
        return refs.load_ref(root, "order", folder)
    refs.save_ref(root, "order", fixed, folder)
    return refs.load_ref(root, "order", folder)
