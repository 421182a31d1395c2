"""Sample the same latents under several settings, to compare guidance and temperature in one picture."""

import io
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tarflow_scale.config.base import validated
from tarflow_scale.config.sampling import Guidance, NamedLabels, SamplingConfig
from tarflow_scale.flows import Flow
from tarflow_scale.flows.inputs import check_draws
from tarflow_scale.sampling.labels import numbered
from tarflow_scale.sampling.sampler import Sampler
from tarflow_scale.shards.images import contact_sheet

__all__ = ["sweep", "sweep_picture"]

_LABEL_PIXELS = 190
_LINE_PIXELS = 12


def sweep(
    flow: Flow,
    seed: int,
    num_images: int,
    guidances: Sequence[float] = (0.0,),
    temperatures: Sequence[float] = (1.0,),
    attention_temperatures: Sequence[float] = (1.0,),
    base: SamplingConfig | None = None,
    labels: NamedLabels | Sequence[int | str] | np.ndarray | int = "balanced",
) -> list[tuple[SamplingConfig, Tensor]]:
    """Draw images for every combination of settings. Returns settings and images ``(num_images, C, H, W)`` uint8.

    Attention temperatures only have an effect with guidance, so without guidance there is one row for all of them.

    Args:
        flow: a flow in evaluation mode.
        seed: seed of the latents.
        num_images: number of images in each row; their indices are 0, 1, ...
        guidances: scales of guidance.
        temperatures: standard deviations of the latents.
        attention_temperatures: see `tarflow_scale.config.sampling.Guidance`.
        base: the other settings.
        labels: like ``sampling.labels`` of the verb ``generate``, for example ``["roses", "tulips"]``; or one class.

    Raises:
        ConfigError: settings or labels do not fit this flow.
        ValueError: ``num_images`` or ``seed`` is negative or not a whole number.
    """
    check_draws(num_images, seed=seed)
    settings = base or SamplingConfig()
    rule = numbered(_rule(labels), flow.class_names)
    rows: list[SamplingConfig] = []
    for scale, temperature, attention in product(guidances, temperatures, attention_temperatures):
        guidance = Guidance(scale=scale, attention_temperature=attention) if scale else Guidance()
        raw = settings.model_dump() | {"guidance": guidance.model_dump(), "temperature": temperature}
        row = validated(SamplingConfig, raw)
        if row not in rows:
            rows.append(row)
    images = range(num_images)
    return [(row, Sampler(flow, seed, row, labels=rule).images(images)) for row in rows]


def _rule(labels: NamedLabels | Sequence[int | str] | np.ndarray | int) -> NamedLabels:
    labels = labels.tolist() if isinstance(labels, np.ndarray | np.generic) else labels
    if isinstance(labels, dict):
        return labels
    if labels == "balanced":
        return "balanced"
    return (labels,) if isinstance(labels, int | str) else tuple(labels)


def sweep_picture(rows: Sequence[tuple[SamplingConfig, Tensor]], zoom: int = 1) -> bytes:
    """A PNG of the rows of `sweep`, with the settings at the left of each row."""
    images = torch.cat([images for _, images in rows]).numpy()
    sheet = Image.open(io.BytesIO(contact_sheet(images, len(rows[0][1]), zoom))).convert("RGB")
    picture = Image.new("RGB", (_LABEL_PIXELS + sheet.width, max(sheet.height, _LINE_PIXELS * len(rows))), "white")
    picture.paste(sheet, (_LABEL_PIXELS, 0))
    draw = ImageDraw.Draw(picture)
    for number, (settings, _) in enumerate(rows):
        middle = (number + 0.5) * sheet.height / len(rows)
        guidance = settings.guidance
        text = f"guidance {guidance.scale:g}, temperature {settings.temperature:g}"
        if guidance.attention_temperature != 1:
            text += f", attention {guidance.attention_temperature:g}"
        draw.text((4, middle), text, fill="black", anchor="lm")
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
