"""The report: one file that opens with the verdict, escapes what models say, and stays small."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import plots, statistics, storage
from tasks.artifact import Artifact, provenance, read_provenance, table_of, write_table
from tasks.compare import compare
from tasks.report import browser, write_report
from tasks.report.facts import facts, flat
from tasks.schemas import TABLES

STATISTICS = statistics.summarize(
    [
        statistics.Rollout(
            "q", "default", True, "answered", True, 3, rank, score, rank, score, ("query",), 0, 2, 2, (), ("parser",)
        )
        for rank, score in [(1, 1.0)] * 3 + [(None, 0.0)] * 5
    ],
    [],
)
ATTACK = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'&<!--<svg onload=alert(3)>"""
RUNS: dict[str, list[int | None]] = {
    "question": [1, None, 2, 4] * 6,
    "base": [None, None, 3, 1] * 6,
    "adapter": [1, 1, 1, 2] * 6,
}


class Page(HTMLParser):
    """Elements and texts of a page, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "data" if dict(attrs).get("id") == "data" else tag

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def question(number: int) -> dict[str, Any]:
    return {
        "question_id": f"q{number:03d}",
        "question": f"Question {number}? {ATTACK}",
        "answers": [["12 %"], [ATTACK]],
        "answer_locations": [{"document": f"d{number}.pdf", "page": 2}],
        "category": "table",
        "split": "test",
    }


def results(folder: Path, run: str, ranks: Sequence[int | None], **others: Any) -> Artifact:
    rows = [
        {
            **dict.fromkeys(TABLES["results/4"].names),
            **question(number),
            "run": run,
            "fate": "found" if rank and rank <= 3 else "never_retrieved",
            "category": "table" if number < 20 else "chart",
            "turns": None if run == "question" else 2,
            "valid_turns": None if run == "question" else 1,
            "prompt_tokens": None if run == "question" else 700,
            "first_query": f"{run} {number} {ATTACK}",
            "first_rank": rank,
            "first_ranks": [rank] if rank else [],
            "best_rank": rank,
            "best_known": True,
            "seen_ranks": [rank] if rank and rank <= 3 else [],
            "searches": 1,
            "searches_to_success": 1 if rank and rank <= 3 else None,
            "first_hit_rank": rank if rank and rank <= 3 else None,
            "zero_results": 0,
            **others,
        }
        for number, rank in enumerate(ranks)
    ]
    agent = {"examples": run == "base", "top_k": 3}
    learned = {"questions": ["q900"], "documents": ["d900.pdf"], "known": True}
    inputs = {"adapter": "its hash"} if run == "adapter" else {}
    rollouts = {"inputs": inputs, "settings": {"agent": agent}, "learned": learned if inputs else None}
    made = provenance(rollouts=rollouts, settings={"depth": 20})
    return write_table(table_of(rows, "results/4"), str(folder / f"{run}.parquet"), "results/4", made)


def rollout(number: int, rank: int | None, text: str = ATTACK) -> dict[str, Any]:
    hits = [
        {"rank": k, "file": f"d{number}.pdf", "page_number": 2 if k == rank else 50 + k, "score": 1.0}
        for k in (1, 2, 3)
    ]
    search = {
        "query": text,
        "searched": text + " more",
        "read_as": "words",
        "results": hits,
        "gt_rank": rank,
        "rank_score": 0.0,
    }
    turn = {
        **{
            "turn": 1,
            "raw_text": text,
            "reasoning": text,
            "action": "search",
            "searches": [search],
            "failure": "no_action",
        },
        **{
            "failure_detail": text,
            "finish_reason": "stop",
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "latency_s": 0.1,
        },
    }
    return {
        **dict.fromkeys(TABLES["trajectories/2"].names),
        **question(number),
        "rollout_id": str(number),
        "status": "finished",
        "outcome": "answered",
        "top_k": 3,
        "turns": [turn],
        "answer": [text],
        "citations": [{"file": text, "page": 1, "seen": False}],
        "elapsed_s": 1.5,
    }


def report(folder: Path, runs: dict[str, list[int | None]] = RUNS, **others: Any) -> str:
    made = [results(folder, run, ranks) for run, ranks in runs.items()]
    comparison = compare(made, 500, str(folder / "comparison.parquet"))
    rows = [rollout(number, rank) for number, rank in enumerate(runs["adapter"])]
    rollouts = write_table(table_of(rows, "trajectories/2"), str(folder / "t.parquet"), "trajectories/2", provenance())
    written = write_report(
        made,
        comparison,
        uri=str(folder / "report"),
        facts={"Model": ATTACK, "Search": {"operator": "or", "boosts": [3.0, 1.0]}},
        trajectories={"adapter": rollouts},
        **others,
    )
    assert read_provenance(written)["inputs"]["comparison"] == comparison.sha256
    return (Path(written.uri) / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    losses = [{"step": s, "epoch": s / 10, "loss": 3 / s, "eval_loss": 1.0 if s == 10 else None} for s in range(1, 11)]
    folder = tmp_path_factory.mktemp("report")
    and_runs = [results(folder, f"{run} and", ranks) for run, ranks in RUNS.items()]
    return report(
        folder,
        statistics=STATISTICS,
        loss_curve=losses,
        rescored={"AND between words": (and_runs, compare(and_runs, 500, str(folder / "and.parquet")))},
    )


def test_it_opens_with_the_verdict_and_the_baseline_stands_beside(page: str) -> None:
    text = Page(page).text
    assert (
        "adapter ranks the page first for 75.0 % of 24 questions about unseen documents; base, with examples , for 25.0 % ; "
        "question, as typed , for 25.0 % ." in text
    )
    assert "Improved against base, with examples: +50.0 points , 95 % interval" in text
    assert "against question, as typed: +50.0 points , 95 % interval" in text
    assert text.index("ranks the page first") < text.index("Hit@3") < text.index("How it was measured")


def test_every_part_is_there(page: str) -> None:
    text = Page(page).text
    for part in (
        "How far down must one look?",
        "How did training go?",
        "What was there to learn from?",
        "base against question",
        "ranked with AND between words",
        "adapter and − base and, points",
        "operator or, boosts 3.0, 1.0",
        "24 groups here",
        "Searches are ranked to a depth of 20, a page beyond it counting as missed; the agent is shown the first 3.",
        "mrr_survivors (reference)",
        # the reference pipeline's metrics by its names
        *("Success rate", "Iterations to success", "First-hit rank", "MRR", "Hit@1", "Hit@10"),
        *("Recall@10", "nDCG@10", "Turns with a valid action", "Each question has one page with the answer"),
        "never found",
        "how it ended with base; across, how it ended with adapter",
        "table 20 25.0 % [",
        "chart 4 25.0 % too few",
        "Prompt tokens 700 1,400 – 700 700 –",
    ):
        assert part in text


def test_what_models_say_never_becomes_markup(page: str) -> None:
    parsed = Page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    data = json.loads(parsed.data)
    assert data["questions"][0]["runs"][2]["rollout"]["turns"][0]["searches"][0]["query"] == ATTACK
    assert data["questions"][0]["question"].endswith(ATTACK)


def test_the_script_sets_text_only_and_is_the_only_one_allowed(page: str) -> None:
    parsed = Page(page)
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a) or ""
    assert re.search(r"default-src 'none'; .*script-src 'sha256-[\w+/=]+'$", policy)
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in script


def test_it_loads_nothing(page: str) -> None:
    for _, attributes in Page(page).tags:
        assert "src" not in attributes
        target = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert target.startswith("#"), target
    assert "@import" not in page
    assert "url(http" not in page


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back_as_it_was_and_cannot_end_the_script(text: str) -> None:
    rows = [
        {
            **{**question(0), "fate": None, "first_rank": None, "best_rank": None, "best_known": True},
            **{"first_query": text, "searches": 1},
        }
    ]
    embedded = browser.embedded({"base": rows}, {"base": [rollout(0, None, text)]})
    assert not set("<>&") & set(embedded)
    run = json.loads(embedded)["questions"][0]["runs"][0]
    assert run["query"] == text
    assert run["rollout"]["turns"][0]["raw"] == text


def test_too_much_is_cut_and_said_with_changed_questions_kept_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "MAX_BYTES", 40_000)

    def rows(ranks: Sequence[int | None]) -> list[dict[str, Any]]:
        known = {"fate": None, "best_rank": None, "best_known": True, "first_query": "words", "searches": 1}
        return [{**question(n), **known, "first_rank": rank} for n, rank in enumerate(ranks)]

    before: list[int | None] = [None] * 60
    after = [1 if number >= 55 else None for number in range(60)]
    rollouts = [rollout(number, None, "long " * 200) for number in range(60)]
    embedded = browser.embedded({"base": rows(before), "adapter": rows(after)}, {"adapter": rollouts})
    data = json.loads(embedded)
    kept = [entry["id"] for entry in data["questions"]]
    assert len(embedded) < 41_000
    assert data["all"] == 60
    assert 5 < len(kept) < 60
    assert {f"q{number:03d}" for number in range(55, 60)} <= set(kept)
    assert kept == sorted(kept)


def test_one_run_alone_is_reported_without_a_verdict(tmp_path: Path) -> None:
    text = Page(report(tmp_path, {"adapter": [1, None, 2]})).text
    assert "3 questions, one run" in text
    assert "3 groups here" in text
    assert "† Likely too narrow an interval" in text
    assert "ranks the page first" not in text


def test_of_one_group_of_documents_no_interval_is_promised(tmp_path: Path) -> None:
    text = Page(report(tmp_path, {"question": [2], "base": [None], "adapter": [1]})).text
    assert "1 group here" in text
    assert "Cannot tell against base, with examples: +100.0 points , p = 1.0000; n = 1 from one group" in text
    assert "with 95 % intervals" not in text
    assert "†" not in text  # where none is marked, nothing is said of it
    assert "Hit@1 0.0 % 0.0 % 100.0 % ≈ +100.0 cannot tell Hit@3" in text


def test_a_model_that_hardly_searches_is_told_of_beside_the_verdict(tmp_path: Path) -> None:
    made = [results(tmp_path, "base", [1, 2, 3]), results(tmp_path, "adapter", [None] * 3, searches=0)]
    comparison = compare(made, 100, str(tmp_path / "comparison.parquet"))
    written = write_report(made, comparison, uri=str(tmp_path / "report"), facts={}, loss_curve=[{"step": 1}])
    *_, last = read_provenance(written)["conclusion"]
    assert last.startswith("adapter made no search in 3 of 3 questions: look at its turns' raw text")
    page = (Path(written.uri) / "index.html").read_text(encoding="utf-8")
    assert Page(page).text.index("adapter made no search") < Page(page).text.index("Hit@3")
    assert "How did training go?" not in page  # one step is no curve


def test_the_browser_is_told_what_was_shown_and_of_a_rollout_without_a_search_how_it_spoke() -> None:
    rows = [{**dict.fromkeys(TABLES["results/4"].names), **question(0), "searches": 0}]
    spoken = rollout(0, None)
    spoken["turns"][0] |= {"searches": [], "failure": None}
    data = json.loads(browser.embedded({"question": rows, "base": rows}, {"base": [spoken]}))
    as_typed, base = data["questions"][0]["runs"]
    assert (as_typed["shown"], base["shown"], base["searches"]) == (3, 3, 0)
    assert base["rollout"]["turns"][0]["raw"] == ATTACK


def test_found_pages_are_not_red_for_answers_that_the_raw_question_does_not_give(tmp_path: Path) -> None:
    made = [
        results(tmp_path, "question", [1, 1, None]),
        results(tmp_path, "adapter", [1, 1, 1], fate="answered_wrong", cited=0),
    ]
    comparison = compare(made, 100, str(tmp_path / "comparison.parquet"))
    written = write_report(made, comparison, uri=str(tmp_path / "report"), facts={})
    page = (Path(written.uri) / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<td class="(\w+)" style="--tint', page) == ["same", "better"]
    assert "As question was not asked for answers, only found" in Page(page).text


def test_all_trainings_of_an_adapter_are_told_in_their_order() -> None:
    counts = {"examples": 375, "questions": 120, "steps": 48}
    first = {"settings": {"method": "sft", "lr": 0.5}, **counts, "started_from": None}
    told = dict(flat(facts({}, {"settings": {"method": "dpo"}, **counts, "started_from": first})))
    assert list(told.values()) == [
        "sft on 375 examples, 120 questions, 48 steps",
        "method sft, lr 0.5",
        "dpo on 375 examples, 120 questions, 48 steps",
        "method dpo",
    ]
    of_others = {"settings": {}, "trained": {}}
    assert list(dict(flat(facts({}, of_others))).values()) == ["made elsewhere", "unknown"]


def test_it_lies_on_either_storage(storage_root: str, tmp_path: Path) -> None:
    made = [results(tmp_path, run, ranks) for run, ranks in RUNS.items()]
    comparison = compare(made, 100, storage.join(storage_root, "comparison.parquet"))
    written = write_report(made, comparison, uri=storage.join(storage_root, "report"), facts={})
    text = storage.read_bytes(storage.join(written.uri, "index.html")).decode()
    assert "ranks the page first" in text
    assert read_provenance(written)["inputs"]["comparison"] == comparison.sha256


def test_reporting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        pages.append(report(folder, statistics=STATISTICS))
    assert pages[0] == pages[1]


def test_runs_keep_their_colours_where_not_all_are_drawn_and_where_there_are_more_runs_than_colours() -> None:
    drawn = plots.call_bars({"question": None, "base": [0, None], "adapter": [2, None]})
    assert "base 1 of 2, adapter 1 of 2" in drawn
    assert ">question<" not in drawn
    assert ("var(--run-0" in drawn, "var(--run-1" in drawn, "var(--run-2" in drawn) == (False, True, True)
    many = {f"run {number}": [1, None] for number in range(8)}
    for figure in (plots.rank_bars(many), plots.call_bars(many)):
        assert figure.count("<pattern") == 2
    assert plots.hit_curves(many).count("stroke-dasharray") >= 2
    few = dict(list(many.items())[:6])
    assert "<pattern" not in plots.rank_bars(few)


def test_figures_take_the_colours_of_the_page_and_leave_its_style_alone() -> None:
    figure = plots.hit_curves({"a $x$ & <b>": [1, None, 3], "b": [None, None, None]})
    assert figure.startswith("<svg ")
    assert "a $x$ &amp; &lt;b&gt;" in figure
    assert "var(--run-0" in figure
    assert "#0102" not in figure
    assert "<style" not in figure
    assert "<b>" not in figure


def test_labels_keep_apart() -> None:
    places = plots._apart([50.0, 50.5, 10.0, 99.0], 5, 0, 100)
    assert places[2] == 10
    assert sorted(places) == [places[i] for i in (2, 0, 1, 3)]
    assert all(b - a >= 5 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
