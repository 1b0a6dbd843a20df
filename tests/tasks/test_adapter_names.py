"""Adapters by name: the newest, the newest of a name, and what is said of a name that none has."""

import pytest

from tasks import adapter_names, refs, storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError, ConfigError


def test_an_adapter_is_found_by_its_name_or_as_the_newest(storage_root: str) -> None:
    first, second, third = (Artifact(storage.join(storage_root, name), name, 1, "adapter/1") for name in "abc")
    assert adapter_names.chosen(storage_root, "") is None
    with pytest.raises(ArtifactError, match="no adapter yet"):
        adapter_names.chosen(storage_root, "newest")
    adapter_names.keep(storage_root, first, "")
    with pytest.raises(ConfigError, match="no adapter sft; none has a name yet"):
        adapter_names.named(storage_root, "sft")
    adapter_names.keep(storage_root, second, "sft")
    adapter_names.keep(storage_root, third, "by-pairs")
    refs.save_ref(storage_root, "pages", first)
    assert adapter_names.chosen(storage_root, "newest") == third
    assert adapter_names.chosen(storage_root, "sft") == second
    with pytest.raises(ConfigError, match="no adapter dpo; there are by-pairs, sft"):
        adapter_names.chosen(storage_root, "dpo")
