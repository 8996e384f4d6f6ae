"""Shapes of blobs and weights: whatever real Caffe says, for every layer type, the zoo and random nets."""

import contextlib
import re
import string
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebirth_caffe.cost import cost
from rebirth_caffe.errors import NetError, PrototxtError
from rebirth_caffe.net import TEST, TRAIN, Layer, Net
from rebirth_caffe.schema import caffe_pb2
from rebirth_caffe.shapes import RULES, all_param_shapes, conv_size, infer, layer_shapes, pool_size

ZOO = Path(__file__).parent.parent / "prototxts"
NETS = sorted(path.parent.name for path in ZOO.glob("*/deploy.prototxt"))


def ours(net: Net, phase: int = TEST) -> tuple[dict[str, Any], dict[str, Any]]:
    """(blob shapes, weight shapes) of one phase, by name."""
    view = net.graph.view(phase)
    params = all_param_shapes(net)
    blobs = {value.name: shape for value, shape in infer(view).items()}
    return blobs, {layer.name: params[layer] for layer in view.layers if params[layer]}


def caffes(said: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of what real Caffe answered."""
    blobs = {name: tuple(shape) for name, shape in said["blobs"].items()}
    return blobs, {name: [tuple(s) for s in shapes] for name, shapes in said["params"].items() if shapes}


# ---- one layer at a time ----------------------------------------------------------------------------------


def single(layer: str, *bottoms: tuple[int, ...], tops: str = "out") -> str:
    """A net of one layer on inputs of these shapes."""
    text = ""
    names = string.ascii_lowercase[: len(bottoms)]
    for name, shape in zip(names, bottoms, strict=True):
        dims = " ".join(f"dim: {d}" for d in shape)
        text += f'layer {{ name: "in" type: "Input" top: "{name}" input_param {{ shape {{ {dims} }} }} }}\n'
    wiring = [f'bottom: "{name}"' for name in names] + [f'top: "{top}"' for top in tops.split()]
    return text + f'layer {{ name: "it" {" ".join(wiring)} {layer} }}\n'


def conv(params: str, kind: str = "Convolution") -> str:
    return f'type: "{kind}" convolution_param {{ {params} }}'


def layer(kind: str, params: str = "") -> str:
    """A layer of a type with the fields of its own parameter message."""
    names = {"LRN": "lrn", "PReLU": "prelu", "SPP": "spp", "ArgMax": "argmax",
             "LSTM": "recurrent", "RNN": "recurrent"}  # fmt: skip
    name = names.get(kind) or re.sub(r"(?<!^)([A-Z])", r"_\1", kind).lower()
    return f'type: "{kind}" {name}_param {{ {params} }}' if params else f'type: "{kind}"'


IMAGE = (2, 6, 9, 7)
TWO_WEIGHTS = " loss_weight: 1 loss_weight: 0"

SINGLE = [
    # Windows
    single(conv("num_output: 4 kernel_size: 3"), IMAGE),
    single(conv("num_output: 4 kernel_size: 3 stride: 2 pad: 1 group: 2"), IMAGE),
    single(conv("num_output: 4 kernel_size: 3 stride: 2 pad: 4"), IMAGE),
    single(conv("num_output: 4 kernel_size: 3 dilation: 2 bias_term: false"), IMAGE),
    single(conv("num_output: 4 kernel_size: 3 dilation: 2 dilation: 3 pad: 1 pad: 2"), IMAGE),
    single(conv("num_output: 4 kernel_h: 5 kernel_w: 2 pad_h: 2 stride_h: 3 stride_w: 2"), IMAGE),
    single(conv("num_output: 4 kernel_size: 5 kernel_size: 2 stride: 1 stride: 3"), IMAGE),
    single(conv("num_output: 4 kernel_size: 4 stride: 2"), (1, 3, 3, 5)),  # window larger than its input
    single(conv("num_output: 4 kernel_size: 3"), (2, 6)),  # no spatial axes
    single(conv("num_output: 4"), (2, 6)),
    single(conv("num_output: 4 kernel_size: 3 pad: 1 stride: 2"), (2, 6, 9)),
    single(conv("num_output: 4 kernel_size: 3 kernel_size: 1 kernel_size: 2 pad: 1 pad: 0 pad: 2"),
           (2, 6, 9, 7, 5)),
    single(conv("num_output: 4 kernel_size: 2 axis: 2 group: 2"), (2, 5, 6, 7)),
    single(conv("num_output: 4 kernel_size: 2 axis: -3"), (2, 5, 6, 7)),
    single(conv("num_output: 4 kernel_size: 2 force_nd_im2col: true"), IMAGE),
    single(conv("num_output: 4 kernel_size: 2"), IMAGE, IMAGE, tops="x y"),
    single(conv("num_output: 4 kernel_size: 3 stride: 2 pad: 1", "Deconvolution"), IMAGE),
    single(conv("num_output: 9 kernel_size: 4 stride: 2 group: 3 dilation: 2", "Deconvolution"), IMAGE),
    single(conv("num_output: 4 kernel_h: 2 kernel_w: 5 bias_term: false", "Deconvolution"), IMAGE),
    single(conv("kernel_size: 3 pad: 1 stride: 2", "Im2col"), IMAGE),
    single(conv("kernel_h: 3 kernel_w: 2 dilation: 2", "Im2col"), IMAGE),
    single(layer("Pooling", "kernel_size: 3 stride: 2"), IMAGE),
    single(layer("Pooling", "kernel_size: 3 stride: 2 pad: 1 pool: AVE"), IMAGE),
    single(layer("Pooling", "kernel_size: 2 stride: 3 pad: 1"), IMAGE),  # clipped: starts in the padding
    single(layer("Pooling", "kernel_size: 2 stride: 2 pad: 1"), (1, 2, 4, 5)),
    single(layer("Pooling", "kernel_h: 1 kernel_w: 2 stride: 2 pad_h: 0 pad_w: 1"), (1, 2, 4, 4)),
    single(layer("Pooling", "kernel_size: 1 stride: 2"), (1, 2, 4, 4)),
    single(layer("Pooling", "kernel_size: 1 stride: 3"), (1, 2, 5, 6)),  # not clipped: starts outside
    single(layer("Pooling", "kernel_h: 4 kernel_w: 2 stride_h: 1 stride_w: 3"), IMAGE),
    single(layer("Pooling", "kernel_size: 3 stride: 2 round_mode: FLOOR"), (1, 2, 8, 9)),
    single(layer("Pooling", "kernel_size: 3 stride: 2 pad: 1 round_mode: FLOOR"), (1, 2, 8, 9)),
    single(layer("Pooling", "kernel_size: 5 stride: 2"), (1, 2, 4, 4)),  # window larger than its input
    single(layer("Pooling", "global_pooling: true pool: AVE"), IMAGE),
    single(layer("Pooling", "kernel_size: 3 stride: 2"), IMAGE, tops="out mask"),
    single(layer("SPP", "pyramid_height: 3"), (2, 5, 7, 9)),
    single(layer("SPP", "pyramid_height: 1"), (2, 5, 7, 9)),
    # Everything, an axis, or a table
    single(layer("InnerProduct", "num_output: 5"), IMAGE),
    single(layer("InnerProduct", "num_output: 5 axis: 2 bias_term: false"), IMAGE),
    single(layer("InnerProduct", "num_output: 5 axis: -1 transpose: true"), IMAGE),
    single(layer("InnerProduct", "num_output: 5 axis: 0"), IMAGE),
    single(layer("Embed", "num_output: 5 input_dim: 10"), (4, 3)),
    single(layer("Embed", "num_output: 5 input_dim: 10 bias_term: false"), (4,)),
    single(layer("LSTM", "num_output: 5"), (3, 2, 4), (3, 2)),
    single(layer("LSTM", "num_output: 5"), (3, 2, 4, 2), (3, 2), (2, 7)),
    single(layer("LSTM", "num_output: 5 expose_hidden: true"), (3, 2, 4), (3, 2), (1, 2, 5), (1, 2, 5),
           tops="o h C"),
    single(layer("LSTM", "num_output: 5 expose_hidden: true"), (3, 2, 4), (3, 2), (2, 7), (1, 2, 5),
           (1, 2, 5), tops="o h C"),
    single(layer("RNN", "num_output: 5"), (3, 2, 4), (3, 2)),
    single(layer("RNN", "num_output: 5"), (3, 2, 4), (3, 2), (2, 7, 3)),
    single(layer("RNN", "num_output: 5 expose_hidden: true"), (3, 2, 4), (3, 2), (1, 2, 5), tops="o h"),
    single(layer("RNN", "num_output: 5 expose_hidden: true"), (3, 2, 4), (3, 2), (2, 7), (1, 2, 5),
           tops="o h"),
    single(layer("LSTMUnit"), (1, 2, 5), (1, 2, 20), (1, 2), tops="C h"),
    # The same shape again
    *(single(layer(kind), IMAGE) for kind in (
        "AbsVal", "BNLL", "BatchNorm", "Bias", "Dropout", "ELU", "Exp", "LRN", "Log", "MVN", "PReLU", "Power",
        "ReLU", "Scale", "Sigmoid", "Softmax", "Split", "Swish", "TanH", "Threshold",
    )),
    single(layer("Clip", "min: -1 max: 1"), IMAGE),
    single(layer("LRN", "norm_region: WITHIN_CHANNEL local_size: 3"), IMAGE),
    single(layer("BatchNorm"), (5, 4)),
    single(layer("PReLU", "channel_shared: true"), IMAGE),
    single(layer("PReLU"), (5, 4)),
    single(layer("Scale", "bias_term: true"), IMAGE),
    single(layer("Scale", "bias_term: true axis: 0 num_axes: -1"), IMAGE),
    single(layer("Scale", "axis: -2 num_axes: 2"), IMAGE),
    single(layer("Scale", "num_axes: 0 bias_term: true"), IMAGE),
    single(layer("Scale", "axis: 0 bias_term: true"), IMAGE, (2, 6)),
    single(layer("Scale"), IMAGE, ()),
    single(layer("Bias", "axis: 1 num_axes: 2"), IMAGE),
    single(layer("Bias", "axis: -1"), IMAGE),
    single(layer("Bias"), IMAGE, (6, 9)),
    single(layer("Split"), IMAGE, tops="x y z"),
    # Joined, cut, reordered
    single(layer("Concat"), (2, 3, 4), (2, 5, 4), (2, 1, 4)),
    single(layer("Concat", "axis: -1"), (2, 3, 4), (2, 3, 6)),
    single(layer("Concat", "concat_dim: 0"), (2, 3, 4), (5, 3, 4)),
    single(layer("Concat"), IMAGE),
    single(layer("Eltwise"), IMAGE, IMAGE, IMAGE),
    single(layer("Eltwise", "operation: MAX"), (3,), (3,)),
    single(layer("Slice"), IMAGE, tops="x y z"),
    single(layer("Slice", "slice_point: 1 slice_point: 5"), IMAGE, tops="x y z"),
    single(layer("Slice", "axis: -2 slice_point: 8"), IMAGE, tops="x y"),
    single(layer("Slice", "slice_dim: 0"), IMAGE, tops="x y"),
    single(layer("Slice"), IMAGE),
    single(layer("Flatten"), IMAGE),
    single(layer("Flatten", "axis: 0 end_axis: -2"), IMAGE),
    single(layer("Flatten", "axis: 2 end_axis: 1"), IMAGE),  # puts an axis of 1 in
    single(layer("Reshape", "shape { dim: 0 dim: -1 dim: 9 }"), IMAGE),
    single(layer("Reshape", "shape { dim: 3 dim: -1 } axis: 1 num_axes: 1"), IMAGE),
    single(layer("Reshape", "shape { dim: 0 dim: -1 } axis: 2"), IMAGE),
    single(layer("Reshape", "shape { dim: 1 dim: 1 } axis: -1 num_axes: 0"), IMAGE),
    single(layer("Reshape", "shape { dim: -1 } axis: -3 num_axes: 2"), IMAGE),
    single(layer("Reshape", "shape { }"), (1, 1)),
    single(layer("Crop", "offset: 1"), IMAGE, (1, 1, 3, 4)),
    single(layer("Crop", "axis: 1 offset: 2 offset: 0 offset: 3"), IMAGE, (1, 4, 9, 2)),
    single(layer("Crop", "axis: -1"), IMAGE, (1, 1, 3, 4, 8)),
    single(layer("Tile", "tiles: 3"), IMAGE),
    single(layer("Tile", "tiles: 2 axis: -1"), IMAGE),
    single(layer("BatchReindex"), IMAGE, (7,)),
    single(layer("Reduction"), IMAGE),
    single(layer("Reduction", "axis: 2 operation: MEAN"), IMAGE),
    single(layer("Reduction", "axis: -1"), IMAGE),
    single(layer("ArgMax"), (5, 4)),
    single(layer("ArgMax", "top_k: 3 out_max_val: true"), IMAGE),
    single(layer("ArgMax", "top_k: 2 axis: -1"), IMAGE),
    single(layer("ArgMax", "top_k: 2 axis: 1 out_max_val: true"), IMAGE),
    single(layer("ArgMax", "out_max_val: true"), (5, 4, 3, 2, 2)),
    # Losses and measures
    single(layer("SoftmaxWithLoss"), (5, 4), (5,)),
    single(layer("SoftmaxWithLoss"), (5, 4, 3, 2), (5, 1, 3, 2)),
    single(layer("SigmoidCrossEntropyLoss"), IMAGE, IMAGE),
    single(layer("EuclideanLoss"), IMAGE, IMAGE),
    single(layer("HingeLoss"), (5, 4), (5,)),
    single(layer("MultinomialLogisticLoss"), (5, 4), (5,)),
    single(layer("ContrastiveLoss"), (5, 4, 1, 1), (5, 4, 1, 1), (5, 1, 1, 1)),
    single(layer("InfogainLoss"), (5, 4), (5,), (1, 1, 4, 4)),
    single(layer("InfogainLoss") + TWO_WEIGHTS, (5, 4), (5,), (1, 1, 4, 4), tops="loss prob"),
    single(layer("Accuracy"), (5, 4), (5,)),
    single(layer("Accuracy", "top_k: 2"), (5, 4), (5,)),
    single(layer("Accuracy", "axis: -1"), (5, 3, 4), (5, 3), tops="accuracy per_class"),
    single(layer("Silence"), IMAGE, tops=""),
    # Sources
    single('type: "Input" input_param { shape { dim: 3 dim: 2 } }', tops="x y"),
    single('type: "Input" input_param { shape { dim: 3 dim: 2 } shape { dim: 4 } }', tops="x y"),
    single('type: "Input" input_param { shape { } }'),
    single(layer("Parameter", "shape { dim: 3 dim: 2 }")),
    single(layer("DummyData", "shape { dim: 3 dim: 2 }"), tops="x y"),
    single(layer("DummyData", "shape { dim: 3 } shape { dim: 1 dim: 2 }"), tops="x y"),
    single(layer("DummyData", "num: 3 channels: 2 height: 4 width: 5"), tops="x y"),
    single(layer("DummyData", "num: 3 num: 1 channels: 2 height: 4 width: 5 width: 6"), tops="x y"),
    single(layer("MemoryData", "batch_size: 3 channels: 2 height: 4 width: 5"), tops="x y"),
]  # fmt: skip


def test_every_layer_type_as_in_caffe(in_caffe, tmp_path):
    wrong = []
    for text in SINGLE:
        path = tmp_path / "single.prototxt"
        path.write_text(text)
        try:
            wanted = caffes(in_caffe.net(path))
            found = ours(Net.parse(text))
        except Exception as error:
            wrong.append(f"{text}{error!r}")
            continue
        if found != wanted:
            wrong.append(f"{text}Caffe {wanted}\nours  {found}")
    assert not wrong, "\n\n".join(wrong)


# Needs files beside the net, or is tested with the zoo (Data) or below (ImageData).
ELSEWHERE = {"Data", "HDF5Output", "ImageData"}


def test_every_rule_is_compared_with_caffe():
    tested = {one.type for text in SINGLE for one in Net.parse(text).layers}
    assert tested == RULES.keys() - ELSEWHERE


# (a net that Caffe refuses, too; what we say about it)
REFUSED = [
    (single(conv("num_output: 4 kernel_size: 12"), IMAGE), "its window 12x12 exceeds its input 9x7"),
    (single(conv("kernel_size: 3"), IMAGE), "num_output is 0; it must be at least 1"),
    (single(conv("num_output: 4"), IMAGE), "kernel_size is missing"),
    (single(conv("num_output: 4 kernel_size: 0"), IMAGE), "kernel_size is 0"),
    (single(conv("num_output: 4 kernel_size: 3 stride: 0"), IMAGE), "stride is 0"),
    (single(conv("num_output: 4 kernel_size: 3 stride_h: 2"), IMAGE), "stride_h and stride_w go together"),
    (single(conv("num_output: 4 kernel_h: 3"), IMAGE), "kernel_h and kernel_w go together"),
    (single(conv("num_output: 4 kernel_size: 3 kernel_h: 3 kernel_w: 3"), IMAGE), "beside another kernel"),
    (single(conv("num_output: 4 kernel_size: 3 pad: 1 pad: 1 pad: 1"), IMAGE), "3 values of pad"),
    (single(conv("num_output: 4 kernel_size: 3 group: 4"), IMAGE), "6 channels are no multiple of group 4"),
    (single(conv("num_output: 4 kernel_size: 3 group: 3"), IMAGE), "num_output 4 is no multiple of group 3"),
    (single(conv("num_output: 4 kernel_size: 3 axis: 4"), IMAGE), "axis 4 of a 4-D bottom (2x6x9x7)"),
    (single(conv("num_output: 4 kernel_size: 2 pad: 9", "Deconvolution"), IMAGE), "leaves nothing"),
    (single(layer("Pooling", "kernel_size: 3"), (2, 6, 9)), "Pooling needs a 4-D bottom, not 2x6x9"),
    (single(layer("Pooling", "kernel_size: 13 stride: 2"), IMAGE), "its window 13x13 is larger than its"),
    (single(layer("Pooling", "stride: 2"), IMAGE), "kernel_size is missing"),
    (single(layer("Pooling", "kernel_size: 3 stride: 0"), IMAGE), "and stride must be at least 1"),
    (single(layer("Pooling", "kernel_size: 3 pad: 3"), IMAGE), "pad must be smaller than kernel_size"),
    (single(layer("Pooling", "kernel_size: 3 kernel_h: 3 kernel_w: 3"), IMAGE), "give kernel_size, or both"),
    (single(layer("Pooling", "global_pooling: true kernel_size: 3"), IMAGE), "and a kernel_size"),
    (single(layer("Pooling", "global_pooling: true stride: 2"), IMAGE), "with a pad or stride"),
    (single(layer("SPP", "pyramid_height: 3"), (2, 5, 5, 5)), "5 pixels do not divide into 4 bins"),
    (single(layer("SPP"), IMAGE), "pyramid_height is 0"),
    (single(layer("SPP", "pyramid_height: 1"), (4, 5)), "too few axes (4x5) for SPP"),
    (single(layer("InnerProduct", "num_output: 5"), (4,)), "axis 1 of a 1-D bottom (4)"),
    (single(layer("InnerProduct"), IMAGE), "num_output is missing"),
    (single(layer("Embed", "num_output: 5"), (4,)), "num_output or input_dim is missing"),
    (single(layer("LSTM", "num_output: 5"), (3,), (3, 2)), "too few axes (3) for LSTM"),
    (single(layer("LSTM", "num_output: 5"), (3, 2, 4)), "LSTM has 1 bottoms, too few"),
    (single(layer("PReLU"), (4,)), "too few axes (4) for PReLU"),
    (single(layer("BatchNorm"), (4,)), "too few axes (4) for BatchNorm"),
    (single(layer("Scale", "axis: 2 num_axes: 3"), IMAGE), "num_axes 3 from axis 2 of 2x6x9x7"),
    (single(layer("Concat"), (2, 3, 4), (2, 3, 5)), "joins 2x3x4, 2x3x5; only axis 1 may differ"),
    (single(layer("Concat"), (2, 3, 4), (2, 3)), "joins 2x3x4, 2x3; only axis 1 may differ"),
    (single(layer("Eltwise"), IMAGE, (2, 6, 9, 8)), "its bottoms differ: 2x6x9x7, 2x6x9x8"),
    (single(layer("Eltwise"), IMAGE), "Eltwise has 1 bottoms, too few"),
    (single(layer("Slice"), IMAGE, tops="x y z w"), "6 channels do not divide into 4 tops"),
    (single(layer("Slice", "slice_point: 4 slice_point: 2"), IMAGE, tops="x y z"), "do not cut 6 channels"),
    (single(layer("Slice", "slice_point: 4"), IMAGE, tops="x y z"), "do not cut 6 channels into 3 tops"),
    (single(layer("Flatten", "axis: 3 end_axis: 1"), IMAGE), "its axis 3 lies behind its end_axis 1"),
    (single(layer("Reshape", "shape { dim: 0 dim: 5 }"), IMAGE), "756 values do not fit 2x5"),
    (single(layer("Reshape", "shape { dim: -1 dim: 5 }"), IMAGE), "756 values do not divide into -1x5"),
    (single(layer("Reshape", "shape { dim: -1 dim: -1 dim: 756 }"), IMAGE), "its output would be -1x-1x756"),
    (single(layer("Reshape", "shape { dim: 0 dim: 0 dim: 0 }"), (2, 3)), "a dim of 0 copies an axis"),
    (single(layer("Reshape", "axis: 5"), IMAGE), "axis and num_axes lie outside its 4-D bottom"),
    (single(layer("Crop", "offset: 5"), IMAGE, (1, 1, 3, 4)), "4 at offset 5 reaches beyond its input of 7"),
    (single(layer("Crop", "offset: 1 offset: 1 offset: 1"), IMAGE, (1, 1, 3, 4)), "3 offsets; give one"),
    (single(layer("Crop"), IMAGE, (1, 1, 3)), "its bottoms have different axes: 2x6x9x7, 1x1x3"),
    (single(layer("Tile"), IMAGE), "tiles is missing"),
    (single(layer("ArgMax", "top_k: 8 axis: -1"), IMAGE), "top_k is 8; it must be 1 to 7"),
    (single(layer("ArgMax", "top_k: 8"), (5, 4)), "top_k is 8; it must be 1 to 4"),
    (single(layer("BatchReindex"), IMAGE, ()), "too few axes (scalar) for BatchReindex"),
    (single(layer("Accuracy"), (5, 4)), "Accuracy has 1 bottoms, too few"),
    (single(layer("DummyData", "num: 3 num: 1 num: 2 channels: 2 channels: 1 height: 4 width: 5"),
            tops="x y z"), "give num, channels, height and width once, or once per top"),
    (single('type: "Input" input_param { shape { dim: 65536 dim: 65536 } }'), "output would be 65536x65536"),
]  # fmt: skip


def test_what_caffe_refuses_is_refused_with_the_layer_and_the_reason(in_caffe, tmp_path):
    wrong = []
    for text, reason in REFUSED:
        path = tmp_path / "refused.prototxt"
        path.write_text(text)
        with contextlib.suppress(in_caffe.Refused):
            wrong.append(f"{text}Caffe takes it: {in_caffe.net(path)}")
        try:
            wrong.append(f"{text}taken: {ours(Net.parse(text, 'f'))}")
        except NetError as error:
            if reason not in str(error) or "layer 'it'" not in str(error):
                wrong.append(f"{text}{error}")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ("batch_size: 5 new_height: 20 new_width: 30", (5, 3, 20, 30)),
        ("batch_size: 5 new_height: 20 new_width: 30 is_color: false", (5, 1, 20, 30)),
        ("batch_size: 5", None),
    ],
)
def test_image_data(params, shape, in_caffe, tmp_path):
    import cv2
    import numpy as np

    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((40, 50, 3), np.uint8))
    (tmp_path / "list.txt").write_text(f"{tmp_path}/image.png 0\n")
    text = single(layer("ImageData", f'source: "{tmp_path}/list.txt" {params}'), tops="data label")
    path = tmp_path / "net.prototxt"
    path.write_text(text)
    wanted = caffes(in_caffe.net(path))[0]
    found = ours(Net.parse(text))[0]
    assert found == {"data": shape, "label": (5,)}
    assert found == wanted or (shape is None and wanted["data"] == (5, 3, 40, 50))


def test_a_forks_layer_makes_everything_behind_it_unknown():
    text = single(layer("Permute"), IMAGE)
    text += 'layer { name: "r" type: "ReLU" bottom: "out" top: "r" }'
    text += 'layer { name: "fc" type: "InnerProduct" bottom: "r" top: "fc" }'
    net = Net.parse(text)
    assert ours(net)[0] == {"a": IMAGE, "out": None, "r": None, "fc": None}
    weights = {one.name: shapes for one, shapes in all_param_shapes(net).items()}
    assert weights == {"in": [], "it": None, "r": [], "fc": None}


def test_a_field_of_a_fork_in_a_layer_of_stock_caffe_does_too():
    fused = layer("LRN", "local_size: 5 fuse_type: FUSED_POOL_MAX pooling_param { kernel_size: 3 }")
    for strange, known in ((fused, False), ('type: "ReLU" relu_param { engine: NEON }', True)):
        found = ours(Net.parse(single(strange, IMAGE)))[0]
        assert found == {"a": IMAGE, "out": IMAGE if known else None}


def test_an_input_that_says_no_shape_has_none():
    """Fully convolutional nets leave it to whoever runs them."""
    conv1 = (
        'layer { name: "c" type: "Convolution" bottom: "a" top: "c" convolution_param { num_output: 4 } }\n'
    )
    for head in ('input: "a"\n', 'layer { name: "in" type: "Input" top: "a" }\n'):
        assert ours(Net.parse(head + conv1))[0] == {"a": None, "c": None}


def test_an_input_of_size_0_gets_its_size_at_run_time(in_caffe, tmp_path):
    """On an empty batch Caffe builds; on empty images hardly a layer, but forks and other engines do."""
    for shape, known in (((0, 3, 9, 9), True), ((1, 3, 0, 0), False), ((1, 0, 9, 9), False)):
        dims = " ".join(f"dim: {size}" for size in shape)
        for head in (
            f'input: "a" input_shape {{ {dims} }}\n',
            f'input: "a" {dims.replace("dim", "input_dim")}\n',
            f'layer {{ name: "in" type: "Input" top: "a" input_param {{ shape {{ {dims} }} }} }}\n',
        ):
            path = tmp_path / "net.prototxt"
            path.write_text(head + 'layer { name: "r" type: "ReLU" bottom: "a" top: "r" }\n')
            assert ours(Net.load(path))[0] == dict.fromkeys("ar", shape if known else None)
            assert caffes(in_caffe.net(path))[0] == dict.fromkeys("ar", shape)


def test_a_batch_replaces_the_first_dimension_of_inputs_only():
    text = single(layer("InnerProduct", "num_output: 5"), IMAGE)
    text += 'layer { name: "p" type: "Parameter" top: "p" parameter_param { shape { dim: 7 dim: 2 } } }'
    view = Net.parse(text).graph.view(TEST)
    shapes = {value.name: shape for value, shape in infer(view, batch=11).items()}
    assert shapes == {"a": (11, 6, 9, 7), "out": (11, 5), "p": (7, 2)}


def test_sizes_in_numbers_known_by_heart():
    assert conv_size(227, 11, 4, 0) == 55
    assert conv_size(224, 7, 2, 3) == 112
    assert pool_size(112, 3, 2, 0) == 56
    assert pool_size(112, 3, 2, 0, ceil=False) == 55
    assert pool_size(4, 1, 2, 0, clip=True) == 2
    assert pool_size(4, 1, 2, 0) == 3


def test_probabilities_beside_a_loss():
    # Caffe 1.0 itself stumbles over a SoftmaxWithLoss with two tops; its forks give them.
    net = Net.parse(single(layer("SoftmaxWithLoss") + TWO_WEIGHTS, (5, 4), (5,), tops="loss prob"))
    assert ours(net)[0] == {"a": (5, 4), "b": (5,), "loss": (), "prob": (5, 4)}


def test_a_layer_by_itself():
    relu = Layer.from_text('layer { name: "r" type: "ReLU" bottom: "a" top: "b" }')
    assert layer_shapes(relu, [(2, 3)]) == [(2, 3)]
    assert layer_shapes(relu, [None]) == [None]


# ---- the zoo ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_deploy_as_in_caffe(name, in_caffe):
    path = ZOO / name / "deploy.prototxt"
    assert ours(Net.load(path)) == caffes(in_caffe.net(path))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What a train_val net reads, by channels: folders with a database of one image, and a mean image."""
    folders = {channels: tmp_path_factory.mktemp("images") for channels in (1, 3)}
    for channels, folder in folders.items():
        pixels = channels * 256 * 256
        datum = caffe_pb2.Datum(channels=channels, height=256, width=256, data=bytes(pixels), label=0)
        with lmdb.open(str(folder / "lmdb")) as database, database.begin(write=True) as transaction:
            transaction.put(b"0", datum.SerializeToString())
        mean = caffe_pb2.BlobProto(num=1, channels=channels, height=256, width=256, data=[0] * pixels)
        (folder / "mean.binaryproto").write_bytes(mean.SerializeToString())
    return folders


@pytest.mark.parametrize("phase", [TRAIN, TEST])
@pytest.mark.parametrize("name", NETS)
def test_train_val_as_in_caffe(name, phase, in_caffe, images, tmp_path):
    text = (ZOO / name / "train_val.prototxt").read_text()
    channels = 1 if "fashion" in name else 3
    folder = images[channels]
    text = re.sub(r'source: "[^"]*"', f'source: "{folder}/lmdb"', text)
    text = re.sub(r'mean_file: "[^"]*"', f'mean_file: "{folder}/mean.binaryproto"', text)
    text = re.sub(r"batch_size: \d+", "batch_size: 2", text)
    text = re.sub(r"(weight|bias)_filler \{[^}]*\}", "", text)  # the fillers take Caffe seconds
    path = tmp_path / "train_val.prototxt"
    path.write_text(text)
    net = Net.load(path, image=(channels, 256, 256))
    assert ours(net, phase) == caffes(in_caffe.net(path, phase))


@pytest.mark.parametrize(
    ("transform", "image", "shape"),
    [
        ("", None, None),
        ("crop_size: 20", None, (5, 3, 20, 20)),
        ("crop_size: 20 mean_value: 1", None, (5, 3, 20, 20)),
        ("crop_size: 20 mean_value: 1 mean_value: 2", None, (5, 2, 20, 20)),
        ("crop_size: 20", (1, 30, 40), (5, 1, 20, 20)),
        ("", (1, 30, 40), (5, 1, 30, 40)),
        ("force_gray: true", (3, 30, 40), (5, 1, 30, 40)),
        ("force_color: true", (1, 30, 40), (5, 3, 30, 40)),
    ],
)
def test_data_as_far_as_the_file_says(transform, image, shape):
    net = Net.parse(
        'layer { name: "d" type: "Data" top: "data" top: "label" data_param { batch_size: 5 } '
        f"transform_param {{ {transform} }} }}"
    )
    net.image = image
    assert ours(net)[0] == {"data": shape, "label": (5,)}


# ---- random nets ------------------------------------------------------------------------------------------


@st.composite
def random_net(draw):
    """A chain and branches of convolutions, poolings, LRNs, Eltwises and Concats, mostly valid."""
    number = draw(st.integers(1, 3))
    size = (number, draw(st.integers(1, 8)), draw(st.integers(5, 40)), draw(st.integers(5, 40)))
    dims = " ".join(f"dim: {d}" for d in size)
    lines = [f'layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ {dims} }} }} }}']
    blobs = ["data"]
    for i in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(["Convolution", "Pooling", "LRN", "ReLU", "Eltwise", "Concat"]))
        bottoms = [draw(st.sampled_from(blobs[-3:]))]
        kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        params = ""
        if kind == "Convolution":
            out, pad, dilation = draw(st.integers(1, 6)), draw(st.integers(0, 4)), draw(st.integers(1, 2))
            window = f"kernel_size: {kernel} pad: {pad} stride: {stride} dilation: {dilation}"
            params = f"convolution_param {{ num_output: {out} {window} }}"
        elif kind == "Pooling":
            pad = draw(st.integers(0, kernel - 1))
            ways = draw(st.sampled_from(["", "pool: AVE", "round_mode: FLOOR"]))
            params = f"pooling_param {{ kernel_size: {kernel} stride: {stride} pad: {pad} {ways} }}"
        elif kind in ("Eltwise", "Concat"):
            bottoms.append(draw(st.sampled_from(blobs)))
        top = f"blob{i}"
        wiring = "".join(f' bottom: "{name}"' for name in bottoms) + f' top: "{top}"'
        lines.append(f'layer {{ name: "layer{i}" type: "{kind}"{wiring} {params} }}')
        blobs.append(top)
    return "\n".join(lines)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=random_net())
def test_random_nets_as_in_caffe(text, in_caffe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "random.prototxt"
    path.write_text(text)
    try:
        found = ours(Net.parse(text))
    except NetError:
        found = None
    try:
        wanted = caffes(in_caffe.net(path))
    except in_caffe.Refused:
        wanted = None
    assert found == wanted or (found is None and wanted and any(0 in s for s in wanted[0].values()))


@st.composite
def other_numbers(draw, numbers):
    """A single-layer net with some of its numbers changed."""
    text = draw(st.sampled_from([text for text in SINGLE if re.search(r": -?\d", text)]))
    places = [match.span() for match in re.finditer(r"(?<=: )-?\d+", text)]
    for start, end in sorted(draw(st.sets(st.sampled_from(places), min_size=1, max_size=3)), reverse=True):
        text = text[:start] + str(draw(st.sampled_from(numbers))) + text[end:]
    return text


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=other_numbers([*range(-2, 8), 12]))
def test_what_both_take_has_the_same_shapes(text, in_caffe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "numbers.prototxt"
    path.write_text(text)
    with contextlib.suppress(NetError, PrototxtError, in_caffe.Refused):
        (blobs, params), wanted = ours(Net.parse(text)), caffes(in_caffe.net(path))
        if any(0 in shape for shape in wanted[0].values()):  # sizes given at run time: known or left open
            blobs = {name: shape or wanted[0][name] for name, shape in blobs.items()}
            params = {**wanted[1], **params}
        assert (blobs, params) == wanted


@settings(max_examples=300, deadline=20_000)
@given(other_numbers([-(2**31), -1, 0, 1, 2, 255, 65536, 2**31 - 1, 2**32 - 1, 2**63 - 1]))
def test_no_number_breaks_more_than_its_net(text):
    with contextlib.suppress(NetError, PrototxtError):
        found = cost(Net.parse(text))
        assert 0 <= found.peak_activation_bytes <= found.activation_bytes


@pytest.mark.parametrize(("ceil_mode", "mode"), [("true", "CEIL"), ("0", "FLOOR"), ("false", "FLOOR")])
def test_forks_ceil_mode_is_round_mode(ceil_mode, mode):
    pool = 'layer { type: "Pooling" bottom: "x" top: "y" pooling_param { kernel_size: 2 stride: 2 %s } }'
    theirs, stock = (
        Layer.from_text(pool % option) for option in (f"ceil_mode: {ceil_mode}", f"round_mode: {mode}")
    )
    assert layer_shapes(theirs, [(1, 2, 8, 9)]) == layer_shapes(stock, [(1, 2, 8, 9)])
    assert theirs.strange is None
    assert [field.name for field in theirs.unknown] == ["ceil_mode"]  # stock Caffe refuses it all the same


def test_a_ceil_mode_that_is_none_is_a_forks():
    text = (
        'layer { name: "p" type: "Pooling" bottom: "x" top: "y" %s_param { kernel_size: 3 ceil_mode: %s } }'
    )
    for where, value in (("pooling", "2"), ("convolution", "true")):
        layer = Layer.from_text(text % (where, value))
        assert layer.strange is not None
        assert layer_shapes(layer, [(1, 2, 8, 9)]) == [None]
