"""A data set behind the S3 protocol, whose requests take as long as those of a distant store."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tarflow_scale.config.data import DataConfig
from tarflow_scale.errors import DataError, StorageError
from tarflow_scale.shards import reader
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.mix import open_mix
from tests.shards.test_loader import pack

s3fs = pytest.importorskip("s3fs")
s3_server = pytest.importorskip("evals.benchmarks.s3_server")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_from_s3_are_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec keeps file systems with the address they were made for
    pack(tmp_path / "bucket" / "numbers", [30, 31])
    with s3_server.serving(tmp_path, delay_seconds=0.03) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = []
        for path, processes in ((str(tmp_path / "bucket" / "numbers"), 0), ("s3://bucket/numbers", workers)):
            config = DataConfig(path=path, shuffle_block=5, num_workers=processes)
            batches = Loader(open_mix(config, 8, 0), range(8), config, 0).batches(0)
            found.append([batch.events for batch in islice(batches, 12)])
            batches.close()
    assert all(np.array_equal(here, there) for here, there in zip(*found, strict=True))


def test_a_store_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(reader, "FIRST_WAIT_SECONDS", 0.0)
    pack(tmp_path / "bucket" / "numbers", [30, 31])
    with s3_server.serving(tmp_path) as environment:
        for name, value in (environment | {"AWS_MAX_ATTEMPTS": "1"}).items():
            monkeypatch.setenv(name, value)
        config = DataConfig(path="s3://bucket/numbers", shuffle_block=5)
        batches = Loader(open_mix(config, 8, 0), range(8), config, 0).batches(0)
        next(batches)
    with pytest.raises(DataError, match="a shard could not be read during the run, in 6 attempts: cannot read s3://"):
        list(islice(batches, 20))
    batches.close()
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"cannot (read|list) s3://bucket/other"):
        open_mix(DataConfig(path="s3://bucket/other"), 8, 0)
