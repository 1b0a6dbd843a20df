"""Where messages go: to the flow run, and so to the Prefect UI, or outside of one to Python's log. And what a server logged."""

import logging
import re
from pathlib import Path

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from tasks.secrets import without_secrets


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The logger of the running task or flow; "drag" where nothing runs."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("drag")


def log_tail(log: Path) -> str:
    """The end of a server's log, errors first, without terminal colours and without secrets."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", without_secrets(log.read_text(errors="replace"))).splitlines()
    errors = [line for line in text if "Error" in line][-5:]
    return "\n".join([*errors, "…", *text[-25:]])
