"""``promote`` from the command line: which version ``latest`` is, and versions of other models that must be beaten."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save as save_arrays

from tarflow_scale import cli
from tarflow_scale.config.protocols import load_protocol
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.records import MetricsReport, MetricValue
from tarflow_scale.registry import Registry
from tests.registry.test_registry import FACTS

PROTOCOL = {"name": "bits", "metric": "bits_per_dim", "bit_depth": 4}


class World:
    """A registry with a gate, and models of which each version is a few bytes."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "registry")
        self.protocol = folder / "bits.yaml"
        self.protocol.write_text(yaml.safe_dump(PROTOCOL))
        self.gate = folder / "gate.yaml"
        self.ask(must_beat_champion=True)

    def ask(self, **requirement: Any) -> None:
        """What the gate asks for."""
        asked = {"protocol": str(self.protocol), **requirement}
        self.gate.write_text(yaml.safe_dump({"name": "g", "requirements": [asked]}))

    def register(self, model: str, bits: float | None = None, identity: str = "id", **data: Any) -> Registry:
        """Another version of a model; with a report of 50 images if ``bits`` are given."""
        registry = Registry(self.path, model)
        number = len(registry.state().versions) if (Path(self.path) / model / "_log").exists() else 0
        files = {"model.safetensors": f"{model} {number}".encode()}
        version = registry.register(files, FACTS | {"data": FACTS["data"] | data}, "test")
        if bits is None:
            return registry
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (50, 32), np.uint8)
        costs = bits + generator.normal(0, 1, 50) + np.random.default_rng(version.version).normal(0, 0.01, 50)
        value = MetricValue(
            value=float(costs.mean()),
            unit="bits/dim",
            standard_error=float(costs.std(ddof=1) / 50**0.5),
            num_images=50,
            protocol="bits",
            protocol_digest=load_protocol(str(self.protocol)).digest,
            protocol_id=identity,
            per_image=registry.keep(save_arrays({"bits_per_dim": costs, "image_sha256": images})),
        )
        report = MetricsReport(
            model=model,
            version=version.version,
            weights_digest=version.weights_digest,
            metrics={"bits": value},
            baselines={},
            sampling=SamplingConfig(),
            seconds=0,
            packages={},
        )
        registry.attach_report(report, "test")
        return registry

    def promote(self, model: str, *more: str) -> int:
        return cli.main(
            ["promote", f"registry.path={self.path}", f"registry.model={model}", f"gate.path={self.gate}", *more]
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def champion(registry: Registry) -> int | None:
    return Registry(registry.path, registry.model).state().aliases.get("champion")


# -- latest ------------------------------------------------------------------------------------------------------------


def test_latest_is_the_newest_version_with_the_numbers_of_the_gate(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run registered two versions between ``evaluate`` and ``promote``."""
    world.register("glow", 3.0)
    world.register("glow", 2.9)
    world.register("glow")
    registry = world.register("glow")
    assert world.promote("glow") == 0
    assert (
        "latest is glow@2, the newest with all numbers that gate g requires; newer without all: glow@4, glow@3\n"
        in capsys.readouterr().out
    )
    assert champion(registry) == 2


def test_latest_without_any_numbers_is_refused_by_the_gate(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.register("glow")
    world.register("glow")
    assert world.promote("glow") == 2
    captured = capsys.readouterr()
    assert "latest is glow@2\n" in captured.out
    assert (
        "glow@2 does not pass gate g (got NO for 1 of 1 requirements, see the table); champion was not moved"
        in captured.err
    )
    assert "a number by protocol bits" in captured.out
    assert captured.out.count("the version has no report; run 'tarflow-scale evaluate' first") == 1
    assert "no report" not in captured.err  # the reasons are in the table alone


def test_latest_skips_retired_versions_and_never_goes_back_behind_the_holder(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.ask(maximum=9.0)
    registry = world.register("glow", 3.0)
    registry = world.register("glow", 2.9)
    registry.set_alias("champion", 2, None, "by hand")
    registry = world.register("glow", 2.8)
    registry.retire(3, "broken")
    assert world.promote("glow") == 0
    assert "latest is glow@2\n" in capsys.readouterr().out
    # the holder has no number by another gate's protocol, and version 1, which has, is older
    world.protocol.write_text(yaml.safe_dump(PROTOCOL | {"seed": 1}))
    digest = load_protocol(str(world.protocol)).digest
    report = registry.state().reports[1][0]
    value = report.metrics["bits"].model_copy(update={"protocol_digest": digest})
    registry.attach_report(report.model_copy(update={"metrics": {"bits": value}}), "by the other protocol")
    assert world.promote("glow") == 2
    captured = capsys.readouterr()
    assert "glow@2 does not pass gate g" in captured.err
    assert "or by an earlier edition of this protocol (bits); run 'tarflow-scale evaluate' with" in captured.out
    assert champion(registry) == 2


# -- a family ----------------------------------------------------------------------------------------------------------


def test_a_glow_and_a_realnvp_compete(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on the same shards and measured on the same images, the better one alone passes."""
    glow = world.register("glow", 2.9)
    assert world.promote("glow") == 0
    realnvp = world.register("realnvp", 3.0)
    world.register("realnvp", 2.8)
    events = len(glow.state().history)
    against = "gate.against=glow@champion"
    assert world.promote("realnvp", against, "registry.version=1") == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert (
        "realnvp@1 does not pass gate g (got NO for 1 of 3 requirements, see the table); champion was not moved" in line
    )
    assert re.search(r"^NO +bits below glow@1's, with 95% confidence +2\.", captured.out, re.MULTILINE)
    assert champion(realnvp) is None
    assert world.promote("realnvp", against, "--dry-run") == 0
    assert world.promote("realnvp", against) == 0
    out = capsys.readouterr().out
    assert "trained on the data set of glow@1" in out
    assert "image by image" in out
    assert champion(realnvp) == 2
    # the log says with what was compared, and is whole; the other model's log did not change
    state = Registry(world.path, "realnvp").replayed()
    assert state.guarded == {"champion": "g"}
    event = realnvp.log.read(state.number)
    version = glow.resolve(1)
    assert event.payload["decision"]["against"] == {"name": "glow@1", "weights_digest": version.weights_digest}
    assert len(Registry(world.path, "glow").replayed().history) == events


def test_the_own_champion_must_be_beaten_as_well(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.register("glow", 3.0)
    realnvp = world.register("realnvp", 2.0)
    assert world.promote("realnvp") == 0
    world.register("realnvp", 2.5)
    assert world.promote("realnvp", "gate.against=glow@1") == 2
    table = capsys.readouterr().out
    assert re.search(r"^NO +bits below the champion's, with 95% confidence +2\.", table, re.MULTILINE)
    assert champion(realnvp) == 1


def test_a_log_from_before_decisions_named_rivals_opens(world: World) -> None:
    realnvp = world.register("realnvp", 3.0)
    realnvp.promote("champion", 1, None, {"gate": "g", "promoted": True, "reasons": []}, "long ago")
    world.register("glow", 2.0)
    world.register("realnvp", 1.5)
    assert world.promote("realnvp", "gate.against=glow@latest") == 0
    assert Registry(world.path, "realnvp").replayed().aliases == {"champion": 2}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"digest": "1" * 64}, "d/train 0 with 2 classes, not d/train 111111111111 with 2 classes"),
        (
            {"digest": "1" * 64, "name": "pets", "class_names": ["cat", "dog", "owl"]},
            "d/train 0 with 2 classes, not pets/train 111111111111 with 3 classes",
        ),
    ],
    ids=["other shards", "other classes"],
)
def test_models_of_other_data_are_not_compared(
    world: World, data: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.register("glow", 9.0, **data)
    realnvp = world.register("realnvp", 2.0)
    assert world.promote("realnvp", "gate.against=glow@1") == 2
    captured = capsys.readouterr()
    assert (
        "does not pass gate g (got NO for 1 of 2 requirements, see the table); champion was not moved" in captured.err
    )
    assert re.search(rf"^NO +trained on the data set of glow@1 +{re.escape(words)}$", captured.out, re.MULTILINE)
    assert "glow@1's" not in captured.out  # no number of the two is compared
    assert champion(realnvp) is None


def refusal(world: World, against: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert world.promote("realnvp", f"gate.against={against}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert champion(Registry(world.path, "realnvp")) is None
    return line.removeprefix("tarflow-scale: error: ")


def test_a_rival_that_cannot_be_compared_with_is_one_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    glow = world.register("glow", 3.0, identity="other images")
    world.register("realnvp", 2.0)
    assert world.promote("realnvp", "gate.against=glow@1") == 2
    captured = capsys.readouterr()
    assert "glow@1 has no number with the same protocol id; evaluate it on the same reference" in captured.out
    assert "does not pass gate g" in captured.err
    assert refusal(world, "glow@champion", capsys) == (
        "cannot compare the version with gate.against=glow@champion: glow has no alias 'champion' (its aliases: none); "
        "promote a version first, or use another reference, such as latest"
    )
    assert "glow has no version 7 (its versions: 1)" in refusal(world, "glow@7", capsys)
    glow.retire(1, "broken")
    assert "cannot compare the version with gate.against=glow@1: glow@1 was retired on" in refusal(
        world, "glow@1", capsys
    )
    assert "model 'glow' has no version" in refusal(world, "glow@latest", capsys)
    assert "no model 'nice' in the registry" in refusal(world, "nice@1", capsys)
    assert refusal(world, "realnvp@1", capsys) == (
        "gate.against must not be the version that is promoted (got realnvp@1); choose another version"
    )
    event = Path(glow.log.location(1))
    event.write_bytes(event.read_bytes().replace(b'"parameters":3', b'"parameters":4'))
    assert "is damaged (its checksum differs)" in refusal(world, "glow@1", capsys)
    event.unlink()
    assert "is missing from the log" in refusal(world, "glow@1", capsys)


def test_a_rival_whose_numbers_are_damaged_is_one_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    glow = world.register("glow", 3.0)
    world.register("realnvp", 2.0)
    kept = glow.state().reports[1][0].metrics["bits"].per_image
    assert kept is not None
    blob = Path(world.path) / "blobs/sha256" / kept.sha256
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    line = refusal(world, "glow@1", capsys)
    assert line.startswith("cannot compare the version with gate.against=glow@1: the file of values per image of glow")


def test_a_gate_in_which_no_rival_can_be_beaten_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.register("glow", 3.0)
    world.register("realnvp", 2.0)
    world.ask(maximum=9.0)
    assert "gate.against needs a requirement with must_beat_champion (got none in gate g)" in refusal(
        world, "glow@1", capsys
    )
    for wrong in ("glow", "glow@", "@champion", "a/b@1"):
        assert "against must be MODEL@VERSION (got" in refusal(world, json.dumps(wrong), capsys)
