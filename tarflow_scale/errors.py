"""Failures that a user can cause and mend: one line, exit code 2, no traceback.

The line reads ``rule (got value); what to do``. Anything else that goes wrong is a bug and keeps its traceback.

Exit codes of the command line: 0, done. 1, ``doctor`` found what would stop the work. 2, an expected failure, or work
that is done and could not print what it found (`tarflow_scale.runtime.streams`). 75 (EX_TEMPFAIL of sysexits.h), work
that was asked to stop, saved what it had, and goes on when it is run again. 130, interrupted from the keyboard.
"""

from pathlib import Path
from typing import ClassVar

__all__ = [
    "AlreadyReported",
    "ConfigError",
    "DataError",
    "Interrupted",
    "NotExclusive",
    "NumericsError",
    "PlanError",
    "PromotionRefused",
    "RegistryError",
    "StorageError",
    "Unfit",
    "UserError",
    "install_extra",
    "needs_package",
]


class UserError(Exception):
    """Base class of expected failures; the command line prints the message and exits with ``exit_code``."""

    exit_code: ClassVar[int] = 2


class ConfigError(UserError):
    """A key, type or value of a configuration is wrong."""


class DataError(UserError):
    """A data set is missing, half-written, corrupt or unsuited to the configuration."""


class StorageError(UserError):
    """A path or URL cannot be read or written."""


class NotExclusive(StorageError):
    """A file system has no way to create a file that only one of several writers gets."""


class Interrupted(UserError):
    """The work was asked to stop, saved what it had, and goes on when it is run again."""

    exit_code: ClassVar[int] = 75


class Unfit(UserError):
    """This machine, or its cluster, cannot do the work; ``doctor`` has said why."""

    exit_code: ClassVar[int] = 1


class NumericsError(UserError):
    """A model produced values that are not finite."""


class RegistryError(UserError):
    """A model, version or alias does not exist, or what is stored does not match its digest."""


class AlreadyReported(RegistryError):
    """Another evaluation of the same version by the same protocols was faster."""


class PlanError(UserError):
    """An output folder belongs to another plan, or does not hold what its records say."""


class PromotionRefused(UserError):
    """The gate's decision was no."""


def install_extra(extra: str) -> str:
    """The command that installs the packages of an extra of ``pyproject.toml``.

    From a checkout, which an editable install points to, it names the folder of the checkout: no package index needs to
    know this package. Elsewhere pip completes the installed package.
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install 'tarflow-scale[{extra}]'"


def needs_package(what: str, package: str, extra: str) -> str:
    """The error message where ``what`` (a setting, with its value) needs a package that is not installed."""
    return f"{what} needs {package} (got none installed); run: {install_extra(extra)}"
