"""Divide the images of a source into splits."""

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.prepare import SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.shards.sources import ImageSource
from tarflow_scale.shards.sources.splits import PACKED

__all__ = ["split_images", "stratified"]


def split_images(source: ImageSource, config: SplitConfig) -> dict[str, NDArray[np.int64]]:
    """Indices of the images in each split, ``train`` first. Empty splits are left out.

    Raises:
        DataError: ``split.kind`` is ``official`` but the source has no split, or no image is left for training.
    """
    if config.kind == "official" and source.official is None:
        raise DataError(f"{source.name} has no official split (got split.kind=official); set split.kind=stratified")
    codes = source.official
    if config.kind == "stratified" or codes is None:
        in_test = stratified(source.labels, config.test_fraction, config.seed)
        codes = np.where(in_test, PACKED.index("test"), PACKED.index("train"))
    splits = {name: np.flatnonzero(codes == code) for code, name in enumerate(PACKED)}
    if not len(splits["train"]):
        raise DataError(
            f"no image is left for training (got {len(codes)} images and split.test_fraction="
            f"{config.test_fraction:g}); lower split.test_fraction"
        )
    return {name: members for name, members in splits.items() if len(members)}


def stratified(labels: NDArray[np.int64], test_fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose the same share of each class for testing; returns a mask ``(n,)``, true for test images.

    One sort groups the images by class: 14.2 M images of 21,841 classes take 11 s on one core.
    """
    by_class = np.argsort(labels, kind="stable")
    classes, firsts = np.unique(labels[by_class], return_index=True)
    in_test = np.zeros(len(labels), dtype=np.bool_)
    for label, members in zip(classes.tolist(), np.split(by_class, firsts[1:]), strict=True):
        chosen = permutation(len(members), Purpose.SPLIT, seed, label)[: round(len(members) * test_fraction)]
        in_test[members[chosen]] = True
    return in_test
