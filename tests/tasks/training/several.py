"""What happens in a training process only when a test wants it: code that Python runs as each of them starts."""

import os
from pathlib import Path

import psutil
import pytest

# The second process fails as it lays out its third batch, with whatever the test says.
FAILS = """
import os, sys
if os.environ.get("RANK") == "1":
    from tasks.errors import TrainingError
    from tasks.training import batches
    whole, calls = batches.lay_out, []
    def lay_out(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise {error}
        return whole(*arguments, **named)
    batches.lay_out = lay_out
"""

# accelerate shards over accelerators alone, though torch does so on CPUs: here it takes the one for the other.
SHARDS_ON_A_CPU = """
import os
if "RANK" in os.environ:
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    made = PartialState.__init__
    def init(self, *arguments, **named):
        made(self, *arguments, **named)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU
    PartialState.__init__ = init
"""


def inject(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every Python process that is started from now on run `code` first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    )


def process_of(rank: int) -> int:
    """Id of the training process of that rank, among all that were started from here."""
    for process in psutil.Process().children(recursive=True):
        if "tasks.training.train" in process.cmdline() and process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"no process of rank {rank}")
