"""`drag deploy`: what it makes of deployments/ on a real server, what it leaves alone, what it refuses."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError

from flows import deploy_files
from flows.cli import COMMANDS, main
from flows.deploy import deploy
from flows.deploy_server import Settled
from flows.improve import steps
from tasks import config
from tasks.errors import ConfigError, ServerError
from tests.workers import API, listed

SECRETS = {"OPENAI_API_KEY": "sk-secret-of-the-model-server", "AWS_ACCESS_KEY_ID": "AKIA-nobody-may-see"}
KINDS = ["work_pools", "work_queues", "v2/concurrency_limits", "deployments", "automations"]
KINDS += ["block_documents", "block_types", "block_schemas", "flows"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in deploy_files.read_pools().blocks.values():
        monkeypatch.delenv(spec.variable, raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of deployments/ to change, which is then what is deployed."""
    copy = tmp_path / "deployments"
    shutil.copytree(deploy_files.FOLDER, copy)
    monkeypatch.setattr(deploy_files, "FOLDER", copy)
    return copy


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def _state(url: str) -> dict[str, list[dict[str, Any]]]:
    """All that the server says about what `drag deploy` makes, with the times of its last changes."""
    return {kind: listed(url, kind) for kind in KINDS}


def _outcomes(settled: list[Settled], outcome: str) -> list[str]:
    return [f"{made.kind} {made.name}" for made in settled if made.outcome == outcome]


def _deployed(url: str, name: str) -> dict[str, Any]:
    return API.get(f"{url}/deployments/name/{name}").json()


def test_deploying_twice_changes_nothing(whole_server: str) -> None:
    settings = config.Deploy(storage="s3://bucket/drag")
    first = deploy(settings)
    assert _outcomes(first, "missing") == [
        "block drag-aws-secret-access-key",
        "block drag-aws-endpoint-url",
        "block drag-aws-default-region",
        "block drag-hf-token",
        "block drag-notify",
        "automation Nightly collection failed",
        "automation Too many rollouts failed",
    ]
    assert len(_outcomes(first, "created")) == len(first) - 7
    before = _state(whole_server)
    second = deploy(settings)
    assert _outcomes(second, "created") == _outcomes(second, "changed") == []
    assert _state(whole_server) == before


def test_what_is_on_the_server_is_what_the_files_say(whole_server: str) -> None:
    deploy(config.Deploy(storage="s3://bucket/drag"))
    queues = {(q["work_pool_name"], q["name"]): q["priority"] for q in listed(whole_server, "work_queues")}
    for pool in ("cpu", "gpu-serving", "gpu-training"):
        assert queues[pool, "interactive"] < queues[pool, "nightly"] < queues[pool, "default"]
    limits = {limit["name"]: limit["limit"] for limit in listed(whole_server, "v2/concurrency_limits")}
    assert limits["gpu-serving"] == limits["gpu-training"] == 1

    nightly = _deployed(whole_server, "collect/nightly")
    assert nightly["schedules"][0]["schedule"]["timezone"] == "Europe/Berlin"
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert (nightly["work_pool_name"], nightly["work_queue_name"]) == ("gpu-serving", "nightly")
    recipe = yaml.safe_load((deploy_files.FOLDER / "recipes" / "nightly.yaml").read_text())
    assert nightly["parameters"] == recipe | {"storage": "s3://bucket/drag"}
    assert all(d["pull_steps"] == [] and d["path"] is None for d in listed(whole_server, "deployments"))

    environment = {p["name"]: _environment_of(p) for p in listed(whole_server, "work_pools")}
    key_id = {"AWS_ACCESS_KEY_ID": "{{ prefect.blocks.secret.drag-aws-access-key-id }}"}
    assert environment["cpu"] == environment["gpu-training"] == key_id  # of the blocks that exist
    assert environment["gpu-serving"] == key_id | {"OPENAI_API_KEY": "{{ prefect.blocks.secret.drag-openai-api-key }}"}
    said = json.dumps(_state(whole_server))
    assert not any(secret in said for secret in SECRETS.values())


def _environment_of(pool: dict[str, Any]) -> dict[str, str]:
    return pool["base_job_template"]["variables"]["properties"]["env"]["default"]


def test_only_what_differs_is_written_and_what_people_set_elsewhere_stays(
    whole_server: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.Deploy(storage="s3://bucket/drag")
    monkeypatch.setenv("DRAG_WEBHOOK_URL", "http://127.0.0.1:9/before")
    deploy(settings)
    nightly = _deployed(whole_server, "collect/nightly")
    schedule = nightly["schedules"][0]
    of_schedule = f"{whole_server}/deployments/{nightly['id']}/schedules/{schedule['id']}"
    API.patch(of_schedule, json={"active": False})
    more = {"job_variables": {"memory": "1Ti", "env": {"HF_HUB_OFFLINE": "1"}}}
    API.patch(f"{whole_server}/deployments/{nightly['id']}", json=more)
    automation = listed(whole_server, "automations")[0]
    API.patch(f"{whole_server}/automations/{automation['id']}", json={"enabled": False})

    monkeypatch.setenv("DRAG_WEBHOOK_URL", "http://127.0.0.1:9/after")
    monkeypatch.delenv("OPENAI_API_KEY")
    _edit(files / "prefect.yaml", "description: Compares runs that", "description: Sets side by side runs that")
    _edit(files / "prefect.yaml", 'cron: "0 1 * * *"', 'cron: "30 2 * * *"')
    _edit(files / "pools.yaml", "gpu-training: 1 ", "gpu-training: 2 ")
    _edit(files / "pools.yaml", "Training on all GPUs", "Training with all GPUs")
    _edit(files / "automations.yaml", "failed or crashed", "crashed or failed")
    changed = deploy(settings)
    assert _outcomes(changed, "changed") == [
        "block drag-notify",
        "pool gpu-training",
        "limit gpu-training",
        "deployment collect/nightly",
        "deployment compare/compare",
        "automation Nightly collection failed",
    ]
    assert _outcomes(changed, "created") == []
    assert _deployed(whole_server, "collect/nightly")["job_variables"] == more["job_variables"]
    after = _deployed(whole_server, "collect/nightly")["schedules"]
    assert [(s["id"], s["active"], s["schedule"]["cron"]) for s in after] == [(schedule["id"], False, "30 2 * * *")]
    assert [a["enabled"] for a in listed(whole_server, "automations") if a["id"] == automation["id"]] == [False]
    assert _outcomes(deploy(settings), "changed") == []


def test_a_schedule_that_was_added_in_the_ui_stays_and_unsettles_nothing(whole_server: str, files: Path) -> None:
    settings = config.Deploy(storage="s3://bucket/drag")
    deploy(settings)
    nightly = _deployed(whole_server, "collect/nightly")
    of_schedules = f"{whole_server}/deployments/{nightly['id']}/schedules"
    API.patch(f"{of_schedules}/{nightly['schedules'][0]['id']}", json={"active": False})
    added = {"schedule": {"cron": "0 13 * * 6", "timezone": "UTC"}, "active": True}
    API.post(of_schedules, json=[added, added | {"slug": "saturdays"}]).raise_for_status()

    def stands() -> list[tuple[str | None, bool, str]]:
        after = _deployed(whole_server, "collect/nightly")["schedules"]
        return sorted((s["slug"] or "", s["active"], s["schedule"]["cron"]) for s in after)

    kept = [("", True, "0 13 * * 6"), ("saturdays", True, "0 13 * * 6")]
    assert _outcomes(deploy(settings), "changed") == []
    assert stands() == sorted([*kept, ("nightly", False, "0 1 * * *")])
    _edit(files / "prefect.yaml", 'cron: "0 1 * * *"', 'cron: "30 2 * * *"')
    assert _outcomes(deploy(settings), "changed") == ["deployment collect/nightly"]
    assert stands() == sorted([*kept, ("nightly", False, "30 2 * * *")])
    API.delete(f"{of_schedules}/{nightly['schedules'][0]['id']}").raise_for_status()
    assert _outcomes(deploy(settings), "changed") == ["deployment collect/nightly"]
    assert stands() == sorted([*kept, ("nightly", True, "30 2 * * *")])


def test_kubernetes_jobs_get_image_gpus_and_references_to_secrets(whole_server: str) -> None:
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    deploy(config.Deploy(storage="s3://bucket/drag"))  # the blocks
    gpus = {}
    for pool in deploy_files.read_pools().pools:
        reference = {"AWS_ACCESS_KEY_ID": "{{ prefect.blocks.secret.drag-aws-access-key-id }}"}
        template = deploy_files.job_template(pool, "kubernetes", reference)
        resolved = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, {}))
        job = resolved.job_manifest["spec"]["template"]["spec"]
        (container,) = job["containers"]
        assert resolved.env["AWS_ACCESS_KEY_ID"] == SECRETS["AWS_ACCESS_KEY_ID"]
        assert re.fullmatch(r"registry\.example\.com/drag-(orchestrator|serving|training):0\.1\.0", container["image"])
        assert job["serviceAccountName"] == "drag-run"
        assert job["nodeSelector"]
        assert not re.search(r"\{\{", json.dumps(job))
        gpus[pool] = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == {"cpu": None, "gpu-serving": 1, "gpu-training": 8}


def test_only_a_training_takes_a_training_host(whole_server: str) -> None:
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = deploy_files.job_template("gpu-training", "kubernetes", {})
    got = {}
    for spec in deploy_files.read_deployments("s3://bucket/drag"):
        if spec.work_pool.name == "gpu-training":
            given = spec.work_pool.job_variables
            resolved = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, given))
            job = resolved.job_manifest["spec"]["template"]["spec"]
            resources = job["containers"][0]["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            got[spec.name] = (resources["limits"]["nvidia.com/gpu"], resources["requests"], job["nodeSelector"])
    gpus, anywhere = {"nvidia.com/gpu.present": "true"}, {"kubernetes.io/arch": "amd64"}
    disk = {"ephemeral-storage": "200Gi"}
    assert got == {
        "finetune": (8, {"cpu": "64", "memory": "512Gi", **disk}, gpus),
        "merge": (0, {"cpu": "8", "memory": "64Gi", **disk}, anywhere),
        "import": (0, {"cpu": "4", "memory": "16Gi", **disk}, anywhere),
    }


def test_pools_change_their_type_when_they_are_deleted_as_advised(whole_server: str) -> None:
    deploy(config.Deploy(storage="s3://bucket/drag"))
    assert _deployed(whole_server, "merge/merge")["job_variables"] == {}  # processes have no GPUs of their own
    settings = config.Deploy(storage="s3://bucket/drag", pool_type="kubernetes")
    with pytest.raises(ConfigError, match="prefect work-pool delete cpu"):
        deploy(settings)
    for pool in deploy_files.read_pools().pools:
        API.delete(f"{whole_server}/work_pools/{pool}")
    made = deploy(settings)
    assert [m.detail for m in made if m.kind == "pool"] == ["kubernetes"] * 3
    assert {m.outcome for m in made if m.kind == "deployment"} == {"changed"}
    again = deploy(settings)
    assert _outcomes(again, "created") == _outcomes(again, "changed") == []

    merge = _deployed(whole_server, "merge/merge")
    assert merge["job_variables"]["gpus"] == 0
    assert _deployed(whole_server, "finetune/finetune")["job_variables"] == {}
    of_people = {"gpus": 1, "image": "registry.example.com/ours:1"}
    API.patch(f"{whole_server}/deployments/{merge['id']}", json={"job_variables": of_people})
    assert _outcomes(deploy(settings), "changed") == ["deployment merge/merge"]
    assert _deployed(whole_server, "merge/merge")["job_variables"] == merge["job_variables"] | of_people
    assert _outcomes(deploy(settings), "changed") == []


def test_every_flow_has_a_deployment_in_a_pool_and_queue_that_exist() -> None:
    pools = deploy_files.read_pools().pools
    deployments = deploy_files.read_deployments("s3://bucket/drag")
    commands = {command.runs.replace(":", ".") for name, command in COMMANDS.items() if name not in ("infer", "demo")}
    assert {d.entrypoint for d in deployments} == (commands - {"flows.deploy.deploy"}) | {"flows.prepare.prepare"}
    for spec in deployments:
        assert spec.work_pool.work_queue_name in pools[spec.work_pool.name].queues
    named = {f"{spec.flow().name}/{spec.name}" for spec in deployments}
    improve = config.Improve(ingest=config.Ingest(documents="d"))
    assert {f"{step.name}/{step.name}" for step, _ in steps(improve)} <= named
    PrefectYamlModel.model_validate({"pull": [], "deployments": [spec.model_dump() for spec in deployments]})


def test_what_cannot_be_is_refused_before_the_server_is_asked(files: Path) -> None:
    def refused(file: str, old: str, new: str, match: str) -> None:
        before = (files / file).read_text()
        _edit(files / file, old, new)
        read = {"pools.yaml": deploy_files.read_pools, "automations.yaml": deploy_files.read_automations}
        with pytest.raises(ConfigError, match=match):
            read.get(file, lambda: deploy_files.read_deployments("s3://bucket/drag"))()
        (files / file).write_text(before)

    refused("recipes/nightly.yaml", "split: train", "split: midnight", "nightly")
    refused("prefect.yaml", "{{ recipes.nightly }}", "{{ recipes.nightlife }}", "nothing fills in")
    refused("prefect.yaml", 'cron: "0 1 * * *"', "krone: 1", "krone")
    refused("prefect.yaml", "{gpus: 0, ", "{gpu: 0, ", "gpu-training have no gpu$")
    refused("prefect.yaml", "cpu: &cpu {name: cpu,", "cpu: &cpu {name: cpus,", "no pool cpus")
    refused("pools.yaml", "secret.drag-hf-token", "secret.drag-hf-tokens", "no secret block")
    refused("pools.yaml", '"{{ prefect.blocks.secret.drag-hf-token }}"', "hf-plain-text", "no secret block")
    refused("automations.yaml", "[drag.collect.failed-share]", "drag", "expect")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"storage": "drag-data"}, "absolute"),
        ({"storage": "/shared/drag", "pool_type": "kubernetes"}, "s3://"),
        ({}, "required"),
    ],
)
def test_storage_that_runs_could_not_reach_is_refused(values: dict[str, str], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        config.Deploy.model_validate(values)


def test_without_a_server_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert main(["deploy", "--storage", "/shared/drag"]) == ConfigError.exit_code
    assert "prefect server start" in capsys.readouterr().err
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert main(["deploy", "--storage", "/shared/drag"]) == ServerError.exit_code
