"""The append-only log of a model: numbered JSON events, each bound to the one before by its digest.

Event n is the object ``<registry>/<model>/_log/<n>.json``, claimed by create-if-absent, so of several writers
exactly one gets a number and the others look again. A writer that is told "exists" reads the event back: if it
carries the writer's own random id, an earlier attempt had succeeded after all.
"""

import getpass
import os
import socket
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from tarflow_scale import storage
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import Record

__all__ = ["Event", "EventLog"]

_ATTEMPTS = 100


class Event(Record):
    """One fact about a model, for ever."""

    number: int = Field(ge=1)
    kind: Literal["register", "evaluate", "calibrate", "promote", "rollback"]
    id: str
    """Random; tells a writer its own event."""
    time: str
    """UTC, ISO 8601."""
    actor: str
    """Who, as user@host."""
    reason: str
    previous: str
    """SHA-256 of the event before; empty for the first."""
    payload: dict[str, Any]


class EventLog:
    """The log of one model.

    Args:
        path: folder or URL of the log.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self) -> list[Event]:
        """All events in order; the chain of digests is verified.

        Raises:
            RegistryError: a number is missing, or an event is not what the next one says it was.
        """
        events: list[Event] = []
        previous = ""
        for name in storage.list_names(self._path):
            if name.startswith(".") or not name.endswith(".json"):
                continue
            location = storage.join(self._path, name)
            content = storage.read_bytes(location)
            event = Event.from_json(content, location)
            if name != _name(len(events) + 1) or event.number != len(events) + 1 or event.previous != previous:
                raise RegistryError(f"{location} breaks the chain of the log; restore the log from a backup")
            previous = storage.digest(content)
            events.append(event)
        return events

    def append(self, kind: str, reason: str, decide: Callable[[list[Event]], dict[str, Any]]) -> Event:
        """Append an event.

        Args:
            kind: what happened.
            reason: why.
            decide: from the log as it is, the payload; called again whenever another writer was faster, and free
                to raise if the event no longer makes sense.
        """
        identity = uuid.uuid4().hex
        actor = f"{_user()}@{socket.gethostname()}"
        for _ in range(_ATTEMPTS):
            events = self.read()
            event = Event.model_validate(
                {
                    "number": len(events) + 1,
                    "kind": kind,
                    "id": identity,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "actor": actor,
                    "reason": reason,
                    "previous": storage.digest(events[-1].to_json()) if events else "",
                    "payload": decide(events),
                }
            )
            location = storage.join(self._path, _name(event.number))
            if storage.create(location, event.to_json()):
                return event
            if Event.from_json(storage.read_bytes(location), location).id == identity:
                return event
        raise RegistryError(f"{self._path} is written by too many at once ({_ATTEMPTS} attempts lost); try again")


def _user() -> str:
    """Name of the user, or its number in a container that has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _name(number: int) -> str:
    return f"{number:012d}.json"
