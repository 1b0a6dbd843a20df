"""Page images go out with the rows that show them, once each, and come back in: the same conversations over the same bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image as Picture

from tasks import artifact, images, storage
from tasks.agent.message import Image, images_of
from tasks.artifact import Artifact
from tasks.config import Agent, Format, Process
from tasks.errors import ArtifactError, ConfigError
from tasks.exchange.export import export_tables
from tasks.exchange.images import columns_of, with_images
from tasks.exchange.importing import import_rows
from tasks.formats import format_training
from tasks.process import process
from tests.tasks.exchange.test_rollouts import theirs
from tests.tasks.test_formats import converse, searcher

__all__ = ["searcher"]  # a fixture
# two pages look alike; one has no image, and is shown by its text
COLOURS = {"plan.pdf": "red", "a.pdf": "white", "b.pdf": "white"}
SIZE = (64, 80)


def collected(searcher: Any, root: str, agent: Agent) -> Artifact:
    """Rollouts that were shown pages' images, which lie in the storage."""
    for file, colour in COLOURS.items():
        folder = Path(root) / f"page-images/{file[0] * 32}/0123456789ab/1"
        folder.mkdir(parents=True)
        Picture.new("RGB", SIZE, colour).save(folder / "64x80.png")

    async def page_image(file: str, page: int) -> Image | None:
        if file not in COLOURS:
            return None
        key = f"page-images/{file[0] * 32}/0123456789ab/{page}/64x80.png"
        return Image(file=file, page=page, key=key, width=SIZE[0], height=SIZE[1])

    scripts = ("improves", "at once", "fails")
    rows = [
        converse(searcher, question, script, agent, page_image)[0] for question in ("q0", "q1") for script in scripts
    ]
    facts = artifact.provenance(settings={"agent": agent.model_dump(mode="json")})
    uri = f"{root}/trajectories.parquet"
    return artifact.write_table(artifact.table_of(rows, "trajectories/2"), uri, "trajectories/2", facts)


def learned(trajectories: Artifact, agent: Agent, root: str) -> dict[str, Artifact]:
    processed, pairs, _ = process({"t": trajectories}, Process(), f"{root}/processed")
    chosen = Format(formats=["sft_trajectory", "sft_context", "dpo"], train_ratio=1.0)
    return format_training(processed, pairs, chosen, agent, f"{root}/sets")


def by_bytes(made: Artifact, root: str) -> list[dict[str, Any]]:
    """Rows in which an image is known by its bytes, wherever they lie."""

    def known(image: Image) -> Image:
        return {**image, "key": hashlib.sha256(storage.read_bytes(storage.join(root, image["key"]))).hexdigest()}

    rows = [with_images(row, columns_of(made.schema), known) for row in artifact.read_rows(made)]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


@pytest.mark.parametrize("layout", ["jsonl", "hf"])
@pytest.mark.parametrize("protocol", ["tags", "tools"])
@pytest.mark.parametrize("observation", ["image", "both"])
def test_what_was_seen_comes_back_and_is_learned_alike(
    searcher: Any, tmp_path: Path, layout: str, protocol: Any, observation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    agent = Agent(protocol=protocol, observation=observation)
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    made = collected(searcher, here, agent)
    sets = learned(made, agent, here)
    assert any(images_of(m) for row in artifact.read_rows(sets["sft_trajectory"]) for m in row["completion"])
    folders = {name: tmp_path / name for name in ("out", "again")}
    for folder in folders.values():
        folder.mkdir()
    written = export_tables({"trajectories": made, **sets}, layout, folders["out"], here)
    assert written["images" if layout == "jsonl" else "images/unsplit.parquet"] == 2
    if layout == "hf":
        loaded = datasets.load_dataset(str(folders["out"]), "images")["unsplit"]
        assert {row["image"].getpixel((0, 0)) for row in loaded} == {(255, 0, 0), (255, 255, 255)}
        assert {row["image"].size for row in loaded} == {SIZE}
        shown = datasets.load_dataset(str(folders["out"]), "sft_context")["train"]["prompt"]
        assert {i["key"] for prompt in shown for m in prompt for i in images_of(m)} == set(loaded["key"])
    else:
        for file in (folders["out"] / "images").iterdir():
            assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem

    back: dict[str, Artifact] = {}
    for name, was in {"trajectories": made, **sets}.items():
        parts = [name] if name == "trajectories" else [f"{name}_train", f"{name}_val"]
        files = [str(folders["out"])] if layout == "hf" else [str(folders["out"] / f"{part}.jsonl") for part in parts]
        found = import_rows(name, files, agent, None, None, f"{there}/{name}", there)
        assert artifact.read_rows(found["set_aside_import"]) == []
        back[name] = found[name]
        assert by_bytes(back[name], there) == by_bytes(was, here), name
    assert len(list((Path(images.folder(there)) / "imported").iterdir())) == 2
    again = learned(back["trajectories"], agent, f"{there}/again")
    for name, was in sets.items():
        assert by_bytes(again[name], there) == by_bytes(was, here), name
    export_tables(back, layout, folders["again"], there)
    if layout == "jsonl":
        for name in ("trajectories.jsonl", "sft_trajectory_train.jsonl", "dpo_train.jsonl"):
            assert (folders["again"] / name).read_text() == (folders["out"] / name).read_text()


def test_an_image_that_is_not_what_it_is_called_is_refused(searcher: Any, tmp_path: Path) -> None:
    agent, root, out = Agent(observation="image"), str(tmp_path / "here"), tmp_path / "out"
    out.mkdir()
    export_tables({"trajectories": collected(searcher, root, agent)}, "jsonl", out, root)
    lines = (out / "trajectories.jsonl").read_text().splitlines()
    line = next(line for line in lines if "plan.pdf" in line and "images/" in line)
    files = {Picture.open(file).getpixel((0, 0)): file for file in (out / "images").iterdir()}
    white, red = files[255, 255, 255], files[255, 0, 0]
    text = b"no image"
    (out / "images" / f"{hashlib.sha256(text).hexdigest()}.png").write_bytes(text)
    bad = [
        line.replace(f"images/{red.name}", "../here/secret.png"),
        line.replace(f"images/{red.name}", f"images/{'0' * 64}.png"),
        line.replace(f"images/{red.name}", f"images/{hashlib.sha256(text).hexdigest()}.png"),
        line.replace('"width": 64', '"width": 6400'),
        line.replace('"width": 64', '"width": null'),
    ]
    ids = [json.dumps({**json.loads(one), "rollout_id": str(at)}) for at, one in enumerate([line, *bad])]
    (out / "trajectories.jsonl").write_text("\n".join(ids))

    def told() -> dict[int, tuple[str, str]]:
        made = import_rows(
            "trajectories", [str(out / "trajectories.jsonl")], agent, None, None, str(tmp_path / "made"), str(tmp_path)
        )
        assert made["trajectories"].rows == 1
        return {row["row"]: (row["reason"], row["detail"]) for row in artifact.read_rows(made["set_aside_import"])}

    found = told()
    assert {row: reason for row, (reason, _) in found.items()} == {
        **dict.fromkeys((2, 3, 4, 5), "bad_image"),
        6: "wrong_type",
    }
    says = ["is no name", "is not there", "cannot be read as an image", "is not 6400 × 80"]
    assert all(said in found[row][1] for row, said in enumerate(says, start=2))

    # a training set's line whose texts do not show what it names
    told_so = {"input": "<question>Why?</question>", "output": "<search>a</search>"}
    shown = {"file": "plan.pdf", "page": 1, "key": f"images/{white.name}", "width": 64, "height": 80}
    results = '\n<search>b</search>\n<results>\n[1] plan.pdf page 1\n<image file="plan.pdf" page="1"/>\n</results>'
    rows = [
        {**told_so, "images": [shown]},
        {**told_so, "input": told_so["input"] + results, "images": [shown]},
        {**told_so, "input": told_so["input"] + results},  # a page's own words
        {**told_so, "input": told_so["input"] + results, "images": ["plan.pdf"]},
    ]
    file = out / "sft_context_train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    made = import_rows("sft_context", [str(file)], agent, None, None, str(tmp_path / "sets"), str(tmp_path))
    assert [sum(len(images_of(m)) for m in row["prompt"]) for row in artifact.read_rows(made["sft_context"])] == [1, 0]
    aside = {row["row"]: row["reason"] for row in artifact.read_rows(made["set_aside_import"])}
    assert aside == {1: "bad_conversation", 4: "bad_conversation"}


def test_images_that_are_gone_or_never_were_are_told(searcher: Any, tmp_path: Path) -> None:
    agent, root, out = Agent(observation="image"), str(tmp_path / "here"), tmp_path / "out"
    made = collected(searcher, root, agent)
    storage.delete(images.folder(root))
    out.mkdir()
    with pytest.raises(ArtifactError, match="does not exist"):
        export_tables({"trajectories": made}, "jsonl", out, root)
    file = tmp_path / "trajectories.jsonl"
    file.write_text(json.dumps(theirs(searcher, "improves", Agent())))
    with pytest.raises(ConfigError, match=r"run ingest .* \(--documents\), or .* --observation text or none"):
        import_rows("trajectories", [str(file)], agent, None, None, str(tmp_path / "made"), root)
