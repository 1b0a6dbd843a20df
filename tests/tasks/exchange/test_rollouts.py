"""Rollouts and scored rollouts, out and back in; and those of another pipeline, told anew."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from tasks import artifact
from tasks.agent import prompts
from tasks.artifact import Artifact
from tasks.config import Agent, Format, Process, Search
from tasks.errors import InputError
from tasks.exchange.export import export_tables
from tasks.exchange.importing import import_rows
from tasks.exchange.rows import schema_of
from tasks.formats import format_training
from tasks.process import process
from tests.tasks.test_formats import PAGES, SCRIPTS, converse, searcher

__all__ = ["searcher"]  # a fixture


def collected(searcher: Any, root: Path, agent: Agent) -> Artifact:
    rows = [converse(searcher, question, script, agent)[0] for question in ("q0", "q1") for script in SCRIPTS]
    rows[-1] |= {"split": "test"}
    facts = artifact.provenance(settings={"agent": agent.model_dump(mode="json")}, model="tiny")
    schema = schema_of("trajectories")
    return artifact.write_table(artifact.table_of(rows, schema), str(root / "t.parquet"), schema, facts)


def imported(
    what: str, lines: Iterable[Mapping[str, Any]], root: Path, questions: Artifact | None = None
) -> tuple[list[dict[str, Any]], dict[int | None, str]]:
    """The rows that were taken, and why those of some numbers were set aside; no rollout is told with pages."""
    file = root / f"{what}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = import_rows(
        what, [str(file)], Agent(observation="none"), None, questions, str(root / f"imported {what}"), str(root)
    )
    aside = {row["row"]: row["reason"] for row in artifact.read_rows(made["set_aside_import"])}
    return artifact.read_rows(made[what]), aside


def asked(root: Path, question: str, split: str) -> Artifact:
    """One ingested question."""
    schema = schema_of("questions")
    rows = [{"question_id": "q0", "question": question, "split": split}]
    return artifact.write_table(artifact.table_of(rows, schema), str(root / "q.parquet"), schema, {})


def by_id(made: Artifact) -> list[dict[str, Any]]:
    return sorted(artifact.read_rows(made), key=lambda row: row["rollout_id"])


@pytest.mark.parametrize("layout", ["jsonl", "hf"])
@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_ours_come_back_as_they_were(
    searcher: Any, tmp_path: Path, protocol: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    agent = Agent(protocol=protocol)
    made = collected(searcher, tmp_path, agent)
    scored = dict(
        zip(("processed", "pairs", "statistics"), process({"t": made}, Process(), str(tmp_path)), strict=True)
    )
    out = tmp_path / "out"
    out.mkdir()
    export_tables({"trajectories": made, **scored}, layout, out, str(tmp_path))
    sources = {name: [str(out if layout == "hf" else out / f"{name}.jsonl")] for name in ("trajectories", "processed")}
    if layout == "jsonl":
        sources["processed"].append(str(out / "pairs.jsonl"))
        first = json.loads((out / "trajectories.jsonl").read_text().splitlines()[0])
        assert [search["query"] for search in first["searches"]] == ["weather", "common", "Budget"]
        assert [search["rank"] for search in first["searches"]] == [None, 3, 1]
        assert first["searches"][2]["results"][0]["file"] == "plan.pdf"
        assert json.loads((out / "stats.json").read_text())["rollouts"]
    else:
        assert set(datasets.load_dataset(str(out), "trajectories")) == {"train", "test"}
    # whatever the agent's settings are now, those that it was collected with are known
    other = Agent(protocol="tags", max_page_chars=99)
    back = import_rows("trajectories", sources["trajectories"], other, None, None, str(tmp_path / "a"), str(tmp_path))
    assert by_id(back["trajectories"]) == by_id(made)
    assert artifact.read_rows(back["set_aside_import"]) == []
    again = process({"t": back["trajectories"]}, Process(), str(tmp_path / "again"))
    assert by_id(again[0]) == by_id(scored["processed"])
    assert format_training(*again[:2], Format(formats=["sft_trajectory"]), agent, str(tmp_path / "sets"))

    mined = tmp_path / "mined"
    mined.mkdir()
    export_tables({"mined": made}, layout, mined, str(tmp_path))
    source = str(mined if layout == "hf" else mined / "mined.jsonl")
    back = import_rows("mined", [source], other, None, None, str(tmp_path / "m"), str(tmp_path))
    assert by_id(back["mined"]) == by_id(made)
    assert artifact.read_rows(back["set_aside_import"]) == []

    back = import_rows("processed", sources["processed"], other, None, None, str(tmp_path / "b"), str(tmp_path))
    assert by_id(back["processed"]) == by_id(scored["processed"])
    order = [(name, "ascending") for name in ("split", "question_id", "chosen", "rejected")]
    assert artifact.read_table(back["pairs"]).sort_by(order).equals(artifact.read_table(scored["pairs"]).sort_by(order))
    if layout == "jsonl":
        alone = import_rows(
            "processed", sources["processed"][:1], other, None, None, str(tmp_path / "c"), str(tmp_path)
        )
        found = {(row["chosen"], row["rejected"]) for row in artifact.read_rows(alone["pairs"])}
        assert found
        assert found <= {(row["chosen"], row["rejected"]) for row in artifact.read_rows(scored["pairs"])}


def theirs(searcher: Any, script: str, agent: Agent) -> dict[str, Any]:
    """A rollout as another pipeline would write it down."""
    row = converse(searcher, "q0", script, agent)[0]
    return {
        "id": "q0",
        "question": row["question"],
        "answer_variants": ["42"],
        "evidence": [{"file": "plan.pdf", "page_number": 1}],
        "sampling_config": {"name": "high_temp", "temperature": 1.0},
        "searches": [
            {
                "query": search["query"],
                "thinking": turn["reasoning"],
                "results": [f"{hit['file']}:{hit['page_number']}" for hit in search["results"]],
                "rank": search["gt_rank"],
                "rank_score": search["rank_score"],
            }
            for turn in row["turns"]
            for search in turn["searches"]
        ],
        "final_answer": "42",
        "citations": [{"document": "plan.pdf", "page": 1}],
        "success": True,
        "timestamp": "2025-01-01",
    }


def pages(root: Path) -> Artifact:
    rows = [{"file": file, "page_number": 1, "total_pages": 1, "text": text} for file, text in PAGES.items()]
    schema = schema_of("pages")
    return artifact.write_table(artifact.table_of(rows, schema), str(root / "pages.parquet"), schema, {})


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@pytest.mark.parametrize("most", [4, 5])  # the answer is the fourth turn: one that must answer, or one that may search
def test_others_are_told_as_the_agent_would_have(searcher: Any, tmp_path: Path, protocol: Any, most: int) -> None:
    agent = Agent(protocol=protocol, max_iterations=most)
    file = tmp_path / "trajectories.jsonl"
    file.write_text(json.dumps(theirs(searcher, "improves", agent)) + "\n")
    made = import_rows("trajectories", [str(file)], agent, pages(tmp_path), None, str(tmp_path / "made"), str(tmp_path))
    (row,) = artifact.read_rows(made["trajectories"])
    ours, _ = converse(searcher, "q0", "improves", agent)
    assert [m["content"] for m in row["messages"][:-1]] == [m["content"] for m in ours["messages"][:-1]]
    assert row["messages"][-1]["role"] == "assistant"
    assert row["answer"] == ["42"]
    assert row["sampling"] == "high_temp"
    assert row["prompt_fingerprint"] == prompts.prompt_fingerprint(agent)
    (aside,) = artifact.read_rows(made["set_aside_import"])
    assert (aside["reason"], aside["detail"]) == ("unknown_field", "timestamp, in 1 rows")

    scored = import_rows(
        "processed", [str(file)], agent, pages(tmp_path), None, str(tmp_path / "scored"), str(tmp_path)
    )
    (kept,) = artifact.read_rows(scored["processed"])
    with pytest.raises(InputError, match=r"pairs\.jsonl: rollouts of another pipeline are paired anew.*leave it out"):
        import_rows("processed", [str(file), "pairs.jsonl"], agent, pages(tmp_path), None, str(tmp_path), str(tmp_path))
    assert (kept["best_query"], kept["best_rank"], kept["rank_score"]) == ("Budget", 1, 1.0)
    assert {(pair["chosen"], pair["rejected"]) for pair in artifact.read_rows(scored["pairs"])} == {
        *[("Budget", "weather"), ("Budget", "common"), ("common", "weather")]
    }
    sets = format_training(scored["processed"], scored["pairs"], Format(formats="all"), agent, str(tmp_path / "sets"))
    assert all(found.rows for found in sets.values())


def test_what_cannot_be_used_is_set_aside_and_a_wrong_rank_is_told(searcher: Any, tmp_path: Path) -> None:
    agent = Agent()
    good = theirs(searcher, "at once", agent)
    search = good["searches"][0]
    lines = [
        good,
        {**good, "searches": [{**search, "rank": 2}]},
        {**good, "searches": [{"query": "budget", "rank": 1}]},
        {**good, "searches": [{**search, "results": ["elsewhere.pdf:7"], "rank": None}]},
        {**good, "searches": [{**search, "query": " "}]},
        {**good, "evidence": []},
        {**good, "searches": None},
        {**good, "question": 7},
        good,
    ]
    file = tmp_path / "trajectories.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    made = import_rows("trajectories", [str(file)], agent, pages(tmp_path), None, str(tmp_path / "made"), str(tmp_path))
    assert made["trajectories"].rows == 3  # two that are alike are two rollouts
    aside = [(row["row"], row["reason"]) for row in artifact.read_rows(made["set_aside_import"])]
    assert aside == [
        *[(None, "rank_differs"), (None, "unknown_field"), (3, "missing_field"), (4, "unknown_page")],
        *[(5, "missing_field"), (6, "bad_location"), (7, "missing_field"), (8, "wrong_type"), (10, "bad_json")],
    ]
    blind = import_rows(
        "trajectories", [str(file)], Agent(observation="none"), None, None, str(tmp_path / "blind"), str(tmp_path)
    )
    assert blind["trajectories"].rows == 4
    with pytest.raises(InputError, match="no row can be used"):
        import_rows("trajectories", [str(file)], agent, None, None, str(tmp_path / "none"), str(tmp_path))


def test_a_number_that_no_column_holds_sets_its_row_aside_alone(searcher: Any, tmp_path: Path) -> None:
    good = theirs(searcher, "at once", Agent())
    del good["timestamp"]
    (search,) = good["searches"]
    hit, far = {"file": "plan.pdf", "page": 1}, {"file": "plan.pdf", "page": 2**40}
    scored = [{**search, "results": [{**hit, "score": score}]} for score in (10**400, math.nan, math.inf)]
    wrong = [
        *[{"seed": 3_000_000_000}, {"sample": 2**40}, {"top_k": 0}, {"evidence": far}, {"citations": [far]}],
        *[{"searches": [made]} for made in ({**search, "results": [far]}, *scored)],
    ]
    for what in ("trajectories", "processed"):
        rows, aside = imported(what, [*({**good, **field} for field in wrong), good], tmp_path)
        assert len(rows) == 1
        assert aside == dict.fromkeys(range(1, len(wrong) + 1), "bad_number")


def test_others_rollouts_are_of_the_split_that_their_question_has_here(searcher: Any, tmp_path: Path) -> None:
    line = theirs(searcher, "at once", Agent())
    alike = {**line, "id": "named otherwise", "split": "train"}
    elsewhere = [
        {**line, "id": "elsewhere", "question": "Of what?", "split": split} for split in ("dev", None, "../../evil")
    ]
    here = asked(tmp_path, line["question"], "test")
    rows, aside = imported("trajectories", [{**line, "split": "train"}, line, alike, *elsewhere], tmp_path, here)
    assert [row["split"] for row in rows] == ["test", "test", "test", "dev", "train"]
    assert aside == {None: "unknown_field", 6: "bad_split"}


def test_a_query_is_imported_as_the_agent_reads_one(searcher: Any, tmp_path: Path) -> None:
    line = theirs(searcher, "at once", Agent())
    line["searches"][0]["query"] = "  net \n sales  2021 "
    (row,), _ = imported("trajectories", [line], tmp_path)
    assert row["turns"][0]["searches"][0]["query"] == "net sales 2021"
    assert "<search>net sales 2021</search>" in row["turns"][0]["raw_text"]


def test_of_others_searches_top_k_results_count_and_what_nobody_answered_was_not_seen(
    searcher: Any, tmp_path: Path
) -> None:
    line = theirs(searcher, "at once", Agent())
    del line["final_answer"], line["timestamp"]
    deep = {"query": "deep", "results": ["a.pdf:1", "b.pdf:1", "c.pdf:1", "plan.pdf:1"], "rank": 4}
    (row,), aside = imported("trajectories", [{**line, "searches": [deep, deep], "top_k": 3}], tmp_path)
    searches = [search for turn in row["turns"] for search in turn["searches"]]
    assert [(len(s["results"]), s["gt_rank"], s["shown"]) for s in searches] == [(3, None, True), (3, None, False)]
    assert (row["outcome"], aside) == ("out_of_turns", {None: "rank_differs"})


def test_a_row_of_ours_that_was_tampered_with_is_refused(searcher: Any, tmp_path: Path) -> None:
    agent = Agent()
    out = tmp_path / "out"
    out.mkdir()
    export_tables({"trajectories": collected(searcher, tmp_path, agent)}, "jsonl", out, str(tmp_path))
    rows = [json.loads(line) for line in (out / "trajectories.jsonl").read_text().splitlines()][:6]
    rows[1]["messages"] = rows[1]["messages"][:2]
    rows[2]["turns"] = "many"
    rows[3]["rollout_id"] = rows[0]["rollout_id"]
    rows[4] |= {"protocol": "tools", "extra": 1}
    rows[5]["messages"][1]["content"] += "\N{OBJECT REPLACEMENT CHARACTER}"  # an image that is not there
    (out / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = import_rows(
        "trajectories", [str(out / "trajectories.jsonl")], agent, None, None, str(tmp_path / "made"), str(tmp_path)
    )
    assert made["trajectories"].rows == 1
    aside = {row["row"]: row["reason"] for row in artifact.read_rows(made["set_aside_import"])}
    assert aside == {
        **{None: "unknown_field", 2: "bad_conversation", 3: "wrong_type", 4: "duplicate_id", 5: "bad_conversation"},
        6: "bad_conversation",
    }


@pytest.mark.parametrize("layout", ["jsonl", "hf"])
def test_what_has_no_pairs_comes_back_without(searcher: Any, tmp_path: Path, layout: str) -> None:
    agent = Agent()
    made = collected(searcher, tmp_path, agent)
    scored = process({"t": made}, Process(max_pairs=0), str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    export_tables(dict(zip(("processed", "pairs"), scored, strict=False)), layout, out, str(tmp_path))
    sources = [str(out)] if layout == "hf" else [str(out / f"{name}.jsonl") for name in ("processed", "pairs")]
    back = import_rows("processed", sources, agent, None, None, str(tmp_path / "back"), str(tmp_path))
    assert (back["processed"].rows, back["pairs"].rows) == (scored[0].rows, 0)


def test_how_it_was_searched_and_scored_comes_along(searcher: Any, tmp_path: Path) -> None:
    agent, search = Agent(), Search(operator="and").model_dump(mode="json")
    rows = artifact.read_table(collected(searcher, tmp_path, agent))
    facts = artifact.provenance(settings={"agent": agent.model_dump(mode="json"), "search": search})
    schema = schema_of("trajectories")
    made = artifact.write_table(rows, str(tmp_path / "anded.parquet"), schema, facts)
    scored = process({"t": made}, Process(reward="ndcg"), str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    export_tables({"trajectories": made, "processed": scored[0]}, "jsonl", out, str(tmp_path))
    told = {
        name: artifact.read_provenance(
            import_rows(name, [str(out / f"{name}.jsonl")], agent, None, None, str(tmp_path / name), str(tmp_path))[
                name
            ]
        )["settings"]
        for name in ("trajectories", "processed")
    }
    assert told["trajectories"]["search"] == search
    assert told["processed"]["reward"] == "ndcg"


@pytest.mark.parametrize("by_text", [False, True])
def test_a_question_that_is_ingested_is_of_the_split_that_it_has_here(
    searcher: Any, tmp_path: Path, by_text: bool
) -> None:
    agent = Agent()
    made = collected(searcher, tmp_path, agent)
    scored = process({"t": made}, Process(), str(tmp_path))[:2]
    out = tmp_path / "out"
    out.mkdir()
    export_tables(
        {"trajectories": made, **dict(zip(("processed", "pairs"), scored, strict=True))}, "jsonl", out, str(tmp_path)
    )
    question = "What is the figure of q0?"
    (said,) = {row["question"] for row in artifact.read_rows(made) if row["question_id"] == "q0"}
    schema = schema_of("questions")
    ingested = {"question_id": "q0", "question": question, "split": "test"}
    if by_text:
        ingested |= {"question_id": "here it has another", "question": said}
    questions = artifact.write_table(artifact.table_of([ingested], schema), str(tmp_path / "q.parquet"), schema, {})
    files = [str(out / f"{name}.jsonl") for name in ("trajectories", "processed", "pairs")]
    back = import_rows("trajectories", files[:1], agent, None, questions, str(tmp_path / "a"), str(tmp_path))
    back |= import_rows("processed", files[1:], agent, None, questions, str(tmp_path / "b"), str(tmp_path))
    for name, was in {"trajectories": made, "processed": scored[0], "pairs": scored[1]}.items():
        splits = {row["question_id"]: row["split"] for row in artifact.read_rows(was)} | {"q0": "test"}
        assert {row["question_id"]: row["split"] for row in artifact.read_rows(back[name])} == splits
        assert {row["split"] for row in artifact.read_rows(back[name]) if row["question_id"] == "q0"} == {"test"}


def test_nothing_that_others_said_stands_for_an_image(searcher: Any, tmp_path: Path) -> None:
    agent, image = Agent(), "\N{OBJECT REPLACEMENT CHARACTER}"
    plain = theirs(searcher, "improves", agent)
    del plain["timestamp"]
    marked = {**plain, "question": image + plain["question"], "final_answer": f"4{image}2"}
    marked["searches"] = [
        {**s, "query": s["query"] + image, "thinking": image + s["thinking"], "searched": image + s["query"]}
        for s in plain["searches"]
    ]
    marked["citations"] = [{"document": f"plan{image}.pdf", "page": 1}]
    told = []
    for name, line in (("plain", plain), ("marked", marked)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({**line, "rollout_id": "r"}) + "\n")
        made = import_rows(
            "trajectories", [str(file)], agent, pages(tmp_path), None, str(tmp_path / name), str(tmp_path)
        )
        told.append(artifact.read_rows(made["trajectories"]))
    assert told[0] == told[1]
