"""Extractors: pixels in levels, Inception only with the expected weights, and extractors of other packages."""

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from tarflow_scale import storage
from tarflow_scale.config.protocols import FrechetProtocol
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.metrics.features import open_extractor, published_digest, weights_digest
from tarflow_scale.metrics.parts import FeatureSet, Images
from tests.metrics.inception import random_weights

CPU = torch.device("cpu")
INCEPTION = "inception-v3-compat"


def protocol(**changes: object) -> FrechetProtocol:
    facts = {"name": "x", "metric": "frechet", "extractor": "pixels", "num_images": 10, "bit_depth": 4}
    return FrechetProtocol.model_validate(facts | changes)


def wanted(extractor: str, digest: str, *layers: str, bits: int = 8) -> FeatureSet:
    return FeatureSet(Images("sample", 10, 0, bits, "floor"), extractor, digest, layers or ("pool",), "")


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_pixels_are_levels(bits: int) -> None:
    images = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    found = open_extractor(wanted("pixels", "none", bits=bits), {}, CPU)(images)["pool"]
    assert torch.equal(found, (images // 2 ** (8 - bits)).flatten(1).float())


def test_inception_needs_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    inception = protocol(extractor=INCEPTION, bit_depth=8)
    with pytest.raises(
        DataError, match=f"weights of {INCEPTION} are missing at .*set metrics.extractor_weights.{INCEPTION} to"
    ):
        weights_digest(inception, {})
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"does not match the extractor of x \(sha256 .*, not 6726825d\)"):
        weights_digest(inception, {INCEPTION: str(wrong)})
    with pytest.raises(DataError, match=rf"does not match the extractor of {INCEPTION} \(sha256 .*, not 6726825d\)"):
        published_digest(INCEPTION, {INCEPTION: str(wrong)})
    with pytest.raises(DataError, match="differ between machines"):
        open_extractor(wanted(INCEPTION, "0" * 64), {INCEPTION: str(wrong)}, CPU)


def test_inception_runs_with_weights_of_the_expected_digest(tmp_path: Path) -> None:
    """Random weights under their own digest take the same path as published weights."""
    weights = random_weights(tmp_path / "weights.pth")
    digest = storage.digest(weights)
    named = {INCEPTION: str(weights)}
    assert weights_digest(protocol(extractor=INCEPTION, bit_depth=8, extractor_sha256=digest), named) == digest
    extract = open_extractor(wanted(INCEPTION, digest, "spatial"), named, CPU)
    grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    found = extract(grey)["spatial"]
    assert found.shape == (2, 7 * 17 * 17)
    assert torch.equal(found, extract(grey.expand(-1, 3, -1, -1))["spatial"])


@pytest.mark.parametrize("axis", [2, 3])
def test_inception_stretches_both_sides_to_its_own_size(axis: int, tmp_path: Path) -> None:
    """An image that is constant along one side stays so; 23 pixels become 299, and the other side is unchanged."""
    weights = random_weights(tmp_path / "weights.pth")
    extract = open_extractor(wanted(INCEPTION, storage.digest(weights)), {INCEPTION: str(weights)}, CPU)
    line = torch.randint(0, 256, (1, 3, 299, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    narrow, wide = line.expand(-1, -1, -1, 23), line.expand(-1, -1, -1, 299)
    if axis == 2:
        narrow, wide = narrow.mT, wide.mT
    assert narrow.shape[axis] == 23
    assert torch.equal(extract(narrow)["pool"], extract(wide)["pool"])


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("ran"),)


def test_inceptions_weights_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a protocol has their digest; torch-fidelity alone would unpickle the file."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Malicious()}, "weights.pth")
    digest = storage.digest(Path("weights.pth"))
    with pytest.raises(DataError, match="weights.pth cannot be read as plain weights"):
        open_extractor(wanted(INCEPTION, digest), {INCEPTION: "weights.pth"}, CPU)
    assert not Path("ran").exists()


def test_inceptions_features_are_torch_fidelitys(tmp_path: Path) -> None:
    """Ours has its batch norms folded; its features agree much better than those of two different pictures."""
    weights = random_weights(tmp_path / "weights.pth")
    images = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8)
    names = {"pool": "2048", "logits_unbiased": "logits_unbiased"}
    theirs = create_feature_extractor(
        INCEPTION, list(names.values()), cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )
    with torch.no_grad():
        expected = dict(zip(names, theirs(images), strict=True))
    found = open_extractor(wanted(INCEPTION, storage.digest(weights), *names), {INCEPTION: str(weights)}, CPU)(images)
    for layer in names:
        scale = expected[layer].abs().max()
        assert (found[layer] - expected[layer]).abs().max() <= 1e-6 * scale
        assert (found[layer][0] - found[layer][1]).abs().max() > 1e-2 * scale


class MeanColour(FeatureExtractorBase):
    """An extractor that a user's package may offer."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("mean",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "mean"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        return (input.float().mean(dim=(2, 3)),)


def test_an_entry_point_offers_an_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("mean-colour", "tests.metrics.test_features:MeanColour", "tarflow_scale.extractors")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [point])
    own: Any = protocol(extractor="mean-colour")
    digest = weights_digest(own, {})
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    found = open_extractor(wanted("mean-colour", digest), {}, CPU)(images)["pool"]
    assert torch.equal(found, images.float().mean(dim=(2, 3)))
    with pytest.raises(
        ConfigError, match=r"unknown extractor 'other' \(known: dinov2-vitl14, inception-v3-compat, mean-colour, pixels"
    ):
        weights_digest(protocol(extractor="other"), {})
