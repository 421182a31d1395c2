"""``evaluate`` and ``promote``: the same numbers on Ray and in one process, bound to their protocol."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tarflow_scale import cli
from tarflow_scale.loading import load_version
from tarflow_scale.records import MetricsReport
from tarflow_scale.registry import Registry
from tests.conftest import TOP, Trained, command

PROTOCOLS = [TOP / "evals/protocols/digits-bits-per-dim.yaml", TOP / "evals/protocols/digits-frechet-pixels.yaml"]


@pytest.fixture(scope="module")
def own(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A registry of its own."""
    registry = tmp_path_factory.mktemp("evaluate") / "registry"
    shutil.copytree(trained.registry, registry)
    return Trained(trained.data, trained.run, registry)


def evaluate_arguments(own: Trained, *more: str, protocols: list[Path] = PROTOCOLS) -> list[str]:
    return [
        "evaluate",
        f"registry.path={own.registry}",
        "registry.model=small",
        f"data.path={own.data}/test",
        f"reference.path={own.data}/train",
        f"reference.cache={own.registry}/../references",
        f"metrics.protocols={json.dumps([str(path) for path in protocols])}",
        *more,
    ]


def newest_report(own: Trained) -> MetricsReport:
    return Registry(str(own.registry), "small").state().reports[1][-1]


@pytest.fixture(scope="module")
def local(own: Trained) -> MetricsReport:
    assert cli.main(evaluate_arguments(own, "cluster.executor=local")) == 0
    return newest_report(own)


@pytest.mark.ray
def test_ray_and_one_process_agree_to_the_last_bit(own: Trained, local: MetricsReport) -> None:
    result = command(*evaluate_arguments(own))
    assert result.returncode == 0, result.stderr
    report = newest_report(own)
    assert report.metrics == local.metrics
    assert report.baselines == local.baselines


def test_bits_per_dim_is_the_flows_own(own: Trained, local: MetricsReport) -> None:
    """The same number from first principles: numpy images, one loop, no pipeline."""
    import math

    import numpy as np

    from tarflow_scale.randomness import Purpose, generator
    from tarflow_scale.shards.reader import ShardSet

    flow = load_version(str(own.registry), "small", 1)
    shards = ShardSet(f"{own.data}/test")
    batch = shards.take(np.arange(shards.manifest.num_images))
    costs = []
    for draw in range(8):
        u = np.stack([generator(Purpose.BITS_PER_DIM_NOISE, 0, int(i), draw).random((1, 8, 8), np.float32)
                      for i in batch.samples])  # fmt: skip
        x = torch.from_numpy((batch.images // 17 + u) / 8 - 1).float()
        with torch.no_grad():
            z, log_det = flow(x, torch.from_numpy(batch.labels))
        nats = 0.5 * (z.double() ** 2).sum(1) + 32 * math.log(2 * math.pi) - log_det.double()
        costs.append((nats / (64 * math.log(2)) + 3).numpy())
    per_image = np.mean(costs, axis=0)
    metric = local.metrics["bits_per_dim"]
    assert metric.num_images == 359
    assert metric.value == pytest.approx(per_image.mean(), abs=1e-5)
    assert metric.standard_error == pytest.approx(per_image.std(ddof=1) / np.sqrt(359), rel=1e-3)


def test_baselines_are_measured_by_the_same_protocols(local: MetricsReport) -> None:
    assert local.baselines["gaussian_bits_per_dim"] == pytest.approx(2.9, abs=0.1)  # 2.92 on another split
    assert 40 < local.baselines["gaussian_frechet_pixels"] < 70
    assert local.baselines["real_frechet_pixels"] < 4


def test_samples_of_a_plan_score_like_exact_ones(
    own: Trained, local: MetricsReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = tmp_path / "registry"
    shutil.copytree(own.registry, registry)
    shutil.copytree(own.registry.parent / "references", tmp_path / "references")
    copy = Trained(own.data, own.run, registry)
    adaptive = evaluate_arguments(copy, "cluster.executor=local", "sampling.decoder.kind=adaptive")
    assert cli.main(adaptive) == 2
    assert "needs a plan for this version (got none)" in capsys.readouterr().err
    calibrated = [f"registry.path={registry}", "registry.model=small", "shards.path=unused", "sampling.num_images=1"]
    assert cli.main(["generate", *calibrated, "--calibrate"]) == 0
    assert cli.main(adaptive) == 0
    name = "frechet_pixels"
    found, expected = newest_report(copy).metrics, local.metrics
    assert found.keys() == expected.keys()
    assert found[name].value == pytest.approx(expected[name].value, rel=1e-2)
    assert newest_report(copy).sampling["decoder"]["kind"] == "adaptive"


def test_the_reference_is_computed_once_and_its_damage_noticed(
    own: Trained, local: MetricsReport, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = own.registry.parent / "references"
    assert len(list(cache.glob("*.npz"))) == 1
    capsys.readouterr()
    assert cli.main(evaluate_arguments(own, "cluster.executor=local", "--dry-run")) == 0
    assert "2000" in capsys.readouterr().out  # 1,000 generated and 1,000 real, no reference
    moments = next(cache.glob("*.npz"))
    kept = moments.read_bytes()
    moments.write_bytes(kept[:-1] + b"x")
    assert cli.main(evaluate_arguments(own, "cluster.executor=local")) == 2
    assert "does not match its digest; delete it" in capsys.readouterr().err
    moments.write_bytes(kept)


def test_the_protocol_id_follows_protocol_and_images(own: Trained, local: MetricsReport, tmp_path: Path) -> None:
    facts = yaml.safe_load(PROTOCOLS[0].read_text())
    edition = tmp_path / "edition.yaml"
    edition.write_text(yaml.safe_dump(facts | {"num_draws": 1}))
    assert cli.main(evaluate_arguments(own, "cluster.executor=local", protocols=[edition])) == 0
    other_protocol = newest_report(own).metrics["bits_per_dim"].protocol_id
    more = ["cluster.executor=local", f"data.path={own.data}/train"]
    assert cli.main(evaluate_arguments(own, *more, protocols=[PROTOCOLS[0]])) == 0
    other_images = newest_report(own).metrics["bits_per_dim"].protocol_id
    assert len({local.metrics["bits_per_dim"].protocol_id, other_protocol, other_images}) == 3


def promote_arguments(own: Trained, gate: Path, *more: str) -> list[str]:
    return ["promote", f"registry.path={own.registry}", "registry.model=small", f"gate.path={gate}", *more]


def gate_file(path: Path, protocol: Path, maximum: float) -> Path:
    facts = {"name": "test", "requirements": [{"protocol": str(protocol), "maximum": maximum}]}
    path.write_text(yaml.safe_dump(facts))
    return path


def test_promotion_prints_reasons_and_moves_the_alias_once(
    own: Trained, local: MetricsReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = gate_file(tmp_path / "strict.yaml", PROTOCOLS[0], 0.5)
    assert cli.main(promote_arguments(own, strict)) == 2
    captured = capsys.readouterr()
    assert "NO     bits_per_dim <= 0.5 bits/dim" in captured.out
    assert captured.err.startswith("tarflow-scale: error: small@1 does not pass gate test: bits_per_dim <= 0.5")
    mild = gate_file(tmp_path / "mild.yaml", PROTOCOLS[0], 9.0)
    assert cli.main(promote_arguments(own, mild, "--dry-run")) == 0
    assert "champion" not in Registry(str(own.registry), "small").state().aliases
    assert cli.main(promote_arguments(own, mild, "gate.reason=because")) == 0
    assert cli.main(promote_arguments(own, mild)) == 0
    assert "small@1 is champion already" in capsys.readouterr().out
    state = Registry(str(own.registry), "small").state()
    promotions = [event for event in state.events if event.kind == "promote"]
    assert len(promotions) == 1
    assert promotions[0].reason == "because"
    assert promotions[0].payload["decision"]["promoted"] is True


def test_models_list_show_and_rollback(own: Trained, local: MetricsReport, capsys: pytest.CaptureFixture[str]) -> None:
    where = [f"registry.path={own.registry}", "registry.model=small"]
    registry = Registry(str(own.registry), "small")
    first = registry.resolve(1)
    facts = first.model_dump(mode="json", exclude={"version", "files"})
    registry.register({"model.safetensors": b"other"}, facts, "second")
    registry.promote("star", 1, None, {}, "")
    registry.promote("star", 2, 1, {}, "")
    assert cli.main(["models", "list", *where]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[2].startswith("small@2  star")
    assert "bits_per_dim" in listed[3]
    assert cli.main(["models", "show", *where, "registry.version=1"]) == 0
    shown = capsys.readouterr().out
    assert first.weights_digest in shown
    assert first.data.digest in shown
    assert "evaluated on digits/test" in shown
    assert cli.main(["models", "rollback", *where, "registry.version=star", "--dry-run"]) == 0
    assert registry.resolve("star").version == 2
    assert cli.main(["models", "rollback", *where, "registry.version=star"]) == 0
    assert "star of small is small@1 again (was small@2)" in capsys.readouterr().out
    assert cli.main(["models", "rollback", *where, "registry.version=star"]) == 2
    assert "has no earlier version" in capsys.readouterr().err
    assert cli.main(["models", "rollback", *where, "registry.version=1"]) == 2
