"""``train`` of autoencoders and decoders: a run, encoding, resuming, lineage, flows with another decoder, mistakes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from torch import Tensor

from tarflow_scale import cli, load
from tarflow_scale.autoencoders.similarity import psnr
from tarflow_scale.autoencoders.stored import autoencoder_files, autoencoder_from_files, build_autoencoder, digest_of
from tarflow_scale.config.autoencoder import TinyConfig
from tarflow_scale.loading import load_autoencoder
from tarflow_scale.randomness import Purpose
from tarflow_scale.records import ModelVersion, PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.training.noise import sample_noise
from tarflow_scale.training.validation import NOISE_SEED
from tests.conftest import command, refused, train_arguments
from tests.verbs.test_train import curve, kill_after_checkpoint, start

AUTOENCODER = "model={kind: autoencoder, num_channels: 1, factor: 2, latent_channels: 3, width: 8, kl_weight: 0.1}"


def arguments(top: Path, digits: Path, *more: str, run: str = "run", model: str = "ae") -> list[str]:
    common = train_arguments(digits, top / run, top / "registry")
    common = [part for part in common if not part.startswith("model.")]
    held_out = f"validation={{path: {digits}/test, every_images: 640, num_images: 101}}"
    return [*common, "training.noise.kind=none", held_out, f"registry.model={model}", AUTOENCODER, *more]


@pytest.fixture(scope="module")
def top(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with an autoencoder of the digits, ``ae``, and with ``tuned``, which has another decoder."""
    path = tmp_path_factory.mktemp("autoencoder")
    result = command(*arguments(path, digits))
    assert result.returncode == 0, result.stderr
    assert "file such as configs/encode/folder.yaml" in result.stdout
    result = command(*tuning(path, digits))
    assert result.returncode == 0, result.stderr
    return path


def tuning(top: Path, digits: Path, *more: str, run: str = "tuned") -> list[str]:
    start_from = f"autoencoder={{path: {top}/registry, model: ae, version: 1}}"
    noise = ["training.noise={kind: gaussian, std: 0.4}", "training.total_images=640"]
    return arguments(top, digits, "model={kind: decoder}", start_from, *noise, *more, run=run, model="tuned")


def version_of(top: Path, model: str) -> ModelVersion:
    return Registry(f"{top}/registry", model).resolve("latest")


def tensors_of(top: Path, run: str) -> dict[str, Tensor]:
    return load_tensors((top / run / "model/autoencoder.safetensors").read_bytes())


def test_a_run_learns_and_leaves_what_a_flow_leaves(top: Path, digits: Path) -> None:
    log = curve(top / "run")
    assert [line["images"] for line in log] == list(range(64, 1281, 64))
    assert log[-1]["nats_per_dim"] < log[0]["nats_per_dim"] - 0.5
    assert log[-1]["psnr_db"] > log[0]["psnr_db"] + 3
    assert all(math.isfinite(line["kl_nats"]) for line in log)
    names = {path.name for path in (top / "run").iterdir()}
    assert names == {
        "checkpoints", "config.yaml", "curve.png", "environment.json", "log.jsonl", "model", "previews", "status.json",
    }  # fmt: skip
    with Image.open(top / "run/previews/images-000000001280.png") as picture:
        pixels = np.asarray(picture)
        zoom = picture.width // (8 * 9 + 1)
        assert picture.size == ((8 * 9 + 1) * zoom, (6 * 9 + 1) * zoom)
    cell, first = 9 * zoom, ShardSet(f"{digits}/test").take(np.arange(1)).events[0, 0]
    shown = pixels[zoom:cell:zoom, zoom:cell:zoom]
    assert np.array_equal(shown if shown.ndim == 2 else shown[..., 0], first)  # the original is above
    version = version_of(top, "ae")
    assert set(version.files) == {"autoencoder.json", "autoencoder.safetensors"}
    assert version.data is not None
    assert version.data.digest == ShardSet(f"{digits}/train").manifest.digest
    assert (version.images_seen, version.started_from) == (1280, "")
    assert version.pixels == PixelFormat(bit_depth=4, noise="none")
    assert version.is_autoencoder


def test_validation_is_the_bound_of_the_averaged_weights(top: Path, digits: Path) -> None:
    """Written a second time: bins as differences of sigmoids in float64, and the KL divergence from torch."""
    files = {path.name: path.read_bytes() for path in (top / "run/model").iterdir()}
    autoencoder = autoencoder_from_files(files, "here").double()
    batch = ShardSet(f"{digits}/test").take(np.arange(101))
    noise = sample_noise("gaussian", NOISE_SEED, batch.epochs, batch.samples, 48, torch.device("cpu"), Purpose.LATENT)
    x = torch.from_numpy(np.ascontiguousarray(batch.events)).double() / 127.5 - 1
    with torch.no_grad():
        mean, log_var = autoencoder.encode(x)
        assert log_var is not None
        posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
        decoded = autoencoder.decode(mean + posterior.stddev * noise.view(-1, 3, 4, 4))
        scale = autoencoder.get_parameter("log_scale").exp()
        levels = torch.from_numpy(batch.events >> 4).double()
        low, high = ((2 * edge / 16 - 1 - decoded) / scale for edge in (levels, levels + 1))
        low, high = torch.where(levels == 0, -torch.inf, low), torch.where(levels == 15, torch.inf, high)
        log_prob = (high.sigmoid() - low.sigmoid()).log()
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
        bits = (kl.sum() - log_prob.sum()) / (101 * 64 * math.log(2))
        loss = (0.1 * kl.sum() - log_prob.sum()) / (101 * 64)
        decibels = (10 * torch.log10(4 / (decoded.clamp(-1, 1) - x).square().flatten(1).mean(dim=1))).mean()
    last = curve(top / "run")[-1]
    assert last["validation_bits_per_dim"] == pytest.approx(float(bits), abs=1e-4)
    assert last["validation_nats_per_dim"] == pytest.approx(float(loss), abs=1e-4)
    assert last["validation_psnr_db"] == pytest.approx(float(decibels), abs=1e-3)


def test_the_registered_autoencoder_encodes_and_decodes(top: Path, digits: Path, tmp_path: Path) -> None:
    encode = ["encode", f"registry.path={top}/registry", "registry.model=ae", "cluster.executor=local"]
    assert cli.main([*encode, f"data.path={digits}", f"shards.path={tmp_path}/l", "encoding.dtype=float32"]) == 0
    autoencoder, digest = load_autoencoder(f"{top}/registry", "ae", 1)
    latents, images = ShardSet(f"{tmp_path}/l/test"), ShardSet(f"{digits}/test")
    assert latents.manifest.latents is not None
    assert latents.manifest.latents.autoencoder == digest
    numbers = np.arange(images.manifest.num_images)
    x = torch.from_numpy(np.ascontiguousarray(images.take(numbers).events)) / 127.5 - 1
    with torch.no_grad():
        decoded = autoencoder.decode(torch.from_numpy(latents.take(numbers).events)[:, :3])
    assert float(psnr(x, decoded).mean()) > curve(top / "run")[-1]["validation_psnr_db"]  # which is of random draws


def test_a_killed_run_and_the_same_command_again_equal_a_run_that_never_stopped(top: Path, digits: Path) -> None:
    again = arguments(top, digits, run="killed")
    kill_after_checkpoint(start(again), top / "killed", 640)
    assert not (top / "killed/model").exists()
    assert command(*again).returncode == 0
    assert curve(top / "killed") == curve(top / "run")
    assert tensors_bytes(top, "killed") == tensors_bytes(top, "run")
    stopped = tuning(top, digits, run="stopped")
    assert command(*stopped, "training.max_seconds=0.001").returncode == 75
    assert command(*stopped).returncode == 0
    assert curve(top / "stopped") == curve(top / "tuned")
    assert tensors_bytes(top, "stopped") == tensors_bytes(top, "tuned")


def tensors_bytes(top: Path, run: str) -> bytes:
    return (top / run / "model/autoencoder.safetensors").read_bytes()


def test_a_tuned_decoder_has_the_encoder_of_the_version_it_started_from(
    top: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tensors_of(top, "run"), tensors_of(top, "tuned")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        same = tensor.numpy().tobytes() == second[name].numpy().tobytes()
        assert same == name.startswith("encoder."), name
    files = [Registry(f"{top}/registry", model).read_files(version_of(top, model)) for model in ("ae", "tuned")]
    assert digest_of(files[0]) == digest_of(files[1])
    version = version_of(top, "tuned")
    assert version.started_from == f"ae@1 {version_of(top, 'ae').weights_digest}"
    assert version.data is not None
    assert cli.main(["models", "show", f"registry.path={top}/registry", "registry.model=tuned"]) == 0
    assert version.started_from in capsys.readouterr().out
    log = curve(top / "tuned")
    assert log[-1]["nats_per_dim"] < log[0]["nats_per_dim"]


def test_the_digest_names_the_encoder_and_the_configuration(top: Path) -> None:
    files = Registry(f"{top}/registry", "ae").read_files(version_of(top, "ae"))
    autoencoder = autoencoder_from_files(files, "here")
    with torch.no_grad():
        autoencoder.get_parameter("encoder.0.bias")[0] += 1e-6
    assert digest_of(autoencoder_files(autoencoder)) != digest_of(files)
    other = files | {"autoencoder.json": files["autoencoder.json"].replace(b'"learned"', b'"fixed"')}
    assert digest_of(other) != digest_of(files)


def test_a_flow_on_latents_of_the_first_is_decoded_by_the_second(top: Path, digits: Path, tmp_path: Path) -> None:
    """The same command with another ``autoencoder`` registers the same flow with the other decoder."""
    encode = ["encode", f"registry.path={top}/registry", "registry.model=ae", "cluster.executor=local"]
    assert cli.main([*encode, f"data.path={digits}", f"shards.path={tmp_path}/l"]) == 0
    noise = ("training.noise={kind: gaussian, std: 0.4}", "model.patch_size=1", "training.total_images=320")
    train = train_arguments(tmp_path / "l", tmp_path / "flow", tmp_path / "flows", *noise, "registry.model=flow")
    for model in ("ae", "tuned"):
        result = command(*train, f"autoencoder={{path: {top}/registry, model: {model}}}")
        assert result.returncode == 0, result.stderr
    assert "nothing to train" in result.stdout
    flows = [load(f"flow@{number}", registry=f"{tmp_path}/flows") for number in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(flows[0].parameters(), flows[1].parameters(), strict=True))
    labels = torch.arange(6)
    images = [flow.sample(6, labels, seed=0) for flow in flows]
    assert not torch.equal(images[0], images[1])
    latents = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    facts = flows[1].latents
    assert facts is not None
    mean, scale = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.scale))
    decoder, _ = load_autoencoder(f"{top}/registry", "tuned", 1)
    with torch.no_grad():
        assert torch.allclose(flows[1].shown(latents), decoder.decode(latents * scale + mean), atol=1e-5)


def register_tiny(top: Path) -> None:
    torch.manual_seed(0)
    pixels = PixelFormat(bit_depth=8, noise="none").model_dump(mode="json")
    known = {"parameters": 1, "images_seen": None, "ema_half_life_images": None, "config_digest": "0" * 64}
    fields: dict[str, Any] = known | {"git_commit": "none", "packages": {}, "pixels": pixels, "data": None}
    files = autoencoder_files(build_autoencoder(TinyConfig(latent_channels=2, width=4)))
    Registry(f"{top}/registry", "tiny").register(files, fields, "test")


def test_a_version_without_known_data_is_shown(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_tiny(top)
    for verb in (["show"], ["diff", "command.other=1"]):
        assert cli.main(["models", *verb, f"registry.path={top}/registry", "registry.model=tiny"]) == 0
    assert "not known" in capsys.readouterr().out
    assert cli.main(["models", "list", f"registry.path={top}/registry"]) == 0


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_are_one_line(top: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(reason: str, *more: str) -> None:
        refused(capsys, arguments(top, digits, *more, run="no"), reason)

    check("multiples of the autoencoder's factor 16 (got 8x8)", "model.factor=16")
    check("must have the autoencoder's 3 channels (got 1)", "model.num_channels=3")
    check("factor must be a power of 2 (got 6)", "model.factor=6")
    check("posterior_std has no effect on posterior=learned (got 0.2)", "model.posterior_std=0.2")
    check("training.noise has no effect on model.kind=autoencoder (got uniform)", "training.noise.kind=uniform")
    noise = "training.noise={kind: gaussian, std: 0.1}"
    check("training.noise has no effect on model.kind=autoencoder (got gaussian)", noise)
    check("logging.preview_guidance has no effect on model.kind=autoencoder", "logging.preview_guidance=1")
    check("parallelism.activations must be keep for this model", "parallelism.activations=checkpoint")
    check("not supported for model.kind=autoencoder", "optimizer={kind: muon, muon_peak_lr: 0.02}")
    section = f"autoencoder={{path: {top}/registry, model: ae}}"
    check("the section autoencoder has no effect on model.kind=autoencoder (got ae)", section)
    check("model.kind=decoder needs the section autoencoder", "model={kind: decoder}")
    assert not (top / "no").exists()


def test_versions_that_cannot_be_tuned_are_one_line(
    top: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(reason: str, *more: str) -> None:
        refused(capsys, tuning(top, digits, *more, run="no"), reason)

    check("no model 'none' in the registry", "autoencoder.model=none")
    check("ae has no version 9", "autoencoder.version=9")
    check("training.noise.kind must be gaussian or none for model.kind=decoder", "training.noise={kind: uniform}")
    check("model.factor: unknown key", "model.factor=2")
    register_tiny(top)
    check("must have the autoencoder's 3 channels (got 1)", "autoencoder={path: " + f"{top}/registry, model: tiny}}")
    assert not (top / "no").exists()


def test_vectors_and_latents_are_refused(
    top: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "points.npz", x=np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32))
    source = ["source.kind=vectors", f"source.path={tmp_path}/points.npz", f"shards.path={tmp_path}/v"]
    assert cli.main(["prepare", *source]) == 0
    encode = ["encode", f"registry.path={top}/registry", "registry.model=ae", "cluster.executor=local"]
    assert cli.main([*encode, f"data.path={digits}", f"shards.path={tmp_path}/l"]) == 0
    for name, kind in (("v", "vectors of 2"), ("l", "3x4x4 latents of")):
        given = arguments(top, digits, f"data.path={tmp_path}/{name}/train", "validation=null", run="no")
        refused(capsys, given, f"model.kind=autoencoder is for images (got {kind}")


def test_verbs_of_flows_refuse_an_autoencoder(
    top: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = [f"registry.path={top}/registry", "registry.model=ae"]
    local = "cluster.executor=local"
    generate = ["generate", *registry, local, "sampling.num_images=4", f"shards.path={tmp_path}/g"]
    refused(capsys, generate, "is an autoencoder; name the version of a flow")
    score = ["score", *registry, local, f"data.path={digits}/test", f"calibration.path={digits}/test"]
    refused(capsys, [*score, f"scoring.path={tmp_path}/s"], "is an autoencoder; name the version of a flow")
    export = ["models", "export", *registry, f"command.path={tmp_path}/e"]
    refused(capsys, export, "is an autoencoder; name the version of a flow")
    plan = ["plan", *tuning(top, digits)[1:], "--gpus", "1", "--gpu", "h100"]
    refused(capsys, plan, "plan needs a model that its section describes (got model.kind=decoder")
    assert not list(tmp_path.iterdir())


def test_plan_and_doctor_know_autoencoders(top: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = arguments(top, digits)[1:]
    assert cli.main(["plan", *run, "--gpus", "1", "--gpu", "h100"]) == 0
    parameters = version_of(top, "ae").parameters
    assert f"autoencoder, {parameters:,} parameters, for 1x8x8" in capsys.readouterr().out
    assert cli.main(["doctor", *run, "checks.only=[disk]"]) == 0
    assert f"checkpoints of {parameters:,} parameters" in capsys.readouterr().out
