"""Configuration of the verb ``generate``."""

from pydantic import Field

from tarflow_scale.config.base import Root
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import EncodedShardsConfig
from tarflow_scale.config.sampling import GuardConfig, NamedLabels, SamplingConfig
from tarflow_scale.config.verb import Flag, Verb
from tarflow_scale.config.versions import VersionConfig

__all__ = ["VERB", "GenerateConfig", "GeneratedShardsConfig", "SeededSamplingConfig"]


class SeededSamplingConfig(SamplingConfig):
    """How images are sampled."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the latents and of random labels."""
    num_images: int = Field(ge=1)
    """Number of images to generate."""
    labels: NamedLabels = "balanced"
    """Labels of the images, for a model with classes. ``balanced``: all classes in turn. A list such as ``[3, 3, 7]``:
    these labels in turn. A mapping such as ``{0: 1, 7: 2.5}``: random labels with these weights. A label is the number
    or the name of a class; ``prepare --stats`` lists them."""
    guard: GuardConfig = GuardConfig()


class GeneratedShardsConfig(EncodedShardsConfig):
    """Where and how images are stored, and additional output formats."""

    folder: str | None = None
    """Folder or URL for additional copies as image files, ``<class>/<key>.png`` with ``<key>.json``; None writes none.
    """
    npz: str | None = None
    """Path or URL of an additional npz file for ADM's evaluator; None writes none."""


class GenerateConfig(Root):
    """Generate shards of images from a registered version. A repeated run generates only the missing shards."""

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
            "instead, measure the fastest way to decode the version on this device, and store it in the registry",
            function="calibrate",
        ),
    ),
)
