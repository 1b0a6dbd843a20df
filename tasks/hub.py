"""Data sets in Hugging Face's form: on the hub, or in a local folder.

hf:NAME[@REVISION][#CONFIG][:SPLIT]

hf:org/questions                  all splits of the default configuration, as of now
hf:org/questions@v1.2#en:train    one split of the configuration "en", as of a tag, branch or commit
hf:/a/folder:train                a folder of Parquet files, or one that `save_to_disk` wrote; no hub is asked
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tasks import storage
from tasks.errors import ConfigError, InputError
from tasks.records import Record, rows_of
from tasks.set_aside import printable

PREFIX, FORM = "hf:", "hf:NAME[@REVISION][#CONFIG][:SPLIT]"
_NAME = re.compile(r"(?P<path>[^@#:]+)(@(?P<revision>[^@#:]+))?(#(?P<config>[^@#:]+))?(:(?P<split>[^@#:]+))?")
_HUB_TIMEOUT_S = 10.0


class DatasetName(NamedTuple):
    """A data set, or one split of it; what is None is the hub's default, or all splits."""

    path: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        marked = (("@", self.revision), ("#", self.config), (":", self.split))
        return PREFIX + self.path + "".join(mark + value for mark, value in marked if value)

    @property
    def is_folder(self) -> bool:
        return Path(self.path).is_dir()


def parse(uri: str) -> DatasetName:
    """The data set that hf:… names.

    >>> parse("hf:org/set@v1#en:train")
    DatasetName(path='org/set', revision='v1', config='en', split='train')

    Raises:
        ConfigError: it is not of that form, or asks for a revision of a local folder.
    """
    named = uri.removeprefix(PREFIX)
    found = _NAME.fullmatch(named)
    if named and Path(named).is_dir():
        return DatasetName(named)
    if not found:
        raise ConfigError(f"{uri}: write {FORM}")
    name = DatasetName(**found.groupdict())
    if name.is_folder and name.revision:
        raise ConfigError(f"{uri}: a local folder has no revisions; leave @{name.revision} out")
    return name


def pinned(uri: str) -> str:
    """The same data set at the commit that the hub has now, so that it is read, and known again, as that.

    As it is where it lies in a local folder, or the hub does not answer: `read_dataset` then says so, or takes what an earlier
    run left in the hub's cache.
    """
    name = parse(uri)
    if name.is_folder:
        return uri
    import httpx2  # the hub client's transport library, whose errors come through
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name.path, revision=name.revision, timeout=_HUB_TIMEOUT_S).sha
    except (OSError, httpx2.HTTPError, ValueError):
        return uri
    return str(name._replace(revision=commit))


def fingerprint(uri: str) -> str:
    """What tells data sets apart: a folder's content, configuration and split; of one on the hub its `pinned` name."""
    name = parse(uri)
    if not name.is_folder:
        return str(name)
    return str(name._replace(path=storage.fingerprint(name.path)))


def read_dataset(uri: str) -> Iterator[tuple[str, Iterator[Record]]]:
    """(split's name for messages, its rows) of the split that hf:… names, or of all splits.

    Raises:
        InputError: it cannot be loaded.
        ConfigError: `parse` refuses the name.
    """
    import datasets  # it takes a second

    name = parse(uri)
    try:
        splits = _load(name)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"the data set cannot be loaded ({printable(str(error))}); check its name, the network and HF_TOKEN, or save "
            "it as .parquet where the hub answers and give that file",
            file=uri,
        ) from error
    for split, rows in sorted(splits.items()):
        # Arrow's own rows: as Python objects, a list of structures may come back as a structure of lists.
        tables = rows.with_format("arrow").iter(batch_size=1024)
        yield str(name._replace(split=split)), rows_of(batch for table in tables for batch in table.to_batches())


def _load(name: DatasetName) -> dict[str, Any]:
    import datasets

    if name.is_folder and any((Path(name.path) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(name.path)
        splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        return {name.split: splits[name.split]} if name.split else splits
    loaded = datasets.load_dataset(name.path, name.config, split=name.split, revision=name.revision)
    return {name.split: loaded} if name.split else dict(loaded)
