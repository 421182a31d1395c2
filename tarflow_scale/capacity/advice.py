"""What to do so that a run fits its GPUs: every ZeRO stage tried, and where none fits, what would."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tarflow_scale.capacity.memory import Memory, ModelSize, memory_per_rank
from tarflow_scale.capacity.steps import Cluster, StepTime, Work, step_of
from tarflow_scale.config.train import TrainConfig

__all__ = ["USABLE", "Scenario", "StagePlan", "advice", "by_stage", "largest_micro_batch", "variant"]

USABLE = 0.95
"""Of a card's memory; the rest is left to the allocator's gaps."""
_ALIKE = 0.05
"""Differences of time that the arithmetic does not resolve: hooks and launches of kernels are not in it."""
_MOST_IMAGES = 1 << 20
_GB = 1e9


@dataclass(frozen=True)
class Scenario:
    """A recipe and the GPUs it is planned for; ``mfu`` is of one GPU, ``flops_per_image`` of a training step."""

    config: TrainConfig
    event_shape: tuple[int, ...]
    size: ModelSize
    flops_per_image: float
    cluster: Cluster
    mfu: float
    gpus: int

    def work(self, config: TrainConfig) -> Work:
        """What a variant of the recipe computes."""
        return Work(self.flops_per_image, self.size, config.parallelism, config.training.micro_batch_size)

    def memory(self, config: TrainConfig) -> Memory:
        """What a GPU needs for a variant of the recipe."""
        return memory_per_rank(config, self.event_shape, self.size, self.gpus, cuda=True)

    def step(self, config: TrainConfig) -> StepTime:
        """A step of a variant of the recipe, with its global batch."""
        work = self.work(config)
        return step_of(work, self.cluster, self.mfu, self.gpus, config.training.global_batch_size)


@dataclass(frozen=True)
class StagePlan:
    """A ZeRO stage: what it needs, whether that is there, how fast it is, and the largest micro batch with it."""

    stage: int
    memory: Memory
    fits: bool
    step: StepTime
    largest_micro_batch: int


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Whether a GPU has that much."""
    return memory.total <= USABLE * cluster.card.memory_bytes


def by_stage(scenario: Scenario) -> list[StagePlan]:
    """All stages that the recipe allows; with its offload where the stage allows that."""
    found: list[StagePlan] = []
    for stage in range(4):
        config = variant(scenario.config, parallelism={"zero_stage": stage})
        if config is None:
            continue
        memory = scenario.memory(config)
        found.append(
            StagePlan(
                stage,
                memory,
                fits(memory, scenario.cluster),
                scenario.step(config),
                largest_micro_batch(scenario, config),
            )
        )
    return found


def largest_micro_batch(scenario: Scenario, config: TrainConfig) -> int:
    """Images of a forward pass that still fit, whatever divides the batch; 0 if not even one does."""

    def enough(images: int) -> bool:
        training = config.training.model_copy(update={"micro_batch_size": images})
        return fits(scenario.memory(config.model_copy(update={"training": training})), scenario.cluster)

    return _largest(enough)


def _largest(enough: Callable[[int], bool]) -> int:
    if not enough(1):
        return 0
    low, high = 1, 2
    while high < _MOST_IMAGES and enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def variant(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig | None:
    """The recipe with other settings; None if they do not go together."""
    raw = config.model_dump()
    for section, settings in sections.items():
        raw[section] |= settings
    try:
        return type(config).model_validate(raw)
    except ValidationError:
        return None


def advice(scenario: Scenario, stages: list[StagePlan]) -> list[str]:
    """In words: the lowest stage that fits and is about as fast as any; or what makes the recipe fit."""
    fitting = [plan for plan in stages if plan.fits]
    own = scenario.config.parallelism.zero_stage
    if fitting:
        fastest = min(plan.step.seconds for plan in fitting)
        fast = [plan for plan in fitting if plan.step.seconds <= (1 + _ALIKE) * fastest]
        configured = next((plan for plan in stages if plan.stage == own), None)
        if configured in fast:
            return [f"stage {own}, as configured, fits and is about as fast as any"]
        best = fast[0]
        slower = "does not fit" if configured not in fitting else f"takes {_more(configured, best)} more time a step"
        gigabytes = f"{best.memory.total / _GB:.1f} GB a GPU"
        return [f"parallelism.zero_stage={best.stage} ({gigabytes}); stage {own}, as configured, {slower}"]
    changes = [f"{text} ({memory.total / _GB:.1f} GB a GPU)" for text, memory in _that_would_fit(scenario)]
    if not changes:
        cards = f"{scenario.gpus} x {scenario.cluster.card.name}"
        return [f"no stage fits {cards}, nor with less of anything known here; take more GPUs, or larger ones"]
    return ["no stage fits as configured; one of these does:", *(f"  {change}" for change in changes)]


def _more(configured: StagePlan | None, best: StagePlan) -> str:
    assert configured is not None
    return f"{configured.step.seconds / best.step.seconds - 1:.0%}"


def _that_would_fit(scenario: Scenario) -> Iterator[tuple[str, Memory]]:
    """The least change of each kind that is enough, the stage as configured if that will do."""
    own = scenario.config.parallelism.zero_stage
    stages = sorted(range(4), key=lambda stage: (stage != own, stage))
    for kind in _changes(scenario):
        for settings in kind:
            found = next((one for stage in stages if (one := _if_it_fits(scenario, settings, stage))), None)
            if found is not None:
                yield found
                break


def _changes(scenario: Scenario) -> list[list[dict[str, Any]]]:
    """Kinds of change, and in each the settings to try, from the least change to the greatest."""
    batch, own = scenario.config.training.global_batch_size, scenario.config.training.micro_batch_size
    smaller = [images for images in range(own - 1, 0, -1) if batch % (images * scenario.gpus) == 0]
    recompute = [{"parallelism.activations": how} for how in ("checkpoint", "rebuild")]
    offload = [{"parallelism.offload": how} for how in ("optimizer", "all")]
    micro = [{"training.micro_batch_size": images} for images in smaller]
    both = [one | other for one in recompute for other in offload]
    return [micro, recompute, offload, both, [one | other for one in both for other in micro]]


def _if_it_fits(scenario: Scenario, settings: dict[str, Any], stage: int) -> tuple[str, Memory] | None:
    changed = settings | ({} if stage == scenario.config.parallelism.zero_stage else {"parallelism.zero_stage": stage})
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changed.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    config = variant(scenario.config, **sections)
    if config is None or not fits(memory := scenario.memory(config), scenario.cluster):
        return None
    return " ".join(f"{key}={value}" for key, value in changed.items()), memory
