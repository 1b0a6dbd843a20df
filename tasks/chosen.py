"""Which questions of a split are asked, and in which order."""

import hashlib
from collections import Counter
from collections.abc import Collection

from tasks import artifact, config
from tasks.artifact import Artifact
from tasks.errors import InputError
from tasks.splits import SPLITS


def digest(*parts: object) -> str:
    """A hash of values by their texts: what fixes an order, an id or a seed on every machine alike."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def select(questions: Artifact, split: config.Split, limit: int | None, only: Collection[str] = ()) -> list[str]:
    """Ids of a split's questions in an order fixed by hash, cut to `limit`: the same on every machine, and a smaller
    limit's questions are the first of a larger one's.

    Args:
        only: take these, whatever the limit; all when empty.

    Raises:
        InputError: the split holds no question at all, or none of an id in `only`.
    """
    table = artifact.read_table(questions, ["question_id", "split"])
    rows = zip(table["question_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    found = sorted((id_ for id_, own in rows if split in ("all", own)), key=lambda id_: digest("order", id_))
    if not found:
        sizes = Counter(table["split"].to_pylist())
        raise InputError(
            f"no question is in split {split!r} ({', '.join(f'{name}: {sizes[name]}' for name in SPLITS)}): questions that share "
            "a document stay together, so that few documents may all fall into others; more of them, other ratios or another "
            "split_salt at ingest give it some",
            file=questions.uri,
        )
    if unknown := sorted(set(only) - set(found)):
        raise InputError(
            f"there is no question {', '.join(unknown[:3])} in split {split!r}; name another split, or all",
            file=questions.uri,
        )
    return [id_ for id_ in found if id_ in only] if only else found[:limit]
