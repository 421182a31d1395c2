"""Command line: parse the arguments, import the verb and run it. ``--help`` imports neither torch nor ray.

An expected failure prints one line on standard error and exits with a code listed in `tarflow_scale.errors`; a bug
keeps its traceback. A launcher such as torchrun does not pass on the exit codes of its ranks. So if the
environment variable ``TARFLOW_SCALE_EXIT_CODES`` contains a path, each process also appends its code to that file.
"""

import argparse
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tarflow_scale import __version__
from tarflow_scale.config import (
    convert,
    doctor,
    encode,
    evaluate,
    generate,
    models,
    plan,
    prepare,
    promote,
    report,
    score,
    train,
)
from tarflow_scale.config.base import absent_here, is_there, where_paths_start
from tarflow_scale.config.manual import keys_of
from tarflow_scale.config.verb import Flag, Verb
from tarflow_scale.errors import ConfigError, DataError, Interrupted, StorageError, UserError
from tarflow_scale.runtime import distributed, streams
from tarflow_scale.runtime.console import printable
from tarflow_scale.runtime.interrupts import INTERRUPTED, INTERRUPTED_CODE, raise_exceptions

__all__ = ["main"]

_VERBS = {
    "prepare": prepare.VERB,
    "plan": plan.VERB,
    "train": train.VERB,
    "encode": encode.VERB,
    "evaluate": evaluate.VERB,
    "promote": promote.VERB,
    "generate": generate.VERB,
    "score": score.VERB,
    "report": report.VERB,
    "convert": convert.VERB,
    "doctor": doctor.VERB,
    **{f"models {name}": verb for name, verb in models.VERBS.items()},
}
_PACKAGE = Path(__file__).parent
_OVERRIDE = re.compile(r"[^\s/=]+=", re.ASCII)
"""Start of an override, ``key=``. The path of an existing file is not an override, even if it matches."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    warnings.formatwarning = _warning_line
    try:
        arguments = _parsed(argv)
    except SystemExit as end:  # argparse has printed the manual or an error
        raise SystemExit(streams.exit_code(int(end.code or 0))) from None
    code = streams.exit_code(_run(_VERBS[arguments.verb], arguments))
    if path := os.environ.get("TARFLOW_SCALE_EXIT_CODES"):
        with Path(path).open("a", encoding="utf-8") as codes:
            codes.write(f"{code}\n")
    return code


_format_warning = warnings.formatwarning


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning of this package as one line, like an error, and other warnings in Python's format."""
    if category is UserWarning and _PACKAGE in Path(filename).parents:
        return f"tarflow-scale: warning: {printable(str(message))}\n"
    return _format_warning(message, category, filename, lineno, line)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse flags and overrides in any order; argparse alone requires all positional arguments in one place."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    arguments.config += rest
    return arguments


def _run(verb: Verb, arguments: argparse.Namespace) -> int:
    config = None
    given = [(flag, value) for flag in verb.flags if (value := getattr(arguments, _attribute(flag)))]
    try:
        function = next((flag.function for flag, _ in given if flag.function), verb.function)
        for flag, values in given:
            if flag.function and flag.values:
                if arguments.config:
                    raise ConfigError(
                        f"--{flag.name} must be used without a configuration (got {arguments.config[0]}); remove the "
                        f"configuration"
                    )
                getattr(_module(verb), function)(*values)
                return 0
        path, overrides = _split_arguments(arguments.config)
        overrides += [f"{flag.key}={json.dumps(values[0])}" for flag, values in given if flag.key]
        config = verb.load(path, overrides)
        if verb.imports and distributed.is_main():
            print(f"importing {verb.imports}")  # nothing else is printed during these seconds
        getattr(_module(verb), function)(config, arguments.dry_run)
    except UserError as error:
        message = printable(str(error) + where_paths_start(str(error), config))
        if distributed.is_main():
            prefix = "tarflow-scale" if isinstance(error, Interrupted) else "tarflow-scale: error"
            print(f"{prefix}: {message}", file=sys.stderr)
        elif isinstance(error, DataError | StorageError):  # rank 0 may not have met this error
            print(f"tarflow-scale: error on rank {distributed.rank()}: {message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return INTERRUPTED_CODE
    return 0


def _attribute(flag: Flag) -> str:
    return f"flag_{flag.name}"


def _module(verb: Verb) -> Any:
    """Import the module of a verb; from then on, Ctrl-C raises KeyboardInterrupt, so that the verb can clean up."""
    module = importlib.import_module(f"tarflow_scale.{verb.module}")
    raise_exceptions()
    return module


def _split_arguments(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Split arguments into the path of the YAML file (None if there is none) and the overrides."""
    files = [word for word in arguments if not _OVERRIDE.match(word) or is_there(word)]
    if len(files) > 1:
        got = " and ".join(files)
        raise ConfigError(
            f"a verb must get one configuration file (got {got}); keep one of them, and write overrides as "
            f"section.key=value, such as training.seed=1"
        )
    return Path(files[0]) if files else None, [word for word in arguments if word not in files]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tarflow-scale",
        description="Train, evaluate, promote and sample image normalizing flows at scale.",
        epilog="Every verb reads one YAML file and section.key=value overrides; 'VERB --help' prints its manual.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    groups: dict[str, Any] = {}
    for name, verb in _VERBS.items():
        parent, _, leaf = name.rpartition(" ")
        if parent and parent not in groups:
            examples = [verb.example for name, verb in _VERBS.items() if name.startswith(f"{parent} ")]
            group = verbs.add_parser(
                parent,
                help="inspect and change a registry of models",
                description=models.__doc__,
                epilog="\n  ".join(["examples:", *examples]),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            groups[parent] = group.add_subparsers(metavar="COMMAND", required=True)
        added = (groups[parent] if parent else verbs).add_parser(
            leaf,
            help=verb.summary,
            description=_plain(f"{verb.summary[0].upper()}{verb.summary[1:]}. {(verb.config.__doc__ or '').strip()}"),
            epilog=_manual(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("config", nargs="*", metavar="CONFIG.yaml section.key=value", help="one file, and overrides")
        exclusive = added.add_mutually_exclusive_group() if any(flag.function for flag in verb.flags) else added
        for flag in verb.flags:
            values: dict[str, Any] = {"nargs": len(flag.values), "metavar": flag.values}
            kind: dict[str, Any] = values if flag.values else {"action": "store_true"}
            place = exclusive if flag.function else added
            place.add_argument(f"--{flag.name}", help=_plain(flag.help), dest=_attribute(flag), **kind)
        added.add_argument("--dry-run", action="store_true", help="print what would be done, without doing it")
        added.set_defaults(verb=name)
    return parser


def _manual(verb: Verb) -> str:
    """The text below the flags in ``--help``: an example, and every key with its default and meaning."""
    lines = ["example:", f"  {verb.example}", ""]
    if advice := absent_here(verb.example):
        lines += [f"  {advice}", ""]
    lines += ["keys (default) and what they mean:", *keys_of(verb.config)]
    return _plain("\n".join(lines)).replace("%", "%%")


def _plain(text: str) -> str:
    """Replace the double backquotes of a docstring by single ones."""
    return text.replace("``", "`")
