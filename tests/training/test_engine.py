"""The engine on real gloo ranks: all ZeRO stages train alike, average alike, skip alike, and restore each other."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tarflow_scale.config import OptimizerConfig, ParallelismConfig, TrainingConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.training.engine import deepspeed_config

TOP = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.distributed


def ranks(number: int, case: str, output: Path, *arguments: object) -> dict[str, Any]:
    """Run a case of `tests.training.workers` on ``number`` ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    result = subprocess.run(
        [*launcher, "-m", "tests.training.workers", case, str(output), *map(str, arguments)],
        cwd=TOP,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(output.read_text())


@cache
def single_curve(folder: Path) -> dict[str, Any]:
    return ranks(1, "curve", folder / "single.json", 0, 25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.mark.parametrize(("stage", "number", "accumulation"), [(0, 2, 1), (1, 2, 1), (2, 2, 3), (2, 3, 1), (3, 2, 1)])
def test_every_stage_has_the_loss_curve_of_one_process(
    folder: Path, tmp_path: Path, stage: int, number: int, accumulation: int
) -> None:
    expected = single_curve(folder)
    found = ranks(number, "curve", tmp_path / "out.json", stage, 25, accumulation)
    assert expected["losses"][-1] < expected["losses"][0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert max(expected["norms"]) > 0.5  # so that clipping acts
    assert found["average_error"] < 1e-6
    assert found["num_steps"] == 25


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[int, dict[str, Any]]:
    return {
        stage: ranks(2, "save", folder / f"save{stage}.json", stage, folder / f"ckpt{stage}") for stage in (0, 2, 3)
    }


@pytest.mark.parametrize(
    ("saved_stage", "stage", "number"), [(2, 2, 2), (2, 0, 1), (2, 3, 3), (3, 2, 2), (3, 1, 1), (0, 0, 2), (0, 3, 2)]
)
def test_a_checkpoint_restores_at_any_stage_and_number_of_ranks(
    folder: Path, tmp_path: Path, saved: dict[int, dict[str, Any]], saved_stage: int, stage: int, number: int
) -> None:
    expected = saved[saved_stage]
    found = ranks(number, "load", tmp_path / "out.json", stage, folder / f"ckpt{saved_stage}")
    if (stage, number) == (saved_stage, 2):
        assert found == expected  # bit for bit
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["average_sum"] == pytest.approx(expected["average_sum"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_with_a_nan_on_one_rank_is_skipped_on_all(tmp_path: Path, stage: int) -> None:
    found = ranks(2, "poison", tmp_path / "out.json", stage)
    assert found == {"skipped": True, "unchanged": True, "next_skipped": False, "moved": True, "finite": True}


def test_a_run_folder_on_each_node_is_refused_by_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    found = ranks(2, "shared", tmp_path / "out.json", tmp_path / "run")
    assert found["refused"].startswith("logging.path must be one folder for all ranks (got 1 that do not see")
    assert found["ranks"] == 2
    assert found["left"] == []


def test_the_deepspeed_dictionary_is_derived() -> None:
    training = TrainingConfig(total_images=1, global_batch_size=96, micro_batch_size=8)
    parallelism = ParallelismConfig(zero_stage=3, precision="bf16")
    found = deepspeed_config(
        OptimizerConfig(gradient_clip_norm=0.5), training, parallelism, num_parameters=1000, ranks=4
    )
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (96, 8)
    assert found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["zero_optimization"]["stage3_param_persistence_threshold"] == 10
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"\(got 96 and 8 x 5 = 40\); use 80"):
        deepspeed_config(OptimizerConfig(), training, parallelism, 1000, ranks=5)
