"""Typed reading of layer parameters: the several ways to say the same, and Caffe's defaults."""

import pytest

from rebirth_caffe.errors import NetError
from rebirth_caffe.net import Layer
from rebirth_caffe.params import Conv, Pool, conv, pool
from rebirth_caffe.schema import caffe_pb2


def layer(text: str, kind: str = "Convolution") -> caffe_pb2.LayerParameter:
    return Layer.from_text(f'layer {{ name: "it" type: "{kind}" {text} }}').param


PLAIN = {"num_output": 4, "kernel": (3, 3), "stride": (1, 1), "pad": (0, 0), "dilation": (1, 1), "group": 1,
         "bias_term": True, "axis": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "differs"),
    [
        ("kernel_size: 3", {}),
        ("kernel_size: 3 kernel_size: 3", {}),
        ("kernel_h: 3 kernel_w: 3 stride_h: 1 stride_w: 1 pad_h: 0 pad_w: 0", {}),
        ("kernel_size: 5 kernel_size: 2", {"kernel": (5, 2)}),
        ("kernel_h: 5 kernel_w: 2", {"kernel": (5, 2)}),
        ("kernel_size: 3 stride: 2 pad: 1", {"stride": (2, 2), "pad": (1, 1)}),
        ("kernel_size: 3 stride_h: 2 stride_w: 1", {"stride": (2, 1)}),
        ("kernel_size: 3 pad_w: 2", {"pad": (0, 2)}),
        ("kernel_size: 3 pad: 1 pad: 2", {"pad": (1, 2)}),
        ("kernel_size: 3 dilation: 2", {"dilation": (2, 2)}),
        ("kernel_size: 3 dilation: 2 dilation: 4", {"dilation": (2, 4)}),
        ("kernel_size: 3 group: 2 bias_term: false axis: -3", {"group": 2, "bias_term": False, "axis": -3}),
    ],
)
def test_a_convolution(text, differs):
    wanted = Conv(**{**PLAIN, **differs})
    assert conv(layer(f"convolution_param {{ num_output: 4 {text} }}")) == wanted


def test_a_convolution_over_other_than_two_axes():
    three = conv(layer("convolution_param { num_output: 4 kernel_size: 3 pad: 1 pad: 2 pad: 3 }"), 3)
    assert (three.kernel, three.stride, three.pad, three.dilation) == (
        (3,) * 3,
        (1,) * 3,
        (1, 2, 3),
        (1,) * 3,
    )
    none = conv(layer("convolution_param { num_output: 4 }"), 0)
    assert (none.kernel, none.stride, none.pad, none.dilation, none.extent) == ((), (), (), (), ())
    with pytest.raises(NetError, match="kernel_h/kernel_w beside another kernel"):
        conv(layer("convolution_param { num_output: 4 kernel_h: 3 kernel_w: 3 }"), 3)


def test_the_extent_of_a_window():
    wide = conv(layer("convolution_param { num_output: 4 kernel_h: 3 kernel_w: 1 dilation: 4 dilation: 9 }"))
    assert wide.extent == (9, 1)


def test_an_im2col_has_no_num_output():
    assert conv(layer("convolution_param { kernel_size: 3 }", "Im2col")).kernel == (3, 3)
    with pytest.raises(NetError, match=r"^layer 'it': num_output is 0; it must be at least 1$"):
        conv(layer("convolution_param { kernel_size: 3 }"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("kernel_size: 3", Pool("MAX", (3, 3), (1, 1), (0, 0), True)),
        ("kernel_size: 3 stride: 2 pad: 1 pool: AVE", Pool("AVE", (3, 3), (2, 2), (1, 1), True)),
        ("kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 1 pad_h: 0 pad_w: 1 round_mode: FLOOR",
         Pool("MAX", (3, 2), (2, 1), (0, 1), False)),
        ("kernel_size: 2 pool: STOCHASTIC", Pool("STOCHASTIC", (2, 2), (1, 1), (0, 0), True)),
        ("global_pooling: true pool: AVE", Pool("AVE", None, (1, 1), (0, 0), True)),
        ("global_pooling: true stride: 1 pad: 0", Pool("MAX", None, (1, 1), (0, 0), True)),
    ],
)  # fmt: skip
def test_a_pooling(text, wanted):
    assert pool(layer(f"pooling_param {{ {text} }}", "Pooling")) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel_h: 3", "give kernel_size, or both kernel_h and kernel_w"),
        ("kernel_size: 3 stride_w: 2", "give stride, or both stride_h and stride_w"),
        ("kernel_size: 3 pad: 1 pad_h: 1 pad_w: 1", "give pad, or both pad_h and pad_w"),
        ("kernel_size: 3 pad_h: 0 pad_w: 3", "pad must be smaller than kernel_size"),
        ("kernel_size: 0", "kernel_size and stride must be at least 1"),
        ("", "kernel_size is missing; give it or global_pooling: true"),
        ("global_pooling: true pad: 1", "global_pooling with a pad or stride; drop these"),
    ],
)
def test_a_pooling_that_contradicts_itself(text, message):
    with pytest.raises(NetError) as caught:
        pool(layer(f"pooling_param {{ {text} }}", "Pooling"))
    assert str(caught.value) == f"layer 'it': {message}"
