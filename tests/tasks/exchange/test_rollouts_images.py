"""Rollouts of another pipeline whose agent saw page images: told as a live rollout of the same searches would have gone."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks import artifact, config, storage
from tasks.agent.message import images_of
from tasks.agent.trajectory import Trajectory
from tasks.artifact import Artifact
from tasks.errors import ConfigError, InputError
from tasks.exchange.importing import import_rows
from tasks.formats import format_training
from tasks.training.examples import encode
from tasks.training.loading import load_tokenizer
from tasks.training.sight import Sight
from tests.model_server import ModelServer
from tests.tasks.agent.test_rollout_images import Library, library, run, searching
from tests.tiny_vlm import tiny_vlm

__all__ = ["library"]  # a fixture


def theirs(trajectory: Trajectory, **values: Any) -> dict[str, Any]:
    """A rollout as another pipeline would write it down; only the third search finds the answer's page."""
    searches = [
        {"query": search.query, "results": [{"file": file, "page_number": page} for _, file, page, _ in search.results]}
        for turn in trajectory.turns
        for search in turn.searches
    ]
    asked = {"id": "q", "question": trajectory.question.question, "evidence": ["motor.pdf:1", "motor.pdf:2"]}
    return {**asked, "searches": searches, "answer": list(trajectory.answer), **values}


async def lived(library: Library, agent: config.Agent) -> Trajectory:
    with ModelServer(searching(agent.protocol)) as server:
        return await run(library, server, agent)


def imported(what: str, rows: list[dict[str, Any]], agent: config.Agent, pages: Artifact, folder: Path) -> Any:
    """What is imported, into a storage where nothing was rendered yet; and the progress that was told."""
    file, told = folder / f"{what}.jsonl", list[tuple[int, int]]()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = str(folder / "storage")
    made = import_rows(
        what, [str(file)], agent, pages, None, f"{root}/{what}", root, lambda done, total: told.append((done, total))
    )
    return made, told


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@pytest.mark.parametrize("observation", ["image", "both"])
async def test_they_are_told_message_for_message_as_a_live_rollout_goes(
    library: Library, tmp_path: Path, protocol: Any, observation: Any
) -> None:
    agent = config.Agent(protocol=protocol, observation=observation, top_k=2, max_iterations=5)
    live = await lived(library, agent)
    assert live.outcome == "answered"
    made, told = imported("trajectories", [theirs(live), theirs(live)], agent, library.stored, tmp_path)
    assert artifact.read_rows(made["set_aside_import"]) == []
    for row in artifact.read_rows(made["trajectories"]):
        assert row["messages"] == [{"images": None, **message} for message in live.messages]
        seen = [(turn["images_shown"], turn["images_missing"], turn["images_replaced"]) for turn in row["turns"]]
        assert seen == [(t.images_shown, t.images_missing, t.images_replaced) for t in live.turns]
        assert seen == [(2, 0, 0)] * 3 + [(0, 2, 0), (0, 0, 0)]  # one document has no PDF: by its text
        for image in (image for message in row["messages"] for image in images_of(message)):
            assert storage.is_file(storage.join(str(tmp_path / "storage"), image["key"]))
    assert told == [(done, 8) for done in range(1, 9)]  # each page once


@pytest.mark.parametrize("protocol", ["tags", "tools"])
async def test_they_become_training_sets_that_a_trainer_sees(library: Library, tmp_path: Path, protocol: Any) -> None:
    agent = config.Agent(protocol=protocol, observation="image", top_k=2, max_iterations=6, image_dpi=20)
    live = await lived(library, agent)
    made, _ = imported("processed", [theirs(live)], agent, library.stored, tmp_path)
    root = str(tmp_path / "storage")
    chosen = config.Format(formats=["sft_trajectory", "sft_context"], train_ratio=1.0)
    sets = format_training(made["processed"], made["pairs"], chosen, agent, f"{root}/sets")
    model = tiny_vlm(tmp_path / "vlm")
    tokenizer, sight = load_tokenizer(model), Sight(model, root)
    for name, found in sets.items():
        rows = artifact.read_rows(found)
        assert rows
        for row in rows:
            shown = [image for m in (*row["prompt"], *row["completion"]) for image in images_of(m)]
            assert {image["file"] for image in shown} >= {"pump.pdf", "valve.pdf"}, name
            assert all(storage.is_file(storage.join(root, image["key"])) for image in shown)
            for example in encode(row, tokenizer, "assistant", sight=sight):
                assert example.targets
                assert any(token < 0 for token in example.ids)


async def test_what_cannot_be_shown_is_told(library: Library, tmp_path: Path) -> None:
    agent = config.Agent(observation="image", top_k=2, max_iterations=6)
    live = await lived(library, agent)
    elsewhere = theirs(live, searches=[{"query": "x", "results": ["elsewhere.pdf:7"]}])
    made, told = imported("trajectories", [elsewhere, theirs(live)], agent, library.stored, tmp_path)
    assert made["trajectories"].rows == 1
    (aside,) = artifact.read_rows(made["set_aside_import"])
    assert (aside["row"], aside["reason"]) == (1, "unknown_page")
    assert told[-1] == (8, 8)

    def pages(name: str, **values: Any) -> Artifact:
        table = artifact.table_of([row | values for row in artifact.read_rows(library.stored)], "pages/2")
        return artifact.write_table(table, str(tmp_path / f"{name}.parquet"), "pages/2", {})

    with pytest.raises(ConfigError, match=r"run ingest .* \(--documents\), or .* --observation text or none"):
        imported("trajectories", [theirs(live)], agent, pages("ocr", source_uri=None, source_sha256=None), tmp_path)
    gone = pages("gone", source_uri=str(tmp_path / "gone.pdf"), source_sha256="0" * 64)
    with pytest.raises(InputError, match=r"nothing lies at .*gone\.pdf.*run ingest"):
        imported("trajectories", [theirs(live)], agent, gone, tmp_path)
