"""Processing of stored trajectories: scores, filters, pairs, statistics, and what does not depend on order."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as tune
from hypothesis import strategies as st

from tasks import artifact, reward, statistics, storage
from tasks.artifact import Artifact
from tasks.config import Process
from tasks.errors import ConfigError, EmptyError
from tasks.process import process

K = 3
quick = tune(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANSWER = {"document": "report.pdf", "page": 2}


def _hits(rank: int | None) -> list[dict[str, Any]]:
    """Three results with the answer page at `rank`."""
    pages = [("other.pdf", 1), ("other.pdf", 2), ("report.pdf", 9)]
    if rank is not None:
        pages[rank - 1] = ("report.pdf", 2)
    return [{"rank": n, "file": f, "page_number": p, "score": 9.0 - n} for n, (f, p) in enumerate(pages, start=1)]


def _search(query: str, rank: int | None) -> dict[str, Any]:
    return {
        "query": query,
        "searched": query,
        "read_as": "query",
        "results": _hits(rank),
        "gt_rank": rank,
        "rank_score": reward.rank_score(rank, K),
    }


def _turn(number: int, action: str, searches: list[dict[str, Any]], failure: str | None = None) -> dict[str, Any]:
    return {
        "turn": number,
        "raw_text": "",
        "reasoning": f"thought {number}",
        "action": action,
        "searches": searches,
        "failure": failure,
        "failure_detail": None,
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "latency_s": 0.1,
    }


def trajectory(
    rollout: str,
    question: str,
    found: list[tuple[str, int | None]],
    *,
    sampling: str = "default",
    status: str = "finished",
    outcome: str = "answered",
    bad_turns: int = 0,
    examples: int = 0,
) -> dict[str, Any]:
    """A row of trajectories/2: bad turns, then a turn for each (query, rank), then the answer."""
    turns = [_turn(n, "none", [], "unparsable") for n in range(1, bad_turns + 1)]
    turns += [_turn(len(turns) + n, "search", [_search(q, rank)]) for n, (q, rank) in enumerate(found, start=1)]
    turns += [_turn(len(turns) + 1, "answer", [])]
    messages = [{"role": "system", "content": "Search."}]
    for n in range(examples):
        messages += [{"role": "user", "content": f"example {n}"}, {"role": "assistant", "content": f"shown {n}"}]
    messages.append({"role": "user", "content": question})
    for turn in turns:
        said = "; ".join(search["query"] for search in turn["searches"]) or turn["action"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "results"}]
    return {
        **dict.fromkeys(artifact.TABLES["trajectories/2"].names),
        "rollout_id": rollout,
        "attempt": 1,
        "status": status,
        "outcome": outcome,
        "question_id": question,
        "question": f"What of {question}?",
        "answers": [["42"]],
        "answer_locations": [ANSWER],
        "split": "train",
        "protocol": "tags",
        "sampling": sampling,
        "sample": 0,
        "top_k": K,
        "turns": turns,
        "messages": messages[:-1],
        "prompt_fingerprint": "p",
    }


def store(root: str, rows: list[dict[str, Any]]) -> Artifact:
    uri = storage.join(root, "trajectories.parquet")
    return artifact.write_table(artifact.table_of(rows, "trajectories/2"), uri, "trajectories/2", {})


def inputs(*stored: Artifact) -> dict[str, Artifact]:
    """Collections as `process` takes them."""
    return {f"trajectories/{n}": one for n, one in enumerate(stored)}


ROWS = [
    trajectory("r1", "q1", [("alpha", None), ("beta", 2), ("gamma", 1)], bad_turns=1, examples=2),
    trajectory("r2", "q1", [("Beta ", 2), ("delta", None)], sampling="creative"),
    trajectory("r3", "q2", [("omega", None)]),
    trajectory("r4", "q2", [], status="failed", outcome="deadline"),
    trajectory("r5", "q3", [("psi", 3)]),
]


def test_scores_filters_pairs_and_statistics(storage_root):
    processed, pairs, counted = process(inputs(store(storage_root, ROWS)), Process(), storage.join(storage_root, "out"))
    found = statistics.read(counted)
    rows = {row["rollout_id"]: row for row in artifact.read_rows(processed)}
    assert list(rows) == ["r1", "r2", "r5"]
    first = rows["r1"]
    assert (first["best_search"], first["best_query"], first["best_rank"], first["rank_score"]) == (2, "gamma", 1, 1.0)
    assert first["first_success"] == 2
    assert first["effort"] == reward.effort_score([None, 2, 1], K)
    assert first["reasoning"] == "thought 4"  # the first turn brought no action
    assert first["messages"][first["prompt_messages"] - 1] == {"role": "user", "content": "q1", "images": None}
    said = [first["messages"][at]["content"] for at in first["search_messages"]]
    assert said == [search["query"] for search in first["searches"]] == ["alpha", "beta", "gamma"]
    assert rows["r5"]["rank_score"] == pytest.approx(1 / 3)

    made = [(p["chosen"], p["rejected"], p["source"]) for p in artifact.read_rows(pairs)]
    assert set(made) == {
        ("gamma", "alpha", "within"),
        ("gamma", "delta", "across"),
        ("gamma", "Beta ", "within"),
        ("Beta ", "alpha", "within"),
        ("Beta ", "delta", "within"),
    }
    told = {(p["chosen"], p["rejected"]): p for p in artifact.read_rows(pairs)}
    efforts = [reward.effort_score(ranks, K) for ranks in ([None, 2, 1], [2, None])]
    better, worse = (told["gamma", rejected] for rejected in ("Beta ", "delta"))
    assert [(p["chosen_rank"], p["rejected_rank"]) for p in (better, worse)] == [(1, 2), (1, None)]
    assert [(p["chosen_effort"], p["rejected_effort"]) for p in (better, worse)] == [tuple(efforts)] * 2
    assert artifact.read_provenance(pairs)["settings"] == Process().model_dump(mode="json")

    assert json.loads(storage.read_bytes(storage.join(storage_root, "out", "statistics.json"))) == found
    assert found["rollouts"] == {"all": 5, "finished": 4, "failed": 1, "found": 3, "kept": 3}
    assert found["questions"] == {"all": 3, "found": 2, "kept": 2}
    assert found["failures"] == {"deadline": 1}
    assert found["best_rank"] == {"1": 1, "2": 1, "3": 1, "none": 1}
    assert found["first_success"] == {"1": 2, "2": 1, "3": 0, "none": 1}
    assert found["turns"]["failures"] == {"unparsable": 1}
    assert found["turns"]["valid_share"] == pytest.approx(11 / 12)
    assert found["pairs"] == {"all": 5, "within": 4, "across": 1}
    assert found["searches"] == {"all": 7, "empty": 0, "read_as": {"query": 7}, "read_as_share": {"query": 1.0}}
    by_sampling = found["by_sampling"]
    assert by_sampling["creative"]["found_share"] == 1.0
    assert [by_sampling[name]["valid_turn_share"] for name in ("creative", "default")] == [1.0, pytest.approx(8 / 9)]


def test_filters(tmp_path):
    stored = store(str(tmp_path), ROWS)

    def kept(**settings: Any) -> list[str]:
        processed, _, _ = process(inputs(stored), Process(**settings), str(tmp_path / "out"))
        return artifact.read_table(processed, ["rollout_id"])["rollout_id"].to_pylist()

    assert kept(min_rank_score=0.5) == ["r1", "r2"]
    assert kept(min_rank_score=1.0) == ["r1"]
    assert kept(include_failed=True) == ["r1", "r2", "r3", "r5"]
    assert kept(include_failed=True, min_rank_score=0.9) == ["r1", "r3"]


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([], {}, "there are no rollouts"),
        ([ROWS[3]], {}, "all 1 rollouts failed"),
        (ROWS[2:4], {}, "none of the 1 finished rollouts found its page"),
        ([ROWS[4]], {"min_rank_score": 0.5}, "lower min_rank_score"),
    ],
)
def test_nothing_left_says_what_to_change(tmp_path, rows, settings, says):
    with pytest.raises(EmptyError, match=says):
        process(inputs(store(str(tmp_path), rows)), Process(**settings), str(tmp_path / "out"))
    assert not storage.exists(str(tmp_path / "out"))


def test_ranks_come_from_results_and_every_answer_location_counts(tmp_path):
    row = trajectory("r", "q", [("alpha", None)])
    row["answer_locations"] = [ANSWER, {"document": "other.pdf", "page": 2}]
    processed, _, _ = process(inputs(store(str(tmp_path), [row])), Process(), str(tmp_path / "out"))
    assert artifact.read_rows(processed)[0]["best_rank"] == 2


@pytest.mark.parametrize(("chosen", "better", "score"), [("linear", "one", 1.0), ("ndcg", "both", 0.6934)])
def test_the_reward_decides_what_is_best_what_is_kept_and_what_is_preferred(tmp_path, chosen, better, score):
    """One page that holds the answer on top, or both below it."""
    row = trajectory("r", "q", [("one", 1), ("both", 2)])
    row["answer_locations"] = [ANSWER, {"document": "report.pdf", "page": 9}]
    row["turns"][0]["searches"][0]["results"][2]["file"] = "other.pdf"
    settings = Process(reward=chosen, min_rank_score=score - 0.01)
    processed, pairs, _ = process(inputs(store(str(tmp_path), [row])), settings, str(tmp_path / "out"))
    (made,) = artifact.read_rows(processed)
    assert (made["best_query"], made["rank_score"]) == (better, pytest.approx(score, abs=1e-4))
    (pair,) = artifact.read_rows(pairs)
    assert (pair["chosen"], pair["chosen_score"]) == (better, made["rank_score"])


_ranks = st.none() | st.integers(1, K)
_rollouts = st.lists(
    st.tuples(
        st.sampled_from(["q1", "q2", "q3"]),
        st.lists(st.tuples(st.sampled_from(["a", "b", "A ", "c d", "c  D"]), _ranks), max_size=4),
        st.sampled_from(["greedy", "creative"]),
        st.booleans(),
        st.integers(0, 2),
    ),
    max_size=9,
)


@quick
@given(_rollouts, st.randoms(use_true_random=False), st.integers(0, 6))
def test_order_of_trajectories_changes_no_pair_score_or_count(tmp_path_factory, found, random, max_pairs):
    rows = [
        trajectory(f"r{n}", question, searches, sampling=sampling, bad_turns=bad, status="finished" if ok else "failed")
        for n, (question, searches, sampling, ok, bad) in enumerate(found)
    ]
    rows.append(trajectory("sure", "q1", [("a", 1)]))
    shuffled = list(rows)
    random.shuffle(shuffled)
    results = []
    for some in (rows, shuffled):
        root = str(tmp_path_factory.mktemp("s"))
        processed, pairs, counted = process(inputs(store(root, some)), Process(max_pairs=max_pairs), root + "/out")
        kept = sorted(artifact.read_rows(processed), key=lambda row: row["rollout_id"])
        results.append((kept, artifact.read_rows(pairs), statistics.read(counted)))
    assert results[0] == results[1]
    kept, pairs, counted = results[0]
    assert all(0 < row["rank_score"] <= 1 and 0 < row["effort"] <= 1 for row in kept)
    assert all(row["searches"][row["best_search"]]["gt_rank"] == row["best_rank"] for row in kept)
    for question in ("q1", "q2", "q3"):
        assert sum(pair["question_id"] == question for pair in pairs) <= max_pairs
    finished = counted["rollouts"]["finished"]
    for name in ("best_rank", "rank_score", "first_success", "effort", "outcomes"):
        assert sum(counted[name].values()) == finished
    assert sum(counted["searches"]["read_as"].values()) == counted["searches"]["all"]


@quick
@given(_rollouts, st.data())
def test_cut_in_collections_the_rollouts_give_what_they_give_as_one(tmp_path_factory, found, data):
    """A rollout that several collections hold counts once, by its finished row."""
    rows = [
        trajectory(f"r{n}", question, searches, sampling=sampling, status="finished" if ok else "failed")
        for n, (question, searches, sampling, ok, _) in enumerate(found)
    ]
    rows.append(trajectory("sure", "q1", [("a", 1)]))
    at = data.draw(st.integers(0, len(rows)))
    again = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True)) if at else []
    failed_before = [row | {"status": "failed", "outcome": "connection"} for row in rows[at:]]
    root = str(tmp_path_factory.mktemp("whole"))
    whole = process(inputs(store(root, rows)), Process(), root + "/out")
    parts = [rows[:at] + data.draw(st.permutations(failed_before)), rows[at:], [rows[n] for n in again]]
    root = str(tmp_path_factory.mktemp("parts"))
    cut = process(inputs(*(store(f"{root}/{n}", part) for n, part in enumerate(parts))), Process(), root + "/out")
    for one, other in zip(whole, cut, strict=True):
        assert artifact.read_rows(one) == artifact.read_rows(other)
        assert list(artifact.read_provenance(other)["inputs"]) == [f"trajectories/{n}" for n in range(3)]


def test_an_agent_that_changed_between_collections_is_nobodys(tmp_path):
    def collected(name: str, **agent: Any) -> Artifact:
        facts = {"settings": {"agent": agent}}
        table = artifact.table_of([trajectory(name, "q1", [("a", 1)])], "trajectories/2")
        return artifact.write_table(table, str(tmp_path / f"{name}.parquet"), "trajectories/2", facts)

    both = inputs(collected("r1", protocol="tags", top_k=3), collected("r2", protocol="tools", top_k=3))
    processed, _, _ = process(both, Process(), str(tmp_path / "out"))
    assert artifact.read_provenance(processed)["agent"] == {"protocol": ["tags", "tools"], "top_k": 3}


def test_scores_of_searches_to_different_depths_are_not_compared(tmp_path):
    row = trajectory("r1", "q1", [("alpha", 1), ("beta", 2)])
    shallow, deep = (
        store(str(tmp_path / "a"), [row]),
        store(str(tmp_path / "b"), [row | {"rollout_id": "r2", "top_k": 10}]),
    )
    with pytest.raises(ConfigError, match="trajectories has 3; mined has 10; collect and mine with the same top_k"):
        process({"trajectories": shallow, "mined": deep}, Process(), str(tmp_path / "out"))
    assert process({"mined": deep}, Process(), str(tmp_path / "out"))[0].rows == 1


def test_nor_are_those_of_different_depths_in_one_collection(tmp_path):
    """Rank 3 of 10 would be preferred to rank 2 of 3."""
    rows = [
        trajectory("r1", "q1", [("alpha", 2)]),
        trajectory("r2", "q1", [("beta", 3)]) | {"top_k": 10},
        trajectory("r3", "q1", [], status="failed", outcome="deadline") | {"top_k": None},
    ]
    mixed = store(str(tmp_path), rows)
    for both in ({"trajectories": mixed}, {"trajectories": mixed, "mined": mixed}):
        with pytest.raises(ConfigError, match=r"trajectories has 3, 10.*; import each top_k by itself"):
            process(both, Process(), str(tmp_path / "out"))


def test_scores_of_searches_made_otherwise_are_not_compared(tmp_path):
    def collected(name: str, **search: Any) -> Artifact:
        facts = {"settings": {"search": search}} if search else {}
        table = artifact.table_of([trajectory(name, "q1", [("a", 1)])], "trajectories/2")
        return artifact.write_table(table, str(tmp_path / f"{name}.parquet"), "trajectories/2", facts)

    alone, added = collected("r1", operator="or", expand="none"), collected("r2", operator="or", expand="question")
    with pytest.raises(
        ConfigError, match="trajectories has none; mined has question; collect and mine with the same expand"
    ):
        process({"trajectories": alone, "mined": added}, Process(), str(tmp_path / "out"))
    imported, alike = collected("r3"), collected("r4", operator="or", expand="none")
    assert process(inputs(alone, imported, alike), Process(), str(tmp_path / "out"))[0].rows == 3
