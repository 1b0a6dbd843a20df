"""Flows whose parameters are the fields of a settings model, so that the run form in the Prefect UI is that model.

    @settings_flow(name="collect")
    def collect(settings: config.CollectRun) -> list[StageRun]: ...

    collect(config.CollectRun(storage="here"))                                # in Python
    {"storage": "here", "collect": {"limit": 100}, "server": {...}}           # what a deployment, a form or the API gives it

Titles, help, choices, bounds and order of the form come from the model alone; see tasks/config.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, TypeVar

from prefect import Flow
from prefect.runtime import flow_run
from prefect.utilities.hashing import file_hash
from pydantic import Field
from pydantic.fields import FieldInfo

from tasks.config import Run
from tasks.config.base import checked
from tasks.nights import night_of
from tasks.progress import slug
from tasks.refs import refs_of

S = TypeVar("S", bound=Run)
T = TypeVar("T")


class SettingsFlow(Flow[..., T], Generic[S, T]):
    """A flow that Python calls with its settings, and that the API gives their fields."""

    settings: type[S]

    def __call__(self, settings: S, **options: Any) -> T:  # type: ignore[override]
        return super().__call__(**dict(settings), **options)

    def validate_parameters(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters as the settings' fields.

        Raises:
            ConfigError: a value is missing, unknown or out of range; the message names the fields and quotes no value.
        """
        return dict(checked(self.settings, parameters))


def settings_flow(
    name: str, about: Callable[[Any], str] | None = None, zone: Callable[[Any], str] = lambda settings: "UTC"
) -> Callable[[Callable[[S], T]], SettingsFlow[S, T]]:
    """Make a function of one settings model a flow whose parameters are the model's fields.

    Args:
        about: a word or two that tell the flow's runs apart, for their names.
        zone: the time zone of the day in their names.
    """

    def decorate(function: Callable[[S], T]) -> SettingsFlow[S, T]:
        (parameter,) = inspect.signature(function, eval_str=True).parameters.values()
        model: type[S] = parameter.annotation

        @functools.wraps(function)
        def run(**fields: Any) -> T:
            with refs_of(flow_run.parent_flow_run_id or ""):
                return function(model(**fields))

        run.__signature__ = _signature(model)  # type: ignore[attr-defined]
        source = inspect.getsourcefile(function)
        made: SettingsFlow[S, T] = SettingsFlow(
            run,
            name=name,
            flow_run_name=lambda: _run_name(name, about, zone, model.model_validate(flow_run.parameters)),
            version=file_hash(source) if source else None,
            # what a flow returns is for its caller; that a failed one's error is stored cannot be helped, pickled it must not be
            persist_result=False,
            result_serializer="json",
        )
        made.settings = model
        return made

    return decorate


def _run_name(flow: str, about: Callable[[Any], str] | None, zone: Callable[[Any], str], settings: Run) -> str:
    """Such as collect-train-2026-11-24-bold-newt: what it does, and its own name, which may have been typed into the form."""
    own = flow_run.name
    if own.startswith(f"{flow}-"):  # named by an earlier try
        return own
    day = night_of(flow_run.scheduled_start_time, zone(settings)).isoformat()
    return "-".join(filter(None, (flow, slug(about(settings)) if about else "", day, own)))


def _signature(model: type[Run]) -> inspect.Signature:
    """The fields as keyword parameters, in the order in which a form shows them."""
    schema = model.model_json_schema()["properties"]
    ordered = sorted(model.model_fields.items(), key=lambda item: schema[item[0]]["position"])
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_labelled(info), annotation=_type(info))
            for name, info in ordered
        ]
    )


def _type(info: FieldInfo) -> Any:
    """A field's type with its bounds."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _labelled(info: FieldInfo) -> Any:
    """A field for Prefect, which would use the parameter's name as its title."""
    extra: Any = {"title": info.title}
    return Field(... if info.is_required() else info.default, description=info.description, json_schema_extra=extra)
