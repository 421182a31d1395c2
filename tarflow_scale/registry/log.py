"""The append-only log of a model: numbered JSON events, each with the digest of the event before it.

Event n is the file ``<registry>/<model>/_log/<n>.json``. A writer creates it only if it is absent, so exactly one of
several writers gets a number and the others retry with the next number. Events are never changed or deleted, so a
reader that knows the events up to n continues with n + 1.
"""

import getpass
import itertools
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from tarflow_scale import storage
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import Record

__all__ = ["Event", "EventLog", "Kind", "user"]

Kind = Literal[
    "register", "evaluate", "calibrate", "approve", "promote", "alias", "rollback", "retire", "collect"
]  # fmt: skip
_AT_ONCE = 200
"""Number of events that are fetched together when a whole log is read."""


class Event(Record):
    """One immutable entry of the log of a model."""

    number: int = Field(ge=1)
    kind: Kind
    id: str
    """Random; tells this event apart from an otherwise identical event by another writer."""
    time: str
    """UTC, ISO 8601."""
    actor: str
    """``user@host`` that wrote the event."""
    reason: str
    previous: str
    """SHA-256 of the previous event; empty for the first."""
    payload: dict[str, Any]
    checksum: str = ""
    """SHA-256 of the event with this field empty."""

    def sealed(self) -> "Event":
        """A copy of the event with its checksum filled in."""
        return self.model_copy(update={"checksum": storage.digest(self.to_json())})

    def is_intact(self, content: bytes) -> bool:
        """Whether the checksum of the event is correct for ``content``, the bytes of its file."""
        unsealed = content.replace(f'"checksum":"{self.checksum}"'.encode(), b'"checksum":""', 1)
        return storage.digest(unsealed) == self.checksum


class EventLog:
    """The log of one model.

    Args:
        path: folder or URL of the log.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def location(self, number: int) -> str:
        """Path or URL of event ``number``."""
        return storage.join(self.path, f"{number:012d}.json")

    def read(self, number: int) -> Event:
        """Read one event.

        Raises:
            UserError: the event does not exist or is damaged.
        """
        location = self.location(number)
        return Event.from_json(storage.read_bytes(location), location)

    def after(self, number: int, previous: str) -> Iterator[tuple[Event, str]]:
        """Yield ``(event, digest)`` for every event after ``number``; ``previous`` is the digest of event ``number``.

        Raises:
            RegistryError: an event is damaged, is missing although a later one exists, or does not contain the digest
                of the event before it.
        """
        first = number == 0
        ahead = self._listed() if first else iter(())
        while True:
            number += 1
            location = self.location(number)
            content = next(ahead, None) or storage.read_if_there(location)
            if content is None:
                later = self.names()[-1:] if first else []  # listing is slow for long logs
                gap = later > [location.rpartition("/")[2]] or storage.exists(self.location(number + 1))
                if gap and not storage.exists(location):
                    raise RegistryError(f"{location} is missing from the log; restore the log from a backup")
                return
            event = Event.from_json(content, location)
            if not event.is_intact(content):
                raise RegistryError(f"{location} is damaged (its checksum differs); restore the log from a backup")
            if event.number != number or event.previous != previous:
                raise RegistryError(
                    f"{location} does not follow the previous event of the log; restore the log from a backup"
                )
            previous = storage.digest(content)
            yield event, previous

    def names(self) -> list[str]:
        """File names of all events, in order."""
        return [name for name in storage.list_names(self.path) if name.endswith(".json") and not name.startswith(".")]

    def _listed(self) -> Iterator[bytes]:
        """Contents of the listed events, up to the first gap in their numbers."""
        expected = (self.location(number) for number in itertools.count(1))
        pairs = zip(self.names(), expected, strict=False)
        listed = [location for _, location in itertools.takewhile(lambda pair: pair[1].endswith(f"/{pair[0]}"), pairs)]
        for low in range(0, len(listed), _AT_ONCE):
            yield from storage.read_many(listed[low : low + _AT_ONCE])


def new_event(number: int, kind: Kind, identity: str, reason: str, previous: str, payload: dict[str, Any]) -> Event:
    """Create an event with the current user, the current time and the checksum."""
    return Event(
        number=number,
        kind=kind,
        id=identity,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        actor=f"{user()}@{socket.gethostname()}",
        reason=reason,
        previous=previous,
        payload=payload,
    ).sealed()


def user() -> str:
    """Name of the current user, or the user id if there is no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
