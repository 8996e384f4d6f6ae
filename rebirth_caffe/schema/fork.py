"""A fork's caffe.proto, read without protoc: what its LayerParameter holds.

The text of a .proto file (proto2, one file, as every Caffe fork has it) becomes a FileDescriptorProto, and
that, in a pool of its own, message classes. What does not belong to messages (services, extensions, options
other than packed and default) is passed over.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.text_encoding import CEscape

from ..errors import PrototxtError
from ..prototxt import MAX_DEPTH, encode, read_text, unquote

_TOKEN = re.compile(
    r"""(?P<space>(?:\s+|//[^\n]*|/\*.*?\*/)+)
      | (?P<word>\.?[A-Za-z_][A-Za-z0-9_.]*)
      | (?P<number>-?(?:0[xX][0-9a-fA-F]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)f?)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<punct>[{}\[\]<>()=;,-])""",
    re.VERBOSE | re.DOTALL,
)
_SCALARS = {
    name.removeprefix("TYPE_").lower(): number
    for name, number in FieldDescriptorProto.Type.items()
    if name not in ("TYPE_MESSAGE", "TYPE_ENUM", "TYPE_GROUP")
}
_LABELS = {name.removeprefix("LABEL_").lower(): number for name, number in FieldDescriptorProto.Label.items()}
_BLOCKS = ("extend", "service")  # passed over as a whole
_STATEMENTS = ("option", "extensions", "reserved", "syntax")  # up to their semicolon


@dataclass(frozen=True)
class Schema:
    """The messages of a fork."""

    path: str
    layer: type[Message]  # its LayerParameter
    descriptor: Descriptor


def load(path: Path | str) -> Schema:
    """Read a fork's caffe.proto. Raises PrototxtError with ``file:line`` for what is none."""
    path = Path(path)
    file = parse(encode(read_text(path, ".proto")).decode("utf-8", "replace"), path)
    pool = DescriptorPool()
    try:
        pool.AddSerializedFile(file.SerializeToString())
        layer = pool.FindMessageTypeByName(f"{file.package}.LayerParameter".lstrip("."))
    except KeyError:
        raise PrototxtError(
            f"{path}: holds no message LayerParameter; give the fork's whole caffe.proto"
        ) from None
    except Exception as error:  # protobuf raises TypeError, and others in other versions
        raise PrototxtError(f"{path}: does not fit together: {error}; is it the whole caffe.proto?") from None
    return Schema(str(path), GetMessageClass(layer), layer)


def parse(text: str, path: Path | str = "<proto>") -> FileDescriptorProto:
    """The descriptor of a .proto file's text. Raises PrototxtError with ``file:line``."""
    return _Parser(text, str(path)).parse()


class _Parser:
    """Recursive descent over the tokens of one file."""

    def __init__(self, text: str, path: str) -> None:
        self.path = path
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, line
        at, line = 0, 1
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise PrototxtError(f"{path}:{line}: '{text[at]}' cannot stand here; not a .proto file")
            if match.lastgroup != "space":
                self.tokens.append((str(match.lastgroup), match.group(), line))
            line += match.group().count("\n")
            at = match.end()
        self.tokens.append(("end", "", line))
        self.i = 0

    def parse(self) -> FileDescriptorProto:
        file = FileDescriptorProto(name=Path(self.path).name)
        while self.tokens[self.i][0] != "end":
            word = self._word()
            if word == "package":
                file.package = self._word()
                self._expect(";")
            elif word == "message":
                self._message(file.message_type.add(), 1)
            elif word == "enum":
                self._enum(file.enum_type.add())
            elif word == "import":
                raise self._error("imports another file; give one file that holds all messages", back=1)
            else:
                self._skip(word)
        return file

    def _error(self, what: str, back: int = 0) -> PrototxtError:
        return PrototxtError(f"{self.path}:{self.tokens[self.i - back][2]}: {what}")

    def _next(self) -> tuple[str, str]:
        """The kind and the text of the next token, whatever it is."""
        kind, text, _ = self.tokens[self.i]
        if kind == "end":
            raise self._error("the file ends inside a message or an enum; copy it again")
        self.i += 1
        return kind, text

    def _take(self, kind: str, what: str) -> str:
        found, text, _ = self.tokens[self.i]
        if found != kind:
            raise self._error(f"expected {what}, found '{text[:40] or 'the end of the file'}'; not proto2?")
        self.i += 1
        return text

    def _word(self) -> str:
        return self._take("word", "a word")

    def _number(self) -> int:
        text = self._take("number", "a number")
        with suppress(ValueError):  # of a number that is not whole, or of thousands of digits
            number = int(text, 0) if not re.fullmatch("-?0[0-7]+", text) else int(text, 8)
            if -(2**31) <= number < 2**31:
                return number
        raise self._error(f"'{text[:40]}' is no number of a field or value; not proto2?", back=1)

    def _accept(self, punct: str) -> bool:
        if self.tokens[self.i][:2] == ("punct", punct):
            self.i += 1
            return True
        return False

    def _expect(self, punct: str) -> None:
        if not self._accept(punct):
            raise self._error(f"expected '{punct}', found '{self.tokens[self.i][1][:40]}'; not proto2?")

    def _skip(self, word: str) -> None:
        """Pass over a statement or a block of no interest."""
        if word not in (*_STATEMENTS, *_BLOCKS):
            raise self._error(f"'{word}' cannot stand here; not proto2?", back=1)
        end, depth = ("}" if word in _BLOCKS else ";"), 0
        while True:
            kind, text, _ = self.tokens[self.i]
            if kind == "end":
                raise self._error(f"the file ends inside '{word}'")
            self.i += 1
            depth += (kind == "punct") * ((text == "{") - (text == "}"))
            if kind == "punct" and text == end and depth == 0:
                return

    def _message(self, message: DescriptorProto, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(f"messages nested more than {MAX_DEPTH} deep; not a caffe.proto")
        message.name = self._word()
        self._expect("{")
        while not self._accept("}"):
            if self._accept(";"):
                continue
            word = self._word()
            if word == "message":
                self._message(message.nested_type.add(), depth + 1)
            elif word == "enum":
                self._enum(message.enum_type.add())
            elif word == "oneof":
                index = len(message.oneof_decl)
                message.oneof_decl.add(name=self._word())
                self._expect("{")
                while not self._accept("}"):
                    self._field(message.field.add(oneof_index=index), "optional", self._word())
            elif word in _LABELS:
                self._field(message.field.add(), word, self._word())
            else:
                self._skip(word)

    def _field(self, field: FieldDescriptorProto, label: str, kind: str) -> None:
        field.label = _LABELS[label]
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
        else:
            field.type_name = kind  # the pool finds out whether it is a message or an enum, and which
        field.name = self._word()
        self._expect("=")
        field.number = self._number()
        if self._accept("["):
            while not self._accept("]"):
                self._option(field)
                self._accept(",")
        self._expect(";")

    def _option(self, field: FieldDescriptorProto) -> None:
        if self._accept("("):  # an option of the fork's own
            self._word()
            self._expect(")")
            name = ""
        else:
            name = self._word()
        self._expect("=")
        kind, value = self._next()
        if (kind, value) == ("punct", "-"):  # -inf
            value += self._word()
        if name == "default":
            field.default_value = _string(field, value) if kind == "string" else _plain(field, value)
        elif name == "packed":
            field.options.packed = value == "true"

    def _enum(self, enum: EnumDescriptorProto) -> None:
        enum.name = self._word()
        self._expect("{")
        while not self._accept("}"):
            if self._accept(";"):
                continue
            word = self._word()
            if self._accept("="):
                enum.value.add(name=word, number=self._number())
                if self._accept("["):
                    while self._next() != ("punct", "]"):
                        pass
                self._expect(";")
            else:
                self._skip(word)


def _string(field: FieldDescriptorProto, quoted: str) -> str:
    """A default as descriptors have it: bytes stay escaped, and what is no text becomes some."""
    value = unquote(quoted).encode("utf-8", "surrogateescape")
    if field.type == FieldDescriptorProto.TYPE_BYTES:
        return str(CEscape(value, as_utf8=False))
    return value.decode("utf-8", "replace")


def _plain(field: FieldDescriptorProto, value: str) -> str:
    """A default as descriptors have it: whole numbers in decimal."""
    whole = field.type not in (0, FieldDescriptorProto.TYPE_FLOAT, FieldDescriptorProto.TYPE_DOUBLE)
    return str(int(value, 0)) if whole and re.fullmatch(r"-?0[xX][0-9a-fA-F]+", value) else value
