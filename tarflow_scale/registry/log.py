"""The append-only log of a model: numbered JSON events, each bound to the one before by its digest.

Event n is the object ``<registry>/<model>/_log/<n>.json``, claimed by create-if-absent, so of several writers
exactly one gets a number and the others look again. Events are never changed or deleted, so whoever knows the log up to
n reads on from n + 1 until there is none, whatever its length.
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
"""Events that are fetched together when much of a log is read."""


class Event(Record):
    """One fact about a model, for ever."""

    number: int = Field(ge=1)
    kind: Kind
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
    checksum: str = ""
    """SHA-256 of the event with this field empty; events of early registries have none."""

    def sealed(self) -> "Event":
        """The event with its checksum."""
        return self.model_copy(update={"checksum": storage.digest(self.to_json())})

    def is_intact(self, content: bytes) -> bool:
        """Whether ``content``, from which it was read, is what was sealed."""
        bare = content.replace(_sealed_as(self.checksum), _sealed_as(""), 1)
        return not self.checksum or storage.digest(bare) == self.checksum


class EventLog:
    """The log of one model.

    Args:
        path: folder or URL of the log.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def location(self, number: int) -> str:
        """Where event ``number`` is."""
        return storage.join(self.path, f"{number:012d}.json")

    def read(self, number: int) -> Event:
        """One event.

        Raises:
            UserError: there is none, or it is damaged.
        """
        location = self.location(number)
        return Event.from_json(storage.read_bytes(location), location)

    def after(self, number: int, previous: str) -> Iterator[tuple[Event, str]]:
        """Events that follow ``number``, whose digest is ``previous``, each with its own digest.

        Raises:
            RegistryError: one is missing although a later one is there, or is not what the next one says it was.
        """
        first = number == 0
        ahead = self._listed() if first else iter(())
        while True:
            number += 1
            location = self.location(number)
            content = next(ahead, None) or storage.read_if_there(location)
            if content is None:
                later = self.names()[-1:] if first else []  # elsewhere only the next is looked for, at a fixed cost
                gap = later > [location.rpartition("/")[2]] or storage.exists(self.location(number + 1))
                if gap and not storage.exists(location):
                    raise RegistryError(f"{location} is missing from the log; restore the log from a backup")
                return
            event = Event.from_json(content, location)
            if not event.is_intact(content):
                raise RegistryError(f"{location} is damaged (its checksum differs); restore the log from a backup")
            if event.number != number or event.previous != previous:
                raise RegistryError(f"{location} breaks the chain of the log; restore the log from a backup")
            previous = storage.digest(content)
            yield event, previous

    def names(self) -> list[str]:
        """File names of all events, in order."""
        return [name for name in storage.list_names(self.path) if name.endswith(".json") and not name.startswith(".")]

    def _listed(self) -> Iterator[bytes]:
        """Contents of the events that a listing shows, up to the first gap."""
        expected = (self.location(number) for number in itertools.count(1))
        pairs = zip(self.names(), expected, strict=False)
        whole = [location for _, location in itertools.takewhile(lambda pair: pair[1].endswith(f"/{pair[0]}"), pairs)]
        for low in range(0, len(whole), _AT_ONCE):
            yield from storage.read_many(whole[low : low + _AT_ONCE])


def new_event(number: int, kind: Kind, identity: str, reason: str, previous: str, payload: dict[str, Any]) -> Event:
    """An event of this user, now."""
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


def _sealed_as(checksum: str) -> bytes:
    return f'"checksum":"{checksum}"'.encode()


def user() -> str:
    """Name of the user, or its number in a container that has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
