"""Verb ``models``: inspect a registry, and add events to its logs. None of these commands builds a model from weights.

`tarflow_scale.config.models` explains registries. ``list``, ``show``, ``diff`` and ``verify`` only read. ``alias``,
``approve``, ``rollback`` and ``retire`` add one event each. ``collect`` lists files that no version needs, and deletes
them with ``command.delete=true``. ``export`` and ``import`` are in `tarflow_scale.verbs.models.exchange`. Events
are never changed, and each is written completely or not at all. If ``collect`` is killed, run it again.
"""

import json

from tarflow_scale import storage
from tarflow_scale.config.models import BrowseConfig, ModelsConfig
from tarflow_scale.errors import ConfigError, RegistryError, StorageError
from tarflow_scale.records import MetricsReport, ModelVersion, leaves
from tarflow_scale.registry import Registry, Store, collection, readable_models, resolve
from tarflow_scale.runtime import console

__all__ = [
    "alias",
    "approve",
    "collect",
    "diff",
    "init",
    "list_models",
    "retire",
    "rollback",
    "show",
    "verify",
]

_MIB = 1024**2


# -- commands that only read -------------------------------------------------------------------------------------------


def list_models(config: ModelsConfig, dry_run: bool) -> None:
    """Print every version of ``registry.model``, or of all models of the registry, newest first, with its metrics.

    Warns about a model that cannot be read, and leaves it out.
    """
    del dry_run  # nothing is written
    rows: list[tuple[str, ...]] = []
    wanted = config.registry.model
    path = config.registry.path
    states = {wanted: Registry(path, wanted).state()} if wanted else readable_models(path)
    for model, state in states.items():
        for number in sorted(state.versions, reverse=True):
            version = state.versions[number]
            held = ", ".join(sorted(alias for alias, holder in state.aliases.items() if holder == number))
            marks = held or ("collected" if number in state.collected else "retired" if number in state.retired else "")
            numbers = _numbers(state.reports.get(number, []))
            images = _images(version)
            rows.append((f"{model}@{number}", marks, images, f"{version.parameters:,}", numbers))
    print(console.table(rows, ("version", "aliases", "images seen", "parameters", "numbers")))


def show(config: ModelsConfig, dry_run: bool) -> None:
    """Print the origin, the numbers and the history of a version."""
    from tarflow_scale.shards.events import event_of  # imported here, because NumPy is slow to import

    del dry_run  # nothing is written
    registry = _registry(config.registry)
    state = registry.state()
    version = resolve(state, config.registry.version, registry.model)
    number = version.version
    held = [alias for alias, holder in state.aliases.items() if holder == number]
    data, pixels = version.data, version.pixels
    rows: list[tuple[str, ...]] = [
        ("version", f"{registry.model}@{number}" + (f" ({', '.join(held)})" if held else "")),
        ("weights", version.weights_digest),
        *([("started from", version.started_from)] if version.started_from else []),
        ("data", "not known" if data is None else f"{data.name}/{data.split}, manifest {data.digest}"),
        ("samples", "not known" if data is None else f"{event_of(data, pixels.bit_depth)}, noise: {pixels.noise}"),
        ("trained", f"{_images(version)} images, {version.parameters:,} parameters"),
        ("config", version.config_digest),
        ("checkpoint", version.checkpoint or "not known"),
        ("code", version.git_commit),
        ("packages", ", ".join(f"{name} {package}" for name, package in version.packages.items())),
    ]
    if number in state.retired:
        gone = f", files removed on {state.collected[number]}" if number in state.collected else ""
        rows.append(("retired", f"on {state.retired[number]}{gone}"))
    for report in state.reports.get(number, []):
        for metric in report.metrics.values():
            error = f" +- {metric.standard_error:.4f}" if metric.standard_error is not None else ""
            number_text = f"{metric.value:.4f}{error} {metric.unit} on {metric.num_images} images"
            rows.append((metric.protocol, f"{number_text}, protocol {metric.protocol_id[:12]}"))
    for plan in state.calibrations.get(number, []):
        gain = plan.exact_seconds / plan.adaptive_seconds
        speed = f"{plan.batch_size / plan.adaptive_seconds:.3g} images/s, {gain:.3g} times the speed of exact decoding"
        rows.append((f"decoding on {plan.device}", f"{speed} at batch {plan.batch_size}, error {plan.max_error:.1e}"))
    print(console.table(rows, ("what", "value")))
    history = [
        (str(event.number), event.time, event.kind, event.actor, event.reason)
        for event in state.history
        if event.version == number
    ]
    print()
    print(console.table(history, ("event", "time", "kind", "who", "why")))


def diff(config: ModelsConfig, dry_run: bool) -> None:
    """Compare a version with ``command.other`` (default: champion): print settings that differ, and all numbers."""
    del dry_run  # nothing is written
    registry = _registry(config.registry)
    state = registry.state()
    other = resolve(state, config.command.other or "champion", registry.model)
    version = resolve(state, config.registry.version, registry.model)
    names = tuple(f"{registry.model}@{side.version}" for side in (other, version))
    sides = [_configuration(registry, side) | _provenance(side) for side in (other, version)]
    keys = sorted(set(sides[0]) | set(sides[1]))
    rows = [(key, *(side.get(key, "-") for side in sides)) for key in keys if sides[0].get(key) != sides[1].get(key)]
    print(console.table(rows, ("configuration", *names)) if rows else f"{' and '.join(names)} have equal settings")
    numbers = [_by_protocol(state.reports.get(side.version, [])) for side in (other, version)]
    rows = [(key, *(side.get(key, "-") for side in numbers)) for key in sorted(set(numbers[0]) | set(numbers[1]))]
    print()
    print(console.table(rows, ("number", *names)))


def verify(config: ModelsConfig, dry_run: bool) -> None:
    """Read all events and all files that versions need, and check their digests.

    Raises:
        RegistryError: an event or file is missing or damaged. All problems are printed first.
    """
    del dry_run  # nothing is written
    path, problems, needed = config.registry.path, list[str](), dict[str, str]()
    events = 0
    models = [config.registry.model] if config.registry.model else Registry.models(path)
    for model in models:
        registry = Registry(path, model)
        try:
            state = registry.replayed()
        except (RegistryError, StorageError) as error:
            problems.append(str(error))
            continue
        events += state.number
        for number in state.versions:
            if number not in state.collected:
                for name, record in collection.named_by(state, number):
                    needed.setdefault(record.sha256, f"{name} of {model}@{number}")
    with console.ProgressBar(len(needed), "verify", unit="files") as bar:
        problems += Store(path).problems(needed, lambda _: bar.update(1))
    for problem in problems:
        print(console.printable(problem))
    if problems:
        raise RegistryError(
            f"{path} has {len(problems)} damaged or missing parts (first: {problems[0]}); restore them from a backup"
        )
    print(f"{path}: {events} events of {len(models)} models and {len(needed)} files match their digests")


# -- commands that change the registry ---------------------------------------------------------------------------------


def init(config: ModelsConfig, dry_run: bool) -> None:
    """Make a registry: test that exactly one of many concurrent writers succeeds, and record who may access its files.

    Raises:
        RegistryError: several writers succeeded, and ``command.single_writer`` is not set; or ``command.shared`` is
            set, and the store has no file modes or contains files of other users.
    """
    if dry_run:
        print(f"dry run: would test create-if-absent below {config.registry.path}")
        return
    marker = Store(config.registry.path).init(config.command.single_writer, config.command.shared)
    how = "only one process may write" if marker.single_writer else marker.checked or "a local file system"
    if marker.shared != "umask":
        group = storage.group_of(storage.local(config.registry.path))
        how += f"; group {group} may read and write{', all may read' if marker.shared == 'all' else ''}"
    print(f"{config.registry.path} is a registry ({how})")


def alias(config: ModelsConfig, dry_run: bool) -> None:
    """Move the alias ``command.alias`` to a version. An alias that a gate guards cannot be moved in this way.

    Raises:
        ConfigError: ``command.alias`` is missing or not allowed.
        RegistryError: a gate guards the alias, the version does not exist, or another process moved the alias.
    """
    name = config.command.alias
    if name is None or name == "latest" or name.isdigit():
        raise ConfigError(
            f"command.alias must be a name, not a number or latest (got {name}); set, for example, command.alias=stable"
        )
    registry = _registry(config.registry)
    state = registry.state()
    version, holder = resolve(state, config.registry.version, registry.model).version, state.aliases.get(name)
    if holder == version:
        print(f"{registry.model}@{version} is {name} already")
    elif dry_run:
        print(f"dry run: {registry.model}@{version} would become {name}")
    else:
        registry.set_alias(name, version, holder, config.command.reason)
        print(f"{registry.model}@{version} is now {name}" + (f" (was {registry.model}@{holder})" if holder else ""))


def approve(config: ModelsConfig, dry_run: bool) -> None:
    """Approve a version for promotion, in the name of the current user.

    Raises:
        RegistryError: the version does not exist, is retired, or was approved by this user before.
    """
    registry = _registry(config.registry)
    version = registry.resolve(config.registry.version).version
    if dry_run:
        print(f"dry run: would approve {registry.model}@{version}")
        return
    print(f"{registry.model}@{version} is approved by {registry.approve(version, config.command.reason)}")


def retire(config: ModelsConfig, dry_run: bool) -> None:
    """Take a version out of use; after the grace period ``collect`` may delete its files.

    Raises:
        ConfigError: no reason is given.
        RegistryError: the version does not exist, has an alias, or is already retired.
    """
    if not config.command.reason:
        raise ConfigError("retire needs a reason, which is stored (got none); set command.reason")
    registry = _registry(config.registry)
    version = registry.resolve(config.registry.version).version
    if dry_run:
        print(f"dry run: would retire {registry.model}@{version}")
        return
    registry.retire(version, config.command.reason)
    print(f"{registry.model}@{version} is retired; 'models collect' removes its files after the grace period")


def rollback(config: ModelsConfig, dry_run: bool) -> None:
    """Move the alias in ``registry.version`` back to its previous version.

    Raises:
        RegistryError: ``registry.version`` is not an alias, or the alias has no previous version.
    """
    name, registry = config.registry.version, _registry(config.registry)
    if not isinstance(name, str) or name == "latest":
        raise RegistryError(
            f"rollback needs an alias (got registry.version={name}); set, for example, registry.version=champion"
        )
    if dry_run:
        holders = registry.state().holders.get(name, [])
        print(f"dry run: {name} of {registry.model} has been at versions {', '.join(map(str, holders)) or 'none'}")
        return
    before, after = registry.rollback(name, config.command.reason or "rolled back by hand")
    print(f"{name} of {registry.model} is {registry.model}@{after} again (was {registry.model}@{before})")


def collect(config: ModelsConfig, dry_run: bool) -> None:
    """List files that no version needs any more; with ``command.delete=true`` delete them.

    Raises:
        RegistryError: there is no registry, a log is damaged, or the grace period is too short.
    """
    path, grace = config.registry.path, config.command.grace_days * 86400
    garbage = collection.garbage(path, grace)
    rows = [(f"{model}@{number}", "retired") for model, numbers in garbage.versions.items() for number in numbers]
    rows += [(digest[:12], f"{num_bytes / _MIB:.1f} MiB") for digest, num_bytes in garbage.blobs.items()]
    print(console.table(rows, ("version or file", "state or size")) if rows else f"{path}: nothing to collect")
    if not rows:
        return
    if dry_run or not config.command.delete:
        print("nothing was deleted; to delete these files, set command.delete=true")
        return
    freed = collection.collect(path, garbage, grace, config.command.reason or "collected")
    print(f"{path}: freed {freed / _MIB:.1f} MiB")


# -- text of tables ----------------------------------------------------------------------------------------------------


def _registry(browsed: BrowseConfig) -> Registry:
    if browsed.model is None:
        raise RegistryError("this command needs a model (got none); set registry.model")
    return Registry(browsed.path, browsed.model)


def _numbers(reports: list[MetricsReport]) -> str:
    newest = {metric.protocol: metric for report in reports for metric in report.metrics.values()}
    return ", ".join(f"{name} {metric.value:.4f}" for name, metric in newest.items())


def _by_protocol(reports: list[MetricsReport]) -> dict[str, str]:
    """The newest value of each metric as text. The key is the name and id of the protocol."""
    return {
        f"{metric.protocol} ({metric.protocol_id[:12]})": f"{metric.value:.4f}"
        + (f" +- {metric.standard_error:.4f}" if metric.standard_error is not None else "")
        for report in reports
        for metric in report.metrics.values()
    }


def _images(version: ModelVersion) -> str:
    return "unknown" if version.images_seen is None else f"{version.images_seen:,}"


def _configuration(registry: Registry, version: ModelVersion) -> dict[str, str]:
    """The settings of a version as JSON, by ``section.key``; empty if they are not stored."""
    if version.configuration is None or version.version in registry.state().collected:
        return {}
    settings = json.loads(registry.read("configuration", version.configuration))
    return {key: json.dumps(value) for key, value in leaves(settings) if value != {}}


def _provenance(version: ModelVersion) -> dict[str, str]:
    """Properties of a version that `diff` compares in addition to its settings."""
    return {
        "(code)": version.git_commit,
        "(data manifest)": "not known" if version.data is None else version.data.digest[:12],
        "(started from)": version.started_from,
        "(images seen)": _images(version),
        "(parameters)": f"{version.parameters:,}",
        "(averaged over)": f"{version.ema_half_life_images} images",
        **{f"(package {name})": package for name, package in version.packages.items()},
    }
