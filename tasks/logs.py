"""Where messages go: to the flow run, and so to the Prefect UI, or outside of one to Python's log."""

import logging

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The logger of the running task or flow; "drag" where nothing runs."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("drag")
