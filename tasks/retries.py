"""Which failed task runs Prefect tries again."""

from typing import Any

from prefect.states import State

from tasks.errors import DragError, StorageError

_WRONG_CODE = (AssertionError, AttributeError, ImportError, NameError, TypeError)


async def may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether trying again could help: not where the user must act first, nor where our code is wrong.

    A `retry_condition_fn` of tasks in an event loop and of others: Prefect waits for it in both.
    """
    error = await state.aresult(raise_on_failure=False)
    if isinstance(error, DragError):
        return isinstance(error, StorageError)
    return not isinstance(error, _WRONG_CODE)
