"""Each stage as a Prefect task: cached by its key, its result a reference in JSON beside the artifacts.

`run_stage` runs one. A stage whose key was seen before is not run again, on any machine that shares the storage, unless what
it made is gone. New stage: a plain function in its own module, a task in stage_tasks.py, a call in a flow.
"""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prefect import Task, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.logging import get_run_logger
from prefect.results import get_result_store
from prefect.settings import get_current_settings

from tasks import artifact, storage
from tasks.artifact import Artifact
from tasks.results import StageResults, stage_results
from tasks.retries import may_pass


@dataclass(frozen=True)
class StageRun:
    """What became of one stage: for the summary at a flow's end."""

    stage: str
    cached: bool
    seconds: float
    artifacts: dict[str, Artifact]


def _key(_: Any, parameters: dict[str, Any]) -> str:
    return parameters["key"]


def stage(
    name: str, *, run_name: str | None = None, retries: int = 2
) -> Callable[[Callable[..., dict[str, Artifact]]], Task[..., dict[str, Artifact]]]:
    """Make a function(key=…, uri=…, …) → {name: artifact} a Prefect task that is cached by `key` and retried.

    Where it cannot be told whether an earlier result is there, it is not run, but tried again as if it had failed.

    Args:
        run_name: what its runs are called, where a flow has several; a template of the parameters.
    """

    def decorate(function: Callable[..., dict[str, Artifact]]) -> Task[..., dict[str, Artifact]]:
        @functools.wraps(function)
        def unless_unread(*args: Any, **kwargs: Any) -> dict[str, Artifact]:
            results = get_result_store().result_storage
            assert isinstance(results, StageResults)
            results.refuse_unread()
            return function(*args, **kwargs)

        return task(
            name=name,
            task_run_name=run_name or name,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=_key),
            persist_result=True,
            result_serializer="json",
            retries=retries,
            retry_delay_seconds=5,
            retry_condition_fn=may_pass,
        )(unless_unread)

    return decorate


def run_stage(
    stage_task: Task[..., dict[str, Artifact]],
    *,
    root: str,
    key: str,
    uri: str,
    refresh: bool = False,
    **parameters: Any,
) -> StageRun:
    """Run a stage, or take what it made before.

    Args:
        root: storage root.
        key: of `tasks.cache.stage_key`.
        uri: folder that the stage writes to.
        refresh: run it although it was run before; PREFECT_TASKS_REFRESH_CACHE=true does so for every stage.

    Raises:
        whatever the stage raises.
    """
    started = time.monotonic()
    refresh = refresh or get_current_settings().tasks.refresh_cache
    if refresh:
        # or a run that is killed once it has written over what it made before would leave a result that names that
        storage.delete(storage.join(root, "results", f"{stage_task.name}-{key}"))
    configured = stage_task.with_options(result_storage=stage_results(root), refresh_cache=refresh)
    state = configured(key=f"{stage_task.name}-{key}", uri=uri, **parameters, return_state=True)
    made: dict[str, Artifact] = state.result()
    if state.name == "Cached" and not _all_there(made.values()):
        get_run_logger().warning("%s: what was made before is gone; making it again", stage_task.name)
        return run_stage(stage_task, root=root, key=key, uri=uri, refresh=True, **parameters)
    return StageRun(stage_task.name, state.name == "Cached", time.monotonic() - started, made)


def _all_there(artifacts: Iterable[Artifact]) -> bool:
    return all(artifact.exists(a) for a in artifacts)
