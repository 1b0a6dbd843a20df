"""Train with several processes: torchrun's launcher runs tasks/training/train.py in each, and the one that failed is named.

    python -m tasks.training.ranks --spec spec.json --processes 8
    python -m tasks.training.ranks --spec spec.json --processes 8 --nodes 2 --rendezvous HOST:29400    (on each machine)

It is torchrun as a library, since torchrun tells of a failure in prose, and at times of a process that only lost the one that
failed. What a process prints comes out as "[rank N] line" while it runs. Nothing is restarted here: the same command goes on
from the last checkpoint, on this machine or another.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tasks import network
from tasks.errors import TrainingError
from tasks.training.messages import PREFIX, tell
from tasks.training.spec import read_spec

# What a process says when it lost another one, whose error explains it.
_ECHO = re.compile(
    r"gloo|nccl|DistBackendError|DistNetworkError|TCPStore|closed by peer|reset by peer|broken pipe", re.I
)


class OneMachine(StaticTCPRendezvous):
    """Where the processes of one machine meet: on loopback, for torchrun's own stores are open to every network."""

    NAME = "one-machine"

    def __init__(self, run_id: str) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        address, port = listener.getsockname()
        super().__init__(address, port, rank=0, world_size=1, run_id=run_id, timeout=600)
        self._store = TCPStore(address, port, 1, is_master=True, multi_tenant=True, master_listen_fd=listener.detach())

    def get_backend(self) -> str:
        """See base class."""
        return self.NAME


rendezvous_handler_registry.register(OneMachine.NAME, lambda parameters: OneMachine(parameters.run_id))


def train(file: Path, processes: int, nodes: int, rendezvous: str | None) -> None:
    """Run the training of a spec file in `processes` processes here, and as many on each of the other machines.

    Raises:
        TrainingError: the machines did not meet.
        ChildFailedError: a process ended with an error or was killed; the others were ended.
    """
    spec = read_spec(file)
    logs = spec.work_dir / "ranks"
    shutil.rmtree(logs, ignore_errors=True)
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # on a CPU, each would else take every core
    if nodes == 1:  # what the processes say to each other stays here too
        os.environ |= network.loopback_only()
    launch = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=spec.training[:16],
        rdzv_backend=OneMachine.NAME if nodes == 1 else "c10d",
        rdzv_endpoint=rendezvous or "",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), tee=Std.ALL),
        log_line_prefix_template=PREFIX.format("${rank}"),
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "tasks.training.train", "--spec", str(file))
    except RendezvousError as error:
        raise TrainingError(
            f"{nodes} machines did not meet at {rendezvous} ({error}): start the same command on each, and let them reach it"
        ) from error


def root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, str]:
    """The rank that failed first of itself, and its own error in a line."""
    rank = min(failures, key=lambda rank: (_is_echo(failures[rank]), failures[rank].timestamp, rank))
    return rank, _error(failures[rank])


def _is_echo(failure: ProcessFailure) -> bool:
    """Whether it only lost the process that failed, or was ended because of that."""
    said = _recorded(failure)
    return bool(_ECHO.search(said)) if said else failure.exitcode == -signal.SIGTERM


def _error(failure: ProcessFailure) -> str:
    """ "RuntimeError: no room" from the process's error file; how it ended, where it left none."""
    if message := _recorded(failure):
        return message
    return f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with code {failure.exitcode}"


def _recorded(failure: ProcessFailure) -> str | None:
    message = failure.error_file_data["message"]
    return message["message"] if isinstance(message, dict) else None


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True, help="JSON file that tasks/training/spec.py describes")
    parser.add_argument("--processes", type=int, required=True, help="processes on this machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines that train together")
    parser.add_argument("--rendezvous", help="HOST:PORT on one of several machines, where they meet")
    options = parser.parse_args(arguments)
    try:
        train(options.spec, options.processes, options.nodes, options.rendezvous)
    except TrainingError as error:
        tell(error=str(error))
        return error.exit_code
    except ChildFailedError as error:
        rank, said = root_cause(error.failures)
        tell(error=said, rank=rank, world=options.processes * options.nodes)
        return TrainingError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
