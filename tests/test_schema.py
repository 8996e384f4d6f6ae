"""Our text of Caffe's wire facts against the descriptor that real Caffe runs with."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from rebirth_caffe import schema
from rebirth_caffe.caffemodel import V1_TYPES
from rebirth_caffe.schema import caffe_pb2

SCHEMA = Path(schema.__file__).parent


def enum_facts(name: str, enums: Iterable[EnumDescriptorProto]) -> Iterator[tuple[str, Any]]:
    for enum in enums:
        yield f"{name}.{enum.name}", [(value.name, value.number) for value in enum.value]


def facts(name: str, messages: Iterable[DescriptorProto]) -> Iterator[tuple[str, Any]]:
    """Every fact under a path: message, field or enum."""
    for message in messages:
        path = f"{name}.{message.name}"
        yield path, sorted(field.name for field in message.field)
        for field in message.field:
            label = FieldDescriptorProto.Label.Name(field.label)
            kind = FieldDescriptorProto.Type.Name(field.type)
            default: Any = field.default_value if field.HasField("default_value") else None
            if default and kind in ("TYPE_FLOAT", "TYPE_DOUBLE"):
                default = float(np.float32(default))
            packed = field.options.packed
            yield f"{path}.{field.name}", (field.number, label, kind, field.type_name, default, packed)
        yield from enum_facts(path, message.enum_type)
        yield from facts(path, message.nested_type)


def file_facts(file: FileDescriptorProto) -> dict[str, Any]:
    found = dict(facts(file.package, file.message_type))
    found.update(enum_facts(file.package, file.enum_type))
    return {**found, "package": file.package, "syntax": file.syntax or "proto2"}


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return file_facts(FileDescriptorProto.FromString(caffe_pb2.DESCRIPTOR.serialized_pb))


def test_nothing_is_missing_and_nothing_differs_from_real_caffe(ours, in_caffe):
    said = in_caffe("result = caffe.proto.caffe_pb2.DESCRIPTOR.serialized_pb.hex()")
    caffes = file_facts(FileDescriptorProto.FromString(bytes.fromhex(said)))
    assert len(caffes) > 500
    differs = {
        path: (caffes.get(path, "not in Caffe"), ours.get(path, "not in our schema"))
        for path in sorted(caffes.keys() | ours.keys())
        if caffes.get(path) != ours.get(path)
    }
    assert not differs


def test_the_generated_files_are_current(ours, tmp_path):
    outputs = [f"--descriptor_set_out={tmp_path}/descriptor", f"--pyi_out={tmp_path}"]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={SCHEMA}"]
    subprocess.run([*protoc, *outputs, "caffe.proto"], check=True)
    (current,) = FileDescriptorSet.FromString((tmp_path / "descriptor").read_bytes()).file
    assert file_facts(current) == ours
    stub = "caffe_pb2.pyi"
    assert (tmp_path / stub).read_text(encoding="utf-8") == (SCHEMA / stub).read_text(encoding="utf-8")


def test_every_v1_type_has_its_name_of_today(in_caffe):
    known = set(in_caffe("result = list(caffe.layer_type_list())"))
    assert V1_TYPES.keys() == set(caffe_pb2.V1LayerParameter.LayerType.keys())
    assert set(V1_TYPES.values()) - known == {""}
