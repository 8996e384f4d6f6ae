"""Windows over pixels, and the kernel a reborn convolution gets."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebirth_caffe.params import Conv
from rebirth_caffe.rules.geometry import Choice, Geometry, Window, choose, compose, take_in, text
from rebirth_caffe.shapes import conv_size, pool_size

MODES = ("keep", "auto", "cover")
POOL = Window(3, 2, 0)


def square(kernel: int, stride: int = 1, pad: int = 0, dilation: int = 1) -> Conv:
    return Conv(8, (kernel,) * 2, (stride,) * 2, (pad,) * 2, (dilation,) * 2, 1, True, 1)


def merged(conv: Conv, size: int, *pools: Window) -> dict[str, str]:
    """The text of the reborn convolution in each mode, for pools behind it."""
    out = conv_size(size, conv.extent[0], conv.stride[0], conv.pad[0])
    for pool in pools:
        out = pool_size(out, pool.size, pool.stride, pool.pad)
    found = {}
    for mode in MODES:
        g = take_in(mode, conv, [], [(pool, pool) for pool in pools], (size, size), (out, out))
        found[mode] = g if isinstance(g, str) else text(g.kernel, g.stride, g.pad)
        if isinstance(g, Geometry):
            assert conv_size(size, g.dilation[0] * (g.kernel[0] - 1) + 1, g.stride[0], g.pad[0]) == out
    return found


@pytest.mark.parametrize(
    ("conv", "size", "pools", "wanted"),
    [
        # GoogLeNet: conv1, conv2, and a block's 3x3 and 5x5 in front of a pool
        (square(7, 2, 3), 224, [POOL], ["7x7/4 pad 3", "8x8/4 pad 2", "12x12/4 pad 4"]),
        (square(3, 1, 1), 56, [POOL], ["3x3/2 pad 1", "4x4/2 pad 1", "6x6/2 pad 2"]),
        (square(5, 1, 2), 28, [POOL], ["5x5/2 pad 2", "6x6/2 pad 2", "8x8/2 pad 3"]),
        # CaffeNet: 11x11/8 would give 28 outputs, the net needs 27
        (square(11, 4, 0), 227, [POOL], ["12x12/8 pad 0", "18x18/8 pad 0", "19x19/8 pad 0"]),
        (square(5, 1, 2), 27, [POOL], ["5x5/2 pad 1", "5x5/2 pad 1", "7x7/2 pad 2"]),
        (square(3, 1, 1), 13, [POOL], ["3x3/2 pad 0", "3x3/2 pad 0", "5x5/2 pad 1"]),
        # a pool that only smooths, two pools, a dilated convolution
        (square(3, 1, 1), 20, [Window(3, 1, 1)], ["3x3/1 pad 1", "3x3/1 pad 1", "5x5/1 pad 2"]),
        (square(3, 1, 1), 32, [Window(2, 2, 0)] * 2, ["3x3/4 pad 1", "3x3/4 pad 0", "6x6/4 pad 1"]),
        (square(3, 1, 2, 2), 32, [Window(2, 2, 0)], ["3x3/2 pad 2", "3x3/2 pad 2", "4x4/2 pad 3"]),
    ],
)
def test_known_nets(conv, size, pools, wanted):
    assert merged(conv, size, *pools) == dict(zip(MODES, wanted, strict=True))


def test_composition_is_the_receptive_field():
    assert Window(7, 2, 3).then(POOL) == Window(11, 4, 3)
    assert Window(11, 4, 0).then(POOL) == Window(19, 8, 0)
    assert compose([]) == (Window(1, 1, 0), Window(1, 1, 0))
    row, column = Window(1, 1, 0), Window(5, 2, 1)
    assert compose([(row, column), (column, row)]) == (Window(5, 2, 1), Window(5, 2, 1))


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=3))
@settings(deadline=None, derandomize=True)
def test_a_chain_sees_what_its_composition_sees(chain):
    """Pixel by pixel: which inputs reach output 2."""
    seen = {2}
    whole = Window(1, 1, 0)
    for size, stride, pad in reversed(chain):
        seen = {stride * i - pad + k for i, k in product(seen, range(size))}
    for window in chain:
        whole = whole.then(Window(*window))
    start = whole.stride * 2 - whole.pad
    assert (min(seen), max(seen)) == (start, start + whole.size - 1)
    assert whole.centre == (start + start + whole.size - 1) / 2 - whole.stride * 2


def test_cover_holds_the_window_and_auto_is_centred():
    whole = Window(11, 4, 3)
    for mode, good in (
        ("cover", lambda w: w.covers(whole)),
        ("auto", lambda w: abs(w.centre - whole.centre) <= 0.5),
    ):
        choice = choose(mode, Window(7, 2, 3), whole, 7, 1, 224, 56)
        assert choice is not None
        assert good(Window(choice.kernel, 4, choice.pad))
        smaller = [Window(k, 4, p) for k in range(7, choice.kernel) for p in range(k)]
        assert not any(good(w) and conv_size(224, w.size, 4, w.pad) == 56 for w in smaller)


def test_covers():
    assert Window(5, 1, 2).covers(Window(3, 1, 1))
    assert Window(5, 1, 2).covers(Window(5, 1, 2))
    assert not Window(5, 1, 2).covers(Window(5, 1, 3))
    assert not Window(5, 1, 2).covers(Window(4, 1, 0))


def test_a_choice_knows_whether_anything_changed():
    assert choose("keep", Window(3, 1, 1), Window(5, 2, 1), 3, 1, 56, 28) == Choice(3, 1, True)
    assert choose("keep", Window(11, 4, 0), Window(19, 8, 0), 11, 1, 227, 27) == Choice(12, 0, False)
    assert choose("auto", Window(3, 1, 1), Window(3, 1, 1), 3, 1, 28, 28) == Choice(3, 1, True)


def test_nothing_fits():
    """A window as large as its input, of which the pool makes two outputs."""
    assert choose("keep", Window(2, 1, 0), Window(3, 9, 0), 2, 1, 4, 5) is None
    reason = take_in("auto", square(2), [], [(Window(2, 9, 0),) * 2], (4, 4), (5, 5))
    assert reason == "no kernel of stride 9 gives the 5 outputs needed"


def test_each_axis_for_itself():
    conv = Conv(8, (1, 7), (1, 2), (0, 3), (1, 1), 1, True, 1)
    g = take_in("keep", conv, [], [(Window(1, 1, 0), POOL)], (10, 224), (10, 56))
    assert isinstance(g, Geometry)
    assert (g.kernel, g.stride, g.pad, g.as_it_was) == ((1, 7), (1, 4), (0, 3), True)
    assert text(g.kernel, g.stride, g.pad) == "1x7/1x4 pad 0x3"


def test_a_pool_in_front():
    """Its stride comes first: the convolution's pixels lie that far apart."""
    g = take_in("keep", square(3, 1, 1), [(POOL, POOL)], [], (56, 56), (28, 28))
    assert isinstance(g, Geometry)
    assert text(g.kernel, g.stride, g.pad) == "3x3/2 pad 1"
    assert g.centre == (1, 1)


@pytest.mark.parametrize(
    ("kernel", "pad", "source", "centre", "corner"),
    [
        (3, 1, 3, 0, None),  # the kernel itself
        (4, 1, 3, 1, (1, 1)),  # looks at pixel 1, so one to the right of the middle
        (4, 1, 3, 0, None),
        (5, 2, 1, 0, None),  # a 1x1 in the middle
        (5, 2, 1, 1, (3, 3)),
        (5, 2, 1, 9, (4, 4)),  # as far as there is room
        (5, 2, 1, -9, (0, 0)),
    ],
)
def test_where_a_kernel_is_placed(kernel, pad, source, centre, corner):
    g = Geometry((kernel,) * 2, (2, 2), (pad,) * 2, (1, 1), True, (centre, centre))
    assert g.place((source, source)) == corner
    other = Geometry((kernel,) * 2, (2, 2), (pad,) * 2, (1, 1), True, (99.0, 99.0))
    assert other.place((source, source), (centre, centre)) == corner
