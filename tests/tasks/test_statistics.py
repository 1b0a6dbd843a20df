"""What a collection holds, counted and shown."""

import re
from xml.etree import ElementTree

import pytest

from tasks import plots, statistics
from tasks.config import Process
from tasks.process import process
from tests.tasks.test_process import ROWS, inputs, store, trajectory


def test_statistics_are_shown(tmp_path):
    _, _, counted = process(inputs(store(str(tmp_path), ROWS)), Process(), str(tmp_path / "out"))
    found = statistics.read(counted)
    page = statistics.markdown(found)
    assert "| Rollouts | 5: 4 finished, 1 failed |" in page
    assert "unparsable" in page
    assert "deadline" in page
    svg = plots.distributions(found)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == plots.distributions(found)


@pytest.mark.parametrize("name", ["temperature 1/2", "", "cold|hot\nor so"])
def test_a_sampling_configuration_may_have_any_name(tmp_path, name):
    rows = [trajectory("r", "q", [("alpha", 1)], sampling=name)]
    _, _, counted = process(inputs(store(str(tmp_path), rows)), Process(), str(tmp_path / "out"))
    found = statistics.read(counted)
    assert found["by_sampling"][name]["finished"] == 1
    header, *_, row = statistics.markdown(found).splitlines()[-3:]
    assert row.replace("\\|", "").count("|") == header.count("|")


def test_statistics_of_nothing_divide_by_nothing():
    empty = statistics.summarize([], [])
    assert empty["found_share"] is None
    assert "–" in statistics.markdown(empty)
    assert plots.distributions(empty)


def test_a_search_is_empty_when_it_matched_no_page(tmp_path):
    row = trajectory("r1", "q1", [("alpha", 1), ("beta", None), ("gamma", None)])
    row["turns"][1]["searches"][0]["results"] = []
    _, _, counted = process(inputs(store(str(tmp_path), [row])), Process(), str(tmp_path / "out"))
    found = statistics.read(counted)["searches"]
    assert (found["all"], found["empty"]) == (3, 1)


def test_a_score_falls_into_its_own_tenth():
    """Also where it is stored a little below it, as ranks' scores are."""
    found = statistics.tenths(1 - (rank - 1) / 10 for rank in range(1, 11))
    assert list(found.values()) == [0, *[1] * 8, 2]


def test_rank_scores_are_drawn_to_scale_however_many_there_are():
    """By nDCG over several pages there are dozens: each of its own would be a label, as far apart as any two."""
    rollouts = [
        statistics.Rollout("q", "a", True, "answered", True, 3, 1, n / 100, 1, n / 100, ("query",), 0, 1, 1, (), ())
        for n in range(101)
    ]
    svg = plots.distributions(statistics.summarize(rollouts, []))
    assert (
        re.findall(r">(\d\.\d+)<", svg) == [f"{tenth / 10:.1f}" for tenth in range(10)] * 2
    )  # and those of the effort


def test_turns_of_failed_rollouts_are_not_counted(tmp_path):
    rows = [ROWS[0], ROWS[0] | {"rollout_id": "lost", "status": "failed", "outcome": "connection"}]
    assert "| Turns of finished rollouts | 5 |" in statistics.turns_markdown(store(str(tmp_path), rows))
