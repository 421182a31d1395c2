"""Extractors: pixels in levels, and Inception only with the weights that are meant."""

from pathlib import Path

import pytest
import torch

from tarflow_scale.config import FrechetProtocol
from tarflow_scale.errors import DataError
from tarflow_scale.metrics.features import open_extractor, weights_digest

CPU = torch.device("cpu")


def protocol(**changes: object) -> FrechetProtocol:
    facts = {"name": "x", "metric": "frechet", "extractor": "pixels", "num_images": 10, "bit_depth": 4}
    return FrechetProtocol.model_validate(facts | changes)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_pixels_are_levels(bits: int) -> None:
    images = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    found = open_extractor(protocol(bit_depth=bits), None, CPU)(images)
    assert found.dtype == torch.float64
    assert torch.equal(found, (images // 2 ** (8 - bits)).flatten(1).double())


def test_inception_needs_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    inception = protocol(extractor="inception-v3-compat", bit_depth=8)
    with pytest.raises(DataError, match="no Inception weights at .*set metrics.extractor_weights to it"):
        open_extractor(inception, None, CPU)
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"is not the extractor of x \(sha256 .*, not 6726825d\)"):
        weights_digest(inception, str(wrong))


def test_inception_runs_with_weights_of_the_expected_digest(tmp_path: Path) -> None:
    """Randomly initialised weights under their own digest: the path by which real ones go."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from tarflow_scale import storage

    torch.manual_seed(0)
    original = torch.hub.load_state_dict_from_url
    captured: dict[str, torch.Tensor] = {}

    class Stop(Exception):
        pass

    def intercept(self: torch.nn.Module, state: object, *_: object, **__: object) -> None:
        captured.update(torch.nn.Module.state_dict(self))
        raise Stop

    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    patch = pytest.MonkeyPatch()
    patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", intercept)
    with pytest.raises(Stop):
        FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(empty))
    patch.undo()
    assert torch.hub.load_state_dict_from_url is original
    weights = tmp_path / "weights.pth"
    torch.save(captured, weights)
    inception = protocol(extractor="inception-v3-compat", bit_depth=8, extractor_sha256=storage.digest(weights))
    extract = open_extractor(inception, str(weights), CPU)
    grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    found = extract(grey)
    assert found.shape == (2, 2048)
    assert torch.isfinite(found).all()
    assert torch.equal(found, extract(grey.expand(-1, 3, -1, -1)))
