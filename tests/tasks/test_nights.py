"""Nights as partitions, and the order in which a night takes questions: it rests on earlier dates alone, and stays."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, date, datetime
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks import artifact, config, nights, refs, storage
from tasks.artifact import Artifact
from tasks.errors import EmptyError
from tasks.reward import rank_score
from tests.tasks.test_process import store, trajectory

IDS = [f"q{n}" for n in range(8)]


def _night(root: str, night: str, key: str, rows: list[dict[str, Any]], run: str = "run") -> Artifact:
    """Publish the rollouts of one run of a night."""
    uri = nights.partition_uri(root, night, key)
    stored = store(uri, rows)
    nights.publish(
        root,
        uri,
        {"trajectories": stored, "scores": nights.write_scores(stored, run, storage.join(uri, "scores.parquet"))},
    )
    return stored


def _order(root: str, night: str, run: str = "tonight") -> list[str]:
    made = nights.order(IDS, root, night, storage.join(root, "rollouts", run))
    return artifact.read_table(made, ["question_id"])["question_id"].to_pylist()


# --- which night


@pytest.mark.parametrize(
    ("moment", "zone", "night"),
    [
        ("2026-11-23T23:30+00:00", "UTC", "2026-11-23"),
        ("2026-11-23T23:30+00:00", "Europe/Berlin", "2026-11-24"),
        ("2026-11-24T01:00+01:00", "America/New_York", "2026-11-23"),
        ("2026-03-29T00:59+00:00", "Europe/Berlin", "2026-03-29"),  # a minute before the clocks go forward
    ],
)
def test_a_moment_belongs_to_the_day_of_the_time_zone(moment: str, zone: str, night: str) -> None:
    assert nights.night_of(datetime.fromisoformat(moment), zone) == date.fromisoformat(night)


@given(st.datetimes(timezones=st.just(UTC)), st.sampled_from(["UTC", "Asia/Kathmandu", "Pacific/Kiritimati"]))
def test_the_night_is_at_most_a_day_from_that_of_utc(moment: datetime, zone: str) -> None:
    if moment.year in (1, 9999):
        return
    assert abs((nights.night_of(moment, zone) - moment.date()).days) <= 1


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"dt": "yesterday"}, "neither 'scheduled' nor a date"),
        ({"dt": "2026-02-30"}, "neither 'scheduled' nor a date"),
        ({"time_zone": "Europe/Atlantis"}, "no time zone"),
        ({"time_zone": "../../etc/passwd"}, "no time zone"),
        ({"order": "new-and-hardest"}, "say which night"),
    ],
)
def test_settings_that_name_no_night_are_refused(given_: dict[str, str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config.Collect.model_validate(given_)


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValidationError, match="since is later"):
        config.Nights.model_validate({"since": "2026-11-24", "until": "2026-11-23"})


# --- partitions


def test_a_range_takes_both_its_ends(storage_root: str) -> None:
    stored = {
        day: _night(storage_root, f"2026-11-{day}", "abc", [trajectory(f"r{day}", "q1", [("a", 1)])])
        for day in (21, 22, 23, 24)
    }

    def taken(since: int | None, until: int | None) -> list[Artifact]:
        days = (day and date(2026, 11, day) for day in (since, until))
        return list(nights.between(storage_root, ["trajectories"], *days).values())

    assert taken(22, 23) == [stored[22], stored[23]]
    assert taken(None, 21) == [stored[21]]
    assert taken(24, None) == [stored[24]]
    assert taken(None, None) == list(stored.values())
    with pytest.raises(
        EmptyError, match="no night from 2026-11-25 to the last; it holds nights from 2026-11-21 to 2026-11-24"
    ):
        taken(25, None)


def test_a_storage_without_nights_says_so(tmp_path) -> None:
    with pytest.raises(EmptyError, match="no night yet"):
        nights.between(str(tmp_path), ["trajectories"], None, date(2026, 11, 24))


def test_what_was_not_published_is_no_partition(storage_root: str) -> None:
    store(nights.partition_uri(storage_root, "2026-11-24", "abc"), [trajectory("r", "q1", [("a", 1)])])
    assert list(nights.partitions(storage_root, "trajectories")) == []


def test_runs_of_one_night_lie_beside_each_other(storage_root: str) -> None:
    for key in ("b", "a"):
        _night(storage_root, "2026-11-24", key, [trajectory(f"r{key}", "q1", [("a", 1)])])
    assert list(nights.between(storage_root, ["trajectories"], None, None)) == [
        "trajectories/dt=2026-11-24/a",
        "trajectories/dt=2026-11-24/b",
    ]


# --- scores


def test_scores_are_the_means_of_the_best_searches_of_finished_rollouts(storage_root: str) -> None:
    rows = [
        trajectory("r1", "q1", [("a", 3), ("b", 1)]),
        trajectory("r2", "q1", [("a", None)]),
        trajectory("r3", "q1", [("a", 1)], status="failed", outcome="connection"),
        trajectory("r4", "q1", [("a", 2)], sampling="diverse"),
        trajectory("r5", "q2", []),
        trajectory("r6", "q3", [], status="failed", outcome="connection"),
    ]
    _night(storage_root, "2026-11-24", "abc", rows, run="key")
    uri = nights.partition_uri(storage_root, "2026-11-24", "abc")
    found = artifact.read_rows(refs.load_ref(storage_root, "scores", uri))
    assert [tuple(row.values()) for row in found] == [
        ("key", "q1", "default", 2, 0.5),
        ("key", "q1", "diverse", 1, 0.5),
        ("key", "q2", "default", 1, 0.0),
    ]


score_rows = st.lists(
    st.fixed_dictionaries(
        {
            "run": st.sampled_from(["a", "b"]),
            "question_id": st.sampled_from(IDS),
            "sampling": st.sampled_from(["default", "diverse"]),
            "rollouts": st.integers(1, 9),
            "reciprocal_rank": st.integers(0, 4).map(lambda quarters: quarters / 4),
        }
    ),
    max_size=20,
)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(IDS), st.lists(st.integers(0, 3), min_size=1, max_size=6)),
        unique_by=lambda drawn: drawn[:2],
        max_size=12,
    ),
    st.data(),
)
def test_a_run_that_was_repeated_with_more_counts_once(runs: list[Any], data: st.DataObject) -> None:
    """A smaller run's rollouts are the first of a larger one's; the mean is that over distinct rollouts."""
    rows, of_question = [], defaultdict(list)
    for run, question_id, thirds in runs:
        of_question[question_id] += [Fraction(n, 3) for n in thirds]
        fewer = data.draw(st.integers(1, len(thirds)))
        for some in (thirds[:fewer], thirds):
            rows.append(
                {
                    "run": run,
                    "question_id": question_id,
                    "sampling": "default",
                    "rollouts": len(some),
                    "reciprocal_rank": sum(some) / 3 / len(some),
                }
            )
    found = nights.combined(data.draw(st.permutations(rows)))
    assert found.keys() == of_question.keys()
    for question_id, best in of_question.items():
        assert found[question_id].rollouts == len(best)
        assert found[question_id].mean == pytest.approx(float(mean(best)))


# --- the order


@given(score_rows, st.permutations(IDS))
def test_new_questions_first_then_the_hardest_ties_as_given(rows: list[dict[str, Any]], ids: list[str]) -> None:
    scores = nights.combined(rows)
    order = nights.new_and_hardest(ids, scores)
    assert sorted(order) == sorted(ids)
    places = [(id_ in scores, scores[id_].mean if id_ in scores else 0.0, ids.index(id_)) for id_ in order]
    assert places == sorted(places)


@settings(max_examples=15, deadline=None)
@given(
    earlier=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(IDS), st.none() | st.integers(1, 3)), min_size=1, max_size=6
    ),
    later=st.lists(st.tuples(st.integers(10, 28), st.sampled_from(IDS), st.none() | st.integers(1, 3)), max_size=4),
)
def test_only_earlier_dates_count(
    tmp_path_factory: pytest.TempPathFactory, earlier: list[Any], later: list[Any]
) -> None:
    orders = []
    for found in (earlier, earlier + later):
        root = str(tmp_path_factory.mktemp("nights"))
        for n, (day, question_id, rank) in enumerate(found):
            _night(
                root, f"2026-11-{day:02}", f"{n:x}", [trajectory(f"r{n}", question_id, [("a", rank)])], run=f"run{n}"
            )
        orders.append(_order(root, "2026-11-10"))
    assert orders[0] == orders[1]
    asked = {question_id for _, question_id, _ in earlier}
    assert orders[0][: len(IDS) - len(asked)] == [id_ for id_ in IDS if id_ not in asked]


def test_a_night_keeps_its_order_whatever_becomes_of_others(storage_root: str) -> None:
    _night(storage_root, "2026-11-22", "a", [trajectory("r1", "q0", [("a", 1)])])
    first = _order(storage_root, "2026-11-24")
    assert first == [*IDS[1:], "q0"]
    _night(storage_root, "2026-11-23", "b", [trajectory("r2", "q1", [("a", None)])])
    assert _order(storage_root, "2026-11-24") == first
    assert _order(storage_root, "2026-11-24", run="another model") == [*IDS[2:], "q1", "q0"]


def test_two_starts_of_a_night_at_once_agree_on_one_order(storage_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _night(storage_root, "2026-11-22", "a", [trajectory("r1", "q0", [("a", 1)])])
    run_uri, write_table = storage.join(storage_root, "run"), artifact.write_table
    others: list[Artifact] = []

    def write_after_the_other(*args: Any) -> Artifact:
        """Another start, which knows of one more night, comes between this one's look and its write."""
        monkeypatch.setattr(artifact, "write_table", write_table)
        _night(storage_root, "2026-11-23", "b", [trajectory("r2", "q1", [("a", None)])])
        others.append(nights.order(IDS, storage_root, "2026-11-24", run_uri))
        return write_table(*args)

    monkeypatch.setattr(artifact, "write_table", write_after_the_other)
    made = nights.order(IDS, storage_root, "2026-11-24", run_uri)
    assert made == others[0] == nights.order(IDS, storage_root, "2026-11-24", run_uri)
    assert artifact.read_rows(made)[-1]["question_id"] == "q0"
    assert artifact.read_rows(made)[-2]["question_id"] == "q1"


def test_the_order_says_why_and_from_what(storage_root: str) -> None:
    _night(storage_root, "2026-11-22", "a", [trajectory("r1", "q0", [("a", 2)])])
    made = nights.order(IDS, storage_root, "2026-11-24", storage.join(storage_root, "run"))
    rows = artifact.read_rows(made)
    assert rows[0] == {"question_id": "q1", "rollouts": 0, "reciprocal_rank": None}
    assert rows[-1] == {"question_id": "q0", "rollouts": 1, "reciprocal_rank": 0.5}
    assert list(artifact.read_provenance(made)["inputs"]) == ["scores/dt=2026-11-22/a"]


def test_how_many_pages_were_searched_for_makes_no_question_harder(storage_root: str) -> None:
    """Its rank score at the same rank is lower where fewer are."""
    for key, top_k, question_id in (("a", 3, "q1"), ("b", 10, "q0")):
        row = trajectory(f"r{key}", question_id, [("a", 2)])
        row["top_k"] = top_k
        row["turns"][0]["searches"][0]["rank_score"] = rank_score(2, top_k)
        _night(storage_root, "2026-11-22", key, [row], run=key)
    assert _order(storage_root, "2026-11-24")[-2:] == ["q0", "q1"]


def test_what_another_version_scored_counts_as_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = str(tmp_path)
    _night(root, "2026-11-22", "a", [trajectory("r1", "q1", [("a", 1)])])
    _night(root, "2026-11-22", "b", [trajectory("r2", "q0", [("a", 1)])])
    uri = nights.partition_uri(root, "2026-11-22", "b")
    refs.save_ref(root, "scores", replace(refs.load_ref(root, "scores", uri), schema="night-scores/1"), uri)
    assert _order(root, "2026-11-24") == ["q0", *IDS[2:], "q1"]
    assert "scored 1 runs of earlier nights: what they asked counts as new" in caplog.text
