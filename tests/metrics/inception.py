"""An Inception with random weights, for tests of code that uses the published one."""

from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Stop(Exception):
    pass


def random_weights(path: Path) -> Path:
    """Save random weights in the format of the published file; activations keep a magnitude of about 1."""
    captured: dict[str, torch.Tensor] = {}

    def intercept(self: torch.nn.Module, *_: object, **__: object) -> None:
        captured.update(torch.nn.Module.state_dict(self))
        raise _Stop

    empty = path.with_name("empty.pth")
    torch.save({}, empty)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", intercept)
        with pytest.raises(_Stop):
            FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(empty))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in captured.items():
        if name.endswith("conv.weight"):
            fan_in = tensor[0].numel()
            captured[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith(("bn.weight", "bn.running_var")):
            captured[name] = 0.8 + 0.4 * torch.rand(tensor.shape, generator=generator)
        elif name.endswith(("bn.bias", "bn.running_mean")):
            captured[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    torch.save(captured, path)
    return path
