"""``score``: a row for every image, equal on every executor, and how well anomalies are separated."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from tarflow_scale import cli
from tarflow_scale.density.anomaly import compressed_bits_per_dim
from tarflow_scale.errors import StorageError
from tarflow_scale.flows import TarFlow
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.loading import load_version
from tarflow_scale.metrics.bits import dequantized_draws
from tarflow_scale.registry import Registry
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest
from tarflow_scale.verbs.score.worker import Rater, ScoringUnit
from tests.conftest import TOP, Trained, command


def shuffled_pixels(source: Path, target: Path) -> Path:
    """The images of a data set with their pixels in another order, each in its own; without labels."""
    shards = ShardSet(str(source))
    batch = next(shards.batches(0, shards.manifest.num_images, shards.manifest.num_images))
    random = np.random.default_rng(0)
    images = [random.permutation(image.reshape(-1)).reshape(image.shape) for image in batch.events]
    shard = PackedShard.of("a.tar", (Sample(f"{i:05d}", image, None) for i, image in enumerate(images)))
    record = shard.write(str(target))
    facts = shards.manifest.model_dump() | {"name": "shuffled", "class_names": (), "shards": (record,)}
    publish_manifest(str(target), Manifest.model_validate(facts))
    return target


@pytest.fixture(scope="module")
def shuffled(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shuffled_pixels(trained.data / "test", tmp_path_factory.mktemp("score") / "shuffled")


def arguments(trained: Trained, out: Path, shuffled: Path | None, *more: str) -> list[str]:
    return [
        "score",
        f"registry.path={trained.registry}",
        "registry.model=small",
        f"data.path={trained.data}/test",
        f"calibration.path={trained.data}/train",
        *([] if shuffled is None else [f"anomalies.path={shuffled}"]),
        f"scoring.path={out}",
        "scoring.batch_size=100",
        "cluster.executor=local",
        *more,
    ]


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], which: str, score: str) -> np.ndarray:
    return np.array([float(row[score]) for row in rows if row["set"] == which])


@pytest.fixture(scope="module")
def scored(trained: Trained, shuffled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("score") / "out"
    assert cli.main(arguments(trained, out, shuffled)) == 0
    return out


@pytest.fixture(scope="module")
def held_out(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Scores of the images that calibrate, as images to score."""
    out = tmp_path_factory.mktemp("score") / "out"
    assert cli.main(arguments(trained, out, None, f"data.path={trained.data}/train")) == 0
    rows = rows_of(out)
    return {score: column(rows, "data", score) for score in ("likelihood", "complexity", "typicality")}


def test_every_image_has_a_row_with_the_numbers_of_its_pixels(
    trained: Trained, scored: Path, held_out: dict[str, np.ndarray]
) -> None:
    rows = rows_of(scored)
    shards = ShardSet(str(trained.data / "test"))
    num = shards.manifest.num_images
    assert [(row["set"], int(row["sample"])) for row in rows] == [
        (which, number) for which in ("data", "anomalies") for number in range(num)
    ]
    batch = next(shards.batches(0, num, num))
    assert [int(row["label"]) for row in rows[:num]] == batch.labels.tolist()
    assert {row["label"] for row in rows[num:]} == {"-1"}
    assert [row["origin"] for row in rows[:num]] == [shards.origin_of(one) for one in shards.read(np.arange(num))]
    assert len({row["origin"] for row in rows[:num]}) == num
    complexity = column(rows, "data", "likelihood") - column(rows, "data", "complexity")
    assert np.allclose(complexity, compressed_bits_per_dim(batch.events >> 4))
    summary = json.loads((scored / "summary.json").read_text())
    typical = held_out["likelihood"].mean()
    assert summary["typical_bits_per_dim"] == pytest.approx(typical)
    assert np.allclose(column(rows, "data", "typicality"), abs(column(rows, "data", "likelihood") - typical))
    assert not (scored / "parts").exists()


def test_thresholds_are_those_of_held_out_images_and_separation_that_of_the_table(
    scored: Path, held_out: dict[str, np.ndarray]
) -> None:
    rows, summary = rows_of(scored), json.loads((scored / "summary.json").read_text())
    for score, facts in summary["scores"].items():
        normal, anomalous = (column(rows, which, score) for which in ("data", "anomalies"))
        assert 0.04 < (held_out[score] > facts["threshold"]).mean() <= 0.05
        assert facts["flagged"]["data"] == (normal > facts["threshold"]).mean()
        assert facts["flagged"]["anomalies"] == (anomalous > facts["threshold"]).mean()
        flags = [row[f"{score}_flagged"] == "True" for row in rows if row["set"] == "anomalies"]
        assert np.mean(flags) == facts["flagged"]["anomalies"]
        truth = np.repeat([0, 1], [len(normal), len(anomalous)])
        assert facts["auroc"] == pytest.approx(roc_auc_score(truth, np.concatenate([normal, anomalous])))
    assert summary["scores"]["likelihood"]["auroc"] > 0.9  # shuffled pixels are no digits


def test_marginal_likelihood_is_the_sum_over_labels(trained: Trained, tmp_path: Path) -> None:
    more = ["scoring.labels=marginal", "scoring.num_draws=2"]
    assert cli.main(arguments(trained, tmp_path / "out", None, *more)) == 0
    found = column(rows_of(tmp_path / "out"), "data", "likelihood")[:3]
    flow = load_version(str(trained.registry), "small", 1)
    batch = next(ShardSet(str(trained.data / "test")).batches(0, 3, 3))
    from tarflow_scale.config.protocols import BitsPerDimProtocol

    protocol = BitsPerDimProtocol(name="p", metric="bits_per_dim", bit_depth=4, num_draws=2)
    for number in range(3):
        total = 0.0
        for x in dequantized_draws(batch, protocol):
            for label in range(10):
                with torch.no_grad():
                    total += math.exp(float(flow.log_prob(x[number : number + 1], torch.tensor([label])))) / 20
        assert found[number] == pytest.approx(-math.log2(total) / 64 + 3, rel=1e-5)


def test_a_background_model_adds_the_ratio(trained: Trained, scored: Path, tmp_path: Path) -> None:
    flow = load_version(str(trained.registry), "small", 1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.7)
    known = Registry(str(trained.registry), "small").resolve(1)
    facts = known.model_dump(mode="json", exclude={"version", "files", "configuration"})
    Registry(str(tmp_path / "registry"), "other").register(flow_files(flow), facts, "a worse model")
    other = [f"registry.path={tmp_path}/registry", "registry.model=other"]
    assert cli.main(arguments(trained, tmp_path / "of-it", None, *other)) == 0
    background = [f"background.path={tmp_path}/registry", "background.model=other"]
    assert cli.main(arguments(trained, tmp_path / "out", None, *background)) == 0
    ours, theirs = (column(rows_of(out), "data", "likelihood") for out in (scored, tmp_path / "of-it"))
    assert np.allclose(column(rows_of(tmp_path / "out"), "data", "likelihood_ratio"), ours - theirs)
    assert (ours < theirs).mean() > 0.9


def test_what_a_killed_job_had_made_is_not_made_again(
    trained: Trained, shuffled: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ScoringUnit] = []
    real = Rater.run

    def until_it_dies(self: Rater, unit: ScoringUnit) -> None:
        if len(made) == 1:
            raise StorageError("the machine went away")
        made.append(unit)
        real(self, unit)

    monkeypatch.setattr(Rater, "run", until_it_dies)
    assert cli.main(arguments(trained, tmp_path / "out", shuffled)) == 2
    assert not (tmp_path / "out/scores.csv").exists()
    (kept,) = (tmp_path / "out/parts").glob("*/*.npz")
    time = kept.stat().st_mtime_ns

    def watched(self: Rater, unit: ScoringUnit) -> None:
        assert unit.part.location != str(kept)
        assert kept.stat().st_mtime_ns == time
        real(self, unit)

    monkeypatch.setattr(Rater, "run", watched)
    assert cli.main(arguments(trained, tmp_path / "out", shuffled)) == 0
    assert (tmp_path / "out/scores.csv").read_bytes() == (scored / "scores.csv").read_bytes()


@pytest.mark.ray
def test_ray_and_parquet_hold_the_same_numbers(
    trained: Trained, shuffled: Path, scored: Path, tmp_path: Path, on_ray: list[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    more = [*on_ray, "cluster.num_workers=2", "scoring.format=parquet"]
    result = command(*arguments(trained, tmp_path / "out", shuffled, *more))
    assert result.returncode == 0, result.stderr
    assert "simple images of another kind may have lower values" in result.stdout
    found = parquet.read_table(tmp_path / "out/scores.parquet").to_pylist()
    assert [{key: str(value) for key, value in row.items()} for row in found] == rows_of(scored)


def test_maps_and_the_last_lines_show_the_least_likely_images(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(trained, tmp_path / "out", None, "scoring.maps=5")) == 0
    picture = Image.open(tmp_path / "out/maps.png")
    assert picture.size == ((8 * 9 + 1) * 12, (2 * 9 + 1) * 12)  # five pairs in rows of four, 12 pixels a pixel
    pixels = np.asarray(picture.convert("RGB"))[6::12, 6::12]
    said = capsys.readouterr().out
    assert "score by small@1, higher is more anomalous" in said
    rows = rows_of(tmp_path / "out")
    found = said.partition("most anomalous images of data  class  likelihood\n")[2].splitlines()[1:11]
    assert [line.split() for line in found] == [
        [row["origin"], row["label"], f"{float(row['likelihood']):.4f}"]
        for row in sorted(rows, key=lambda row: -float(row["likelihood"]))[:10]
    ]
    likelihood = column(rows, "data", "likelihood")
    worst = int(likelihood.argmax())
    stored = ShardSet(str(trained.data / "test")).take(np.array([worst])).events[0, 0]
    assert (pixels[1:9, 1:9] == stored[:, :, None]).all()
    overlay = pixels[1:9, 10:18].astype(int)
    assert (overlay[:, :, 0] > overlay[:, :, 1]).any()  # red somewhere
    assert (overlay[:, :, 1] == overlay[:, :, 2]).all()


def test_maps_of_a_model_that_divides_nothing_are_refused_before_any_work(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TarFlow, "divides_surprise", False)
    assert cli.main(arguments(trained, tmp_path / "out", None, "scoring.maps=5")) == 2
    assert capsys.readouterr().err == (
        "tarflow-scale: error: scoring.maps needs a model that divides surprise among pixels, which a continuous flow "
        "does only up to model.exact_trace_dims dimensions (got TarFlow of 64); set scoring.maps=0\n"
    )
    assert not (tmp_path / "out").exists()


def test_images_that_the_model_cannot_score_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.data / "test", other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"bit_depth": 8}))
    assert cli.main(arguments(trained, tmp_path / "out", other)) == 2
    assert capsys.readouterr().err == (
        "tarflow-scale: error: small@1 scores 1x8x8 images, 4 bit (got 1x8x8 images, 8 bit in digits/test); pack "
        "images of the model's size and bit depth\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_committed_configuration_is_one(
    tmp_path: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        f"registry.path={trained.registry}", "registry.model=small", "registry.version=1",
        f"data.path={trained.data}/test", f"calibration.path={trained.data}/test", f"scoring.path={tmp_path}/out",
    ]  # fmt: skip
    assert cli.main(["score", str(TOP / "configs/score/digits.yaml"), *paths, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "score by small@1" in said
    assert f"output            {tmp_path}/out/scores.csv\n" in said
    assert not (tmp_path / "out").exists()
