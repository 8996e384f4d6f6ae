"""Old nets in today's format: message for message what real Caffe makes of them, with every comment."""

import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor

from rebirth_caffe import caffemodel, prototxt
from rebirth_caffe.caffemodel import V0_TYPES
from rebirth_caffe.engines.caffe import Caffe
from rebirth_caffe.errors import NetError, PrototxtError
from rebirth_caffe.net import Net
from rebirth_caffe.schema import caffe_pb2
from rebirth_caffe.upgrade import upgrade, upgrade_weights
from tests.conftest import missing

Tool = Callable[[str, Path, Path], None]

# Nets of every era and quirk; each is taken by Caffe's own commands.
ERAS = {path.stem: prototxt.read_text(path) for path in sorted((Path(__file__).parent / "eras").iterdir())}
INPUTS = [text for name, text in ERAS.items() if name.startswith("input")]


@pytest.fixture(scope="session")
def real(caffe: Caffe) -> Tool:
    """Caffe's own upgrade commands. They warn about what they drop with a status of 1, having written."""
    if caffe.binary is None or not caffe.binary.with_name("upgrade_net_proto_text").exists():
        missing("Caffe's upgrade commands are not beside its binary; run tools/install_caffe.sh")

    def run(what: str, source: Path, target: Path) -> None:
        assert caffe.binary is not None
        command = [caffe.binary.with_name(f"upgrade_{what}"), source, target]
        subprocess.run(command, capture_output=True, check=False)

    return run


def by_caffe(real: Tool, text: str, folder: Path) -> caffe_pb2.NetParameter:
    """What Caffe's command makes of a text; AssertionError where it refuses."""
    source, target = folder / "in.prototxt", folder / "out.prototxt"
    source.write_bytes(prototxt.encode(text))
    real("net_proto_text", source, target)
    assert target.exists(), "Caffe refuses it"
    return text_format.Parse(target.read_text(), caffe_pb2.NetParameter())


def message(text: str) -> caffe_pb2.NetParameter:
    found = caffe_pb2.NetParameter()
    assert prototxt.to_message(prototxt.parse(text), found) == []
    return found


def filled(message: Any, choose: random.Random, depth: int = 0) -> None:
    """Give some of a message's fields values."""
    for f in message.DESCRIPTOR.fields:
        if choose.random() < 0.6 or f.name in ("blobs", "layer", "type", "bottom", "top"):
            continue
        for _ in range(choose.randint(1, 3) if f.is_repeated else 1):
            if f.message_type is not None:
                target = getattr(message, f.name)
                filled(target.add() if f.is_repeated else target, choose, depth + 1)
                if not f.is_repeated:
                    target.SetInParent()
                continue
            value: Any = choose.randint(0, 1000)
            if f.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
                assert f.enum_type is not None
                value = choose.choice(list(f.enum_type.values_by_number))
            elif f.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
                value = choose.choice([0.0, 1.0, -0.5, 1e-8, 0.1, 12345678.0, float("inf")])
            elif f.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
                value = choose.random() < 0.5
            elif f.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                value = choose.choice(["a", "", "b/c", "é\"'\n\t", "# no comment", "}"])
            if f.is_repeated:
                getattr(message, f.name).append(value)
            else:
                setattr(message, f.name, value)


def old_net(seed: int, era: str) -> caffe_pb2.NetParameter:
    """A net with several layers of every type of an era, with anything in them, and with weights."""
    choose = random.Random(seed)
    net = caffe_pb2.NetParameter(name="random", input=["in"], input_dim=[1, 2, 3, 4])
    blobs = ["in"]
    for kind in list(V0_TYPES if era == "V0" else caffe_pb2.V1LayerParameter.LayerType.keys()) * 3:
        layer = net.layers.add(
            bottom=choose.choices(blobs, k=choose.randint(0, 2)), top=[f"blob{len(blobs)}"]
        )
        blobs.append(layer.top[0])
        inner: Any = layer.layer if era == "V0" else layer
        filled(inner, choose)
        inner.type = kind if era == "V0" else caffe_pb2.V1LayerParameter.LayerType.Value(kind)
        if choose.random() < 0.5:
            inner.blobs.add(data=[1.5, 2.5], num=1, channels=1, height=1, width=2)
    return net


# ---- as Caffe does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ERAS.values(), ids=ERAS.keys())
def test_a_text_becomes_what_caffe_makes_of_it(text, real, tmp_path):
    assert message(upgrade(text).text) == by_caffe(real, text, tmp_path)


@pytest.mark.parametrize("era", ["V0", "V1"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_net_of_every_type_with_anything_in_it_becomes_what_caffe_makes_of_it(era, seed, real, tmp_path):
    net = old_net(seed, era)
    for layer in net.layers:
        del layer.blobs[:], layer.layer.blobs[:]
        if era == "V1":
            layer.ClearField("layer")
    text = text_format.MessageToString(net)
    assert message(upgrade(text).text) == by_caffe(real, text, tmp_path)
    one_line = text_format.MessageToString(net, as_one_line=True, use_short_repeated_primitives=True)
    assert message(upgrade(one_line).text) == message(upgrade(text).text)


@pytest.mark.parametrize("era", ["V0", "V1", "current"])
def test_weights_become_what_caffe_makes_of_them(era, real, tmp_path):
    net = old_net(3, era)
    if era == "current":
        net = message(ERAS["batch_norm"])
        net.layer[1].blobs.add(data=[1, 2]).shape.dim.append(2)
    elif era == "V0":
        net.layers.add(bottom=["in"], top=["padded"]).layer.type = "padding"
        conv = net.layers.add(bottom=["padded"], top=["conv"]).layer
        conv.type = "conv"
        conv.blobs.add(data=[7], num=1, channels=1, height=1, width=1)
    source, wanted, found = (tmp_path / name for name in ("in.caffemodel", "caffes", "ours"))
    source.write_bytes(net.SerializeToString())
    real("net_proto_binary", source, wanted)
    caffemodel.write(found, *upgrade_weights(caffemodel.read(source), source))
    ours = caffe_pb2.NetParameter.FromString(found.read_bytes())
    assert ours == caffe_pb2.NetParameter.FromString(wanted.read_bytes())
    assert sum(len(layer.blobs) for layer in ours.layer) > 0


SOLVERS = ["SGD", "NESTEROV", "ADAGRAD", "RMSPROP", "ADADELTA", "ADAM", "3"]


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_solver_becomes_what_caffe_makes_of_it(kind, real, tmp_path):
    text = f'net: "x" # here\nsolver_type: {kind}  # old\nbase_lr: 0.1\nsnapshot_prefix: "p"\n'
    (tmp_path / "in").write_text(text)
    real("solver_proto_text", tmp_path / "in", tmp_path / "out")
    found = caffe_pb2.SolverParameter()
    new = upgrade(text).text
    prototxt.to_message(prototxt.parse(new), found)
    assert found == text_format.Parse((tmp_path / "out").read_text(), caffe_pb2.SolverParameter())
    assert new == text.replace(f"solver_type: {kind}", f'type: "{found.type}"')


# ---- for the reader ---------------------------------------------------------------------------------------


def test_a_file_of_2014_keeps_its_layout():
    v1 = ERAS["v1"]
    text = v1[v1.index('layers {\n  name: "conv1"') : v1.index('layers { name: "none"')]
    assert upgrade(text).text == """layer {
  name: "conv1"
  type: "Convolution"   # the kind
  bottom: "data"
  top: "conv1"
  param { name: "shared_w" share_mode: PERMISSIVE lr_mult: 1 decay_mult: 1 }
  param { name: "shared_b" lr_mult: 2 decay_mult: 0 }
  param { decay_mult: 3 }
  # weights
  # bias
  # no decay for the bias
  convolution_param { num_output: 20 kernel_size: 5 weight_filler { type: "xavier" } }
  loss_weight: 0.5 # odd
}
"""  # fmt: skip


def test_a_file_of_2013_keeps_its_layout():
    new = upgrade(ERAS["v0"]).text
    assert new.startswith("""# a net of 2013
name: "old"  # its name
layer {
  name: "input"
  type: "Input"
  top: "data"
  input_param { shape { dim: 10 dim: 3 dim: 27 dim: 27 } }
}
# batch
# the first
layer { # opening
  # inside
  # deeper
  name: "conv1"   # no pad of its own
  type: "Convolution"
  convolution_param {
    num_output: 8  # filters
    # how large
    kernel_size: 3
    stride: 2
    weight_filler { # like this
      type: "gaussian"
      std: 0.01 # small
    }
    bias_filler { type: "constant" value: 0. }
    pad: 2
  }
  param { lr_mult: 1. decay_mult: 1. }
  param { lr_mult: 2. decay_mult: 0. }
  # weights
  # bias
  # closed
  bottom: "data"
  top: "conv1"
} # done
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
""")
    assert new.endswith('layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }\n# the end\n')


@pytest.mark.parametrize("text", ERAS.values(), ids=ERAS.keys())
def test_no_comment_is_lost_and_a_second_upgrade_changes_nothing(text):
    new = upgrade(text).text
    assert sorted(prototxt.comments(new)) == sorted(prototxt.comments(text))
    assert upgrade(new).text == new
    assert new == text or "\r\n" not in text or new.count("\r\n") == new.count("\n")


@pytest.mark.parametrize("text", [ERAS["v0"], ERAS["v1"], *INPUTS])
def test_every_field_that_survives_knows_its_line_in_the_original(text):
    lines = text.split("\n")
    upgraded = upgrade(text)
    survivors = ("top", "stride", "weight_filler", "std", "source", "num_output", "batch_size", "lr_mult")
    checked = [f for f in upgraded.tree("f").walk() if f.name in survivors]
    for f in checked:
        assert f.name.partition("_")[0] in lines[f.line - 1] or str(f.value) in lines[f.line - 1], f
    assert len(checked) > 15 or text not in (ERAS["v0"], ERAS["v1"])


def test_fields_of_forks_survive():
    text = """layers { name: "a" type: UPSAMPLE upsample_param { scale: 2 # two
  } bottom: "x" fork_flag: [1, 2] }
layers { name: "b" type: CONVOLUTION convolution_param { wino: true num_output: 3 } blobs_lr: 0 }
fork_option: 3
"""
    upgraded = upgrade(text, "f")
    assert upgraded.text == """layer { name: "a" type: "UPSAMPLE" upsample_param { scale: 2 # two
  } bottom: "x" fork_flag: 1 fork_flag: 2 }
layer { name: "b" type: "Convolution" convolution_param { wino: true num_output: 3 } param { lr_mult: 0 } }
fork_option: 3
"""  # fmt: skip
    assert upgraded.notes == ["f:1: type UPSAMPLE is not Caffe's; what it is called today, only you know"]


def test_what_is_dropped_is_told():
    dropped = [
        (3, "a layer of type 'data'", "det_crop_mode new_num"),
        (12, "a layer of type 'relu'", "num_output kernelsize pool hdf5_output_param"),
        (13, "layers { } around a layer { }", "name type"),
        (13, "a layer of type ''", "num_output"),
        (16, "a file with layers of 2013", "state"),
        (17, "a file with layers of 2013", "debug_info"),
    ]
    wanted = [
        f"f:{line}: {name} is dropped: Caffe does not read it in {where}"
        for line, where, names in dropped
        for name in names.split()
    ]
    assert upgrade(ERAS["v0_data"], "f").notes == wanted


# ---- in the tools -----------------------------------------------------------------------------------------


def test_an_old_net_is_read_as_it_is(tmp_path, real):
    """Layers, and lines in messages."""
    path = tmp_path / "old.prototxt"
    path.write_text(ERAS["v0"])
    net = Net.load(path)
    assert [layer.param for layer in net.layers] == list(by_caffe(real, ERAS["v0"], tmp_path).layer)
    where = {layer.name: layer.line for layer in net.layers}
    assert ERAS["v0"].split("\n")[where["relu1"] - 1].startswith('layers { layer { name: "relu1"')
    with pytest.raises(PrototxtError, match=r"f:2: num_output: -1 is outside"):
        Net.parse('layers { layer { name: "a" type: "conv"\n num_output: -1 } }', "f")


def test_a_current_net_with_inputs_is_not_touched():
    for text in (ERAS["input_shape"], ERAS["input_dim_late"], ERAS["batch_norm"]):
        assert Net.parse(text).text() == text


# ---- what cannot be upgraded ------------------------------------------------------------------------------

BROKEN = [
    (
        "layer { }\n\nlayers { }",
        "f:3: layers { } in line 3 and layer { } in line 1: Caffe reads only one kind",
    ),
    ("layers { }\nlayer { }", "f:2: layers { } in line 1 and layer { } in line 2: "),
    (
        "layers { layer { } }\nlayers { }",
        "f:2: layers { } without the layer { } inside that those in line 1 ",
    ),
    ('layers { layer { type: "unheard" } }', "f:1: type 'unheard' is none of 2013's"),
    ('layers { layer { } bottom: "x" }', "f:1: bottom 'x' is the top of no layer above it"),
    (
        'layers { layer { type: "padding" } top: "p" }\nlayers { layer { type: "relu" } bottom: "p" }',
        "f:2: reads the padding layer '', which only a conv or pool with a single bottom can",
    ),
    (
        'input: "x"\nlayers { layer { type: "padding" } bottom: "x" top: "p" top: "q" }\n'
        'layers { layer { type: "conv" } bottom: "p" }',
        "f:3: reads the padding layer",
    ),
    ("layers: 3", "f:1: write each layer as layers { ... }"),
    ('input: "a" input: "b" input_shape { }\nlayer { }', "f:1: 2 inputs and 1 shapes; give every input its"),
    ('input: "a" input_dim: 1 input_dim: 2 input_dim: 3\nlayer { }', "f:1: 1 inputs and 0 shapes"),
    ('base_lr: 1\nsolver_type: ADAM\ntype: "SGD"', "f:2: solver_type and type together"),
    ("layers { blobs_lr: x }", "f:1: blobs_lr: expected a number"),
    ("layers { param { lr_mult: 1 } }", "f:1: param holds a single value"),
    ("layer { top: x }", "f:1: top: expected a quoted string"),
]


@pytest.mark.parametrize(("text", "said"), BROKEN)
def test_what_caffe_refuses_or_reads_in_part_is_refused(text, said):
    with pytest.raises((NetError, PrototxtError)) as caught:
        upgrade(text, "f")
    assert str(caught.value).startswith(said)
    assert re.match(r"f:\d+: ", str(caught.value))
