"""Base class of the sources that hold all images in memory: CIFAR and MNIST."""

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.shards.sources.classes import numbered_classes
from tarflow_scale.shards.sources.source import ImageSource
from tarflow_scale.shards.sources.splits import train_then_test

__all__ = ["ArraySource", "ImagesAndLabels"]

ImagesAndLabels = tuple[NDArray[np.uint8], NDArray[np.int64]]


class ArraySource(ImageSource):
    """Images and labels in memory, with an official split into training and test images.

    Args:
        name: name of the data set.
        description: where the images came from, for the manifest.
        class_names: names of the classes; if empty, each class is named by its number.
        train: training images ``(n, C, H, W)`` uint8, and their labels ``(n,)``.
        test: test images and labels, in the same form.
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
        return self._images[number]

    def origin(self, number: int) -> str:
        """Split and number of the image within the split: ``train/17``, ``test/3``."""
        return f"train/{number}" if number < self._num_train else f"test/{number - self._num_train}"
