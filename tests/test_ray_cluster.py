"""launch/ray: what Ray's own launcher makes of it, and that the token is on every node."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TOP
from tests.launching import DELETE, changed, check_understood, image_version

jsonschema = pytest.importorskip("jsonschema")

pytestmark = pytest.mark.slow

FILES = {path.name: yaml.safe_load(path.read_text()) for path in sorted((TOP / "launch/ray").glob("*.yaml"))}


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What ``ray up`` does to a configuration before it touches a machine."""
    from ray.autoscaler._private import util

    result = util.prepare_config(config) | {"cluster_synced_files": []}
    util.validate_config(result)
    return result


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    result = prepared(FILES[name])
    assert sum(kind["min_workers"] for kind in result["available_node_types"].values()) == 2


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("cluster.yaml", ("idle_timeout",), 5, "Additional properties are not allowed"),
        ("cluster.yaml", ("idle_timeout_minutes",), "soon", "is not of type"),
        ("cluster.yaml", ("docker", "gpus"), 1, "Additional properties are not allowed"),
        ("cluster.yaml", ("initialization_commands",), "docker ps", "is not of type 'array'"),
        ("aws.yaml", ("head_node_type",), "heads", "must be one of `available_node_types`"),
        ("aws.yaml", ("max_workers",), 1, "is smaller than the sum of `min_workers`"),
        ("aws.yaml", ("available_node_types", "gpu", "node_config"), DELETE, "'node_config' is a required property"),
    ],
)
def test_ray_refuses_mistakes(name: str, path: Sequence[str], value: Any, message: str) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError), match=message):
        prepared(changed(FILES[name], path, value))


@pytest.mark.parametrize("name", FILES)
def test_the_token_is_on_every_node_and_the_dashboard_on_none_but_loopback(name: str) -> None:
    config = FILES[name]
    options = config["docker"]["run_options"]
    (path,) = (option.partition("AUTH_TOKEN_PATH=")[2] for option in options if "AUTH_TOKEN_PATH=" in option)
    assert config["file_mounts"] == {path: "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in options
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    (port,) = re.findall(r"--port=(\d+)", head)
    assert f"--address=$RAY_HEAD_IP:{port}" in worker
    assert config["idle_timeout_minutes"] > 0
    assert config["docker"]["image"].rpartition("/")[2] == f"tarflow-scale:{image_version()}-gpu"
    assert not re.search(r"AKIA\w{12}|[0-9a-f]{32}", (TOP / "launch/ray" / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_its_head_is_understood(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (TOP / "launch/ray" / name).read_text().replace("\\\n#", " ")
    (line,) = re.findall(rf'ray exec launch/ray/{name} "([^"]+)"', text)
    words = shlex.split(line)
    check_understood(words[words.index("tarflow-scale") :], tmp_path, monkeypatch, capsys)
