"""deploy: everything that deployments/ says, onto the Prefect server that PREFECT_API_URL names.

    export PREFECT_API_URL=http://HOST:4200/api      # and what fills the blocks: deployments/pools.yaml names the variables
    drag deploy --storage s3://BUCKET/PREFIX
    python -m flows.worker --pool cpu                # on a machine of each pool: cpu, gpu-serving, gpu-training

Pools, queues, limits, blocks, deployments and automations are created, or changed where they differ; run again, it changes
nothing. A variable that is not set leaves its block alone. What is no longer in the files is not deleted from the server.
"""

import os
from collections.abc import Collection

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings
from rich.console import Console
from rich.table import Table

from flows import deploy_files, deploy_server
from flows.deploy_server import Settled
from tasks import config
from tasks.errors import ConfigError, ServerError

_COLOURS = {"created": "green", "changed": "yellow", "unchanged": "dim", "missing": "red"}


def deploy(settings: config.Deploy) -> list[Settled]:
    """Bring the server to what the files say, and show what that took.

    Raises:
        ConfigError: no server is named, or a file says something that cannot be.
        ServerError: the server does not answer, or refuses.
    """
    url = get_current_settings().api.url
    if not url:
        raise ConfigError(
            "PREFECT_API_URL names no Prefect server to deploy to. `prefect server start` starts one on this machine: "
            "export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    if os.environ.get("AWS_SESSION_TOKEN"):
        raise ConfigError(
            "the AWS keys in the environment are a session's, which ends; every run would fail from then on. Unset them where "
            "runs have a role of their own, else set the keys of a user made for runs, and unset AWS_SESSION_TOKEN"
        )
    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise ServerError(f"no Prefect server answers at {url}: {error}")
        try:
            settled = _settle_all(client, settings)
        except PrefectHTTPStatusError as error:
            raise ServerError(f"the Prefect server at {url} refused: {error}") from error
    _show(settled, url)
    return settled


def _settle_all(client: SyncPrefectClient, settings: config.Deploy) -> list[Settled]:
    """In the order in which one needs another: pools refer to blocks, deployments to pools, automations to blocks."""
    pools = deploy_files.read_pools()
    automations = deploy_files.read_automations()
    deployments = deploy_files.read_deployments(settings.storage)

    settled = [
        deploy_server.block(client, name, spec, os.environ.get(spec.variable)) for name, spec in pools.blocks.items()
    ]
    missing = {made.name for made in settled if made.outcome == "missing"}
    job_variables: dict[str, Collection[str]] = {}
    for name, spec in pools.pools.items():
        environment = {v: ref for v, ref in spec.environment.items() if deploy_files.referred_block(ref) not in missing}
        template = deploy_files.job_template(name, settings.pool_type, environment)
        job_variables[name] = deploy_files.variables(template)
        settled.append(deploy_server.pool(client, name, spec, settings.pool_type, template))
        settled += [deploy_server.queue(client, name, queue, wanted) for queue, wanted in spec.queues.items()]
    settled += [deploy_server.limit(client, name, slots) for name, slots in pools.limits.items()]
    settled += [deploy_server.deployment(client, spec, job_variables[spec.work_pool.name]) for spec in deployments]
    webhooks = {
        name: client.read_block_document_by_name(name, spec.type).id
        for name, spec in pools.blocks.items()
        if spec.type == "webhook" and name not in missing
    }
    return settled + [deploy_server.automation(client, spec, webhooks) for spec in automations]


def _show(settled: list[Settled], url: str) -> None:
    table = Table(title=f"Deployed to {url}", title_justify="left")
    for column in ("", "name", "", ""):
        table.add_column(column)
    for made in settled:
        table.add_row(made.kind, made.name, f"[{_COLOURS[made.outcome]}]{made.outcome}[/]", made.detail)
    console = Console(stderr=True)
    console.print(table)
    if all(made.outcome in ("unchanged", "missing") for made in settled):
        console.print("Nothing has changed.")
