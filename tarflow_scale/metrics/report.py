"""Protocol ids: what makes two numbers comparable."""

from collections.abc import Iterable

from tarflow_scale import storage
from tarflow_scale.config import BitsPerDimProtocol, FrechetProtocol
from tarflow_scale.records import canonical_json

__all__ = ["images_digest", "protocol_id"]


def images_digest(hashes: Iterable[str]) -> str:
    """Digest of a set of images from the sha256 of each one's pixels, whatever their order or packing."""
    return storage.digest("".join(sorted(hashes)).encode())


def protocol_id(protocol: BitsPerDimProtocol | FrechetProtocol, extractor: str, images: str) -> str:
    """The id that is stored with every number.

    Args:
        protocol: the resolved protocol.
        extractor: sha256 of the extractor's weights, or ``none``.
        images: `images_digest` of the reference images (for bits/dim: of the images that are scored).
    """
    return storage.digest(canonical_json({"protocol": protocol.digest, "extractor": extractor, "images": images}))
