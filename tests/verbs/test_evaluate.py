"""``evaluate`` and ``promote``: the same numbers on Ray and in one process, bound to their protocol."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from tarflow_scale import cli
from tarflow_scale.loading import load_version
from tarflow_scale.records import MetricsReport
from tarflow_scale.registry import Registry
from tarflow_scale.verbs.evaluate import worker
from tarflow_scale.verbs.evaluate.job import Evaluation
from tests.conftest import TOP, Trained, command
from tests.forking import HANG_SECONDS, start

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
def test_ray_and_one_process_agree_to_the_last_bit(own: Trained, local: MetricsReport, on_ray: list[str]) -> None:
    result = command(*evaluate_arguments(own, *on_ray))
    assert result.returncode == 0, result.stderr
    report = newest_report(own)
    assert report.metrics == local.metrics
    assert report.baselines == local.baselines
    lines = result.stdout.splitlines()  # where the ids are those of report, card and `models show`
    for name, metric in report.metrics.items():
        assert any(line.startswith(f"small@1 {name} ") and line.endswith(metric.protocol_id[:12]) for line in lines)
    assert "digest" not in result.stdout


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
        x = torch.from_numpy((batch.events // 17 + u) / 8 - 1).float()
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
    assert "needs a calibration of this version (got none)" in capsys.readouterr().err
    calibrated = [f"registry.path={registry}", "registry.model=small", "shards.path=unused", "sampling.num_images=1"]
    assert cli.main(["generate", *calibrated, "--calibrate"]) == 0
    assert cli.main(adaptive) == 0
    name = "frechet_pixels"
    found, expected = newest_report(copy).metrics, local.metrics
    assert found.keys() == expected.keys()
    assert found[name].value == pytest.approx(expected[name].value, rel=1e-2)
    assert newest_report(copy).sampling.decoder.kind == "adaptive"


def test_the_reference_is_computed_once_and_its_damage_noticed(
    own: Trained, local: MetricsReport, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = own.registry.parent / "references"
    assert len(list(cache.glob("*.npz"))) == 1
    capsys.readouterr()
    assert cli.main(evaluate_arguments(own, "cluster.executor=local", "--dry-run")) == 0
    assert "10 parts" in capsys.readouterr().out  # 359 scored, 1,000 generated and 1,000 real; no reference
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


# -- many protocols ----------------------------------------------------------------------------------------------------


def protocol_file(folder: Path, **facts: Any) -> Path:
    """A protocol on pixels of the digits."""
    shared = {"extractor": "pixels", "num_images": 600, "bit_depth": 4}
    path = folder / f"{facts['name']}.yaml"
    path.write_text(yaml.safe_dump(shared | facts))
    return path


def every_measure(folder: Path, **more: Any) -> list[Path]:
    subset = {"num_reference_images": 400}
    return [
        protocol_file(folder, name="plain", metric="frechet", **more),
        protocol_file(folder, name="infinity", metric="frechet", estimate="infinity", **more),
        protocol_file(folder, name="kernel", metric="kernel", num_subsets=5, subset_size=100, **subset, **more),
        protocol_file(folder, name="precision", metric="precision", **subset, **more),
        protocol_file(folder, name="recall", metric="recall", **subset, **more),
        PROTOCOLS[0],
    ]


def quick(protocols: list[Path]) -> list[Path]:
    """Those without precision and recall, which take most of the time and read the same parts as the kernel."""
    return [path for path in protocols if path.stem not in ("precision", "recall")]


def check_same_metrics(own: Trained, report: MetricsReport) -> None:
    """What was measured last is what the report says of it."""
    found = newest_report(own).metrics
    assert found == {name: report.metrics[name] for name in found}


def evaluate_all(own: Trained, folder: Path, protocols: list[Path], *more: str) -> list[str]:
    cache = f"reference.cache={folder}/references"
    return evaluate_arguments(own, cache, *more, protocols=protocols)


@pytest.fixture(scope="module")
def undisturbed(own: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], MetricsReport]:
    """Every measure, by one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    protocols = every_measure(folder)
    assert cli.main(evaluate_all(own, folder, protocols, "cluster.executor=local")) == 0
    return protocols, newest_report(own)


def test_protocols_of_the_same_images_share_one_pass(
    own: Trained, undisturbed: tuple[list[Path], MetricsReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """600 samples, 359 test images, 600 real ones for the baseline, and the reference: all, and a subset of 400."""
    protocols, report = undisturbed
    assert cli.main(evaluate_all(own, tmp_path, protocols, "cluster.executor=local", "--dry-run")) == 0
    assert f"{3 + 2 + 3 + 6 + 2} parts" in capsys.readouterr().out
    assert set(report.metrics) == {"plain", "infinity", "kernel", "precision", "recall", "bits_per_dim"}
    assert all(metric.standard_error for metric in report.metrics.values())
    plain, infinity = report.metrics["plain"], report.metrics["infinity"]
    assert 0 < abs(infinity.value - plain.value) < 3 * (infinity.standard_error or 0)
    assert len({metric.protocol_id for metric in report.metrics.values()}) == 6


def test_a_report_keeps_the_cost_of_each_image_and_a_picture(
    own: Trained, undisturbed: tuple[list[Path], MetricsReport]
) -> None:
    from safetensors.numpy import load

    report = undisturbed[1]
    registry = Registry(str(own.registry), "small")
    bits = report.metrics["bits_per_dim"]
    assert bits.per_image is not None
    costs = load(registry.read("bits", bits.per_image))["bits_per_dim"]
    assert costs.shape == (359,)
    assert costs.mean() == pytest.approx(bits.value, rel=1e-12)
    assert report.grid is not None
    assert registry.read("grid", report.grid).startswith(b"\x89PNG")


def test_parts_are_tidied_and_references_stay(
    own: Trained, undisturbed: tuple[list[Path], MetricsReport], capsys: pytest.CaptureFixture[str]
) -> None:
    protocols, report = undisturbed
    folder = protocols[0].parent
    kept = list((folder / "references" / "parts").rglob("*.npz"))
    assert kept
    folders = {path.parent for path in kept}
    assert len(folders) == 3  # moments of all references and of some, features of others; nothing of samples
    again = evaluate_all(own, folder, quick(protocols), "cluster.executor=local")
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert cli.main(again) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    check_same_metrics(own, report)


class Stop(Exception):
    pass


def test_a_killed_evaluation_goes_on_where_it_was(
    own: Trained,
    undisturbed: tuple[list[Path], MetricsReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    protocols, report = undisturbed
    made: list[worker.EvaluationUnit] = []
    run = worker.Scorer.run

    def counted(self: worker.Scorer, unit: worker.EvaluationUnit) -> None:
        if len(made) == 7:
            raise Stop
        made.append(unit)
        run(self, unit)

    again = evaluate_all(own, tmp_path, quick(protocols), "cluster.executor=local")
    reports = len(Registry(str(own.registry), "small").state().reports[1])
    with monkeypatch.context() as patch:
        patch.setattr(worker.Scorer, "run", counted)
        with pytest.raises(Stop):
            cli.main(again)
    assert len(Registry(str(own.registry), "small").state().reports[1]) == reports  # no number from a partial job
    there = {path: path.stat().st_ino for path in (tmp_path / "references" / "parts").rglob("0*.npz")}
    assert len(there) == 7
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(worker.Scorer, "run", lambda self, unit: (made.append(unit), run(self, unit))[1])
        assert cli.main(again) == 0
    assert len(made) == 16 - 7
    check_same_metrics(own, report)


@pytest.fixture
def stack() -> Generator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# -- watching ----------------------------------------------------------------------------------------------------------


def scores(registry: Registry) -> list[int]:
    """Versions in the order in which they were scored."""
    return [fact.version for fact in registry.state().history if fact.kind == "evaluate" and fact.version]


def test_two_watchers_score_every_version_once(trained: Trained, tmp_path: Path, stack: ExitStack) -> None:
    """One version is there, one comes while they watch, and one cannot be scored, which both tell."""
    shutil.copytree(trained.registry, tmp_path / "registry")
    own = Trained(trained.data, trained.run, tmp_path / "registry")
    registry = Registry(str(own.registry), "small")
    arguments = evaluate_all(own, tmp_path, PROTOCOLS, "cluster.executor=local", "metrics.watch_seconds=0.2", "--watch")
    errors = [tmp_path / "errors-0", tmp_path / "errors-1"]
    watchers = [
        start(*arguments, stdout=subprocess.DEVNULL, stderr=stack.enter_context(path.open("w"))) for path in errors
    ]

    def reach(count: int) -> None:
        while len(scores(registry)) < count:
            assert all(watcher.poll() is None for watcher in watchers)
            time.sleep(0.1)

    reach(1)
    first = registry.resolve(1)
    facts = first.model_dump(mode="json", exclude={"version", "files"})
    registry.register({"model.safetensors": b"no flow"}, facts, "broken")
    registry.register(registry.read_files(first), facts | {"config_digest": "0" * 64}, "the same weights again")
    reach(2)
    while not all("small@2 is skipped: " in path.read_text() for path in errors):
        assert all(watcher.poll() is None for watcher in watchers)
        time.sleep(0.1)
    time.sleep(1)  # in which one could score again what the other has scored
    for watcher in watchers:
        watcher.send_signal(signal.SIGINT)
    assert [watcher.wait(HANG_SECONDS) for watcher in watchers] == [130, 130]
    assert scores(registry) == [1, 3]


def test_latest_is_resolved_once_and_promoted_with_its_report(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run registers a version while one is evaluated."""
    shutil.copytree(trained.registry, tmp_path / "registry")
    own = Trained(trained.data, trained.run, tmp_path / "registry")
    registry = Registry(str(own.registry), "small")
    first, make = registry.resolve(1), Evaluation.make

    def register_and_make(job: Evaluation, *arguments: Any) -> None:
        facts = first.model_dump(mode="json", exclude={"version", "files", "configuration"})
        registry.register(registry.read_files(first), facts | {"config_digest": "f" * 64}, "by another run")
        make(job, *arguments)

    monkeypatch.setattr(Evaluation, "make", register_and_make)
    protocols = [path for path in PROTOCOLS if "bits" in path.stem]
    assert cli.main(evaluate_arguments(own, "cluster.executor=local", protocols=protocols)) == 0
    assert "latest is small@1\n" in capsys.readouterr().out
    state = registry.state()
    assert sorted(state.versions) == [1, 2]
    assert sorted(state.reports) == [1]
    gate = gate_file(tmp_path / "gate.yaml", protocols[0], 9.0)
    assert cli.main(promote_arguments(own, gate)) == 0
    assert "latest is small@1, the newest with all numbers" in capsys.readouterr().out
    assert registry.state().aliases["champion"] == 1


# -- what a protocol is bound to ---------------------------------------------------------------------------------------


def test_references_are_bound_without_a_model(
    own: Trained, undisturbed: tuple[list[Path], MetricsReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocols, report = undisturbed
    again = evaluate_all(own, tmp_path, protocols, "cluster.executor=local", "registry.path=nowhere", "--reference")
    assert cli.main(again) == 0
    printed = capsys.readouterr().out
    assert "plain      digits/train" in printed
    bound = {path.name for path in (tmp_path / "references").glob("*.json")}
    assert bound == {f"{name}.json" for name in ("plain", "infinity", "kernel", "precision", "recall")}
    assert cli.main(evaluate_all(own, tmp_path, quick(protocols), "cluster.executor=local")) == 0
    check_same_metrics(own, report)


def test_other_images_under_a_bound_protocol_are_refused(
    own: Trained, undisturbed: tuple[list[Path], MetricsReport], capsys: pytest.CaptureFixture[str]
) -> None:
    protocols, _ = undisturbed
    folder = protocols[0].parent
    arguments = evaluate_all(own, folder, protocols[:1], "cluster.executor=local")
    swapped = [*arguments, f"reference.path={own.data}/test"]
    assert cli.main(swapped) == 2
    assert "protocol plain is bound to the reference digits/train with manifest" in capsys.readouterr().err
    assert cli.main([*swapped, "--reference"]) == 2
    assert "protocol plain is bound to images that differ from digits/test" in capsys.readouterr().err


def test_the_same_images_packed_again_are_bound_again(
    own: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other shards, another manifest, the same pixels: refused at first, the same protocol id after --reference."""
    protocols = [protocol_file(tmp_path, name="plain", metric="frechet")]
    arguments = evaluate_all(own, tmp_path, protocols, "cluster.executor=local")
    assert cli.main(arguments) == 0
    before = newest_report(own).metrics["plain"]
    packed = ["source.kind=digits", f"shards.path={tmp_path}/packed", "shards.samples_per_shard=300"]
    assert cli.main(["prepare", *packed]) == 0
    other = [*arguments, f"reference.path={tmp_path}/packed/train"]
    assert cli.main(other) == 2
    assert "if these are the same images packed again, run 'evaluate --reference'" in capsys.readouterr().err
    assert cli.main([*other, "--reference"]) == 0
    assert cli.main(other) == 0
    after = newest_report(own).metrics["plain"]
    assert after.protocol_id == before.protocol_id
    assert after.value == pytest.approx(before.value, rel=1e-9)


def test_a_protocol_that_changed_under_its_name_is_refused(
    own: Trained, undisturbed: tuple[list[Path], MetricsReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocols, _ = undisturbed
    changed = every_measure(tmp_path, rounding="nearest")[:1]
    folder = protocols[0].parent
    assert cli.main(evaluate_all(own, folder, changed, "cluster.executor=local")) == 2
    assert "protocol plain has changed since it was first used with digits/train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"metric": "kernel", "num_reference_images": 5000, "subset_size": 50},
            "needs 5000 reference images (got 1438",
        ),
        ({"metric": "kernel", "num_reference_images": 400}, "subset_size must not exceed the smaller of num_images"),
        ({"metric": "precision", "num_reference_images": 3}, "neighbours must be below the number of images"),
        ({"metric": "inception_score"}, "needs extractor=inception-v3-compat (got pixels)"),
        ({"metric": "frechet", "layer": "spatial"}, "layer=spatial needs extractor=inception-v3-compat"),
        ({"metric": "frechet", "rounding": "truncate"}, "rounding=truncate is for bit_depth=8 (got 4)"),
        ({"metric": "frechet", "extractor": "clip"}, "unknown extractor 'clip'"),
        ({"metric": "frechet", "extractor": "inception-v3-compat"}, "set metrics.extractor_weights"),
    ],
)
def test_protocols_that_cannot_be_measured(
    own: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any], message: str
) -> None:
    protocol = protocol_file(tmp_path, name="it", **facts)
    assert cli.main(evaluate_all(own, tmp_path, [protocol], "cluster.executor=local")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "references").exists()


def test_truncation_repeats_the_public_pipeline() -> None:
    """Real levels go through [-1, 1] and back in fp32; levels 1 to 63 come out one lower, the rest as they were."""
    from tarflow_scale.flows.likelihood import quantize

    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = quantize((levels.float() / 255 - 0.5) / 0.5, 8, "truncate").flatten().int()
    theirs = ((0.5 * ((levels.float() / 255 - 0.5) / 0.5 + 1)) * 255).byte().flatten().int()
    assert torch.equal(found, theirs)
    assert int((found != torch.arange(256)).sum()) == 63
    assert (torch.arange(256) - found)[1:64].eq(1).all()


# -- promote -----------------------------------------------------------------------------------------------------------


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
    assert captured.err.startswith("tarflow-scale: error: small@1 does not pass gate test (got NO for 1 of ")
    mild = gate_file(tmp_path / "mild.yaml", PROTOCOLS[0], 9.0)
    assert cli.main(promote_arguments(own, mild, "--dry-run")) == 0
    assert "champion" not in Registry(str(own.registry), "small").state().aliases
    assert cli.main(promote_arguments(own, mild, "gate.reason=because")) == 0
    assert cli.main(promote_arguments(own, mild)) == 0
    assert "small@1 is champion already" in capsys.readouterr().out
    registry = Registry(str(own.registry), "small")
    promotions = [fact for fact in registry.state().history if fact.kind == "promote"]
    assert len(promotions) == 1
    assert promotions[0].reason == "because"
    assert registry.log.read(promotions[0].number).payload["decision"]["promoted"] is True


def test_an_override_is_recorded_for_ever(
    own: Trained, local: MetricsReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = gate_file(tmp_path / "strict.yaml", PROTOCOLS[0], 0.5)
    more = ["gate.alias=urgent", "--override", "the demo is tomorrow"]
    assert cli.main(promote_arguments(own, strict, *more, "--dry-run")) == 0
    assert "would become urgent, although the gate refuses it" in capsys.readouterr().out
    assert cli.main(promote_arguments(own, strict, *more)) == 0
    assert (
        "the gate refused; the alias was moved anyway, for this reason, which is stored: the demo is tomorrow"
        in capsys.readouterr().out
    )
    registry = Registry(str(own.registry), "small")
    event = registry.log.read([fact.number for fact in registry.state().history if fact.kind == "promote"][-1])
    assert event.payload["decision"]["promoted"] is False
    assert event.payload["decision"]["override"] == "the demo is tomorrow"
    assert event.reason == "the demo is tomorrow"


def test_a_champion_is_beaten_image_by_image(
    own: Trained, local: MetricsReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the weights is not better than they are, and a version that costs each image less is."""
    registry = Registry(str(own.registry), "small")
    before = registry.resolve(1)
    facts = before.model_dump(mode="json", exclude={"version", "files", "configuration"})
    copy = registry.register(registry.read_files(before), facts | {"config_digest": "copy"}, "the same weights")
    registry.attach_report(local.model_copy(update={"version": copy.version}), "the same numbers")
    gate = tmp_path / "gate.yaml"
    beat = {"protocol": str(PROTOCOLS[0]), "must_beat_champion": True}
    gate.write_text(yaml.safe_dump({"name": "beat", "requirements": [beat]}))
    paired = ["gate.alias=paired"]
    assert cli.main(promote_arguments(own, gate, *paired, "registry.version=1")) == 0
    assert cli.main(promote_arguments(own, gate, *paired, f"registry.version={copy.version}")) == 2
    assert "better by 0.0000 ± 0.0000, compared image by image" in capsys.readouterr().out
    bits = local.metrics["bits_per_dim"]
    arrays = load_arrays(registry.read("bits", bits.per_image))
    arrays["bits_per_dim"] = arrays["bits_per_dim"] - 0.001  # far below the standard error of the mean
    better = bits.model_copy(update={"value": bits.value - 0.001, "per_image": registry.keep(save_arrays(arrays))})
    report = local.model_copy(update={"version": copy.version, "metrics": {"bits_per_dim": better}})
    registry.attach_report(report, "a little better everywhere")
    assert cli.main(promote_arguments(own, gate, *paired, f"registry.version={copy.version}")) == 0
    assert better.standard_error is not None
    assert better.standard_error > 0.01


def test_models_list_show_and_rollback(own: Trained, local: MetricsReport, capsys: pytest.CaptureFixture[str]) -> None:
    where = [f"registry.path={own.registry}", "registry.model=small"]
    registry = Registry(str(own.registry), "small")
    first = registry.resolve(1)
    facts = first.model_dump(mode="json", exclude={"version", "files"})
    registry.register({"model.safetensors": b"other"}, facts, "second")
    second = registry.resolve("latest").version
    registry.promote("star", 1, None, {}, "")
    registry.promote("star", second, 1, {}, "")
    assert cli.main(["models", "list", *where]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[2].startswith(f"small@{second}  star")
    assert "bits_per_dim" in listed[-1]
    assert cli.main(["models", "show", *where, "registry.version=1"]) == 0
    shown = capsys.readouterr().out
    assert first.weights_digest in shown
    assert first.data.digest in shown
    assert "evaluated on digits/test" in shown
    assert cli.main(["models", "rollback", *where, "registry.version=star", "--dry-run"]) == 0
    assert registry.resolve("star").version == second
    assert cli.main(["models", "rollback", *where, "registry.version=star"]) == 0
    assert f"star of small is small@1 again (was small@{second})" in capsys.readouterr().out
    assert cli.main(["models", "rollback", *where, "registry.version=star"]) == 2
    assert "has no earlier version" in capsys.readouterr().err
    assert cli.main(["models", "rollback", *where, "registry.version=1"]) == 2
