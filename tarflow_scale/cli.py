"""Command line: argv to verb and configuration. Verbs are imported when called; ``--help`` needs neither torch nor ray.

An expected failure is one line on standard error and the exit code that `tarflow_scale.errors` lists; a bug keeps its
traceback. Launchers of ranks have exit codes of their own, so each process also appends its code to the file that
``TARFLOW_SCALE_EXIT_CODES`` names, if it is set.
"""

import argparse
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow_scale import __version__
from tarflow_scale.config import convert, doctor, evaluate, generate, models, prepare, promote, report, score, train
from tarflow_scale.config.base import Root, absent_here, working_folder
from tarflow_scale.config.manual import keys_of
from tarflow_scale.errors import ConfigError, DataError, Interrupted, StorageError, UserError
from tarflow_scale.runtime import distributed, streams
from tarflow_scale.runtime.console import printable
from tarflow_scale.runtime.interrupts import INTERRUPTED, INTERRUPTED_CODE, raise_exceptions

__all__ = ["main"]


@dataclass(frozen=True)
class _Verb:
    """A verb: where it is, what it reads, and what its manual says."""

    module: str
    function: str
    config: type[Root]
    summary: str
    example: str

    @property
    def file(self) -> str:
        """The configuration of the example."""
        return next(word for word in self.example.split() if word.startswith("configs/"))


_OF_MODELS = {
    "init": ("models", "init", "make a registry, and see whether its store gives one winner of many writers",
        "registry.path=s3://bucket/registry"),
    "list": ("models", "list_models", "list all versions of all models of a registry", ""),
    "show": ("models", "show", "show where a version came from, its numbers and its history", "registry.version=2"),
    "diff": ("models", "diff", "compare settings and numbers of two versions",
        "registry.version=latest command.other=champion"),
    "verify": ("models", "verify", "check every event and every file of a registry against its digest", ""),
    "alias": ("models", "alias", "point an alias that no gate guards to a version", "command.alias=candidate"),
    "approve": ("models", "approve", "say that a version may be promoted, for gates that ask for it",
        "registry.version=3"),
    "rollback": ("models", "rollback", "point an alias back to the version before", "registry.version=champion"),
    "retire": ("models", "retire", "take a version out of use", "registry.version=1 command.reason=leak"),
    "collect": ("models", "collect", "list what no version needs any more, or remove it",
        "command.grace_days=30 command.delete=true"),
    "export": ("exchange", "export_version",
        "write a version as a folder in the Hugging Face layout, with a model card",
        "command.path=exported command.licence=apache-2.0"),
    "import": ("exchange", "import_version", "register a version from a folder that export wrote",
        "registry.model=copy command.path=exported"),
}  # fmt: skip
"""Commands of ``models``: module, function, summary, overrides of the example."""

_VERBS = {
    "prepare": _Verb(
        "prepare", "run", prepare.PrepareConfig,
        "pack images into WebDataset shards",
        "tarflow-scale prepare configs/prepare/digits.yaml shards.path=data/digits",
    ),
    "train": _Verb(
        "train", "run", train.TrainConfig,
        "train a flow on shards under DeepSpeed and register it",
        "launch/torchrun.sh 2 configs/train/digits.yaml optimizer.peak_lr=1e-3",
    ),
    "evaluate": _Verb(
        "evaluate", "run", evaluate.EvaluateConfig,
        "measure a registered version by protocols, on Ray",
        "tarflow-scale evaluate configs/evaluate/digits.yaml registry.version=3 cluster.num_workers=4",
    ),
    "promote": _Verb(
        "promote", "run", promote.PromoteConfig,
        "let a gate decide whether a version takes an alias",
        "tarflow-scale promote configs/promote/digits.yaml 'gate.reason=longer training'",
    ),
    "generate": _Verb(
        "generate", "run", generate.GenerateConfig,
        "write shards of new images from a registered version, on Ray",
        "tarflow-scale generate configs/generate/digits.yaml sampling.num_images=50000 shards.path=runs/samples",
    ),
    "score": _Verb(
        "score", "run", score.ScoreConfig,
        "score how anomalous images are, on Ray",
        "tarflow-scale score configs/score/digits.yaml scoring.labels=marginal",
    ),
    "report": _Verb(
        "report", "run", report.ReportConfig,
        "write leaderboards of what registries hold, as Markdown and as a page",
        "tarflow-scale report configs/report/digits.yaml",
    ),
    "convert": _Verb(
        "convert", "run", convert.ConvertConfig,
        "turn weights of apple/ml-tarflow into a flow of ours",
        "tarflow-scale convert configs/convert/afhq256.yaml output.path=flows/afhq256",
    ),
    "doctor": _Verb(
        "doctor", "run", doctor.DoctorConfig,
        "see whether this machine, and its cluster, can do the work; exit code 1 says that it cannot",
        "tarflow-scale doctor configs/train/digits.yaml store.path=s3://bucket/folder cluster.address=10.0.0.1:6379",
    ),
} | {
    f"models {name}": _Verb(
        module, function, models.ModelsConfig, summary,
        f"tarflow-scale models {name} configs/models/digits.yaml {overrides}".rstrip(),
    )
    for name, (module, function, summary, overrides) in _OF_MODELS.items()
}  # fmt: skip


_PACKAGE = Path(__file__).parent

_MODES = {"calibrate": "calibrate", "reference": "bind", "watch": "watch"}
"""Functions of a verb that a flag asks for."""


_PLAN_FLAGS = {
    "--gpus": "GPUs in all",
    "--gpu": "their kind: h200, h100, a100, b200, ...",
    "--gpus-per-node": "GPUs of a machine (8)",
    "--network": "GB/s of each GPU to other machines, one direction (the maker's own machine)",
    "--mfu": "model FLOPs utilisation of one GPU, 0 to 1",
    "--price": "$ of a GPU and hour",
    "--curve": "PNG to write: speed on 1 to 1,024 GPUs",
    "--image-size": "side of the images in pixels, where there is no data set yet",
    "--channels": "their channels (3)",
    "--classes": "their classes; 0 for none",
}
"""Flags of ``train --plan``; `tarflow_scale.verbs.plan.Question` reads them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    warnings.formatwarning = _warning_line
    try:
        arguments = _parsed(argv)
    except SystemExit as end:  # argparse has printed the manual, or what is wrong with a flag
        raise SystemExit(streams.exit_code(int(end.code or 0))) from None
    code = streams.exit_code(_run(arguments))
    if path := os.environ.get("TARFLOW_SCALE_EXIT_CODES"):
        with Path(path).open("a", encoding="utf-8") as codes:
            codes.write(f"{code}\n")
    return code


_format_warning = warnings.formatwarning


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings as one line, like errors; those of others as Python has them."""
    if category is UserWarning and _PACKAGE in Path(filename).parents:
        return f"tarflow-scale: warning: {printable(str(message))}\n"
    return _format_warning(message, category, filename, lineno, line)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags and overrides in any order, where argparse takes positional arguments from one place alone."""
    parser = _parser()
    arguments, late = parser.parse_known_args(argv)
    if wrong := [word for word in late if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    arguments.config += late
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    verb, config = _VERBS[arguments.verb], None
    try:
        if _look(arguments):
            return 0
        path, overrides = _split_arguments(arguments.config)
        if getattr(arguments, "override", None) is not None:
            overrides.append(f"gate.override={json.dumps(arguments.override)}")
        config = verb.config.load(path, overrides, verb.file)
        if _plan(arguments, config):
            return 0
        if verb.module == "train" and distributed.is_main():
            print("importing PyTorch")  # seconds, in which nothing else would show that anything happens
        module = _module(verb.module)
        function = next(
            (function for flag, function in _MODES.items() if getattr(arguments, flag, False)), verb.function
        )
        getattr(module, function)(config, arguments.dry_run)
    except UserError as error:
        message = printable(str(error) + _relative(str(error), config))
        if distributed.is_main():
            prefix = "tarflow-scale" if isinstance(error, Interrupted) else "tarflow-scale: error"
            print(f"{prefix}: {message}", file=sys.stderr)
        elif isinstance(error, DataError | StorageError):  # what one rank alone may meet
            print(f"tarflow-scale: error on rank {distributed.rank()}: {message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return INTERRUPTED_CODE
    return 0


def _module(name: str) -> Any:
    """What does the work; an interrupt raises an exception from here on, because there may be something to undo."""
    module = importlib.import_module(f"tarflow_scale.{name}")
    raise_exceptions()
    return module


def _relative(message: str, config: Root | None) -> str:
    """Says which folder a path of the configuration starts from, where a message names one that is not there."""
    if config is None or "relative to" in message:
        return ""
    for path in _paths(config.model_dump()):
        named = re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", message)
        if named and not path.startswith(("/", "~")) and not _is_there(path):
            return f"; {path} is relative to {working_folder()}"
    return ""


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # an override that is longer than a name may be
        return False


def _paths(value: Any) -> Iterator[str]:
    """Values of a configuration that can only be local paths: names of models and protocols have no slash."""
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _paths(one)
    elif isinstance(value, str) and "/" in value and "://" not in value:
        yield value


def _look(arguments: argparse.Namespace) -> bool:
    """Look at a packed data set, if ``prepare`` was asked to."""
    for flag, function in (("check", "check"), ("stats", "statistics"), ("npz", "export")):
        paths = getattr(arguments, flag, None)
        if paths is not None:
            if arguments.config:
                raise ConfigError(f"--{flag} takes no configuration (got {arguments.config[0]} too); remove it")
            getattr(_module("prepare"), function)(*paths)
            return True
    return False


def _plan(arguments: argparse.Namespace, config: Root) -> bool:
    """Plan GPUs for a recipe, if ``train`` was asked to."""
    given = {flag: value for flag in _PLAN_FLAGS if (value := getattr(arguments, flag[2:].replace("-", "_"), None))}
    if not getattr(arguments, "plan", False):
        if given:
            raise ConfigError(f"{next(iter(given))} goes with --plan (got it alone); add --plan")
        return False
    _module("planning").run(config, given)
    return True


_OVERRIDE = re.compile(r"[^\s/=]+=", re.ASCII)
"""How an override begins; the path of a file may have ``=`` in it too, as folders of sweeps do."""


def _split_arguments(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The YAML file, if there is one, and the overrides."""
    files = [word for word in arguments if not _OVERRIDE.match(word) or _is_there(word)]
    if len(files) > 1:
        got = " and ".join(files)
        raise ConfigError(f"a verb reads one file (got {got}); an override is section.key=value, as training.seed=1")
    return Path(files[0]) if files else None, [word for word in arguments if word not in files]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tarflow-scale",
        description="Train, evaluate, promote and sample image normalizing flows at scale.",
        epilog="Every verb reads one YAML file and section.key=value overrides; 'VERB --help' is its manual.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    groups: dict[str, Any] = {}
    for name, verb in _VERBS.items():
        parent, _, leaf = name.rpartition(" ")
        if parent and parent not in groups:
            group = verbs.add_parser(parent, help="look at a registry, and change what it says of versions")
            groups[parent] = group.add_subparsers(metavar="COMMAND", required=True)
        added = (groups[parent] if parent else verbs).add_parser(
            leaf,
            help=verb.summary,
            description=_plain(f"{verb.summary[0].upper()}{verb.summary[1:]}. {(verb.config.__doc__ or '').strip()}"),
            epilog=_manual(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("config", nargs="*", metavar="CONFIG.yaml section.key=value", help="file, then overrides")
        if name == "prepare":
            looks = added.add_mutually_exclusive_group()
            looks.add_argument("--check", nargs=1, metavar="DIR", help="verify every byte of a packed data set instead")
            looks.add_argument("--stats", nargs=1, metavar="DIR", help="print what is in a packed data set instead")
            npz = "write a packed data set as the npz that ADM's evaluator takes instead"
            looks.add_argument("--npz", nargs=2, metavar=("DIR", "FILE"), help=npz)
        if name == "train":
            plan = "print what the recipe needs of GPUs: memory, speed, traffic, cost; needs no GPU and no data set"
            added.add_argument("--plan", action="store_true", help=plan)
            for flag, meaning in _PLAN_FLAGS.items():
                added.add_argument(flag, metavar=flag[2:].replace("-", "_").upper(), help=f"of --plan: {meaning}")
        if name == "generate":
            calibrate = "measure how this device decodes the version fastest, and store that with it, instead"
            added.add_argument("--calibrate", action="store_true", help=calibrate)
        if name == "promote":
            override = "promote although the gate says no; decision and reason are recorded"
            added.add_argument("--override", metavar="REASON", help=override)
        if name == "evaluate":
            reference = "compute what the protocols are compared with, and bind them to it, instead; needs no model"
            modes = added.add_mutually_exclusive_group()
            modes.add_argument("--reference", action="store_true", help=reference)
            watch = "score every version of the model as it is registered, until interrupted"
            modes.add_argument("--watch", action="store_true", help=watch)
        added.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
        added.set_defaults(verb=name)
    return parser


def _manual(verb: _Verb) -> str:
    """Example and every key with its default and meaning."""
    lines = ["example:", f"  {verb.example}", ""]
    if absent := absent_here(verb.example):
        lines += [f"  {absent}", ""]
    lines += ["keys (default) and what they mean:", *keys_of(verb.config)]
    return _plain("\n".join(lines)).replace("%", "%%")


def _plain(text: str) -> str:
    """The text of a docstring, without the second of two backquotes."""
    return text.replace("``", "`")
