"""What an export says of its tables, in the provenance.json beside them: how their rows were made.

{"sft_best": {"sha256": "…", "rows": 149, "schema": "sft/2", "provenance": {"agent": {…}, "settings": {…}, …}}, …}
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tasks import storage
from tasks.errors import InputError
from tasks.set_aside import printable

T = TypeVar("T")


class Open(BaseModel):
    """A part of a provenance, of which only what is read is declared."""

    model_config = ConfigDict(extra="allow")  # what is not read here is handed on as it is


class Settings(Open):
    agent: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    reward: str | None = None


class Provenance(Open):
    agent: dict[str, Any] | None = None
    settings: Settings = Settings()
    prompt_messages: int | None = None
    reward: str | None = None


class Table(Open):
    provenance: Provenance = Provenance()


def beside(source: str) -> str | None:
    """The provenance.json of an export, in the folder or beside the file; None where there is none."""
    folder = source.rsplit("/", 1)[0] if storage.is_file(source) else source
    uri = storage.join(folder, "provenance.json")
    return uri if storage.is_file(uri) else None


def read(source: str) -> dict[str, Table]:
    """What is said of each table by its name; nothing where there is no such file.

    Raises:
        InputError: it is not what an export writes.
    """
    uri = beside(source)
    if uri is None:
        return {}
    return checked(TypeAdapter(dict[str, Table]), storage.read_bytes(uri), uri)


def checked(kind: TypeAdapter[T], content: bytes, uri: str) -> T:
    """What a provenance.json says.

    Raises:
        InputError: it is not of that kind.
    """
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise InputError(f"is not what an export writes ({printable(reason)}); move it away", file=uri) from error
