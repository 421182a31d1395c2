"""Find copies and near copies among images with perceptual hashes, and confirm them by their pixels.

Two images are copies if their pixels are equal. They are near copies if their pHashes (imagehash; 64 bits from the low
frequencies of the grey image at 32x32 pixels) differ in at most 6 bits and the correlation of their thumbnails (RGB,
32x32) is at least 0.9. So a photograph is found again after a change of quality, size, brightness or contrast.

Measured on 200 images of Tiny ImageNet (64x64) and Kodak's photographs: the search finds every copy that was saved as
JPEG of quality 40, halved and enlarged again, or changed by a fifth in brightness or contrast; about half of the copies
that were cropped by 2% at each side or turned grey; and no copy that was mirrored or cropped by 10%. Among the 5 x 10^7
pairs of 10,000 images of Tiny ImageNet it finds 2 pairs, each the same photograph in two classes.

The hashes do not distinguish small drawings: for 71% of 10,000 MNIST digits, another digit is within 6 bits. So images
below 32 pixels are compared only for equality, and near copies are not listed if there are more than two pairs per
image, as for MNIST padded to 32 pixels. Hashing an image of 64x64 takes 0.2 ms; finding the pairs among a million
hashes takes 42 s.
"""

import base64
import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow_scale.shards.images import to_pillow

__all__ = [
    "MIN_SIZE_PIXELS",
    "NO_FINGERPRINT",
    "Copies",
    "Copy",
    "copies_between",
    "described",
    "find_copies",
    "fingerprint",
    "read_fingerprints",
    "superfluous",
    "text_of",
]

MIN_SIZE_PIXELS = 32
"""Minimum shorter side of images for the search for near copies; smaller images are compared only for equality."""
_MAX_BITS = 6
_MIN_CORRELATION = 0.9
NO_FINGERPRINT = bytes(16)
"""Placeholder for the fingerprint of an image that cannot be used."""
_BLOCKS, _EQUAL_BLOCKS = 9, 3
"""A hash is divided into 9 blocks of bits. If two hashes differ in 6 bits, at least 3 of their blocks are equal."""
_MAX_PAIRS_PER_IMAGE = 2
_SIDE = 32
_FLAT = 2.0
"""Thumbnails with a lower standard deviation (on the scale 0 to 255) are compared by the mean difference of pixels."""
_CACHED = 1 << 16
_SHOWN = 3


def fingerprint(image: NDArray[np.uint8]) -> bytes:
    """The fingerprint of an image ``(C, H, W)`` uint8: a digest of its pixels and its perceptual hash, 8 bytes each.

    The hash is zero for images below 32 pixels.
    """
    content = repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    if min(image.shape[1:]) < MIN_SIZE_PIXELS:
        return digest + bytes(8)
    import imagehash  # here, because it imports scipy, which takes a second, and small images do not need it

    return digest + np.packbits(imagehash.phash(to_pillow(image)).hash).tobytes()


def text_of(fingerprints: Iterable[bytes]) -> str:
    """Encode fingerprints as text for JSON."""
    return base64.b64encode(b"".join(fingerprints)).decode()


def read_fingerprints(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Decode texts of `text_of` into digests and hashes, ``(n, 2)``."""
    joined = b"".join(base64.b64decode(text) for text in texts)
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Copies:
    """The copies and near copies among ``n`` images, which are numbered from 0.

    Args:
        first: number of the first image with the same pixels, ``(n,)`` int64; -1 for images without a fingerprint.
        near: for each image number, the numbers of its near copies. Of several images with equal pixels, only the first
            one appears.
        are_told_apart: False if near copies are not listed, because too many hashes are alike.
    """

    first: NDArray[np.int64]
    near: dict[int, list[int]]
    are_told_apart: bool


def find_copies(fingerprints: NDArray[np.uint64], image: Callable[[int], NDArray[np.uint8]]) -> Copies:
    """Find the copies and near copies among images.

    Args:
        fingerprints: fingerprints of the images, ``(n, 2)``; see `read_fingerprints`.
        image: returns an image ``(C, H, W)`` uint8 by number; called only for images whose hashes are alike.
    """
    first = np.full(len(fingerprints), -1, dtype=np.int64)
    usable = np.flatnonzero(fingerprints[:, 0])
    _, index, inverse = np.unique(fingerprints[usable, 0], return_index=True, return_inverse=True)
    first[usable] = usable[index][inverse]
    distinct = np.sort(usable[index])
    hashed = distinct[fingerprints[distinct, 1] != 0]
    pairs = _alike(fingerprints[hashed, 1])
    if pairs is None:
        return Copies(first, {}, are_told_apart=False)
    thumbnail = functools.lru_cache(_CACHED)(lambda number: _thumbnail(image(number)))
    near: defaultdict[int, list[int]] = defaultdict(list)
    for a, b in hashed[pairs].tolist():
        if _correlate(thumbnail(a), thumbnail(b)):
            near[a].append(b)
            near[b].append(a)
    return Copies(first, {number: sorted(copies) for number, copies in near.items()}, are_told_apart=True)


def _alike(hashes: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    """Find the pairs of hashes that differ in at most 6 bits; None if there are too many pairs.

    For each choice of 3 of the 9 blocks, the hashes are sorted by these blocks, and only hashes that agree in them are
    compared. This takes 84 sorts instead of a comparison of all pairs.

    Returns:
        Index pairs ``(p, 2)``, the smaller index first.
    """
    num = len(hashes)
    pairs = np.zeros(0, dtype=np.int64)
    edges = np.linspace(0, 64, _BLOCKS + 1).astype(int).tolist()
    blocks = [sum(1 << bit for bit in range(low, high)) for low, high in pairwise(edges)]
    for chosen in combinations(blocks, _EQUAL_BLOCKS):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        lows, step = np.arange(num), 0
        parts = [pairs]
        while len(lows):
            step += 1
            lows = lows[lows + step < num]
            lows = lows[keys[lows] == keys[lows + step]]
            a, b = order[lows], order[lows + step]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= _MAX_BITS
            parts.append(a[near] * num + b[near])
            if sum(map(len, parts[1:])) > _MAX_PAIRS_PER_IMAGE * num:
                return None
        pairs = np.unique(np.concatenate(parts))
    return np.stack([pairs // num, pairs % num], axis=1) if num else np.zeros((0, 2), dtype=np.int64)


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(to_pillow(image).convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX))


def _correlate(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if min(x.std(), y.std()) < _FLAT:
        return bool(abs(x - y).mean() < _FLAT)
    return bool(np.mean((x - x.mean()) * (y - y.mean())) >= _MIN_CORRELATION * x.std() * y.std())


@dataclass(frozen=True)
class Copy:
    """An image that is a copy or near copy of another image.

    Args:
        image: number of the image.
        like: number of the other image.
        is_equal: whether the pixels of both are equal.
    """

    image: int
    like: int
    is_equal: bool


class _Places:
    """The images that have copies or near copies, grouped by equal pixels, with their splits.

    Args:
        copies: see `find_copies`.
        split: number of the split of every image, ``(n,)``; -1 for images in no split.
        rank: returns the sort key of an image by its number; the image with the smaller key counts as the earlier one.
    """

    def __init__(self, copies: Copies, split: NDArray[np.int64], rank: Callable[[int], Any] = int) -> None:
        firsts, times = np.unique(copies.first[copies.first >= 0], return_counts=True)
        involved = np.union1d(firsts[times > 1], np.array(sorted(copies.near), dtype=np.int64))
        numbers = sorted(np.flatnonzero(np.isin(copies.first, involved) & (split >= 0)).tolist(), key=rank)
        self.order = {number: order for order, number in enumerate(numbers)}
        self.members: defaultdict[int, list[int]] = defaultdict(list)
        self._lowest: dict[tuple[int, int], int] = {}
        self._near = copies.near
        for number, first, place in zip(numbers, copies.first[numbers].tolist(), split[numbers].tolist(), strict=True):
            self.members[first].append(number)
            self._lowest.setdefault((first, place), number)

    def copy(self, number: int, first: int, splits: Iterable[int], below: float = math.inf) -> Copy | None:
        """Find the first copy of an image in the given splits, or else its first near copy; None if there is neither.

        Args:
            number: number of the image.
            first: number of the first image with the same pixels.
            splits: numbers of the splits to search.
            below: search only images before this position in ``order``.
        """
        candidates = [
            (near != first, self.order[like], like)
            for near in (first, *self._near.get(first, ()))
            for split in splits
            if (like := self._lowest.get((near, split), number)) != number and self.order[like] < below
        ]
        return Copy(number, min(candidates)[2], not min(candidates)[0]) if candidates else None


def copies_between(
    copies: Copies, split: NDArray[np.int64], rank: Callable[[int], Any] = int
) -> dict[tuple[int, int], list[Copy]]:
    """Find the images that are like an image of an earlier split, or like an earlier image of the same split.

    Args:
        copies: see `find_copies`.
        split: number of the split of every image, ``(n,)``; -1 for images in no split.
        rank: returns the sort key of an image by its number; the image with the smaller key counts as the earlier one.

    Returns:
        Lists of copies, sorted by ``rank``. The keys are pairs (split of the copy, split of the other image).
    """
    places = _Places(copies, split, rank)
    between: defaultdict[tuple[int, int], list[Copy]] = defaultdict(list)
    for first, members in places.members.items():
        for number in members:
            own = int(split[number])
            for other in range(own + 1):
                copy = places.copy(number, first, [other], below=places.order[number] if other == own else math.inf)
                if copy is not None:
                    between[own, other].append(copy)
    return {key: sorted(pairs, key=lambda copy: places.order[copy.image]) for key, pairs in sorted(between.items())}


def superfluous(copies: Copies, split: NDArray[np.int64]) -> list[Copy]:
    """Find the training images to drop: images like a held-out image, or like a training image that is kept.

    The training split has the number 0. Held-out splits stay complete, because a metric on a published test split is
    comparable only if it covers all images. Dropping only the training image is enough to remove the leak.
    """
    places = _Places(copies, split)
    held_out = range(1, int(split.max(initial=0)) + 1)
    dropped: list[Copy] = []
    kept: set[int] = set()
    for number in sorted(number for members in places.members.values() for number in members if split[number] == 0):
        first = int(copies.first[number])
        copy = places.copy(number, first, held_out)
        if copy is None:
            like = [(near != first, near) for near in (first, *copies.near.get(first, ())) if near in kept]
            if not like:
                kept.add(first)
                continue
            copy = Copy(number, min(places.members[min(like)[1]]), not min(like)[0])
        dropped.append(copy)
    return dropped


def described(
    copies: Copies, split: NDArray[np.int64], names: Sequence[str], origin: Callable[[int], str], side_pixels: int
) -> list[str]:
    """Lines of a report: the number of copies in each split, and some pairs as examples.

    The lines do not depend on how the images are numbered.

    Args:
        copies: see `find_copies`.
        split: number of the split of every image, ``(n,)``; -1 for images in no split.
        names: names of the splits.
        origin: returns the name of an image at its source, by the number of the image.
        side_pixels: shorter side of the images in pixels.
    """
    title = "copies and near copies"
    if side_pixels < MIN_SIZE_PIXELS:
        title = f"copies (the search for near copies needs images of at least {MIN_SIZE_PIXELS} pixels)"
    elif not copies.are_told_apart:
        title = (
            f"copies (near copies are not listed, because there are more than {_MAX_PAIRS_PER_IMAGE} pairs per image; "
            f"this is usual for drawings and for frames of films)"
        )
    lines: list[str] = []
    for (own, other), pairs in copies_between(copies, split, origin).items():
        num, equal = int((split == own).sum()), sum(copy.is_equal for copy in pairs)
        target = "an earlier image" if own == other else f"an image in {names[other]}"
        shown = "; ".join(f"{origin(copy.image)} like {origin(copy.like)}" for copy in pairs[:_SHOWN])
        more = "; ..." if len(pairs) > _SHOWN else ""
        counts = f"{len(pairs):,} of {num:,} images are like {target} ({equal:,} with equal pixels)"
        lines.append(f"{names[own]}: {counts}: {shown}{more}")
    return [f"{title}: {'none' if not lines else ''}".rstrip(), *(f"  {line}" for line in lines)]
