"""Bind a protocol to its reference images once; after that, other images are refused.

``<cache>/<protocol>.json`` records the digests of the protocol, the extractor and the images; the moments of the
features are in a file beside it. So the name of a protocol means the same metric for all users of a cache. Numbers from
different caches are comparable if their protocol ids are equal.
"""

from typing import Any

from tarflow_scale import storage
from tarflow_scale.config.protocols import SampledProtocol
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.metrics.parts import packed
from tarflow_scale.records import Record, canonical_json
from tarflow_scale.shards.manifest import Manifest

__all__ = ["Binding", "References"]


class Binding(Record):
    """The extractor, data and images that a protocol is bound to."""

    protocol: str
    protocol_digest: str
    extractor: str
    """Digest of the extractor."""
    data: str
    """Name and split of the data set."""
    manifest_digest: str
    images_digest: str
    """Digest of the pixels of the images."""
    moments: str | None = None
    """SHA-256 of the file of moments; None if the protocol needs no moments."""


class References:
    """The cache that stores, for each protocol, its binding to reference images and their moments.

    Args:
        path: folder or URL of the cache.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def find(
        self, protocol: SampledProtocol, extractor: str, manifest: Manifest, again: bool = False
    ) -> Binding | None:
        """The binding of a protocol; None if it is not bound.

        Args:
            protocol: the protocol.
            extractor: digest of its extractor.
            manifest: manifest of the reference data.
            again: whether the reference is being computed again; if so, the manifest may differ, because the same
                images may have been packed again.

        Raises:
            ConfigError: the protocol has changed since it was bound.
            DataError: the protocol is bound to other data or another extractor, or its record is damaged.
        """
        location = self._location(protocol)
        if not storage.exists(location):
            return None
        binding = Binding.from_json(storage.read_bytes(location), location, DataError)
        if binding.protocol_digest != protocol.digest:
            raise ConfigError(
                f"protocol {protocol.name} has changed since it was first used with {binding.data} (digest now "
                f"{protocol.digest[:12]}, then {binding.protocol_digest[:12]}); give the changed protocol another "
                f"name, or use another reference.cache"
            )
        if binding.extractor != extractor:
            raise DataError(
                f"protocol {protocol.name} is bound to another extractor ({binding.extractor[:12]}, not "
                f"{extractor[:12]}); use the first of these extractors, or another reference.cache"
            )
        if binding.manifest_digest != manifest.digest and not again:
            raise DataError(
                f"protocol {protocol.name} is bound to the reference {binding.data} with manifest "
                f"{binding.manifest_digest[:12]} (got {_name(manifest)}, {manifest.digest[:12]}); if these are the "
                f"same images packed again, run 'evaluate --reference', otherwise use another protocol name"
            )
        return binding

    def bind(
        self,
        protocol: SampledProtocol,
        extractor: str,
        manifest: Manifest,
        images_digest: str,
        moments: Moments | None = None,
        layer: str = "pool",
    ) -> Binding:
        """Bind a protocol to reference images; all its numbers will refer to these images.

        Raises:
            DataError: the protocol is already bound to other images.
        """
        before = self.find(protocol, extractor, manifest, again=True)
        if before is not None and before.images_digest != images_digest:
            raise DataError(
                f"protocol {protocol.name} is bound to images that differ from {_name(manifest)}; use another "
                f"protocol name, or another reference.cache"
            )
        content = None if moments is None else packed(moments.to_arrays(layer))
        binding = Binding(
            protocol=protocol.name,
            protocol_digest=protocol.digest,
            extractor=extractor,
            data=_name(manifest),
            manifest_digest=manifest.digest,
            images_digest=images_digest,
            moments=None if content is None else storage.digest(content),
        )
        if content is not None:
            storage.write_bytes(self.moments_location(binding), content)
        storage.write_bytes(self._location(protocol), binding.to_json())
        return binding

    def moments_location(self, binding: Binding) -> str:
        """Path or URL of the moments of a binding."""
        assert binding.moments is not None
        return storage.join(self._path, f"{binding.protocol}-{binding.moments[:16]}.npz")

    def is_whole(self, binding: Binding) -> bool:
        """Whether the moments of a binding are stored; true for a binding without moments.

        Raises:
            DataError: the stored moments do not match their digest.
        """
        if binding.moments is None:
            return True
        location = self.moments_location(binding)
        if not storage.exists(location):
            return False
        if storage.digest(storage.read_bytes(location)) != binding.moments:
            raise DataError(f"{location} does not match its digest; delete it to compute the reference again")
        return True

    def parts(self, key: Any) -> str:
        """Folder for the parts of a computation; ``key`` is a JSON value that identifies the computation."""
        return storage.join(self._path, "parts", storage.digest(canonical_json(key))[:32])

    def _location(self, protocol: SampledProtocol) -> str:
        return storage.join(self._path, f"{protocol.name}.json")


def _name(manifest: Manifest) -> str:
    return f"{manifest.name}/{manifest.split}"
