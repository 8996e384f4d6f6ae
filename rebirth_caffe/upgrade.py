"""Nets of every era in today's format, as Caffe's own upgrade_proto.cpp makes them.

``layers { layer { ... } }`` (V0, 2013) and ``layers { type: CONVOLUTION }`` (V1, 2014) become ``layer { }``;
what is said of the input, of a data layer's images and of a BatchNorm's learning rates moves to where Caffe
1.0 looks for it. What survives keeps its text: comments, layout, fields of forks.
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from google.protobuf import text_format

from . import caffemodel, prototxt
from .caffemodel import V0_TYPES, V1_TYPES, Record, Weights
from .errors import NetError, RebirthError
from .prototxt import Field, Message, quote
from .schema import caffe_pb2

V1Layer = caffe_pb2.V1LayerParameter
_AnyLayer = TypeVar("_AnyLayer", caffe_pb2.LayerParameter, caffe_pb2.V1LayerParameter)

# What became of the options of a V0 layer: the message of its type, the name there, the types that have it.
_V0_PARAMS = {
    "conv": "convolution_param", "innerproduct": "inner_product_param", "pool": "pooling_param",
    "dropout": "dropout_param", "lrn": "lrn_param", "concat": "concat_param", "data": "data_param",
    "images": "image_data_param", "hdf5_data": "hdf5_data_param", "window_data": "window_data_param",
    "infogain_loss": "infogain_loss_param",
}  # fmt: skip
_V0_OPTIONS = {
    "num_output": ("num_output", "conv innerproduct"),
    "biasterm": ("bias_term", "conv innerproduct"),
    "weight_filler": ("weight_filler", "conv innerproduct"),
    "bias_filler": ("bias_filler", "conv innerproduct"),
    "pad": ("pad", "conv pool"),
    "kernelsize": ("kernel_size", "conv pool"),
    "stride": ("stride", "conv pool"),
    "group": ("group", "conv"),
    "pool": ("pool", "pool"),
    "dropout_ratio": ("dropout_ratio", "dropout"),
    "local_size": ("local_size", "lrn"),
    "alpha": ("alpha", "lrn"),
    "beta": ("beta", "lrn"),
    "k": ("k", "lrn"),
    "concat_dim": ("concat_dim", "concat"),
    "source": ("source", "data hdf5_data images window_data infogain_loss"),
    "batchsize": ("batch_size", "data hdf5_data images window_data"),
    "rand_skip": ("rand_skip", "data images"),
    "shuffle_images": ("shuffle", "images"),
    "new_height": ("new_height", "images"),
    "new_width": ("new_width", "images"),
    "det_fg_threshold": ("fg_threshold", "window_data"),
    "det_bg_threshold": ("bg_threshold", "window_data"),
    "det_fg_fraction": ("fg_fraction", "window_data"),
    "det_context_pad": ("context_pad", "window_data"),
    "det_crop_mode": ("crop_mode", "window_data"),
}
_V0_TRANSFORMS = {"scale": "scale", "meanfile": "mean_file", "cropsize": "crop_size", "mirror": "mirror"}
_V0_KEPT = {"name", "blobs", "blobs_lr", "weight_decay"}

# V1's lists with a value a blob, and their names in today's list of messages.
_SPECS = {
    "param": "name",
    "blob_share_mode": "share_mode",
    "blobs_lr": "lr_mult",
    "weight_decay": "decay_mult",
}
_SOURCES = {"DATA": "data_param", "IMAGE_DATA": "image_data_param", "WINDOW_DATA": "window_data_param"}
_TRANSFORMS = ("scale", "mean_file", "crop_size", "mirror")
_SOLVERS = ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")


@dataclass
class Upgraded:
    """A prototxt in today's format."""

    text: str
    lines: array[int]  # for each of its lines the one of the original that it comes from
    notes: list[str]  # a line for each thing that was dropped, as Caffe drops it, or that needs a person

    def tree(self, path: Path | str) -> Message:
        """The fields of ``text``, with their lines in the original."""
        tree = prototxt.parse(self.text, path)
        for f in tree.walk():
            f.line = self.lines[f.line - 1]
        return tree


def is_solver(tree: Message) -> bool:
    """Whether a text is a solver's rather than a net's: what has no layers and more fields of a solver."""
    here = {f.name for f in tree.fields}
    fields = caffe_pb2.SolverParameter.DESCRIPTOR.fields_by_name
    return not here & {"layer", "layers"} and any(name in fields for name in here - {"debug_info"})


def upgrade(text: str, path: Path | str = "<text>") -> Upgraded:
    """A net's or a solver's text in today's format; one that already is in it stays as it is, byte for byte.

    Raises PrototxtError or NetError where Caffe refuses the file, or leaves a part of it out without a word.
    """
    tree = prototxt.parse(text, path)
    work = _Upgrade(text, tree, path)
    if is_solver(tree):
        work.solver()
    else:
        work.net()
    return work.result()


def upgrade_weights(
    weights: Weights, path: Path | str
) -> tuple[caffe_pb2.NetParameter, list[tuple[bytes, Record]]]:
    """What ``caffemodel.write`` takes to store weights in today's format, like upgrade_net_proto_binary."""
    if weights.storage == "HDF5":
        heads = [caffe_pb2.LayerParameter(name=record.name) for record in weights.records]
        pairs = [(h.SerializeToString(), r) for h, r in zip(heads, weights.records, strict=True)]
        return caffe_pb2.NetParameter(name=weights.name), pairs
    before, after = weights.skeleton(str(path)), caffe_pb2.NetParameter()
    text = text_format.MessageToString(before)
    prototxt.to_message(upgrade(text, path).tree(path), after, path)
    records = [r for r in weights.records if (weights.storage, r.type) != ("V0", "padding")]
    if len(after.layer) > len(records):  # the inputs
        records.insert(0, Record("input", "Input", []))
    pairs = []
    for i, (layer, record) in enumerate(zip(after.layer, records, strict=True)):
        same = record.raw is not None and i < len(before.layer) and before.layer[i] == layer
        kept = record if same else Record(record.name, record.type, record.blobs)
        pairs.append((layer.SerializePartialToString(), kept))
    header = caffe_pb2.NetParameter()
    header.CopyFrom(after)
    header.ClearField("layer")
    return header, pairs


def upgrade_file(source: Path, target: Path) -> list[str]:
    """Write ``source``, a prototxt or weights, in today's format to ``target``; what is to be told of it.

    Weights become HDF5 where the target is called .h5. Raises RebirthError where the file cannot be read or
    there is a target already, OSError where it cannot be written; then nothing is.
    """
    if os.path.lexists(target):
        raise RebirthError(f"{target}: exists already; give another name, or remove it")
    part = target.with_name(f".{os.urandom(8).hex()}.part")
    try:
        if _is_weights(source):
            notes = []
            weights = caffemodel.read(source)
            if target.suffix == ".h5":
                caffemodel.write_hdf5(part, weights.records)
            else:
                caffemodel.write(part, *upgrade_weights(weights, source))
        else:
            text = prototxt.read_text(source)
            upgraded = upgrade(text, source)
            notes = upgraded.notes if upgraded.text != text else [f"{source}: is in today's format already"]
            part.write_bytes(prototxt.encode(upgraded.text))
        part.rename(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from None
    except RebirthError as error:  # of the file that nobody but this function knows
        raise type(error)(str(error).replace(str(part), str(target))) from None
    finally:
        with suppress(OSError):  # a file system that takes nothing has nothing
            part.unlink(missing_ok=True)
    return notes


def _is_weights(path: Path) -> bool:
    """Whether a file is binary; what cannot be read is left to those who say so."""
    if path.suffix in (".caffemodel", ".h5"):
        return True
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(2**20)
    except OSError:
        return False


# ---- text that is taken apart and put together again ------------------------------------------------------


@dataclass(eq=False)
class _Piece:
    """A field with the white space and the comments around it: before it, and behind it on its line."""

    name: str
    head: str  # "name: " or "name "
    value: str  # as in the source; a message's text until its ``body`` is opened
    lead: str
    tail: str = ""
    at: int = -1  # where it comes from in the source
    field: Field | None = None
    body: _Body | None = None

    @property
    def line(self) -> int:
        return self.field.line if self.field is not None else 0

    @property
    def indent(self) -> str:
        """What stands before a field beside this one: a space, or a new line and this one's indentation."""
        above, newline, spaces = self.lead.rpartition("\n")
        return ("\r\n" if above.endswith("\r") else newline) + spaces if newline else " "

    def rename(self, name: str) -> None:
        self.name, self.head = name, name + self.head[len(self.name) :]

    def move(self, indent: str) -> None:
        """Stand elsewhere, with the comments above and behind."""
        if self.indent != " " != indent:
            self.value = self.value.replace(self.indent, indent)
        above = prototxt.comments(self.lead)
        self.lead = _lines(above, indent) + ("\n" if above and indent == " " else indent)


@dataclass(eq=False)
class _Body:
    """What stands between two braces, or in a whole file."""

    pieces: list[_Piece]
    opening: str
    closing: str
    inner: str = " "  # what stands before the first field of an empty one

    @property
    def indent(self) -> str:
        """What stands before another field."""
        return self.pieces[-1].indent if self.pieces else self.inner

    def all(self, name: str) -> list[_Piece]:
        return [p for p in self.pieces if p.name == name]

    def one(self, name: str) -> _Piece | None:
        return next(iter(self.all(name)), None)

    def insert(self, piece: _Piece, before: _Piece) -> None:
        self.pieces.insert(self.pieces.index(before), piece)

    def remove(self, piece: _Piece) -> None:
        """Take a piece away; its comments stay, above what follows it."""
        texts = (piece.lead, piece.head, piece.tail)
        self.replace(piece, [], [comment for text in texts for comment in prototxt.comments(text)])

    def replace(self, piece: _Piece, pieces: list[_Piece], comments: list[str]) -> None:
        """Put others where a piece stands, and comments behind these."""
        i = self.pieces.index(piece)
        self.pieces[i : i + 1] = pieces
        i += len(pieces)
        kept = _lines(comments, piece.indent)
        if i < len(self.pieces):
            self.pieces[i].lead = _joined(kept, self.pieces[i].lead)
        else:
            self.closing = _joined(kept, self.closing)

    def chunks(self) -> Iterator[tuple[str, int]]:
        """Its text in pieces, each with its place in the source, or -1."""
        yield self.opening, -1
        before = self.opening
        for piece in self.pieces:
            yield _joined(before, piece.lead)[len(before) :], -1
            yield piece.head, piece.at
            if piece.body is not None:
                yield from piece.body.chunks()
            elif piece.field is not None:
                yield piece.value, -1
            else:  # new: every line of it comes from the same place
                yield from ((line, piece.at) for line in piece.value.splitlines(keepends=True))
            yield piece.tail, -1
            before = piece.tail
        yield _joined(before, self.closing)[len(before) :], -1


def _lines(comments: list[str], indent: str) -> str:
    """Each comment on a line of its own."""
    return "".join(("\n" if indent == " " else indent) + comment for comment in comments)


def _joined(before: str, behind: str) -> str:
    """One text behind another one that may end in a comment."""
    in_comment = "#" in before and behind and not behind.startswith(("\n", "\r\n"))
    return before + ("\n" if in_comment else "") + behind


def _split(gap: str) -> tuple[str, str]:
    """What stands between two fields: the rest of the first one's line, and what is before the second."""
    end = gap.find("\n")
    if end < 0:
        return (gap, "") if "#" in gap else ("", gap)
    end -= gap[:end].endswith("\r")
    return gap[:end], gap[end:]


def _deeper(indent: str) -> str:
    return indent if indent == " " else indent + "  "


class _Upgrade:
    """One file on its way."""

    def __init__(self, text: str, tree: Message, path: Path | str) -> None:
        self.text = text
        self.path = path
        self.notes: list[str] = []
        self.changed = False
        self.root = self._taken_apart(tree, 0, len(text))

    def result(self) -> Upgraded:
        if not self.changed:
            return Upgraded(self.text, array("l", range(1, self.text.count("\n") + 2)), self.notes)
        newlines = array("l", (match.start() for match in re.finditer("\n", self.text)))
        chunks: list[str] = []
        lines, placed = array("l", [1]), False  # whether the current line of the result has found its own
        for chunk, at in self.root.chunks():
            if at >= 0 and not placed:
                lines[-1], placed = bisect_left(newlines, at) + 1, True
            for _ in range(chunk.count("\n")):
                lines.append(min(lines[-1] + 1, len(newlines) + 1))
                placed = False
            chunks.append(chunk)
        return Upgraded("".join(chunks), lines, self.notes)

    # ---- pieces -------------------------------------------------------------------------------------------

    def _taken_apart(self, message: Message, start: int, end: int) -> _Body:
        body = _Body([], "", "")
        at = start
        for f in message.fields:
            gap = self.text[at : f.start]
            blank = prototxt.blanks(gap)
            behind, lead = _split(blank if blank == gap or "\n" in blank else " ")
            self._behind(body, behind)
            head = self.text[f.start : f.value_start]
            if not head:  # in a list
                head = f.name + (" " if isinstance(f.value, Message) else ": ")
            value = self.text[f.value_start : f.value_end]
            body.pieces.append(
                _Piece(f.name, head, value, lead or " " * bool(body.pieces), at=f.start, field=f)
            )
            at = f.end
        behind, body.closing = _split(prototxt.blanks(self.text[at:end]))
        self._behind(body, behind)
        return body

    @staticmethod
    def _behind(body: _Body, text: str) -> None:
        if body.pieces:
            body.pieces[-1].tail = text
        else:
            body.opening = text

    def _inside(self, piece: _Piece) -> _Body:
        """The body of a message, to be changed."""
        self.changed = True
        if piece.body is None:
            f = piece.field
            assert f is not None
            assert isinstance(f.value, Message)
            piece.body = self._taken_apart(f.value, f.value_start + 1, f.value_end - 1)
            piece.body.opening = "{" + piece.body.opening
            piece.body.closing += "}"
            piece.body.inner = _deeper(piece.indent)
        return piece.body

    def _message(self, body: _Body, name: str, beside: _Piece) -> _Body:
        """The body of the message ``name``; it is made before ``beside`` where there is none."""
        piece = body.one(name)
        if piece is None:
            piece = _Piece(name, f"{name} ", "", beside.indent, at=beside.at)
            piece.body = _Body([], "{", beside.indent + "}", _deeper(beside.indent))
            body.insert(piece, beside)
        return self._inside(piece)

    def _set(self, body: _Body, name: str, value: str) -> None:
        """Give a field of a body this value."""
        piece = body.one(name)
        if piece is not None:
            piece.value = value
        else:
            body.pieces.append(_Piece(name, f"{name}: ", value, body.indent))

    def _move(self, piece: _Piece, name: str, body: _Body, into: _Body) -> None:
        """Take a field from one message to another, under another name, with its comments."""
        body.pieces.remove(piece)
        piece.rename(name)
        piece.move(into.indent)
        into.pieces.append(piece)

    def _drop(self, body: _Body, piece: _Piece, where: str) -> None:
        self._note(piece.line, f"{piece.name} is dropped: Caffe does not read it in {where}")
        body.remove(piece)

    def _note(self, line: int, what: str) -> None:
        self.notes.append(f"{self.path}:{line}: {what}")

    def _refuse(self, line: int, what: str) -> NetError:
        return NetError(f"{self.path}:{line}: {what}")

    # ---- nets ---------------------------------------------------------------------------------------------

    def net(self) -> None:
        """Every step of Caffe's UpgradeNetAsNeeded, in its order."""
        old, new = self.root.all("layers"), self.root.all("layer")
        if old and new:
            raise self._refuse(
                max(old[0].line, new[0].line),
                f"layers {{ }} in line {old[0].line} and layer {{ }} in line {new[0].line}: Caffe reads only "
                "one kind of a file; write all layers in one format",
            )
        for piece in new:
            self._read(piece, caffe_pb2.LayerParameter())
        layers = [self._read(piece, V1Layer()) for piece in old]
        if any(layer.HasField("layer") for layer in layers):
            old = self._v0(old, layers)
        else:
            self._v1(old, layers)
        for piece in old:
            self._specs(self._inside(piece))
            piece.rename("layer")
        self._inputs()
        self._batch_norms()

    def _read(self, piece: _Piece, layer: _AnyLayer) -> _AnyLayer:
        """Read a layer's fields into a message: errors are told with their lines, before anything changes."""
        assert piece.field is not None
        tree = piece.field.value
        if not isinstance(tree, Message):
            raise self._refuse(piece.line, f"write each layer as {piece.name} {{ ... }}")
        prototxt.to_message(tree, layer, self.path)
        return layer

    def _v0(self, pieces: list[_Piece], layers: list[caffe_pb2.V1LayerParameter]) -> list[_Piece]:
        """UpgradeV0Net: the inner layers' options go where V1 has them; the layers that are left."""
        inner = [layer.HasField("layer") for layer in layers]
        if not all(inner):
            raise self._refuse(
                pieces[inner.index(False)].line,
                "layers { } without the layer { } inside that those in line "
                f"{pieces[inner.index(True)].line} have: Caffe would drop what it says; use one format",
            )
        self.changed = True  # also where nothing but padding layers stood, and nothing is left
        kept = self._without_padding(pieces, layers)
        for piece, layer in zip(pieces, layers, strict=True):
            if piece in kept:
                self._v0_layer(self._inside(piece), layer.layer.type, piece.line)
        for name in ("state", "debug_info", "input_shape"):
            for piece in self.root.all(name):
                self._drop(self.root, piece, "a file with layers of 2013")
        return kept

    def _without_padding(
        self, pieces: list[_Piece], layers: list[caffe_pb2.V1LayerParameter]
    ) -> list[_Piece]:
        """UpgradeV0PaddingLayers: a padding layer becomes the pad of what reads it."""
        kept: list[_Piece] = []
        makers: dict[str, caffe_pb2.V1LayerParameter | None] = dict.fromkeys(self._header().input)
        for piece, layer in zip(pieces, layers, strict=True):
            if layer.layer.type != "padding":
                kept.append(piece)
            for i, bottom in enumerate(layer.bottom):
                if bottom not in makers:
                    raise self._refuse(
                        piece.line,
                        f"bottom '{bottom}' is the top of no layer above it and no input; correct it",
                    )
                source = makers[bottom]
                if source is None or source.layer.type != "padding":
                    continue
                single = len(layer.bottom) == len(source.bottom) == len(source.top) == 1
                if layer.layer.type not in ("conv", "pool") or not single:
                    raise self._refuse(
                        piece.line,
                        f"reads the padding layer '{source.layer.name}', which only a conv or pool with a "
                        "single bottom can; give the padding another place",
                    )
                body = self._inside(piece)
                body.all("bottom")[i].value = quote(source.bottom[0])
                inner = body.one("layer")
                assert inner is not None
                self._set(self._inside(inner), "pad", str(source.layer.pad))
            makers.update(dict.fromkeys(layer.top, layer))
        for piece in pieces:
            if piece not in kept:
                self.root.remove(piece)
        return kept

    def _v0_layer(self, body: _Body, kind: str, line: int) -> None:
        """UpgradeV0LayerParameter."""
        for piece in [p for p in body.pieces if p.name in V1Layer.DESCRIPTOR.fields_by_name]:
            if piece.name not in ("layer", "bottom", "top"):
                self._drop(body, piece, "layers { } around a layer { }")
        self._dissolve(body, "layer")
        for piece in list(body.pieces):
            name, kinds = _V0_OPTIONS.get(piece.name, ("", ""))
            if piece.name == "type":
                if kind not in V0_TYPES:
                    raise self._refuse(
                        line, f"type '{kind}' is none of 2013's: Caffe cannot upgrade it; correct it"
                    )
                piece.value = quote(V1_TYPES[V0_TYPES[kind]])
            elif kind in kinds.split():
                self._move(piece, name, body, self._message(body, _V0_PARAMS[kind], piece))
            elif piece.name in _V0_TRANSFORMS:
                target = self._message(body, "transform_param", piece)
                self._move(piece, _V0_TRANSFORMS[piece.name], body, target)
            elif (
                piece.name in caffe_pb2.V0LayerParameter.DESCRIPTOR.fields_by_name
                and piece.name not in _V0_KEPT
                and (piece.name, kind) != ("hdf5_output_param", "hdf5_output")
            ):
                self._drop(body, piece, f"a layer of type '{kind}'")

    def _dissolve(self, body: _Body, name: str) -> None:
        """Put what is in a message in its place."""
        piece = body.one(name)
        assert piece is not None
        inner = self._inside(piece)
        above = [*prototxt.comments(piece.lead), *prototxt.comments(inner.opening)]
        for one in inner.pieces:
            one.move(piece.indent)
        if inner.pieces:
            inner.pieces[0].lead = _joined(_lines(above, piece.indent), inner.pieces[0].lead)
            above = []
        behind = [*above, *prototxt.comments(inner.closing), *prototxt.comments(piece.tail)]
        body.replace(piece, inner.pieces, behind)

    def _v1(self, pieces: list[_Piece], layers: list[caffe_pb2.V1LayerParameter]) -> None:
        """UpgradeV1LayerType, and UpgradeNetDataTransformation, which takes all data layers if any."""
        kinds = [V1Layer.LayerType.Name(layer.type) if layer.HasField("type") else "" for layer in layers]
        sources = [_SOURCES.get(kind, "") for kind in kinds]
        moves = any(
            source and getattr(layer, source).HasField(name)
            for layer, source in zip(layers, sources, strict=True)
            for name in _TRANSFORMS
        )
        for piece, kind, source in zip(pieces, kinds, sources, strict=True):
            body = self._inside(piece)
            for written in body.all("type"):
                if not kind:
                    word = prototxt.unquote(written.value) or written.value
                    self._note(
                        written.line, f"type {word} is not Caffe's; what it is called today, only you know"
                    )
                written.value = quote(V1_TYPES[kind] if kind else word)
            if source and moves:
                beside = body.one(source) or body.pieces[-1]
                transforms, data = (
                    self._message(body, "transform_param", beside),
                    self._message(body, source, beside),
                )
                for name in _TRANSFORMS:
                    for one in data.all(name):
                        for other in transforms.all(name):
                            transforms.remove(other)
                        self._move(one, name, data, transforms)

    def _specs(self, body: _Body) -> None:
        """V1's blobs_lr, weight_decay, param and blob_share_mode as a list of messages."""
        given = {name: body.all(old) for old, name in _SPECS.items()}
        count = max(len(values) for values in given.values())
        pieces = [p for p in body.pieces if p.name in _SPECS]
        for i in range(count):
            inner = [f"{name}: {values[i].value}" for name, values in given.items() if i < len(values)]
            text = f"{{ {' '.join(inner)} }}"
            body.insert(_Piece("param", "param ", text, pieces[0].indent, at=pieces[0].at), pieces[0])
        for piece in pieces:
            body.remove(piece)

    def _header(self) -> caffe_pb2.NetParameter:
        """What the file says of the net's inputs."""
        header = caffe_pb2.NetParameter()
        names = ("input", "input_shape", "input_dim")
        fields = [p.field for p in self.root.pieces if p.name in names and p.field is not None]
        prototxt.to_message(Message(fields), header, self.path)
        return header

    def _inputs(self) -> None:
        """UpgradeNetInput: inputs become a layer. Without shapes they are left over from a snapshot."""
        header = self._header()
        if not header.input:
            return
        pieces = [p for p in self.root.pieces if p.name in ("input", "input_shape", "input_dim")]
        shapes = [list(shape.dim) for shape in header.input_shape]
        if not shapes:
            dims = list(header.input_dim)
            shapes = [dims[i : i + 4] for i in range(0, len(dims), 4) if i + 4 <= len(dims)]
        if (header.input_shape or header.input_dim) and len(shapes) < len(header.input):
            raise self._refuse(
                pieces[0].line,
                f"{len(header.input)} inputs and {len(shapes)} shapes; give every input its shape",
            )
        first = next(p for p in self.root.pieces if p in pieces or p.name == "layer")
        if shapes:
            newline = "\r\n" if "\r\n" in self.text else "\n"
            tops = [f"  top: {quote(name)}" for name in header.input]
            dims_of = [" ".join(f"dim: {d}" for d in shape) for shape in shapes[: len(header.input)]]
            params = " ".join(f"shape {{ {dims} }}" for dims in dims_of)
            rows = ["{", '  name: "input"', '  type: "Input"', *tops, f"  input_param {{ {params} }}", "}"]
            self.root.insert(_Piece("layer", "layer ", newline.join(rows), first.lead, at=first.at), first)
            first.lead = newline
        for piece in pieces:
            self.root.remove(piece)
        self.changed = True

    def _batch_norms(self) -> None:
        """UpgradeNetBatchNorm: its three blobs are no parameters to be learnt."""
        for piece in self.root.all("layer"):
            tree = piece.field.value if piece.field is not None else None
            if not isinstance(tree, Message) or len(tree.all("param")) != 3:
                continue
            if [prototxt.unquote(f.value) for f in tree.all("type") if isinstance(f.value, str)] == [
                "BatchNorm"
            ]:
                for spec in self._inside(piece).all("param"):
                    for name in ("lr_mult", "decay_mult"):
                        self._set(self._inside(spec), name, "0")

    # ---- solvers ------------------------------------------------------------------------------------------

    def solver(self) -> None:
        """UpgradeSolverType."""
        message = caffe_pb2.SolverParameter()
        prototxt.to_message(
            Message([p.field for p in self.root.pieces if p.field is not None]), message, self.path
        )
        for piece in self.root.all("solver_type"):
            if message.HasField("type"):
                raise self._refuse(piece.line, "solver_type and type together; keep type, which Caffe reads")
            if message.HasField("solver_type"):
                piece.rename("type")
                piece.value = quote(_SOLVERS[message.solver_type])
                self.changed = True
