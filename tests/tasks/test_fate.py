"""The names of ends: one for whatever a rollout did, and the first thing that went wrong is the one that is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.fate import FATES, MEANINGS, RIGHT, fate

GOOD = {"failed": False, "acted": True, "found": True, "asked": True, "answered": True, "cited": True, "anls": 1.0}


@st.composite
def rollouts(draw: st.DrawFn) -> dict:
    flags = {name: draw(st.booleans()) for name in GOOD if name != "anls"}
    return flags | {"anls": draw(st.none() | st.floats(0, 1))}


@given(rollouts())
@settings(max_examples=300, deadline=None)
def test_every_rollout_ends_in_one_way_that_says_what_is_true_of_it(seen: dict) -> None:
    right = seen["asked"] and seen["answered"] and seen["anls"] is not None and seen["anls"] > RIGHT
    ran, acted = not seen["failed"], seen["acted"]
    missed = ran and acted and not right
    finder = missed and seen["found"] and seen["asked"]
    judged = seen["anls"] is not None
    holds = {
        "errored": not ran,
        "unparsable": ran and not acted,
        "correct": ran and acted and right,
        "never_retrieved": missed and not seen["found"],
        "out_of_turns": finder and not seen["answered"],
        "not_cited": finder and seen["answered"] and not seen["cited"],
        "answered_wrong": finder and seen["answered"] and seen["cited"] and judged,
        "found": missed
        and seen["found"]
        and (not seen["asked"] or (seen["answered"] and seen["cited"] and not judged)),
    }
    assert holds.keys() == set(FATES) == MEANINGS.keys()
    assert [name for name in FATES if holds[name]] == [fate(**seen)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "correct"),
        ({"anls": 0.51}, "correct"),
        ({"found": False, "cited": False}, "correct"),
        ({"anls": 0.5}, "answered_wrong"),
        ({"anls": 0.0, "cited": False}, "not_cited"),
        ({"anls": 0.0, "found": False}, "never_retrieved"),
        ({"anls": 0.0, "answered": False}, "out_of_turns"),
        ({"anls": 0.0, "answered": False, "found": False}, "never_retrieved"),
        ({"anls": 0.0, "answered": False, "found": False, "acted": False}, "unparsable"),
        ({"anls": 0.0, "failed": True}, "errored"),
        ({"anls": None}, "found"),
        ({"asked": False, "answered": False, "cited": False, "anls": None}, "found"),
        ({"asked": False, "answered": False, "found": False, "anls": None}, "never_retrieved"),
    ],
)
def test_the_first_thing_that_went_wrong_is_named(changes: dict, expected: str) -> None:
    assert fate(**GOOD | changes) == expected
