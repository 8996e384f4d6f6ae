"""Weights files: binary NetParameter messages, in current (``layer``) and V1 (``layers``) storage.

The wire format is scanned here rather than parsed by protobuf, which would turn every weight into a Python
float: blobs are numpy views of the file's own bytes, and what is not changed is written back as it was.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import WeightsError
from .schema import caffe_pb2

Array = NDArray[np.float32]
Shape = tuple[int, ...]

# Field numbers of the schema that the scan needs (tests/test_schema.py holds the schema to real Caffe).
_NET_NAME, _NET_V1_LAYER, _NET_LAYER = 1, 2, 100
_LAYER_NAME, _LAYER_TYPE, _LAYER_BLOBS = 1, 2, 7
_V1_NAME, _V1_TYPE, _V1_BLOBS = 4, 5, 6
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
        """The values, shaped; a read-only view of the file where it stores float32 in one piece."""
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


@dataclass
class Weights:
    """A weights file: its layers in order, and the bytes it came from."""

    name: str
    records: list[Record]
    storage: str  # "current" or "V1"
    source: memoryview

    def by_name(self) -> dict[str, Record]:
        """Layers by name; the last one wins, as when Caffe copies weights."""
        return {record.name: record for record in self.records}

    def write(self, path: Path) -> None:
        """Write the file as it was read."""
        path.write_bytes(self.source)


def read(path: Path | str) -> Weights:
    """Read a binary caffemodel. Raises WeightsError where it is not one, or is cut short."""
    path = Path(path)
    try:
        source = memoryview(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; check the path of the weights") from None
    except IsADirectoryError:
        raise WeightsError(f"{path}: is a directory; give the .caffemodel file in it") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    if bytes(source[:8]) == b"\x89HDF\r\n\x1a\n":
        raise WeightsError(f"{path}: HDF5 weights; convert them to a binary .caffemodel with Caffe first")
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
            v1 = number == _NET_V1_LAYER
            storage = "V1" if v1 else storage
            records.append(_read_record(value, f"{path}: layer {len(records) + 1}", v1))
        elif number in (_NET_NAME, _NET_LAYER, _NET_V1_LAYER):
            raise WeightsError(f"{path}: not a caffemodel; a mean file or a solver's state?")
    if not records:
        raise WeightsError(
            f"{path}: holds no layers; not a caffemodel, or an empty one: copy or download it again"
        )
    return Weights(name, records, storage, source)


def _read_record(message: memoryview, where: str, v1: bool) -> Record:
    at_name, at_type, at_blobs = (
        (_V1_NAME, _V1_TYPE, _V1_BLOBS) if v1 else (_LAYER_NAME, _LAYER_TYPE, _LAYER_BLOBS)
    )
    record = Record("", "", [], None if v1 else message)
    for number, kind, value in _scan(message, where):
        if number == at_name and kind == _BYTES:
            record.name = _text(value)
            where = f"{where} '{record.name}'"
        elif number == at_type and kind == _BYTES and not v1:
            record.type = _text(value)
        elif number == at_type and kind == _VARINT and v1:
            kinds = caffe_pb2.V1LayerParameter.LayerType
            known = int(value) in kinds.values()
            record.type = V1_TYPES[kinds.Name(int(value))] if known else ""
        elif number == at_blobs and kind == _BYTES:
            record.blobs.append(Blob(raw=value, where=f"{where} blob {len(record.blobs)}"))
    return record


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
        raise WeightsError(f"{where}: shape {'x'.join(map(str, shape))} but {count} values; {_AGAIN}")
    return shape, data


def write(path: Path, net_name: str, records: Iterable[tuple[bytes, Record]]) -> None:
    """Write a caffemodel in current storage.

    Each record comes with the LayerParameter bytes (without blobs) to write where it has none of its own.
    """
    pieces: list[bytes | memoryview] = [_bytes_field(_NET_NAME, net_name.encode())]
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
    if total >= 2**31:
        raise WeightsError(f"{path}: {total} bytes; a caffemodel cannot hold 2 GB or more")
    with path.open("wb") as out:
        out.writelines(pieces)
        out.flush()
        os.fsync(out.fileno())


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


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(value)) + value


def _size(pieces: Iterable[bytes | memoryview]) -> int:
    return sum(len(piece) for piece in pieces)


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")
