"""Find settings with which a run fits into GPU memory: try every ZeRO stage, and other settings if no stage fits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tarflow_scale.capacity.memory import Memory, ModelSize, memory_per_rank
from tarflow_scale.capacity.steps import Cluster, StepTime, Work, step_of
from tarflow_scale.config.train import Recipe

__all__ = ["USABLE", "Scenario", "StagePlan", "advice", "by_stage", "largest_micro_batch", "variant"]

USABLE = 0.95
"""Fraction of a card's memory that a plan may use; the rest is left for fragmentation of the allocator."""
_ALIKE = 0.05
"""Step times up to this fraction above the fastest count as equal: the estimates omit hooks and kernel launches."""
_MOST_IMAGES = 1 << 20
_GB = 1e9


@dataclass(frozen=True)
class Scenario:
    """A recipe and the GPUs that it is planned for.

    flops_per_image: operations of a training step per image. mfu: FLOPs utilisation of a GPU. gpus: number of GPUs.
    """

    recipe: Recipe
    event_shape: tuple[int, ...]
    size: ModelSize
    flops_per_image: float
    cluster: Cluster
    mfu: float
    gpus: int

    def work(self, recipe: Recipe) -> Work:
        """Describe a training step with ``recipe``, a variant of the scenario's recipe."""
        return Work(self.flops_per_image, self.size, recipe.parallelism, recipe.training.micro_batch_size)

    def memory(self, recipe: Recipe) -> Memory:
        """Peak memory of each GPU with ``recipe``, a variant of the scenario's recipe."""
        return memory_per_rank(recipe, self.event_shape, self.size, self.gpus, cuda=True)

    def step(self, recipe: Recipe) -> StepTime:
        """Time of a training step on one global batch with ``recipe``, a variant of the scenario's recipe."""
        return step_of(self.work(recipe), self.cluster, self.mfu, self.gpus, recipe.training.global_batch_size)


@dataclass(frozen=True)
class StagePlan:
    """A ZeRO stage: the memory it needs, whether it fits, its speed, and its largest micro batch."""

    stage: int
    memory: Memory
    fits: bool
    step: StepTime
    largest_micro_batch: int


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Whether ``memory`` fits into a GPU of the cluster."""
    return memory.total <= USABLE * cluster.card.memory_bytes


def by_stage(scenario: Scenario) -> list[StagePlan]:
    """The plan of every ZeRO stage that the other settings of the recipe allow."""
    stages: list[StagePlan] = []
    for stage in range(4):
        recipe = variant(scenario.recipe, {"parallelism.zero_stage": stage})
        if recipe is not None:
            memory, step = scenario.memory(recipe), scenario.step(recipe)
            fitting = fits(memory, scenario.cluster)
            stages.append(StagePlan(stage, memory, fitting, step, largest_micro_batch(scenario, recipe)))
    return stages


def largest_micro_batch(scenario: Scenario, recipe: Recipe) -> int:
    """Largest micro batch that fits in memory; 0 if one image does not fit. It need not divide the global batch."""

    def fitting(images: int) -> bool:
        training = recipe.training.model_copy(update={"micro_batch_size": images})
        return fits(scenario.memory(recipe.model_copy(update={"training": training})), scenario.cluster)

    low, high = 0, 1
    while high < _MOST_IMAGES and fitting(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low


def variant(recipe: Recipe, settings: dict[str, Any]) -> Recipe | None:
    """Copy the recipe with new values for keys such as ``parallelism.zero_stage``; None if a value is not allowed."""
    raw = recipe.model_dump()
    for key, value in settings.items():
        section, _, name = key.partition(".")
        raw[section][name] = value
    try:
        return Recipe.model_validate(raw)
    except ValidationError:
        return None


def advice(scenario: Scenario, stages: list[StagePlan]) -> list[str]:
    """Recommend a stage, in lines of text; if the recipe fits at no stage, recommend changes that make it fit."""
    fitting = [plan for plan in stages if plan.fits]
    own = scenario.recipe.parallelism.zero_stage
    if fitting:
        fastest = min(plan.step.seconds for plan in fitting)
        fast = [plan for plan in fitting if plan.step.seconds <= (1 + _ALIKE) * fastest]
        configured = next((plan for plan in stages if plan.stage == own), None)
        if configured in fast:
            return [f"stage {own}, as configured, fits and is about as fast as any other stage that fits"]
        best = fast[0]
        slower = "does not fit"
        if configured is not None and configured.fits:
            slower = f"takes {configured.step.seconds / best.step.seconds - 1:.0%} more time per step"
        gigabytes = f"{best.memory.total / _GB:.1f} GB per GPU"
        return [f"parallelism.zero_stage={best.stage} ({gigabytes}); stage {own}, as configured, {slower}"]
    changes = [f"{text} ({memory.total / _GB:.1f} GB per GPU)" for text, memory in _that_would_fit(scenario)]
    if not changes:
        cards = f"{scenario.gpus} x {scenario.cluster.card.name}"
        return [
            f"no stage fits in the memory of {cards}, even with the changes that this command tries; use more GPUs, or "
            f"GPUs with more memory"
        ]
    return [
        "no stage fits as configured; each of these changes makes the recipe fit:",
        *(f"  {change}" for change in changes),
    ]


def _that_would_fit(scenario: Scenario) -> Iterator[tuple[str, Memory]]:
    """For each kind of change, the smallest change that makes the recipe fit, at the configured stage if possible."""
    own = scenario.recipe.parallelism.zero_stage
    stages = sorted(range(4), key=lambda stage: (stage != own, stage))
    for kind in _changes(scenario):
        for settings in kind:
            tried = (_if_it_fits(scenario, settings, stage) for stage in stages)
            if (change := next(filter(None, tried), None)) is not None:
                yield change
                break


def _changes(scenario: Scenario) -> list[list[dict[str, Any]]]:
    """For each kind of change, the settings to try, from the smallest change to the largest."""
    batch, own = scenario.recipe.training.global_batch_size, scenario.recipe.training.micro_batch_size
    smaller = [images for images in range(own - 1, 0, -1) if batch % (images * scenario.gpus) == 0]
    recompute = [{"parallelism.activations": activations} for activations in ("checkpoint", "rebuild")]
    offload = [{"parallelism.offload": part} for part in ("optimizer", "all")]
    micro = [{"training.micro_batch_size": images} for images in smaller]
    both = [first | second for first in recompute for second in offload]
    return [micro, recompute, offload, both, [first | second for first in both for second in micro]]


def _if_it_fits(scenario: Scenario, settings: dict[str, Any], stage: int) -> tuple[str, Memory] | None:
    changed = settings | ({} if stage == scenario.recipe.parallelism.zero_stage else {"parallelism.zero_stage": stage})
    recipe = variant(scenario.recipe, changed)
    if recipe is None or not fits(memory := scenario.memory(recipe), scenario.cluster):
        return None
    return " ".join(f"{key}={value}" for key, value in changed.items()), memory
