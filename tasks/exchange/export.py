"""Artifacts out of the storage, for people and programs that know nothing of DRAG.

    jsonl  pages.jsonl · trajectories.jsonl · mined.jsonl · processed.jsonl, pairs.jsonl, stats.json ·
           sft_best_train.jsonl, sft_best_val.jsonl, … · results-base.jsonl, …, comparison.jsonl
    hf     NAME/SPLIT.parquet for each of these, and a card: what `datasets.load_dataset` reads, and a hub takes

Both hold every column, so that `drag import` gives back what was exported; but training sets as JSONL are the reference's
plain texts. The page images that rows show go along (tasks/exchange/images.py). provenance.json says what each was made of.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks import artifact, statistics
from tasks.artifact import Artifact
from tasks.errors import ArtifactError
from tasks.exchange import images, training_sets
from tasks.exchange.card import card
from tasks.schemas import TABLES
from tasks.set_aside import printable
from tasks.splits import SPLITS

_LEARNED_FROM = ("sft", "dpo", "reward")
_NO_SPLIT = "unsplit"
_SPLITS = {*SPLITS, "val", _NO_SPLIT}  # each names a file


def export_tables(tables: Mapping[str, Artifact], layout: str, folder: Path, root: str) -> dict[str, int]:
    """Write tables into a local folder.

    Args:
        tables: by the name that each is to have: its reference's, or, with spaces, one without. "statistics" is none of rows.
        layout: "jsonl" or "hf".
        root: the storage root, below which the images lie that the rows show.

    Returns:
        The rows of each file, by its name in the folder.
    """
    made_of = {name: artifact.read_provenance(table) for name, table in tables.items()}
    known = {name: {"artifact": _reference(table), "provenance": made_of[name]} for name, table in tables.items()}
    written: dict[str, int] = {}
    given = images.Given(root, folder)
    rows = {name: table for name, table in tables.items() if name != "statistics"}
    for name, table in rows.items():
        written |= (_parquet if layout == "hf" else _jsonl)(name, table, folder, given)
    shown = dict.fromkeys(rows)
    if given.files() and layout == "hf":
        packed = f"{images.NAME}/{_NO_SPLIT}.parquet"
        written[packed], shown[images.NAME] = given.pack(folder / packed), None
    elif given.files():
        written[images.NAME] = len(given.files())
    if "statistics" in tables:
        found = json.dumps(statistics.read(tables["statistics"]), indent=1)
        (folder / "stats.json").write_text(found, encoding="utf-8")
        written["stats.json"] = tables["statistics"].rows
    if layout == "hf":
        splits = {
            name: {Path(file).stem: n for file, n in written.items() if file.startswith(f"{name}/")} for name in shown
        }
        (folder / "README.md").write_text(card(splits, {name: made_of[name] for name in rows}), encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps(known, indent=1, sort_keys=True, default=str), encoding="utf-8")
    return written


def _reference(table: Artifact) -> dict[str, Any]:
    return {
        name: value for name, value in asdict(table).items() if name != "uri"
    }  # where it lay says nothing elsewhere


def _jsonl(name: str, table: Artifact, folder: Path, given: images.Given) -> dict[str, int]:
    if table.schema.partition("/")[0] in _LEARNED_FROM:
        parts = {f"{name}_{part}.jsonl": training_sets.lines(_rows(table, given), part) for part in ("train", "val")}
        return {file: _write(lines, folder / file) for file, lines in parts.items()}
    line: Callable[[dict[str, Any]], dict[str, Any]] = _trajectory if name in ("trajectories", "mined") else dict
    return {f"{name}.jsonl": _write(map(line, _rows(table, given)), folder / f"{name}.jsonl")}


def _rows(table: Artifact, given: images.Given) -> Iterator[dict[str, Any]]:
    for batch in _batches(table, given):
        yield from batch.to_pylist()


def _batches(table: Artifact, given: images.Given) -> Iterator[pa.Table]:
    """The table, its images under the names that they are given."""
    columns = images.columns_of(table.schema)
    for batch in artifact.read_batches(table):
        if images.are_shown(batch, columns):
            rows = (images.with_images(row, columns, given.give) for row in batch.to_pylist())
            batch = artifact.table_of(rows, table.schema)
        yield batch


def _trajectory(row: dict[str, Any]) -> dict[str, Any]:
    """A rollout with its searches in one list, as the reference has them, beside the turns that they are of."""
    searches = [
        {"turn": turn["turn"], "reasoning": turn["reasoning"], **search, "rank": search["gt_rank"]}
        for turn in row["turns"]
        for search in turn["searches"]
    ]
    return {**row, "searches": searches}


def _write(lines: Iterable[Mapping[str, Any]], file: Path) -> int:
    count = 0
    with file.open("w", encoding="utf-8", newline="\n") as opened:
        for count, line in enumerate(lines, start=1):  # noqa: B007 - the last one is how many there are
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")
    return count


def _parquet(name: str, table: Artifact, folder: Path, given: images.Given) -> dict[str, int]:
    """One file for each split, so that nobody takes test questions for training by mistake."""
    written: Counter[str] = Counter()
    (folder / name).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for batch in _batches(table, given):
            known = batch["split"] if "split" in batch.column_names else pa.nulls(batch.num_rows, pa.string())
            splits = pc.fill_null(known, _NO_SPLIT)
            for split in dict.fromkeys(splits.to_pylist()):
                if split not in _SPLITS:
                    raise ArtifactError(
                        f"{name} has rows of a split {printable(split)!r}, which there is not: make it again"
                    )
                file = f"{name}/{split}.parquet"
                if file not in writers:
                    writer = pq.ParquetWriter(folder / file, batch.schema, compression="zstd")
                    writers[file] = stack.enter_context(writer)
                part = batch.filter(pc.equal(splits, pa.scalar(split)))
                writers[file].write_table(part)
                written[file] += part.num_rows
    if not written:  # a table without rows is there too
        file = f"{name}/{_NO_SPLIT}.parquet"
        pq.write_table(TABLES[table.schema].empty_table(), folder / file)
        written[file] = 0
    return dict(written)
