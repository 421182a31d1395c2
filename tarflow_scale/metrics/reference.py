"""Reference statistics, kept by the digests of what they were computed from.

A reference is bound to its protocol when it is first computed: the file name holds the digest of protocol,
extractor and data set, and the content the digest of the images themselves, which is part of the protocol id.
"""

from dataclasses import dataclass

from tarflow_scale import storage
from tarflow_scale.config import FrechetProtocol
from tarflow_scale.errors import DataError
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.records import canonical_json
from tarflow_scale.shards.manifest import Manifest

__all__ = ["Reference", "ReferenceCache"]


@dataclass(frozen=True)
class Reference:
    """Moments of the features of reference images, and the digest of those images."""

    moments: Moments
    images_digest: str


class ReferenceCache:
    """References in a folder.

    Args:
        path: folder or URL.
        extractor: sha256 of the extractor's weights, or ``none``.
        manifest: of the reference data set.
        protocol: the protocol.
    """

    def __init__(self, path: str, extractor: str, manifest: Manifest, protocol: FrechetProtocol) -> None:
        key = storage.digest(canonical_json([protocol.digest, extractor, manifest.digest]))
        self._location = storage.join(path, f"{protocol.name}-{key[:32]}")

    def read(self) -> Reference | None:
        """The reference, if it was computed before from the very same bytes.

        Raises:
            DataError: when the stored moments are not those that were stored.
        """
        if not storage.exists(f"{self._location}.digest"):
            return None
        content = storage.read_bytes(f"{self._location}.npz")
        images, expected = storage.read_bytes(f"{self._location}.digest").decode().split()
        if storage.digest(content) != expected:
            raise DataError(f"{self._location}.npz does not match its digest; delete it to compute the reference again")
        return Reference(Moments.from_bytes(content), images)

    def write(self, reference: Reference) -> None:
        """Store; the digest last, so that half a reference is none."""
        content = reference.moments.to_bytes()
        storage.write_bytes(f"{self._location}.npz", content)
        digests = f"{reference.images_digest} {storage.digest(content)}"
        storage.write_bytes(f"{self._location}.digest", digests.encode())
