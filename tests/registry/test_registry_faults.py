"""Every fault of a registry, with fewer rounds than `evals/benchmarks/registry_faults.py` has."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("moto")
pytest.importorskip("s3fs")
faults = pytest.importorskip("evals.benchmarks.registry_faults")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", faults.SCENARIOS, ids=lambda one: one.__name__)
def test_a_registry_survives(scenario: Callable[[object, Path], object], tmp_path: Path) -> None:
    random.seed(0)
    world = faults.make_world(tmp_path, rounds=3, stride=5)
    (tmp_path / "here").mkdir()
    cases = scenario(world, tmp_path / "here")  # raises `Failed` unless nothing was lost
    assert cases is None or cases >= 3  # it was really disturbed


@pytest.mark.slow
def test_rclones_s3_has_no_create_if_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    from evals.benchmarks import s3_server
    from tarflow_scale.errors import RegistryError
    from tarflow_scale.registry import Registry, Store
    from tests.registry.test_registry import FACTS

    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "bucket").mkdir()
    with s3_server.serving(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RegistryError, match="does not support create-if-absent"):
            Registry("s3://bucket/registry", "m").register({"w": b"1"}, FACTS, "")
        assert Store("s3://bucket/registry").init(single_writer=True).single_writer
        registry = Registry("s3://bucket/registry", "m")
        assert [registry.register({"w": bytes([i])}, FACTS, "").version for i in range(2)] == [1, 2]
    s3fs.S3FileSystem.clear_instance_cache()
