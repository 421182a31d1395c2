"""Verb ``score``: how anomalous every image of a data set is, by a registered version.

Workers turn ranges of images into bits/dim, kept as parts, so that a job that was killed goes on where it was; held-out
normal images say what is typical and which score only so many of them exceed; the table of all images comes last. With
a second set that is known to be anomalous, every score says how well it tells the two apart.

Reads the version (and a background model), the sets ``data``, ``calibration`` and maybe ``anomalies``. Writes into
``scoring.path``: ``scores.csv`` or ``.parquet``, a row an image; ``summary.json``; ``maps.png`` if asked for; and
``parts/`` while it works. Refused are models trained on noisy images, which have no likelihood, and sets of other
shapes.
"""

import csv
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config.score import ScoreConfig
from tarflow_scale.config.versions import VersionConfig
from tarflow_scale.density.anomaly import SCORES, Separation, codecs, scores_of, separate, threshold
from tarflow_scale.density.surprise import overlaid
from tarflow_scale.errors import ConfigError, DataError, needs_package
from tarflow_scale.flows import Flow
from tarflow_scale.loading import load_version
from tarflow_scale.metrics.bits import dequantized_draws
from tarflow_scale.metrics.parts import Part, parts_of
from tarflow_scale.pool import Pool
from tarflow_scale.records import ModelVersion, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console, provenance
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.verbs.score.worker import Rater, ScoringUnit, dequantisation

__all__ = ["run"]

Scores = dict[str, NDArray[np.float64]]
"""Of each image, by score."""
_PARTS, _MAPS = "parts", "maps.png"
_SHOWN = 10
"""Images of ``data`` that are named at the end."""
_MAP_COLUMNS, _MAP_PIXELS = 4, 96
"""Pairs of pictures in a row, and the least side of each."""


def run(config: ScoreConfig, dry_run: bool) -> None:
    """Score all sets, and write the table and ``summary.json``.

    Raises:
        RegistryError: no such version.
        DataError: a data set has other images than the model.
        ConfigError: a model without bits/dim, or a format that is not installed.
    """
    if config.scoring.format == "parquet":
        _pyarrow()
    named = {"data": config.data, "calibration": config.calibration, "anomalies": config.anomalies}
    sets = {name: (one.path, ShardSet(one.path, one.verify).manifest) for name, one in named.items() if one is not None}
    versions = [_version(one) for one in (config.registry, config.background) if one is not None]
    for version in versions:
        _check(version, [manifest for _, manifest in sets.values()])
    if sets["calibration"][1].digest == versions[0][1].data.digest:
        warnings.warn(
            "calibration is what the model was trained on, where likelihoods are too high; use held-out images",
            stacklevel=2,
        )
    units = _units(config, versions, sets)
    flow = _flow_for_maps(versions[0]) if config.scoring.maps else None
    table = storage.join(config.scoring.path, f"scores.{config.scoring.format}")
    name = f"{config.registry.model}@{versions[0][1].version}"
    _print_plan(name, sets, table)
    if dry_run:
        return
    _make(config, versions, [unit for several in units.values() for unit in several])
    typical = float(np.concatenate([part.read("bits_0")["bits_0"] for part in _parts(units["calibration"])]).mean())
    scores = {name: _scores(_parts(several), typical, config.background is not None) for name, several in units.items()}
    held_out = scores.pop("calibration")
    thresholds = {score: threshold(values, config.scoring.false_alarm_rate) for score, values in held_out.items()}
    found: dict[str, Separation] = {}
    if "anomalies" in scores:
        found = {score: separate(scores["data"][score], scores["anomalies"][score]) for score in thresholds}
    rows = _rows({name: (units[name], scores[name]) for name in scores}, thresholds)
    _write_table(table, rows, list(thresholds), config.scoring.format)
    flagged = {
        score: {name: float((several[score] > limit).mean()) for name, several in scores.items()}
        for score, limit in thresholds.items()
    }
    _write_summary(config, versions, sets, typical, thresholds, flagged, found)
    storage.remove(storage.join(config.scoring.path, _MAPS))
    if flow is not None:
        _write_maps(config, flow, scores["data"]["likelihood"])
    _print_scores(name, thresholds, flagged, found)
    _print_least_likely(units["data"], scores["data"]["likelihood"], sets["data"][1].class_names)
    storage.remove_tree(storage.join(config.scoring.path, _PARTS))
    print(f"{table}: {sum(len(several['likelihood']) for several in scores.values())} images")
    if flow is not None:
        print(f"{storage.join(config.scoring.path, _MAPS)}: the least likely, each beside what surprises in it")


def _version(section: VersionConfig) -> tuple[VersionConfig, ModelVersion]:
    return section, Registry(section.path, section.model).resolve(section.version)


def _check(named: tuple[VersionConfig, ModelVersion], manifests: list[Manifest]) -> None:
    section, version = named
    if version.pixels.noise != "uniform":
        raise ConfigError(
            f"{section.model}@{version.version} has no likelihood of images (trained with {version.pixels.noise} "
            f"noise); score with a model trained with uniform noise"
        )
    size, channels = version.data.image_size_pixels, version.data.num_channels
    wanted = (channels, size, size), version.pixels.bit_depth
    for manifest in manifests:
        if (manifest.event_shape, manifest.bit_depth) != wanted:
            raise DataError(
                f"{section.model}@{version.version} scores {wanted[0]} images of {wanted[1]} bits (got "
                f"{manifest.event_shape} of {manifest.bit_depth} in {manifest.name}/{manifest.split}); pack alike"
            )


def _flow_for_maps(named: tuple[VersionConfig, ModelVersion]) -> Flow:
    section, version = named
    flow = load_version(section.path, section.model, version.version)
    if not flow.divides_surprise:
        raise ConfigError(
            f"scoring.maps needs a model that divides surprise among pixels, which a continuous flow does up to "
            f"model.exact_trace_dims (got {type(flow).__name__} of {flow.num_dims} dimensions); set it to 0"
        )
    return flow


def _units(
    config: ScoreConfig,
    versions: list[tuple[VersionConfig, ModelVersion]],
    sets: dict[str, tuple[str, Manifest]],
) -> dict[str, list[ScoringUnit]]:
    """What is to be done for each set, in folders that are named by all that decides the numbers."""
    facts: dict[str, Any] = {
        "weights": [version.weights_digest for _, version in versions],
        "settings": config.scoring.model_dump(mode="json", include={"num_draws", "seed", "labels", "batch_size"}),
        "device": ["cuda" if config.cluster.gpus_per_worker else config.cluster.cpus_per_worker],
        "packages": _packages(),
        "codecs": sorted(codecs()),
        "edition": 2,  # of what parts hold
    }
    found: dict[str, list[ScoringUnit]] = {}
    for name, (path, manifest) in sets.items():
        digest = storage.digest(canonical_json(facts | {"data": manifest.digest}))[:16]
        folder = storage.join(config.scoring.path, _PARTS, digest)
        found[name] = [ScoringUnit(path, part) for part in parts_of(folder, manifest.num_images)]
    return found


def _packages() -> dict[str, str]:
    """Versions of what decides the numbers, codecs and solvers too."""
    found = provenance.package_versions()
    for name in ("pillow", "zuko", "torchdiffeq"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _make(config: ScoreConfig, versions: list[tuple[VersionConfig, ModelVersion]], units: list[ScoringUnit]) -> None:
    there = {folder: set(storage.list_names(folder)) for folder in {unit.part.folder for unit in units}}
    wanted = {unit.part.location: unit for unit in units}  # a set may be named twice
    missing = [unit for unit in wanted.values() if unit.part.name not in there[unit.part.folder]]
    arguments = {
        "versions": [(section.path, section.model, version.version) for section, version in versions],
        "settings": config.scoring,
        "codec_names": tuple(sorted(codecs())),
        "threads": config.cluster.cpus_per_worker,
        "gpu": config.cluster.gpus_per_worker > 0,
    }
    total, left = (sum(unit.part.stop - unit.part.start for unit in several) for several in (wanted.values(), missing))
    bar = console.progress_bar(total, "score", initial=total - left)
    with Pool(**config.cluster.model_dump()) as pool, bar:
        for unit, _ in pool.run(Rater, arguments, missing):
            bar.update(unit.part.stop - unit.part.start)


def _parts(units: list[ScoringUnit]) -> list[Part]:
    return [unit.part for unit in units]


def _scores(parts: list[Part], typical: float, has_background: bool) -> Scores:
    names = ("bits_0", "compressed", *(["bits_1"] if has_background else []))
    found = [part.read(*names) for part in parts]
    joined = {name: np.concatenate([one[name] for one in found]).astype(np.float64) for name in names}
    return scores_of(joined["bits_0"], joined["compressed"], typical, joined["bits_1"] if has_background else None)


# -- what is written ---------------------------------------------------------------------------------------------------

Row = dict[str, Any]


def _rows(sets: dict[str, tuple[list[ScoringUnit], Scores]], thresholds: dict[str, float]) -> Iterator[list[Row]]:
    """Rows of the table, a part at a time."""
    for name, (units, scores) in sets.items():
        for part in _parts(units):
            facts = part.read("labels", "origins")
            several: list[Row] = []
            for number in range(part.start, part.stop):
                place = number - part.start
                row: Row = {"set": name, "sample": number, "origin": str(facts["origins"][place])}
                row["label"] = int(facts["labels"][place])
                row |= {score: float(values[number]) for score, values in scores.items()}
                row |= {f"{score}_flagged": row[score] > limit for score, limit in thresholds.items()}
                several.append(row)
            yield several


def _write_table(location: str, parts: Iterator[list[Row]], scores: list[str], kind: str) -> None:
    columns = ["set", "sample", "origin", "label", *scores, *(f"{score}_flagged" for score in scores)]
    if kind == "parquet":
        arrow, parquet = _pyarrow()
        kinds = [arrow.string(), arrow.int64(), arrow.string(), arrow.int64(), *[arrow.float64()] * len(scores)]
        schema = arrow.schema(list(zip(columns, kinds + [arrow.bool_()] * len(scores), strict=True)))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "scores.parquet"
            with parquet.ParquetWriter(file, schema) as writer:
                for rows in parts:
                    writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
            storage.copy_file(str(file), location)
        return
    with storage.writing(location) as file:
        file.write((",".join(columns) + "\n").encode())
        for rows in parts:
            text = io.StringIO()
            csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
            file.write(text.getvalue().encode())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(needs_package("scoring.format=parquet", "pyarrow", "parquet")) from error
    return arrow, parquet


def _write_summary(
    config: ScoreConfig,
    versions: list[tuple[VersionConfig, ModelVersion]],
    sets: dict[str, tuple[str, Manifest]],
    typical: float,
    thresholds: dict[str, float],
    flagged: dict[str, dict[str, float]],
    found: dict[str, Separation],
) -> None:
    about = {
        name: {"path": path, "manifest": one.digest, "images": one.num_images} for name, (path, one) in sets.items()
    }
    facts: dict[str, Any] = {
        "models": [f"{section.model}@{version.version}" for section, version in versions],
        "weights": [version.weights_digest for _, version in versions],
        "sets": about,
        "settings": config.scoring.model_dump(mode="json"),
        "codecs": sorted(codecs()),
        "packages": _packages(),
        "typical_bits_per_dim": typical,
        "scores": {
            score: {
                "higher_is": "more anomalous",
                "threshold": limit,
                "flagged": flagged[score],
                **(vars(found[score]) if score in found else {}),
            }
            for score, limit in thresholds.items()
        },
    }
    storage.write_bytes(storage.join(config.scoring.path, "summary.json"), canonical_json(facts))


def _write_maps(config: ScoreConfig, flow: Flow, likelihood: NDArray[np.float64]) -> None:
    """The least likely images, each beside itself with its surprise laid over it."""
    chosen = np.argsort(-likelihood, kind="stable")[: config.scoring.maps]
    shards = ShardSet(config.data.path)
    order = np.argsort(chosen)  # read in the order of the shards, shown in that of surprise
    protocol = dequantisation(shards.manifest.bit_depth, config.scoring)
    found: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []
    for low in range(0, len(chosen), config.scoring.batch_size):
        batch = shards.take(chosen[order][low : low + config.scoring.batch_size])
        nats = torch.stack([flow.nats_of_values(x, dequantize=True) for x in dequantized_draws(batch, protocol)]).mean(
            dim=0
        )
        found.append((batch.images, nats.numpy()))
    images, nats = (np.concatenate(several) for several in zip(*found, strict=True))
    rgb = np.broadcast_to(images, (len(chosen), 3, *images.shape[2:]))
    pairs = np.stack([rgb, overlaid(images, nats)], axis=1)[np.argsort(order)]
    zoom = max(1, _MAP_PIXELS // pairs.shape[-1])
    sheet = contact_sheet(pairs.reshape(-1, *pairs.shape[2:]), 2 * _MAP_COLUMNS, zoom)
    storage.write_bytes(storage.join(config.scoring.path, _MAPS), sheet)


def _print_plan(model: str, sets: dict[str, tuple[str, Manifest]], output: str) -> None:
    rows = [(name, f"{one.name}/{one.split}", f"{one.num_images:,} images") for name, (_, one) in sets.items()]
    print(console.table([*rows, ("output", output, "")], (f"score by {model}", "set", "")))


def _print_scores(
    model: str, thresholds: dict[str, float], flagged: dict[str, dict[str, float]], found: dict[str, Separation]
) -> None:
    rows: list[tuple[str, ...]] = []
    for score, limit in thresholds.items():
        shares = [f"{share:.1%}" for share in flagged[score].values()]
        one = found.get(score)
        measures = () if one is None else (one.auroc, one.aupr, one.false_positive_rate_95)
        rows.append((score, f"{limit:.4f}", *shares, *(f"{value:.3f}" for value in measures)))
    sets = tuple(f"flagged of {name}" for name in flagged["likelihood"])
    measured = ("AUROC", "AUPR", "false alarms at 95 %") if found else ()
    header = (f"score by {model}, higher is more anomalous", "threshold", *sets, *measured)
    print(console.table(rows, header))
    for score in thresholds:
        print(f"{score}: {SCORES[score]}")


def _print_least_likely(
    units: list[ScoringUnit], likelihood: NDArray[np.float64], class_names: tuple[str, ...]
) -> None:
    rows: list[tuple[str, ...]] = []
    for number in np.argsort(-likelihood, kind="stable")[:_SHOWN].tolist():
        part = next(part for part in _parts(units) if part.start <= number < part.stop)
        facts = part.read("labels", "origins")
        label = int(facts["labels"][number - part.start])
        name = class_names[label] if 0 <= label < len(class_names) else ""
        rows.append((str(facts["origins"][number - part.start]), name, f"{likelihood[number]:.4f}"))
    print(console.table(rows, ("the most anomalous of data", "class", "likelihood")))
