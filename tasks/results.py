"""Where Prefect keeps what stages return: below the storage root, as JSON that names artifacts and nothing else, by their path
below it.

Prefect stores with each result how it is to be read, and obeys that: one that says it is a pickle would run whatever it
holds. Whoever can write to the storage could thus run code on a GPU host. So what is read must be what a stage writes.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from prefect.filesystems import WritableFileSystem
from prefect.serializers import JSONSerializer
from prefect.utilities.asyncutils import sync_compatible
from pydantic import Field, PrivateAttr

from tasks import storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError

_OURS = ("tasks.artifact.", "tasks.errors.")
_ARTIFACT = {field.name for field in fields(Artifact)}


class StageResults(WritableFileSystem):
    """The results below a storage root. It is a Prefect block because that is how Prefect refers to it; it holds no secret."""

    _block_type_name = "DRAG stage results"
    _block_type_slug = "drag-stage-results"
    _description = "Where a storage root keeps what stages returned. Made and used by the flows."

    root: str = Field(description="Storage root: local folder or s3:// prefix.")
    _unread: Exception | None = PrivateAttr(default=None)  # why the last result could not be looked up

    @sync_compatible
    async def read_path(self, path: str) -> bytes:
        """One result.

        Raises:
            ArtifactError: there is none, or it is not what a stage writes.
            StorageError: the storage does not answer.
        """
        self._unread = None
        try:
            record = checked(await asyncio.to_thread(storage.read_bytes, self._uri(path)))
            return _readdressed(record, lambda name: storage.located(name, self.root))
        except ArtifactError:
            raise
        except Exception as error:
            self._unread = error
            raise

    def refuse_unread(self) -> None:
        """Raise what kept the last result from being looked up. Prefect takes every error as "there is none", and would have
        the work done, and paid for, a second time."""
        if self._unread:
            raise self._unread

    @sync_compatible
    async def write_path(self, path: str, content: bytes) -> None:
        """Store one result."""
        record = _readdressed(content, lambda uri: storage.portable(uri, self.root))
        await asyncio.to_thread(storage.write_bytes, self._uri(path), record)

    def _uri(self, path: str) -> str:
        return storage.join(self.root, "results", path)


def stage_results(root: str) -> StageResults:
    """Where the results of stages under a storage root are, so that every machine finds them."""
    block = StageResults(root=root)
    block.save(f"drag-{hashlib.sha256(root.encode()).hexdigest()[:12]}", overwrite=True)
    return block


def checked(content: bytes) -> bytes:
    """A stored result, written anew from what was found in it.

    Raises:
        ArtifactError: it is to be read in another way than as JSON, or names a class that is no artifact or error of ours.
    """
    try:
        record = json.loads(content)
        how, result = record["metadata"]["serializer"], json.loads(record["result"])
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactError("a stored result is not what a stage writes") from error
    foreign = [name for name in _named(result) if not name.startswith(_OURS)]
    if record.keys() != {"metadata", "result"} or how != JSONSerializer().model_dump(mode="json") or foreign:
        raise ArtifactError(
            f"a stored result would be read as {how} and name {foreign}; that is not what a stage writes"
        )
    return json.dumps({"metadata": record["metadata"], "result": json.dumps(result)}).encode()


def _readdressed(content: bytes, address: Callable[[str], str]) -> bytes:
    """A record whose result names each artifact by another address."""

    def readdressed(value: dict[str, Any]) -> dict[str, Any]:
        return value | {"uri": address(value["uri"])} if value.keys() == _ARTIFACT else value

    record = json.loads(content)
    record["result"] = json.dumps(json.loads(record["result"], object_hook=readdressed))
    return json.dumps(record).encode()


def _named(value: Any) -> list[str]:
    """Classes that Prefect would make of a JSON value."""
    if isinstance(value, list):
        return [name for item in value for name in _named(item)]
    if isinstance(value, dict):
        own = [str(value[key]) for key in ("__class__", "__exc_type__") if key in value]
        return own + [name for item in value.values() for name in _named(item)]
    return []
