"""Which adapter a setting means: none (""), the newest of all ("newest"), or the newest that was kept under a name."""

from tasks import refs
from tasks.artifact import Artifact
from tasks.config.adapters import NEWEST
from tasks.errors import ConfigError

_NAMED = "adapter-"


def keep(root: str, adapter: Artifact, name: str) -> None:
    """Make an adapter the newest; and, for what goes on from it or is compared with it, the one of its name, if it has one."""
    refs.save_ref(root, "adapter", adapter)
    if name:
        refs.save_ref(root, _NAMED + name, adapter)


def chosen(root: str, name: str) -> Artifact | None:
    """The adapter that a setting names; None where it names none, for the base model.

    Raises:
        as `named`.
    """
    return named(root, name) if name else None


def named(root: str, name: str) -> Artifact:
    """The adapter of a name, or the newest.

    Raises:
        ConfigError: none was kept under that name; the message says which there are.
        ArtifactError: the newest is asked for, and there is none yet.
    """
    if name == NEWEST:
        return refs.load_ref(root, "adapter")
    if not refs.has_ref(root, _NAMED + name):
        there = (
            f"there are {', '.join(kept)}" if (kept := names(root)) else "none has a name yet: finetune gives it one"
        )
        raise ConfigError(f"{root} holds no adapter {name}; {there}")
    return refs.load_ref(root, _NAMED + name)


def names(root: str) -> list[str]:
    """The names that adapters were kept under."""
    return [name.removeprefix(_NAMED) for name in refs.ref_names(root) if name.startswith(_NAMED)]
