"""Glow on real gloo ranks: ActNorm is one for all, and every ZeRO stage trains it, whatever becomes of activations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.test_engine import ranks

pytestmark = pytest.mark.distributed

STEPS = 6
FP32 = [f"{stage}:rebuild:fp32" for stage in range(4)] + ["2:checkpoint:fp32", "3:checkpoint:fp32", "3:keep:fp32"]
TARFLOW = ["3:keep:fp32:tarflow", "3:checkpoint:fp32:tarflow", "2:checkpoint:fp32:tarflow"]
BF16 = ["0:rebuild:bf16", "2:rebuild:bf16", "3:rebuild:bf16", "2:checkpoint:bf16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glow")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """One process that keeps all activations."""
    return ranks(1, "glow", folder / "one.json", STEPS, "0:keep:fp32", "0:keep:bf16", "0:keep:fp32:tarflow")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return ranks(2, "glow", folder / "two.json", STEPS, *FP32, *BF16, *TARFLOW)


@pytest.fixture(scope="module")
def three(folder: Path) -> dict[str, Any]:
    """The third rank has no image of the initialisation."""
    return ranks(3, "glow", folder / "three.json", STEPS, "3:rebuild:fp32")


@pytest.mark.parametrize("several", ["two", "three"])
def test_actnorm_of_uneven_ranks_is_that_of_one_process(
    alone: dict[str, Any], several: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(several)
    assert found["ranks_are_equal"]
    assert found["statistics"].keys() == alone["statistics"].keys()
    for name, value in alone["statistics"].items():
        assert np.abs(np.array(found["statistics"][name]) - np.array(value)).max() < 1e-6, name
        assert "initialized" not in name or value == 1


def check_curve(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected["losses"][-1] < expected["losses"][0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)


@pytest.mark.parametrize("variant", [*FP32, *TARFLOW])
def test_every_stage_has_the_loss_curve_of_one_process(
    alone: dict[str, Any], two: dict[str, Any], variant: str
) -> None:
    expected = alone["curves"]["0:keep:fp32:tarflow" if variant.endswith("tarflow") else "0:keep:fp32"]
    check_curve(two["curves"][variant], expected)


def test_stage_3_lets_go_of_parameters_between_steps(two: dict[str, Any]) -> None:
    """Else nothing would be gathered, and these curves would show nothing about stage 3."""
    for variant, curve in two["curves"].items():
        assert (curve["released"] > 5) == variant.startswith("3:"), variant


def test_three_ranks_do_too(alone: dict[str, Any], three: dict[str, Any]) -> None:
    check_curve(three["curves"]["3:rebuild:fp32"], alone["curves"]["0:keep:fp32"])


@pytest.mark.parametrize("variant", BF16)
def test_bf16_restores_the_autocast_state(alone: dict[str, Any], two: dict[str, Any], variant: str) -> None:
    found, expected = two["curves"][variant], alone["curves"]["0:keep:bf16"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.02)
    assert found["norms"] == pytest.approx(expected["norms"], rel=0.1)
    assert expected["losses"] != alone["curves"]["0:keep:fp32"]["losses"]
