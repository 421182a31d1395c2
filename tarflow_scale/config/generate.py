"""Generation: a version in, shards of new images out."""

from pydantic import Field

from tarflow_scale.config.base import Root
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import EncodedShardsConfig
from tarflow_scale.config.sampling import GuardConfig, NamedLabels, SamplingConfig
from tarflow_scale.config.verb import Flag, Verb
from tarflow_scale.config.versions import VersionConfig

__all__ = ["VERB", "GenerateConfig", "GeneratedShardsConfig", "SeededSamplingConfig"]


class SeededSamplingConfig(SamplingConfig):
    """Sampling of the verb ``generate``."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the latents, and of labels that are drawn."""
    num_images: int = Field(ge=1)
    """Images to generate."""
    labels: NamedLabels = "balanced"
    """``balanced``: the classes in turn. A list such as ``[3, 3, 7]``: its labels in turn. A mapping such as
    ``{0: 1, 7: 2.5}``: each label is drawn with its weight. Labels are numbers or names of classes, as
    ``prepare --stats`` lists them. For a model with classes."""
    guard: GuardConfig = GuardConfig()


class GeneratedShardsConfig(EncodedShardsConfig):
    """Where ``generate`` writes, how images are stored, and what else is made of the finished shards."""

    folder: str | None = None
    """Folder or URL for single files too: ``<class>/<key>.png`` and ``<key>.json``."""
    npz: str | None = None
    """File or URL for the npz that ADM's evaluator takes, too."""


class GenerateConfig(Root):
    """A version in, shards of generated images out; runs again only what is missing."""

    registry: VersionConfig
    sampling: SeededSamplingConfig
    shards: GeneratedShardsConfig
    cluster: ClusterConfig = ClusterConfig()


VERB = Verb(
    "verbs.generate.driver",
    GenerateConfig,
    "write shards of new images from a registered version, on Ray",
    "tarflow-scale generate configs/generate/digits.yaml sampling.num_images=50000 shards.path=runs/samples",
    flags=(
        Flag(
            "calibrate",
            "measure how this device decodes the version fastest, and store that with it, instead",
            function="calibrate",
        ),
    ),
)
