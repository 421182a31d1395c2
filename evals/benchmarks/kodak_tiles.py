"""Photographs cut into square tiles of two classes: the images that ``configs/train/folder.yaml`` is measured on.

python evals/benchmarks/kodak_tiles.py kodak/ --output my/images

The 24 Kodak photographs of 768x512 pixels give 2,304 tiles of 64 pixels: ``smooth`` are those whose standard deviation
over pixels and channels is below the median of all tiles, ``textured`` the others.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Read, cut, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder with PNG files, at any depth")
    parser.add_argument("--tile-pixels", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True, help="folder to write smooth/ and textured/ into")
    arguments = parser.parse_args()
    size, tiles = arguments.tile_pixels, dict[str, np.ndarray]()
    for file in sorted(arguments.photographs.rglob("*.png")):
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        for top in range(0, pixels.shape[0] - size + 1, size):
            for left in range(0, pixels.shape[1] - size + 1, size):
                tiles[f"{file.stem}_{top:04d}_{left:04d}"] = pixels[top : top + size, left : left + size]
    deviations = {name: float(tile.std()) for name, tile in tiles.items()}
    median = float(np.median([*deviations.values()]))
    for name, tile in tiles.items():
        folder = arguments.output / ("smooth" if deviations[name] < median else "textured")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(folder / f"{name}.png")
    print(f"wrote {len(tiles)} tiles of {size} pixels into {arguments.output}")


if __name__ == "__main__":
    main()
