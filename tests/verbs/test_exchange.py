"""Export and import: a version travels as a folder, whole or not at all, and nothing that unpickles comes in."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tarflow_scale import cli, load
from tarflow_scale.registry import Registry
from tests.conftest import Trained
from tests.registry.test_registry import report


@pytest.fixture
def own(trained: Trained, tmp_path: Path) -> Registry:
    """A registry of its own, with a report."""
    shutil.copytree(trained.registry, tmp_path / "registry")
    registry = Registry(str(tmp_path / "registry"), "small")
    one = report(1, registry.resolve(1).weights_digest).model_copy(update={"model": "small"})
    registry.attach_report(one, "test")
    return registry


def exported(own: Registry, folder: Path, *more: str) -> int:
    where = [f"registry.path={own.path}", "registry.model=small", "registry.version=1", f"command.path={folder}"]
    return cli.main(["models", "export", *where, *more])


def imported(registry: Path, folder: Path, *more: str) -> int:
    return cli.main(
        ["models", "import", f"registry.path={registry}", "registry.model=copy", f"command.path={folder}", *more]
    )


def test_a_version_travels(own: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = tmp_path / "out", tmp_path / "other"
    assert exported(own, folder, "--dry-run") == 0
    assert not folder.exists()
    assert exported(own, folder, "command.licence=apache-2.0") == 0
    assert exported(own, folder) == 2  # there is something there
    capsys.readouterr()
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "apache-2.0"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.0
    assert own.resolve(1).weights_digest in card
    assert "Labels and what they stand for: 0 0, 1 1, 2 2," in card
    assert "![Samples, with their classes](samples.png)" in card
    flow = load(str(folder))  # as a hub's user would
    assert torch.equal(flow.sample(2, seed=3), load("small@1", registry=own.path).sample(2, seed=3))
    assert flow.class_names == tuple("0123456789")
    assert torch.equal(flow.sample(2, "7", seed=3), flow.sample(2, 7, seed=3))
    assert imported(other, folder, "--dry-run") == 0
    assert not other.exists()
    assert imported(other, folder) == 0
    there = Registry(str(other), "copy")
    version, before = there.resolve("latest"), own.resolve(1)
    assert version.model_copy(update={"version": 1}) == before
    assert there.state().reports[1][0].metrics["p"].value == 1.0
    assert there.read("configuration", version.configuration) == own.read("configuration", before.configuration)
    assert imported(other, folder) == 0  # again: nothing new
    assert there.state().number == 2
    before_it = own.state().number
    where = [f"registry.path={own.path}", "registry.model=small", f"command.path={folder}"]
    assert cli.main(["models", "import", *where]) == 0  # back to where it came from
    assert Registry(own.path, "small").state().number == before_it


def test_a_card_has_samples_and_class_names_though_no_report_has_a_grid(
    own: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No report has a grid, so the card's is drawn, ten columns for ten classes, unless it is left out."""
    assert exported(own, tmp_path / "without", "command.samples=false") == 0
    assert not (tmp_path / "without/samples.png").exists()
    assert "samples.png" not in (tmp_path / "without/README.md").read_text()
    assert "drawing" not in capsys.readouterr().out
    assert exported(own, tmp_path / "with") == 0
    assert "no report has samples, so 40 are drawn for the model card (seed 0)" in capsys.readouterr().out
    width, height = Image.open(tmp_path / "with/samples.png").size
    assert width == 4 * (10 * 9 + 1)
    assert height > 4 * (4 * 9 + 1)  # the names of the classes are above


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no version", r"is not an exported version \(no version.json\)"),
        ("flipped", "model.safetensors does not match its digest"),
        ("pickle", "model.safetensors is a pickle, which is never read"),
        ("torch zip", "model.safetensors is a pickle, which is never read"),
        ("header", r"has an impossible header of \d+ bytes \(the file has \d+ bytes\); the file is damaged"),
        ("no json", "is not a safetensors file"),
        ("nested", "is not a safetensors file"),
        ("traversal", "must list model.safetensors and config.json"),
        ("configuration", "training.json does not match its digest"),
        ("fields", "is not a _ExportedVersion"),
    ],
)
def test_what_is_not_taken_in(
    own: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str
) -> None:
    folder = tmp_path / "out"
    assert exported(own, folder) == 0
    weights, version = folder / "model.safetensors", folder / "version.json"
    content = weights.read_bytes()
    match damage:
        case "no version":
            version.unlink()
        case "flipped":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "pickle":
            weights.write_bytes(pickle.dumps({"a": 1}))
        case "torch zip":
            torch.save({"a": torch.zeros(1)}, weights)
        case "header":
            weights.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
        case "no json":
            weights.write_bytes(struct.pack("<Q", 4) + b"abcd" + content)
        case "nested":
            weights.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
        case "configuration":
            (folder / "training.json").write_text("{}")
        case _:
            facts = json.loads(version.read_text())
            if damage == "fields":
                facts["more"] = 1
            else:
                facts["version"]["files"]["../../evil"] = facts["version"]["files"].pop("config.json")
            version.write_text(json.dumps(facts))
    if damage == "fields":  # as of a later version: the flow is read all the same
        assert load(folder).class_names == tuple("0123456789")
    capsys.readouterr()
    assert imported(tmp_path / "other", folder) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "other").exists()
