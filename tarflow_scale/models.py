"""Verb ``models``: look at a registry (``list``, ``show``), or move an alias back (``rollback``)."""

from tarflow_scale import telemetry
from tarflow_scale.config import ModelsConfig
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import MetricsReport, ModelVersion
from tarflow_scale.registry import Registry
from tarflow_scale.registry.registry import resolve

__all__ = ["list_models", "rollback", "show"]


def list_models(config: ModelsConfig, dry_run: bool) -> None:
    """Print every version of every model of the registry (or of the one named), newest first, with its numbers."""
    del dry_run  # there is nothing to change
    rows: list[tuple[str, ...]] = []
    wanted = config.registry.model
    for model in [wanted] if wanted else Registry.models(config.registry.path):
        state = Registry(config.registry.path, model).state()
        for number in sorted(state.versions, reverse=True):
            version = state.versions[number]
            aliases = ", ".join(sorted(alias for alias, held in state.aliases.items() if held == number))
            numbers = _numbers(state.reports.get(number, []))
            images = _images(version)
            rows.append((f"{model}@{number}", aliases, images, f"{version.parameters:,}", numbers))
    print(telemetry.table(rows, ("version", "aliases", "images seen", "parameters", "numbers")))


def show(config: ModelsConfig, dry_run: bool) -> None:
    """Print what is known of one version: where it came from, its numbers, and what happened to it."""
    del dry_run  # there is nothing to change
    model = _named(config)
    state = Registry(config.registry.path, model).state()
    version = resolve(state, config.registry.version, model)
    aliases = [alias for alias, held in state.aliases.items() if held == version.version]
    rows: list[tuple[str, ...]] = [
        ("version", f"{model}@{version.version}" + (f" ({', '.join(aliases)})" if aliases else "")),
        ("weights", version.weights_digest),
        ("data", f"{version.data.name}/{version.data.split}, manifest {version.data.digest}"),
        ("pixels", f"{version.pixels.bit_depth} bit, {version.pixels.noise} noise"),
        ("trained", f"{_images(version)} images, {version.parameters:,} parameters"),
        ("config", version.config_digest),
        ("code", version.git_commit),
        ("packages", ", ".join(f"{name} {number}" for name, number in version.packages.items())),
    ]
    for report in state.reports.get(version.version, []):
        for metric in report.metrics.values():
            error = f" +- {metric.standard_error:.4f}" if metric.standard_error is not None else ""
            found = f"{metric.value:.4f}{error} {metric.unit} on {metric.num_images} images"
            rows.append((metric.protocol, f"{found}, protocol {metric.protocol_id[:12]}"))
    for plan in state.plans.get(version.version, []):
        gain = plan.exact_seconds / plan.adaptive_seconds
        speed = f"{plan.batch_size / plan.adaptive_seconds:.3g} images/s, {gain:.3g} times exact"
        rows.append((f"decoding on {plan.device}", f"{speed} at batch {plan.batch_size}, error {plan.max_error:.1e}"))
    print(telemetry.table(rows, ("what", "value")))
    history = [
        (str(event.number), event.time, event.kind, event.actor, event.reason)
        for event in state.events
        if version.version in (event.payload.get("version"), _subject(event.payload))
    ]
    print()
    print(telemetry.table(history, ("event", "time", "what", "who", "why")))


def rollback(config: ModelsConfig, dry_run: bool) -> None:
    """Point an alias (``registry.version``) back to the version before.

    Raises:
        RegistryError: not an alias, or nothing to go back to.
    """
    alias, model = config.registry.version, _named(config)
    if not isinstance(alias, str) or alias == "latest":
        raise RegistryError(f"rollback needs an alias (got registry.version={alias}); for example champion")
    registry = Registry(config.registry.path, model)
    if dry_run:
        holders = registry.state().holders.get(alias, [])
        print(f"dry run: {alias} of {model} has been {', '.join(map(str, holders)) or 'nothing'}")
        return
    before, after = registry.rollback(alias, reason="rolled back by hand")
    print(f"{alias} of {model} is {model}@{after} again (was {model}@{before})")


def _named(config: ModelsConfig) -> str:
    if config.registry.model is None:
        raise RegistryError("this command needs a model (got none); set registry.model")
    return config.registry.model


def _numbers(reports: list[MetricsReport]) -> str:
    newest = {metric.protocol: metric for report in reports for metric in report.metrics.values()}
    return ", ".join(f"{name} {metric.value:.4f}" for name, metric in newest.items())


def _subject(payload: dict[str, object]) -> object:
    """The version number inside the payload of a registration or an evaluation."""
    inner = payload.get("version") or payload.get("report")
    return inner.get("version") if isinstance(inner, dict) else inner


def _images(version: ModelVersion) -> str:
    return "unknown" if version.images_seen is None else f"{version.images_seen:,}"
