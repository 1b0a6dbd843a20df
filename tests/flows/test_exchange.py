"""Files of the reference pipeline in, through every stage to an adapter, and out again; by the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.import_ import import_
from tasks import config, storage
from tasks.agent.message import images_of
from tasks.artifact import fetch_folder, read_provenance, read_rows
from tasks.exchange import importing
from tasks.refs import has_ref, load_ref
from tests.small_collection import TOPICS, ingest_small
from tests.tiny_model import tiny_model
from tests.tiny_vlm import tiny_vlm

QUICK = ["--epochs", "1", "--batch-size", "4", "--lora-r", "4", "--no-bf16"]


def rollout(number: int, topic: str) -> dict[str, Any]:
    """A line of the reference's trajectories.jsonl: a search that finds nothing of use, one that does, and an answer."""
    page = {"file": f"{topic}.pdf", "page_number": 2}
    return {
        "question_id": f"q{number}",
        "question": f"How heavy is the {topic}?",
        "ground_truth": [page],
        "sampling_config": "default",
        "searches": [
            {"query": "safety", "results": [{"file": f"{topic}.pdf", "page_number": 1}], "rank": None, "rank_score": 0},
            {
                "reasoning": f"I need the mass of the {topic}.",
                "query": f"mass {topic}",
                "results": [page],
                "rank": 1,
                "rank_score": 1.0,
            },
        ],
        "answer": f"{number + 3} kg",
        "citations": [page],
    }


@pytest.mark.parametrize("storage_root", ["s3"], indirect=True)
def test_the_references_files_go_through_every_stage_and_out_again(
    storage_root: str, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drag(*words: str) -> None:
        assert main([*words, "--storage", storage_root]) == 0, capsys.readouterr().err

    ingest_small(storage_root, documents)
    model = str(tiny_model(tmp_path / "tiny"))
    collected = tmp_path / "trajectories.jsonl"
    lines = [json.dumps(rollout(number, topic)) for number, topic in enumerate(TOPICS)]
    collected.write_text("\n".join([*lines, '{"question_id": "broken"}']))

    drag("import", "trajectories", str(collected))
    assert "missing_field" in capsys.readouterr().err
    assert load_ref(storage_root, "trajectories").rows == 10
    drag("process")
    assert {row["best_query"] for row in read_rows(load_ref(storage_root, "processed"))} == {
        f"mass {t}" for t in TOPICS
    }
    drag("format", "--formats", "all", "--split", "all", "--train-ratio", "0.7")
    out = tmp_path / "out"
    drag("export", "training-sets", str(out))
    rollouts = tmp_path / "rollouts"
    drag("export", "processed", str(rollouts))
    assert {"sft_best_train.jsonl", "dpo_val.jsonl"} <= {path.name for path in out.iterdir()}
    assert {"processed.jsonl", "pairs.jsonl", "stats.json"} <= {path.name for path in rollouts.iterdir()}

    # elsewhere, from the training set alone
    elsewhere = f"{storage_root}/elsewhere"
    train, val = str(out / "sft_trajectory_train.jsonl"), str(out / "sft_trajectory_val.jsonl")
    assert main(["import", "sft_trajectory", train, val, "--storage", elsewhere]) == 0
    there, here = (read_rows(load_ref(root, "sft_trajectory")) for root in (elsewhere, storage_root))
    assert there == sorted(here, key=lambda row: row["split"])
    finetune = ["finetune", "sft", "--training-set", "sft_trajectory", "--mask-strategy", "assistant", "--model", model]
    assert main([*finetune, *QUICK, "--storage", elsewhere]) == 0, capsys.readouterr().err
    assert main(["export", "adapter", f"{elsewhere}/out", "--storage", elsewhere]) == 0
    assert any(file.endswith("out/README.md") for file in storage.iter_files(f"{elsewhere}/out"))

    drag("import", "adapter", f"{elsewhere}/out", "--model", model, "--name", "theirs")
    ours, theirs = load_ref(storage_root, "adapter"), load_ref(elsewhere, "adapter")
    tensors = "adapter_model.safetensors"
    assert (fetch_folder(ours) / tensors).read_bytes() == (fetch_folder(theirs) / tensors).read_bytes()
    assert read_provenance(ours)["prompt_fingerprints"] == read_provenance(theirs)["prompt_fingerprints"]
    drag("merge", "--model", model, "--adapter", "theirs")
    assert has_ref(storage_root, "merged_model")
    drag("finetune", "reward", "--reward-loss", "pairs", "--model", model, *QUICK)
    drag("export", "reward-model", str(tmp_path / "reward"))
    assert "Spearman" in (tmp_path / "reward" / "README.md").read_text()
    capsys.readouterr()
    assert main(["merge", "--model", model, "--adapter", "ours", "--storage", storage_root]) == 2
    assert "holds no adapter ours; there are theirs" in capsys.readouterr().err

    assert main(["import", "processed", str(rollouts / "processed.jsonl"), "--storage", elsewhere]) == 0
    assert read_rows(load_ref(elsewhere, "processed")) == read_rows(load_ref(storage_root, "processed"))
    assert main(["format", "--split", "all", "--storage", elsewhere]) == 0


def test_the_references_rollouts_are_learned_from_with_page_images(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, see = str(tmp_path / "store"), ["--observation", "image", "--image-dpi", "20"]

    def drag(*words: str) -> None:
        assert main([*words, "--storage", root]) == 0, capsys.readouterr().err

    ingest_small(root, documents)
    collected = tmp_path / "trajectories.jsonl"
    collected.write_text("\n".join(json.dumps(rollout(number, topic)) for number, topic in enumerate(TOPICS)))
    drag("import", "trajectories", str(collected), *see)
    assert f"Page images: {2 * len(TOPICS)} of {2 * len(TOPICS)}" in capsys.readouterr().err
    drag("process")
    drag("format", "--formats", "sft_trajectory", "sft_context", "--split", "all", "--train-ratio", "0.7", *see)
    shown = [
        image
        for name in ("sft_trajectory", "sft_context")
        for row in read_rows(load_ref(root, name))
        for message in (*row["prompt"], *row["completion"])
        for image in images_of(message)
    ]
    assert {(image["file"], image["page"]) for image in shown} == {
        (f"{t}.pdf", page) for t in TOPICS for page in (1, 2)
    }
    assert all(storage.is_file(storage.join(root, image["key"])) for image in shown)
    training = ["--training-set", "sft_trajectory", "--mask-strategy", "assistant", "--parts", "language", *QUICK]
    drag("finetune", "sft", "--model", str(tiny_vlm(tmp_path / "vlm")), *training)
    assert read_provenance(load_ref(root, "adapter"))["images"] > 0


def test_what_was_imported_is_not_imported_again_unless_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "sft_best_train.jsonl"
    line = '{"input": "<question>Why?</question>", "output": "<search>reason</search>"}\n'
    file.write_text(line)
    settings = config.ImportRun(storage=str(tmp_path / "store"), what="sft_best", source=[str(file)])
    assert [run.cached for run in import_(settings)] == [False]
    assert [run.cached for run in import_(settings)] == [True]
    file.write_text(line * 2)
    assert [run.cached for run in import_(settings)] == [False]
    assert load_ref(settings.storage, "sft_best").rows == 2
    # it says what the rows were made with
    (tmp_path / "provenance.json").write_text('{"sft_best": {"provenance": {"agent": {"protocol": "tools"}}}}')
    assert [run.cached for run in import_(settings)] == [False]
    assert read_provenance(load_ref(settings.storage, "sft_best"))["agent"] == {"protocol": "tools"}


def test_what_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "store")
    assert main(["import", "dpo", str(tmp_path / "dpo_train.jsonl"), "--storage", root]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["export", "training-sets", str(tmp_path / "out"), "--storage", root]) == 3
    assert "holds no training-sets yet" in capsys.readouterr().err


def test_what_came_in_is_scored_again_when_scoring_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "processed.jsonl"
    file.write_text(json.dumps(rollout(0, "pump")))
    unseen = config.Agent(protocol="tags", observation="none")
    settings = config.ImportRun(storage=str(tmp_path / "store"), what="processed", source=[str(file)], agent=unseen)
    made = [import_(settings)[0], import_(settings)[0]]
    monkeypatch.setattr(importing, "SCORING", config.Process(max_pairs=0))
    made.append(import_(settings)[0])
    assert [run.cached for run in made] == [False, True, False]
    assert [run.artifacts["pairs"].rows for run in made] == [1, 1, 0]


def test_pages_go_out_as_they_come_in(documents: Path, tmp_path: Path) -> None:
    root, other, out = (str(tmp_path / name) for name in ("store", "other", "out"))
    ingest_small(root, documents)
    assert main(["export", "pages", out, "--storage", root]) == 0
    questions = str(documents / "questions.jsonl")
    taken = ["--ocr-file", f"{out}/pages.jsonl", "--questions", questions, "--storage", other]
    assert main(["ingest", *taken]) == 0
    stored = [
        [(row["file"], row["page_number"], row["total_pages"], row["text"]) for row in read_rows(load_ref(at, "pages"))]
        for at in (root, other)
    ]
    assert stored[0] == stored[1]
    assert load_ref(other, "questions").rows == load_ref(root, "questions").rows


def test_an_export_into_the_same_folder_takes_the_place_of_the_earlier_one(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out, file = str(tmp_path / "store"), str(tmp_path / "out"), tmp_path / "processed.jsonl"
    unseen = ["--observation", "none", "--storage", root]
    ours = ["export", "processed", out, "--layout", "hf", "--storage", root]
    for split in ("test", "train"):
        file.write_text(json.dumps(rollout(0, "pump") | {"split": split}))
        assert main(["import", "processed", str(file), *unseen]) == 0
        assert main(ours) == 0
    assert main(["import", "processed", out, "--storage", str(tmp_path / "there")]) == 0
    for name in ("processed", "pairs"):
        assert {row["split"] for row in read_rows(load_ref(str(tmp_path / "there"), name))} == {"train"}
    capsys.readouterr()
    assert main(["export", "mined", out, "--storage", root]) == 3
    ingest_small(root, documents)
    assert main(["export", "pages", out, "--storage", root]) == 2
    assert "holds an export of processed: name another folder" in capsys.readouterr().err
