"""Verb ``promote``: let a gate decide whether a version takes an alias.

Read the gate and its protocols, compare the version's reports with the bounds and with the present holder, print
every reason, and move the alias if all hold and it still points where it did. Neither torch nor Ray is imported.

Reads ``gate.path``, the protocols that it names and the model's log; writes one event, or nothing. A gate that says no
is exit code 2 with every reason; ``--override REASON`` moves the alias all the same, and records both for ever. There
is nothing to resume: the event is there or is not.
"""

from tarflow_scale import telemetry
from tarflow_scale.config import GateConfig, PromoteConfig, load_config, load_protocol
from tarflow_scale.errors import PromotionRefused
from tarflow_scale.registry import Decision, Registry, decide, read_contender, resolve

__all__ = ["run"]


def run(config: PromoteConfig, dry_run: bool) -> None:
    """Decide, print, and move the alias.

    Raises:
        RegistryError: no such version, or a retired one; the alias moved meanwhile.
        PromotionRefused: the gate's decision is no, and nobody overrides it.
    """
    model, alias, override = config.registry.model, config.gate.alias, config.gate.override
    gate = load_config(GateConfig, config.gate.path, [])
    protocols = {path: load_protocol(path) for path in (r.protocol for r in gate.requirements)}
    registry = Registry(config.registry.path, config.registry.model)
    state = registry.state()
    version = resolve(state, config.registry.version, model).version
    registry.check_usable(version)
    holder = state.aliases.get(alias)
    champion = read_contender(registry, state, holder) if holder is not None else None
    decision = decide(gate, protocols, read_contender(registry, state, version), champion)
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


def _print_decision(decision: Decision) -> None:
    rows = [("yes" if reason.holds else "NO", reason.requirement, reason.found) for reason in decision.reasons]
    print(telemetry.table(rows, ("holds", "requirement", "found")))
