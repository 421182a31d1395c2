"""Export a packed data set as single files, ``<class>/<key>.png`` and ``<class>/<key>.json``."""

import json

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import image_extension
from tarflow_scale.shards.reader import ShardSet

__all__ = ["check_folder", "write_folder"]

_UNLABELLED = "images"
_BEGUN, _WHOLE = "begun", "complete"


def check_folder(location: str, digest: str | None) -> None:
    """Check that `write_folder` can write a data set to a folder.

    Args:
        location: folder or URL.
        digest: manifest digest of the data set; None if the data set does not exist yet.

    Raises:
        DataError: the folder holds another data set or other files.
    """
    begun = storage.read_if_there(storage.join(location, _BEGUN))
    if begun is None and any(not name.endswith(storage.PARTIAL) for name in storage.list_names(location)):
        raise DataError(f"shards.folder={location} holds other files; choose another shards.folder")
    if begun is not None and (digest is None or begun != digest.encode()):
        raise DataError(
            f"shards.folder={location} holds another data set; choose another shards.folder, or delete that data set"
        )


def write_folder(path: str, location: str) -> int:
    """Write every image and its ``.json`` as files; returns the number of images.

    The file ``begun`` is written first and the file ``complete`` last; both contain the digest of the data set.

    Args:
        path: folder or URL of the data set.
        location: folder or URL to write to. It may be absent, empty, or partly written by an earlier call for the same
            data set.

    Raises:
        DataError: the folder holds another data set or other files, or a sample is damaged.
    """
    shards = ShardSet(path, verify="full")
    check_folder(location, shards.manifest.digest)
    digest, names = shards.manifest.digest.encode(), shards.manifest.class_names
    folders = _folders(names)
    storage.write_bytes(storage.join(location, _BEGUN), digest)
    for stored in shards.stored():
        members = stored.members()
        extension = image_extension(members)
        assert extension is not None, "a packed sample has an image"
        label = members.get("cls")
        folder = folders[int(label)] if label is not None and folders else _UNLABELLED
        if label is not None and names and "json" in members:
            record = json.loads(members["json"]) | {"class": names[int(label)]}
            members["json"] = json.dumps(record, ensure_ascii=False).encode()
        for suffix in (extension, "json"):
            if suffix in members:
                storage.write_bytes(storage.join(location, folder, f"{stored.key}.{suffix}"), members[suffix])
    storage.write_bytes(storage.join(location, _WHOLE), digest)
    return shards.manifest.num_images


def _folders(names: tuple[str, ...]) -> list[str]:
    """A unique folder name for each class."""
    plain = ["".join(c if c.isalnum() or c in "._- " else "_" for c in name).strip(". ") or "_" for name in names]
    return [name if plain.count(name) == 1 else f"{number}-{name}" for number, name in enumerate(plain)]
