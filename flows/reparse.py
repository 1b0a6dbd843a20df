"""reparse: trajectories or mined queries → the same, read by today's parser, with no new rollouts.

drag reparse                                              # the newest trajectories
drag reparse --since 2026-11-01 --until 2026-11-30        # those of all nights of November
drag reparse --source mined                               # the newest mined queries

What it makes takes the place of what was collected, for `process` and all that follows; what was collected stays, and is what
a later `reparse` reads. tasks/reparse.py says what becomes of a turn that is read otherwise.
"""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from flows.form import settings_flow
from flows.summary import show_markdown, show_stages
from tasks import artifact, config, nights, refs, storage
from tasks import reparse as reading
from tasks.artifact import Artifact
from tasks.cache import stage_key
from tasks.refs import load_ref
from tasks.stage_tasks import reparse_trajectories
from tasks.stages import StageRun, run_stage


def _collected(root: str, place: str, name: str) -> Artifact:
    """What was collected, of a place where it may have been read again since."""
    newest = load_ref(root, name, place)
    if refs.has_ref(root, f"{name}_collected", place):
        collected = load_ref(root, f"{name}_collected", place)
        if artifact.read_provenance(newest).get("reparsed", {}).get("trajectories") == collected.sha256:
            return collected
    return newest


def reparsed(root: str, place: str, name: str) -> StageRun:
    """Read the rollouts of a place again: of the storage root, or of a night's partition. Its reference then says so.

    Args:
        name: what they are, "trajectories" or "mined".

    Raises:
        ArtifactError: there are none, or what is read anew has to be searched in an index that is gone.
    """
    inputs: dict[str, Any] = {"trajectories": _collected(root, place, name), "index": load_ref(root, "index")}
    key = stage_key("tasks.reparse", inputs=inputs)
    run = run_stage(reparse_trajectories, root=root, key=key, uri=storage.join(root, "reparsed", key), **inputs)
    refs.save_ref(root, f"{name}_collected", inputs["trajectories"], place)
    refs.save_ref(root, name, run.artifacts["trajectories"], place)
    return run


@settings_flow(name="reparse")
def reparse(settings: config.ReparseRun) -> list[StageRun]:
    """Read the newest trajectories or mined queries, or those of a range of nights, by today's parser."""
    root = storage.resolve(settings.storage)
    chosen, names = settings.nights, nights.gathered(settings.source)
    if chosen.since or chosen.until:
        found = nights.in_range(root, names, chosen.since, chosen.until)
        places = [(partition.uri, name) for name, partition in found]
    else:
        places = [(root, name) for name in names]
    runs = [reparsed(root, place, name) for place, name in places]
    changes: dict[str, Counter[str]] = {}
    for run in runs:
        for section, counts in reading.read_changes(run.artifacts["changes"]).items():
            changes.setdefault(section, Counter()).update(counts)
    text = reading.markdown(changes)
    show_markdown("What reading again changed", text)
    Console(stderr=True).print(Markdown(text))
    show_stages(runs)
    return runs
