"""The identity of a run: the settings that must not change when it continues.

The number of ranks, ZeRO stage, logging and length of training may change; for one exception see `batch_statistics`.
"""

from typing import Any

from tarflow_scale.config.data import DataConfig
from tarflow_scale.config.train import Recipe, TrainedConfig, TrainingConfig
from tarflow_scale.runtime import distributed
from tarflow_scale.shards.mix import Mix

__all__ = ["batch_statistics", "identity_of"]


def identity_of(mix: Mix, data: DataConfig, recipe: Recipe, of_subject: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run, which every checkpoint stores; ``of_subject`` is `Subject.identity`.

    A setting that older checkpoints lack is left out if it has its default value, so that their runs can continue.
    """
    training, optimizer = recipe.training, recipe.optimizer
    constant = training.model_dump(mode="json", include={"global_batch_size", "seed", "noise", "label_drop"})
    half_lives = training.ema_half_life_images
    further = [[part.shards.manifest.digest, part.weight] for part in mix.parts[1:]]
    augmentation = data.augmentation
    return {
        "data": mix.manifest.digest,
        **({"data.weight": data.weight, "data.mix": further} if further else {}),
        **({"data.augmentation": augmentation.model_dump(mode="json")} if augmentation != type(augmentation)() else {}),
        "data.shuffle_block": data.shuffle_block,
        "model": recipe.model.model_dump(mode="json"),
        **of_subject,
        **batch_statistics(recipe.model, training),
        **{f"training.{key}": value for key, value in constant.items()},
        "training.ema_half_life_images": half_lives[0] if len(half_lives) == 1 else list(half_lives),
        **({"optimizer.kind": optimizer.kind} if optimizer.kind != "adamw" else {}),
    }


def batch_statistics(model: TrainedConfig, training: TrainingConfig) -> dict[str, Any]:
    """How a batch is divided for the statistics of batch normalization; empty for models without it.

    A forward pass takes one micro batch of every rank. If together they are the whole batch, the division among ranks
    has no effect; otherwise it determines which images share statistics.
    """
    if not model.capabilities.batch_statistics:
        return {}
    division = [training.micro_batch_size, distributed.world_size()]
    whole = training.global_batch_size
    return {"training.micro_batch_size x ranks": whole if division[0] * division[1] == whole else division}
