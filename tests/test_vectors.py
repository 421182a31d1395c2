"""Vectors through every verb: packed, trained, evaluated in nats, promoted, generated, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_scale import cli, load
from tarflow_scale.registry import Registry
from tarflow_scale.shards.reader import ShardSet
from tests.conftest import command

STD = 0.1
ENTROPY = 2 * (0.5 * math.log(2 * math.pi * math.e * STD**2))
"""Of what the points are given their condition, in nats: no model costs less on average."""


def points(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    t = rng.uniform(-1, 1, (num, 1))
    mean = np.concatenate([np.sin(3 * t), t**2], axis=1)
    return (mean + STD * rng.standard_normal((num, 2))).astype("f4"), t.astype("f4")


def train_arguments(folder: Path, data: str, model: str, *more: str) -> list[str]:
    return [
        "train",
        "configs/train/vectors.yaml",
        f"data.path={folder}/{data}/train",
        f"logging.path={folder}/{model}",
        f"registry.path={folder}/registry",
        f"registry.model={model}",
        "training.total_images=51200",
        "schedule.warmup_images=5120",
        "checkpoint.every_images=25600",
        "logging.preview_every_images=51200",
        "model.class_conditional=true",
        *more,
    ]


def evaluate_arguments(folder: Path, data: str, model: str) -> list[str]:
    return [
        "evaluate",
        "configs/evaluate/vectors.yaml",
        f"registry.path={folder}/registry",
        f"registry.model={model}",
        f"data.path={folder}/{data}/test",
        f"reference.path={folder}/{data}/train",
        f"reference.cache={folder}/references",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points with a condition, and the same with it for a label, packed; a model of each."""
    path = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    (x, t), (x_test, t_test) = points(4000, rng), points(1000, rng)
    np.savez(path / "given.npz", x=x, conditions=t, x_test=x_test, conditions_test=t_test)
    np.savez(path / "labelled.npz", x=x, labels=(t[:, 0] > 0) + 0, x_test=x_test, labels_test=(t_test[:, 0] > 0) + 0)
    np.savez(path / "both.npz", x=x, conditions=t, labels=np.arange(len(x)) % 2)
    for name in ("given", "labelled", "both"):
        arguments = [f"source.path={path}/{name}.npz", f"shards.path={path}/{name}"]
        assert cli.main(["prepare", "configs/prepare/vectors.yaml", *arguments]) == 0
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    for name in ("given", "labelled"):
        short = ["training.total_images=12800", "logging.preview_every_images=12800"] if name == "labelled" else []
        result = command(*train_arguments(folder, name, name, *short))
        assert result.returncode == 0, result.stderr
        assert cli.main(evaluate_arguments(folder, name, name)) == 0
    return folder


def nats_of(folder: Path, model: str) -> tuple[float, float]:
    report = Registry(f"{folder}/registry", model).state().reports[1][-1]
    return report.metrics["nats"].value, report.baselines["gaussian_nats"]


def test_given_their_condition_points_cost_little_more_than_their_entropy(trained: Path) -> None:
    nats, gaussian = nats_of(trained, "given")
    assert ENTROPY - 0.15 < nats < ENTROPY + 0.5
    assert gaussian > 0.5  # which is given nothing


def test_a_notebook_gets_densities_and_samples(trained: Path) -> None:
    flow = load("given@latest", registry=f"{trained}/registry")
    y = torch.full((500, 1), 0.5)
    x = flow.sample(500, y, seed=0)
    assert torch.allclose(x.mean(dim=0), torch.tensor([math.sin(1.5), 0.25]), atol=0.08)
    batch = ShardSet(f"{trained}/given/test").take(np.arange(1000))
    assert batch.conditions is not None
    values, given = torch.from_numpy(batch.events), torch.from_numpy(batch.conditions)
    assert abs(float(-flow.log_prob(values, given).mean().detach()) - nats_of(trained, "given")[0]) < 1e-4


def test_previews_and_logs_of_vectors(trained: Path) -> None:
    assert list((trained / "labelled" / "previews").glob("images-*.png"))
    assert not list((trained / "given" / "previews").glob("images-*.png"))  # there is no density without a condition
    lines = [json.loads(line) for line in (trained / "given" / "log.jsonl").read_text().splitlines()]
    assert all(line["bits_per_dim"] is None for line in lines)
    assert lines[-1]["nats_per_dim"] < lines[0]["nats_per_dim"]


def test_vectors_are_generated_in_the_format_that_trains(trained: Path, tmp_path: Path) -> None:
    arguments = [
        *("generate", f"registry.path={trained}/registry", "registry.model=labelled", "cluster.executor=local"),
        *("sampling.num_images=300", "sampling.batch_size=50", "shards.samples_per_shard=100"),
    ]
    assert cli.main([*arguments, f"shards.path={tmp_path}/a"]) == 0
    assert cli.main([*arguments, f"shards.path={tmp_path}/b", "sampling.batch_size=50"]) == 0
    assert cli.main(["prepare", "--check", f"{tmp_path}/a"]) == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir() if file.is_file()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir() if file.is_file()}
    shards = ShardSet(f"{tmp_path}/a")
    flow = load("labelled@latest", registry=f"{trained}/registry")
    expected = flow.sample(50, torch.arange(50) % 2, seed=0)
    assert np.allclose(shards.take(np.arange(50)).events, expected.numpy(), atol=1e-6)
    mixed = [
        f"data.mix=[{{path: {tmp_path}/a, weight: 1}}]",
        "training.total_images=5120",
        "schedule.warmup_images=512",
    ]
    result = command(*train_arguments(trained, "labelled", "mixed", *mixed))
    assert result.returncode == 0, result.stderr


def test_an_exported_model_says_what_it_is_of(trained: Path, tmp_path: Path) -> None:
    registry = [f"registry.path={trained}/registry", "registry.model=given", "registry.version=latest"]
    assert cli.main(["models", "export", *registry, f"command.path={tmp_path}/out", "command.licence=mit"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vectors of 2" in card
    assert "image" not in card.partition("| where it came from")[0]
    (block,) = (part.partition("```")[0] for part in card.split("```python\n")[1:])
    exec(block.replace("PATH_OF_THIS_FOLDER", f"{tmp_path}/out"), {})


@pytest.mark.slow
def test_a_flow_may_do_without_what_its_data_are_given_with(trained: Path, tmp_path: Path) -> None:
    short = ["training.total_images=5120", "schedule.warmup_images=512", "model.class_conditional=false"]
    result = command(*train_arguments(trained, "given", "alone", *short))
    assert result.returncode == 0, result.stderr
    (tmp_path / "dropped.yaml").write_text("name: nats\nmetric: nats\nlabels: none\n")
    protocol = f"metrics.protocols=[{tmp_path}/dropped.yaml]"
    assert cli.main([*evaluate_arguments(trained, "given", "alone"), protocol]) == 0
    registry = [f"registry.path={trained}/registry", "registry.model=alone", "registry.version=latest"]
    assert cli.main(["models", "export", *registry, f"command.path={tmp_path}/out", "command.licence=mit"]) == 0
    assert "flow.sample(16, seed=0)" in (tmp_path / "out" / "README.md").read_text()
    assert cli.main(["generate", *registry, f"shards.path={tmp_path}/x", "sampling.num_images=10"]) == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_workers_and_a_stop_change_nothing(trained: Path, tmp_path: Path) -> None:
    """Two ranks that read by worker processes, stopped and resumed, see what one process sees."""
    short = ["training.total_images=10240", "schedule.warmup_images=512", "checkpoint.every_images=5120"]
    two = [*short, "training.micro_batch_size=128", "data.num_workers=2", "parallelism.zero_stage=2"]
    one = command(*train_arguments(trained, "given", "one", *short, f"logging.path={tmp_path}/one"))
    assert one.returncode == 0, one.stderr
    half = [*two, f"logging.path={tmp_path}/two", "training.max_seconds=0.01"]
    stopped = command(*train_arguments(trained, "given", "two", *half), ranks=2)
    assert "stopped by training.max_seconds" in stopped.stderr
    rest = command(*train_arguments(trained, "given", "two", *two, f"logging.path={tmp_path}/two"), ranks=2)
    assert rest.returncode == 0, rest.stderr
    x, y = torch.randn(64, 2), torch.rand(64, 1)
    first, second = (load(f"{name}@latest", registry=f"{trained}/registry") for name in ("one", "two"))
    with torch.no_grad():
        assert torch.allclose(first.log_prob(x, y), second.log_prob(x, y), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["training.noise={kind: uniform}"], "training.noise.kind must be none for vectors"),
        (["training.label_drop=0.1"], "cannot be dropped"),
        (["data.augmentation.flip=true"], "needs images"),
        (["model={kind: glow, levels: 1, steps_per_level: 1}"], "is for images"),
        (["data.path=BOTH"], "on labels or on numbers"),
    ],
)
def test_training_settings_of_images_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], settings: list[str], reason: str
) -> None:
    settings = [setting.replace("BOTH", f"{folder}/both/train") for setting in settings]
    assert cli.main(train_arguments(folder, "given", "refused", *settings)) == 2
    assert reason in capsys.readouterr().err


def test_verbs_for_images_say_so(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = [f"registry.path={trained}/registry", "registry.model=given"]
    assert cli.main(["generate", *registry, f"shards.path={tmp_path}/x", "sampling.num_images=10"]) == 2
    assert "flow that is not conditioned on numbers" in capsys.readouterr().err
    assert cli.main(["prepare", "--npz", f"{trained}/given/test", f"{tmp_path}/x.npz"]) == 2
    assert "--npz works only for images" in capsys.readouterr().err
    wrong = [
        *evaluate_arguments(trained, "given", "given"),
        "metrics.protocols=[evals/protocols/digits-bits-per-dim.yaml]",
    ]
    assert cli.main(wrong) == 2
    assert "is for 4-bit images" in capsys.readouterr().err
    score = ["score", *registry, f"data.path={trained}/given/test", f"calibration.path={trained}/given/test"]
    assert cli.main([*score, f"scoring.path={tmp_path}/scores"]) == 2
    assert "no likelihood of images" in capsys.readouterr().err
    (tmp_path / "dropped.yaml").write_text("name: dropped\nmetric: nats\nlabels: none\n")
    dropped = f"metrics.protocols=[{tmp_path}/dropped.yaml]"
    assert cli.main([*evaluate_arguments(trained, "given", "given"), dropped]) == 2
    assert "must give labels to a flow" in capsys.readouterr().err
    labelled = ["generate", f"registry.path={trained}/registry", "registry.model=labelled", f"shards.path={tmp_path}/x"]
    assert cli.main([*labelled, "sampling.num_images=10", "sampling.guard.saturated_share=0.5"]) == 2
    assert "need a model of images" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "scores").exists()
