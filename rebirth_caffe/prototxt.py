"""Prototxt text <-> tree <-> protobuf message, losing nothing.

``parse`` gives a tree whose fields know their place in the text, so that a net can be written back byte
for byte around the layers that changed. ``to_message`` reads a tree into a protobuf message and returns
what the schema does not know (fork fields) instead of dropping it. ``render`` writes a tree in one plain
layout.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from .errors import PrototxtError

MAX_DEPTH = 100  # protobuf's own limit for nested messages
MAX_BYTES = 2**24  # of a file; a net of 10,000 layers has 3 million
MAX_FIELDS = 1_000_000  # they take half a gigabyte of memory; a net of 10,000 layers has 200,000

# No group is repeated here: the regular expression engine remembers every repetition of one.
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n\f\v]+)
      | (?P<comment>\#[^\n]*)
      | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
      | (?P<number>(?:0[xX][0-9a-fA-F]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)[fF]?
                   (?![A-Za-z0-9_.]))
      | (?P<string>"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*"|'[^'\\\n]*(?:\\[^\n][^'\\\n]*)*')
      | (?P<punct>[{}<>\[\]:;,-])""",
    re.VERBOSE,
)
_BLANK = ("space", "comment")
_REST_OF_LINE = re.compile(r"[ \t\r\f\v]*(?:#[^\n]*)?(?:\n|\Z)")
_CLOSING = {"{": "}", "<": ">"}
_WHY = "a brace or quote too many or too few, or not a prototxt"


@dataclass(eq=False, slots=True)
class Field:
    """One ``name: value`` or ``name { ... }``; a ``[a, b]`` list is read as one Field an element.

    ``value`` is the scalar's text exactly as written, or a Message. ``start``/``end`` span the whole field
    in the source text and ``value_start``/``value_end`` its value; all are -1 in a field made by an edit.
    """

    name: str
    value: str | Message
    line: int = 0
    start: int = -1
    end: int = -1
    value_start: int = -1
    value_end: int = -1
    one_line: bool = False


@dataclass(eq=False, slots=True)
class Message:
    """An ordered list of fields: what stands between two braces, or a whole file."""

    fields: list[Field] = field(default_factory=list)

    def all(self, name: str) -> list[Field]:
        """The fields called ``name``, in order."""
        return [f for f in self.fields if f.name == name]

    def message(self, name: str) -> Message | None:
        """The last sub-message called ``name``, as protobuf reads a field given twice."""
        found = [f.value for f in self.fields if f.name == name and isinstance(f.value, Message)]
        return found[-1] if found else None

    def copy(self) -> Message:
        """A deep copy whose fields have forgotten their place in the text."""
        return Message(
            [
                Field(
                    f.name,
                    f.value.copy() if isinstance(f.value, Message) else f.value,
                    line=f.line,
                    one_line=f.one_line,
                )
                for f in self.fields
            ]
        )

    def set(self, name: str, *values: str | Message, drop: tuple[str, ...] = ()) -> None:
        """Put ``values`` where the first field called ``name`` (or one in ``drop``) stood; drop the rest."""
        gone = {name, *drop}
        at = next((i for i, f in enumerate(self.fields) if f.name in gone), len(self.fields))
        kept_before = [f for f in self.fields[:at] if f.name not in gone]
        kept_after = [f for f in self.fields[at:] if f.name not in gone]
        self.fields[:] = [*kept_before, *(Field(name, v) for v in values), *kept_after]

    def walk(self) -> Iterator[Field]:
        """Every field below this message, outer before inner."""
        for f in self.fields:
            yield f
            if isinstance(f.value, Message):
                yield from f.value.walk()


def read_text(path: Path, what: str = "prototxt") -> str:
    """A file's text; bytes that are not UTF-8 survive a later ``write`` unchanged (surrogateescape)."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise PrototxtError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise PrototxtError(f"{path}: is a directory; give the {what} file in it") from None
    except OSError as error:
        raise PrototxtError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    if len(data) > MAX_BYTES:
        size = f"larger than {MAX_BYTES >> 20} MB"
        raise PrototxtError(f"{path}: {size}; not a {what}, or one with its weights as text")
    if b"\0" in data:
        raise PrototxtError(
            f"{path}:{data[: data.index(0)].count(10) + 1}: binary data, not a {what}; "
            "weights go to --weights or behind the net"
        )
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """The bytes of ``text`` as ``read_text`` found them."""
    return text.encode("utf-8", "surrogateescape")


def parse(text: str, path: Path | str = "<text>") -> Message:
    """Parse text format into a tree. Raises PrototxtError with ``file:line``."""
    return _Parser(text, str(path)).parse()


class _Parser:
    """Recursive descent over the tokens of one file, which are never all in memory."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self.count = 0  # of fields
        self.counted = (0, 1)  # a place in the text, and its line
        self.ahead = 0  # where the token after the current one is searched
        self.advance()

    def advance(self) -> None:
        """Go on to the next token: its kind, its text, where it starts."""
        while self.ahead < len(self.text):
            at = self.ahead
            match = _TOKEN.match(self.text, at)
            if match is None:
                raise self.error(at, self._bad_token(at))
            self.ahead = match.end()
            if match.lastgroup not in _BLANK:
                self.token = (str(match.lastgroup), match.group(), at)
                return
        self.token = ("end", "", len(self.text))

    def error(self, at: int, message: str) -> PrototxtError:
        line = self.text.count("\n", 0, at) + 1
        return PrototxtError(f"{self.path}:{line}: {message}")

    def line(self, at: int) -> int:
        """The line of a place that is not before the last one asked for."""
        place, line = self.counted
        self.counted = (at, line + self.text.count("\n", place, at))
        return self.counted[1]

    def _bad_token(self, at: int) -> str:
        if self.text[at] in "\"'":
            return "a string without its closing quote; close it on the same line"
        if self.text[at] in "0123456789.":
            word = re.match(r"[\w.]*", self.text[at : at + 40])
            return f"'{word.group() if word else ''}' is not a number; correct it"
        shown = self.text[at : at + 1].encode("ascii", "backslashreplace").decode()
        return f"'{shown}' cannot stand here; not a prototxt, or a template with placeholders left in it"

    def parse(self) -> Message:
        message = Message()
        self._fields(message, "", 0)
        return message

    def _fields(self, message: Message, closing: str, depth: int) -> None:
        """Read fields into ``message`` up to ``closing`` (not consumed)."""
        while True:
            kind, word, at = self.token
            if word == closing and (kind == "punct" or not closing):
                return
            if kind == "end":
                raise self.error(
                    at,
                    f"the file ends inside a message; '{closing}' is missing, add it or copy the file again",
                )
            if kind != "word":
                raise self.error(at, f"expected a field name, found {_shown(word)}; {_WHY}")
            self.advance()
            self._field(message, word, at, depth)
            if self.token[1] in (",", ";") and self.token[0] == "punct":
                self.advance()

    def _field(self, message: Message, name: str, at: int, depth: int) -> None:
        colon = self._accept(":")
        kind, word, value_at = self.token
        if kind == "punct" and word in "{<":
            self._message(message, name, at, depth)
        elif kind == "punct" and word == "[" and colon:
            self.advance()
            while not self._accept("]"):
                kind, word, value_at = self.token
                if kind == "punct" and word in "{<":
                    self._message(message, name, value_at, depth)
                else:
                    self._scalar(message, name, value_at)
                if self.token[1] != "]" and not self._accept(","):
                    raise self.error(self.token[2], "expected ',' or ']' in a list; add it")
        elif colon:
            self._scalar(message, name, at)
        else:
            raise self.error(value_at, f"expected ':' or '{{' after '{name}', found {_shown(word)}; {_WHY}")

    def _accept(self, punct: str) -> bool:
        kind, word, _ = self.token
        if kind == "punct" and word == punct:
            self.advance()
            return True
        return False

    def _message(self, message: Message, name: str, at: int, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise self.error(at, f"messages nested more than {MAX_DEPTH} deep; not a net")
        _, opening, value_at = self.token
        inner = Message()
        made = self._add(message, name, inner, at, value_at)
        self.advance()
        self._fields(inner, _CLOSING[opening], depth + 1)
        made.end = made.value_end = self.token[2] + 1
        made.one_line = self.text.find("\n", at, made.end) < 0
        self.advance()

    def _add(self, message: Message, name: str, value: str | Message, at: int, value_at: int) -> Field:
        """Put a field into ``message``; where it ends is seen later."""
        self.count += 1
        if self.count > MAX_FIELDS:
            raise self.error(at, f"more than {MAX_FIELDS} fields; not a net, or one with its weights as text")
        message.fields.append(Field(sys.intern(name), value, self.line(at), at, value_start=value_at))
        return message.fields[-1]

    def _scalar(self, message: Message, name: str, at: int) -> None:
        kind, word, start = self.token
        end = start + len(word)
        self.advance()
        if kind == "punct" and word == "-":
            kind, word, after = self.token
            end = after + len(word)
            self.advance()
            if kind not in ("number", "word"):
                raise self.error(after, f"expected a number after '-', found {_shown(word)}; add it")
        elif kind == "string":  # adjacent strings are one
            while self.token[0] == "string":
                end = self.token[2] + len(self.token[1])
                self.advance()
        elif kind not in ("number", "word"):
            raise self.error(start, f"expected a value for '{name}', found {_shown(word)}; add it")
        made = self._add(message, name, self.text[start:end], at, start)
        made.end = made.value_end = end


def _shown(word: str) -> str:
    return f"'{word[:40]}'" if word else "the end of the file"


# ---- tree -> protobuf -------------------------------------------------------------------------------------

_SIMPLE_ESCAPE = {
    "n": b"\n", "t": b"\t", "r": b"\r", "a": b"\a", "b": b"\b", "f": b"\f", "v": b"\v",
    "\\": b"\\", "'": b"'", '"': b'"', "?": b"?",
}  # fmt: skip
_ESCAPE = re.compile(
    r"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U(00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})|(.))"
)
_TRUE, _FALSE = {"true", "True", "t", "1"}, {"false", "False", "f", "0"}
_INT_RANGE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def unquote(text: str) -> str:
    """The value of a (possibly adjacent, possibly escaped) string literal."""
    out = bytearray()
    for match in _TOKEN.finditer(text):  # comments may stand between adjacent strings
        if match.lastgroup != "string":
            continue
        body, at = match.group()[1:-1], 0
        for escape in _ESCAPE.finditer(body):
            out += encode(body[at : escape.start()])
            octal, hexa, short, long, simple = escape.groups()
            if octal:
                out.append(int(octal, 8) & 255)
            elif hexa:
                out.append(int(hexa, 16))
            elif short or long:
                out += chr(int(short or long, 16)).encode("utf-8", "surrogatepass")
            else:
                out += _SIMPLE_ESCAPE.get(simple, encode(simple))
            at = escape.end()
        out += encode(body[at:])
    return out.decode("utf-8", "surrogateescape")


def blanks(text: str) -> str:
    """What separates the fields of a message, without commas, semicolons and what makes a list."""
    return "".join(match.group() for match in _TOKEN.finditer(text) if match.lastgroup in _BLANK)


def comments(text: str) -> list[str]:
    """The comments in ``text``, each from its ``#`` to the end of its line."""
    return [m.group().rstrip() for m in _TOKEN.finditer(text) if m.lastgroup == "comment"]


def end_of_field(text: str, at: int) -> int:
    """Where what belongs to the field that ends at ``at`` ends: separators, and the rest of its line."""
    end = at
    while (match := _TOKEN.match(text, at)) is not None:
        at = match.end()
        if match.group() in ("]", ",", ";"):  # "]" ends a list
            end = at
        elif match.lastgroup not in _BLANK:
            break
    match = _REST_OF_LINE.match(text, end)
    return match.end() if match else end


def quote(value: str) -> str:
    """``value`` as a double-quoted string literal."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\{ord(match.group()):03o}", escaped) + '"'


@cache
def _fields_of(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    return dict(descriptor.fields_by_name)


def to_message(tree: Message, into: ProtoMessage, path: Path | str = "<text>") -> list[Field]:
    """Read ``tree`` into the protobuf message ``into``; returns the fields the schema does not know.

    Raises PrototxtError where a known field has a value of the wrong kind.
    """
    unknown: list[Field] = []
    known = _fields_of(into.DESCRIPTOR)
    once: set[str] = set()
    for f in tree.fields:
        descriptor = known.get(f.name)
        if descriptor is None:
            unknown.append(f)
            continue
        if not descriptor.is_repeated:
            if f.name in once:
                raise PrototxtError(f"{path}:{f.line}: {f.name} is given twice; keep one")
            once.add(f.name)
        if descriptor.message_type is not None:
            if not isinstance(f.value, Message):
                raise PrototxtError(f"{path}:{f.line}: {f.name} holds a message; write {f.name} {{ ... }}")
            target = getattr(into, f.name)
            unknown += to_message(f.value, target.add() if descriptor.is_repeated else target, path)
            if not descriptor.is_repeated:
                target.SetInParent()
            continue
        if isinstance(f.value, Message):
            raise PrototxtError(f"{path}:{f.line}: {f.name} holds a single value, not a message")
        try:
            value = _scalar_value(descriptor, f.value)
        except ValueError as error:
            raise PrototxtError(f"{path}:{f.line}: {f.name}: {error}") from None
        if value is None:
            unknown.append(f)  # an enum value of a fork
        elif descriptor.is_repeated:
            getattr(into, f.name).append(value)
        else:
            setattr(into, f.name, value)
    return unknown


def _scalar_value(descriptor: FieldDescriptor, text: str) -> Any:
    """The Python value of a scalar's text; None for an enum value the schema does not know."""
    kind = descriptor.cpp_type
    value: Any
    quoted = text[0] in "\"'"
    if text[0] == "-":  # spaces and comments may stand behind the sign
        text = "-" + [match.group() for match in _TOKEN.finditer(text) if match.lastgroup not in _BLANK][-1]
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if not quoted:
            raise ValueError(f"expected a quoted string, found {text[:40]}")
        value = unquote(text)
        if descriptor.type == FieldDescriptor.TYPE_BYTES:
            return encode(value)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("not valid UTF-8 in a string; names must be UTF-8") from None
        return value
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        enum = descriptor.enum_type
        assert enum is not None
        by_name = enum.values_by_name.get(unquote(text) if quoted else text)
        if by_name is not None:
            return by_name.number
        if not quoted and not re.fullmatch(r"-?[0-9]+|[A-Za-z_][A-Za-z0-9_.]*", text):
            raise ValueError(f"expected a name or number, found {text[:40]}")
        return int(text) if text.isdecimal() and int(text) in enum.values_by_number else None
    if quoted:
        raise ValueError(f"expected a number or word, found the string {text[:40]}; remove the quotes")
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        raise ValueError(f"expected true or false, found {text[:40]}")
    if kind in _INT_RANGE:
        low, high = _INT_RANGE[kind]
        try:
            value = int(text, 8) if re.fullmatch(r"-?0[0-7]+", text) else int(text, 0)
        except ValueError:
            raise ValueError(f"expected an integer, found {text[:40]}") from None
        if not low <= value <= high:
            raise ValueError(f"{text[:40]} is outside {low}..{high}")
        return value
    try:
        return float(re.sub(r"(?<=[0-9.])[fF]$", "", text))
    except ValueError:
        raise ValueError(f"expected a number, found {text[:40]}") from None


# ---- tree -> text -----------------------------------------------------------------------------------------


def render(tree: Message, indent: str = "", newline: str = "\n") -> str:
    """A tree as text: a field a line, two spaces a level; what was written on one line stays on one."""
    out = []
    for f in tree.fields:
        if not isinstance(f.value, Message):
            out.append(f"{indent}{f.name}: {f.value}{newline}")
        elif f.one_line:
            inner = " ".join(render(f.value, "", "\n").split("\n")).strip()
            out.append(
                f"{indent}{f.name} {{ {inner} }}{newline}" if inner else f"{indent}{f.name} {{ }}{newline}"
            )
        else:
            inner = render(f.value, indent + "  ", newline)
            out.append(f"{indent}{f.name} {{{newline}{inner}{indent}}}{newline}")
    return "".join(out)


def number(value: float) -> str:
    """A number as prototxts write it: the shortest text that reads back as the same float32."""
    return str(value) if isinstance(value, int) else str(np.float32(value)).removesuffix(".0")
