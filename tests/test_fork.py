"""A fork's caffe.proto: read as protoc reads it, and what the tool learns from it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from rebirth_caffe import caffemodel, schema
from rebirth_caffe.errors import PrototxtError
from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.schema import caffe_pb2, fork
from tests.test_rebirth_net import bad, good
from tests.test_schema import file_facts

STOCK = (Path(schema.__file__).parent / "caffe.proto").read_text()
EXTENSION = "extend LayerParameter { optional int32 extra = 100; }"
SERVICE = "service Nothing { rpc Do(BlobProto) returns (BlobProto) { option x = 1; } }"
FORK = STOCK.replace(
    "message LayerParameter {",
    f"""/* A normalisation that keeps its weights to itself,
   and what proto2 has besides. */
message NormParameter {{
  optional float momentum = 1 [default = .9, deprecated = true];  // of the average
  optional BlobProto mean = 2;
  repeated BlobProto scale = 3;
  enum Mode {{ LEARN = 0; INFERENCE = 0x1; option allow_alias = true; ALSO = 1 [(mine) = 2]; }}
  optional Mode mode = 4 [default = INFERENCE];
  optional .caffe.NormParameter inner = 5;
  optional string why = 6 [default = "it's \\"so\\""];
  optional double least = 7 [default = -inf];
  optional int64 mask = 8 [default = -0x10];
  optional bytes mark = 12 [default = "\\xfe\\0\\"a"];
  repeated int32 sizes = 9 [packed = true];
  oneof kind {{ int32 small = 10; NormParameter other = 11; }}
  reserved 20 to 30, 40;
  extensions 100 to max;
  message Empty {{}};
  {EXTENSION}
}}
{SERVICE}
option java_package = "none";

message LayerParameter {{
  optional NormParameter norm_param = 201;""",
)
NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "c" type: "Convolution" bottom: "data" top: "c"
  convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "d" type: "Dropout" bottom: "c" top: "d" }
layer { name: "n" type: "Norm" bottom: "d" top: "n" norm_param { mode: INFERENCE momentum: 0.5 } }
layer { name: "fc" type: "InnerProduct" bottom: "n" top: "fc" inner_product_param { num_output: 2 } }
"""


def protocs(text: str, folder: Path) -> dict[str, Any]:
    """What protoc makes of a .proto file."""
    (folder / "fork.proto").write_text(text)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={folder}/out"]
    subprocess.run([*command, "fork.proto"], check=True)
    (file,) = FileDescriptorSet.FromString((folder / "out").read_bytes()).file
    return file_facts(file)


def test_it_is_read_as_protoc_reads_it(tmp_path):
    plain = FORK  # without what is passed over and protoc has to know more of
    for line in ("[(mine) = 2]", EXTENSION, SERVICE):
        assert line in plain
        plain = plain.replace(line, "")
    wanted = protocs(plain, tmp_path)
    (tmp_path / "mine.proto").write_text(FORK)
    loaded = fork.load(tmp_path / "mine.proto")
    found = file_facts(FileDescriptorProto.FromString(loaded.descriptor.file.serialized_pb))
    assert len(found) > 500
    assert found == wanted


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("message LayerParameter {", "message OneLayer {", "does not fit together: "),
        (
            "package caffe;",
            "package caffe; service A { message LayerParameter { ",
            "the file ends inside 'service'",
        ),
        ("optional string name = 1;", "optional string name 1;", "expected '=', found '1'"),
        ("optional string name = 1;", "optional string name = one;", "expected a number, found 'one'"),
        ("optional string name = 1;", "string name = 1;", "'string' cannot stand here; not proto2?"),
        ("optional string name = 1;", "optional Nonsense name = 1;", "does not fit together: "),
        ("package caffe;", 'package caffe; import "other.proto";', "imports another file"),
        ("package caffe;", "package caffe; @", "'@' cannot stand here; not a .proto file"),
        ("package caffe;", "package caffe; \0", ": binary data, not a .proto"),
        ("package caffe;", "message A {" * 200_000, "messages nested more than 100 deep"),
        ("package caffe;", "x" * 2**24, "larger than 16 MB; not a .proto"),
        ("optional string name = 1;", "optional string name = 1.5;", "'1.5' is no number of a field"),
        ("optional string name = 1;", "optional string name = 4294967296;", "'4294967296' is no number of"),
        ("optional string name = 1;", "optional string name = 09;", "'09' is no number of a field"),
    ],
)
def test_what_is_none_is_refused_in_one_line(old, new, message, tmp_path):
    assert old in STOCK
    path = tmp_path / "fork.proto"
    path.write_text(STOCK.replace(old, new, 1))
    with pytest.raises(PrototxtError) as error:
        fork.load(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    assert message in str(error.value)


def test_a_file_cut_short_is_refused_wherever_the_cut_is(tmp_path):
    """At every word."""
    text = FORK[FORK.index("message NormParameter") : FORK.index("service")].replace("caffe.", "")
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    for end in ends[:-1]:
        with pytest.raises(PrototxtError):
            fork.parse(text[:end])


@pytest.fixture
def files(tmp_path):
    """A net of the fork, its schema, and weights of which some are in the fork's own fields."""
    (tmp_path / "fork.proto").write_text(FORK)
    (tmp_path / "net.prototxt").write_text(NET)
    message = fork.load(tmp_path / "fork.proto").layer
    records = []
    for layer in Net.parse(NET).layers:
        one: Any = message(name=layer.name, type=layer.type, bottom=layer.bottom, top=layer.top)
        if layer.name == "c":
            for shape in ((4, 3, 3, 3), (4,)):
                one.blobs.add(data=np.ones(shape, "f4").reshape(-1)).shape.dim.extend(shape)
        if layer.name == "n":
            one.blobs.add(data=[7]).shape.dim.append(1)
            one.norm_param.mean.data.extend([1, 2, 3, 4])
            one.norm_param.mean.shape.dim.append(4)
            one.norm_param.scale.add(data=[5]).shape.dim.append(1)
            one.norm_param.scale.add(data=[6]).shape.dim.append(1)
        raw = memoryview(one.SerializeToString())
        records.append((b"", caffemodel.Record(layer.name, layer.type, [], raw)))
    caffemodel.write(tmp_path / "net.caffemodel", caffe_pb2.NetParameter(name="net"), records)
    return tmp_path


@pytest.mark.parametrize("proto", [None, "fork.proto"])
def test_weights_in_a_forks_own_fields_are_kept(proto, files):
    """Also where the layer has to read another blob, since a Dropout below it has gone."""
    result = rebirth(
        files / "net.prototxt", files / "net.caffemodel", proto=proto and files / proto, exact=True
    )
    result.write(files / "out")
    message: Any = fork.load(files / "fork.proto").layer
    before, after = (
        message.FromString(bytes(record.raw or b""))
        for path in ("net.caffemodel", "out/weights.caffemodel")
        for record in caffemodel.read(files / path).records
        if record.name == "n"
    )
    assert (list(before.bottom), list(after.bottom)) == (["d"], ["c"])
    before.bottom[:] = ["c"]
    assert after == before
    blobs = {"norm_param.mean": (4,), "norm_param.scale[0]": (1,), "norm_param.scale[1]": (1,)}
    assert result.fork_weights == ({"n": blobs} if proto else {})


def test_the_command_knows_a_forks_fields_once_taught(files):
    said = good("net.prototxt", "--proto", "fork.proto", "--weights", "net.caffemodel", cwd=files)
    assert "weights in the fork's own fields, kept as they are: n norm_param.mean (4)," in said
    (files / "typo.prototxt").write_text(NET.replace("momentum: 0.5", "momentum: fast"))
    good("typo.prototxt", "--out", "untaught", cwd=files)
    assert bad("typo.prototxt", "--proto", "fork.proto", cwd=files) == (
        "typo.prototxt:6: momentum: expected a number, found fast"
    )
    (files / "kind.prototxt").write_text(NET.replace("momentum: 0.5", "sizes: big"))
    assert bad("kind.prototxt", "--proto", "fork.proto", cwd=files) == (
        "kind.prototxt:6: sizes: expected an integer, found big"
    )
    assert bad("net.prototxt", "--proto", "none.proto", cwd=files) == (
        "none.proto: no such file; check the path"
    )


def test_what_is_written_without_the_files_own_bytes_has_its_forks_fields(files):
    """It is made from the prototxt, by the fork's schema."""
    schema_ = fork.load(files / "fork.proto")
    net = Net.load(files / "net.prototxt", files / "net.caffemodel", schema=schema_)
    layer = net.layer("n")
    layer.record = caffemodel.Record("n", "Norm", layer.blobs)
    net.write_weights(files / "new.caffemodel")
    raw = {record.name: record.raw for record in caffemodel.read(files / "new.caffemodel").records}
    written: Any = schema_.layer.FromString(bytes(raw["n"] or b""))
    assert (written.norm_param.mode, written.norm_param.momentum) == (1, 0.5)
    assert list(written.blobs[0].data) == [7]
