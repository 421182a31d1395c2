"""Protocol ids: two numbers are comparable if and only if their ids are equal."""

from collections.abc import Iterable

from tarflow_scale import storage
from tarflow_scale.config.protocols import (
    BitsPerDimProtocol,
    BoundProtocol,
    FrechetProtocol,
    KernelProtocol,
    LatentNatsProtocol,
    ManifoldProtocol,
    NatsProtocol,
    PerImageProtocol,
    SampledProtocol,
    SimilarityProtocol,
)
from tarflow_scale.records import canonical_json

__all__ = ["images_digest", "protocol_id", "unit_of"]


def images_digest(hashes: Iterable[str]) -> str:
    """Digest of a set of images, given the SHA-256 of each image's pixels; it does not depend on order or packing."""
    return storage.digest("".join(sorted(hashes)).encode())


def protocol_id(protocol: PerImageProtocol | SampledProtocol, extractor: str, images: str) -> str:
    """The protocol id, which is stored with every number.

    Args:
        protocol: the resolved protocol.
        extractor: SHA-256 of the weights of the extractor, or ``none``.
        images: `images_digest` of the reference images; for likelihoods, of the scored samples.
    """
    return storage.digest(canonical_json({"protocol": protocol.digest, "extractor": extractor, "images": images}))


def unit_of(protocol: PerImageProtocol | SampledProtocol) -> str:
    """Unit of the values that a protocol measures."""
    match protocol:
        case BitsPerDimProtocol():
            return "bits/dim"
        case BoundProtocol():
            return "bits/dim, bound"
        case NatsProtocol():
            return "nats"
        case LatentNatsProtocol():
            return "nats/dim of latents"
        case SimilarityProtocol():
            return "dB" if protocol.metric == "psnr" else "SSIM"
        case FrechetProtocol() if protocol.reconstructs:
            return f"{unit_of(protocol.model_copy(update={'images': 'generated'}))}, reconstructions"
        case FrechetProtocol() if protocol.extractor == "pixels":
            return f"levels of {protocol.bit_depth} bits, squared"
        case FrechetProtocol() if protocol.extractor == "inception-v3-compat":
            return "sFID" if protocol.layer == "spatial" else "FID"
        case FrechetProtocol():
            return f"Fréchet distance, {protocol.extractor}"
        case KernelProtocol():
            return "squared MMD"
        case ManifoldProtocol():
            return "share of images"
        case _:
            return "score"
