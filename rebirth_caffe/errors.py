"""The one exception family. Every message is one line: where it is, what is wrong, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_LENGTH = 1000  # of a message: names in files may be megabytes long


class RebirthError(Exception):
    """Something a person can mend. The command line prints ``error: <message>`` and exits with 2."""

    def __str__(self) -> str:
        """The message; control characters in a name of the user's are escaped, to keep it one line."""
        text = super().__str__()
        if len(text) > MAX_LENGTH:
            text = f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
        return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match.group())[1:-1], text)


class PrototxtError(RebirthError):
    """A prototxt that cannot be read; the message starts with ``file:line:``."""


class WeightsError(RebirthError):
    """A caffemodel that cannot be read or does not fit its net."""


class NetError(RebirthError):
    """A net whose layers do not fit together; the message names file:line or the layer."""


class PlanError(RebirthError):
    """A plan that is not well formed or does not fit the net it is applied to."""


class EngineError(RebirthError):
    """A runtime that is missing or refused a net; the message ends with what the runtime said."""


def by_x(shape: Iterable[int]) -> str:
    """A shape as messages have it: ``3x32x32``."""
    return "x".join(map(str, shape)) or "scalar"
