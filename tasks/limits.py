"""Slots that runs hold while they use GPUs, so that one pool's runs, on whatever worker, do not take them from each other.

The limits are Prefect's global concurrency limits; deployments/pools.yaml says how many slots each has. Only a run that
belongs to a deployment needs a slot: a command on a machine of one's own waits for nobody.

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

from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.runtime import deployment

from tasks.errors import ConfigError

Limit = Literal["gpu-serving", "gpu-training"]
LEASE_S = 300.0


@contextlib.contextmanager
def slot(limit: Limit) -> Iterator[None]:
    """Hold a slot of the limit in the block, waiting for one if need be; in a run of no deployment, hold nothing.

    Raises:
        ConfigError: the server has no such limit.
    """
    if not deployment.id:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(concurrency(limit, strict=True, lease_duration=LEASE_S))
        except ConcurrencySlotAcquisitionError as error:
            if error.__cause__:  # the server did not answer, or refused
                raise
            raise ConfigError(f"the Prefect server has no concurrency limit {limit}: `drag deploy` makes it") from error
        yield
