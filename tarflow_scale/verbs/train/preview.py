"""Previews of a run: pictures of what the model can do with its averaged weights."""

import warnings

from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.errors import ConfigError, NumericsError
from tarflow_scale.training.loop import Preview
from tarflow_scale.verbs.train.subject import Subject

__all__ = ["preview_of"]


def preview_of(subject: Subject, folder: str) -> Preview:
    """Return a function that writes ``<folder>/previews/images-<images seen>.png``.

    If the picture cannot be drawn, the function only warns, so that the run continues.
    """

    def draw(weights: dict[str, Tensor], images_seen: int) -> None:
        try:
            picture = subject.picture(weights)
        except (NumericsError, ConfigError) as error:
            warnings.warn(f"no preview at {images_seen} images: {error}", stacklevel=2)
            return
        if picture is not None:
            storage.write_bytes(f"{folder}/previews/images-{images_seen:012d}.png", picture)

    return draw
