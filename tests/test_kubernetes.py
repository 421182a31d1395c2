"""launch/kubernetes: valid to the schemas of Kubernetes, KubeRay and JobSet, and of one piece."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TOP
from tests.launching import DELETE, changed, check_understood, image_version, pinned

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")
referencing = pytest.importorskip("referencing")

FOLDER = TOP / "launch/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
RELEASES = ("1.31", "1.37")
"""Of Kubernetes: the oldest that the kustomization names, and the newest that the package knows."""
SCHEMAS = {"RayJob": "rayjob-v1.json", "JobSet": "jobset-v1alpha2.json"}


def resources() -> dict[str, dict[str, Any]]:
    """By kind and name, as written."""
    documents = [one for name in KUSTOMIZATION["resources"] for one in yaml.safe_load_all((FOLDER / name).read_text())]
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in documents}


RESOURCES = resources()
TRAIN, EVALUATE, GENERATE = "JobSet/tarflow-train", "RayJob/tarflow-evaluate", "RayJob/tarflow-generate"
JOB = ("spec", "replicatedJobs", 0, "template", "spec")
CLUSTER = ("spec", "rayClusterSpec")


@functools.cache
def schema(release: str, file: str) -> Any:
    """One of Kubernetes's own, in which unknown fields are errors; the package has them for every release."""
    return kubernetes_validate.utils.schema_contents(
        f"kubernetes-json-schema/v{release}.0-local-strict/{file}", release
    )


def check(resource: dict[str, Any], release: str = RELEASES[-1]) -> None:
    """Raises jsonschema's ValidationError, also for fields that are not known."""
    kind, api = resource["kind"], resource["apiVersion"].replace(".k8s.io/", "-")
    if kind in SCHEMAS:
        wanted = json.loads((TOP / "tests/schemas" / SCHEMAS[kind]).read_text())
    else:
        wanted = schema(release, f"{kind.lower()}-{api}.json")
    definitions = referencing.Resource.from_contents(schema(release, "_definitions.json"))
    registry = definitions @ referencing.Registry()
    jsonschema.Draft202012Validator(wanted, registry=registry).validate(resource)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", RESOURCES)
def test_resources_are_valid(name: str, release: str) -> None:
    check(RESOURCES[name], release)


MISTAKES: list[tuple[str, Sequence[str | int], Any, str]] = [
    (TRAIN, ("apiVersion",), "jobset.x-k8s.io/v1", "was expected"),
    (TRAIN, ("spec", "failurePolicy", "rules", 0, "action"), "Restart", "is not one of"),
    (TRAIN, ("spec", "failurePolicy", "rules", 0, "name"), DELETE, "'name' is a required property"),
    (TRAIN, ("spec", "maxRestarts"), 3, "Additional properties"),
    (TRAIN, (*JOB, "parallelism"), "2", "is not of type 'integer'"),
    (TRAIN, (*JOB, "podFailurePolicy", "rules", 0, "action"), DELETE, "'action' is a required property"),
    (TRAIN, (*JOB, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), DELETE, "'values' is a required"),
    (TRAIN, (*JOB, "template", "spec", "containers", 0, "name"), DELETE, "'name' is a required property"),
    (TRAIN, (*JOB, "template", "spec", "containers", 0, "livenessProbes"), {}, "Additional properties"),
    (TRAIN, (*JOB, "template", "spec", "containers", 0, "ports", 0, "containerPort"), "29500", "not of type 'integer'"),
    (EVALUATE, ("spec", "entrypoint"), ["tarflow-scale"], "is not of type 'string'"),
    (EVALUATE, ("spec", "ttlSecondsAfterFinish"), 600, "Additional properties"),
    (EVALUATE, (*CLUSTER, "authOptions", "mode"), "password", "is not one of"),
    (EVALUATE, (*CLUSTER, "rayVersion"), 2.6, "is not of type 'string'"),
    (EVALUATE, (*CLUSTER, "headGroupSpec"), DELETE, "'headGroupSpec' is a required property"),
    (EVALUATE, (*CLUSTER, "headGroupSpec", "template"), DELETE, "'template' is a required property"),
    (EVALUATE, (*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus"), 0, "is not of type 'string'"),
    (GENERATE, (*CLUSTER, "workerGroupSpecs", 0, "groupName"), DELETE, "'groupName' is a required property"),
    (GENERATE, (*CLUSTER, "workerGroupSpecs", 0, "template", "spec", "gpus"), 1, "Additional properties"),
    ("PersistentVolumeClaim/tarflow-scale-runs", ("spec", "size"), "1Gi", "Additional properties"),
    ("NetworkPolicy/tarflow-train", ("spec", "ingress"), {}, "is not of type"),
    ("NetworkPolicy/tarflow-train", ("spec", "egress", 1, "ports", 0, "number"), 53, "Additional properties"),
]


@pytest.mark.parametrize(("name", "path", "value", "message"), MISTAKES, ids=lambda one: str(one)[:40])
def test_mistakes_are_found(name: str, path: Sequence[str | int], value: Any, message: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=re.escape(message)):
        check(changed(RESOURCES[name], path, value))


def test_schemas_say_where_they_are_from() -> None:
    for name in SCHEMAS.values():
        comment = json.loads((TOP / "tests/schemas" / name).read_text())["$comment"]
        assert re.search(r"of release v\d+\.\d+\.\d+, Apache-2\.0; generated by tests/schemas/generate\.py", comment)


def test_every_file_is_in_the_kustomization() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"kustomization.yaml", *KUSTOMIZATION["resources"]}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which has kustomize in it")
def test_kustomize_puts_in_what_the_kustomization_says(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "here")
    file = tmp_path / "here/kustomization.yaml"
    text = file.read_text().replace("NUM_NODES=2", "NUM_NODES=5").replace("GPUS_PER_NODE=1", "GPUS_PER_NODE=8")
    text = text.replace("registry.example/", "elsewhere.example/")
    file.write_text(text)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = ["kubectl", "kustomize", str(tmp_path / "here")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    made = {f"{one['kind']}/{one['metadata']['name']}": one for one in yaml.safe_load_all(result.stdout)}
    assert made.keys() == {*RESOURCES, "ConfigMap/tarflow-scale"}
    for one in made.values():
        check(one)
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "tarflow-scale"
    job = made[TRAIN]["spec"]["replicatedJobs"][0]["template"]["spec"]
    workers = [made[name]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0] for name in (EVALUATE, GENERATE)]
    numbers = [job["parallelism"], job["completions"]]
    numbers += [group[field] for group in workers for field in ("replicas", "minReplicas", "maxReplicas")]
    assert numbers == [5] * 8
    (container,) = job["template"]["spec"]["containers"]
    assert [container["resources"][field]["nvidia.com/gpu"] for field in ("requests", "limits")] == [8, 8]
    images = {container["image"] for one in made.values() for container in containers(one)}
    assert images == {f"elsewhere.example/tarflow-scale:{image_version()}-gpu"}


def settings() -> dict[str, str]:
    (generator,) = KUSTOMIZATION["configMapGenerator"]
    assert generator["options"] == {"disableNameSuffixHash": True}
    return dict(one.split("=", 1) for one in generator["literals"])


def containers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(resource) for container in pod["spec"]["containers"]]


def pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    spec = resource.get("spec", {})
    if resource["kind"] == "JobSet":
        return [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    if resource["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    return []


def command(resource: dict[str, Any]) -> list[str]:
    """The command, with the settings put in as kubelet and the shell on the head do."""
    if resource["kind"] == "JobSet":
        (container,) = containers(resource)
        assert "command" not in container  # tini stays the entry point
        return [re.sub(r"\$\((\w+)\)", lambda found: settings()[found[1]], word) for word in container["args"]]
    text = re.sub(r"\$(\w+)", lambda found: settings()[found[1]], resource["spec"]["entrypoint"])
    assert "$" not in text
    return shlex.split(text)


@pytest.mark.parametrize("name", [TRAIN, EVALUATE, GENERATE])
def test_commands_are_understood(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_understood(command(RESOURCES[name]), tmp_path, monkeypatch, capsys)


def test_a_command_with_a_wrong_key_is_not_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="unknown key"):
        check_understood([*command(RESOURCES[EVALUATE]), "cluster.addresses=auto"], tmp_path, monkeypatch, capsys)


def test_exit_codes_of_a_training_mean_what_they_say() -> None:
    """75 makes a new pod and is not counted, 2 ends everything, others start all pods again."""
    resource = RESOURCES[TRAIN]["spec"]
    (replicated,) = resource["replicatedJobs"]
    job = replicated["template"]["spec"]
    actions = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert actions == {75: "Ignore", 2: "FailJob"}
    (container,) = job["template"]["spec"]["containers"]
    named = {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert named == {container["name"]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # the API server refuses a podFailurePolicy otherwise
    (rule,) = resource["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    assert resource["failurePolicy"]["maxRestarts"] > 0
    (patience,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=(\d+)", (TOP / "launch/env.sh").read_text())
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > int(patience)


def test_ranks_meet_where_jobset_puts_their_first_pod() -> None:
    resource = RESOURCES[TRAIN]
    (replicated,) = resource["spec"]["replicatedJobs"]
    (container,) = containers(resource)
    variables = {one["name"]: one.get("value") for one in container["env"]}
    host, _, port = variables["RDZV_ENDPOINT"].partition(":")
    name = resource["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert [one["containerPort"] for one in container["ports"]] == [int(port)]
    assert resource["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    script = (TOP / "launch/torchrun.sh").read_text()
    assert all(name in script for name in ("NNODES", "RDZV_ENDPOINT"))


@pytest.mark.parametrize("name", [EVALUATE, GENERATE])
def test_ray_asks_for_a_token_and_is_the_version_of_the_image(name: str) -> None:
    spec = RESOURCES[name]["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "tarflow-scale-ray"}
    assert spec["rayClusterSpec"]["rayVersion"] == pinned()["ray"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "cluster.address=auto" in spec["entrypoint"]
    # The driver has its cluster to itself: what it asks for is what the workers have.
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert f"cluster.gpus_per_worker={limits['nvidia.com/gpu']}" in spec["entrypoint"]


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([GM])i", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"G": 1 << 30, "M": 1 << 20}[unit]


@pytest.mark.parametrize("name", [TRAIN, EVALUATE, GENERATE])
def test_pods_have_what_they_need_and_no_more(name: str) -> None:
    job = RESOURCES[name]["metadata"]["labels"]["tarflow-scale/job"]
    assert pods(RESOURCES[name])
    for pod in pods(RESOURCES[name]):
        assert pod["metadata"]["labels"]["tarflow-scale/job"] == job
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["automountServiceAccountToken"] is False
        (container,) = spec["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["image"] in {one["name"] for one in KUSTOMIZATION["images"]}
        volumes = {one["name"]: one for one in spec["volumes"]}
        assert volumes.keys() == {one["name"] for one in container["volumeMounts"]}
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        memory = volumes["shared-memory"]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert bytes_of(memory["sizeLimit"]) <= bytes_of(container["resources"]["limits"]["memory"]) / 2
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"]
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


def test_the_training_has_the_gpus_that_torchrun_starts_ranks_on() -> None:
    (container,) = containers(RESOURCES[TRAIN])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(settings()["GPUS_PER_NODE"])
    (mount,) = (one for one in container["volumeMounts"] if one["name"] == "runs")
    assert mount["mountPath"] == "/opt/tarflow-scale/runs"
    assert any(word.startswith("logging.path=runs/") for word in container["args"])
    probes = [container[name]["exec"]["command"] for name in ("startupProbe", "livenessProbe")]
    assert probes == [["docker/healthcheck.sh", "--gpu"]] * 2


def test_no_pod_takes_connections_from_others() -> None:
    """One policy a job; its pods are in it, and in no other."""
    policies = {key.split("-")[-1]: one["spec"] for key, one in RESOURCES.items() if one["kind"] == "NetworkPolicy"}
    jobs = {one["metadata"]["labels"]["tarflow-scale/job"] for one in RESOURCES.values() if pods(one)}
    assert policies.keys() == jobs == {"train", "evaluate", "generate"}
    for job, spec in policies.items():
        own = {"podSelector": {"matchLabels": {"tarflow-scale/job": job}}}
        assert spec["podSelector"] == own["podSelector"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert spec["ingress"][0] == {"from": [own]}
        others = spec["ingress"][1:]
        assert len(others) == (job != "train")
        for rule in others:  # the operator, at the dashboard's ports
            (peer,) = rule["from"]
            assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
            assert 8265 in {port["port"] for port in rule["ports"]}
            assert 6379 not in {port["port"] for port in rule["ports"]}
        assert spec["egress"][0] == {"to": [own]}
        dns, store = spec["egress"][1:]
        assert {(port["protocol"], port["port"]) for port in dns["ports"]} == {("UDP", 53), ("TCP", 53)}
        assert [port["port"] for port in store["ports"]] == [443]
        assert store["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]  # where clouds hand out credentials


def test_no_secret_is_in_the_folder() -> None:
    """They are made by a command; the names that are asked for are those that it makes."""
    assert not any(one["kind"] == "Secret" for one in RESOURCES.values())
    text = (FOLDER / "kustomization.yaml").read_text()
    made = set(re.findall(r"kubectl create secret generic ([\w-]+)", text))
    sources = [source for one in RESOURCES.values() for box in containers(one) for source in box["envFrom"]]
    asked = {source["secretRef"]["name"] for source in sources if "secretRef" in source}
    asked |= {RESOURCES[name]["spec"]["rayClusterSpec"]["authOptions"]["secretName"] for name in (EVALUATE, GENERATE)}
    assert asked == made
    assert "--from-literal=auth_token=" in text  # the key that KubeRay reads
    for path in FOLDER.iterdir():
        assert not re.search(r"AKIA\w{12}|[0-9a-f]{32}", path.read_text()), path
