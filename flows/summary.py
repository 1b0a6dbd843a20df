"""What a flow did, said at its end: a table on the terminal and in the Prefect UI."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from tasks import folders, storage
from tasks.artifact import Artifact, read_provenance
from tasks.progress import slug
from tasks.stages import StageRun
from tasks.statistics import turns_markdown

STAGES_KEY = "stages"


def show_stages(runs: Sequence[StageRun]) -> None:
    """Which stages did work and which were taken from earlier, with what they made; then what a report concludes."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        made = ", ".join(f"{name} ({a.rows:,})" for name, a in run.artifacts.items())
        rows.append({"stage": run.stage, "cached": run.cached, "seconds": round(run.seconds, 1), "made": made})
    show_rows(rows)
    if not flow_run.parent_flow_run_id:
        for run in runs:
            if report := run.artifacts.get("report"):
                lines = [*read_provenance(report)["conclusion"], f"Report: {storage.join(report.uri, 'index.html')}"]
                Console(stderr=True).print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The table of `show_stages`: in the UI, and on the terminal when this run is not part of another, which shows it then."""
    create_table_artifact(list(rows), key=STAGES_KEY, description="What each stage did")
    if flow_run.parent_flow_run_id:
        return
    table = Table(title="Stages", title_justify="left")
    for column in ("stage", "", "seconds", "made"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for row in rows:
        table.add_row(row["stage"], "cached" if row["cached"] else "done", f"{row['seconds']:.1f}", row["made"])
    console = Console(stderr=True)
    console.print(table)
    if rows and all(row["cached"] for row in rows):
        console.print("Nothing has changed since the last run: no stage did any work.")


def show_markdown(title: str, markdown: str) -> None:
    """A report of some lines, in the Prefect UI, which shows the title above it."""
    create_markdown_artifact(markdown, key=slug(title), description=title)


def show_turns(title: str, trajectories: Artifact) -> None:
    """How the turns of rollouts ended, and which pages they showed as images: on the terminal and in the UI."""
    turns = turns_markdown(trajectories)
    show_markdown(title, turns)
    Console(stderr=True).print(Markdown(f"## {title}\n\n{turns}"))


def show_picture(title: str, svg: str) -> None:
    """A figure of tasks/plots.py, in the Prefect UI, which keeps it with the run and needs no file.

    In Markdown, as the UI writes the whole address below an image, and here that is the image itself. On white, as the UI is
    dark and the figure's words are black.
    """
    on_white = re.sub(r"(<svg\b[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
    data = base64.b64encode(on_white.encode()).decode()
    show_markdown(title, f"![{title}](data:image/svg+xml;base64,{data})")


def work_dir(root: str) -> Path:
    """A local folder for logs and scratch files: beside the artifacts where these are local."""
    return folders.cache_folder() / "work" if storage.is_s3(root) else Path(root) / "work"
