"""How settings name an adapter: in one way, in flags, forms and recipes."""

from typing import Annotated, NamedTuple

from pydantic import Field

NEWEST = "newest"


class Alone(NamedTuple):
    """What a flag means where it is given without a value."""

    value: str


AdapterName = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]*)?$")]
"""A name that an adapter was kept under, or "newest" for the newest of all. Empty for none."""

AskedAdapter = Annotated[AdapterName, Alone(NEWEST)]
"""The adapter that is asked instead of the base model; as a flag alone, the newest."""


def refuse_reserved(name: str) -> None:
    """Raise ValueError if an adapter is to be kept under the name that means the newest."""
    if name == NEWEST:
        raise ValueError(f"{NEWEST} means the adapter that was made last, whatever its name: choose another name")
