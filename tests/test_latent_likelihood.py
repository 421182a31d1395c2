"""The likelihood of a flow on latents: a bound in bits/dim of pixels, nats of latents, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load as load_arrays
from scipy import stats

from tarflow_scale import cli, load
from tarflow_scale.autoencoders.contract import Autoencoder, from_stored
from tarflow_scale.autoencoders.pixels_given_latent import log_bins
from tarflow_scale.autoencoders.stored import build_autoencoder
from tarflow_scale.config.autoencoder import ConvolutionalConfig, TinyConfig
from tarflow_scale.config.protocols import BoundProtocol
from tarflow_scale.density import image_bits_per_dim
from tarflow_scale.errors import ConfigError
from tarflow_scale.loading import load_autoencoder
from tarflow_scale.metrics.bits import sample_hashes
from tarflow_scale.randomness import Purpose, generator
from tarflow_scale.records import MetricsReport
from tarflow_scale.registry import Registry
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.verbs.evaluate.driver import _check_bound  # pyright: ignore[reportPrivateUsage]
from tests.conftest import TOP, Trained, command, train_arguments
from tests.test_latents import register

DRAWS = 3
BOUND = {"name": "bound", "metric": "bits_per_dim_bound", "bit_depth": 4, "num_draws": DRAWS, "seed": 5}
TIGHTER = BOUND | {"name": "bound_iw", "estimate": "importance"}
NATS = {"name": "latent_nats", "metric": "latent_nats", "noise_std": 0.1}
VALIDATION_SEED = 0x76616C6964


def fit(autoencoder: Autoencoder, images: torch.Tensor) -> None:
    """Train an autoencoder for a few steps."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=5e-3)
    for step in range(60):
        part = images[32 * step % len(images) :][:32]
        latent = autoencoder.encode(from_stored(part))
        decoded = autoencoder.decode(latent.at(torch.randn_like(latent.mean)))
        log_scale = autoencoder.get_parameter("log_scale")
        loss = (latent.kl() - log_bins("logistic", part >> 4, 4, decoded, log_scale)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def world(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder that was trained for a moment, latents of the digits, and a flow on them in a registry."""
    path = tmp_path_factory.mktemp("likelihood")
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "factor": 2, "latent_channels": 2, "width": 8, "blocks": 1}
    autoencoder = build_autoencoder(ConvolutionalConfig.model_validate(sizes))
    fit(autoencoder, torch.from_numpy(ShardSet(f"{digits}/train").take(np.arange(960)).events))
    register(path / "registry", "autoencoder", autoencoder)
    encode = ["encode", f"registry.path={path}/registry", "registry.model=autoencoder", "cluster.executor=local"]
    more = ["encoding.dtype=float32", f"data.path={digits}", f"shards.path={path}/latents"]
    assert cli.main([*encode, *more]) == 0
    train = train_arguments(
        path / "latents", path / "run", path / "registry", "training.noise={kind: gaussian, std: 0.1}",
        "model.patch_size=1", f"autoencoder.path={path}/registry", "autoencoder.model=autoencoder",
        f"validation={{path: {path}/latents/test, every_images: 640}}", "registry.model=flow",
    )  # fmt: skip
    result = command(*train)
    assert result.returncode == 0, result.stderr
    return path


def evaluate_arguments(world: Path, data: Path, *protocols: dict[str, object], model: str = "flow") -> list[str]:
    paths: list[str] = []
    for protocol in protocols:
        paths.append(str(world / f"{protocol['name']}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump(protocol))
    return [
        "evaluate",
        f"registry.path={world}/registry",
        f"registry.model={model}",
        f"data.path={data}/test",
        f"reference.path={data}/train",
        f"reference.cache={world}/references",
        f"metrics.protocols={json.dumps(paths)}",
        "cluster.executor=local",
    ]


def newest(world: Path) -> MetricsReport:
    return Registry(f"{world}/registry", "flow").state().reports[1][-1]


def per_image(world: Path, report: MetricsReport, name: str) -> np.ndarray:
    record = report.metrics[name].per_image
    assert record is not None
    return load_arrays(Registry(f"{world}/registry", "flow").read("values", record))["bits_per_dim_bound"]


@pytest.fixture(scope="module")
def bounds(world: Path, digits: Path) -> MetricsReport:
    assert cli.main(evaluate_arguments(world, digits, BOUND, TIGHTER)) == 0
    return newest(world)


def independent_weights(world: Path, digits: Path) -> np.ndarray:
    """Log p(x | v) p(v) / q(v | x) of each draw and image, from the networks and scipy's distributions."""
    flow = load("flow@1", registry=world / "registry")
    autoencoder, _ = load_autoencoder(f"{world}/registry", "autoencoder", 1)
    latents = ShardSet(f"{world}/latents/train").manifest.latents
    assert latents is not None
    images = ShardSet(f"{digits}/test")
    batch = images.take(np.arange(images.manifest.num_images))
    weights: list[np.ndarray] = []
    with torch.no_grad():
        mean, log_var = autoencoder.encode(torch.from_numpy(batch.events / np.float32(127.5) - 1).float())
        assert log_var is not None
        centre, scale = (np.array(values)[:, None, None] for values in (latents.mean, latents.scale))
        mean = (mean.double().numpy() - centre) / scale
        std = np.sqrt(np.exp(log_var.double().numpy()) / scale**2 + 0.1**2)
        for draw in range(DRAWS):
            noise = [generator(Purpose.BITS_PER_DIM_NOISE, 5, int(i), draw) for i in batch.samples]
            v = mean + std * np.stack([one.standard_normal((2, 4, 4), np.float32) for one in noise])
            log_q = stats.norm.logpdf(v, mean, std).sum(axis=(1, 2, 3))
            log_flow = flow.log_prob(torch.from_numpy(v).float(), torch.from_numpy(batch.labels)).numpy()
            decoded = autoencoder.decode(torch.from_numpy(v * scale + centre).float()).double().numpy()
            levels, width = batch.events // 16, float(autoencoder.get_parameter("log_scale").exp())
            low = np.where(levels == 0, -np.inf, levels / 8 - 1)
            high = np.where(levels == 15, np.inf, (levels + 1) / 8 - 1)
            law = stats.logistic(decoded, width)
            bins = np.where(low > decoded, law.sf(low) - law.sf(high), law.cdf(high) - law.cdf(low))
            weights.append(np.log(bins).sum(axis=(1, 2, 3)) + log_flow - log_q)
    return np.stack(weights)


def test_the_bound_is_an_independent_computation(world: Path, digits: Path, bounds: MetricsReport) -> None:
    weights = independent_weights(world, digits)
    mean = -weights.mean(axis=0) / (64 * np.log(2))
    tighter = -(np.logaddexp.reduce(weights, axis=0) - np.log(DRAWS)) / (64 * np.log(2))
    for name, expected in (("bound", mean), ("bound_iw", tighter)):
        metric = bounds.metrics[name]
        assert metric.unit == "bits/dim, bound"
        assert metric.num_images == 359
        assert per_image(world, bounds, name) == pytest.approx(expected, abs=1e-4)
        assert metric.value == pytest.approx(expected.mean(), abs=1e-5)
        assert metric.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(359), rel=1e-3)
    assert bounds.metrics["bound_iw"].value < bounds.metrics["bound"].value - 0.005
    assert bounds.metrics["bound"].value < 4  # of a uniform distribution
    assert bounds.baselines == {}


def test_the_batch_size_does_not_change_the_bound(world: Path, digits: Path, bounds: MetricsReport) -> None:
    assert cli.main([*evaluate_arguments(world, digits, BOUND), "sampling.batch_size=37"]) == 0
    report = newest(world)
    assert per_image(world, report, "bound") == pytest.approx(per_image(world, bounds, "bound"), abs=1e-4)
    assert report.metrics["bound"].protocol_id == bounds.metrics["bound"].protocol_id


def test_nats_of_latents_are_the_validation_loss(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same_noise = NATS | {"seed": VALIDATION_SEED}
    assert cli.main(evaluate_arguments(world, world / "latents", same_noise)) == 0
    assert "nats/dim of latents" in capsys.readouterr().out
    nats = newest(world).metrics["latent_nats"]
    lines = [json.loads(line) for line in (world / "run/log.jsonl").read_text().splitlines()]
    validated = [value for line in lines if (value := line.get("validation_nats_per_dim")) is not None]
    assert nats.value == pytest.approx(validated[-1], abs=1e-5)
    assert cli.main(evaluate_arguments(world, world / "latents", same_noise | {"num_draws": 2})) == 0
    two = newest(world).metrics["latent_nats"]
    assert 0 < abs(two.value - nats.value) < 0.05


def test_the_id_of_nats_depends_on_how_latents_are_standardised(world: Path) -> None:
    """Equal latents with another mean have other nats, so they are other samples to a protocol."""
    batch = ShardSet(f"{world}/latents/test").take(np.arange(2))
    assert batch.latents is not None
    moved = replace(batch, latents=batch.latents.model_copy(update={"mean": (0.0, 0.0)}))
    assert set(sample_hashes(batch)).isdisjoint(sample_hashes(moved))


def test_a_gate_on_the_bound_compares_bounds_alone(
    world: Path, digits: Path, bounds: MetricsReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bounds.metrics
    shutil.copytree(world / "registry", tmp_path / "registry")
    (tmp_path / "bound.yaml").write_text(yaml.safe_dump(BOUND))
    exact = str(TOP / "evals/protocols/digits-bits-per-dim.yaml")
    for name, protocol in (("exact", exact), ("bounds", f"{tmp_path}/bound.yaml")):
        requirement = {"protocol": protocol, "maximum": 9, "must_beat_champion": True}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "requirements": [requirement]}))
    promote = ["promote", f"registry.path={tmp_path}/registry", "registry.model=flow", "registry.version=1"]
    assert cli.main([*promote, f"gate.path={tmp_path}/exact.yaml"]) == 2
    assert "reports only by other protocols" in capsys.readouterr().out
    assert cli.main([*promote, f"gate.path={tmp_path}/bounds.yaml"]) == 0
    assert "bound <= 9 bits/dim, bound" in capsys.readouterr().out


def test_a_leaderboard_of_bounds_says_so(
    world: Path, bounds: MetricsReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bound.yaml").write_text(yaml.safe_dump(BOUND))
    board = {"name": "b", "title": "Digits: bound on bits/dim", "protocol": f"{tmp_path}/bound.yaml"}
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(board))
    report = ["report", f"report.registries=[{world}/registry]", f"report.leaderboards=[{tmp_path}/board.yaml]"]
    assert cli.main([*report, f"report.path={tmp_path}/page"]) == 0
    value = bounds.metrics["bound"].value
    assert f"flow@1 is best with {value:.3f} bits/dim, bound" in capsys.readouterr().out
    assert "bits/dim, bound" in (tmp_path / "page/index.html").read_text()


def refused(capsys: pytest.CaptureFixture[str], given: list[str], reason: str) -> None:
    assert cli.main(given) == 2
    errors = capsys.readouterr().err
    assert reason in errors
    assert len(errors.splitlines()) == 1


def test_what_does_not_fit_is_one_line(
    world: Path, digits: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = world / "latents"
    exact = yaml.safe_load((TOP / "evals/protocols/digits-bits-per-dim.yaml").read_text())
    refused(
        capsys, evaluate_arguments(world, digits, exact), "(got a flow on latents, whose bits/dim have only a bound)"
    )
    refused(capsys, evaluate_arguments(world, latents, BOUND), "is for 4-bit images (got 2x4x4 latents")
    refused(capsys, evaluate_arguments(world, digits, NATS), "is for latents (got 1x8x8 images")
    other = NATS | {"noise_std": 0.2}
    refused(capsys, evaluate_arguments(world, latents, other), "use a protocol with noise_std: 0.1")
    refused(capsys, evaluate_arguments(world, digits, BOUND | {"name": "bits"}), "must contain the word bound")
    shutil.copytree(trained.registry, tmp_path / "registry")
    for protocol, data, reason in (
        (BOUND, digits, "needs a flow on latents (got a model of 1x8x8 images, 4 bit)"),
        (NATS, latents, "must be latents from the same run of encode as the training data, 1x8x8 images"),
    ):
        given = evaluate_arguments(world, data, protocol, model="small")
        refused(capsys, [*given, f"registry.path={tmp_path}/registry"], reason)
    score = ["score", f"registry.path={world}/registry", "registry.model=flow", f"data.path={digits}/test"]
    more = [f"calibration.path={digits}/test", f"scoring.path={tmp_path}/scores"]
    refused(capsys, [*score, *more], "has only a bound on the likelihood")
    flow, images = load("flow@1", registry=world / "registry"), ShardSet(f"{digits}/test").take(np.arange(2)).events
    with pytest.raises(ValueError, match="a flow of uniformly dequantized images .got latents."):
        image_bits_per_dim(flow, images)


def test_latents_of_another_encode_are_refused(
    world: Path, digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    encode = ["encode", f"registry.path={world}/registry", "registry.model=autoencoder", "cluster.executor=local"]
    assert cli.main([*encode, f"data.path={digits}/test", f"shards.path={tmp_path}/test"]) == 0
    given = evaluate_arguments(world, tmp_path, NATS)
    capsys.readouterr()
    reason = "must be latents from the same run of encode as the training data, 2x4x4 latents of"
    refused(capsys, [*given, f"reference.path={tmp_path}/test"], reason)
    assert cli.main([*given, f"reference.path={tmp_path}/test"]) == 2
    assert "(got dtype was float32, is float16; mean was [" in capsys.readouterr().err


def test_autoencoders_without_a_bound_name_the_other_protocol(world: Path) -> None:
    """The driver finds it before any work; the version is one of the flow with another autoencoder's facts."""
    registry = Registry(f"{world}/registry", "flow")
    version, protocol = registry.resolve(1), BoundProtocol.model_validate(BOUND)
    _check_bound(registry, version, protocol)
    register(world / "registry", "tiny", build_autoencoder(TinyConfig(width=4, latent_channels=2)))
    tiny = Registry(f"{world}/registry", "tiny")
    facts = version.trained_on
    assert facts.latents is not None
    without_bins = version.model_copy(update={"files": version.files | tiny.resolve(1).files})
    with pytest.raises(
        ConfigError, match="a probability of pixels .got one of kind tiny without it.; use .*latent_nats"
    ):
        _check_bound(tiny, without_bins, protocol)
    without_variance = facts.latents.model_copy(update={"has_variance": False})
    changed = facts.model_copy(update={"latents": without_variance})
    with pytest.raises(ConfigError, match="a variance of latents .got one of kind autoencoder .*latent-nats.yaml"):
        _check_bound(registry, version.model_copy(update={"data": changed}), protocol)
