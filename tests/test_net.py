"""The graph: which layers are in a net, who reads what, and edits that leave every other byte alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.cost import cost
from rebirth_caffe.errors import NetError, PrototxtError, RebirthError
from rebirth_caffe.net import TEST, TRAIN, Layer, Net, State, View
from rebirth_caffe.schema import caffe_pb2
from rebirth_caffe.shapes import infer

ZOO = Path(__file__).parent.parent / "prototxts"
ZOO_FILES = sorted([*ZOO.glob("*/deploy.prototxt"), *ZOO.glob("*/train_val.prototxt")])
NAMES = [f"{path.parent.name}/{path.stem}" for path in ZOO_FILES]

INPUT = 'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 } } }\n'


def power(name: str, bottom: str, top: str, more: str = "") -> str:
    return f'layer {{ name: "{name}" type: "Power" bottom: "{bottom}" top: "{top}" {more} }}\n'


def names(layers) -> list[str]:
    return [layer.name for layer in layers]


def readers(net: Net, layer: str, top: int = 0) -> set[tuple[str, int]]:
    return {(reader.name, bottom) for reader, bottom in net.graph.readers(net.layer(layer), top)}


def wiring(view: View) -> dict[str, list[str]]:
    """By layer: which layer's top each bottom is."""
    return {
        layer.name: [f"{v.producer.name}:{v.index}" if v.producer else f"input:{v.index}" for v in bottoms]
        for layer, bottoms in view.bottoms.items()
    }


# ---- which layers are in a net ----------------------------------------------------------------------------

# A rule and the states of STATES it is met in are not written down: real Caffe decides.
RULES = [
    "",
    "include { }",
    "exclude { }",
    "include { phase: TRAIN }",
    "include { phase: TEST }",
    "exclude { phase: TEST }",
    "include { phase: TRAIN } include { stage: 'a' }",
    "exclude { phase: TRAIN } exclude { stage: 'b' }",
    "include { stage: 'a' }",
    "include { stage: 'a' stage: 'b' }",
    "include { not_stage: 'a' }",
    "exclude { stage: 'a' not_stage: 'b' }",
    "include { phase: TEST stage: 'a' }",
    "include { min_level: 1 }",
    "include { max_level: 1 }",
    "include { min_level: 1 max_level: 1 }",
    "exclude { min_level: 2 }",
    "exclude { max_level: -1 }",
    "include { min_level: 1 stage: 'b' } include { phase: TRAIN max_level: 0 }",
]
STATES = list(itertools.product((TRAIN, TEST), (-1, 0, 1, 2), ("", "a", "b", "ab")))


def test_every_rule_in_every_state_as_in_caffe(in_caffe, tmp_path):
    text = INPUT + "".join(power(f"rule {i}", "data", f"top {i}", rule) for i, rule in enumerate(RULES))
    net = Net.parse(text)
    path = tmp_path / "net.prototxt"
    path.write_text(text)
    for phase, level, stages in STATES:
        said = in_caffe.net(path, phase, level=level, stages=list(stages))["layers"]
        view = View(net, State(phase, level, frozenset(stages)))
        assert [[layer.name, layer.type] for layer in view.layers] == said, (phase, level, stages)


def test_the_graph_knows_every_state_a_rule_can_tell_apart():
    """No layer that some state has is in none of the graph's views, and no view is there twice."""
    for rule in RULES:
        net = Net.parse(INPUT + power("it", "data", "top", rule))
        possible = {
            tuple(names(View(net, State(phase, level, frozenset(s))).layers)) for phase, level, s in STATES
        }
        assert {tuple(names(view.layers)) for view in net.graph.views} == possible
        assert len(net.graph.views) == len(possible)


def test_include_and_exclude_together_are_refused():
    net = Net.parse(INPUT + power("it", "data", "x", "include { phase: TEST } exclude { stage: 'a' }"), "f")
    with pytest.raises(NetError, match=r"^f:2: layer 'it': include and exclude rules together; give only"):
        _ = net.graph


def test_the_files_own_state_comes_first():
    rules = power("a", "data", "a", "include { stage: 'deep' }") + power(
        "b", "data", "b", "include { min_level: 1 }"
    )
    net = Net.parse('state { level: 1 stage: "deep" }\n' + INPUT + rules)
    view = net.graph.view(TEST)
    assert names(view.layers) == ["in", "a", "b"]
    assert str(view.state) == "TEST deep level 1"
    assert names(Net.parse(INPUT + rules).graph.view(TEST).layers) == ["in"]


def test_the_plainest_view_of_a_phase_even_where_both_phases_are_the_same():
    net = Net.parse(
        INPUT + power("a", "data", "a") + power("b", "a", "b", "include { phase: TRAIN stage: 'x' }")
    )
    assert len(net.graph.views) == 2
    assert names(net.graph.view(TRAIN).layers) == ["in", "a"]
    assert net.graph.view(TRAIN) is net.graph.view(TEST)
    train_only = Net.parse(INPUT.replace("top", "include { phase: TRAIN } top") + power("a", "data", "a"))
    assert train_only.graph.view(TEST).state.phase == TRAIN  # there is no other


# As DIGITS writes them: three nets in one file, told apart by stages.
ALL_IN_ONE = (
    'layer { name: "train-data" type: "Data" top: "data" top: "label" include { stage: "train" } }\n'
    'layer { name: "val-data" type: "Data" top: "data" top: "label" include { stage: "val" } }\n'
    'layer { name: "data" type: "Input" top: "data" include { stage: "deploy" } }\n'
    + power("conv", "data", "conv")
    + power("drop", "conv", "conv", 'include { stage: "train" }')
    + power("fc", "conv", "fc")
    + 'layer { name: "loss" type: "Fork" bottom: "fc" bottom: "label" exclude { stage: "deploy" } }\n'
    + 'layer { name: "acc" type: "Fork" bottom: "fc" bottom: "label" include { stage: "val" } }\n'
    + power("softmax", "fc", "prob", 'include { stage: "deploy" }')
)


def test_a_net_in_stages():
    net = Net.parse(ALL_IN_ONE)
    assert {str(view.state): names(view.layers) for view in net.graph.views} == {
        "TEST deploy": ["data", "conv", "fc", "softmax"],
        "TEST train": ["train-data", "conv", "drop", "fc", "loss"],
        "TEST val": ["val-data", "conv", "fc", "loss", "acc"],
    }
    assert readers(net, "fc") == {("softmax", 0), ("loss", 0), ("acc", 0)}
    assert readers(net, "conv") == {("drop", 0), ("fc", 0)}
    fc, conv = net.layer("fc"), net.layer("conv")
    assert sorted(names(net.graph.producers(fc))) == ["conv", "drop"]
    assert sorted(names(net.graph.producers(conv))) == ["data", "train-data", "val-data"]
    assert net.graph.same_views(conv, fc)
    assert not net.graph.same_views(conv, net.layer("drop"))


# ---- who reads what ---------------------------------------------------------------------------------------


def test_in_place_layers_make_new_values():
    net = Net.parse(
        INPUT + power("a", "data", "x") + power("b", "x", "x") + power("c", "x", "x") + power("d", "x", "y")
    )
    view = net.graph.view(TEST)
    assert wiring(view) == {"in": [], "a": ["in:0"], "b": ["a:0"], "c": ["b:0"], "d": ["c:0"]}
    assert [value.name for value in view.values] == ["data", "x", "x", "x", "y"]
    assert [value.name for value in view.outputs] == ["y"]
    assert readers(net, "a") == {("b", 0)}
    assert readers(net, "c") == {("d", 0)}
    assert {value: shape for value, shape in infer(view).items() if shape != (2, 3)} == {}


def test_several_tops_and_several_readers():
    net = Net.parse(
        INPUT
        + 'layer { name: "cut" type: "Slice" bottom: "data" top: "p" top: "q" top: "r" }\n'
        + 'layer { name: "sum" type: "Eltwise" bottom: "p" bottom: "q" bottom: "p" top: "s" }\n'
        + power("also", "q", "t")
    )
    assert readers(net, "in") == {("cut", 0)}
    assert readers(net, "cut", 0) == {("sum", 0), ("sum", 2)}
    assert readers(net, "cut", 1) == {("sum", 1), ("also", 0)}
    assert readers(net, "cut", 2) == set()
    assert wiring(net.graph.view(TEST))["sum"] == ["cut:0", "cut:1", "cut:0"]
    assert [value.name for value in net.graph.view(TEST).outputs] == ["r", "s", "t"]


def test_readers_are_the_union_over_both_phases():
    net = Net.parse(
        'layer { name: "train" type: "Data" top: "data" include { phase: TRAIN } }\n'
        'layer { name: "test" type: "Data" top: "data" include { phase: TEST } }\n'
        + power("a", "data", "a")
        + power("loss", "a", "loss", "include { phase: TRAIN }")
        + power("head", "a", "head", "include { phase: TEST }")
        + power("both", "a", "both")
    )
    assert readers(net, "a") == {("loss", 0), ("head", 0), ("both", 0)}
    assert {p.name for p in net.graph.producers(net.layer("a")) if p} == {"train", "test"}
    assert wiring(net.graph.view(TRAIN))["a"] == ["train:0"]
    assert wiring(net.graph.view(TEST))["a"] == ["test:0"]


def test_an_auxiliary_head_of_googlenet_reads_an_inception_in_train_val_only():
    train_val, deploy = (
        Net.load(ZOO / "bvlc_googlenet" / f"{kind}.prototxt") for kind in ("train_val", "deploy")
    )
    assert ("loss1/ave_pool", 0) in readers(train_val, "inception_4a/output")
    assert ("loss1/ave_pool", 0) not in readers(deploy, "inception_4a/output")
    assert len(readers(train_val, "inception_4a/output")) == len(readers(deploy, "inception_4a/output")) + 1


@pytest.mark.parametrize(
    ("header", "shapes"),
    [
        ('input: "a" input: "b" input_dim: 1 input_dim: 2 input_dim: 3 input_dim: 4\n'
         "input_dim: 5 input_dim: 6 input_dim: 7 input_dim: 8\n", {"a": (1, 2, 3, 4), "b": (5, 6, 7, 8)}),
        ('input: "a"\ninput_shape { dim: 1 dim: 2 }\ninput: "b"\ninput_shape { dim: 3 }\n',
         {"a": (1, 2), "b": (3,)}),
        ('input: ["a", "b"]  # both\ninput_shape: [{ dim: [1, 2] }, { dim: 3 }] ; # and\n',
         {"a": (1, 2), "b": (3,)}),
    ],
    ids=["input_dim", "input_shape", "lists"],
)  # fmt: skip
def test_inputs_without_a_layer(header, shapes, in_caffe, tmp_path):
    text = f'name: "old"\n{header}' + power("x", "a", "c") + power("y", "b", "b")
    path = tmp_path / "net.prototxt"
    path.write_text(text)
    net = Net.load(path)
    view = net.graph.view(TEST)
    found = {value.name: shape for value, shape in infer(view).items()}
    assert found == {**shapes, "c": shapes["a"]}
    assert {name: tuple(shape) for name, shape in in_caffe.net(path)["blobs"].items()} == found
    assert wiring(view) == {"x": ["input:0"], "y": ["input:1"]}
    assert net.graph.producers(net.layer("x")) == [None]
    # An edit of the first layer leaves the header alone.
    edited = net.replace(lambda layer: [layer.rewired(layer.bottom, [f"new {layer.top[0]}"])])
    assert edited.text() == text.replace('top: "c"', 'top: "new c"').replace('top: "b"', 'top: "new b"')


def test_a_layer_of_a_fork_is_a_node_like_others():
    text = INPUT + 'layer { name: "p" type: "Permute" bottom: "data" top: "p" permute_param { order: 0 } }\n'
    net = Net.parse(text + power("a", "p", "p"))
    assert wiring(net.graph.view(TEST)) == {"in": [], "p": ["in:0"], "a": ["p:0"]}
    assert [f.name for f in net.layer("p").unknown] == ["permute_param"]
    assert cost(net).unknown == ("p",)


# ---- nets that do not fit together ------------------------------------------------------------------------

BROKEN = [
    (INPUT + power("a", "nothing", "x"),
     "f:2: layer 'a': bottom 'nothing' is the top of no layer and no input; correct the name or add it"),
    (INPUT + power("a", "y", "x") + power("b", "x", "y"),
     "f:2: layer 'a': bottom 'y' is produced only below, by f:3: layer 'b'; a cycle, or layers out of order"),
    (INPUT + power("a", "a", "a"),
     "f:2: layer 'a': bottom 'a' is produced only below, by f:2: layer 'a'; a cycle"),
    (INPUT + power("a", "data", "x") + power("b", "data", "x"),
     "f:3: layer 'b': top 'x' is already a top of f:2: layer 'a'; rename one of them"),
    (INPUT + 'layer { name: "a" type: "Split" bottom: "data" top: "x" top: "x" }',
     "f:2: layer 'a': top 'x' is already a top of f:2: layer 'a'; rename one of them"),
    ('input: "data" input_shape { }\nlayer { name: "a" type: "Split" bottom: "data" top: "x" top: "data" }',
     "f:2: layer 'a': top 'data' is already a top of the net itself; rename one of them"),
    (INPUT + power("a", "data", "x") + 'layer { name: "s" type: "Concat" bottom:"data" bottom:"x" top:"x" }',
     "f:3: layer 's': top 'x' is already a top of f:2: layer 'a'; rename one of them"),
    (INPUT + power("a", "data", "data") + power("b", "data", "x") + power("c", "data", "data"),
     "f:4: layer 'c': works in place on 'data', which is also read by f:3: layer 'b'; give its top a name"),
    (INPUT + 'layer { name: "s" type: "Eltwise" bottom: "data" bottom: "data" top: "data" }',
     "f:2: layer 's': works in place on 'data', which is also read by it itself a second time; give its top"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_net_that_does_not_fit_together_is_refused_as_in_caffe(text, message, in_caffe, tmp_path):
    net = Net.parse(text, "f")
    with pytest.raises(NetError) as caught:
        _ = net.graph
    assert str(caught.value).startswith(message)
    path = tmp_path / "net.prototxt"
    path.write_text(text)
    with pytest.raises(in_caffe.Refused):
        in_caffe.net(path)


def test_a_bottom_of_another_phase_in_all_phases():
    net = Net.parse(
        INPUT.replace("top", "include { phase: TRAIN } top")
        + power("a", "data", "x", "include { phase: TEST }")
        + INPUT.replace("data", "more").replace("top", "include { phase: TEST } top"),
        "f",
    )
    assert names(net.graph.view(TRAIN).layers) == ["in"]  # and for TEST the file is not meant
    alone = Net.parse(
        INPUT.replace("top", "include { phase: TRAIN stage: 'x' } top")
        + power("a", "data", "x", "exclude { stage: 'x' }")
    )
    assert [str(view.state) for view in alone.graph.views] == ["TRAIN x"]


def test_a_top_twice_in_a_state_nobody_uses_does_not_matter():
    text = (
        INPUT.replace("top", "include { phase: TEST } top")
        + INPUT.replace("top", "include { phase: TRAIN } top")
        + INPUT.replace("top", "include { phase: TRAIN stage: 'other' } top")
    )
    net = Net.parse(text + power("a", "data", "x"))
    assert [str(view.state) for view in net.graph.views] == ["TEST", "TRAIN"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: holds no layer; give a deploy or train_val prototxt"),
        ("# nothing\n", "f: holds no layer; give a deploy"),
        ('net: "x"\nbase_lr: 0.1', "f: holds no layer ('net' at line 1 is no field of a net); give a deploy"),
        ('\nlayers { name: "a" type: 1.5 }', "f:2: type: expected a name or number, found 1.5"),
        ("\nlayer { type: 1 }", "f:2: type: expected a quoted string"),
    ],
)
def test_files_that_are_no_nets(text, message):
    with pytest.raises(RebirthError) as caught:
        Net.parse(text, "f")
    assert str(caught.value).startswith(message)


def test_a_net_whose_layers_are_in_no_state():
    with pytest.raises(NetError, match="f: holds no layers"):
        _ = Net.parse('layer { name: "a" type: "Input" top: "a" exclude { } }', "f").graph


# ---- edits ------------------------------------------------------------------------------------------------

ODD = """# The first
layer { # why
  type: 'Concat' name: "cat"   bottom: 'x' # one
  bottom:"y"  ,bottom : "x"; top
   : 'out' # bottom: "x"
  fork_param { bottom: "x" } } # behind
"""


def test_rewiring_changes_the_names_and_nothing_else():
    layer = Layer.from_text(ODD, path="f", line=7)
    assert (layer.bottom, layer.top) == (("x", "y", "x"), ("out",))
    assert layer.rewired(layer.bottom, layer.top).text == ODD
    one = layer.rewired(["x", "y", 'a "b"'], ["out"])
    assert one.text == ODD.replace(',bottom : "x";', ',bottom : "a \\"b\\"";')
    assert one.bottom == ("x", "y", 'a "b"')
    every = layer.rewired(["1", "2", "3"], ["4"])
    wanted = ODD
    for old, new in (("'x' # one", '"1" # one'), ('"y"', '"2"'), (' : "x";', ' : "3";'), ("'out'", '"4"')):
        wanted = wanted.replace(old, new)
    assert every.text == wanted
    assert (every.name, every.line, every.where) == ("cat", 7, "f:7: layer 'cat'")
    assert every.comments == "# The first\n"
    assert layer.bottom == ("x", "y", "x")  # as it was
    for bottom, top in ([], ["out"]), (["x", "y", "x"], []), (["x"] * 4, ["out"]):
        with pytest.raises(NetError, match="f:7: layer 'cat': rewired from"):
            layer.rewired(bottom, top)


def test_rewiring_keeps_weights_and_all_of_the_files_bytes_but_the_wiring():
    layer = Layer.from_text(ODD)
    blob = Blob(np.zeros(3, "f4"))
    stored = caffe_pb2.LayerParameter(name="cat", type="Concat", bottom=["old", "older"], top=["was"])
    stored.concat_param.axis = 3
    of_a_fork = b"\xfa\x3f\x03abc\xfd\x3f\1\2\3\4\xf8\x3f\x96\1"  # bytes, a float and a number
    raw = stored.SerializeToString() + of_a_fork
    layer.record = Record("cat", "Concat", [blob], memoryview(raw))
    rewired = layer.rewired(["1", "2", "3"], ["4"])
    assert rewired.record is not None
    assert rewired.blobs == [blob]
    assert bytes(rewired.record.raw or b"").endswith(of_a_fork)
    found = caffe_pb2.LayerParameter.FromString(bytes(rewired.record.raw or b""))
    assert (list(found.bottom), list(found.top)) == (["1", "2", "3"], ["4"])
    assert (found.name, found.type, found.concat_param.axis) == ("cat", "Concat", 3)


@pytest.mark.parametrize("path", ZOO_FILES, ids=NAMES)
def test_every_layer_of_the_zoo_can_be_rewired(path):
    """Every blob renamed: the same text with other names, and the same graph."""
    net = Net.load(path)

    def renamed(layer: Layer) -> list[Layer]:
        return [layer.rewired([f"my {b}" for b in layer.bottom], [f"my {t}" for t in layer.top])]

    new = net.replace(renamed)
    back = new.text()
    for word in ("bottom", "top"):
        back = back.replace(f'{word}: "my ', f'{word}: "')
    assert new.text().count('"my ') == sum(len(x.bottom) + len(x.top) for x in net.layers)
    assert back == net.text()
    for phase in (TRAIN, TEST):
        assert wiring(new.graph.view(phase)) == wiring(net.graph.view(phase))


def test_replacing_layers():
    net = Net.parse(f"# top\n{INPUT}\n# about a\n{power('a', 'data', 'x')}{power('b', 'x', 'y')}# end", "f")
    net.strangers = [Record("s", "", [])]
    new = net.replace(lambda layer: [] if layer.name == "b" else [layer])
    assert new.text() == f"# top\n{INPUT}\n# about a\n{power('a', 'data', 'x')}# end"
    assert (new.path, new.name, new.strangers) == ("f", "f", net.strangers)
    assert net.layer("a").comments == "\n# about a\n"
    assert names(net.layers) == ["in", "a", "b"]
    twice = net.replace(
        lambda layer: [layer, Layer.from_text(power("c", "y", "z"))] if layer.name == "b" else [layer]
    )
    assert names(twice.graph.view(TEST).layers) == ["in", "a", "b", "c"]


def test_a_layer_by_its_name_where_the_name_is_one_layers():
    net = Net.parse(
        INPUT.replace("top", "include { phase: TEST } top") + INPUT + power("a", "data", "x"), "f"
    )
    assert net.layer("a").type == "Power"
    with pytest.raises(NetError, match=r"^f: 2 layers are called 'in'$"):
        net.layer("in")
    with pytest.raises(NetError, match=r"^f: no layer is called 'z'$"):
        net.layer("z")


@pytest.mark.parametrize("text", ["", "layer { } layer { }", 'name: "x"', "layer: 1", "x { }"])
def test_a_layer_from_a_text_that_is_not_one(text):
    with pytest.raises(NetError, match=r"^f:3: expected exactly one layer \{ ... \}$"):
        Layer.from_text(text, path="f", line=3)


def test_a_wrong_value_in_a_piece_is_at_its_line_in_the_file():
    text = 'layer {\n name: "a"\n lrn_param { alpha: x } }'
    with pytest.raises(PrototxtError, match=r"^f:12: alpha: expected a number, found x$"):
        Layer.from_text(text, path="f", line=10)
    with pytest.raises(PrototxtError, match=r"^<text>:3: alpha: expected a number, found x$"):
        Layer.from_text(text)


def test_small_things(tmp_path):
    net = Net.parse(INPUT.replace("\n", "\r\n") + power("a", "data", "x"), tmp_path / "lenet.prototxt")
    assert (net.name, net.newline) == ("lenet", "\r\n")
    assert Net.parse('name: "n"\n' + INPUT).name == "n"
    assert Net.parse(INPUT).newline == "\n"
    text = 'layer { name: "a" type: "X" param { lr_mult: 2 } param { name: "shared" lr_mult: 0 } }'
    layer = Layer.from_text(text)
    assert [layer.spec(i).lr_mult for i in range(3)] == [2, 0, 1]
    assert layer.shared_params() == ["shared"]
    assert repr(layer) == "<Layer 'a' X>"
    assert layer.where == "layer 'a'"


# ---- random graphs ----------------------------------------------------------------------------------------


@st.composite
def random_wiring(draw):
    """Layers with any bottoms and tops, in place or not, some in one phase only; many do not fit together."""
    text, blobs = INPUT, ["data"]
    for i in range(draw(st.integers(1, 7))):
        names = st.sampled_from([*blobs[-2:] * 9, "nothing"])
        bottoms = draw(st.lists(names, min_size=1, max_size=2))
        top = draw(st.sampled_from([*[f"blob{i}"] * 5, *bottoms * 2, draw(st.sampled_from(blobs))]))
        rule = draw(st.sampled_from([*[""] * 8, "include { phase: TRAIN }", "exclude { phase: TRAIN }"]))
        words = "".join(f'bottom: "{name}" ' for name in bottoms)
        kind = "Power" if len(bottoms) == 1 else "Eltwise"
        text += f'layer {{ name: "layer{i}" type: "{kind}" {words} top: "{top}" {rule} }}\n'
        blobs.append(top)
    return text


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=random_wiring())
def test_random_wiring_is_taken_or_refused_as_in_caffe(text, in_caffe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "wiring.prototxt"
    path.write_text(text)
    net = Net.parse(text)
    for phase in (TRAIN, TEST):
        try:
            view: View | None = View(net, State(phase))
        except NetError:
            view = None
        try:
            said = in_caffe.net(path, phase)
        except in_caffe.Refused:
            said = None
        assert (view is None) == (said is None)
        if view is not None and said is not None:
            assert names(view.layers) == [name for name, _ in said["layers"]]
