"""A packed data set as single files, ``<class>/<key>.png`` and ``<key>.json``, as image folders are read elsewhere."""

import io
import tarfile

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import image_extension
from tarflow_scale.shards.reader import ShardSet

__all__ = ["write_folder"]

_UNLABELLED = "images"
_WHOLE = "complete.json"


def write_folder(path: str, location: str) -> int:
    """Write every image and its facts as files; returns the number of images.

    Args:
        path: folder or URL of the data set.
        location: folder or URL, empty or absent; what an earlier call left there half-written is written again. A file
            ``complete.json`` comes last and holds the digest of the data set.

    Raises:
        DataError: the folder holds another data set, or anything else; a sample is not what was packed.
    """
    shards = ShardSet(path, verify="full")
    names, digest = shards.manifest.class_names, shards.manifest.digest.encode()
    marker = storage.join(location, _WHOLE)
    there = storage.read_if_there(marker)
    if there is not None and there != digest:
        raise DataError(f"{location} holds another data set; choose another folder")
    if there is None and set(storage.list_names(location)) - {_UNLABELLED, *map(_folder, names)}:
        raise DataError(f"{location} holds other files; choose another folder")
    num = 0
    for record in shards.manifest.shards:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(storage.join(path, record.file)))) as tar:
            for key, members in _samples(tar):
                extension = image_extension(members)
                assert extension is not None, "a packed sample has an image"
                label = members.get("cls")
                folder = _folder(names[int(label)]) if label is not None and names else _UNLABELLED
                for suffix in (extension, "json"):
                    if suffix in members:
                        storage.write_bytes(storage.join(location, folder, f"{key}.{suffix}"), members[suffix])
                num += 1
    storage.write_bytes(marker, digest)
    return num


def _samples(tar: tarfile.TarFile) -> list[tuple[str, dict[str, bytes]]]:
    """Members of each sample of a tar, by key."""
    found: dict[str, dict[str, bytes]] = {}
    for member in tar:
        key, _, suffix = member.name.partition(".")
        file = tar.extractfile(member)
        if file is not None:
            found.setdefault(key, {})[suffix] = file.read()
    return list(found.items())


def _folder(name: str) -> str:
    """A class as the name of a folder."""
    return "".join(c if c.isalnum() or c in "._- " else "_" for c in name).strip(". ") or "_"
