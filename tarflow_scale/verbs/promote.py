"""Verb ``promote``: let a gate decide whether a version takes an alias.

Read the gate and its protocols, compare the version's reports with the bounds, with the present holder and, with
``gate.against``, with a version of another model; print every reason, and move the alias if all hold and it still
points where it did. ``registry.version=latest`` is the newest version that has the numbers that the gate asks for: one
that another run registered meanwhile is named and passed over. Neither torch nor Ray is imported.

Reads ``gate.path``, the protocols that it names and the model's log; writes one event, or nothing. A gate that says no
is exit code 2 with every reason; ``--override REASON`` moves the alias all the same, and both are recorded. There is
nothing to resume: the event is there or is not.
"""

from collections.abc import Mapping

from tarflow_scale.config.base import load_named
from tarflow_scale.config.promote import PromoteConfig
from tarflow_scale.config.protocols import GateConfig, LikelihoodProtocol, SampledProtocol, load_protocol
from tarflow_scale.errors import ConfigError, PromotionRefused, RegistryError
from tarflow_scale.registry import Contender, Decision, ModelState, Registry, decide, read_contender, resolve
from tarflow_scale.runtime import console

__all__ = ["run"]

Protocols = Mapping[str, LikelihoodProtocol | SampledProtocol]


def run(config: PromoteConfig, dry_run: bool) -> None:
    """Decide, print, and move the alias.

    Raises:
        ConfigError: the gate asks for nothing in which ``gate.against`` could be beaten, or that is the version itself.
        RegistryError: no such version, or a retired one; the alias moved meanwhile.
        PromotionRefused: the gate's decision is no, and nobody overrides it.
    """
    model, alias, override = config.registry.model, config.gate.alias, config.gate.override
    gate = load_named(GateConfig, config.gate.path, "gate", "gate.path")
    protocols = {r.protocol: load_protocol(r.protocol, f"protocol of gate {gate.name}") for r in gate.requirements}
    registry = Registry(config.registry.path, config.registry.model)
    state = registry.state()
    holder = state.aliases.get(alias)
    version = _chosen(registry, state, config.registry.version, gate, protocols, holder)
    registry.check_usable(version)
    candidate = read_contender(registry, state, version)
    champion = read_contender(registry, state, holder) if holder is not None else None
    rival = None if config.gate.against is None else _rival(config, config.gate.against, gate, protocols, candidate)
    decision = decide(gate, dict(protocols), candidate, champion, rival)
    _print_decision(decision)
    if not decision.promoted and override is None:
        failed = "; ".join(f"{r.requirement} (got {r.found})" for r in decision.reasons if not r.holds)
        raise PromotionRefused(f"{model}@{version} does not pass gate {gate.name}: {failed}; {alias} stays")
    if holder == version:
        print(f"{model}@{version} is {alias} already")
    elif dry_run:
        print(f"dry run: {model}@{version} would become {alias}" + ("" if decision.promoted else ", overridden"))
    else:
        recorded = decision.model_dump(mode="json")
        if not decision.promoted:
            recorded["override"] = override
        registry.promote(alias, version, holder, recorded, config.gate.reason or override or "")
        print(f"{model}@{version} is now {alias}" + (f" (was {model}@{holder})" if holder else ""))
        if not decision.promoted:
            print(f"the gate said no; overridden, and recorded, for this reason: {override}")


def _chosen(
    registry: Registry,
    state: ModelState,
    reference: int | str,
    gate: GateConfig,
    protocols: Protocols,
    holder: int | None,
) -> int:
    """The version that is meant; of ``latest`` the newest with the numbers that the gate asks for.

    None older than the holder of the alias is taken, which must not move back without a word; and if none has the
    numbers, the newest is, so that the gate says what is missing.
    """
    newest = resolve(state, reference, registry.model).version
    if reference != "latest":
        return newest
    passed: list[int] = []
    for version in sorted(state.versions.keys() - state.retired.keys(), reverse=True):
        contender = Contender(f"{registry.model}@{version}", state.reports.get(version, []))
        if version < (holder or 0):
            break
        if all(contender.value(protocols[r.protocol], r.protocol_id) is not None for r in gate.requirements):
            line = f"latest is {contender.name}"
            if passed:
                others = ", ".join(f"{registry.model}@{number}" for number in passed)
                line += f", the newest with the numbers that gate {gate.name} asks for; newer without them: {others}"
            print(line)
            return version
        passed.append(version)
    print(f"latest is {registry.model}@{newest}")
    return newest


def _rival(
    config: PromoteConfig, against: str, gate: GateConfig, protocols: Protocols, candidate: Contender
) -> Contender:
    """The version of another model that the candidate must beat."""
    if not any(requirement.must_beat_champion for requirement in gate.requirements):
        raise ConfigError(
            f"gate.against needs a requirement with must_beat_champion (got none in gate {gate.name}); add one to "
            f"{config.gate.path} or leave gate.against out"
        )
    model, _, reference = against.partition("@")
    registry = Registry(config.registry.path, model)
    try:
        state = registry.state()
        version = _chosen(registry, state, reference, gate, protocols, None)
        registry.check_usable(version)
        rival = read_contender(registry, state, version)
    except RegistryError as error:
        raise RegistryError(f"gate.against={against} cannot be compared with: {error}") from error
    if rival.name == candidate.name:
        raise ConfigError(f"gate.against must be another version than the promoted one (got {against}); name another")
    return rival


def _print_decision(decision: Decision) -> None:
    rows = [("yes" if reason.holds else "NO", reason.requirement, reason.found) for reason in decision.reasons]
    print(console.table(rows, ("holds", "requirement", "found")))
