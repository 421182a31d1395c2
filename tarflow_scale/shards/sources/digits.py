"""Scikit-learn's handwritten digits, which need no network."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.shards.sources.source import ImageSource

__all__ = ["DigitsSource"]


class DigitsSource(ImageSource):
    """Scikit-learn's handwritten digits: 1,797 images of 8x8 pixels in 10 classes.

    Each pixel is the number of dark pixels (0 to 16) in a 4x4 cell of the scan. The value 16 is capped to 15, so that
    pixels have 4 bits; a value v is stored as the byte 17 v.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        self.name = "digits"
        self.description = "scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)"
        self.class_names = tuple(str(digit) for digit in range(10))
        self.bit_depth = 4
        self.labels = digits.target.astype(np.int64)
        self.digest = storage.digest(digits.images.tobytes())
        self._levels = np.minimum(digits.images, 15).astype(np.uint8)

    def _image(self, number: int) -> NDArray[np.uint8]:
        return self._levels[number][None] * np.uint8(17)
