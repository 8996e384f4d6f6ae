"""A journal that survives a kill: one JSON object a line, each on disk before the next step begins."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RebirthError

Event = dict[str, Any]


class Journal:
    """What has happened in a directory, in order.

    A last line that a kill cut short never happened and is removed; any other damage is an error.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """``read_only`` is for onlookers: another process may be in the middle of its last line."""
        self.path = path
        self.events: list[Event] = []
        if not path.exists():
            return
        whole = 0
        data = path.read_bytes()
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict) or "event" not in event:
                raise RebirthError(
                    f"{path}:{number}: damaged; remove {path.parent} to train again from the start"
                )
            self.events.append(event)
            whole += len(line) + 1
        if whole < len(data) and not read_only:
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())

    def add(self, event: str, **details: Any) -> Event:
        """Append an event and wait until it is on disk."""
        entry = {"event": event, **details}
        new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(self.path)
        self.events.append(entry)
        return entry

    def find(self, event: str, **details: Any) -> Event | None:
        """The last event of this kind with these details."""
        return next(iter(self.all(event, **details)[::-1]), None)

    def all(self, event: str, **details: Any) -> list[Event]:
        """Every event of this kind with these details."""
        return [
            e
            for e in self.events
            if e["event"] == event and all(e.get(key) == value for key, value in details.items())
        ]


@contextmanager
def sole_user(folder: Path, patience: float = 2.0) -> Iterator[int]:
    """Hold a directory for this process; gives the lock's file descriptor.

    The lock goes with the process, however it ends, and with those that inherited the descriptor: a killed
    run's child may need a moment to die, hence the ``patience`` in seconds. Raises RebirthError where another
    process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise RebirthError(
                        f"{folder}: another process is at work here; wait for it or stop it"
                    ) from None
                time.sleep(0.05)
        yield file.fileno()


def sync(*paths: Path) -> None:
    """Wait until files and the directories they are in are on disk."""
    for path in (*paths, *{path.parent for path in paths}):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
