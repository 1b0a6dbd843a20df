"""A tiny model, and training sets for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.artifact import Artifact, provenance, table_of, write_table
from tests.tasks.training.pictures import draw_pages
from tests.tasks.training.training_rows import pair_rows, reward_rows, rows
from tests.tiny_model import tiny_model, tiny_tokenizer
from tests.tiny_vlm import tiny_vlm


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread, here and in what tests start; and sums come out the same in both."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    uri = str(tmp_path_factory.mktemp("training-set") / "sft.parquet")
    return write_table(table_of(rows(42), "sft/2"), uri, "sft/2", provenance())


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    uri = str(tmp_path_factory.mktemp("training-set") / "dpo.parquet")
    return write_table(table_of(pair_rows(24), "dpo/3"), uri, "dpo/3", provenance())


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    uri = str(tmp_path_factory.mktemp("training-set") / "reward.parquet")
    return write_table(table_of(reward_rows(48), "reward/3"), uri, "reward/3", provenance())


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with the images of pages."""
    folder = tmp_path_factory.mktemp("root")
    draw_pages(folder)
    return folder
