"""The loop in one process, with a scripted model: which stages run, that they are told once, and not done twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import ArtifactSort

from flows.improve import improve, steps
from tasks import config, refs, storage
from tasks.artifact import Artifact, read_provenance
from tasks.errors import InputError, ServerError
from tasks.refs import load_ref
from tests.model_server import ModelServer
from tests.small_collection import searcher
from tests.tiny_model import tiny_model

STAGES = [
    "read documents",
    "read scans",
    "read questions",
    "index pages",
    "collect",
    "process",
    "format",
    "finetune",
    "score",
]
STAGES += ["collect", "score", "compare", "report"]


def small_loop(root: str, documents: Path, model: str, url: str) -> config.Improve:
    """The loop over the small collection: the model at `url` is asked, and `model` is what is trained."""
    return config.Improve(
        storage=root,
        ingest=config.Ingest(
            documents=str(documents / "pdfs"),
            questions=str(documents / "questions.jsonl"),
            train_ratio=0.5,
            dev_ratio=0.0,
        ),
        agent=config.Agent(protocol="tags", max_iterations=3),
        server=config.Server(base_url=url, model=model, max_retries=0),
        finetune=config.Finetune(epochs=1, batch_size=4, lora_r=4, bf16=False),
        evaluate=config.Evaluate(resamples=100),
        variants=[config.Variant(name="question", model="question"), config.Variant(name="base", model="base")],
    )


@pytest.mark.parametrize("storage_root", ["seaweedfs"], indirect=True)  # the others here are on a disk
def test_every_stage_once_and_one_table(
    storage_root: str, tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, model = storage_root, str(tiny_model(tmp_path / "model"))
    with ModelServer(searcher) as server:
        server.models = [model]
        settings = small_loop(root, documents, model, server.url)
        first = improve(settings)
        assert [run.stage for run in first] == STAGES
        assert not any(run.cached for run in first)
        assert capsys.readouterr().err.count("Stages") == 1
        assert load_ref(root, "adapter").rows > 0

        asked = server.calls
        again = improve(settings)
        assert [run.stage for run in again] == STAGES
        assert all(run.cached for run in again)
        assert server.calls == asked
        said = capsys.readouterr().err
        assert said.count("Stages") == said.count("no stage did any work") == 1
        report = storage.join(load_ref(root, "report").uri, "index.html")
        assert said.rstrip().endswith(f"Report: {report}")

        more = settings.model_copy(update={"finetune": settings.finetune.model_copy(update={"epochs": 2})})
        assert [run.stage for run in improve(more) if not run.cached] == ["finetune"]  # no adapter is measured here
        assert server.calls == asked


def test_the_ui_shows_what_was_found(tmp_path: Path, documents: Path) -> None:
    model = str(tiny_model(tmp_path / "model"))
    with ModelServer(searcher) as server, get_client(sync_client=True) as client:
        server.models = [model]
        before = {artifact.id for artifact in client.read_artifacts(limit=200, sort=ArtifactSort.CREATED_DESC)}
        settings = small_loop(str(tmp_path / "store"), documents, model, server.url)
        # a loss of one step is no picture
        improve(settings.model_copy(update={"finetune": settings.finetune.model_copy(update={"epochs": 2})}))
        made = [
            artifact
            for artifact in client.read_artifacts(limit=200, sort=ArtifactSort.CREATED_DESC)
            if artifact.id not in before
        ]
    shown = {artifact.key: artifact for artifact in made}
    assert shown["statistics-of-the-rollouts"].type == "markdown"
    assert "| Hit@1 |" in shown["comparison"].data
    pictures = [shown["loss"].data, shown["what-the-rollouts-found"].data]
    assert all("](data:image/svg+xml;base64," in picture for picture in pictures)
    assert "index.html" in shown["report"].data
    tables = [json.loads(artifact.data) for artifact in made if artifact.key == "stages"]  # each flow's, and the loop's
    assert [row["stage"] for row in max(tables, key=len)] == STAGES
    assert any(artifact.type == "progress" and artifact.data == 100 for artifact in made)


def test_what_a_stage_raises_ends_the_loop(tmp_path: Path, documents: Path) -> None:
    settings = small_loop(str(tmp_path / "store"), documents, "base", "http://127.0.0.1:9/v1")
    with pytest.raises(ServerError):
        improve(settings)


@pytest.mark.parametrize(("method", "learned"), [("sft", "sft_context"), ("dpo", "dpo")])
def test_it_learns_by_the_method_that_is_named(tmp_path: Path, method: Any, learned: str) -> None:
    named = small_loop(str(tmp_path), tmp_path, "base", "http://127.0.0.1:9/v1").model_dump()
    named |= {"format": {"formats": ["reward", "dpo", "sft_context"]}, "finetune": {"method": method}}
    (training,) = (chosen for _, chosen in steps(config.Improve(**named)) if isinstance(chosen, config.FinetuneRun))
    assert (training.finetune.method, training.learned_from) == (method, learned)


def test_it_goes_on_from_the_adapter_that_it_made(tmp_path: Path, documents: Path) -> None:
    root, model = str(tmp_path / "store"), str(tiny_model(tmp_path / "model"))
    with ModelServer(searcher) as server:
        server.models = [model]
        once = small_loop(root, documents, model, server.url)
        dpo = once.finetune.model_copy(update={"method": "dpo"})
        formats, samples = config.Format(formats=["sft_best", "dpo"]), config.Collect(samples=2)
        twice = once.model_copy(update={"refine": dpo, "format": formats, "collect": samples})
        runs = improve(twice)
        first, second = (run.artifacts["adapter"] for run in runs if run.stage == "finetune")
        assert read_provenance(second)["inputs"]["start"] == first.sha256
        assert load_ref(root, "adapter") == second
        assert [run.stage for run in improve(twice) if not run.cached] == []


@pytest.mark.parametrize("dated", [{"collect": {"dt": "2026-11-24"}}, {"mine": {"dt": "scheduled"}}])
def test_a_night_is_not_what_it_learns_from(tmp_path: Path, dated: dict[str, Any]) -> None:
    named = small_loop(str(tmp_path), tmp_path, "base", "http://127.0.0.1:9/v1").model_dump()
    with pytest.raises(ValueError, match="leave dt empty"):
        config.Improve(**named | dated)


def test_what_others_make_meanwhile_is_not_what_it_goes_on_from(tmp_path: Path, documents: Path) -> None:
    """Under the same storage somebody else collects, and keeps another training's adapter, while the loop is under way."""
    root, model = str(tmp_path / "store"), str(tiny_model(tmp_path / "model"))
    with ModelServer(searcher) as server:
        server.models = [model]
        settings = small_loop(root, documents, model, server.url)
        alone = {run.stage: run.artifacts for run in improve(settings)}

        other = str(tmp_path / "other")
        few = small_loop(other, documents, model, server.url)
        improve(few.model_copy(update={"collect": config.Collect(limit=2)}))
        others = {name: load_ref(other, name) for name in ("trajectories", "sft_best", "adapter")}
        saved = refs.save_ref

        def interfering(root: str, name: str, made: Artifact) -> None:
            saved(root, name, made)
            if name in others:
                with refs.refs_of(""):
                    saved(root, name, others[name])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refs, "save_ref", interfering)
            again = improve(settings)
        assert all(run.cached for run in again), [run.stage for run in again if not run.cached]
        assert {run.stage: run.artifacts for run in again} == alone
        assert load_ref(root, "trajectories") == others["trajectories"]
        assert list((tmp_path / "store" / "loops").iterdir()) == []


def test_a_split_without_questions_is_told_before_anything_is_asked(tmp_path: Path, documents: Path) -> None:
    with ModelServer(searcher) as server:
        settings = small_loop(str(tmp_path / "store"), documents, "base", server.url)
        ingest = settings.ingest.model_copy(update={"train_ratio": 1.0})
        with pytest.raises(InputError, match="no question is in split 'test'"):
            improve(settings.model_copy(update={"ingest": ingest}))
        assert server.calls == 0
    assert list((tmp_path / "store" / "loops").iterdir()) == []


def test_mined_queries_are_not_learned_from_as_conversations(tmp_path: Path) -> None:
    named = small_loop(str(tmp_path), tmp_path, "base", "http://127.0.0.1:9/v1").model_dump()
    with pytest.raises(ValueError, match="what is mined are single queries"):
        config.Improve(**named | {"mine": {}, "format": {"formats": ["sft_trajectory"]}})
