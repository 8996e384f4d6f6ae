"""What a net costs: by hand, by real Caffe's own blobs, and by brute force."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebirth_caffe.cost import Cost, cost, layer_macs
from rebirth_caffe.net import TRAIN, Net

ZOO = Path(__file__).parent.parent / "prototxts"
NETS = sorted(path.parent.name for path in ZOO.glob("*/deploy.prototxt"))

INPUT = (
    'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 8 dim: 6 } } }\n'
)


def macs(layer: str) -> int:
    """Multiply-adds of one layer on 1x4x8x6."""
    return cost(Net.parse(INPUT + f'layer {{ name: "it" bottom: "data" top: "out" {layer} }}')).macs


def test_multiply_adds_by_hand():
    conv = 'type: "Convolution" convolution_param'
    assert macs(f"{conv} {{ num_output: 10 kernel_size: 3 }}") == (6 * 4) * 10 * (3 * 3 * 4)
    assert macs(f"{conv} {{ num_output: 10 kernel_size: 3 group: 2 bias_term: false }}") == 24 * 10 * 9 * 2
    assert (
        macs(f"{conv} {{ num_output: 10 kernel_h: 1 kernel_w: 3 stride: 2 pad: 1 }}") == (5 * 3) * 10 * 3 * 4
    )
    assert macs(f"{conv} {{ num_output: 10 kernel_size: 3 dilation: 2 }}") == (4 * 2) * 10 * 9 * 4
    deconv = 'type: "Deconvolution" convolution_param'
    assert macs(f"{deconv} {{ num_output: 10 kernel_size: 3 stride: 2 }}") == (8 * 6) * 4 * (3 * 3 * 10)
    assert macs(f"{deconv} {{ num_output: 10 kernel_size: 3 group: 2 }}") == (8 * 6) * 4 * (3 * 3 * 5)
    full = 'type: "InnerProduct" inner_product_param'
    assert macs(f"{full} {{ num_output: 10 }}") == 4 * 8 * 6 * 10
    assert macs(f"{full} {{ num_output: 10 transpose: true }}") == 4 * 8 * 6 * 10
    assert macs(f"{full} {{ num_output: 10 axis: 2 }}") == 4 * (8 * 6 * 10)
    assert macs(f"{full} {{ num_output: 10 axis: -1 }}") == 4 * 8 * (6 * 10)
    assert macs('type: "ReLU"') == macs('type: "Pooling" pooling_param { kernel_size: 2 }') == 0


def test_several_bottoms_through_one_convolution():
    two = INPUT + INPUT.replace('"data"', '"more"') + (
        'layer { name: "it" type: "Convolution" bottom: "data" bottom: "more" top: "a" top: "b"\n'
        "  convolution_param { num_output: 10 kernel_size: 1 } }"
    )  # fmt: skip
    found = cost(Net.parse(two))
    assert (found.macs, found.params) == (2 * 48 * 4 * 10, 4 * 10 + 10)


def test_a_small_net_by_hand():
    text = (
        INPUT
        + 'layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"\n'
        + "  convolution_param { num_output: 10 kernel_size: 3 } }\n"
        + 'layer { name: "norm" type: "BatchNorm" bottom: "conv" top: "conv" }\n'
        + 'layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }\n'
        + 'layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool"\n'
        + "  pooling_param { kernel_size: 2 stride: 2 } }\n"
        + 'layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc"\n'
        + "  inner_product_param { num_output: 5 } }\n"
        + 'layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }\n'
    )  # fmt: skip
    data, conv, pool, out = 4 * 8 * 6, 10 * 6 * 4, 10 * 3 * 2, 5
    assert cost(Net.parse(text)) == Cost(
        layers=7,
        macs=24 * 10 * 36 + 60 * 5,
        params=(360 + 10) + (10 + 10 + 1) + (10 + 10) + (300 + 5),
        activation_bytes=4 * (data + conv + pool + out + out),
        peak_activation_bytes=4 * (data + conv),
    )


@pytest.mark.parametrize(
    ("dims", "counted"),
    [
        ("dim: 0 dim: -1", 1),
        ("dim: -1 dim: 192", 1),
        ("dim: 5 dim: -1", 5),  # one image does not divide into 5 rows
        ("dim: 4 dim: -1", 4),  # it does divide into 4, but then the InnerProduct would have other weights
    ],
)
def test_one_image_counts_except_where_the_file_fixes_the_batch(dims, counted):
    text = INPUT.replace("dim: 1 ", f"dim: {max(counted, 2)} ")
    text += 'layer { name: "r" type: "Reshape" bottom: "data" top: "r"\n'
    text += f"  reshape_param {{ shape {{ {dims} }} }} }}\n"
    text += 'layer { name: "fc" type: "InnerProduct" bottom: "r" top: "fc"\n'
    text += "  inner_product_param { num_output: 10 } }\n"
    found = cost(Net.parse(text))
    assert (found.params, found.macs) == (1930, counted * 1920)
    assert found.activation_bytes == 4 * counted * (192 + 10)


def test_shared_weights_count_once():
    def full(name: str, top: str, param: str) -> str:
        return (
            f'layer {{ name: "{name}" type: "InnerProduct" bottom: "data" top: "{top}" {param}\n'
            "  inner_product_param { num_output: 5 bias_term: false } }\n"
        )

    shared = 'param { name: "w" }'
    assert cost(Net.parse(INPUT + full("a", "x", shared) + full("b", "y", shared))).params == 5 * 192
    assert cost(Net.parse(INPUT + full("a", "x", "") + full("b", "y", ""))).params == 2 * 5 * 192
    assert cost(Net.parse(INPUT + full("a", "x", shared) + full("b", "y", shared))).macs == 2 * 5 * 192


def test_what_is_not_known_is_said():
    text = INPUT + 'layer { name: "p" type: "Permute" bottom: "data" top: "p" }\n'
    text += 'layer { name: "fc" type: "InnerProduct" bottom: "p" inner_product_param { num_output: 5 } }'
    net = Net.parse(text)
    found = cost(net)
    assert found.unknown == ("p", "fc")
    assert (found.macs, found.params, found.activation_bytes) == (0, 0, 4 * 192)
    assert layer_macs(net.layer("fc"), [None], [None]) == 0
    assert layer_macs(net.layer("fc"), [(1, 192)], [(1, 5)]) == 5 * 192


def test_by_phase():
    text = INPUT + 'layer { name: "a" type: "Power" bottom: "data" top: "a" include { phase: TRAIN } }\n'
    net = Net.parse(text)
    assert cost(net).activation_bytes == 4 * 192
    assert cost(net, TRAIN).activation_bytes == 2 * 4 * 192
    assert (cost(net).layers, cost(net, TRAIN).layers) == (1, 2)


# ---- by real Caffe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_the_zoo_by_caffes_own_blobs(name, in_caffe):
    path = ZOO / name / "deploy.prototxt"
    said = in_caffe.net(path, batch=1, forward=True)
    net = Net.load(path)
    found = cost(net)
    assert found.unknown == ()
    assert found.layers == len(said["layers"])
    assert found.params == sum(math.prod(shape) for shapes in said["params"].values() for shape in shapes)
    assert found.activation_bytes == said["bytes"]
    macs = 0
    for layer in net.layers:
        if layer.type in ("Convolution", "InnerProduct"):  # each weight is used once per place of its window
            places = math.prod(said["blobs"][layer.top[0]][2:])
            macs += math.prod(said["params"][layer.name][0]) * places
    assert found.macs == macs
    assert 0 < found.peak_activation_bytes < found.activation_bytes


def test_known_numbers():
    """The published ones of all nets are in test_zoo.py."""
    googlenet = cost(Net.load(ZOO / "bvlc_googlenet" / "deploy.prototxt"))
    assert (googlenet.macs, googlenet.params) == (1_582_671_872, 6_998_552)
    conv1, pool1, norm1 = 64 * 112 * 112, 64 * 56 * 56, 64 * 56 * 56
    conv2_reduce, conv2 = 64 * 56 * 56, 192 * 56 * 56
    assert googlenet.peak_activation_bytes == 4 * max(conv1 + 3 * 224 * 224, conv1 + pool1, conv2 + conv2)
    assert conv2 + conv2 > conv2 + conv2_reduce > pool1 + norm1


# ---- by brute force ---------------------------------------------------------------------------------------


SHARING = ("in place", "Flatten", "Reshape", "Concat", "Slice", "Split")  # with one bottom, or one top
KINDS = (*SHARING, "Power", "Concat 2", "Slice 2", "Tile")
PARAMS = {
    "Reshape": "reshape_param { shape { dim: 1 dim: -1 } }",
    "Slice 2": "slice_param { slice_point: 1 }",
    "Tile": "tile_param { tiles: 2 }",
}


@st.composite
def random_net(draw):
    """(text, layers as (kind, bottoms, tops)) of layers that keep, share, join or cut memory."""
    text, layers = INPUT, []
    channels, rest, read = {"data": 4}, {"data": 48}, set()
    for i in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(KINDS))
        bottom = draw(st.sampled_from(list(channels)[-4:]))
        if (kind == "in place" and bottom in read) or (kind == "Slice 2" and channels[bottom] < 2):
            kind = "Power"
        bottoms = [bottom, bottom] if kind == "Concat 2" else [bottom]
        tops = (
            [f"{i}", f"{i}b"] if kind in ("Slice 2", "Split") else [bottom if kind == "in place" else f"{i}"]
        )
        for top in tops:
            flat = kind in ("Flatten", "Reshape")
            grown = 2 if kind in ("Concat 2", "Tile") else rest[bottom] if flat else 1
            channels[top], rest[top] = channels[bottom] * grown, 1 if flat else rest[bottom]
        if kind == "Slice 2":
            channels[tops[0]], channels[tops[1]] = 1, channels[bottom] - 1
        if kind != "in place":  # which may only follow a blob that nobody else reads
            read.add(bottom)
        written = "Power" if kind == "in place" else kind.split()[0]
        wiring = "".join(f'bottom: "{b}" ' for b in bottoms) + "".join(f'top: "{t}" ' for t in tops)
        text += f'layer {{ name: "layer{i}" type: "{written}" {wiring} {PARAMS.get(kind, "")} }}\n'
        layers.append((kind, bottoms, tops))
    return text, layers


def by_brute_force(layers: list[tuple[str, list[str], list[str]]], sizes: dict[str, int]) -> tuple[int, int]:
    """(total, peak) numbers held: who lives is asked at every step."""
    buffers = [[sizes["data"], 0, 0]]  # size, born, last read
    values = [[0, 0]]  # buffer, times read
    current = {"data": 0}  # blob -> value
    for step, (kind, bottoms, tops) in enumerate(layers, 1):
        for blob in bottoms:
            value = values[current[blob]]
            value[1] += 1
            buffers[value[0]][2] = step
        for blob in tops:
            if kind in SHARING:
                buffer = values[current[bottoms[0]]][0]
            else:
                buffer = len(buffers)
                buffers.append([sizes[blob], step, step])
            current[blob] = len(values)
            values.append([buffer, 0])
    for buffer, reads in values:
        if not reads:  # an output: it stays
            buffers[buffer][2] = len(layers)
    alive = [
        sum(size for size, born, last in buffers if born <= step <= last) for step in range(len(layers) + 1)
    ]
    return sum(size for size, _, _ in buffers), max(alive)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=random_net())
def test_memory_by_brute_force_and_by_caffe(made, in_caffe, tmp_path_factory):
    text, layers = made
    path = tmp_path_factory.getbasetemp() / "memory.prototxt"
    path.write_text(text)
    said = in_caffe.net(path, forward=True)
    total, peak = by_brute_force(layers, {name: math.prod(shape) for name, shape in said["blobs"].items()})
    found = cost(Net.parse(text))
    assert found.activation_bytes == said["bytes"] == 4 * total
    assert found.peak_activation_bytes == 4 * peak
