"""Preference pairs: of two queries for the same question, the one that ranked an answer location better is chosen.

Queries are compared within a rollout and across all rollouts of a state: a question, or a stored conversation that rollouts
went on from. Nothing here depends on the order in which searches come.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from tasks.search.query import OPERATORS


@dataclass(frozen=True, slots=True)
class Candidate:
    """A query that was searched for a question, by one rollout or several."""

    query: str
    reasoning: str | None
    score: float  # rank score
    rollouts: frozenset[str]
    prompt_fingerprint: str | None = None
    rank: int | None = None  # of the best-ranked answer location
    effort: float = 0.0  # effort score of the rollout


@dataclass(frozen=True, slots=True)
class Pair:
    chosen: Candidate
    rejected: Candidate
    source: Literal["within", "across"]


def fold(query: str) -> str:
    """What identical queries have in common: no difference of case, but of operators, or of white space counts.

    >>> fold("  Net  Sales AND 2021 ")
    'net sales AND 2021'
    """
    return " ".join(word if word in OPERATORS else word.casefold() for word in query.split())


def merge(a: Candidate, b: Candidate) -> Candidate:
    """Two occurrences of one folded query: the better score with its wording, and the rollouts of both."""
    best = min(a, b, key=lambda c: (-c.score, c.query, c.reasoning or "", c.prompt_fingerprint or "", -c.effort))
    rollouts = a.rollouts | b.rollouts
    return replace(best, rollouts=rollouts)


def add(candidates: dict[str, Candidate], found: Iterable[Candidate]) -> None:
    """Put a state's searches into its candidates, which are kept by folded query."""
    for candidate in found:
        key = fold(candidate.query)
        candidates[key] = merge(candidates[key], candidate) if key in candidates else candidate


def make(candidates: Mapping[str, Candidate], limit: int) -> list[Pair]:
    """The pairs of one state, at most `limit`: chosen strictly better and above 0, no pair twice.

    The largest difference of scores comes first, and of equal differences the higher chosen score. Among pairs of the
    same two scores each query takes its turn, in an order fixed by hash, so that a cut leaves many queries rather than
    one query many times.
    """
    return list(islice(_pairs(candidates), limit))


def _pairs(candidates: Mapping[str, Candidate]) -> Iterator[Pair]:
    levels: dict[float, list[Candidate]] = {}
    for key in sorted(candidates, key=lambda k: hashlib.sha256(k.encode()).digest()):
        levels.setdefault(candidates[key].score, []).append(candidates[key])
    steps = [(high, low) for high in levels for low in levels if high > low and high > 0]
    # rounded: of 10 pages, the scores of ranks 3 and 4 differ by a little more than those of 1 and 2
    for high, low in sorted(steps, key=lambda s: (round(s[1] - s[0], 9), -s[0])):
        for chosen, rejected in _by_turns(levels[high], levels[low]):
            source: Literal["within", "across"] = "within" if chosen.rollouts & rejected.rollouts else "across"
            yield Pair(chosen, rejected, source)


def _by_turns(left: list[Candidate], right: list[Candidate]) -> Iterator[tuple[Candidate, Candidate]]:
    """Every (left, right) once, so that a cut uses all of both sides about equally often."""
    size = max(len(left), len(right))
    for shift in range(size):
        if len(left) <= len(right):
            yield from ((candidate, right[(i + shift) % size]) for i, candidate in enumerate(left))
        else:
            yield from ((left[(i + shift) % size], candidate) for i, candidate in enumerate(right))
