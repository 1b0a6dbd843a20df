"""Slots that runs hold while they use GPUs, so that one pool's runs, on whatever worker, do not take them from each other.

The limits are Prefect's global concurrency limits; deployments/pools.yaml says how many slots each has, one for each set of
GPUs. Only a run that belongs to a deployment needs a slot: a command on a machine of one's own waits for nobody.

A slot is a lease, which the run's process renews. When the process is killed the lease runs out, and the server gives the
slot to the next run at most about five minutes later. When the server does not answer as the lease is to be renewed, the
slot is lost, and what runs under it is ended rather than left to share its GPUs with the next run. A retry goes on from its
last checkpoint, or from the rollouts that are finished.

A server that keeps leases in memory, as it does by default, forgets them when it restarts, and then counts slots that nobody
holds: `prefect global-concurrency-limit update gpu-training --active-slots 0` frees them. One that keeps them in Redis
(infra/compose.yaml, infra/kubernetes) does not forget.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment

from tasks.errors import ConfigError
from tasks.logs import run_logger

Limit = Literal["gpu-serving", "gpu-training"]
LEASE_S = 300.0


@contextlib.contextmanager
def slot(limit: Limit, together: int = 1) -> Iterator[None]:
    """Hold a slot of the limit in the block, waiting for one if need be; in a run of no deployment, hold nothing.

    Args:
        together: runs that wait for each other with a slot each, as machines that train together do.

    Raises:
        ConfigError: the server has no such limit, or one with fewer slots than these runs would wait for for ever.
    """
    if not deployment.id:
        yield
        return
    slots, taken = _slots(limit)
    if slots < together:
        raise ConfigError(
            f"{together} machines are to work together, and the limit {limit} has slots for {slots} at once: give it, and the "
            f"pool's concurrency_limit, {together} in deployments/pools.yaml, and `drag deploy` again"
        )
    if taken >= slots:
        run_logger().info("Waiting for a slot of the limit %s: other runs hold all of them (%d)", limit, slots)
    with concurrency(limit, strict=True, lease_duration=LEASE_S):
        yield


def _slots(limit: Limit) -> tuple[int, int]:
    """How many slots a limit has, and how many of them are held."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound as error:
            raise ConfigError(f"the Prefect server has no concurrency limit {limit}: `drag deploy` makes it") from error
    return found.limit, found.active_slots
