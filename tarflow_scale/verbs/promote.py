"""Verb ``promote``: let a gate decide whether an alias moves to a version.

Read the gate and its protocols. Compare the reports of the version with the bounds, with the version that has the alias
and, if ``gate.against`` is set, with a version of another model. Print a table of the requirements. Move the alias if
all requirements hold and no other process moved it meanwhile. ``registry.version=latest`` selects the newest version
with all numbers that the gate requires; newer versions that lack a number are skipped and listed. Neither torch nor Ray
is imported.

Reads ``gate.path``, its protocols and the log of the model; writes one event or nothing. If the gate refuses, the exit
code is 2. ``--override REASON`` moves the alias anyway, and stores the decision and the reason. There is nothing to
resume.
"""

from collections.abc import Mapping

from tarflow_scale.config.promote import GateRef, PromoteConfig
from tarflow_scale.config.protocols import GateConfig, PerImageProtocol, SampledProtocol, load_gate
from tarflow_scale.errors import ConfigError, PromotionRefused, RegistryError
from tarflow_scale.registry import Contender, ModelState, Registry, decide, read_contender, resolve
from tarflow_scale.runtime import console

__all__ = ["run"]

Protocols = Mapping[str, PerImageProtocol | SampledProtocol]


def run(config: PromoteConfig, dry_run: bool) -> None:
    """Decide, print the decision, and move the alias.

    Raises:
        ConfigError: ``gate.against`` is set, but names the version itself, or no requirement compares versions.
        RegistryError: the version does not exist or is retired, or another process moved the alias.
        PromotionRefused: the gate refuses, and there is no override.
    """
    model, alias, override = config.registry.model, config.gate.alias, config.gate.override
    gate, protocols = load_gate(config.gate.path, "gate.path")
    registry = Registry(config.registry.path, model)
    state = registry.state()
    holder = state.aliases.get(alias)
    version = _chosen(registry, state, config.registry.version, gate, protocols, holder)
    registry.check_usable(state, version)
    candidate = read_contender(registry, state, version)
    champion = read_contender(registry, state, holder) if holder is not None else None
    rival = None if config.gate.against is None else _rival(registry.path, config.gate, gate, protocols, candidate)
    decision = decide(gate, protocols, candidate, champion, rival)
    rows = [("yes" if reason.holds else "NO", reason.requirement, reason.found) for reason in decision.reasons]
    print(console.table(rows, ("holds", "requirement", "found")))
    if not decision.promoted and override is None:
        failed = sum(not reason.holds for reason in decision.reasons)
        raise PromotionRefused(
            f"{model}@{version} does not pass gate {gate.name} (got NO for {failed} of {len(rows)} requirements, see "
            f"the table); {alias} was not moved"
        )
    if holder == version:
        print(f"{model}@{version} is {alias} already")
    elif dry_run:
        print(
            f"dry run: {model}@{version} would become {alias}"
            + ("" if decision.promoted else ", although the gate refuses it")
        )
    else:
        recorded = decision.model_dump(mode="json")
        if not decision.promoted:
            recorded["override"] = override
        registry.promote(alias, version, holder, recorded, config.gate.reason or override or "")
        print(f"{model}@{version} is now {alias}" + (f" (was {model}@{holder})" if holder else ""))
        if not decision.promoted:
            print(f"the gate refused; the alias was moved anyway, for this reason, which is stored: {override}")


def _chosen(
    registry: Registry,
    state: ModelState,
    reference: int | str,
    gate: GateConfig,
    protocols: Protocols,
    holder: int | None,
) -> int:
    """The version with the number or alias ``reference``, or the version that ``latest`` selects.

    ``latest`` is the newest version with all numbers that the gate requires. It is never older than ``holder``, the
    version that has the alias, so that the alias does not move back unnoticed. If there is no such version, ``latest``
    is the newest version, and the table shows which numbers are missing.
    """
    newest = resolve(state, reference, registry.model).version
    if reference != "latest":
        return newest
    skipped: list[int] = []
    for version in sorted(state.versions.keys() - state.retired.keys(), reverse=True):
        contender = Contender(f"{registry.model}@{version}", state.reports.get(version, []))
        if version < (holder or 0):
            break
        if all(contender.value(protocols[r.protocol], r.protocol_id) is not None for r in gate.requirements):
            line = f"latest is {contender.name}"
            if skipped:
                newer = ", ".join(f"{registry.model}@{number}" for number in skipped)
                line += f", the newest with all numbers that gate {gate.name} requires; newer without all: {newer}"
            print(line)
            return version
        skipped.append(version)
    print(f"latest is {registry.model}@{newest}")
    return newest


def _rival(
    registry_path: str, reference: GateRef, gate: GateConfig, protocols: Protocols, candidate: Contender
) -> Contender:
    """The version that the candidate must also beat: ``gate.against``, usually of another model."""
    if not any(requirement.must_beat_champion for requirement in gate.requirements):
        raise ConfigError(
            f"gate.against needs a requirement with must_beat_champion (got none in gate {gate.name}); add one to "
            f"{reference.path} or remove gate.against"
        )
    against = reference.against or ""
    model, _, name = against.partition("@")
    registry = Registry(registry_path, model)
    try:
        state = registry.state()
        version = _chosen(registry, state, name, gate, protocols, None)
        registry.check_usable(state, version)
        rival = read_contender(registry, state, version)
    except RegistryError as error:
        raise RegistryError(f"cannot compare the version with gate.against={against}: {error}") from error
    if rival.name == candidate.name:
        raise ConfigError(
            f"gate.against must not be the version that is promoted (got {against}); choose another version"
        )
    return rival
