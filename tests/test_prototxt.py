"""Prototxt text: nothing lost, the same values as in Caffe's own parser, and errors that say where."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebirth_caffe.errors import NetError, PrototxtError
from rebirth_caffe.net import Layer, Net
from rebirth_caffe.prototxt import (
    Field,
    Message,
    encode,
    number,
    parse,
    quote,
    read_text,
    render,
    to_message,
    unquote,
)
from rebirth_caffe.schema import caffe_pb2

ZOO = Path(__file__).parent.parent / "prototxts"
FILES = sorted(ZOO.glob("*/*.prototxt"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]


def shape(tree: Message) -> list[object]:
    """A tree without its places in the text, to be compared."""
    return [(f.name, shape(f.value) if isinstance(f.value, Message) else f.value) for f in tree.fields]


# ---- what is written is what was read ---------------------------------------------------------------------

# Each is taken by Caffe's parser, too (test_awkward_syntax_reads_as_in_caffe).
AWKWARD = {
    "plain": 'name: "x"\nlayer { name: "a" type: "Input" top: "a" }\n',
    "no newline at the end": 'layer { name: "a" type: "Input" top: "a" }',
    "crlf": 'name: "x"\r\n# c\r\nlayer {\r\n  name: "a" # c\r\n  type: "Input"\r\n  top: "a"\r\n'
    "  input_param { shape { dim: 1 } }\r\n}\r\n",
    "comments everywhere": '# above\nname # c\n: # c\n"x" # c\n\n#\n#}\nlayer # c\n{ # {\n name: "#a" # "c\n'
    ' type: "Input" top: "#a" # c\n input_param { shape { dim: 1 } # c\n } # c\n # last\n} # behind\n# end',
    "comments like text": 'layer { type: "Input" name: "a" top: "a" } # a; b] c,\n# d, e ] };\n\n# ;\n'
    'layer { type: "Silence" name: "b" bottom: "a" } # end ;',
    "separators": 'name: ";";layer { name: "a", type: "Input"; top: "a"; input_param { shape { }, }; };'
    'layer { name: "b" type: "Power" bottom: "a" top: "b", power_param { power: 2 } }\n,\n'
    'layer { name: "c" type: "Power" bottom: "b" top: "c" } # behind\n# above\n; # behind\n'
    'layer { name: "d" type: "Power" bottom: "c" top: "d" }',
    "angle brackets": 'layer: < name: "a" type: "Input" top: "a" input_param < shape: { dim: 1 } > >\n',
    "lists": 'layer { name: "a" type: "Input" top: ["a", "b"] loss_weight: []\n'
    "  input_param { shape: [{ dim: [1, 2] }, < dim: [] >] } }\n"
    'layer { name: "e" type: "Concat" bottom: ["a"] top: "e" }\n'
    'layer { name: "s" type: "Silence" bottom: "b" }',
    "strings": "layer { name: 'a \"b\"' type: \"In\" 'put' # \"c\"\n"
    " \"\" top: 'a' \"\\'\" '\\\"b\\\\\\n\\t\\101\\x42' }\n"
    'layer { name: "\\303\\xa9 \\u00e9\\U0001F600\\?\\a" type: "Silence" bottom: "a\\47\\"b\\\\\\n\\tAB" }',
    "numbers": 'layer { name: "a" type: "Input" top: "a" input_param { shape { dim: 0x1F dim: 017 } } }\n'
    'layer { name: "b" type: "Power" bottom: "a" top: "b"\n'
    "  power_param { power: 1. scale: -.5f shift: 1e-3F } }\n"
    'layer { name: "c" type: "Power" bottom: "b" top: "c"\n'
    "  power_param { power: - # c\n 2 scale: -inf shift: nan } }\n"
    'layer { name: "d" type: "Exp" bottom: "c" top: "d"\n'
    "  exp_param { base: -1 scale: 16777217 shift: 5E+2 } }\n"
    'layer { name: "e" type: "Log" bottom: "d" top: "e" log_param { base: 2 scale: 1e39 shift: 1e-50 } }\n'
    'layer { name: "f" type: "Reduction" bottom: "e" top: "f" reduction_param { axis: -0x2 coeff: 0.1 } }',
    "words": 'layer { name: "a" type: "Input" top: "a" phase: 1 input_param { shape { dim: 1 dim: 1 } } }\n'
    'layer { name: "b" type: "Power" bottom: "a" top: "b" propagate_down: True }\n'
    'layer { name: "c" type: "Power" bottom: "b" top: "c" propagate_down: [t] }\n'
    'layer { name: "d" type: "Power" bottom: "c" top: "d" propagate_down: False include { phase: TEST } }\n'
    'layer { name: "e" type: "PReLU" bottom: "d" top: "e" propagate_down: 1\n'
    "  param { share_mode: PERMISSIVE } }",
    "empty messages": 'layer { name: "a" type: "Input" top: "a" input_param { }\n'
    "  transform_param {} loss_param < > }",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_zoo_is_written_as_it_was_read(path, tmp_path):
    out = tmp_path / "out.prototxt"
    if path.stem.startswith("solver"):
        text = read_text(path)
        out.write_bytes(encode(text))
        assert parse(text).fields
    else:
        Net.load(path).write(out)
    assert out.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_an_unchanged_net_is_written_as_it_was_read(text, tmp_path):
    path, out = tmp_path / "in.prototxt", tmp_path / "out.prototxt"
    path.write_bytes(text.encode())
    net = Net.load(path)
    net.write(out)
    assert out.read_bytes() == path.read_bytes()
    # Its pieces are layers by themselves, too: an edit puts new ones between them.
    for layer in net.layers:
        assert Layer.from_text(layer.text).param == layer.param or "nan" in layer.text
        assert layer.rewired(layer.bottom, layer.top).text == layer.text


def test_bytes_that_are_not_utf8_survive_in_comments(tmp_path):
    data = b'# caf\xe9 \xff\xfe\nlayer { name: "a" type: "Input" top: "a" } # na\xefve\n'
    path, out = tmp_path / "in.prototxt", tmp_path / "out.prototxt"
    path.write_bytes(data)
    net = Net.load(path)
    net.write(out)
    assert out.read_bytes() == data
    (layer,) = net.layers
    assert encode(layer.rewired([], ["b"]).text) == data.replace(b'top: "a"', b'top: "b"')


# ---- values as in Caffe's own parser ----------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_zoo_reads_as_in_caffe(path, in_caffe):
    kind = "SolverParameter" if path.stem.startswith("solver") else "NetParameter"
    code = (
        "from google.protobuf import text_format\n"
        "message = getattr(caffe.proto.caffe_pb2, kind)()\n"
        "text_format.Merge(open(path, encoding='utf-8').read(), message)\n"
        "result = message.SerializeToString().hex()"
    )
    wanted = getattr(caffe_pb2, kind).FromString(bytes.fromhex(in_caffe(code, path=str(path), kind=kind)))
    found = getattr(caffe_pb2, kind)()
    assert to_message(parse(read_text(path), path), found, path) == []
    assert found == wanted
    assert found.ByteSize() > (40 if path.stem == "solver_distil" else 100)  # those name no net
    if kind == "NetParameter":
        assert [layer.param for layer in Net.load(path).layers] == list(wanted.layer)


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_awkward_syntax_reads_as_in_caffe(text, in_caffe, tmp_path):
    """Through Caffe's C++ parser: what it saves with the weights of a net are the layers it has read."""
    path, out = tmp_path / "in.prototxt", tmp_path / "out.caffemodel"
    path.write_bytes(text.encode())
    in_caffe("result = caffe.Net(path, 1).save(out)", path=str(path), out=str(out))
    wanted = caffe_pb2.NetParameter.FromString(out.read_bytes())
    found = [layer.param for layer in Net.load(path).layers]
    for layer in (*found, *wanted.layer):
        layer.ClearField("phase")  # Caffe notes the net's
        del layer.include[:], layer.blobs[:]
    assert [str(layer) for layer in found] == [str(layer) for layer in wanted.layer]


# (what; what stands in the message, with the line)
BROKEN = [
    ('name: "x"\nlayer {\n', "f:3: the file ends inside a message; '}' is missing"),
    ("layer <\n", "f:2: the file ends inside a message; '>' is missing"),
    ("layer { >", "f:1: expected a field name, found '>'"),
    ("}", "f:1: expected a field name, found '}'"),
    ("\n\n7", "f:3: expected a field name, found '7'"),
    ('"name"', "f:1: expected a field name, found '\"name\"'"),
    ("\nname", "f:2: expected ':' or '{' after 'name', found the end of the file"),
    ('name "x"', "f:1: expected ':' or '{' after 'name', found '\"x\"'"),
    ("name:\n", "f:2: expected a value for 'name', found the end of the file"),
    ("name: }", "f:1: expected a value for 'name', found '}'"),
    ("name: -\n'x'", "f:2: expected a number after '-', found ''x''"),
    ("name: [1 2]", "f:1: expected ',' or ']' in a list"),
    ("name: [1,", "f:1: expected a value for 'name', found the end of the file"),
    ("name: [[1]]", "f:1: expected a value for 'name', found '['"),
    ('\nname: "x\n', "f:2: a string without its closing quote; close it on the same line"),
    ("name: 'x\\", "f:1: a string without its closing quote"),
    ("name: 1x", "f:1: '1x' is not a number; correct it"),
    ("name: .", "f:1: '.' is not a number; correct it"),
    ("name: 0x", "f:1: '0x' is not a number; correct it"),
    ("name: 1.5e", "f:1: '1.5e' is not a number; correct it"),
    ("name: @x@", "f:1: '@' cannot stand here; not a prototxt, or a template"),
    ("name: \N{ARABIC-INDIC DIGIT ONE}", "f:1: '\\u0661' cannot stand here"),
    ("a { " * 101 + "}" * 101, "f:1: messages nested more than 100 deep; not a net"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_text_is_refused_with_its_line(text, message):
    with pytest.raises(PrototxtError) as caught:
        parse(text, "f")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# (fields of a LayerParameter; the message)
WRONG = [
    ('name: "a"\nname: "b"', "f:2: name is given twice; keep one"),
    ("lrn_param { }\n\nlrn_param { }", "f:3: lrn_param is given twice; keep one"),
    ("lrn_param: 1", "f:1: lrn_param holds a message; write lrn_param { ... }"),
    ("name { }", "f:1: name holds a single value, not a message"),
    ("name: a", "f:1: name: expected a quoted string, found a"),
    ("name: 1", "f:1: name: expected a quoted string, found 1"),
    ("lrn_param {\n local_size: 1.5 }", "f:2: local_size: expected an integer, found 1.5"),
    ("lrn_param { local_size: 08 }", "f:1: local_size: expected an integer, found 08"),
    ("lrn_param { local_size: '5' }", "f:1: local_size: expected a number or word, found the string '5'"),
    ("lrn_param { local_size: -1 }", "f:1: local_size: -1 is outside 0..4294967295"),
    ("lrn_param { local_size: 4294967296 }", "f:1: local_size: 4294967296 is outside 0..4294967295"),
    ("tile_param { tiles: -2147483649 }", "f:1: tiles: -2147483649 is outside -2147483648..2147483647"),
    ("lrn_param { alpha: x }", "f:1: alpha: expected a number, found x"),
    ("lrn_param { alpha: 0x10 }", "f:1: alpha: expected a number, found 0x10"),
    ("propagate_down: 2", "f:1: propagate_down: expected true or false, found 2"),
    ("propagate_down: TRUE", "f:1: propagate_down: expected true or false, found TRUE"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_value_is_refused_with_its_line_as_in_caffe(text, message, in_caffe, tmp_path):
    with pytest.raises(PrototxtError) as caught:
        to_message(parse(text, "f"), caffe_pb2.LayerParameter(), "f")
    assert str(caught.value).startswith(message)
    path = tmp_path / "wrong.prototxt"
    path.write_text(f'layer {{ type: "Input" top: "a" {text} }}')
    with pytest.raises(in_caffe.Refused, match="parse"):
        in_caffe.net(path)


def test_a_name_that_is_not_utf8_is_refused():
    with pytest.raises(PrototxtError, match="f:1: name: not valid UTF-8 in a string; names must be UTF-8"):
        Net.parse(r'layer { name: "\xff" }', "f")


def test_layers_in_a_list_are_refused():
    with pytest.raises(NetError, match=r"f:2: write each layer as layer \{ ... \}"):
        Net.parse('layer: [\n{ name: "a" }, { name: "b" }]', "f")
    with pytest.raises(NetError, match=r"f:1: write each layer as layer \{ ... \}"):
        Net.parse("layer: 1", "f")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PrototxtError, match=r"nowhere: no such file; check the path"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(PrototxtError, match="is a directory; give the prototxt file in it"):
        read_text(tmp_path)
    binary = tmp_path / "w.caffemodel"
    binary.write_bytes(b"\n\x04name\n\0")
    with pytest.raises(PrototxtError, match=r"w.caffemodel:3: binary data, not a prototxt; weights go to"):
        read_text(binary)
    with pytest.raises(PrototxtError, match="cannot be read: Not a directory"):
        read_text(binary / "x")


# ---- fork fields ------------------------------------------------------------------------------------------


def test_fields_of_forks_are_reported_with_their_lines_and_survive():
    text = (
        'name: "fork"\n'
        "quantize: true\n"
        "layer {\n"
        '  name: "p" type: "Permute" top: "a"\n'
        "  permute_param { order: 0 # kept\n    order: 2 }\n"
        "  convolution_param {\n"
        "    num_output: 4\n"
        "    winograd: WINO_2\n"
        "    engine: NEON\n"
        "  }\n"
        "}\n"
    )
    net = Net.parse(text)
    (layer,) = net.layers
    assert [(f.name, f.line) for f in layer.unknown] == [
        ("permute_param", 5),
        ("winograd", 9),
        ("engine", 10),
    ]
    assert layer.param.convolution_param.num_output == 4
    assert not layer.param.convolution_param.HasField("engine")
    assert net.text() == text
    rewired = layer.rewired([], ["b"])
    assert rewired.text == layer.text.replace('top: "a"', 'top: "b"')
    assert [(f.name, f.line) for f in rewired.unknown] == [(f.name, f.line) for f in layer.unknown]


# ---- trees ------------------------------------------------------------------------------------------------


def test_a_tree_by_hand():
    tree = parse("a: 1 b: 2 a { c: 3 } a { c: 4 d { e: 5 } }")
    assert [f.value for f in tree.all("b")] == ["2"]
    last = tree.message("a")
    assert last is not None
    assert shape(last) == [("c", "4"), ("d", [("e", "5")])]
    assert tree.message("b") is None
    assert [f.name for f in tree.walk()] == ["a", "b", "a", "c", "a", "c", "d", "e"]
    copy = tree.copy()
    copy.fields[3].value = "changed"
    assert shape(tree) != shape(copy)
    assert all(f.start == -1 for f in copy.walk())
    tree.set("a", "7", "8", drop=("b",))
    assert shape(tree) == [("a", "7"), ("a", "8")]
    tree.set("z", "9")
    assert shape(tree)[-1] == ("z", "9")


def test_the_layout():
    tree = parse('a: 1 b { c: "x" d { } } e {\n f: [1, 2]\n g { h: 3 } }')
    assert render(tree) == (
        'a: 1\nb { c: "x" d { } }\ne {\n  f: 1\n  f: 2\n  g { h: 3 }\n}\n'
    )  # fmt: skip
    assert render(tree, "  ", "\r\n").splitlines(keepends=True)[:2] == [
        "  a: 1\r\n",
        '  b { c: "x" d { } }\r\n',
    ]


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
text_without_surrogates = st.text(st.characters(codec="utf-8"), max_size=8)
scalars = st.one_of(
    text_without_surrogates.map(quote),
    st.integers(-(2**31), 2**32).map(str),
    st.floats(width=32).map(number),
    st.sampled_from(["true", "MAX", "-inf", "'it\\'s'", '"a" "b"']),
)


def messages(value: st.SearchStrategy[str | Message]) -> st.SearchStrategy[Message]:
    made = st.builds(lambda name, value, line: Field(name, value, one_line=line), names, value, st.booleans())
    return st.builds(Message, st.lists(made, max_size=5))


trees = messages(st.recursive(scalars, lambda inner: messages(inner), max_leaves=12))


@settings(deadline=None)
@given(trees)
def test_a_rendered_tree_reads_back(tree):
    text = render(tree)
    again = parse(text)
    assert shape(again) == shape(tree)
    assert render(again.copy()) == render(again)
    for f in again.walk():  # every field knows its place
        assert text[f.start :].startswith(f.name)
        assert text[f.value_start : f.value_end] == f.value or isinstance(f.value, Message)
        assert f.end == f.value_end
        assert f.line == text.count("\n", 0, f.start) + 1


@given(text_without_surrogates)
def test_a_quoted_string_reads_back(value):
    quoted = quote(value)
    assert unquote(quoted) == value
    found = caffe_pb2.LayerParameter()
    to_message(parse(f"name: {quoted}"), found)
    assert found.name == value


def test_quoting_leaves_nothing_that_ends_a_line_or_a_file():
    assert quote('a"\\\n\0\r\x01b') == '"a\\"\\\\\\n\\000\\015\\001b"'


@given(st.floats(width=32, allow_nan=False))
def test_a_number_reads_back_as_the_same_float32(value):
    assert np.float32(float(number(value))) == np.float32(value)
    found = caffe_pb2.PowerParameter()
    to_message(parse(f"shift: {number(value)}"), found)
    assert found.shift == value


def test_numbers_as_people_write_them():
    wanted = {0.1: "0.1", 1.0: "1", 0.0: "0", 1e-05: "1e-05", 0.0005: "0.0005",
              0.7071067690849304: "0.70710677", -3: "-3"}  # fmt: skip
    assert {value: number(value) for value in wanted} == wanted


# ---- anything at all --------------------------------------------------------------------------------------

PIECES = [*AWKWARD.values(), *(text for text, _ in BROKEN), *(text for text, _ in WRONG)]
TOKENS = re.findall(r"\s+|\w+|.", " ".join(AWKWARD.values()))


@st.composite
def mutated(draw):
    """A text with pieces cut out, doubled, swapped for others or for anything."""
    text = draw(st.sampled_from(PIECES))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 8))
        new = draw(
            st.one_of(
                st.sampled_from(["", *"{}<>[]:;,-\"'#.\\\n\0"]), st.sampled_from(TOKENS), st.text(max_size=4)
            )
        )
        text = text[:at] + new + text[at + cut :]
    return text  # fmt: skip


def complaint(read: Callable[[], object]) -> str | None:
    """What is wrong, said in one line, or None; no other error may come."""
    try:
        read()
    except (PrototxtError, NetError) as error:
        return str(error)
    return None


@settings(max_examples=400, deadline=20_000)
@given(mutated())
def test_a_damaged_text_is_read_or_refused(text):
    said = complaint(lambda: Net.parse(text, "f"))
    if said is None:
        net = Net.parse(text, "f")
        assert net.text() == text
        said = complaint(lambda: net.graph)
    assert said is None or re.fullmatch(r"(f:\d+: |f: |layer ').*", said)


@pytest.mark.parametrize(
    "piece", ["{", "a{", "a:[", "[", "#", '"', "a:-", " ", "a:1,", '"a"', "<", "layer{}", "\\"]
)
def test_long_repetitions_are_read_or_refused_at_once(piece):
    start = time.process_time()
    said = complaint(lambda: parse(piece * 20000))
    assert time.process_time() - start < 5
    assert (said is None) == (piece in ("#", " ", "a:1,", "layer{}"))
    assert said is None or len(said) < 300
