"""Rows of our own that somebody changed: what nothing further on could use is set aside, and nothing names a path."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tasks import artifact
from tasks.artifact import Artifact
from tasks.config import Agent, Format, Process
from tasks.errors import ArtifactError
from tasks.exchange.export import export_tables
from tasks.exchange.importing import import_rows
from tasks.exchange.rows import schema_of
from tasks.formats import format_training
from tasks.process import process
from tests.tasks.exchange.test_rollouts import collected, imported
from tests.tasks.test_formats import searcher

__all__ = ["searcher"]  # a fixture

Tables = Mapping[str, Artifact]
WRONG = {
    "trajectories": [
        *[{name: None} for name in ("answer_locations", "sampling", "outcome", "answer", "citations")],
        *[{"turns": [turn]} for turn in (None, {"turn": 1}, {"raw_text": "", "searches": [None]})],
        {"turns": [{"raw_text": "", "searches": [{"query": "a", "read_as": "query", "rank_score": 0.0}]}]},
        *[{"answer_locations": [None]}, {"citations": [{"file": "plan.pdf"}]}],
        *[{"top_k": 0}, {"seed": 2**40}, {"state_messages": 99}, {"elapsed_s": math.nan}, {"split": "../../evil"}],
    ],
    "processed": [
        *[{name: None} for name in ("effort", "rank_score", "prompt_messages", "search_messages")],
        *[{"reasonings": []}, {"search_messages": []}, {"searches": [None]}, {"split": ""}],
        *[{"top_k": 0}, {"rank_score": math.inf}],
    ],
    "sft_best": [{"rank_score": math.nan}, {"gt_rank": 2**40}, {"tools": "{"}, {"split": "../../evil"}],
    "reward": [{"prompt": []}, {"score": 10**400}],
}


@pytest.fixture
def tables(searcher: Any, tmp_path: Path) -> Tables:
    made = collected(searcher, tmp_path, Agent(observation="none"))
    processed, pairs, _ = process({"t": made}, Process(), str(tmp_path))
    settings = Format(formats=["sft_best", "reward"], train_ratio=1)
    agent = Agent(observation="none")
    return {"trajectories": made, "processed": processed, "pairs": pairs} | format_training(
        processed, pairs, settings, agent, str(tmp_path)
    )


@pytest.mark.parametrize("what", WRONG)
def test_what_nothing_further_on_could_use_is_set_aside(tables: Tables, tmp_path: Path, what: str) -> None:
    good = artifact.read_rows(tables[what])[0]
    rows, aside = imported(what, [*({**good, **field} for field in WRONG[what]), good], tmp_path)
    assert len(rows) == 1
    assert list(aside) == list(range(1, len(WRONG[what]) + 1))


@pytest.mark.parametrize("field", ["earlier", "chosen_effort", "rejected_effort"])
def test_a_pair_that_no_training_set_could_take_is_set_aside(tables: Tables, tmp_path: Path, field: str) -> None:
    good = artifact.read_rows(tables["pairs"])[0]
    sources = [tmp_path / "processed.jsonl", tmp_path / "pairs.jsonl"]
    for file, rows in zip(
        sources, (artifact.read_rows(tables["processed"]), [{**good, field: None}, good]), strict=True
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = import_rows("processed", [str(file) for file in sources], Agent(), None, None, str(tmp_path), str(tmp_path))
    assert made["pairs"].rows == 1


def test_no_split_names_a_path(tables: Tables, tmp_path: Path) -> None:
    schema = schema_of("trajectories")
    rows = [{**artifact.read_rows(tables["trajectories"])[0], "split": "../../evil"}]
    evil = artifact.write_table(artifact.table_of(rows, schema), str(tmp_path / "evil.parquet"), schema, {})
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"split '\.\./\.\./evil'"):
        export_tables({"trajectories": evil}, "hf", out, str(tmp_path))
    assert not list((tmp_path / "a").rglob("evil*"))
