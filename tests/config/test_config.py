"""Configuration: every mistake is found before anything starts, and named by the path of its key."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tarflow_scale.config.base import load_config
from tarflow_scale.config.convert import ConvertConfig
from tarflow_scale.config.doctor import DoctorConfig
from tarflow_scale.config.encode import EncodeConfig
from tarflow_scale.config.evaluate import EvaluateConfig
from tarflow_scale.config.generate import GenerateConfig
from tarflow_scale.config.models import ModelsConfig
from tarflow_scale.config.prepare import PrepareConfig
from tarflow_scale.config.promote import PromoteConfig
from tarflow_scale.config.protocols import GateConfig, load_protocol
from tarflow_scale.config.report import ReportConfig
from tarflow_scale.config.score import ScoreConfig
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.errors import ConfigError
from tests.conftest import TOP

ROOTS = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "promote": PromoteConfig,
    "generate": GenerateConfig,
    "models": ModelsConfig,
    "report": ReportConfig,
    "score": ScoreConfig,
    "convert": ConvertConfig,
    "doctor": DoctorConfig,
    "encode": EncodeConfig,
}
FILES = sorted((TOP / "configs").rglob("*.yaml"))
BASE = """
data: {path: d}
model: {kind: tarflow, patch_size: 2, width: 128, layers_per_block: [2, 2]}
optimizer: {peak_lr: 2.5e-3}
training: {total_images: 1000, global_batch_size: 64, micro_batch_size: 32}
checkpoint: {every_images: 100}
logging: {path: r}
registry: {path: r, model: m}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "base.yaml"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TOP)))
def test_every_committed_configuration_loads_and_says_how_to_run_it(file: Path) -> None:
    load_config(ROOTS[file.parent.name], file, [])
    header = file.read_text().split("\n\n")[0]
    assert "# Command:" in header
    assert str(file.relative_to(TOP)) in header


@pytest.mark.parametrize("file", sorted((TOP / "evals/protocols").glob("*.yaml")), ids=lambda file: file.name)
def test_every_protocol_loads(file: Path) -> None:
    protocol = load_protocol(str(file))
    assert len(protocol.digest) == 64
    assert file.read_text().startswith("#")


@pytest.mark.parametrize("file", sorted((TOP / "evals/gates").glob("*.yaml")), ids=lambda file: file.name)
def test_every_gate_names_protocols_that_exist(file: Path) -> None:
    for requirement in load_config(GateConfig, file, []).requirements:
        assert len(load_protocol(str(TOP / requirement.protocol)).digest) == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.peak_lr=1", "optimiser: unknown key (did you mean optimizer?); check the spelling against --help"),
        ("optimizer.lr=1", "optimizer.lr: unknown key; check the spelling against --help"),
        (
            "optimizer.peak_lr=fast",
            "optimizer.peak_lr: Input should be a valid number, unable to parse string as a number (got 'fast')",
        ),
        (
            "optimizer.kind=muon",
            "optimizer: muon_peak_lr and kind=muon must be set together (got kind=muon and None); set both or neither",
        ),
        (
            "optimizer={kind: muon, muon_peak_lr: 0.02, gradient_clip_norm: 0.5}",
            "optimizer: gradient_clip_norm has no effect on kind=muon (got 0.5); remove it",
        ),
        (
            "schedule.kind=wsd",
            "schedule: decay_images and kind=wsd must be set together (got kind=wsd and None); set both or neither",
        ),
        (
            "schedule={kind: wsd, warmup_images: 500, decay_images: 500}",
            "schedule.warmup_images + schedule.decay_images must be below training.total_images (got 500 + 500 = 1000, "
            "and 1000); lower schedule.warmup_images + schedule.decay_images, or raise training.total_images",
        ),
        (
            "schedule.warmup_images=1200",
            "schedule.warmup_images must be below training.total_images (got 1200, and 1000); lower "
            "schedule.warmup_images, or raise training.total_images",
        ),
        (
            "training.ema_half_life_images=[100, 100]",
            "training.ema_half_life_images: half-lives must differ (got [100, 100]); remove one",
        ),
        (
            "parallelism={zero_stage: 0, offload: optimizer}",
            "parallelism: offload=optimizer needs zero_stage 1, 2 or 3 (got 0); raise zero_stage",
        ),
        (
            "parallelism={zero_stage: 2, offload: all}",
            "parallelism: offload=all needs zero_stage 3 (got 2); use offload=optimizer or zero_stage=3",
        ),
        (
            "parallelism={zero_stage: 2, zero_plus_plus: {quantized_weights: true}}",
            "parallelism: zero_plus_plus needs zero_stage 3 (got 2); raise zero_stage or remove the section",
        ),
        (
            "parallelism={compile: true, activations: rebuild}",
            "parallelism: compile needs activations=keep or checkpoint (got rebuild); use checkpoint",
        ),
        ("optimizer.peak_lr=0", "optimizer.peak_lr: Input should be greater than 0 (got 0)"),
        ("optimizer.peak_lr=.nan", "optimizer.peak_lr: Input should be a finite number (got nan)"),
        ("optimizer.peak_lr=.inf", "optimizer.peak_lr: Input should be a finite number (got inf)"),
        ("model.patch_size=0", "model.patch_size: Input should be greater than or equal to 1 (got 0)"),
        (
            "model.patch_size=1.5",
            "model.patch_size: Input should be a valid integer, got a number with a fractional part (got 1.5)",
        ),
        (
            "model.layers_per_block=[]",
            "model.layers_per_block: Tuple should have at least 1 item after validation, not 0 (got [])",
        ),
        (
            "model.kind=gan",
            "model.kind: must be one of 'tarflow', 'glow', 'nice', 'realnvp', 'maf', 'iaf', 'continuous', "
            "'autoencoder', 'decoder' (got 'gan')",
        ),
        ("model.width=100", "model: width must be a multiple of head_width (got 100 and 64); change either"),
        ("parallelism.zero_stage=4", "parallelism.zero_stage: Input should be 0, 1, 2 or 3 (got 4)"),
        (
            "training.noise.std=0.1",
            "training.noise: std must be > 0 for gaussian and 0 for other noise (got uniform and 0.1)",
        ),
        (
            "model={kind: glow, levels: 2, steps_per_level: 1, patch_size: 4}",
            "model.patch_size: unknown key; check the spelling against --help",
        ),
        ("model={patch_size: 4}", "model.kind: required key is missing; set it in the YAML or as model.kind=VALUE"),
        (
            "parallelism.activations=rebuild",
            "parallelism.activations must be keep or checkpoint for this model (got rebuild and model.kind=tarflow); "
            "use checkpoint",
        ),
        (
            "model={kind: tarflow, patch_size: 2, width: 64, layers_per_block: [1], variant: volume_preserving, "
            "log_scale_bound: 2}",
            "model: log_scale_bound has no effect on variant=volume_preserving (got 2.0); remove it",
        ),
        ("model={kind: continuous, width: 0}", "model.width: Input should be greater than or equal to 1 (got 0)"),
        (
            "training.micro_batch_size=48",
            "training.global_batch_size must be a multiple of training.micro_batch_size (got 64 and 48); use 48",
        ),
        ("training.total_images=", "training.total_images: Input should be a valid integer (got None)"),
        ("data=5", "data: Input should be a valid dictionary or instance of DataConfig (got 5)"),
        (
            "optimizer.peak_lr.x=5",
            "optimizer.peak_lr.x: peak_lr is a value, not a section (got 0.0025); check the path of the key",
        ),
        ("nonsense", "an override must have the form section.key=value (got 'nonsense'); for example training.seed=1"),
        (".a=1", "an override must have the form section.key=value (got '.a=1'); for example training.seed=1"),
        ("data.path=[", "data.path: the value is not valid YAML (got '['); quote it"),
        ("optimizer.betas=0.9", "optimizer.betas: must be a list (got 0.9); write optimizer.betas=[0.9]"),
        (
            "registry.model=a/b",
            r"registry.model: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$' (got 'a/b')",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_path_of_its_key(base: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, base, [override])
    assert str(error.value) == message


def test_another_kind_of_model_needs_a_section_of_its_own(base: Path) -> None:
    with pytest.raises(
        ConfigError, match="to change the kind, replace the whole section, as in 'model={kind: glow, levels: 3}'$"
    ):
        load_config(TrainConfig, base, ["model.kind=glow"])


def test_a_mistake_in_a_file_that_is_named_names_the_key_and_the_file(tmp_path: Path) -> None:
    absent = f"{tmp_path}/absent.yaml"
    with pytest.raises(ConfigError) as error:
        load_protocol(absent)
    said = f"metrics.protocols: cannot read the protocol file {absent} (No such file or directory); check the path"
    assert str(error.value) == said
    (tmp_path / "fid.yaml").write_text("{metric: frechet, name: fid, extractor: pixels, num_images: 1, bit_depth: 4}")
    with pytest.raises(ConfigError) as error:
        load_protocol(f"{tmp_path}/fid.yaml")
    assert str(error.value) == (
        f"metrics.protocols: in the protocol file {tmp_path}/fid.yaml: frechet.num_images: Input should be greater than or "
        f"equal to 2 (got 1)"
    )


def test_no_configuration_at_all_says_where_there_are_some() -> None:
    with pytest.raises(
        ConfigError, match="^no configuration file was given; pass one, such as .*/configs; data: required sec"
    ):
        load_config(TrainConfig, None, [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model={kind: continuous}", "parallelism.activations=checkpoint"],
            "parallelism.activations must be keep for this model (got checkpoint and model.kind=continuous); use keep",
        ),
        (
            ["model={kind: realnvp, levels: 2, normalization: batch}", "parallelism.activations=checkpoint"],
            "parallelism.activations must be keep for this model (got checkpoint and model.kind=realnvp); use keep",
        ),
        (
            ["model={kind: continuous}", "parallelism.zero_stage=3"],
            "parallelism.zero_stage=3, which divides weights, is not supported for model.kind=continuous (got both); use 2",
        ),
        (
            ["model.dequantization={}", "training.noise={kind: gaussian, std: 0.1}"],
            "model.dequantization needs training.noise.kind=uniform, which stays in the bins of pixels (got gaussian); "
            "remove model.dequantization, or set the noise to uniform",
        ),
        (
            ["model={kind: nice, dequantization: {couplings: 0}}", "training.seed=1"],
            "model.dequantization.couplings: Input should be greater than or equal to 1 (got 0)",
        ),
        (
            ["model={kind: maf}", "parallelism.compile=true"],
            "parallelism.compile and optimizer.kind=muon are not supported for model.kind=maf (got at least one of "
            "them); remove them",
        ),
        (
            ["model={kind: continuous, solver: rk4, num_steps: 501}", "training.seed=1"],
            "model: max_evaluations must be enough for num_steps (got 2000, and 501 steps of rk4 need 2004 evaluations); "
            "raise it",
        ),
        (
            ["model={kind: nice}", "logging.preview_guidance=1"],
            "logging.preview_guidance has no effect on model.kind=nice (got 1.0); set it to 0",
        ),
    ],
)
def test_what_a_model_does_not_go_with(base: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, base, overrides)
    assert str(error.value) == message


def test_all_mistakes_are_reported_at_once(base: Path) -> None:
    with pytest.raises(ConfigError, match="model.patch_size: .*; optimizer.peak_lr: .*"):
        load_config(TrainConfig, base, ["model.patch_size=0", "optimizer.peak_lr=0"])


@pytest.mark.parametrize(
    ("given", "size"),
    [("16", 16), ("[16, 16]", 16), ("16x16", 16), ("[192, 128]", (192, 128)), ("192x128", (192, 128)), ("null", None)],
)
def test_a_size_is_one_number_for_a_square(given: str, size: int | tuple[int, int] | None) -> None:
    source = ["source.kind=folder", "source.path=d", "shards.path=s"]
    config = load_config(PrepareConfig, None, [*source, f"source.size_pixels={given}"])
    assert config.source.size_pixels == size
    stored = config.model_dump(mode="json")
    assert stored["source"]["size_pixels"] == (list(size) if isinstance(size, tuple) else size)
    assert PrepareConfig.model_validate(stored) == config


@pytest.mark.parametrize("given", ["0", "[8, 0]", "[1, 2, 3]", "[8]", "8x", "8x8x8", "2.5", "{h: 8}", "wide"])
def test_what_is_no_size_is_named(given: str) -> None:
    source = ["source.kind=folder", "source.path=d", "shards.path=s"]
    with pytest.raises(ConfigError, match=r"^source.size_pixels: a size must be a number of pixels, .*\(got [^()]*\)$"):
        load_config(PrepareConfig, None, [*source, f"source.size_pixels={given}"])


def test_overrides_win_and_defaults_fill_in(base: Path) -> None:
    config = load_config(TrainConfig, base, ["optimizer.peak_lr=1e-4", "training.seed=7", "model.layers_per_block=[3]"])
    assert config.optimizer.peak_lr == 1e-4
    assert config.training.seed == 7
    assert config.model.layers_per_block == (3,)
    assert config.optimizer.gradient_clip_norm == 1.0
    again = TrainConfig.model_validate(config.model_dump(mode="json"))
    assert again == config


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "is not valid YAML"), ("- 1", "must contain sections"), ("", "must")]
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, file, [])


BOMB = "a: &a [0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in pairwise("abcdefghijkl")
)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor for the tag"),
        (BOMB + "data: *l", r"f: a configuration must not hold more than 100,000 values"),
        (BOMB + "data: !!pairs [path: *l]", "must not hold more than 100,000 values"),
        ("data: &a [*a]", r"data.0: a value must not refer to itself"),
        ("data: " + "[" * 1_000, r"not valid YAML \(it is nested too deeply\)"),
        ("training: {seed: " + "9" * 6000 + "}", r"not valid YAML \(Exceeds the limit"),
        ("data: {path: 's3://KEY:SECRET@bucket/x'}", r"data.path: a URL must not hold a password.*for bucket/x\)"),
        ("data: {mix: [{path: 'https://u:SECRET@host'}]}", "data.mix.0.path: a URL must not hold a password"),
        ("training: {seed: [" + "a, " * 1_000 + "]}", r"got \['a', 'a', .{280,300}\.\.\.\)"),
    ],
    ids=["tag", "bomb", "pairs", "cycle", "deep", "digits", "password", "password in a list", "long"],
)
def test_a_hostile_configuration_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(TrainConfig, file, [])
    assert len(str(refusal.value)) < 1500
    assert "SECRET" not in str(refusal.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize("value", ["[" * 1_000, "9" * 6000, "ftp://u:SECRET@host", "&a [*a]"])
def test_a_hostile_override_is_refused(value: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(TrainConfig, None, [f"data.path={value}"])
    assert len(str(refusal.value)) < 1500
    assert "SECRET" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["nice", "maf", "iaf", "continuous"])
def test_noise_that_is_not_learned_is_not_written(base: Path, kind: str) -> None:
    """So configurations, flows and runs from before it could be learned keep their digests."""
    plain, learned = (
        load_config(TrainConfig, base, [f"model={{kind: {kind}{more}}}"])
        for more in ("", ", dequantization: {couplings: 2}")
    )
    assert "dequantization" not in plain.model_dump(mode="json")["model"]
    assert "dequantization" not in plain.model_dump_json()
    assert plain.model.dequantization is None
    assert learned.model_dump(mode="json")["model"]["dequantization"] == {"couplings": 2, "width": 32}
    for config in (plain, learned):
        assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_configuration_cannot_be_changed(base: Path) -> None:
    config = load_config(TrainConfig, base, [])
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 1  # type: ignore[misc]


def test_the_digest_of_a_protocol_is_that_of_its_content(tmp_path: Path) -> None:
    content = yaml.safe_load((TOP / "evals/protocols/digits-frechet-pixels.yaml").read_text())
    digests = set()
    for seed in (0, 0, 1):
        file = tmp_path / f"{len(digests)}-{seed}.yaml"
        file.write_text(yaml.safe_dump(content | {"seed": seed}))
        digests.add(load_protocol(str(file)).digest)
    assert len(digests) == 2
