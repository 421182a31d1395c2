"""Read the kind of model, progress, losses and newest preview of a training run from its folder.

A folder can be read while the run trains. `CurveFile` draws the loss curve as a picture beside the log.
"""

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import yaml

from tarflow_scale import storage
from tarflow_scale.errors import DataError, StorageError
from tarflow_scale.pages.charts import Points, Series, line_chart_png

__all__ = ["CURVE_NAME", "CurveFile", "Loss", "Run", "curves_of", "read_run"]

CURVE_NAME = "curve.png"
_PREVIEWS = "previews"
_REDRAWN_SECONDS = 60.0


@dataclass
class Loss:
    """The loss of a run as a function of the number of images seen, from the records of its log.

    ``training`` is the mean loss of the batches since the previous record; ``held_out`` is the validation loss.
    ``unit`` is bits/dim if the log contains bits/dim, otherwise nats/dim.
    """

    training: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"bits": [], "nats": []})
    held_out: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"bits": [], "nats": []})

    def take(self, record: Mapping[str, Any]) -> None:
        """Add a record.

        Raises:
            KeyError, TypeError, ValueError: the record is not from a training run.
        """
        for points, prefix in ((self.training, ""), (self.held_out, "validation_")):
            for unit, line in points.items():
                value = record.get(f"{prefix}{unit}_per_dim")
                if value is not None:
                    line.append((float(record["images"]), float(value)))

    @property
    def _key(self) -> str:
        return "bits" if self.training["bits"] or self.held_out["bits"] else "nats"

    @property
    def unit(self) -> str:
        """``bits/dim`` or ``nats/dim``."""
        return f"{self._key}/dim"

    @property
    def series(self) -> tuple[Points, Points]:
        """The curves of the training loss and of the held-out loss; each may be empty."""
        return self.training[self._key], self.held_out[self._key]


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Args:
        path: path of the folder, as it was given.
        kind: kind of model, such as ``tarflow``; empty if unknown.
        state: ``running``, ``finished``, ``stopped`` or ``failed``; empty if unknown.
        images_seen: number of images seen so far; 0 if unknown.
        total_images: number of images at the end of the run; 0 if unknown.
        loss: loss as a function of the number of images seen.
        measured_on: data and settings on which the loss depends; losses are comparable only if these are equal.
        preview: the newest sample grid as ``(file name, PNG)``; None if there is none.
    """

    path: str
    kind: str
    state: str
    images_seen: int
    total_images: int
    loss: Loss
    measured_on: str = ""
    preview: tuple[str, bytes] | None = None

    @property
    def name(self) -> str:
        """The path, followed by the kind of model in parentheses."""
        return f"{self.path} ({self.kind})" if self.kind else self.path


def read_run(path: str) -> Run:
    """Read a run folder, finished or not.

    Raises:
        DataError: ``path`` is not the folder of a training run.
        StorageError: the folder has no log.
    """
    location = storage.join(path, "log.jsonl")
    text = storage.read_bytes(location).decode(errors="replace")
    whole, _, _ = text.rpartition("\n")  # the last line may be incomplete
    loss = Loss()
    try:
        for line in whole.splitlines():
            loss.take(json.loads(line))
        config = yaml.safe_load(storage.read_if_there(storage.join(path, "config.yaml")) or b"{}")
        status = json.loads(storage.read_if_there(storage.join(path, "status.json")) or b"{}")
        measured_on = _measured_on(config)
        kind, state = str(config.get("model", {}).get("kind", "")), str(status.get("state", ""))
        seen, total = int(status.get("images_seen", 0)), int(status.get("total_images", 0))
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not the folder of a training run ({reason}); remove it from report.runs") from error
    # While a run trains, its status file still has the progress at its start.
    last = max((points[-1][0] for points in loss.series if points), default=0)
    return Run(path, kind, state, max(seen, int(last)), total, loss, measured_on, _newest_preview(path))


def _measured_on(config: Mapping[str, Any]) -> str:
    data, validation = config.get("data") or {}, config.get("validation") or {}
    crop = (data.get("augmentation") or {}).get("crop_pixels")
    noise = (config.get("training") or {}).get("noise") or {}
    parts = [
        str(validation.get("path") or data.get("path") or ""),
        f"crops of {crop} pixels" if crop else "",
        f"noise of {noise['std']:g}" if noise.get("kind") == "gaussian" else "",
    ]
    return ", ".join(filter(None, parts))


def _newest_preview(path: str) -> tuple[str, bytes] | None:
    folder = storage.join(path, _PREVIEWS)
    names = [name for name in storage.list_names(folder) if name.startswith("images-") and name.endswith(".png")]
    return (max(names), storage.read_bytes(storage.join(folder, max(names)))) if names else None


def curves_of(runs: Sequence[Run], unit: str) -> dict[str, Series]:
    """Loss curves of all runs with this unit, by name. The index of a run in ``runs`` determines the colour."""
    curves: dict[str, Series] = {}
    for number, run in enumerate(runs):
        if run.loss.unit == unit:
            training, held_out = run.loss.series
            curves |= {run.name: Series(training, number)} if training else {}
            curves |= {f"{run.name}, held out": Series(held_out, number, dashed=True)} if held_out else {}
    return curves


class CurveFile:
    """Draws ``curve.png`` in a run folder, and a copy beside the previews, at most once per minute and at the end.

    Args:
        path: the run folder; records that are already in its log are drawn too.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._run = read_run(path)
        self._next = 0.0

    def take(self, record: Mapping[str, Any]) -> None:
        """Add a record of the log."""
        self._run.loss.take(record)
        if time.monotonic() >= self._next:
            self._draw()

    def _draw(self) -> None:
        self._next = time.monotonic() + _REDRAWN_SECONDS
        unit = self._run.loss.unit
        content = line_chart_png(curves_of([self._run], unit), "images seen", unit)
        try:
            for folder in (self._path, storage.join(self._path, _PREVIEWS)):
                storage.write_bytes(storage.join(folder, CURVE_NAME), content)
        except StorageError as error:  # a run continues without its curve
            warnings.warn(f"no curve is drawn: {error}", stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if any(self._run.loss.series):
            self._draw()
