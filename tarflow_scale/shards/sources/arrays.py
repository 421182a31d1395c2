"""Arrays of pixels in memory, as CIFAR and MNIST are published."""

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.shards.sources.classes import numbered_classes
from tarflow_scale.shards.sources.source import ImageSource
from tarflow_scale.shards.sources.splits import train_then_test

__all__ = ["ArraySource", "ImagesAndLabels"]

ImagesAndLabels = tuple[NDArray[np.uint8], NDArray[np.int64]]


class ArraySource(ImageSource):
    """Images ``(n, C, H, W)`` uint8 and labels ``(n,)`` in memory, first those for training, then those for testing.

    Args:
        name: of the data set.
        description: for the manifest.
        class_names: the labels themselves where it is empty.
        train: images and labels.
        test: images and labels.
    """

    def __init__(
        self, name: str, description: str, class_names: tuple[str, ...], train: ImagesAndLabels, test: ImagesAndLabels
    ) -> None:
        self._images = np.concatenate([train[0], test[0]])
        self._num_train = len(train[0])
        self.name, self.description = name, description
        self.labels = np.concatenate([train[1], test[1]])
        self.class_names = class_names or numbered_classes(self.labels)
        self.digest = storage.digest(self._images.tobytes() + self.labels.tobytes())
        self.official = train_then_test(self._num_train, len(self.labels))

    def _image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(C, H, W)`` uint8."""
        return self._images[number]

    def origin(self, number: int) -> str:
        """``train/17`` or ``test/3``."""
        return f"train/{number}" if number < self._num_train else f"test/{number - self._num_train}"
