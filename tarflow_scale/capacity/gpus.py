"""GPUs and their figures from NVIDIA's data sheets.

Peaks are without sparsity, which the larger numbers of the sheets assume. Link speeds are bytes per second in one
direction; the sheets add both directions. Network speeds, per GPU, are those of NVIDIA's own eight-GPU machine; a
rented machine may have less.
"""

from dataclasses import dataclass

from tarflow_scale.errors import ConfigError

__all__ = ["CARDS", "Card", "card_named", "card_of_device"]

_GB = 1e9


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        name: name of the card on the command line.
        device: a part of the CUDA device name of the card.
        memory_bytes: memory of the card.
        bf16_flops: peak of dense operations per second with tensor cores (V100: fp16).
        fp32_flops: peak of operations per second without tensor cores, for ``precision=fp32``.
        link_bytes_per_second: speed to other cards of the machine, in one direction, of NVLink or else of PCIe.
        network_bytes_per_second: speed to other machines, in one direction.
        network: the network in words.
    """

    name: str
    device: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    network: str


CARDS = (
    Card("h200", "H200", 141 * _GB, 989.5e12, 67e12, 450 * _GB, 50 * _GB, "DGX H200: 400 Gb/s a GPU"),
    Card("h100-pcie", "H100 PCIe", 80 * _GB, 756e12, 51e12, 64 * _GB, 25 * _GB, "200 Gb/s a GPU"),
    Card("h100", "H100", 80 * _GB, 989.5e12, 67e12, 450 * _GB, 50 * _GB, "DGX H100: 400 Gb/s a GPU"),
    Card("b200", "B200", 180 * _GB, 2250e12, 75e12, 900 * _GB, 50 * _GB, "DGX B200: 400 Gb/s a GPU"),
    Card("a100", "A100", 80 * _GB, 312e12, 19.5e12, 300 * _GB, 25 * _GB, "DGX A100: 200 Gb/s a GPU"),
    Card("a100-40gb", "A100-SXM4-40GB", 40 * _GB, 312e12, 19.5e12, 300 * _GB, 25 * _GB, "DGX A100: 200 Gb/s"),
    Card("l40s", "L40S", 48 * _GB, 362e12, 91.6e12, 32 * _GB, 12.5 * _GB, "100 Gb/s a GPU"),
    Card("a10", "A10", 24 * _GB, 125e12, 31.2e12, 32 * _GB, 6.25 * _GB, "50 Gb/s a GPU"),
    Card("v100", "V100", 32 * _GB, 125e12, 15.7e12, 150 * _GB, 6.25 * _GB, "DGX-1: 4 x 100 Gb/s for 8 GPUs"),
    Card("rtx-4090", "RTX 4090", 24 * _GB, 165.2e12, 82.6e12, 32 * _GB, 3.125 * _GB, "25 Gb/s a GPU"),
)
"""From NVIDIA's data sheets: H200 and H100 Tensor Core GPU, HGX and DGX B200, A100, L40S, A10, V100, and the Ada
architecture's white paper. NVIDIA sells no machine with L40S, A10, H100 PCIe or RTX 4090, so their networks are
assumptions."""


def card_named(name: str) -> Card:
    """The card with this name; case does not matter.

    Raises:
        ConfigError: no card has this name.
    """
    for card in CARDS:
        if card.name == name.lower():
            return card
    raise ConfigError(f"--gpu must be one of {', '.join(card.name for card in CARDS)} (got {name}); choose one")


def card_of_device(device_name: str) -> Card | None:
    """The card whose ``device`` is the longest part of a CUDA device name; None for an unknown device."""
    matching = [card for card in CARDS if card.device in device_name]
    return max(matching, key=lambda card: len(card.device), default=None)
