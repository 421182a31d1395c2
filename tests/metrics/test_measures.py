"""Every measure and its jackknife, compared with torch-fidelity on the same images, and with closed forms."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.metrics import jackknife
from tarflow_scale.metrics.features import open_extractor
from tarflow_scale.metrics.frechet import Moments, frechet, frechet_distance
from tarflow_scale.metrics.inception_score import inception_score
from tarflow_scale.metrics.kernel import kernel_distance
from tarflow_scale.metrics.manifold import manifold_share
from tarflow_scale.metrics.measure import Measure, Measured, Task, in_rounds
from tarflow_scale.metrics.parts import FeatureSet, Images, write_arrays
from tests.metrics.inception import random_weights

NUM, SIZE = 64, 24
SUBSETS = {"num_subsets": 6, "subset_size": 40, "subset_seed": 2020}


def shuffled(tasks: list[tuple[int, Task]]) -> Iterator[tuple[tuple[int, Task], Any]]:
    """Results in random order, like those of workers."""
    for unit in random.sample(tasks, len(tasks)):
        yield unit, unit[1].run()


def one(measure: Measure) -> Measured:
    return in_rounds({"it": measure}, shuffled)["it"]


def feature_set(folder: Path, rows: dict[str, np.ndarray], kind: Any = "sample", extractor: str = "x") -> FeatureSet:
    """Rows stored in parts, like those of workers."""
    num = len(next(iter(rows.values())))
    images = Images(kind, num, 0, 8, "floor")
    features = FeatureSet(images, extractor, "none", tuple(sorted(rows)), str(folder))
    for part in features.parts():
        part.write({layer: values[part.start : part.stop] for layer, values in rows.items()})
    return features


def moments_file(folder: Path, rows: np.ndarray, layer: str = "pool") -> str:
    location = str(folder / f"reference-{layer}.npz")
    write_arrays(location, Moments.of(torch.from_numpy(rows)).to_arrays(layer))
    return location


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


def pictures(seed: int) -> torch.Tensor:
    """Pictures ``(NUM, 3, SIZE, SIZE)`` uint8 of coloured blobs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(NUM, 3, 4, 4, generator=generator) ** (1 + 0.3 * seed)
    fine = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
    return (fine * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Features of two sets of pictures by our code, and torch-fidelity's metrics of the same pictures."""
    folder = tmp_path_factory.mktemp("inception")
    weights = random_weights(folder / "weights.pth")
    layers = ("logits_unbiased", "pool", "spatial")
    images = Images("sample", NUM, 0, 8, "floor")
    wanted = FeatureSet(images, "inception-v3-compat", storage.digest(weights), layers, "")
    extract = open_extractor(wanted, {"inception-v3-compat": str(weights)}, torch.device("cpu"))
    sets: list[FeatureSet] = []
    for seed, kind in ((0, "sample"), (1, "reference")):
        found = [extract(few) for few in pictures(seed).split(32)]
        rows = {layer: torch.cat([few[layer] for few in found]).numpy() for layer in layers}
        sets.append(feature_set(folder / kind, rows, kind, "inception-v3-compat"))
    expected = calculate_metrics(
        input1=Pictures(pictures(0)),
        input2=Pictures(pictures(1)),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        kid_subsets=SUBSETS["num_subsets"],
        kid_subset_size=SUBSETS["subset_size"],
        batch_size=32,
        cuda=False,
        verbose=False,
    )
    return {"samples": sets[0], "reference": sets[1], "expected": expected, "folder": folder}


@pytest.mark.slow
def test_fid_is_torch_fidelitys(inception: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jackknife, "NUM_BLOCKS", 4)  # each costs a decomposition of 2048 x 2048
    reference = inception["reference"].rows("pool")
    found = one(frechet(inception["samples"], "pool", moments_file(inception["folder"], reference), infinity=False))
    scale = np.cov(inception["samples"].rows("pool"), rowvar=False).trace() + np.cov(reference, rowvar=False).trace()
    assert abs(found.value - inception["expected"]["frechet_inception_distance"]) <= 1e-6 * scale
    assert found.standard_error > 0


@pytest.mark.slow
def test_kid_is_torch_fidelitys(inception: dict[str, Any]) -> None:
    found = one(kernel_distance(inception["samples"], inception["reference"], **SUBSETS))
    rows = inception["samples"].rows("pool").astype(np.float64)
    scale = ((np.square(rows).mean(axis=1) + 1) ** 3).mean()  # both are differences of fp32 means of kernels this large
    assert abs(found.value - inception["expected"]["kernel_inception_distance_mean"]) <= 1e-6 * scale
    assert found.value > 100 * 1e-6 * scale  # so that the comparison says something


@pytest.mark.slow
def test_the_inception_score_is_torch_fidelitys(inception: dict[str, Any]) -> None:
    found = one(inception_score(inception["samples"], 10, 2020))
    assert found.value == pytest.approx(inception["expected"]["inception_score_mean"], rel=1e-9)
    assert found.value > 1
    assert found.standard_error > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["precision", "recall"])
def test_precision_and_recall_are_torch_fidelitys(inception: dict[str, Any], kind: Any) -> None:
    found = one(manifold_share(kind, inception["samples"], inception["reference"], 3))
    assert found.value == pytest.approx(inception["expected"][kind], abs=1e-7)  # theirs is a mean in fp32


@pytest.mark.slow
def test_spatial_features_are_seven_channels_of_seventeen_squared(inception: dict[str, Any]) -> None:
    rows = inception["samples"].rows("spatial")
    assert rows.shape == (NUM, 7 * 17 * 17)
    assert rows.min() == 0  # after the ReLU
    assert rows.std() > 0


# -- by definition -----------------------------------------------------------------------------------------------------


def gaussian(num: int, dims: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num, dims)) + shift).astype(np.float32)


def without_each(rows: np.ndarray, value: Any) -> float:
    """The jackknife error by its definition."""
    cut = jackknife.blocks(len(rows))
    return jackknife.standard_error([value(np.delete(rows, np.s_[start:stop], axis=0)) for start, stop in cut])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Moments.of(torch.from_numpy(a)), Moments.of(torch.from_numpy(b)))


@pytest.mark.parametrize("num", [7, 330])
def test_frechet_and_its_jackknife_by_definition(tmp_path: Path, num: int) -> None:
    x, y = gaussian(num, 5, 0, 0.3), gaussian(400, 5, 1)
    found = one(frechet(feature_set(tmp_path, {"pool": x}), "pool", moments_file(tmp_path, y), infinity=False))
    assert found.value == pytest.approx(distance(x, y), rel=1e-9)
    assert found.standard_error == pytest.approx(without_each(x, lambda rest: distance(rest, y)), rel=1e-6)


def test_the_same_set_is_at_distance_zero(tmp_path: Path) -> None:
    x = gaussian(300, 6, 0)
    found = one(frechet(feature_set(tmp_path, {"pool": x}), "pool", moments_file(tmp_path, x), infinity=False))
    assert abs(found.value) < 1e-6


def test_at_infinity_the_distance_of_equal_distributions_is_nearer_to_zero(tmp_path: Path) -> None:
    """For samples of a Gaussian and its exact moments, the plain distance has a much larger bias."""
    x = gaussian(2000, 12, 0)
    exact = Moments(10**9, np.zeros(12), np.eye(12) * (10**9 - 1))
    location = str(tmp_path / "exact.npz")
    write_arrays(location, exact.to_arrays("pool"))
    samples = feature_set(tmp_path, {"pool": x})
    plain, infinite = (one(frechet(samples, "pool", location, infinity)) for infinity in (False, True))
    assert plain.value > 0.01
    assert abs(infinite.value) < plain.value / 3
    assert 0 < plain.standard_error < plain.value


def intercept_by_definition(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> float:
    """Intercept of the line in 1 / n through the distances of disjoint runs of 2, 4, 6, 8 and 10 of ten groups."""
    points = []
    for size in (2, 4, 6, 8, 10):
        for low in range(0, 10 - size + 1, size):
            mine = x[(group >= low) & (group < low + size)]
            points.append((1 / len(mine), distance(mine, y)))
    design = np.stack([np.ones(len(points)), [inverse for inverse, _ in points]], axis=1)
    return float(np.linalg.lstsq(design, np.array([value for _, value in points]), rcond=None)[0][0])


def test_the_distance_at_infinity_and_its_jackknife_by_definition(tmp_path: Path) -> None:
    """If a block is left out, the other blocks stay in their groups."""
    x, y = gaussian(530, 4, 0, 0.3), gaussian(400, 4, 1)
    group = np.concatenate([np.full(stop - start, i // 5) for i, (start, stop) in enumerate(jackknife.blocks(len(x)))])
    both = np.concatenate([x, group[:, None].astype(np.float32)], axis=1)
    found = one(frechet(feature_set(tmp_path, {"pool": x}), "pool", moments_file(tmp_path, y), infinity=True))
    assert found.value == pytest.approx(intercept_by_definition(x, y, group), rel=1e-7)
    expected = without_each(both, lambda rest: intercept_by_definition(rest[:, :-1].copy(), y, rest[:, -1]))
    assert found.standard_error == pytest.approx(expected, rel=1e-5)


def kernel_all(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD over all images, without the term of y alone."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    inside, across = (a @ a.T / a.shape[1] + 1) ** 3, (a @ b.T / a.shape[1] + 1) ** 3
    n = len(a)
    return float((inside.sum() - inside.trace()) / (n * (n - 1)) - 2 * across.mean())


def test_the_jackknife_of_the_kernel_distance_by_definition(tmp_path: Path) -> None:
    x, y = gaussian(130, 5, 0, 0.3), gaussian(90, 5, 1)
    sets = feature_set(tmp_path / "x", {"pool": x}), feature_set(tmp_path / "y", {"pool": y})
    found = one(kernel_distance(*sets, **SUBSETS))
    assert found.standard_error == pytest.approx(without_each(x, lambda rest: kernel_all(rest, y)), rel=1e-6)


def share_by_definition(kind: str, x: np.ndarray, y: np.ndarray, k: int = 3) -> float:
    balls, asking = (y, x) if kind == "precision" else (x, y)
    own = np.linalg.norm(balls[:, None].astype(np.float64) - balls[None], axis=2)
    radii = np.sort(own, axis=1)[:, k]
    across = np.linalg.norm(asking[:, None].astype(np.float64) - balls[None], axis=2)
    return float((across <= radii).any(axis=1).mean())


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of the usual 50 blocks costs precision and recall several reads of files."""
    monkeypatch.setattr(jackknife, "NUM_BLOCKS", 12)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("kind", ["precision", "recall"])
@pytest.mark.parametrize("num", [9, 140])
def test_precision_and_recall_and_their_jackknife_by_definition(tmp_path: Path, kind: Any, num: int) -> None:
    x, y = gaussian(num, 4, 0, 0.5), gaussian(110, 4, 1)
    sets = feature_set(tmp_path / "x", {"pool": x}), feature_set(tmp_path / "y", {"pool": y})
    found = one(manifold_share(kind, *sets, 3))
    assert 0 < found.value < 1
    assert found.value == pytest.approx(share_by_definition(kind, x, y), abs=1e-12)
    expected = without_each(x, lambda rest: share_by_definition(kind, rest, y))
    assert found.standard_error == pytest.approx(expected, abs=1e-12)


def score_by_definition(logits: np.ndarray, splits: np.ndarray) -> float:
    p = torch.from_numpy(logits).double().softmax(1).numpy()
    scores = []
    for split in sorted(set(splits.tolist())):
        mine = p[splits == split]
        scores.append(np.exp((mine * (np.log(mine) - np.log(mine.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def test_the_jackknife_of_the_inception_score_by_definition(tmp_path: Path) -> None:
    """If a block is left out, the other blocks stay in their splits."""
    from tarflow_scale.metrics.inception_score import _splits

    logits = gaussian(160, 11, 0) * 2
    splits = _splits(160, 4, 2020)
    both = np.concatenate([logits, splits[:, None].astype(np.float32)], axis=1)
    found = one(inception_score(feature_set(tmp_path, {"logits_unbiased": logits}), 4, 2020))
    assert found.value == pytest.approx(score_by_definition(logits, splits), rel=1e-9)
    expected = without_each(both, lambda rest: score_by_definition(rest[:, :-1], rest[:, -1]))
    assert found.standard_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("few_blocks")
def test_rounds_of_several_measures_keep_their_results_apart(tmp_path: Path) -> None:
    x, y = gaussian(60, 3, 0, 0.2), gaussian(70, 3, 1)
    samples, reference = feature_set(tmp_path / "x", {"pool": x}), feature_set(tmp_path / "y", {"pool": y})
    location = moments_file(tmp_path, y)

    def measures() -> dict[str, Measure]:
        return {
            "recall": manifold_share("recall", samples, reference, 2),
            "plain": frechet(samples, "pool", location, infinity=False),
            "infinity": frechet(samples, "pool", location, infinity=True),
            "kernel": kernel_distance(samples, reference, 3, 20, 0),
        }

    together = in_rounds(measures(), shuffled)
    for name, measure in measures().items():
        assert together[name] == one(measure)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_part_that_is_missing_or_damaged_gives_no_number(tmp_path: Path, damage: str) -> None:
    samples = feature_set(tmp_path, {"pool": gaussian(600, 4, 0)})
    location = moments_file(tmp_path, gaussian(50, 4, 1))
    part = Path(samples.parts()[1].location)
    content = part.read_bytes()
    if damage == "gone":
        part.unlink()
    else:
        middle = len(content) // 2
        part.write_bytes(
            content[:middle]
            if damage == "cut"
            else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
    with pytest.raises(DataError, match=r"(does not exist|is damaged).*run the same command again"):
        one(frechet(samples, "pool", location, infinity=False))


def test_rows_of_any_range_are_those_of_the_whole(tmp_path: Path) -> None:
    rows = gaussian(700, 2, 0)
    samples = feature_set(tmp_path, {"pool": rows})
    for start, stop in itertools.combinations([0, 1, 249, 250, 251, 500, 699, 700], 2):
        assert (samples.rows("pool", start, stop) == rows[start:stop]).all()
