"""The stages joined: a real Prefect server, a model server on a socket, real training; on disk and on S3.

The model that is asked is scripted, so what it searches is known; the model that is trained is tiny and random.
"""

from pathlib import Path
from typing import Any, NoReturn

import pytest

from flows.collect import collect
from flows.evaluate import compare, evaluate
from flows.finetune import finetune, merge
from flows.infer import infer
from flows.ingest import ingest
from flows.prepare import format_, prepare, process
from tasks import collect as shards
from tasks import config, storage
from tasks.artifact import fetch_folder, read_provenance, read_rows
from tasks.errors import CollectError, ConfigError, ServerError
from tasks.refs import load_ref
from tasks.server_api import adapter_name
from tasks.stages import StageRun
from tests.model_server import ModelServer, Reply, Status
from tests.small_collection import TOPICS, ingest_small, searcher
from tests.tiny_model import tiny_model

AGENT = config.Agent(protocol="tags", max_iterations=3)


def _collect(root: str, url: str, **changes: Any) -> config.CollectRun:
    server = config.Server(base_url=url, model="base", max_retries=0, concurrency=4)
    chosen = {"split": "all", "shard_size": 4, "flush_every": 2} | changes
    return config.CollectRun(storage=root, agent=AGENT, server=server, collect=config.Collect(**chosen))


def _cached(runs: list[StageRun]) -> dict[str, bool]:
    return {run.stage: run.cached for run in runs}


@pytest.mark.parametrize("storage_root", ["local", "seaweedfs"], indirect=True)  # the longest: on one S3 server
def test_every_stage_and_what_each_leaves(storage_root: str, documents: Path, tmp_path: Path) -> None:
    root = storage_root
    assert _cached(ingest_small(root, documents)) == dict.fromkeys(
        ["read documents", "read scans", "read questions", "index pages"], False
    )
    assert load_ref(root, "pages").rows == 20
    assert load_ref(root, "questions").rows == 10

    with ModelServer(searcher) as server:
        collect(_collect(root, server.url))
        asked = server.calls
        assert _cached(collect(_collect(root, server.url))) == {"collect": True}
        assert server.calls == asked
    trajectories = read_rows(load_ref(root, "trajectories"))
    assert len(trajectories) == 10
    assert {row["outcome"] for row in trajectories} == {"answered"}
    assert read_provenance(load_ref(root, "trajectories"))["inputs"]["pages"] == load_ref(root, "pages").sha256

    formats = config.Format(
        formats=["sft_best", "sft_trajectory", "sft_context", "dpo", "reward"], jsonl=True, split="all"
    )
    prepare(config.PrepareRun(storage=root, agent=AGENT, format=formats))
    assert {row["best_query"] for row in read_rows(load_ref(root, "processed"))} == {f"mass {t}" for t in TOPICS}
    assert all(load_ref(root, name).rows for name in formats.formats)
    assert _cached(process(config.ProcessRun(storage=root))) == {"process": True}
    assert _cached(format_(config.FormatRun(storage=root, agent=AGENT, format=formats))) == {"format": True}

    model = str(tiny_model(tmp_path / "model"))
    training = config.Finetune(epochs=1, batch_size=4, lora_r=4, bf16=False)
    settings = config.FinetuneRun(storage=root, model=model, finetune=training)
    assert _cached(finetune(settings)) == {"finetune": False}
    assert _cached(finetune(settings)) == {"finetune": True}
    more = settings.model_copy(update={"finetune": training.model_copy(update={"epochs": 2})})
    assert _cached(finetune(more)) == {"finetune": False}
    assert (fetch_folder(load_ref(root, "adapter")) / "adapter_config.json").is_file()
    merge(config.MergeRun(storage=root, model=model))
    assert (fetch_folder(load_ref(root, "merged_model")) / "model.safetensors").is_file()


def test_documents_are_read_again_when_more_of_their_pages_could_be_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = tmp_path / "pages.jsonl"
    pages.write_text('{"file": "m.pdf", "page_number": 1, "total_pages": 1, "text": "A pump."}')
    run = config.IngestRun(storage=str(tmp_path / "store"), ingest=config.Ingest(ocr_file=str(pages)))
    ingest(run)
    assert _cached(ingest(run))["read documents"]
    monkeypatch.setattr("flows.ingest.MOST_OCR_BELOW", 2000)
    assert not _cached(ingest(run))["read documents"]


def test_evaluation_compares_runs_and_writes_a_report(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        base = _collect(root, server.url)
        settings = config.EvaluateRun(
            storage=root,
            agent=base.agent,
            server=base.server,
            evaluate=config.Evaluate(split="all", resamples=500, rescore=[config.Search(operator="and")]),
            variants=[
                config.Variant(name="question", model="question"),
                config.Variant(name="base", model="base"),
                config.Variant(name="with examples", model="base", examples=True),
            ],
        )
        evaluate(settings)
        assert all(run.cached for run in evaluate(settings))
    results = {row["question_id"]: row for row in read_rows(load_ref(root, "results-base"))}
    assert len(results) == 10
    assert all(row["searches_to_success"] == 2 for row in results.values() if row["first_rank"] is None)
    page = storage.read_bytes(storage.join(load_ref(root, "report").uri, "index.html")).decode()
    assert "How heavy is the turbine?" in page
    compare(config.CompareRun(storage=root, compare=["question", "base"], resamples=500))
    assert {row["baseline"] for row in read_rows(load_ref(root, "comparison"))} == {"question"}


def test_a_report_shows_only_what_the_measured_adapter_was_made_of(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    model = str(tiny_model(tmp_path / "model"))
    variants = [
        config.Variant(name="question", model="question"),
        config.Variant(name="adapter", model="adapter", adapter="sft"),
    ]

    def train(epochs: float) -> None:
        training = config.Finetune(epochs=epochs, batch_size=4, lora_r=4, bf16=False)
        finetune(config.FinetuneRun(storage=root, model=model, finetune=training))

    def figures() -> tuple[bool, bool]:
        compare(config.CompareRun(storage=root, compare=["question", "adapter"], resamples=500))
        page = storage.read_bytes(storage.join(load_ref(root, "report").uri, "index.html")).decode()
        return "What was there to learn from?" in page, "How did training go?" in page

    with ModelServer(searcher) as server:
        run = _collect(root, server.url)
        collect(run)
        prepare(config.PrepareRun(storage=root, agent=AGENT, format=config.Format(split="all")))
        train(1)
        server.models = ["base", adapter_name(load_ref(root, "adapter"))]
        asking = {"agent": AGENT, "server": run.server, "evaluate": config.Evaluate(split="all", resamples=500)}
        evaluate(config.EvaluateRun(storage=root, variants=variants, **asking))
        assert figures() == (True, True)
        *_, last = read_provenance(load_ref(root, "report"))["conclusion"]
        learned = len(read_provenance(load_ref(root, "adapter"))["learned_questions"])
        told = f"of 10 questions, adapter learned from {learned} of them, and from questions about the documents of"
        assert last.startswith(told)  # of all splits
        collect(_collect(root, server.url, samples=2))
        process(config.ProcessRun(storage=root))
        assert figures() == (False, True)
        train(2)
        assert figures() == (False, False)


def test_an_adapter_is_not_asked_otherwise_than_it_has_learned(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        run = _collect(root, server.url)
        collect(run)
        formats = config.Format(split="all", formats=["sft_best", "sft_trajectory"])
        prepare(config.PrepareRun(storage=root, agent=AGENT, format=formats))
        model = str(tiny_model(tmp_path / "model"))
        training = config.Finetune(epochs=1, batch_size=4, lora_r=4, bf16=False)
        finetune(config.FinetuneRun(storage=root, model=model, finetune=training))
        other = AGENT.model_copy(update={"protocol": "tools"})
        runs = [config.Variant(name="question", model="question"), config.Variant(name="adapter", model="adapter")]
        with pytest.raises(ConfigError, match="trained on prompt"):
            evaluate(config.EvaluateRun(storage=root, agent=other, server=run.server, variants=runs))
        with pytest.raises(ConfigError, match="trained on prompt"):
            collect(run.model_copy(update={"agent": other, "adapter": "newest"}))
        with pytest.raises(ConfigError, match="trained on prompt"):
            infer(config.InferRun(storage=root, agent=other, server=run.server, question="Why?", adapter="newest"))

        more = run.model_copy(
            update={"agent": AGENT.model_copy(update={"top_k": AGENT.top_k + 1}), "adapter": "newest"}
        )
        server.models = ["base", adapter_name(load_ref(root, "adapter"))]
        collect(more)  # it was shown no results in training
        finetune(config.FinetuneRun(storage=root, model=model, training_set="sft_trajectory", finetune=training))
        with pytest.raises(ConfigError, match="collected with top_k 3, but will be served with 4"):
            collect(more)


def test_failed_rollouts_are_told_and_only_they_are_redone(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)

    def failing(request: dict[str, Any], call: int) -> Reply | Status:
        asked = request["messages"][-1]["content"]
        return Status(503) if "piston" in asked or "rotor" in asked else searcher(request, call)

    with ModelServer(failing) as server:
        run = _collect(root, server.url)
        with pytest.raises(CollectError, match=r"2 of 10 rollouts failed \(server_error 2\)"):
            collect(run)
        server.script = searcher
        before = len(server.requests)
        collect(run)
        again = {m["content"] for r in server.requests[before:] for m in r["messages"] if m["role"] == "user"}
    assert any("piston" in text for text in again)
    assert not any("turbine" in text for text in again)
    rows = read_rows(load_ref(root, "trajectories"))
    assert sorted(row["attempt"] for row in rows) == [1] * 8 + [2] * 2
    assert {row["status"] for row in rows} == {"finished"}


def test_a_larger_limit_goes_on_from_a_smaller_ones_rollouts(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        collect(_collect(root, server.url, limit=4))
        before = server.calls
        collect(_collect(root, server.url, limit=8))
        self_test_calls = 4
        assert server.calls - before <= before + self_test_calls
    assert load_ref(root, "trajectories").rows == 8


def test_what_is_finished_is_folded_without_a_server(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        collect(_collect(root, server.url, limit=8))

    def killed(*_: Any) -> NoReturn:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(shards, "fold", killed)
        with ModelServer(searcher) as again, pytest.raises(ZeroDivisionError):
            collect(_collect(root, again.url))
        assert "rollouts: 10 of 10" in capsys.readouterr().err
    for limit in (4, None):  # nobody listens there any more
        collect(_collect(root, server.url, limit=limit))
        assert load_ref(root, "trajectories").rows == (limit or 10)
    with pytest.raises(ServerError):
        collect(_collect(root, server.url, samples=2))


def test_more_samples_go_on_from_fewer(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        collect(_collect(root, server.url, samples=1))
        before = server.calls
        collect(_collect(root, server.url, samples=2))
        assert server.calls == 2 * before  # its own self-test, and one more sample of each question
    assert load_ref(root, "trajectories").rows == 20


def test_without_resuming_only_what_is_chosen_is_collected_anew(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    self_test_calls, turns, questions = 4, 3, 10
    with ModelServer(searcher) as server:
        collect(_collect(root, server.url, samples=2))
        before = server.calls
        collect(_collect(root, server.url, samples=1, limit=4, resume=False))
        assert server.calls - before == self_test_calls + turns * 4
        before = server.calls
        collect(_collect(root, server.url, samples=3))
        assert (
            server.calls - before == self_test_calls + turns * questions
        )  # the third sample of each, and nothing else
    assert load_ref(root, "trajectories").rows == 3 * questions


def test_a_retry_of_what_is_collected_anew_goes_on_from_its_first_time(tmp_path: Path, documents: Path) -> None:
    """What was stored before it is neither what it ends with, nor forgotten twice."""
    root, refused = str(tmp_path / "store"), []
    ingest_small(root, documents)
    self_test_calls, turns, questions = 4, 3, 10

    def fails_once(request: dict[str, Any], call: int) -> Reply | Status:
        if "How heavy is the piston?" in request["messages"][-1]["content"] and not refused:
            refused.append(call)
            return Status(503)
        return searcher(request, call)

    with ModelServer(searcher) as server:
        collect(_collect(root, server.url))
        old = {row["rollout_id"]: row["attempt"] for row in read_rows(load_ref(root, "trajectories"))}
        before, server.script = server.calls, fails_once
        collect.with_options(retries=1)(**dict(_collect(root, server.url, resume=False)))
        assert server.calls - before == self_test_calls + turns * questions + 1 + self_test_calls
        before = server.calls
        assert _cached(collect(_collect(root, server.url))) == {"collect": True}
        assert server.calls == before
    rows = read_rows(load_ref(root, "trajectories"))
    assert len(refused) == 1
    assert {row["rollout_id"]: row["attempt"] for row in rows} != old
    assert sorted(row["attempt"] for row in rows) == [1] * 9 + [2]


def test_rollouts_that_were_allowed_to_fail_are_tried_again(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)

    def failing(request: dict[str, Any], call: int) -> Reply | Status:
        return Status(503) if "piston" in request["messages"][-1]["content"] else searcher(request, call)

    with ModelServer(failing) as server:
        run = _collect(root, server.url, allow_failed_share=0.5)
        collect(run)
        assert sorted(row["status"] for row in read_rows(load_ref(root, "trajectories")))[:2] == ["failed", "finished"]
        server.script = searcher
        collect(run)
        assert {row["status"] for row in read_rows(load_ref(root, "trajectories"))} == {"finished"}
        assert _cached(collect(run)) == {"collect": True}
