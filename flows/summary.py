"""What a flow did, said at its end: a table on the terminal and in the Prefect UI."""

import base64
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from rich.console import Console
from rich.table import Table

from tasks.progress import slug
from tasks.stages import StageRun


def show_stages(runs: Sequence[StageRun]) -> None:
    """Which stages did work and which were taken from earlier, with what they made."""
    table = Table(title="Stages", title_justify="left")
    for column in ("stage", "", "seconds", "made"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    rows = []
    for run in runs:
        made = ", ".join(f"{name} ({a.rows:,})" for name, a in run.artifacts.items())
        table.add_row(run.stage, "cached" if run.cached else "done", f"{run.seconds:.1f}", made)
        rows.append({"stage": run.stage, "cached": run.cached, "seconds": round(run.seconds, 1), "made": made})
    console = Console(stderr=True)
    console.print(table)
    if runs and all(run.cached for run in runs):
        console.print("Nothing has changed since the last run: no stage did any work.")
    create_table_artifact(rows, key="stages", description="What each stage did")


def show_markdown(title: str, markdown: str) -> None:
    """A report of some lines, in the Prefect UI."""
    create_markdown_artifact(f"# {title}\n\n{markdown}", key=slug(title), description=title)


def show_picture(title: str, svg: str) -> None:
    """A figure of tasks/plots.py, in the Prefect UI, which keeps it with the run and needs no file."""
    data = base64.b64encode(svg.encode()).decode()
    create_image_artifact(f"data:image/svg+xml;base64,{data}", key=slug(title), description=title)


def work_dir(root: str) -> Path:
    """A local folder for logs and scratch files: beside the artifacts where these are local."""
    from tasks import storage
    from tasks.model import cache_folder

    return cache_folder() / "work" if storage.is_s3(root) else Path(root) / "work"
