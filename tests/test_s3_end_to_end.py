"""The whole pipeline with every location in a bucket of a real server of the S3 protocol on loopback."""

import json
from pathlib import Path

import pytest

from tarflow_scale.registry import Registry
from tarflow_scale.shards.reader import ShardSet
from tests.conftest import TOP, command, train_arguments

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")
s3_server = pytest.importorskip("evals.benchmarks.s3_server")

pytestmark = [pytest.mark.slow, pytest.mark.ray]

GATE = """
name: bucket
requirements:
  - {protocol: evals/protocols/digits-bits-per-dim.yaml, maximum: 9.0, minimum_images: 359, must_beat_champion: true}
"""


def test_from_images_to_samples_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "gate.yaml").write_text(GATE)
    protocols = [f"evals/protocols/digits-{name}.yaml" for name in ("bits-per-dim", "frechet-pixels")]
    registry = ["registry.path=s3://bucket/registry", "registry.model=small"]
    verbs = [
        ["prepare", "source.kind=digits", "shards.path=s3://bucket/digits", "shards.samples_per_shard=400"],
        ["models", "init", registry[0]],
        train_arguments(Path("data"), tmp_path / "run", Path("registry")),
        [
            "evaluate", *registry, "data.path=s3://bucket/digits/test", "reference.path=s3://bucket/digits/train",
            "reference.cache=s3://bucket/references", f"metrics.protocols={json.dumps(protocols)}",
        ],
        ["promote", *registry, f"gate.path={tmp_path}/gate.yaml"],
        [
            "generate", *registry, "registry.version=champion", "sampling.num_images=120", "sampling.batch_size=20",
            "shards.path=s3://bucket/samples", "shards.samples_per_shard=40",
        ],
        ["models", "verify", *registry],
        ["models", "export", *registry, "command.path=s3://bucket/exported"],
    ]  # fmt: skip
    verbs[2] = [
        {"data.path": "data.path=s3://bucket/digits/train", "registry.path": registry[0]}.get(one.split("=")[0], one)
        for one in verbs[2]
    ] + ["training.total_images=640"]
    with s3_server.conditional("bucket") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for verb in verbs:
            result = command(*verb, cwd=TOP)
            assert result.returncode == 0, f"{verb[:2]}: {result.stderr}"
        state = Registry("s3://bucket/registry", "small").state()
        assert state.aliases == {"champion": 1}
        assert set(state.reports[1][0].metrics) == {"bits_per_dim", "frechet_pixels"}
        samples = ShardSet("s3://bucket/samples", verify="full")
        assert samples.manifest.num_images == 120
        assert next(samples.batches(0, 120, 120)).labels.tolist() == [i % 10 for i in range(120)]
        again = command(*verbs[5], cwd=TOP)
        assert "nothing to do, all 120 images exist" in again.stdout
    s3fs.S3FileSystem.clear_instance_cache()
