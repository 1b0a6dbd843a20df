"""What deployments/ says, as typed data: prefect.yaml with its recipes, pools.yaml, automations.yaml."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from prefect.events.schemas.automations import EventTrigger
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.templating import apply_values, find_placeholders
from pydantic import BaseModel, Field, model_validator

from flows.flags import load_recipe
from tasks.config.base import Settings, checked, dotted
from tasks.config.deployment import PoolType
from tasks.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deployments"
M = TypeVar("M", bound=BaseModel)
Positive = Annotated[int, Field(ge=1)]


class PoolQueue(Settings):
    """A queue of a pool: workers take runs from the queue of the lowest priority number first."""

    priority: Positive = Field(description="1 goes first.")
    description: str = Field(description="What it is for; shown in the UI.")
    concurrency_limit: Positive | None = Field(default=None, description="Runs of this queue at once; any when empty.")


class PoolSpec(Settings):
    """A work pool."""

    description: str = Field(description="What runs in it; shown in the UI.")
    queues: dict[str, PoolQueue] = Field(min_length=1, description="Its queues by name.")
    concurrency_limit: Positive | None = Field(default=None, description="Runs in the pool at once; any when empty.")
    environment: dict[str, str] = Field(default={}, description="Variable of its runs → reference to a Secret block.")


class BlockSpec(Settings):
    """A block that holds a secret, filled from the environment of whoever deploys."""

    variable: str = Field(description="Environment variable that fills it.")
    description: str = Field(description="What it is needed for.")
    type: Literal["secret", "webhook"] = Field(default="secret", description="Secret: a value. Webhook: an address.")


class PoolsFile(Settings):
    """pools.yaml."""

    definitions: dict[str, Any] = Field(default={}, description="YAML anchors that the rest refers to.")
    pools: dict[str, PoolSpec] = Field(description="Work pools by name.")
    limits: dict[str, Positive] = Field(description="Global concurrency limits: name → slots.")
    blocks: dict[str, BlockSpec] = Field(description="Blocks by name.")

    @model_validator(mode="after")
    def _secrets_are_references(self) -> "PoolsFile":
        known = {name for name, block in self.blocks.items() if block.type == "secret"}
        for pool in self.pools.values():
            for variable, reference in pool.environment.items():
                if referred_block(reference) not in known:
                    raise ValueError(f"{variable}: {reference!r} refers to no secret block of this file")
        return self


class AutomationSpec(Settings):
    """A trigger, and what it does: call a webhook, or mark the run that it is about as crashed."""

    name: str = Field(description="Its name in the UI.")
    description: str = Field(description="When it fires.")
    trigger: EventTrigger = Field(description="Prefect's event trigger.")
    webhook: str | None = Field(default=None, description="Webhook block of pools.yaml that is called.")
    payload: str | None = Field(default=None, description="What is posted to it: a Jinja template of JSON.")
    crashed: str | None = Field(default=None, description="Marks the run as crashed, with this message.")

    @model_validator(mode="after")
    def _does_one_thing(self) -> "AutomationSpec":
        if (self.webhook is None) == (self.crashed is None) or (self.webhook is None) != (self.payload is None):
            raise ValueError("give webhook and payload, or crashed")
        return self


class AutomationsFile(Settings):
    """automations.yaml."""

    automations: list[AutomationSpec] = Field(description="What is noticed.")


class WorkPoolRef(Settings):
    """Where a deployment's runs wait."""

    name: str = Field(description="Work pool.")
    work_queue_name: str = Field(description="Its queue.")
    job_variables: dict[str, Any] = Field(
        default={}, description="What its jobs get, where they are to have other than the pool's jobs on a cluster."
    )


class ScheduleSpec(Settings):
    """When a deployment runs by itself. Pausing it in the UI outlasts `drag deploy`."""

    slug: str = Field(description="Name that tells it from others of the deployment.")
    cron: str = Field(description="Minute, hour, day, month, weekday.")
    timezone: str = Field(description="IANA time zone of these, such as Europe/Berlin.")


class ConcurrencySpec(Settings):
    """Runs of one deployment at once."""

    limit: Positive = Field(description="How many.")
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = Field(description="What becomes of one too many.")


class DeploymentSpec(Settings):
    """A deployment, as prefect.yaml writes it."""

    name: str = Field(description="Its name in the UI.")
    entrypoint: str = Field(pattern=r"^flows(\.\w+)+$", description="Module path of the flow.")
    description: str = Field(description="What it does, in Markdown.")
    tags: list[str] = Field(description="For the UI's filters.")
    work_pool: WorkPoolRef = Field(description="Where its runs wait.")
    parameters: dict[str, Any] = Field(
        default={}, description="The flow's parameters, as its form shows them at first."
    )
    schedules: list[ScheduleSpec] = Field(default=[], description="When it runs by itself.")
    concurrency_limit: ConcurrencySpec | None = Field(default=None, description="Runs at once; any when empty.")

    def flow(self) -> Flow[..., Any]:
        """The flow that it runs."""
        return load_flow_from_entrypoint(self.entrypoint)


class DeploymentsFile(Settings):
    """prefect.yaml."""

    name: str = Field(description="The project.")
    pull: list[dict[str, Any]] = Field(max_length=0, description="Nothing: the code is installed where runs are.")
    definitions: dict[str, Any] = Field(default={}, description="YAML anchors that the rest refers to.")
    deployments: list[DeploymentSpec] = Field(description="Deployments.")


def referred_block(reference: str) -> str | None:
    """The name of the Secret block that a template refers to, if it does."""
    found = re.fullmatch(r"\{\{ prefect\.blocks\.secret\.([a-z0-9-]+) \}\}", reference)
    return found[1] if found else None


def read_pools() -> PoolsFile:
    """pools.yaml.

    Raises:
        ConfigError: it says something that cannot be.
    """
    return _read(PoolsFile, "pools.yaml", load_recipe(str(FOLDER / "pools.yaml")))


def read_automations() -> list[AutomationSpec]:
    """automations.yaml.

    Raises:
        ConfigError: it says something that cannot be.
    """
    return _read(AutomationsFile, "automations.yaml", load_recipe(str(FOLDER / "automations.yaml"))).automations


def read_deployments(storage: str) -> list[DeploymentSpec]:
    """prefect.yaml, its templates filled in; every deployment's settings name the storage root.

    Raises:
        ConfigError: it says something that cannot be, or a flow would refuse the parameters, or a pool the job variables.
    """
    content = load_recipe(str(FOLDER / "prefect.yaml"))
    recipes = {file.stem: load_recipe(str(file)) for file in sorted((FOLDER / "recipes").glob("*.yaml"))}
    values = {"storage": storage.rstrip("/"), "recipes": recipes}
    for placeholder in find_placeholders(content):
        if placeholder.name not in ("storage", *(f"recipes.{name}" for name in recipes)):
            raise ConfigError(f"prefect.yaml: nothing fills in {placeholder.full_match}")
    filled = _read(DeploymentsFile, "prefect.yaml", apply_values(content, values))
    pools = read_pools().pools
    for spec in filled.deployments:
        _refuse_other_jobs(spec, pools)
    return [_with_storage(spec, storage) for spec in filled.deployments]


def _refuse_other_jobs(spec: DeploymentSpec, pools: Collection[str]) -> None:
    pool = spec.work_pool
    if pool.name not in pools:
        raise ConfigError(f"prefect.yaml, {spec.name}: pools.yaml has no pool {pool.name}")
    if unknown := pool.job_variables.keys() - variables(job_template(pool.name, "kubernetes", {})):
        raise ConfigError(
            f"prefect.yaml, {spec.name}: jobs of the pool {pool.name} have no {', '.join(sorted(unknown))}"
        )


def _with_storage(spec: DeploymentSpec, storage: str) -> DeploymentSpec:
    parameters = {**spec.parameters, "storage": storage}
    try:
        spec.flow().validate_parameters(parameters)
    except ConfigError as error:
        raise ConfigError(f"prefect.yaml, {spec.name}: {error}") from error
    return spec.model_copy(update={"parameters": parameters})


def job_template(pool: str, pool_type: PoolType, environment: dict[str, str]) -> dict[str, Any]:
    """A pool's base job template: Prefect's own for processes, infra/kubernetes/pool-NAME.json for jobs.

    Args:
        environment: variable → reference to a block, which the worker resolves when it starts a run.
    """
    if pool_type == "kubernetes":
        template = json.loads((ROOT / "infra" / "kubernetes" / f"pool-{pool}.json").read_text(encoding="utf-8"))
    else:
        from prefect.workers.process import ProcessWorker

        template = ProcessWorker.get_default_base_job_template()
    variable = variables(template)["env"]
    variable["default"] = variable.get("default", {}) | environment
    return template


def variables(template: dict[str, Any]) -> dict[str, Any]:
    """What can be set for a pool's jobs: name → JSON schema."""
    return template["variables"]["properties"]


def _read(model: type[M], name: str, content: dict[str, Any]) -> M:
    return checked(model, content, lambda location: f"{name}: {dotted(location)}")
