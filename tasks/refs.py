"""What later commands take unless told otherwise: `refs/<name>` of a storage root points to the newest artifact of its kind."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, replace

from tasks import storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError

# What a reference's name begins with → the command that makes it; the first that fits.
_MADE_BY = {
    **dict.fromkeys(("documents", "pages", "questions", "index"), "ingest"),
    **dict.fromkeys(("trajectories-", "results", "comparison", "report"), "evaluate"),
    **dict.fromkeys(("processed", "pairs", "statistics"), "process"),
    **{"trajectories": "collect", "mined": "mine", "merged": "merge", "reward_model": "finetune reward"},
    **dict.fromkeys(("sft_", "dpo", "reward"), "format"),
    **dict.fromkeys(("adapter", "loss_curve"), "finetune sft"),
}
_LOOP: ContextVar[str] = ContextVar("loop", default="")


@contextlib.contextmanager
def refs_of(loop: str) -> Iterator[None]:
    """In the block, references are those of a loop first: whatever others make of the same storage meanwhile, its stages go on
    from what its own have made.

    What it makes is pointed to from `refs/` too, and what it has not made itself is found there.

    Args:
        loop: the id of the run whose stages these are; empty for a stage that runs by itself.
    """
    token = _LOOP.set(loop)
    try:
        yield
    finally:
        _LOOP.reset(token)


def forget_refs_of(root: str, loop: str) -> None:
    """Delete a loop's own references, once none of its stages is to come."""
    storage.delete(_loop_refs(root, loop))


def _loop_refs(root: str, loop: str) -> str:
    return storage.join(root, "loops", loop)


def _ref_uris(root: str, name: str) -> list[str]:
    """Where a reference may lie, in the order in which it is looked for."""
    own = [_loop_refs(root, loop)] if (loop := _LOOP.get()) else []
    return [storage.join(folder, f"{name}.json") for folder in (*own, storage.join(root, "refs"))]


def save_ref(root: str, name: str, artifact: Artifact, place: str = "") -> None:
    """Point `refs/<name>` of a storage root to an artifact: what later commands take unless told otherwise.

    Args:
        place: folder below the root with references of its own, such as a night's partition; the root when empty.
    """
    content = asdict(replace(artifact, uri=storage.portable(artifact.uri, root)))
    for uri in _ref_uris(place or root, name):
        storage.write_bytes(uri, json.dumps(content, indent=1).encode())


def drop_ref(root: str, name: str) -> None:
    """Let `refs/<name>` point to nothing; if it never did, that is no error."""
    for uri in _ref_uris(root, name):
        storage.delete(uri)


def has_ref(root: str, name: str, place: str = "") -> bool:
    """Whether `refs/<name>` points to anything yet, of a place as `save_ref` had it."""
    return any(map(storage.exists, _ref_uris(place or root, name)))


def ref_names(root: str) -> list[str]:
    """The names of all references, sorted."""
    folder = storage.join(root, "refs")
    return [storage.relative(uri, folder).removesuffix(".json") for uri in storage.iter_files(folder)]


def load_ref(root: str, name: str, place: str = "") -> Artifact:
    """The artifact that `refs/<name>` points to.

    Args:
        place: as `save_ref` had it.

    Raises:
        ArtifactError: there is none yet.
    """
    for uri in _ref_uris(place or root, name):
        if storage.exists(uri):
            found = Artifact(**json.loads(storage.read_bytes(uri)))
            return replace(found, uri=storage.located(found.uri, root))
    command = next((command for start, command in _MADE_BY.items() if name.startswith(start)), None)
    run = f"run `drag {command}`" if command else "run the stage that makes it"
    raise ArtifactError(f"{place or root} holds no {name} yet; {run} first")


def load_together(root: str, names: Iterable[str]) -> dict[str, Artifact]:
    """The artifacts that several references point to, which were made by one run of a stage.

    A stage's folder is named by all that it was made of. References to what lies in it are saved one after the other: in
    between, or where whoever saves them was killed there, they are of different runs.

    Raises:
        ArtifactError: one of them is not there yet, or they were not made together.
    """
    found = {name: load_ref(root, name) for name in names}
    if len({made.uri.rpartition("/")[0] for made in found.values()}) > 1:
        raise ArtifactError(
            f"{root} holds {', '.join(found)} that were not made together: what makes them is under way, or was broken off; wait "
            "until it ends, or run it again"
        )
    return found
