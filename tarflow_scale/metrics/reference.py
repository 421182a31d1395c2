"""What a protocol is compared with: bound once to images, refused with any others.

``<cache>/<protocol>.json`` says which edition of the protocol, which extractor and which images it was bound to;
moments of the features lie beside it. A number by that name therefore always means the same thing where the cache is
shared, and its protocol id says so elsewhere.
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
    """What a protocol is bound to."""

    protocol: str
    protocol_digest: str
    extractor: str
    """Digest of the extractor."""
    data: str
    """Name and split of the data set."""
    manifest_digest: str
    images_digest: str
    """Of the pixels of the images."""
    moments: str | None = None
    """SHA-256 of the file of moments, if the protocol wants such."""


class References:
    """Bindings and moments in a folder.

    Args:
        path: folder or URL.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def find(
        self, protocol: SampledProtocol, extractor: str, manifest: Manifest, again: bool = False
    ) -> Binding | None:
        """The binding of a protocol, if there is one.

        Args:
            protocol: the protocol.
            extractor: digest of its extractor.
            manifest: of the reference data.
            again: whether the reference is computed again, so that images packed anew may turn out to be the same.

        Raises:
            ConfigError: the protocol changed under its name.
            DataError: it is bound to other data, or the record is damaged.
        """
        location = self._location(protocol)
        if not storage.exists(location):
            return None
        found = Binding.from_json(storage.read_bytes(location), location, DataError)
        if found.protocol_digest != protocol.digest:
            raise ConfigError(
                f"protocol {protocol.name} has changed since it was bound to {found.data} (digest "
                f"{protocol.digest[:12]}, not {found.protocol_digest[:12]}); give the new edition another name, or use "
                f"another reference.cache"
            )
        if found.extractor != extractor:
            raise DataError(
                f"protocol {protocol.name} is bound to another extractor ({found.extractor[:12]}, not "
                f"{extractor[:12]}); use that one, or another reference.cache"
            )
        if found.manifest_digest != manifest.digest and not again:
            raise DataError(
                f"protocol {protocol.name} is bound to the reference {found.data} with manifest "
                f"{found.manifest_digest[:12]} (got {_name(manifest)}, {manifest.digest[:12]}); if these are the same "
                f"images packed again, run 'evaluate --reference', else use another protocol name"
            )
        return found

    def bind(
        self,
        protocol: SampledProtocol,
        extractor: str,
        manifest: Manifest,
        images_digest: str,
        moments: Moments | None = None,
        layer: str = "pool",
    ) -> Binding:
        """Bind a protocol; from here on its numbers are about these images.

        Raises:
            DataError: it is bound to other images.
        """
        before = self.find(protocol, extractor, manifest, again=True)
        if before is not None and before.images_digest != images_digest:
            raise DataError(
                f"protocol {protocol.name} is bound to other images than those of {_name(manifest)}; use another "
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
        """Where the moments of a binding are."""
        assert binding.moments is not None
        return storage.join(self._path, f"{binding.protocol}-{binding.moments[:16]}.npz")

    def is_whole(self, binding: Binding) -> bool:
        """Whether the moments of a binding, if it has such, are there.

        Raises:
            DataError: they are not what was stored.
        """
        if binding.moments is None:
            return True
        location = self.moments_location(binding)
        if not storage.exists(location):
            return False
        if storage.digest(storage.read_bytes(location)) != binding.moments:
            raise DataError(f"{location} does not match its digest; delete it to compute the reference again")
        return True

    def parts(self, facts: Any) -> str:
        """Folder of parts of something that these facts, a JSON value, decide."""
        return storage.join(self._path, "parts", storage.digest(canonical_json(facts))[:32])

    def _location(self, protocol: SampledProtocol) -> str:
        return storage.join(self._path, f"{protocol.name}.json")


def _name(manifest: Manifest) -> str:
    return f"{manifest.name}/{manifest.split}"
