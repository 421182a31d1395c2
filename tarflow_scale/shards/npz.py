"""Export a packed data set as the ``.npz`` that ADM's evaluator reads: ``arr_0`` (N, H, W, 3), ``arr_1`` labels (N,).

ImageNet papers report the metrics of this evaluator (openai/guided-diffusion, evaluations/evaluator.py). Images are
written batch by batch, so that only one batch is in memory at a time. Grey images get three equal channels.
"""

import zipfile

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.reader import ShardSet

__all__ = ["check_npz", "write_npz"]

_BATCH = 256


def check_npz(location: str, digest: str | None) -> None:
    """Check that `write_npz` can write a data set to a location.

    Args:
        location: path or URL of the ``.npz``.
        digest: manifest digest of the data set; None if the data set does not exist yet.

    Raises:
        DataError: the location is a folder, or a file that was not made from this data set.
    """
    if storage.is_folder(location):
        raise DataError(f"shards.npz must be a file (got the folder {location}); add a file name")
    if not storage.exists(location):
        return
    try:
        with storage.open_seekable(location) as file, zipfile.ZipFile(file) as archive:
            known = archive.comment.decode(errors="replace")
    except zipfile.BadZipFile:
        known = ""
    if known != digest:
        raise DataError(f"shards.npz={location} holds another data set; choose another shards.npz, or delete that file")


def write_npz(path: str, location: str) -> int:
    """Write the images of a data set, and their labels if it has classes; returns the number of images.

    Args:
        path: folder or URL of the data set.
        location: path or URL of the ``.npz``, which appears only when it is complete.

    Raises:
        DataError: a sample is damaged.
    """
    shards = ShardSet(path)
    manifest = shards.manifest
    num, (_, height, width) = manifest.num_images, manifest.event.carried_shape
    with storage.writing(location) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = manifest.digest.encode()
        labels: list[NDArray[np.int64]] = []
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (num, height, width, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for batch in shards.batches(0, num, _BATCH):
                rgb = np.broadcast_to(batch.events, (len(batch), 3, height, width))
                member.write(rgb.transpose(0, 2, 3, 1).tobytes())
                labels.append(batch.labels)
        if manifest.class_names:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.concatenate(labels), allow_pickle=False)
    return num
