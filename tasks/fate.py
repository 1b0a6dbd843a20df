"""How a question ended in a run: one name a question, so that a run's names add up to its questions.

For a question to be answered, things must go right one after the other: the rollout runs, the model acts, a search brings a
page with the answer, an answer is given, it cites such a page, it is right. A question that ended badly is named after the
first of these that went wrong. A right answer is correct however it came about, as the same fact may stand on pages that
nobody listed.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from anls_star import anls_score

Fate = Literal[
    "correct", "found", "answered_wrong", "not_cited", "out_of_turns", "never_retrieved", "unparsable", "errored"
]
FATES: tuple[Fate, ...] = get_args(Fate)  # the best first

MEANINGS: dict[Fate, tuple[str, str]] = {
    "correct": (
        "correct",
        "the answer is right: its ANLS* is above 0.5, a likeness of letters, by which a wrong digit may pass",
    ),
    "found": (
        "found (no answer judged)",
        "a search brought a page with the answer; no answer was asked for, or nothing tells whether it is right. Where "
        "answers are judged, found pages stand in the other rows",
    ),
    "answered_wrong": ("cited but answered wrong", "such a page was found and cited, and the answer is wrong"),
    "not_cited": ("found but not cited", "such a page was found, and the wrong answer cites others or none"),
    "out_of_turns": ("out of turns", "such a page was found, and turns or context ended before an answer"),
    "never_retrieved": ("never found", "no search showed the agent a page with the answer, whatever came then"),
    "unparsable": ("unparsable", "no turn brought a search or an answer that could be read"),
    "errored": ("errored", "the rollout failed through no fault of the model, such as a lost connection"),
}

RIGHT = 0.5


def likeness(answer: Sequence[str] | None, references: Iterable[Sequence[str]] | None) -> float | None:
    """ANLS* of an answer, a list, against the nearest of its reference answers, lists too (Peer et al., 2024).

    In the package's terms a tuple is one of several and a list is a set to be matched: missing and surplus items both
    cost. No answer scores 0; a question without a reference is not counted.
    """
    nearest = tuple(list(reference) for reference in references or ())
    if not nearest:
        return None
    return float(anls_score(nearest, list(answer))) if answer else 0.0


def answered_right(answer: Sequence[str] | None, references: Iterable[Sequence[str]] | None) -> bool | None:
    """Whether an answer is right; None where there is no answer, or no reference to tell by."""
    anls = likeness(answer, references)
    return is_right(anls) if answer and anls is not None else None


def is_right(anls: float) -> bool:
    """Whether an answer counts as right: ANLS* above 0.5, where ANLS itself begins to count.

    Biten et al., Scene Text Visual Question Answering, 2019: from τ = 0.5 on, a text is another answer rather
    than the same with errors of reading or spelling. Of a list, more than half must be right.
    """
    return anls > RIGHT


def fate(
    *,
    failed: bool,
    acted: bool,
    found: bool,
    asked: bool = False,
    answered: bool = False,
    cited: bool = False,
    anls: float | None = None,
) -> Fate:
    """How a question ended: correct, or the first thing that went wrong.

    Args:
        failed: the rollout failed through no fault of the model.
        acted: some turn brought a search or an answer that could be read.
        found: a search brought a page with the answer, among those that the agent was shown.
        asked: an answer was asked for; otherwise finding the page is all there is to do.
        answered: an answer was given.
        cited: it cites a page with the answer.
        anls: likeness of the answer to the nearest reference; None where there is no reference, so that a cited page is
            the most that can be told.
    """
    if failed:
        return "errored"
    if not acted:
        return "unparsable"
    if asked and answered and anls is not None and is_right(anls):
        return "correct"
    if not found:
        return "never_retrieved"
    if not asked:
        return "found"
    if not answered:
        return "out_of_turns"
    if not cited:
        return "not_cited"
    return "found" if anls is None else "answered_wrong"
