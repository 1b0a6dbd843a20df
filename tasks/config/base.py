"""What all settings share, and how a form shows them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
