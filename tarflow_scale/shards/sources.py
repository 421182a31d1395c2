"""Where images come from: built-in digits, a folder of class folders, or MNIST's formats (`shards.mnist`).

A source knows its size, classes and format before it reads an image, and reads any one image by number, so that
packing can be planned, split and ordered first.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config import SourceConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import decode_image, reduce_depth, resize_center_crop

__all__ = ["DigitsSource", "FolderSource", "ImageSource", "ReducedSource", "open_source"]

_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageSource(ABC):
    """Labelled images by number.

    Args:
        name: name of the data set.
        description: where the images came from, for the manifest.
        class_names: names of the classes, in the order of their labels.
        bit_depth: high bits of a uint8 pixel that are data.
        labels: label of every image, ``(n,)`` int64.
        digest: of what the source holds, so that a changed source is another data set.
        official_test: ``(n,)`` bool, which images the source itself sets aside for testing; None when it does not say.
    """

    def __init__(
        self,
        name: str,
        description: str,
        class_names: tuple[str, ...],
        bit_depth: int,
        labels: NDArray[np.int64],
        digest: str,
        official_test: NDArray[np.bool_] | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.class_names = class_names
        self.bit_depth = bit_depth
        self.labels = labels
        self.digest = digest
        self.official_test = official_test

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(C, H, W)`` uint8."""

    def origin(self, number: int) -> str:
        """What image ``number`` was called at its source."""
        return f"{self.name}/{number}"


class DigitsSource(ImageSource):
    """Scikit-learn's optical recognition of handwritten digits: 1,797 real images of 8x8, 10 classes, no network.

    Pixels are counts 0..16 of ink in a 4x4 cell; 16 is capped to 15, which makes them 4-bit data, stored as 17 v.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        super().__init__(
            name="digits",
            description="scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
            class_names=tuple(str(digit) for digit in range(10)),
            bit_depth=4,
            labels=digits.target.astype(np.int64),
            digest=storage.digest(digits.images.tobytes()),
        )
        self._levels = np.minimum(digits.images, 15).astype(np.uint8)

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(1, 8, 8)`` uint8."""
        return self._levels[number][None] * np.uint8(17)


class FolderSource(ImageSource):
    """``path/class/*.png``: every sub-folder is a class, in alphabetical order.

    Args:
        path: the folder.
        size_pixels: side of the square result; None keeps the size of the first image for all.
        resize: ``refuse`` or ``center_crop``.

    Raises:
        DataError: no folder, or no images in it.
    """

    def __init__(self, path: str, size_pixels: int | None, resize: str) -> None:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise DataError(f"source.path must be a folder (got {path}); check the path")
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        found = {name: _image_files(root / name) for name in classes}
        found = {name: files for name, files in found.items() if files}
        if not found:
            raise DataError(f"no images in {path} (looked for class/*.png, jpg, jpeg, webp, bmp); check source.path")
        self._files = [file for files in found.values() for file in files]
        labels = [label for label, files in enumerate(found.values()) for _ in files]
        super().__init__(
            name=root.resolve().name,
            description=f"image folder, {'as it is' if resize == 'refuse' else f'{resize} to {size_pixels} (Lanczos)'}",
            class_names=tuple(found),
            bit_depth=8,
            labels=np.array(labels, dtype=np.int64),
            digest=storage.digest("\n".join(f"{f.relative_to(root)} {f.stat().st_size}" for f in self._files).encode()),
        )
        self._root = root
        self._resize = resize
        self._size = size_pixels
        self._shape = self._shape_rule(_decode_file(self._files[0]))

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number``, in the one shape of the data set.

        Raises:
            DataError: unreadable, or of another shape than the rest.
        """
        file = self._files[number]
        image = _decode_file(file)
        if self._resize == "center_crop":
            assert self._size is not None
            image = resize_center_crop(image, self._size)
        if image.shape[0] == 1 and self._shape[0] == 3:
            image = image.repeat(3, axis=0)
        if image.shape[0] != self._shape[0]:
            raise DataError(f"images must be all grey or all coloured (got {file} among grey ones); convert them")
        if image.shape != self._shape:
            raise DataError(
                f"all images must have one shape (got {image.shape} for {file}, not {self._shape}); "
                f"set source.resize=center_crop and source.size_pixels"
            )
        return image

    def origin(self, number: int) -> str:
        """Path below the folder."""
        return str(self._files[number].relative_to(self._root))

    def _shape_rule(self, first: NDArray[np.uint8]) -> tuple[int, int, int]:
        channels, height, width = first.shape
        size = self._size or height
        if self._resize == "refuse" and (height, width) != (size, size):
            raise DataError(
                f"images must be squares of one size (got {height}x{width} for {self._files[0]}, not {size}x{size}); "
                f"set source.resize=center_crop and source.size_pixels"
            )
        return (channels, size, size)


class ReducedSource(ImageSource):
    """Another source with fewer bits a pixel, as Glow is trained at high resolution (arXiv 1807.03039, section 6).

    Args:
        source: the source.
        bit_depth: high bits that are kept.

    Raises:
        DataError: the source has fewer.
    """

    def __init__(self, source: ImageSource, bit_depth: int) -> None:
        if bit_depth > source.bit_depth:
            raise DataError(
                f"source.bit_depth must not exceed the source's (got {bit_depth} for {source.bit_depth}-bit "
                f"{source.name}); lower it or leave it out"
            )
        super().__init__(
            name=source.name,
            description=f"{source.description}; {bit_depth} of {source.bit_depth} bits kept",
            class_names=source.class_names,
            bit_depth=bit_depth,
            labels=source.labels,
            digest=source.digest,
            official_test=source.official_test,
        )
        self._source = source

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` in fewer levels."""
        return reduce_depth(self._source.image(number), self.bit_depth)

    def origin(self, number: int) -> str:
        """As the source says."""
        return self._source.origin(number)


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _EXTENSIONS and file.is_file())


def _decode_file(file: Path) -> NDArray[np.uint8]:
    return decode_image(storage.read_bytes(str(file)), str(file))


def open_source(config: SourceConfig) -> ImageSource:
    """The source that a configuration names."""
    source = _whole_source(config)
    if config.bit_depth is None or config.bit_depth == source.bit_depth:
        return source
    return ReducedSource(source, config.bit_depth)


def _whole_source(config: SourceConfig) -> ImageSource:
    match config.kind:
        case "digits":
            return DigitsSource()
        case "folder":
            assert config.path is not None
            return FolderSource(config.path, config.size_pixels, config.resize)
        case "mnist":
            from tarflow_scale.shards.mnist import MnistSource

            assert config.path is not None
            return MnistSource(config.path)
