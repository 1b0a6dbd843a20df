"""infra/kubernetes against Kubernetes' own schemas, and against itself: what one manifest names, another is."""

import importlib.metadata
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import prefect.workers.base
import prefect_kubernetes.worker
import pytest
import yaml
from prefect.cli.flow_run import _termination_intent
from prefect.utilities.templating import apply_values

from flows import worker
from tests import servers
from tests.servers import ROOT

FOLDER = ROOT / "infra/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = [
    m for r in KUSTOMIZATION["resources"] for m in yaml.safe_load_all((FOLDER / r).read_text())
]
POOLS = {path.stem.removeprefix("pool-"): json.loads(path.read_text()) for path in sorted(FOLDER.glob("pool-*.json"))}
VERSIONS = [
    "1.32",
    kubernetes_validate.latest_version().rpartition(".")[0],
]  # the oldest that is held to, and the newest


def _of(kind: str) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == kind}


def _job(pool: str) -> dict[str, Any]:
    """The job of a run in a pool whose settings were all left as they are."""
    template = POOLS[pool]
    given = {
        name: found["default"] for name, found in template["variables"]["properties"].items() if "default" in found
    }
    given |= {
        "name": "a-run",
        "command": "prefect flow-run execute",
        "env": given["env"] | {"A": "b"},
        "labels": {"c": "d"},
    }
    job = apply_values(template["job_configuration"], given)["job_manifest"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # what prefect-kubernetes does to a job before it sends it
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = container["args"].split()
    # these belong to the job, and prefect-kubernetes refuses a pod without them; Kubernetes drops them with a warning
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    return job


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod there is: its labels and spec."""
    for manifest in MANIFESTS:
        if "template" in manifest.get("spec", {}):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]
    for pool in POOLS:
        yield f"run in {pool}", _job(pool)["spec"]["template"]


def _complaint(manifest: dict[str, Any], version: str) -> str | None:
    """What Kubernetes' own schema finds wrong, if anything."""
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
    return None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: f"{m['kind']} {m['metadata']['name']}")
def test_manifests_are_valid(manifest: dict[str, Any], version: str) -> None:
    assert _complaint(manifest, version) is None


@pytest.mark.parametrize("pool", POOLS)
def test_a_run_whose_pod_is_stopped_hears_of_it_and_goes_on_elsewhere(pool: str) -> None:
    pod = _job(pool)["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= worker.GRACE_S
    (container,) = pod["containers"]
    (behavior,) = (entry["value"] for entry in container["env"] if entry["name"].endswith("SIGTERM_BEHAVIOR"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", behavior)
        assert _termination_intent() == "reschedule"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_jobs_of_runs_are_valid(pool: str, version: str) -> None:
    assert _complaint(_job(pool), version) is None


@pytest.mark.parametrize("pool", POOLS)
def test_all_that_can_be_set_for_a_run_does_something(pool: str) -> None:
    template = POOLS[pool]
    source = inspect.getsource(prefect_kubernetes.worker) + inspect.getsource(prefect.workers.base)
    read = set(re.findall(r"\.(\w+)\b", source))
    assert set(template["job_configuration"]) <= read
    assert set(template["variables"]["properties"]) == set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template)))


@pytest.mark.parametrize("pool", POOLS)
def test_a_run_goes_to_a_node_that_has_the_disk_which_it_may_fill(pool: str) -> None:
    spec = _job(pool)["spec"]["template"]["spec"]
    (cache,) = (volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if volume["name"] == "cache")
    assert spec["containers"][0]["resources"]["requests"]["ephemeral-storage"] == cache


def test_the_kustomization_takes_every_manifest() -> None:
    assert (KUSTOMIZATION["apiVersion"], KUSTOMIZATION["kind"]) == ("kustomize.config.k8s.io/v1beta1", "Kustomization")
    assert set(KUSTOMIZATION) == {"apiVersion", "kind", "namespace", "resources", "images"}
    assert {*KUSTOMIZATION["resources"], "kustomization.yaml"} == {path.name for path in FOLDER.glob("*.yaml")}
    assert KUSTOMIZATION["namespace"] in _of("Namespace")


def test_images_are_those_of_the_dockerfile_and_the_compose_file() -> None:
    version = importlib.metadata.version("drag")
    elsewhere = {found["image"] for found in servers.composed()["services"].values()}
    (ours,) = KUSTOMIZATION["images"]
    assert (ours["name"], ours["newTag"]) == ("drag-orchestrator", version)
    registry = ours["newName"].removesuffix("drag-orchestrator")
    for name, pod in _pods():
        for container in pod["spec"]["containers"]:
            image = container["image"].removeprefix(registry)
            assert (image if ":" in image else f"{image}:{version}") in elsewhere, name
    runs = {pool: _job(pool)["spec"]["template"]["spec"]["containers"][0]["image"] for pool in POOLS}
    assert runs == {
        "cpu": f"{registry}drag-orchestrator:{version}",
        "gpu-serving": f"{registry}drag-serving:{version}",
        "gpu-training": f"{registry}drag-training:{version}",
    }


def test_pods_are_what_the_namespace_admits() -> None:
    """Kubernetes' restricted policy, as far as these pods go: https://kubernetes.io/docs/concepts/security/pod-security-standards"""
    (namespace,) = _of("Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in _pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert all("hostPath" not in volume for volume in spec.get("volumes", [])), name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_each_part_finds_the_others() -> None:
    pods = [(pod["metadata"]["labels"], pod["spec"]) for _, pod in _pods()]

    def picked(labels: dict[str, str]) -> list[dict[str, Any]]:
        return [spec for has, spec in pods if labels.items() <= has.items()]

    for name, found in _of("Service").items():
        (spec,) = picked(found["spec"]["selector"])
        ports = {port["containerPort"] for container in spec["containers"] for port in container["ports"]}
        assert {port["port"] for port in found["spec"]["ports"]} <= ports, name
    for kind in ("Deployment", "StatefulSet"):
        for found in _of(kind).values():
            assert len(picked(found["spec"]["selector"]["matchLabels"])) == 1
    for spec in (spec for _, spec in pods):
        assert spec.get("serviceAccountName", "default") in {"default", *_of("ServiceAccount")}
        for container in spec["containers"]:
            assert {source["configMapRef"]["name"] for source in container.get("envFrom", [])} <= set(_of("ConfigMap"))
    (binding,) = _of("RoleBinding").values()
    assert binding["roleRef"]["name"] in _of("Role")
    assert {subject["name"] for subject in binding["subjects"]} <= set(_of("ServiceAccount"))
    settings = _of("ConfigMap")
    server = settings["drag-worker"]["data"]["PREFECT_API_URL"]
    assert re.fullmatch(r"http://prefect-server:4200/api", server)
    assert "prefect-server" in _of("Service")
    assert settings["prefect-server"]["data"]["PREFECT_SERVER_DATABASE_HOST"] in _of("Service")
    assert settings["prefect-server"]["data"]["PREFECT_REDIS_MESSAGING_HOST"] in _of("Service")


def test_the_server_is_set_as_the_tested_one_is() -> None:
    compose = servers.service("server")["environment"]
    ours = _of("ConfigMap")["prefect-server"]["data"]
    assert ours == {name: value for name, value in compose.items() if not re.search(r"PASSWORD|AUTH|KEY", name)}
    (container,) = _of("Deployment")["prefect-server"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == servers.service("server")["command"]
    (container,) = _of("Deployment")["prefect-services"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == servers.service("services")["command"]


def test_runs_cannot_reach_the_stores_and_nothing_reaches_them() -> None:
    policies = _of("NetworkPolicy")
    assert policies["nothing-comes-in"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    (rule,) = policies["server-to-stores"]["spec"]["ingress"]
    (source,) = rule["from"]
    let_in = source["podSelector"]["matchLabels"]
    labels = {name: pod["metadata"]["labels"] for name, pod in _pods()}
    assert {name for name, has in labels.items() if let_in.items() <= has.items()} == {
        "prefect-server",
        "prefect-services",
    }


def test_an_ingress_can_be_let_in() -> None:
    """What stands in a comment is right as well, once it is none."""
    text, removed = re.subn(r"# (- namespaceSelector)", r"\1", (FOLDER / "network.yaml").read_text())
    policies = list(yaml.safe_load_all(text))
    assert removed == 1
    assert [
        _complaint(policy, version) for policy in policies for version in VERSIONS if _complaint(policy, version)
    ] == []
    (to_server,) = (policy for policy in policies if policy["metadata"]["name"] == "namespace-to-server")
    (rule,) = to_server["spec"]["ingress"]
    assert [set(source) for source in rule["from"]] == [{"podSelector"}, {"namespaceSelector"}]


def test_what_the_readmes_commands_name_is_there_when_they_come_to_it() -> None:
    pages = (ROOT / "infra/README.md").read_text() + (ROOT / "infra/aws/README.md").read_text()
    found = re.findall(r"kubectl .*\b(deployment|service|serviceaccount)[/ ]([a-z-]+)", pages)
    assert {kind for kind, _ in found} == {"deployment", "service", "serviceaccount"}
    kinds = {"deployment": "Deployment", "service": "Service", "serviceaccount": "ServiceAccount"}
    assert {(kind, name) for kind, name in found if name not in _of(kinds[kind])} == set()
    assert pages.index("rollout status deployment/prefect-server") < pages.index("port-forward service/prefect-server")


def test_every_pool_has_a_worker_and_a_job_template() -> None:
    pools = set(yaml.safe_load((ROOT / "deployments/pools.yaml").read_text())["pools"])
    workers = [
        m["spec"]["template"]["spec"]["containers"][0]["args"] for n, m in _of("Deployment").items() if "worker" in n
    ]
    assert {args[args.index("--pool") + 1] for args in workers} == pools == set(POOLS)
    assert all(args[args.index("--type") + 1] == "kubernetes" for args in workers)


def test_secrets_are_referred_to_and_the_readme_makes_them() -> None:
    text = (ROOT / "infra/README.md").read_text()
    referred = {
        (found["name"], found["key"])
        for _, pod in _pods()
        for container in pod["spec"]["containers"]
        for variable in container.get("env", [])
        if (found := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    assert referred == {("postgres", "password"), ("prefect-api", "auth-string")}
    for name, key in referred:
        assert re.search(rf"create secret generic {name} .*--from-literal={key}=", text)
    given = _of("ConfigMap")["drag-worker"]["data"]
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_"
    assert (given[prefix + "NAME"], given[prefix + "KEY"]) in referred
    assert not _of("Secret")


def test_what_the_manifests_speak_of_exists() -> None:
    for path in FOLDER.glob("*.yaml"):
        for name in re.findall(r"\b(?:infra|flows|tasks|deployments)/[\w./-]*\w", path.read_text()):
            assert Path(ROOT / name).exists(), f"{path.name}: {name}"
