"""Typed errors. Each says what is wrong and what the user can do; the command line prints that and no traceback."""

from tasks.secrets import without_secrets


class DragError(Exception):
    """Base of every error that a user can mend. `exit_code` is what the command line ends with. It quotes no secret."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class InputError(DragError):
    """A document, question or setting file cannot be used; the message names the file and, where known, the row."""

    exit_code = 2

    def __init__(self, message: str, *, file: str | None = None, row: int | None = None) -> None:
        where = "" if file is None else f"{file}{'' if row is None else f', row {row}'}: "
        super().__init__(where + message)
        self.file, self.row = file, row


class ConfigError(DragError):
    """Settings contradict each other or name something that does not exist."""

    exit_code = 2


class StorageError(DragError):
    """The storage does not answer, or says that it cannot just now. A stage that meets it is tried again."""

    exit_code = 3


class ArtifactError(DragError):
    """A stored artifact is missing, was altered, or has another schema than this version of the code reads."""

    exit_code = 3


class ServerError(DragError):
    """A model server could not be started, died, or does not answer."""

    exit_code = 4


class CollectError(DragError):
    """More rollouts failed than allowed; those that finished are kept, and the same command redoes only the others."""

    exit_code = 7


class SelfTestError(DragError):
    """The model, driven by the chosen protocol, yields no parsable search; collecting would be waste."""

    exit_code = 5


class TrainingError(DragError):
    """Training could not start or ended early."""

    exit_code = 6


class EmptyError(DragError):
    """A stage has nothing to hand on: no rollout, pair or example is left. The message says what to change."""

    exit_code = 8


class StageError(DragError):
    """A stage that ran elsewhere, as a run of its own, did not complete."""
