"""Progress of long work: a bar on a terminal, log lines elsewhere, and a progress artifact in the Prefect UI."""

import contextlib
import contextvars
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import get_run_context
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tasks.secrets import without_secrets

OnProgress = Callable[[int, int], None]
_UI_EVERY_S = 2.0


def _in_a_run() -> bool:
    try:
        get_run_context()
    except MissingContextError:
        return False
    return True


def slug(text: str) -> str:
    """A Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@contextlib.contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """Yields on_progress(done, total), which may be called as often as one likes."""
    in_a_run = _in_a_run()
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    row = bar.add_task(title, total=None)
    told = 0.0
    tenth = -1
    failed = False
    ui = ThreadPoolExecutor(1)  # calls of the API would hold up the event loop that reports progress
    context = contextvars.copy_context()
    artifact: list[UUID] = []
    # of the run that began this, whichever of its task runs will report
    logger = get_run_logger() if in_a_run else None

    def tell_ui(done: int, total: int) -> None:
        nonlocal failed
        share = 100 * done / total
        try:
            if artifact:
                update_progress_artifact(artifact[0], share, description=f"{title}: {done} of {total}")
            else:
                artifact.append(cast(UUID, create_progress_artifact(share, key=slug(title), description=title)))
        except Exception as error:  # noqa: BLE001 - whatever it was, the work goes on, and nobody asks how this call ended
            if logger and not failed:  # the next one most likely fails alike
                logger.warning("%s: the UI does not show how far it is: %s", title, without_secrets(repr(error)))
            failed = True

    def on_progress(done: int, total: int) -> None:
        nonlocal told, tenth
        bar.update(row, completed=done, total=total)
        if not total:
            return
        if bar.disable and 10 * done // total > tenth:
            tenth = 10 * done // total
            console.print(f"{title}: {done} of {total}", soft_wrap=True, highlight=False)
            if logger:
                logger.info("%s: %d of %d", title, done, total)
        if not in_a_run:
            return
        if time.monotonic() - told >= _UI_EVERY_S or done == total:
            told = time.monotonic()
            ui.submit(context.run, tell_ui, done, total)

    with ui, bar:
        yield on_progress
