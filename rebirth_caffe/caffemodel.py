"""Weights files: binary NetParameter messages in current (``layer``), V1 or V0 (``layers``) storage; HDF5.

The wire format is scanned here rather than parsed by protobuf, which would turn every weight into a Python
float: blobs are numpy views of the file's own bytes, and what is not changed is written back as it was.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from .errors import WeightsError, by_x
from .schema import caffe_pb2

Array = NDArray[np.float32]
Shape = tuple[int, ...]

MAX_BYTES = 2**31 - 1  # of a message of protobuf, in Caffe and everywhere

# Field numbers of the schema that the scan needs (tests/test_schema.py holds the schema to real Caffe).
_NET_NAME, _NET_V1_LAYER, _NET_LAYER = 1, 2, 100
_LAYER_BOTTOM, _LAYER_TOP, _LAYER_BLOBS = 3, 4, 7
_NAME_TYPE_BLOBS = {"current": (1, 2, _LAYER_BLOBS), "V1": (4, 5, 6), "V0": (1, 2, 50)}
_V1_V0_LAYER = 1
_BLOB_LEGACY, _BLOB_DATA, _BLOB_SHAPE, _BLOB_DOUBLE = (1, 2, 3, 4), 5, 7, 8

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VALUES = {
    (_BLOB_DATA, _BYTES): "<f4",
    (_BLOB_DATA, _FIXED32): "<f4",
    (_BLOB_DOUBLE, _BYTES): "<f8",
    (_BLOB_DOUBLE, _FIXED64): "<f8",
}

# How Caffe names the V1 enum's types today.
V1_TYPES = {
    "ABSVAL": "AbsVal", "ACCURACY": "Accuracy", "ARGMAX": "ArgMax", "BNLL": "BNLL", "CONCAT": "Concat",
    "CONTRASTIVE_LOSS": "ContrastiveLoss", "CONVOLUTION": "Convolution", "DATA": "Data",
    "DECONVOLUTION": "Deconvolution", "DROPOUT": "Dropout", "DUMMY_DATA": "DummyData",
    "EUCLIDEAN_LOSS": "EuclideanLoss", "ELTWISE": "Eltwise", "EXP": "Exp", "FLATTEN": "Flatten",
    "HDF5_DATA": "HDF5Data", "HDF5_OUTPUT": "HDF5Output", "HINGE_LOSS": "HingeLoss", "IM2COL": "Im2col",
    "IMAGE_DATA": "ImageData", "INFOGAIN_LOSS": "InfogainLoss", "INNER_PRODUCT": "InnerProduct",
    "LRN": "LRN", "MEMORY_DATA": "MemoryData", "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss",
    "MVN": "MVN", "NONE": "", "POOLING": "Pooling", "POWER": "Power", "RELU": "ReLU", "SIGMOID": "Sigmoid",
    "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss", "SILENCE": "Silence", "SOFTMAX": "Softmax",
    "SOFTMAX_LOSS": "SoftmaxWithLoss", "SPLIT": "Split", "SLICE": "Slice", "TANH": "TanH",
    "WINDOW_DATA": "WindowData", "THRESHOLD": "Threshold",
}  # fmt: skip

# And what V1 calls the types of V0.
V0_TYPES = {
    "accuracy": "ACCURACY", "bnll": "BNLL", "concat": "CONCAT", "conv": "CONVOLUTION", "data": "DATA",
    "dropout": "DROPOUT", "euclidean_loss": "EUCLIDEAN_LOSS", "flatten": "FLATTEN", "hdf5_data": "HDF5_DATA",
    "hdf5_output": "HDF5_OUTPUT", "im2col": "IM2COL", "images": "IMAGE_DATA",
    "infogain_loss": "INFOGAIN_LOSS", "innerproduct": "INNER_PRODUCT", "lrn": "LRN",
    "multinomial_logistic_loss": "MULTINOMIAL_LOGISTIC_LOSS", "pool": "POOLING", "relu": "RELU",
    "sigmoid": "SIGMOID", "softmax": "SOFTMAX", "softmax_loss": "SOFTMAX_LOSS", "split": "SPLIT",
    "tanh": "TANH", "window_data": "WINDOW_DATA",
}  # fmt: skip

_HDF5 = b"\x89HDF\r\n\x1a\n"
_AGAIN = "damaged: copy or download it again"


class Blob:
    """A weight blob: its shape and its float32 values.

    Read from a file it keeps the BlobProto's bytes, so that writing it again changes nothing (legacy
    dimensions, double precision and diffs included).
    """

    def __init__(self, array: Array | None = None, *, raw: memoryview | None = None, where: str = "") -> None:
        self.raw = raw
        self.where = where
        if array is not None:
            self.array = np.asarray(array, dtype=np.float32, order="C")
            self.shape: Shape = self.array.shape
        else:
            self.shape, self._data = _read_blob(raw if raw is not None else memoryview(b""), where)

    @cached_property
    def array(self) -> Array:
        """The values, shaped; a read-only view of the file where it stores float32 in one piece.

        Doubles beyond float32 are infinite, as in Caffe.
        """
        with np.errstate(over="ignore"):
            parts = [np.frombuffer(data, dtype).astype(np.float32, copy=False) for data, dtype in self._data]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.float32)])
        return values.reshape(self.shape)

    def reshaped(self, shape: Shape) -> Array:
        """The values in ``shape``, which has the same count: legacy blobs are 4-D whatever their layer."""
        return self.array.reshape(shape)

    def wire(self) -> list[bytes | memoryview]:
        """The BlobProto's bytes, in pieces."""
        if self.raw is not None:
            return [self.raw]
        head = caffe_pb2.BlobProto(shape=caffe_pb2.BlobShape(dim=self.shape)).SerializeToString()
        data = self.array.reshape(-1).view(np.uint8).data
        return [head, _key(_BLOB_DATA, _BYTES) + _varint(len(data)), data]


@dataclass
class Record:
    """One layer of a weights file. ``raw`` holds its LayerParameter bytes in current storage only."""

    name: str
    type: str
    blobs: list[Blob]
    raw: memoryview | None = None

    def rewired(self, bottom: Iterable[str], top: Iterable[str]) -> Record:
        """This record on other blobs; whatever else its bytes hold, a fork's fields too, stays."""
        if self.raw is None:
            return self
        wiring = [(_LAYER_BOTTOM, name) for name in bottom] + [(_LAYER_TOP, name) for name in top]
        pieces: list[bytes | memoryview] = [_bytes_field(number, name.encode()) for number, name in wiring]
        for number, kind, value in _scan(self.raw, f"layer '{self.name}'"):
            if number not in (_LAYER_BOTTOM, _LAYER_TOP):
                pieces += _field(number, kind, value)
        return Record(self.name, self.type, self.blobs, memoryview(b"".join(pieces)))

    def fork_blobs(self, layer: Descriptor) -> dict[str, Blob]:
        """Weights outside ``blobs``, where a fork's LayerParameter has fields for them: name -> blob."""
        return dict(_fork_blobs(self.raw, layer, "")) if self.raw is not None else {}


def _fork_blobs(message: memoryview, descriptor: Descriptor, prefix: str) -> Iterator[tuple[str, Blob]]:
    """The BlobProtos among a message's fields and those of its sub-messages."""
    fields = {f.number: f for f in descriptor.fields if f.message_type is not None}
    count: dict[str, int] = {}
    for number, kind, value in _scan(message, prefix or "layer"):
        field = fields.get(number)
        if field is None or kind != _BYTES or (not prefix and number == _LAYER_BLOBS):
            continue
        assert field.message_type is not None
        name = prefix + field.name
        if field.message_type.name == "BlobProto":
            if field.is_repeated:
                count[name] = count.get(name, -1) + 1
                name = f"{name}[{count[name]}]"
            yield name, Blob(raw=value, where=name)
        elif not field.is_repeated:
            yield from _fork_blobs(value, field.message_type, f"{name}.")


@dataclass
class Weights:
    """A weights file: its layers in order, and the bytes it came from."""

    name: str
    records: list[Record]
    storage: str  # "current", "V1", "V0" or "HDF5"
    source: memoryview  # empty for HDF5

    def by_name(self) -> dict[str, Record]:
        """Layers by name; the last one wins, as when Caffe copies weights."""
        return {record.name: record for record in self.records}

    def skeleton(self, where: str) -> caffe_pb2.NetParameter:
        """The message that was read, without the blobs; in current, V1 or V0 storage."""
        pieces: list[bytes | memoryview] = []
        for number, kind, value in _scan(self.source, where):
            if number in (_NET_LAYER, _NET_V1_LAYER):
                body = _without_blobs(value, where, "current" if number == _NET_LAYER else "V1")
                pieces.append(_bytes_field(number, body))
            else:
                pieces += _field(number, kind, value)
        net = caffe_pb2.NetParameter()
        try:
            net.ParseFromString(b"".join(pieces))
        except DecodeError:
            raise WeightsError(f"{where}: not a caffemodel, or {_AGAIN}") from None
        return net


def read(path: Path | str) -> Weights:
    """Read a caffemodel, binary or HDF5. Raises WeightsError where it is not one, or is cut short."""
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe may never end
            raise WeightsError(f"{path}: is a pipe or a device; give a file that holds the weights")
        with path.open("rb") as file:
            if file.read(len(_HDF5)) == _HDF5:
                return _read_hdf5(path)
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise WeightsError(
                    f"{path}: {size / 1e9:.1f} GB; a binary caffemodel ends below 2 GB, in Caffe, too: "
                    "copy it again, or store it as HDF5 (.caffemodel.h5)"
                )
            file.seek(0)
            source = memoryview(file.read(MAX_BYTES + 1))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; check the path of the weights") from None
    except IsADirectoryError:
        raise WeightsError(f"{path}: is a directory; give the .caffemodel file in it") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    try:
        return _read(source, path)
    except WeightsError:
        if _is_text(source):
            what = "is text, not a caffemodel; the prototxt, or a download that failed?"
            raise WeightsError(f"{path}: {what} Give the binary file") from None
        raise


def _is_text(source: memoryview) -> bool:
    """Whether a file reads as text. A caffemodel never does: it starts with an unprintable byte."""
    start = bytes(source[:500])
    if not start.isascii():
        return False
    text = start.decode("ascii")
    return text[:1].isprintable() and text != "" and all(c.isprintable() or c.isspace() for c in text)


def _read(source: memoryview, path: Path) -> Weights:
    name, storage = "", "current"
    records: list[Record] = []
    for number, kind, value in _scan(source, str(path)):
        if number == _NET_NAME and kind == _BYTES:
            name = _text(value)
        elif number in (_NET_LAYER, _NET_V1_LAYER) and kind == _BYTES:
            kept = "current" if number == _NET_LAYER else "V1"
            record, found = _read_record(value, f"{path}: layer {len(records) + 1}", kept)
            storage = found if found != "current" else storage
            records.append(record)
        elif number in (_NET_NAME, _NET_LAYER, _NET_V1_LAYER):
            raise WeightsError(f"{path}: not a caffemodel; a mean file or a solver's state?")
    if not records:
        raise WeightsError(
            f"{path}: holds no layers; not a caffemodel, or an empty one: copy or download it again"
        )
    return Weights(name, records, storage, source)


def _read_record(message: memoryview, where: str, storage: str) -> tuple[Record, str]:
    """A layer and the storage it is in; the layer of V0 lies in one of V1, which then counts for nothing."""
    at_name, at_type, at_blobs = _NAME_TYPE_BLOBS[storage]
    record = Record("", "", [], message if storage == "current" else None)
    for number, kind, value in _scan(message, where):
        if storage == "V1" and number == _V1_V0_LAYER and kind == _BYTES:
            return _read_record(value, where, "V0")
        if number == at_name and kind == _BYTES:
            record.name = _text(value)
            where = f"{where} '{record.name}'"
        elif number == at_type and kind == _BYTES and storage != "V1":
            record.type = _text(value)
            if storage == "V0":
                record.type = V1_TYPES.get(V0_TYPES.get(record.type, ""), record.type)
        elif number == at_type and kind == _VARINT and storage == "V1":
            kinds = caffe_pb2.V1LayerParameter.LayerType
            known = int(value) in kinds.values()
            record.type = V1_TYPES[kinds.Name(int(value))] if known else ""
        elif number == at_blobs and kind == _BYTES:
            record.blobs.append(Blob(raw=value, where=f"{where} blob {len(record.blobs)}"))
    return record, storage


def _without_blobs(message: memoryview, where: str, storage: str) -> bytes:
    pieces: list[bytes | memoryview] = []
    for number, kind, value in _scan(message, where):
        if storage == "V1" and number == _V1_V0_LAYER and kind == _BYTES:
            pieces.append(_bytes_field(number, _without_blobs(value, where, "V0")))
        elif number != _NAME_TYPE_BLOBS[storage][2]:
            pieces += _field(number, kind, value)
    return b"".join(pieces)


def _read_blob(message: memoryview, where: str) -> tuple[Shape, list[tuple[memoryview | bytearray, str]]]:
    """A BlobProto's shape and the pieces of its data (packed or not) with their dtypes."""
    shape: Shape | None = None
    legacy: list[int] | None = None
    data: list[tuple[memoryview | bytearray, str]] = []
    for number, kind, value in _scan(message, where):
        if number == _BLOB_SHAPE and kind == _BYTES:
            proto = caffe_pb2.BlobShape()
            try:
                proto.ParseFromString(bytes(value))
            except Exception:
                raise WeightsError(f"{where}: broken shape; {_AGAIN}") from None
            shape = tuple(proto.dim)
        elif number in _BLOB_LEGACY and kind == _VARINT:
            legacy = legacy or [0, 0, 0, 0]
            legacy[number - 1] = int(value)
        elif (number, kind) in _VALUES:
            dtype = _VALUES[number, kind]
            if len(value) % int(dtype[-1]):
                raise WeightsError(f"{where}: {len(value)} bytes are no whole number of values; {_AGAIN}")
            if kind == _BYTES and len(value):
                data.append((value, dtype))
            elif data and data[-1][1] == dtype and isinstance(data[-1][0], bytearray):
                data[-1][0].extend(value)  # not packed: value by value
            else:
                data.append((bytearray(value), dtype))
    count = sum(len(piece) // int(dtype[-1]) for piece, dtype in data)
    if legacy:
        shape = tuple(legacy)
    elif shape is None:  # neither: Caffe writes no shape for a scalar
        shape = () if count else (0,)
    if any(d < 0 for d in shape) or math.prod(shape) != count:
        raise WeightsError(f"{where}: shape {by_x(shape)} but {count} values; {_AGAIN}")
    return shape, data


def write(path: Path, header: caffe_pb2.NetParameter, records: Iterable[tuple[bytes, Record]]) -> None:
    """Write a caffemodel in current storage: what the header says, and the layers.

    Each record comes with the LayerParameter bytes (without blobs) to write where it has none of its own.
    """
    pieces: list[bytes | memoryview] = [header.SerializePartialToString()]
    for head, record in records:
        if record.raw is not None:
            body: list[bytes | memoryview] = [record.raw]
        else:
            body = [head]
            for blob in record.blobs:
                wire = blob.wire()
                body += [_key(_LAYER_BLOBS, _BYTES) + _varint(_size(wire)), *wire]
        pieces += [_key(_NET_LAYER, _BYTES) + _varint(_size(body)), *body]
    total = _size(pieces)
    if total > MAX_BYTES:
        raise WeightsError(
            f"{path}: would be {total / 1e9:.1f} GB; a binary caffemodel ends below 2 GB, HDF5 does not"
        )
    with path.open("wb") as out:
        out.writelines(pieces)
        out.flush()
        os.fsync(out.fileno())


# ---- HDF5 -------------------------------------------------------------------------------------------------


def _read_hdf5(path: Path) -> Weights:
    from . import hdf5

    layers = hdf5.read(path).items()
    records = [Record(name, "", [Blob(array) for array in arrays]) for name, arrays in layers]
    return Weights(path.name.partition(".")[0], records, "HDF5", memoryview(b""))


def _shape_today(record: Record, index: int) -> Shape:
    """A blob's shape without the leading ones of old files, which Caffe takes in binary files only."""
    shape = record.blobs[index].shape
    axes = {"Convolution": (4, 1), "Deconvolution": (4, 1), "InnerProduct": (2, 1)}.get(record.type, ())
    if len(shape) == 4 and index < len(axes) and shape[: -axes[index]] == (1,) * (4 - axes[index]):
        return shape[-axes[index] :]
    return shape


def write_hdf5(path: Path, records: Sequence[Record]) -> None:
    """Write weights as Caffe's ToHDF5 does, which stores neither types nor a net's name."""
    from . import hdf5

    by_name = {record.name: record for record in records}
    hdf5.write(
        path,
        {
            name: [blob.reshaped(_shape_today(record, i)) for i, blob in enumerate(record.blobs)]
            for name, record in by_name.items()
        },
    )


# ---- wire format ------------------------------------------------------------------------------------------


def _scan(message: memoryview, where: str) -> Iterator[tuple[int, int, memoryview]]:
    """The fields of a message: number, wire type, and the value's bytes (of a varint: the number itself)."""
    at, end = 0, len(message)
    while at < end:
        key, at = _read_varint(message, at, where)
        number, kind = key >> 3, key & 7
        if not number:
            raise WeightsError(f"{where}: no field at byte {at}; not a caffemodel, or {_AGAIN}")
        if kind == _VARINT:
            value, at = _read_varint(message, at, where)
            yield number, kind, value  # type: ignore[misc]
            continue
        if kind == _BYTES:
            size, at = _read_varint(message, at, where)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise WeightsError(f"{where}: no field at byte {at}; not a caffemodel, or {_AGAIN}")
        if size > end - at:
            raise WeightsError(
                f"{where}: cut short: {size} bytes announced, {end - at} left; copy or download it again"
            )
        yield number, kind, message[at : at + size]
        at += size


def _read_varint(message: memoryview, at: int, where: str) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise WeightsError(f"{where}: cut short at byte {at}; copy or download it again")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise WeightsError(f"{where}: no number at byte {at}; not a caffemodel, or {_AGAIN}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, kind: int, value: memoryview | int) -> list[bytes | memoryview]:
    """A field as ``_scan`` gives it, on the wire again."""
    if isinstance(value, int):
        return [_key(number, kind) + _varint(value)]
    return [_key(number, kind) + (_varint(len(value)) if kind == _BYTES else b""), value]


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(value)) + value


def _size(pieces: Iterable[bytes | memoryview]) -> int:
    return sum(len(piece) for piece in pieces)


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")
