"""Single questions of an evaluation: asked alone, shown turn by turn, and without a trace in what was compared."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows.evaluate import compare, evaluate, results_ref
from flows.export import export
from tasks import config
from tasks.artifact import read_rows
from tasks.errors import ArtifactError, InputError
from tasks.refs import load_ref, save_ref
from tests.model_server import Hang, ModelServer, Reply
from tests.small_collection import ingest_small, searcher

REFS = ("results-question", "results-base", "trajectories-base", "comparison", "report")


def _settings(root: str, url: str, *questions: str, **server: Any) -> config.EvaluateRun:
    return config.EvaluateRun(
        storage=root,
        agent=config.Agent(protocol="tags", max_iterations=3),
        server=config.Server(**{"base_url": url, "model": "base", "max_retries": 0, "concurrency": 4} | server),
        evaluate=config.Evaluate(split="all", resamples=500, question_id=list(questions), allow_failed_share=1),
        variants=[config.Variant(name="question", model="question"), config.Variant(name="base", model="base")],
        verbose=bool(questions),
    )


def _wrong(request: dict[str, Any], call: int) -> Reply:
    said = searcher(request, call)
    return Reply("<answer>not given</answer>") if "<answer>" in str(said.content) else said


def test_a_run_searched_otherwise_is_not_the_run_of_that_name() -> None:
    assert results_ref("base", config.Search(operator="and")) != results_ref("base-and")


def test_single_questions_are_asked_alone_and_shown_and_share_rollouts_with_a_whole_evaluation(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "a store #1")
    ingest_small(root, documents)
    with ModelServer(_wrong) as server:
        made = evaluate(_settings(root, server.url, "q9", "q3"))
        assert server.calls == 6  # two questions, three turns each
        assert [run.artifacts[name].rows for run in made for name in run.artifacts] == [2, 2, 2]
        with pytest.raises(Exception, match="results-base"):
            load_ref(root, "results-base")
        shown = " ".join(capsys.readouterr().err.split())
        assert shown.index("How heavy is the filter?") < shown.index("How heavy is the turbine?")
        for part in (
            "search read turbine",
            "2. turbine.pdf, page 2 ← the page",
            "search mass turbine",
            "answer not given",
        ):
            assert part in shown
        assert "found but not cited" in shown

        evaluate(_settings(root, server.url))
        assert server.calls == 30  # the two are not asked again
        compare(config.CompareRun(storage=root, compare=["question", "base"], resamples=500))
        shown = " ".join(capsys.readouterr().err.split())
        for part in ("Turns with a valid action", "questions that ended", "a right answer"):
            assert shown.count(part) == 2
        assert shown.count("Success rate") == 4  # as a run's, and as a difference
        # the headline is the last thing before the report's path
        assert re.search(
            r"base against question, Hit@1: [^:]+: cannot tell, n = 10 too small [^:]+ points Report: ", shown
        )
        whole = {name: load_ref(root, name) for name in REFS}
        assert f"({Path(whole['report'].uri, 'index.html').as_uri()})" in _links()
        evaluate(_settings(root, server.url, "q9"))
        assert server.calls == 30
        assert {name: load_ref(root, name) for name in REFS} == whole
    assert {row["fate"] for row in read_rows(whole["results-base"])} == {"not_cited"}
    _exported(root, tmp_path, monkeypatch)

    with pytest.raises(InputError, match="no question q77 in split 'all'"):
        evaluate(_settings(root, server.url, "q77"))


def _links() -> str:
    """The links to reports in the UI."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["report"])))
    return " ".join(str(shown.data) for shown in found)


def _exported(root: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured, as files and as a data set; nothing of a comparison whose runs were measured again since."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    names = ["comparison", "results-base", "results-question"]
    jsonl = config.ExportRun(storage=root, what="results", target=str(folder / "jsonl"))
    hf = config.ExportRun(storage=root, what="results", target=str(folder / "hf"), layout="hf")
    assert set(export(jsonl)) == {f"{name}.jsonl" for name in names}
    export(hf)
    assert set(datasets.get_dataset_config_names(hf.target)) == set(names)
    for name in names:
        rows = read_rows(load_ref(root, name))
        lines = (folder / "jsonl" / f"{name}.jsonl").read_text().splitlines()
        assert list(map(json.loads, lines)) == rows
        loaded = [row for part in datasets.load_dataset(hf.target, name).values() for row in part]
        assert sorted(loaded, key=str) == sorted(rows, key=str)
    assert "| protocol | tags |" in (folder / "hf" / "README.md").read_text()
    save_ref(root, "results-base", load_ref(root, "results-question"))
    with pytest.raises(ArtifactError, match="base: measured again since"):
        export(jsonl)


def test_a_question_that_takes_longer_than_its_time_is_given_up_as_errored(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)

    def slow_to_answer(request: dict[str, Any], call: int) -> Reply | Hang:
        said = searcher(request, call)
        return Hang() if "<answer>" in str(said.content) else said

    with ModelServer(slow_to_answer) as server:
        runs = evaluate(_settings(root, server.url, "q9", rollout_timeout=2.0))
    (row,) = read_rows(runs[-1].artifacts["results"])
    assert (row["fate"], row["outcome"], row["first_rank"]) == ("errored", "deadline", None)
