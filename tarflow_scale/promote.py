"""Verb ``promote``: let a gate decide whether a version takes an alias.

Read the gate and its protocols, compare the version's reports with the bounds and with the present holder, print
every reason, and move the alias if all hold and it still points where it did. Neither torch nor Ray is imported.
"""

from tarflow_scale import telemetry
from tarflow_scale.config import GateConfig, PromoteConfig, load_config, load_protocol
from tarflow_scale.errors import PromotionRefused
from tarflow_scale.registry import Contender, Decision, ModelState, Registry, decide
from tarflow_scale.registry.registry import resolve

__all__ = ["run"]


def run(config: PromoteConfig, dry_run: bool) -> None:
    """Decide, print, and move the alias.

    Raises:
        RegistryError: no such version; no report by a required protocol; the alias moved meanwhile.
        PromotionRefused: the gate's decision is no.
    """
    model, alias = config.registry.model, config.gate.alias
    gate = load_config(GateConfig, config.gate.path, [])
    protocols = {path: load_protocol(path) for path in (r.protocol for r in gate.requirements)}
    registry = Registry(config.registry.path, model)
    state = registry.state()
    version = resolve(state, config.registry.version, model).version
    holder = state.aliases.get(alias)
    champion = _contender(state, model, holder) if holder is not None else None
    decision = decide(gate, protocols, _contender(state, model, version), champion)
    _print_decision(decision)
    if not decision.promoted:
        failed = "; ".join(f"{r.requirement} (got {r.found})" for r in decision.reasons if not r.holds)
        raise PromotionRefused(f"{model}@{version} does not pass gate {gate.name}: {failed}; {alias} stays")
    if holder == version:
        print(f"{model}@{version} is {alias} already")
    elif dry_run:
        print(f"dry run: {model}@{version} would become {alias}")
    else:
        registry.promote(alias, version, holder, decision.model_dump(mode="json"), config.gate.reason)
        print(f"{model}@{version} is now {alias}" + (f" (was {model}@{holder})" if holder else ""))


def _contender(state: ModelState, model: str, version: int) -> Contender:
    return Contender(f"{model}@{version}", state.reports.get(version, []))


def _print_decision(decision: Decision) -> None:
    rows = [("yes" if reason.holds else "NO", reason.requirement, reason.found) for reason in decision.reasons]
    print(telemetry.table(rows, ("holds", "requirement", "found")))
