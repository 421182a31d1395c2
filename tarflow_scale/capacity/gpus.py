"""Specifications of GPUs from NVIDIA's data sheets.

Peak rates are for dense operations; the larger numbers in the data sheets assume sparsity. Link speeds are in bytes per
second in one direction; the data sheets add both directions. Network speeds are per GPU, in NVIDIA's eight-GPU machine;
a rented machine may be slower.
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
        device: part of the card's CUDA device name, by which it is recognized.
        memory_bytes: memory of the card.
        bf16_flops: peak rate of dense bf16 operations with tensor cores, in FLOP/s (V100: fp16).
        fp32_flops: peak rate of fp32 operations without tensor cores, in FLOP/s; for ``precision=fp32``.
        link_bytes_per_second: speed of NVLink (PCIe if there is none) to other cards of the machine, in one direction.
        network_bytes_per_second: speed to other machines, in one direction.
        network: description of the network.
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
    Card("h200", "H200", 141 * _GB, 989.5e12, 67e12, 450 * _GB, 50 * _GB, "DGX H200: 400 Gb/s per GPU"),
    Card("h100-pcie", "H100 PCIe", 80 * _GB, 756e12, 51e12, 64 * _GB, 25 * _GB, "200 Gb/s per GPU"),
    Card("h100", "H100", 80 * _GB, 989.5e12, 67e12, 450 * _GB, 50 * _GB, "DGX H100: 400 Gb/s per GPU"),
    Card("b200", "B200", 180 * _GB, 2250e12, 75e12, 900 * _GB, 50 * _GB, "DGX B200: 400 Gb/s per GPU"),
    Card("a100", "A100", 80 * _GB, 312e12, 19.5e12, 300 * _GB, 25 * _GB, "DGX A100: 200 Gb/s per GPU"),
    Card("a100-40gb", "A100-SXM4-40GB", 40 * _GB, 312e12, 19.5e12, 300 * _GB, 25 * _GB, "DGX A100: 200 Gb/s"),
    Card("l40s", "L40S", 48 * _GB, 362e12, 91.6e12, 32 * _GB, 12.5 * _GB, "100 Gb/s per GPU"),
    Card("a10", "A10", 24 * _GB, 125e12, 31.2e12, 32 * _GB, 6.25 * _GB, "50 Gb/s per GPU"),
    Card("v100", "V100", 32 * _GB, 125e12, 15.7e12, 150 * _GB, 6.25 * _GB, "DGX-1: 4 x 100 Gb/s for 8 GPUs"),
    Card("rtx-4090", "RTX 4090", 24 * _GB, 165.2e12, 82.6e12, 32 * _GB, 3.125 * _GB, "25 Gb/s per GPU"),
)
"""Sources: NVIDIA's data sheets of the H200 and H100 Tensor Core GPU, HGX and DGX B200, A100, L40S, A10 and V100, and
the white paper of the Ada architecture. NVIDIA sells no machine with L40S, A10, H100 PCIe or RTX 4090, so their network
speeds are assumptions."""


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
    """The card whose ``device`` is part of a CUDA device name (the longest match), or None if no card matches."""
    matching = [card for card in CARDS if card.device in device_name]
    return max(matching, key=lambda card: len(card.device), default=None)
