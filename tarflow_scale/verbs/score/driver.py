"""Verb ``score``: use a registered version to compute how anomalous each image of a data set is.

Workers compute bits/dim of ranges of images and store them as parts, so a killed job continues where it stopped.
Held-out normal images (``calibration``) define the typical bits/dim and one threshold per score. At most the share
``scoring.false_alarm_rate`` of these images exceeds each threshold. With ``anomalies``, a set that is known to be
anomalous, the verb also reports how well each score separates ``data`` from ``anomalies``.

Reads the version (and a background model) and the sets ``data``, ``calibration`` and optionally ``anomalies``. Writes
into ``scoring.path``: ``scores.csv`` or ``.parquet``, one row per image; ``summary.json``; ``maps.png`` if configured;
and ``parts/`` while it works. It is an error if a model was trained on noisy images or on latents, because it has no
exact likelihood, or if the images of a set do not have the shape of the model.
"""

import csv
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.score import ScoreConfig, ScoringConfig
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
from tarflow_scale.shards.events import event_of
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.verbs.score.worker import Rater, ScoringUnit, scoring_protocol

__all__ = ["run"]

Scores = dict[str, NDArray[np.float64]]
"""Scores of each image, by name of the score."""
Versions = list[tuple[VersionConfig, ModelVersion]]
"""The version that scores, and the background model if there is one."""
Row = dict[str, Any]
_PARTS, _MAPS = "parts", "maps.png"
_PARTS_EDITION = 2
"""Format version of the parts; the digest that names their folder includes it."""
_SHOWN = 10
"""Number of images of ``data`` that are listed at the end."""
_MAP_COLUMNS, _MAP_PIXELS = 4, 96
"""Number of picture pairs per row; maximum side, in pixels, to which a picture is enlarged."""


@dataclass(frozen=True)
class _ImageSet:
    """A set of images to score, and the parts of its results."""

    path: str
    manifest: Manifest
    parts: list[Part]


def run(config: ScoreConfig, dry_run: bool) -> None:
    """Score all sets, and write the table and ``summary.json``.

    Raises:
        RegistryError: the version does not exist.
        DataError: images of a data set do not have the shape or bit depth of the model.
        ConfigError: a model has no bits/dim or cannot draw maps, or a package for the format is not installed.
    """
    scoring, cluster = config.scoring, config.cluster
    if scoring.format == "parquet":
        _pyarrow()
    sections = {"data": config.data, "calibration": config.calibration, "anomalies": config.anomalies}
    manifests = {
        name: (section.path, ShardSet(section.path, section.verify).manifest)
        for name, section in sections.items()
        if section is not None
    }
    versions: Versions = [
        (section, Registry(section.path, section.model).resolve(section.version))
        for section in (config.registry, config.background)
        if section is not None
    ]
    for section, version in versions:
        _check(section, version, [manifest for _, manifest in manifests.values()])
    if manifests["calibration"][1].digest == versions[0][1].trained_on.digest:
        warnings.warn(
            "the calibration images are the training data, where likelihoods are too high; use held-out images",
            stacklevel=2,
        )
    sets = _image_sets(scoring, cluster, versions, manifests)
    flow = _flow_for_maps(*versions[0]) if scoring.maps else None
    table = storage.join(scoring.path, f"scores.{scoring.format}")
    model = f"{config.registry.model}@{versions[0][1].version}"
    _print_plan(model, sets, table)
    if dry_run:
        return
    _make(scoring, cluster, versions, sets)
    typical = float(np.concatenate([part.read("bits_0")["bits_0"] for part in sets["calibration"].parts]).mean())
    scores = {name: _scores(image_set.parts, typical, len(versions) > 1) for name, image_set in sets.items()}
    held_out = scores.pop("calibration")
    thresholds = {score: threshold(values, scoring.false_alarm_rate) for score, values in held_out.items()}
    separations: dict[str, Separation] = {}
    if "anomalies" in scores:
        separations = {score: separate(scores["data"][score], scores["anomalies"][score]) for score in thresholds}
    flagged = {
        score: {name: float((scores[name][score] > limit).mean()) for name in scores}
        for score, limit in thresholds.items()
    }
    rows = _rows({name: (sets[name].parts, scores[name]) for name in scores}, thresholds)
    _write_table(table, rows, list(thresholds), scoring.format)
    _write_summary(scoring, versions, sets, typical, thresholds, flagged, separations)
    storage.remove(storage.join(scoring.path, _MAPS))
    likelihood = scores["data"]["likelihood"]
    if flow is not None:
        _write_maps(scoring, sets["data"].path, flow, likelihood)
    _print_scores(model, thresholds, flagged, separations)
    _print_least_likely(sets["data"], likelihood)
    storage.remove_tree(storage.join(scoring.path, _PARTS))
    print(f"{table}: {sum(len(of_set['likelihood']) for of_set in scores.values())} images")
    if flow is not None:
        print(f"{storage.join(scoring.path, _MAPS)}: the least likely images, each beside a map of its surprise")


def _check(section: VersionConfig, version: ModelVersion, manifests: list[Manifest]) -> None:
    if version.trained_on.latents is not None:
        raise ConfigError(
            f"score needs a model of pixels (got {section.model}@{version.version}, a flow on latents, which has only "
            f"a bound on the likelihood); score with a model of pixels, or measure the bound with evaluate"
        )
    if version.pixels.noise != "uniform":
        raise ConfigError(
            f"{section.model}@{version.version} has no likelihood of images (trained with {version.pixels.noise} "
            f"noise); score with a model trained with uniform noise"
        )
    event = event_of(version.trained_on, version.pixels.bit_depth)
    for manifest in manifests:
        if manifest.event != event:
            raise DataError(
                f"{section.model}@{version.version} scores {event} (got {manifest.event} in {manifest.name}/"
                f"{manifest.split}); pack images of the model's size and bit depth"
            )


def _flow_for_maps(section: VersionConfig, version: ModelVersion) -> Flow:
    flow = load_version(section.path, section.model, version.version)
    if not flow.divides_surprise:
        raise ConfigError(
            f"scoring.maps needs a model that divides surprise among pixels, which a continuous flow does only up to "
            f"model.exact_trace_dims dimensions (got {type(flow).__name__} of {flow.num_dims}); set scoring.maps=0"
        )
    return flow


def _image_sets(
    scoring: ScoringConfig, cluster: ClusterConfig, versions: Versions, manifests: dict[str, tuple[str, Manifest]]
) -> dict[str, _ImageSet]:
    """The sets with their parts. The folder of parts is named by a digest of everything that affects the scores."""
    decisive: dict[str, Any] = {
        "weights": [version.weights_digest for _, version in versions],
        "settings": scoring.model_dump(mode="json", include={"num_draws", "seed", "labels", "batch_size"}),
        "device": ["cuda" if cluster.gpus_per_worker else cluster.cpus_per_worker],
        "packages": _packages(),
        "codecs": sorted(codecs()),
        "edition": _PARTS_EDITION,
    }
    sets: dict[str, _ImageSet] = {}
    for name, (path, manifest) in manifests.items():
        digest = storage.digest(canonical_json(decisive | {"data": manifest.digest}))[:16]
        parts = parts_of(storage.join(scoring.path, _PARTS, digest), manifest.num_images)
        sets[name] = _ImageSet(path, manifest, parts)
    return sets


def _packages() -> dict[str, str]:
    """Versions of the packages that affect the scores, including the packages of codecs and ODE solvers."""
    packages = provenance.package_versions()
    for name in ("pillow", "zuko", "torchdiffeq"):
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return packages


def _make(scoring: ScoringConfig, cluster: ClusterConfig, versions: Versions, sets: dict[str, _ImageSet]) -> None:
    """Make the missing parts. If two sets are the same, their parts are made once."""
    parts = {part.location: ScoringUnit(part, images.path) for images in sets.values() for part in images.parts}
    units = list(parts.values())
    arguments = {
        "versions": [(section.path, section.model, version.version) for section, version in versions],
        "settings": scoring,
        "codec_names": tuple(sorted(codecs())),
        "threads": cluster.cpus_per_worker,
        "gpu": cluster.gpus_per_worker > 0,
    }
    with Pool(**cluster.model_dump()) as pool:
        for _ in pool.run_missing(Rater, arguments, units, ScoringUnit.missing(units), "score"):
            pass  # the results are the parts


def _scores(parts: list[Part], typical: float, has_background: bool) -> Scores:
    names = ("bits_0", "compressed", *(["bits_1"] if has_background else []))
    arrays = [part.read(*names) for part in parts]
    joined = {name: np.concatenate([array[name] for array in arrays]).astype(np.float64) for name in names}
    return scores_of(joined["bits_0"], joined["compressed"], typical, joined.get("bits_1"))


# -- files and printed tables ------------------------------------------------------------------------------------------


def _rows(sets: dict[str, tuple[list[Part], Scores]], thresholds: dict[str, float]) -> Iterator[list[Row]]:
    """Yield the rows of the table, one part at a time."""
    for name, (parts, scores) in sets.items():
        for part in parts:
            about = part.read("labels", "origins")
            rows: list[Row] = []
            for sample, origin, label in zip(
                range(part.start, part.stop), about["origins"], about["labels"], strict=True
            ):
                row: Row = {"set": name, "sample": sample, "origin": str(origin), "label": int(label)}
                row |= {score: float(values[sample]) for score, values in scores.items()}
                row |= {f"{score}_flagged": row[score] > limit for score, limit in thresholds.items()}
                rows.append(row)
            yield rows


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
    scoring: ScoringConfig,
    versions: Versions,
    sets: dict[str, _ImageSet],
    typical: float,
    thresholds: dict[str, float],
    flagged: dict[str, dict[str, float]],
    separations: dict[str, Separation],
) -> None:
    summary: dict[str, Any] = {
        "models": [f"{section.model}@{version.version}" for section, version in versions],
        "weights": [version.weights_digest for _, version in versions],
        "sets": {
            name: {"path": images.path, "manifest": images.manifest.digest, "images": images.manifest.num_images}
            for name, images in sets.items()
        },
        "settings": scoring.model_dump(mode="json"),
        "codecs": sorted(codecs()),
        "packages": _packages(),
        "typical_bits_per_dim": typical,
        "scores": {
            score: {
                "higher_is": "more anomalous",
                "threshold": limit,
                "flagged": flagged[score],
                **(vars(separations[score]) if separations else {}),
            }
            for score, limit in thresholds.items()
        },
    }
    storage.write_bytes(storage.join(scoring.path, "summary.json"), canonical_json(summary))


def _write_maps(scoring: ScoringConfig, data: str, flow: Flow, likelihood: NDArray[np.float64]) -> None:
    """Write ``maps.png``: the least likely images, each beside a copy overlaid with its surprise per pixel."""
    chosen = np.argsort(-likelihood, kind="stable")[: scoring.maps]
    shards = ShardSet(data)
    order = np.argsort(chosen)  # images are read in the order of shards, shown by surprise
    protocol = scoring_protocol(shards.manifest.bit_depth, scoring)
    maps: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []
    for low in range(0, len(chosen), scoring.batch_size):
        batch = shards.take(chosen[order][low : low + scoring.batch_size])
        draws = [flow.nats_of_values(x, dequantize=True) for x in dequantized_draws(batch, protocol)]
        maps.append((batch.events, torch.stack(draws).mean(dim=0).numpy()))
    images, nats = (np.concatenate(arrays) for arrays in zip(*maps, strict=True))
    rgb = np.broadcast_to(images, (len(chosen), 3, *images.shape[2:]))
    pairs = np.stack([rgb, overlaid(images, nats)], axis=1)[np.argsort(order)]
    zoom = max(1, _MAP_PIXELS // max(pairs.shape[-2:]))
    sheet = contact_sheet(pairs.reshape(-1, *pairs.shape[2:]), 2 * _MAP_COLUMNS, zoom)
    storage.write_bytes(storage.join(scoring.path, _MAPS), sheet)


def _print_plan(model: str, sets: dict[str, _ImageSet], output: str) -> None:
    manifests = {name: images.manifest for name, images in sets.items()}
    rows = [(name, f"{of.name}/{of.split}", f"{of.num_images:,} images") for name, of in manifests.items()]
    print(console.table([*rows, ("output", output, "")], (f"score by {model}", "set", "")))


def _print_scores(
    model: str, thresholds: dict[str, float], flagged: dict[str, dict[str, float]], separations: dict[str, Separation]
) -> None:
    rows: list[tuple[str, ...]] = []
    for score, limit in thresholds.items():
        shares = [f"{share:.1%}" for share in flagged[score].values()]
        by_score = separations.get(score)
        measures = (by_score.auroc, by_score.aupr, by_score.false_positive_rate_95) if by_score else ()
        rows.append((score, f"{limit:.4f}", *shares, *(f"{value:.3f}" for value in measures)))
    sets = tuple(f"flagged in {name}" for name in flagged["likelihood"])
    measured = ("AUROC", "AUPR", "false alarms at 95 %") if separations else ()
    header = (f"score by {model}, higher is more anomalous", "threshold", *sets, *measured)
    print(console.table(rows, header))
    for score in thresholds:
        print(f"{score}: {SCORES[score]}")


def _print_least_likely(images: _ImageSet, likelihood: NDArray[np.float64]) -> None:
    names = images.manifest.class_names
    rows: list[tuple[str, ...]] = []
    for sample in np.argsort(-likelihood, kind="stable")[:_SHOWN].tolist():
        part = next(part for part in images.parts if part.start <= sample < part.stop)
        about = part.read("labels", "origins")
        label, origin = int(about["labels"][sample - part.start]), str(about["origins"][sample - part.start])
        rows.append((origin, names[label] if 0 <= label < len(names) else "", f"{likelihood[sample]:.4f}"))
    print(console.table(rows, ("most anomalous images of data", "class", "likelihood")))
