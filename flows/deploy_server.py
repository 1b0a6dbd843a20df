"""What a Prefect server holds, brought to what deployments/ says: read first, written only where it differs.

Each function settles one object and tells what it did. What the files do not speak of stays as the server has it: a schedule
or automation that was paused in the UI, a pool's pause. What they do speak of, such as a deployment's parameters, is brought
back to what they say, but for a deployment's job variables (memory, GPUs, image …): it is given those that it lacks, and one
that it has stays, as it may have been set in the UI. Nothing is deleted.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple
from uuid import UUID

from prefect.blocks.system import Secret
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import ConcurrencyOptions, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import ActionTypes, CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema

from flows.deploy_files import AutomationSpec, BlockSpec, DeploymentSpec, PoolQueue, PoolSpec
from tasks.config.deployment import PoolType
from tasks.errors import ConfigError


class Settled(NamedTuple):
    """What became of one object on the server."""

    kind: str
    name: str
    outcome: Literal["created", "changed", "unchanged", "missing"]
    detail: str = ""


def block(client: SyncPrefectClient, name: str, spec: BlockSpec, value: str | None) -> Settled:
    """Fill a Secret or Webhook block, or leave it as it is where there is no value."""
    try:
        found = client.read_block_document_by_name(name, spec.type, include_secrets=True)
    except ObjectNotFound:
        if not value:
            return Settled("block", name, "missing", f"{spec.variable} is not set. {spec.description}")
        _filled(spec, value).save(name)
        return Settled("block", name, "created", f"from {spec.variable}")
    if not value or found.data["url" if spec.type == "webhook" else "value"] == value:
        return Settled("block", name, "unchanged")
    _filled(spec, value).save(name, overwrite=True)
    return Settled("block", name, "changed", f"from {spec.variable}")


def _filled(spec: BlockSpec, value: str) -> Secret[Any] | Webhook:
    if spec.type == "webhook":
        return Webhook(url=value, headers={"Content-Type": "application/json"})
    return Secret(value=value)


def pool(
    client: SyncPrefectClient, name: str, spec: PoolSpec, pool_type: PoolType, job_template: dict[str, Any]
) -> Settled:
    """Create or change a work pool.

    Raises:
        ConfigError: it exists with another type, which cannot be changed.
    """
    wanted = {
        "description": spec.description,
        "base_job_template": job_template,
        "concurrency_limit": spec.concurrency_limit,
    }
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=pool_type, **wanted))
        return Settled("pool", name, "created", pool_type)
    if found.type != pool_type:
        raise ConfigError(
            f"work pool {name} is of type {found.type}, and a pool's type stays: give --pool-type {found.type}, "
            f"or `prefect work-pool delete {name}` and deploy again"
        )
    return _settle(
        "pool", name, wanted, dict(found), lambda changed: client.update_work_pool(name, WorkPoolUpdate(**changed))
    )


def queue(client: SyncPrefectClient, pool_name: str, name: str, spec: PoolQueue) -> Settled:
    """Create or change a queue of a work pool. The pool's other queues make room for its priority."""
    wanted = spec.model_dump()
    try:
        found = client.read_work_queue_by_name(name, pool_name)
    except ObjectNotFound:
        client.create_work_queue(name, work_pool_name=pool_name, **wanted)
        return Settled("queue", f"{pool_name}/{name}", "created", f"priority {spec.priority}")
    return _settle(
        "queue", f"{pool_name}/{name}", wanted, dict(found), lambda c: client.update_work_queue(found.id, **c)
    )


def limit(client: SyncPrefectClient, name: str, slots: int) -> Settled:
    """Create or change a global concurrency limit. Slots that runs hold stay held."""
    wanted = {"limit": slots, "active": True}
    try:
        found = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, **wanted))
        return Settled("limit", name, "created", f"{slots} at once")

    def update(changed: Mapping[str, Any]) -> None:
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(**changed))

    return _settle("limit", name, wanted, dict(found), update)


def deployment(client: SyncPrefectClient, spec: DeploymentSpec, settable: Collection[str]) -> Settled:
    """Create or change a deployment with its schedules.

    Args:
        settable: job variables that its pool's job template has: processes have no GPUs of their own.
    """
    flow = spec.flow()
    name = f"{flow.name}/{spec.name}"
    one_at_a_time = spec.concurrency_limit
    job_variables = {name: value for name, value in spec.work_pool.job_variables.items() if name in settable}
    wanted: dict[str, Any] = {
        "entrypoint": spec.entrypoint,
        "description": spec.description,
        "tags": spec.tags,
        "work_pool_name": spec.work_pool.name,
        "work_queue_name": spec.work_pool.work_queue_name,
        "job_variables": job_variables,
        "parameters": spec.parameters,
        "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
        "enforce_parameter_schema": True,
        "pull_steps": [],
        "path": None,
        "concurrency_limit": one_at_a_time and one_at_a_time.limit,
        "concurrency_options": one_at_a_time
        and ConcurrencyOptions.model_validate({"collision_strategy": one_at_a_time.collision_strategy}),
    }
    schedules = {s.slug: CronSchedule(cron=s.cron, timezone=s.timezone) for s in spec.schedules}
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        first = [DeploymentScheduleCreate(slug=slug, schedule=schedule) for slug, schedule in schedules.items()]
        client.create_deployment(client.create_flow_from_name(flow.name), spec.name, schedules=first, **wanted)
        return Settled("deployment", name, "created", f"in {spec.work_pool.name}")
    wanted["job_variables"] = job_variables | found.job_variables
    has = dict(found) | {"concurrency_limit": found.global_concurrency_limit and found.global_concurrency_limit.limit}
    if (found.work_pool_name, found.work_queue_name) != (spec.work_pool.name, spec.work_pool.work_queue_name):
        has |= {
            "work_pool_name": None,
            "work_queue_name": None,
        }  # given a pool alone, the server takes its default queue
    there = {schedule.slug: schedule for schedule in found.schedules if schedule.slug in schedules}
    has["schedules"] = {slug: schedule.schedule for slug, schedule in there.items()}
    wanted["schedules"] = schedules

    def update(changed: dict[str, Any]) -> None:
        changed = dict(changed)
        # one by one: given with the deployment, they would take the place of those that were added in the UI
        for slug, schedule in changed.pop("schedules", {}).items():
            if slug in there:
                client.update_deployment_schedule(found.id, there[slug].id, schedule=schedule)
            else:
                client.create_deployment_schedules(found.id, [DeploymentScheduleCreate(slug=slug, schedule=schedule)])
        if changed:
            client.update_deployment(found.id, DeploymentUpdate(**changed))

    return _settle("deployment", name, wanted, has, update)


def automation(client: SyncPrefectClient, spec: AutomationSpec, webhooks: Mapping[str, UUID]) -> Settled:
    """Create or change an automation; without the block that holds its webhook there is none.

    Args:
        webhooks: ids of the webhook blocks that exist, by name.
    """
    action: ActionTypes
    if spec.webhook is None:
        action = ChangeFlowRunState(state=StateType.CRASHED, message=spec.crashed)
    elif spec.webhook in webhooks:
        action = CallWebhook(block_document_id=webhooks[spec.webhook], payload=spec.payload or "")
    else:
        return Settled("automation", spec.name, "missing", f"needs the block {spec.webhook}")
    wanted = AutomationCore(name=spec.name, description=spec.description, trigger=spec.trigger, actions=[action])
    found = client.read_automations_by_name(spec.name)
    if not found:
        client.create_automation(wanted)
        return Settled("automation", spec.name, "created", f"tells {spec.webhook}" if spec.webhook else "marks runs")
    kept = wanted.model_copy(update={"enabled": found[0].enabled})
    has = AutomationCore.model_validate(found[0].model_dump())
    return _settle(
        "automation", spec.name, dict(kept), dict(has), lambda _: client.update_automation(found[0].id, kept)
    )


def _settle(
    kind: str, name: str, wanted: Mapping[str, Any], has: Mapping[str, Any], write: Callable[[dict[str, Any]], object]
) -> Settled:
    """Write the fields that differ, if any do."""
    changed = {field: value for field, value in wanted.items() if has[field] != value}
    if not changed:
        return Settled(kind, name, "unchanged")
    write(changed)
    return Settled(kind, name, "changed", ", ".join(changed))
