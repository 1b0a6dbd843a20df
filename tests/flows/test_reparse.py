"""`drag reparse`: what it makes takes the place of what was collected, and it always reads what was collected."""

import datetime
from pathlib import Path

import pytest

from flows.prepare import process
from flows.reparse import reparse
from tasks import artifact, config, nights, refs
from tasks.agent import protocol_tools
from tasks.refs import load_ref
from tests.model_server import Reply
from tests.tasks.test_reparse import ANSWER, BROKEN, collected, older, small_index


def test_reparse_takes_the_place_of_what_was_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path / "data")
    index = small_index(tmp_path)
    refs.save_ref(root, "index", index)
    night = nights.partition_uri(root, "2026-11-24", "abc")
    with monkeypatch.context() as patch:
        patch.setattr(protocol_tools, "read_calls", older)
        said = [[Reply(BROKEN), Reply(None, None, [ANSWER])]]
        for place in (root, night):
            made = collected(index, f"{place}/t.parquet", "tools", said, max_iterations=2)
            refs.save_ref(root, "trajectories", made, place)
    before = load_ref(root, "trajectories")

    (run,) = reparse(config.ReparseRun(storage=root))
    after = load_ref(root, "trajectories")
    assert (run.cached, run.artifacts["trajectories"], load_ref(root, "trajectories_collected")) == (
        False,
        after,
        before,
    )
    (again,) = reparse(config.ReparseRun(storage=root))
    assert (again.cached, load_ref(root, "trajectories")) == (True, after)
    (row,) = artifact.read_rows(process(config.ProcessRun(storage=root))[0].artifacts["processed"])
    assert (row["best_query"], row["searches"][0]["shown"]) == ("pump degrees", False)

    day = datetime.date(2026, 11, 24)
    reparse(config.ReparseRun(storage=root, nights=config.Nights(since=day)))
    (of_night,) = nights.between(root, ["trajectories"], day, day).values()
    assert artifact.read_rows(of_night)[0]["turns"][0]["read_by"] == "reparse"

    mined = collected(index, f"{root}/mined.parquet", "tools", [[Reply(BROKEN)]], max_iterations=1, answer=False)
    refs.save_ref(root, "mined", mined)
    unread = load_ref(root, "trajectories")
    (of_mined,) = reparse(config.ReparseRun(storage=root, source="mined"))
    assert (load_ref(root, "mined_collected"), load_ref(root, "mined")) == (mined, of_mined.artifacts["trajectories"])
    assert load_ref(root, "trajectories") == unread

    newer = collected(index, f"{root}/newer.parquet", "tools", [[Reply(BROKEN)]], max_iterations=1, answer=False)
    refs.save_ref(root, "trajectories", newer)
    reparse(config.ReparseRun(storage=root))
    assert load_ref(root, "trajectories_collected") == newer
