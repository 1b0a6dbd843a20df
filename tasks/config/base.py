"""What all settings share, and how a form shows them."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
Location = tuple[int | str, ...]

Split = Literal["train", "dev", "test", "all"]
Share = Annotated[float, Field(ge=0, le=1)]


def listed(value: Any) -> Any:
    """One text as a list of one, none as an empty list."""
    return [] if value in (None, "") else [value] if isinstance(value, str) else value


def as_form(schema: dict[str, Any]) -> None:
    """Say in the JSON schema what a form needs to know.

    Each field has its place, since a database may store a schema's fields in another order. A plain value that may be left
    out is an empty input: where a schema says "number or null", the Prefect UI asks for the type first.
    """
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position
        match field.get("anyOf"):
            case [{"type": "string" | "integer" | "number"} as value, {"type": "null"}]:
                del field["anyOf"]
                field.pop("default")
                field |= value


class Settings(BaseModel):
    """Base of all settings: unknown names are refused, values do not change, and no error quotes a value."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        json_schema_extra=as_form,
        field_title_generator=lambda name, _: name.replace("_", " ").capitalize(),
    )


def dotted(location: Location) -> str:
    """A field as files and forms name it, such as collect.limit."""
    return ".".join(map(str, location)) or "settings"


def checked(
    model: type[M], values: Mapping[str, Any], named: Callable[[Location], str] = dotted, *, quote: bool = False
) -> M:
    """`values` as a model.

    Args:
        named: what a field is called, from the names and list positions that lead to it.
        quote: say what was given, where that cannot be a secret: our own rules, some of which are about secrets, say
            themselves what is wrong.

    Raises:
        ConfigError: a value is missing, unknown or out of range; the message names fields and reasons, one a line.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            given = (
                f" (got {problem['input']!r})" if quote and problem["type"] not in ("missing", "value_error") else ""
            )
            lines.append(f"{named(problem['loc'])}: {problem['msg'].removeprefix('Value error, ')}{given}")
        raise ConfigError("\n".join(lines)) from None  # the original quotes values
