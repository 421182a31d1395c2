"""Exceptions for failures that a user can fix; the command line prints one line without a traceback.

The line has the form ``rule (got value); what to do``. Any other exception is a bug and keeps its traceback.

Exit codes of the command line:

* 0: success.
* 1: ``doctor`` found a problem.
* 2: an expected failure; or the work succeeded, but its output could not be written (`tarflow_scale.runtime.streams`).
* 75 (EX_TEMPFAIL of sysexits.h): the work stopped on request and saved its state; the same command continues it.
* 130: interrupted from the keyboard.
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
    """Base class of expected failures; the command line prints the message and exits with `exit_code`."""

    exit_code: ClassVar[int] = 2


class ConfigError(UserError):
    """A key, type or value of a configuration is wrong."""


class DataError(UserError):
    """A data set is missing, incomplete, corrupt, or does not fit the configuration."""


class StorageError(UserError):
    """A path or URL cannot be read or written."""


class NotExclusive(StorageError):
    """The file system does not support create-if-absent, so two writers could both create the same file."""


class Interrupted(UserError):
    """The work stopped on request and saved its state; the same command continues it."""

    exit_code: ClassVar[int] = 75


class Unfit(UserError):
    """This machine or its cluster cannot do the work; ``doctor`` has printed the reasons."""

    exit_code: ClassVar[int] = 1


class NumericsError(UserError):
    """A computation produced values that are not finite or otherwise unusable."""


class RegistryError(UserError):
    """A model, version or alias does not exist, or a stored file does not match its digest."""


class AlreadyReported(RegistryError):
    """Another process has already stored values of the same protocols for this version."""


class PlanError(UserError):
    """An output folder belongs to another plan, or its content does not match its records."""


class PromotionRefused(UserError):
    """A version does not meet the requirements of the gate."""


def install_extra(extra: str) -> str:
    """The shell command that installs an extra of ``pyproject.toml``.

    In a checkout, the command installs from the checkout, so the package need not be on a package index.
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install 'tarflow-scale[{extra}]'"


def needs_package(setting: str, package: str, extra: str) -> str:
    """The error message if ``setting``, such as ``format=parquet``, needs a package that is not installed."""
    return f"{setting} needs the package {package} (it is not installed); run: {install_extra(extra)}"
