"""Vectors in shards: arrays in NumPy's format, which any WebDataset reader reads.

A sample of D numbers has a member ``{key}.npy`` ``(D,)`` float32; the K numbers of its condition are
``{key}.condition.npy`` ``(K,)``. Loaders carry their bytes, ``(1, 1, 4 (D + K))`` uint8, so that memory, workers and
resuming work as for images.
"""

import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from tarflow_scale.errors import DataError
from tarflow_scale.records import VectorFacts
from tarflow_scale.shards.images import NPY_FAULTS

__all__ = ["VALUES", "bytes_shape", "decode_vector", "encode_vector", "floats", "vector_members"]

VALUES, _CONDITION = "npy", "condition.npy"
"""Extensions of members; the first is also the codec in the manifest."""
_FLOAT = np.dtype("<f4")


def bytes_shape(vectors: VectorFacts) -> tuple[int, int, int]:
    """``(1, 1, 4 (D + K))``, the shape of a vector's bytes."""
    return 1, 1, _FLOAT.itemsize * (vectors.num_values + vectors.num_conditions)


def vector_members(stored: UInt8[np.ndarray, "1 1 W"], vectors: VectorFacts) -> dict[str, bytes]:
    """Members of a sample, by extension, from its bytes."""
    values, condition = floats(stored[None], vectors)
    members = {VALUES: encode_vector(values[0])}
    return members | ({_CONDITION: encode_vector(condition[0])} if vectors.num_conditions else {})


def encode_vector(values: Float[np.ndarray, " D"]) -> bytes:
    """A vector as a file in NumPy's format."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype(_FLOAT), allow_pickle=False)
    return buffer.getvalue()


def decode_vector(members: Mapping[str, bytes], vectors: VectorFacts) -> UInt8[np.ndarray, "1 1 W"]:
    """A sample's bytes from its members.

    Raises:
        DataError: a member is missing, of another shape or type, or not finite.
    """
    parts = [_read(members, VALUES, vectors.num_values)]
    if vectors.num_conditions:
        parts.append(_read(members, _CONDITION, vectors.num_conditions))
    return np.concatenate(parts).view(np.uint8)[None, None]


def _read(members: Mapping[str, bytes], extension: str, length: int) -> NDArray[np.float32]:
    if extension not in members:
        raise DataError(f"it has no .{extension} (members: {', '.join(sorted(members))})")
    try:
        array = np.load(io.BytesIO(members[extension]), allow_pickle=False)
    except NPY_FAULTS as error:
        raise DataError(f"its .{extension} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(array, np.ndarray) or array.dtype != _FLOAT or array.shape != (length,):
        raise DataError(f"its .{extension} must be float32 ({length},) (got {array.dtype} {array.shape})")
    if not np.isfinite(array).all():
        raise DataError(f"its .{extension} must be finite")
    return array


def floats(
    stored: UInt8[np.ndarray, "B 1 1 W"], vectors: VectorFacts
) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B K"]]:
    """Values ``(B, D)`` and conditions ``(B, K)``, float32, from the bytes of vectors."""
    numbers = np.ascontiguousarray(stored).reshape(len(stored), -1).view(_FLOAT)
    return numbers[:, : vectors.num_values], numbers[:, vectors.num_values :]
