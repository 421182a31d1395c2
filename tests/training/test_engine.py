"""The engine on real gloo ranks: all ZeRO stages train alike, average alike, skip alike, and restore each other."""

import json
import subprocess
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import OptimizerConfig, TrainingConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.training.zero import deepspeed_config
from tests.forking import HANG_SECONDS, start
from tests.training.workers import RESULT

distributed = pytest.mark.distributed


class Group:
    """Ranks of `tests.training.workers`, which stay and run one case after the other."""

    def __init__(self, number: int) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the group
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = start(module="tests.training.workers", ranks=number, start_new_session=True, **streams)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, case: str, *arguments: object) -> dict[str, Any]:
        """What a case returns on rank 0; one that raises on any rank ends the group."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([case, *map(str, arguments)]), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        self._process.wait()
        self._errors.seek(0)
        pytest.fail(self._errors.read()[-4000:])

    def end(self) -> None:
        """Let the ranks leave; their exit code is that of the group."""
        if self.is_alive:
            self._process.communicate(timeout=HANG_SECONDS)
        self._errors.close()


@pytest.fixture(scope="module")
def groups() -> Generator[dict[int, Group]]:
    """Groups by their number of ranks, which start when they are first needed."""
    started: dict[int, Group] = {}
    yield started
    for group in started.values():
        group.end()
    assert [group._process.returncode for group in started.values()] == [0] * len(started)


Ranks = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(groups: dict[int, Group]) -> Ranks:
    """Runs a case of `tests.training.workers` on a number of ranks."""

    def run(number: int, case: str, *arguments: object) -> dict[str, Any]:
        if number not in groups or not groups[number].is_alive:
            groups[number] = Group(number)
        return groups[number].run(case, *arguments)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


# --- stages, on two ranks

FLOWS = ("tarflow", "starflow", "glow")
STAGES = [f"stage={stage},flow={flow}" for flow in FLOWS for stage in range(4)]
PLAIN = [one for one in STAGES if "stage=0" in one]


@pytest.fixture(scope="module")
def two(ranks: Ranks) -> dict[str, Any]:
    return ranks(2, "curves", 100, *STAGES)


@pytest.fixture(scope="module")
def two_at_stage_0(ranks: Ranks) -> dict[str, Any]:
    """What the fast tests need of ``two``."""
    return ranks(2, "curves", 50, *PLAIN)


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict[str, Any]:
    """One process, at stage 0, in fp32."""
    return ranks(1, "curves", 50, *PLAIN)


@pytest.fixture(scope="module")
def alone_in_bf16(ranks: Ranks) -> dict[str, Any]:
    """One process, at stage 0."""
    return ranks(1, "curves", 50, *(f"{variant},precision=bf16" for variant in PLAIN))


@pytest.mark.slow
@distributed
@pytest.mark.parametrize("variant", [one for one in STAGES if "stage=0" not in one])
def test_every_stage_has_one_loss_curve(two: dict[str, Any], variant: str) -> None:
    """To 1e-6 over 50 steps; what differs is the order in which the gradient's norm is summed.

    Zero nats are an arbitrary point (the density is on [-1, 1]), so a loss that comes near it is compared as such.
    """
    found, expected = two[variant], two[f"stage=0,{variant.partition(',')[2]}"]
    assert expected["losses"][49] < max(expected["losses"][:5])
    assert found["losses"][:50] == pytest.approx(expected["losses"][:50], rel=1e-6, abs=3e-7)
    assert found["norms"][:50] == pytest.approx(expected["norms"][:50], rel=1e-5)
    assert max(expected["norms"]) > 0.5  # so that clipping acts
    assert found["num_steps"] == 100
    assert found["initialized"]


@pytest.mark.slow
@distributed
@pytest.mark.parametrize("variant", STAGES)
def test_sharded_averages_are_plain_ones(two: dict[str, Any], variant: str) -> None:
    """Of both half-lives, after 100 steps; and take 4 bytes a parameter, divided by the ranks, each."""
    found = two[variant]
    assert max(found["average_errors"]) < 1e-6
    for held in found["average_bytes"]:
        assert held <= 2 * (4 * found["parameters"] / 2 + 4 * 64 * 30)  # every tensor may be padded a little


@pytest.mark.slow
@distributed
@pytest.mark.parametrize("flow", FLOWS)
def test_stage_3_lets_go_of_parameters_between_steps(two: dict[str, Any], flow: str) -> None:
    """Else nothing would be gathered, and these curves would show nothing about stage 3."""
    for stage in range(4):
        assert (two[f"stage={stage},flow={flow}"]["released"] > 5) == (stage == 3)


@distributed
@pytest.mark.parametrize("flow", FLOWS)
def test_ranks_and_accumulation_change_rounding_only(
    ranks: Ranks, alone: dict[str, Any], two_at_stage_0: dict[str, Any], flow: str
) -> None:
    expected = alone[f"stage=0,flow={flow}"]["losses"]
    assert two_at_stage_0[f"stage=0,flow={flow}"]["losses"] == pytest.approx(expected, rel=1e-4)
    variant = f"stage=2,flow={flow},accumulation=2"
    three = ranks(3, "curves", 25, variant)
    assert three[variant]["losses"] == pytest.approx(expected[:25], rel=1e-4)


# --- the rest of the family

FAMILY = [
    f"stage={stage},flow={flow}" for flow in ("realnvp", "nice", "maf", "iaf", "learned_noise") for stage in (0, 2, 3)
]
SOLVED = [f"stage={stage},flow=continuous" for stage in (0, 2)]


def check_alike(two: dict[str, Any], one: dict[str, Any], variants: Sequence[str]) -> None:
    """Every stage on two ranks has the losses of stage 0, which has those of one rank; they fall."""
    for variant in variants:
        first = f"stage=0,{variant.partition(',')[2]}"
        assert two[variant]["losses"] == pytest.approx(two[first]["losses"], rel=1e-6, abs=1e-6), variant
        assert max(two[variant]["average_errors"]) < 1e-6
        assert two[first]["losses"] == pytest.approx(one[first]["losses"], rel=1e-4, abs=1e-5), variant
        assert two[first]["losses"][-1] < two[first]["losses"][0]


@pytest.mark.slow
@distributed
def test_the_rest_of_the_family_trains_alike_at_every_stage_and_on_one_rank(ranks: Ranks) -> None:
    """RealNVP normalises by statistics of the whole batch, which every rank has a part of.

    Stages add gradients in different orders, and how much of that comes out depends on the processor's kernels.
    """
    two = ranks(2, "curves", 15, *FAMILY, *SOLVED)
    one = ranks(1, "curves", 15, *FAMILY[::3])
    check_alike(two, one, FAMILY)
    assert two[SOLVED[1]]["losses"] == pytest.approx(two[SOLVED[0]]["losses"], rel=1e-4, abs=1e-5)  # a solver's own
    assert max(two[SOLVED[1]]["average_errors"]) < 1e-6


# --- autoencoders

RECONSTRUCTIONS = [f"stage={stage},flow={kind}" for kind in ("autoencoder", "decoder") for stage in (0, 2, 3)]


@distributed
def test_autoencoders_and_decoders_train_alike_at_every_stage_and_on_one_rank(ranks: Ranks) -> None:
    two = ranks(2, "curves", 15, *RECONSTRUCTIONS)
    one = ranks(1, "curves", 15, *RECONSTRUCTIONS[::3])
    untrained = ranks(1, "curves", 0, RECONSTRUCTIONS[3])[RECONSTRUCTIONS[3]]
    check_alike(two, one, RECONSTRUCTIONS)
    assert untrained["frozen"] == two["stage=0,flow=decoder"]["frozen"] == two["stage=2,flow=decoder"]["frozen"]
    scales = [ranks(number, "scales")["scales"] for number in (1, 2)]
    assert scales[1] == pytest.approx(scales[0], rel=1e-5)
    assert min(scales[0]) > 0.01
    assert untrained["parameters"] < two["stage=0,flow=autoencoder"]["parameters"]


# --- settings that must not change the result

SAME = [
    "stage=1,offload=optimizer",
    "stage=2,offload=optimizer",
    "stage=3,offload=optimizer",
    "stage=3,offload=all",
    "stage=2,activations=checkpoint",
    "stage=3,activations=checkpoint",
    "stage=0,compile=1",
    "stage=2,compile=1,activations=checkpoint",
    *(f"stage={stage},flow=glow,activations=rebuild" for stage in range(4)),
    "stage=2,flow=glow,activations=checkpoint",
    "stage=3,flow=glow,activations=checkpoint",
]
BF16 = [
    "stage=2,precision=bf16",
    "stage=3,precision=bf16",
    *(f"stage={stage},flow=glow,activations=rebuild,precision=bf16" for stage in (0, 2, 3)),
    "stage=2,flow=glow,activations=checkpoint,precision=bf16",
]


@pytest.fixture(scope="module")
def settings(ranks: Ranks) -> dict[str, Any]:
    return ranks(2, "curves", 15, *SAME, *BF16)


@pytest.mark.slow
@distributed
@pytest.mark.parametrize("variant", SAME)
def test_offloading_compiling_and_computing_again_change_rounding_only(
    two: dict[str, Any], settings: dict[str, Any], variant: str
) -> None:
    expected = two[f"stage=0,flow={'glow' if 'glow' in variant else 'tarflow'}"]
    assert settings[variant]["losses"] == pytest.approx(expected["losses"][:15], rel=1e-4)
    assert max(settings[variant]["average_errors"]) < 1e-6


@pytest.mark.slow
@distributed
@pytest.mark.parametrize("variant", BF16)
def test_bf16_is_the_same_at_every_stage(
    alone: dict[str, Any], alone_in_bf16: dict[str, Any], settings: dict[str, Any], variant: str
) -> None:
    """Also where the backward pass must restore the autocast state."""
    flow = "glow" if "glow" in variant else "tarflow"
    expected = alone_in_bf16[f"stage=0,flow={flow},precision=bf16"]
    assert settings[variant]["losses"] == pytest.approx(expected["losses"][:15], rel=0.02)
    assert settings[variant]["norms"] == pytest.approx(expected["norms"][:15], rel=0.1)
    assert expected["losses"] != alone[f"stage=0,flow={flow}"]["losses"]


# --- Muon

MUON = [f"stage={stage},optimizer=muon" for stage in (1, 2)]


@pytest.mark.slow
@distributed
def test_muon_trains_alike_on_one_rank_and_on_two(ranks: Ranks, alone: dict[str, Any]) -> None:
    one = ranks(1, "curves", 30, *MUON)
    both = ranks(2, "curves", 30, *MUON)
    expected = one[MUON[0]]["losses"]
    assert expected[-1] < 0.5 * expected[0]
    assert expected != alone["stage=0,flow=tarflow"]["losses"][:30]
    for found in (one[MUON[1]], both[MUON[0]], both[MUON[1]]):
        # Newton and Schulz's iteration runs in bf16 and tells rounding errors of momenta apart.
        assert found["losses"] == pytest.approx(expected, rel=0.05)
        assert max(found["average_errors"]) < 1e-6


# --- the start

UNEVEN = (2, 3)


@distributed
@pytest.mark.parametrize("number", UNEVEN)
def test_actnorm_of_uneven_ranks_is_that_of_one_process(ranks: Ranks, number: int) -> None:
    """Of three ranks the third has no image of the initialisation."""
    alone = ranks(1, "statistics")
    found = ranks(number, "statistics")
    assert found["ranks_are_equal"]
    assert found["statistics"].keys() == alone["statistics"].keys()
    for name, value in alone["statistics"].items():
        assert np.abs(np.array(found["statistics"][name]) - np.array(value)).max() < 1e-6, name
        assert "initialized" not in name or value == 1


@distributed
def test_ranks_that_start_unequal_are_found_by_hash(ranks: Ranks) -> None:
    found = ranks(2, "unequal")
    assert (
        found["refused"]
        == [
            [
                "ranks start from different tensors: blocks.0.proj_in.weight",
                "ranks start from different tensors: levels.0.steps.0.norm.initialized",
            ]
        ]
        * 2
    )


# --- checkpoints

MUONS = ("stage=1,optimizer=muon", "stage=2,optimizer=muon")
GLOWS = ("stage=2,flow=glow", "stage=3,flow=glow")
SAVED = ["stage=2", "stage=0", "stage=3", MUONS[0], GLOWS[0]]
LOADED = {
    1: [("stage=2", "stage=0"), ("stage=3", "stage=1"), MUONS, GLOWS],
    2: [*((one, one) for one in SAVED), ("stage=3", "stage=2"), ("stage=0", "stage=3")],
    3: [("stage=2", "stage=3"), ("stage=3", "stage=2,offload=optimizer"), MUONS],
}
"""By number of ranks: saved with, loaded with."""


@pytest.fixture(scope="module")
def saved(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return ranks(2, "save", folder / "checkpoints", *SAVED)


@distributed
@pytest.mark.parametrize("number", LOADED)
def test_a_checkpoint_restores_at_any_stage_and_number_of_ranks(
    ranks: Ranks, folder: Path, saved: dict[str, Any], number: int
) -> None:
    """Weights, moments (Muon's too), both averages and buffers: the next steps are those of the run that went on."""
    pairs = [":".join(pair) for pair in LOADED[number]]
    found = ranks(number, "load", folder / "checkpoints", *pairs)
    for pair, outcome in found.items():
        source, target = pair.split(":")
        expected = saved[source]
        if source == target and number == 2:
            assert outcome == expected, pair  # bit for bit
        muon = "muon" in pair
        assert outcome["losses"] == pytest.approx(expected["losses"], rel=0.02 if muon else 1e-5), pair
        assert outcome["average_sums"] == pytest.approx(expected["average_sums"], rel=0.02 if muon else 1e-4), pair


# --- steps that must not be made, and looks that must not be seen


@distributed
def test_a_step_that_is_not_finite_or_rejected_changes_nothing_anywhere(ranks: Ranks) -> None:
    variants = ["stage=0", "stage=1", "stage=2", "stage=3", "stage=2,flow=glow", "stage=2,optimizer=muon"]
    variants += ["stage=0,flow=realnvp", "stage=2,flow=realnvp"]
    found = ranks(2, "poison", *variants)
    for variant, outcome in found.items():
        wrong = {name for name, value in outcome.items() if value is not (name != "next_skipped")}
        assert wrong == set(), variant


@distributed
def test_looking_at_averaged_weights_leaves_training_as_it_is(ranks: Ranks) -> None:
    variants = ["stage=0", "stage=2", "stage=3", "stage=2,flow=glow", "stage=3,offload=all"]
    for variant, outcome in ranks(2, "borrowed", *variants).items():
        assert outcome["equal"], variant
        assert outcome["seen"] == pytest.approx(outcome["expected"], rel=1e-5), variant


@distributed
def test_a_run_folder_on_each_node_is_refused_by_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    found = ranks(2, "shared", tmp_path / "run")
    for refused in found["refused"]:
        assert refused.startswith("logging.path must be one folder for all ranks (got 1 ranks that do not see")
    assert found["left"] == []


# --- what DeepSpeed is told


def dictionary(ranks: int = 4, **parallelism: object) -> dict[str, Any]:
    training = TrainingConfig(total_images=1, global_batch_size=96, micro_batch_size=8)
    section = ParallelismConfig.model_validate({"zero_stage": 3, "precision": "bf16", **parallelism})
    return deepspeed_config(OptimizerConfig(gradient_clip_norm=0.5), training, section, 1000, ranks)


def test_the_deepspeed_dictionary_is_derived() -> None:
    found = dictionary()
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (96, 8)
    assert found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["zero_optimization"]["stage3_param_persistence_threshold"] == 10
    assert "offload_optimizer" not in found["zero_optimization"]
    assert "zero_hpz_partition_size" not in found["zero_optimization"]
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"\(got 96 and 8 x 5 = 40\); use training.global_batch_size=80"):
        dictionary(ranks=5)


def test_offloading_and_zero_plus_plus_reach_deepspeed() -> None:
    section = dictionary(offload="all")["zero_optimization"]
    assert section["offload_optimizer"]["device"] == section["offload_param"]["device"] == "cpu"
    plus = {"secondary_partition_ranks": 8, "quantized_weights": True, "quantized_gradients": True}
    section = dictionary(zero_plus_plus=plus)["zero_optimization"]
    assert section["zero_hpz_partition_size"] == 8
    assert section["zero_quantized_weights"] is section["zero_quantized_gradients"] is True
