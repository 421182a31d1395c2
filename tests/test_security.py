"""The threat model: what it names exists, and what it says of runs."""

import ast
import re
from pathlib import Path

from tests.conftest import TOP, Trained, command, train_arguments

TEXT = (TOP / ".github/SECURITY.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")][2:]


def names_in(path: Path) -> set[str]:
    """Names of the tests of a module, read and not run."""
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_and_module_of_the_threat_model_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 20
    assert [f"{file}::{name}" for file, name in named if name not in names_in(TOP / file)] == []
    assert TEXT.count("::") == len(named)  # none is written in another way
    modules = re.findall(r"`([\w/]+\.py)`", TEXT)
    assert [name for name in modules if not (TOP / "tarflow_scale" / name).is_file()] == []


def test_every_row_has_a_defence_that_is_shown_or_says_that_there_is_none() -> None:
    assert len(ROWS) > 15
    for row in ROWS:
        assert len(row) == 4, row
        _, _, defence, shown = row
        assert bool(shown) != defence.startswith("nothing: "), row


def test_a_run_keeps_nothing_of_the_environment(trained: Trained, tmp_path: Path) -> None:
    """Neither its files nor what it prints nor the registry."""
    secret = "sesame-open-0451"
    names = ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "WANDB_API_KEY")
    arguments = train_arguments(trained.data, tmp_path / "run", tmp_path / "registry", "training.total_images=320")
    result = command(*arguments, environment=dict.fromkeys(names, secret))
    assert result.returncode == 0, result.stderr
    assert secret not in result.stdout + result.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"environment.json", "log.jsonl", "registry.json"} <= {path.name for path in files}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
