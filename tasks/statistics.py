"""What a collection holds: how often, how early and how high the page was found, and how turns went.

`summarize` gives a JSON-able dictionary, `markdown` and plots.distributions show it, `table_of` and `read` store it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks import artifact
from tasks.artifact import Artifact
from tasks.markdown import markdown_table

SCHEMA = "statistics/1"

Counts = dict[str, int]


@dataclass(frozen=True, slots=True)
class Rollout:
    """The measures of one rollout; those from `best_rank` on say nothing of one that failed."""

    question_id: str
    sampling: str
    finished: bool
    outcome: str
    kept: bool  # went through the filters
    top_k: int
    best_rank: int | None
    rank_score: float
    first_success: int | None
    effort: float
    read_as: tuple[str, ...]  # of each search
    empty_searches: int  # searches that matched no page
    turns: int
    valid_turns: int  # turns that ended in a valid action
    turn_failures: tuple[str, ...]
    read_by: tuple[str, ...]  # who read each turn's action: "server", "parser", "parser, repaired", "reparse"


def summarize(rollouts: Sequence[Rollout], pair_sources: Iterable[str]) -> dict[str, Any]:
    """Counts, shares and distributions as a JSON-able dictionary.

    Distributions are of finished rollouts, {value: how many} in rising order; a miss is "none". Effort is counted in tenths
    by lower bound, so "0.9" holds 0.9 to 1. Shares and means are null when there is nothing to divide by.

    Args:
        pair_sources: "within" or "across" of every preference pair.
    """
    finished = [r for r in rollouts if r.finished]
    turns = sum(r.turns for r in finished)
    valid = sum(r.valid_turns for r in finished)
    read_as = Counter(name for r in finished for name in r.read_as)
    sources = Counter(pair_sources)
    return {
        "rollouts": {
            "all": len(rollouts),
            "finished": len(finished),
            "failed": len(rollouts) - len(finished),
            "found": sum(r.best_rank is not None for r in finished),
            "kept": sum(r.kept for r in finished),
        },
        "questions": {
            "all": len({r.question_id for r in rollouts}),
            "found": len({r.question_id for r in finished if r.best_rank is not None}),
            "kept": len({r.question_id for r in finished if r.kept}),
        },
        "pairs": {"all": sources.total(), "within": sources["within"], "across": sources["across"]},
        "outcomes": _counts(r.outcome for r in finished),
        "failures": _counts(r.outcome for r in rollouts if not r.finished),
        "found_share": _share(sum(r.best_rank is not None for r in finished), len(finished)),
        "rank_score_mean": _mean([r.rank_score for r in finished]),
        "effort_mean": _mean([r.effort for r in finished]),
        "best_rank": _steps((r.best_rank for r in finished), max((r.top_k for r in finished), default=0)),
        "rank_score": _counts(f"{r.rank_score:.2f}" for r in finished),
        "first_success": _steps(
            (r.first_success for r in finished), max((len(r.read_as) for r in finished), default=0)
        ),
        "effort": tenths(r.effort for r in finished),
        "turns": {
            "all": turns,
            "valid": valid,
            "valid_share": _share(valid, turns),
            "failures": _counts(name for r in finished for name in r.turn_failures),
            "read_by": _counts(name for r in finished for name in r.read_by),
        },
        "searches": {
            "all": read_as.total(),
            "empty": sum(r.empty_searches for r in finished),
            "read_as": dict(sorted(read_as.items())),
            "read_as_share": {name: n / read_as.total() for name, n in sorted(read_as.items())},
        },
        "by_sampling": {name: _of_sampling(finished, name) for name in sorted({r.sampling for r in finished})},
    }


def _of_sampling(finished: Sequence[Rollout], name: str) -> dict[str, Any]:
    own = [r for r in finished if r.sampling == name]
    return {
        "finished": len(own),
        "found_share": _share(sum(r.best_rank is not None for r in own), len(own)),
        "rank_score_mean": _mean([r.rank_score for r in own]),
        "effort_mean": _mean([r.effort for r in own]),
        "valid_turn_share": _share(sum(r.valid_turns for r in own), sum(r.turns for r in own)),
    }


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return _share(math.fsum(values), len(values))  # fsum: the same in any order


def _counts(values: Iterable[str]) -> Counts:
    return dict(sorted(Counter(values).items()))


def _steps(values: Iterable[int | None], last: int) -> Counts:
    counts = Counter(values)
    return {**{str(step): counts[step] for step in range(1, last + 1)}, "none": counts[None]}


def tenths(values: Iterable[float]) -> Counts:
    """How many of these values from 0 to 1 lie in each tenth, by its lower bound: "0.9" holds 0.9 to 1."""
    # 1e-9: 0.3 is stored a little below 3/10, and must not fall into the bin below
    counts = Counter(min(int(value * 10 + 1e-9), 9) for value in values)
    return {f"{tenth / 10:.1f}": counts[tenth] for tenth in range(10)}


def table_of(statistics: Mapping[str, Any]) -> pa.Table:
    """The statistics as a table of statistics/1; a section is the path to a number's dictionary, such as "turns/failures"."""
    rows = (
        {"section": section, "name": name, "count" if isinstance(value, int) else "value": value}
        for section, name, value in _numbers(statistics, ())
    )
    return artifact.table_of(rows, SCHEMA)


def _numbers(statistics: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str, float | None]]:
    for name, value in statistics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, name))
        else:
            yield "/".join(path), name, value


def read(stored: Artifact) -> dict[str, Any]:
    """The dictionary of `summarize` that a statistics artifact was made of."""
    statistics = summarize([], [])  # has the sections that nothing was counted in
    for row in artifact.read_rows(stored):
        section = statistics
        # a sampling configuration of others may have any name, with a "/" too
        for name in row["section"].split("/", 1) if row["section"] else ():
            section = section.setdefault(name, {})
        section[row["name"]] = row["value"] if row["count"] is None else row["count"]
    return statistics


DISTRIBUTIONS = {
    "best_rank": "Rank of the best search",
    "rank_score": "Rank score of the best search",
    "first_success": "First search that found the page",
    "effort": "Effort score",
}


def markdown(statistics: Mapping[str, Any]) -> str:
    """The statistics as a page of Markdown tables."""
    rollouts, questions, pairs = (statistics[name] for name in ("rollouts", "questions", "pairs"))
    turns, searches = statistics["turns"], statistics["searches"]
    overview = {
        "Rollouts": f"{rollouts['all']}: {rollouts['finished']} finished, {rollouts['failed']} failed",
        "Found the page": f"{rollouts['found']} ({_percent(statistics['found_share'])} of the finished)",
        "Kept": str(rollouts["kept"]),
        "Questions": f"{questions['all']}: {questions['found']} found, {questions['kept']} kept",
        "Preference pairs": f"{pairs['all']}: {pairs['within']} within a rollout, {pairs['across']} across",
        "Mean rank score": _number(statistics["rank_score_mean"]),
        "Mean effort score": _number(statistics["effort_mean"]),
        "Turns": f"{turns['all']}, {_percent(turns['valid_share'])} with a valid action",
        "Searches": f"{searches['all']}, {searches['empty']} without a result",
    }
    parts = ["# Trajectories", markdown_table(("", ""), overview.items())]
    titles = {
        **DISTRIBUTIONS,
        "outcomes": "Outcomes of finished rollouts",
        "failures": "Why rollouts failed",
    }
    for name, title in titles.items():
        parts += _section(title, statistics[name])
    parts += _section("Why turns brought no action", turns["failures"])
    parts += _section("Actions were read by", turns["read_by"])
    parts += _section("Queries were read as", searches["read_as"])
    rows = (
        (
            name,
            str(own["finished"]),
            _percent(own["found_share"]),
            _number(own["rank_score_mean"]),
            _number(own["effort_mean"]),
            _percent(own["valid_turn_share"]),
        )
        for name, own in statistics["by_sampling"].items()
    )
    header = ("Sampling", "Finished", "Found", "Rank score", "Effort score", "Valid turns")
    parts += ["## By sampling configuration", markdown_table(header, rows)]
    return "\n\n".join(parts) + "\n"


_IMAGES = {
    "images_shown": "pages shown as images",
    "images_missing": "pages shown by their text, having no image",
    "images_replaced": "images that gave way to text later",
}


def turns_markdown(trajectories: Artifact) -> str:
    """How the turns of a collection ended, as a Markdown table: what `markdown` says of them, before anything is processed."""
    columns = [f"turns.list.element.{name}" for name in ("failure", "read_by", "repaired", *_IMAGES)]
    ended: Counter[str] = Counter()
    read: Counter[str] = Counter()
    images = dict.fromkeys(_IMAGES, 0)
    for table in artifact.read_batches(trajectories, ["status", *columns]):
        for row in table.to_pylist():
            for turn in row["turns"] if row["status"] == "finished" else ():
                ended[turn["failure"] or "valid action"] += 1
                if turn["read_by"]:
                    read[reader(turn)] += 1
                for name in _IMAGES:
                    images[name] += turn[name] or 0
    valid = ended.pop("valid action", 0)
    total = valid + ended.total()
    rows = [
        ("Turns of finished rollouts", str(total), ""),
        ("with a valid action", str(valid), _percent(_share(valid, total))),
    ]
    rows += [(f"without: {name}", str(n), _percent(_share(n, total))) for name, n in _counts(ended.elements()).items()]
    rows += [(f"read by: {name}", str(n), _percent(_share(n, total))) for name, n in _counts(read.elements()).items()]
    if pages := images["images_shown"] + images["images_missing"]:
        rows += [(told, str(images[name]), _percent(images[name] / pages)) for name, told in _IMAGES.items()]
    return markdown_table(("", "n", "share"), rows) + "\n"


def reader(turn: Mapping[str, Any]) -> str:
    """Who read a turn's action, and whether broken JSON had to be mended."""
    return f"{turn['read_by']}, repaired" if turn["repaired"] else turn["read_by"]


def _section(title: str, counts: Counts) -> list[str]:
    total = sum(counts.values())
    if not total:
        return []
    rows = ((value, str(n), _percent(n / total)) for value, n in counts.items())
    return [f"## {title}", markdown_table(("", "n", "share"), rows)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
