"""Command-line flags from a settings model: every field is a flag of its own name, with its description as help.

`--max-iterations` sets `agent.max_iterations`: where a name stands once among a command's settings, no more is needed; where
it stands twice (`limit` of collect and of evaluate), the section goes before it (`--collect-limit`). A recipe (`--config`)
gives values that flags override. Where settings give a value to a flag that stands alone (`Alone`), it need not have one
(`--adapter`, `--adapter context`). Values are checked by the model alone, so the command line, recipes and forms agree.
"""

import argparse
import types
import typing
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tasks.config.adapters import Alone
from tasks.config.base import Location, checked, dotted
from tasks.errors import InputError

Path_ = tuple[str, ...]
M = typing.TypeVar("M", bound=BaseModel)


def fields(model: type[BaseModel], at: Path_ = ()) -> Iterator[tuple[Path_, FieldInfo]]:
    """Every field that a flag can set: those of nested models in place of the nested model."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, (*at, name))
        elif not _holds_models(inner):  # a list of models is for a recipe
            yield (*at, name), info


def _holds_models(annotation: Any) -> bool:
    return any(isinstance(a, type) and issubclass(a, BaseModel) for a in typing.get_args(annotation))


def flag_names(model: type[BaseModel]) -> dict[Path_, str]:
    """The flag of each field, without its dashes."""
    times = Counter(path[-1] for path, _ in fields(model))
    return {
        path: "-".join(path[-2:] if times[path[-1]] > 1 else path[-1:]).replace("_", "-") for path, _ in fields(model)
    }


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel], words: Collection[Path_] = ()) -> None:
    """Add a flag for every field of `model`, and `--config`.

    Args:
        words: fields that are given as a word of their own, which must be there, instead of by a flag.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML with the same settings (a recipe); flags override it")
    names = flag_names(model)
    for path, info in fields(model):
        if path in words:
            choices = _choices(info.annotation) or None
            shown = "|".join(choices) if choices else names[path].upper()
            several = "+" if typing.get_origin(info.annotation) is list else None
            parser.add_argument(".".join(path), metavar=shown, choices=choices, nargs=several, help=info.description)
            continue
        options: dict[str, Any] = {"dest": ".".join(path), "default": argparse.SUPPRESS, "help": _help(info)}
        kind = _without_none(info.annotation)
        alone = next((marker.value for marker in info.metadata if isinstance(marker, Alone)), None)
        if alone is not None:
            options |= {"nargs": "?", "const": alone, "metavar": names[path].upper().replace("-", "_")}
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "metavar": names[path].upper().replace("-", "_")}
        else:
            options["metavar"] = names[path].upper().replace("-", "_")
        parser.add_argument(f"--{names[path]}", **options)


def _help(info: FieldInfo) -> str:
    text = info.description or ""
    choices = _choices(_without_none(info.annotation))
    if choices:
        text += f" One of: {', '.join(choices)}."
    if not info.is_required() and info.default is not None and not isinstance(info.default, BaseModel):
        shown = " ".join(map(str, info.default)) if isinstance(info.default, list) else info.default
        text += f" Default: {shown}." if shown != "" else ""
    return text.replace("%", "%%")


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    return [str(v) for v in typing.get_args(kind)] if typing.get_origin(kind) is typing.Literal else []


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def load_recipe(file: str) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        InputError: it cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read as YAML: {error}", file=file) from error
    if not isinstance(content, dict):
        raise InputError("holds no settings (a mapping of names to values)", file=file)
    return content


def settings_from(model: type[M], arguments: argparse.Namespace) -> M:
    """The settings that a recipe and flags add up to.

    Raises:
        InputError: the recipe cannot be read, or has a value where a section is.
        ConfigError: a value is missing, unknown or out of range; the message names flag and reason.
    """
    # of a section that must be there and is not, what it lacks is told
    needed = {path[0] for path, _ in fields(model) if path[1:] and model.model_fields[path[0]].is_required()}
    values: dict[str, Any] = {section: {} for section in needed}
    values |= load_recipe(arguments.config) if arguments.config else {}
    for dest, value in vars(arguments).items():
        path = tuple(dest.split("."))
        if path in dict(fields(model)):
            at = values
            for section in path[:-1]:
                if at.get(section) is None:  # absent, or left empty in the recipe
                    at[section] = {}
                at = at[section]
                if not isinstance(at, dict):
                    raise InputError(f"{section} is {at!r}, and no section with settings", file=str(arguments.config))
            at[path[-1]] = value
    return validated(model, values)


def validated(model: type[M], values: Mapping[str, Any]) -> M:
    """`values` as settings.

    Raises:
        ConfigError: a value is missing, unknown or out of range; the message names flag and reason.
    """
    names = flag_names(model)

    def named(location: Location) -> str:
        path = tuple(str(part) for part in location if not isinstance(part, int))
        return f"--{names[path]}" if path in names else dotted(path)

    return checked(model, values, named, quote=True)
