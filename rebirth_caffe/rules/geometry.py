"""Windows over pixels: composing pools and a convolution, and choosing the reborn kernel.

A window of ``size`` pixels moves by ``stride`` and starts at ``-pad``: output i sees the input pixels
[stride*i - pad, stride*i - pad + size). Its centre is stride*i + (size - 1)/2 - pad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import floor

from ..errors import by_x
from ..params import Conv
from ..shapes import conv_size

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A window along one axis."""

    size: int
    stride: int
    pad: int

    @property
    def centre(self) -> float:
        """Where the window of output 0 is centred, in input pixels."""
        return (self.size - 1) / 2 - self.pad

    def then(self, other: Window) -> Window:
        """What ``other`` on top of this one sees: k + (k2-1)s, s*s2, p + p2*s."""
        return Window(
            self.size + (other.size - 1) * self.stride,
            self.stride * other.stride,
            self.pad + other.pad * self.stride,
        )

    def covers(self, other: Window) -> bool:
        """Whether this window holds ``other``'s at every output (equal strides)."""
        return self.pad >= other.pad and self.size - self.pad >= other.size - other.pad


PIXEL = Window(1, 1, 0)
Windows = tuple[Window, Window]  # over height and width


def conv_windows(conv: Conv) -> Windows:
    """A (2-D) convolution's windows."""
    height, width = (Window(*axis) for axis in zip(conv.extent, conv.stride, conv.pad, strict=True))
    return height, width


def compose(windows: Iterable[Windows]) -> Windows:
    """What the last of a chain sees of the first one's input."""
    height, width = zip((PIXEL, PIXEL), *windows, strict=True)
    return reduce(Window.then, height), reduce(Window.then, width)


@dataclass(frozen=True)
class Choice:
    """The kernel and pad of a reborn convolution along one axis."""

    kernel: int
    pad: int
    as_it_was: bool  # the original kernel and pad, only the stride changed


def choose(
    mode: str, conv: Window, whole: Window, kernel: int, dilation: int, size: int, out: int
) -> Choice | None:
    """Kernel and pad for a convolution of ``whole.stride`` that gives ``out`` outputs from ``size`` inputs.

    ``conv`` is the original convolution's window, ``whole`` that of the whole group, ``kernel`` and
    ``dilation`` the original's. The original kernel and pad win in mode ``keep`` wherever they give the right
    size, the smallest kernel that does otherwise. ``auto`` takes the smallest kernel whose centre is within
    half a pixel of the group's, ``cover`` the smallest that sees all the group saw. None where nothing fits.
    """

    def extent(k: int) -> int:
        return dilation * (k - 1) + 1

    def fitting(kernels: Iterable[int], good: Callable[[Window], bool]) -> Choice | None:
        for k in kernels:
            pads = [p for p in range(extent(k)) if conv_size(size, extent(k), whole.stride, p) == out]
            windows = [w for w in (Window(extent(k), whole.stride, p) for p in pads) if good(w)]
            if windows:
                best = min(windows, key=lambda w: (abs(w.centre - whole.centre), w.pad))
                return Choice(k, best.pad, k == kernel and best.pad == conv.pad)
        return None

    largest = kernel + (whole.size - conv.size) // dilation + 2  # one size above the receptive field
    kernels = range(kernel, largest + 1)
    if mode == "keep":
        if conv_size(size, conv.size, whole.stride, conv.pad) == out:
            return Choice(kernel, conv.pad, True)
        return fitting(kernels, lambda _: True)
    if mode == "auto":
        return fitting(kernels, lambda w: abs(w.centre - whole.centre) <= 0.5) or fitting(
            kernels, lambda _: True
        )
    return fitting(kernels, lambda w: w.covers(whole))


@dataclass(frozen=True)
class Geometry:
    """A reborn convolution's kernel, and where its group's windows are centred."""

    kernel: Pair
    stride: Pair
    pad: Pair
    dilation: Pair
    as_it_was: bool  # only the stride changed
    centre: tuple[float, float]  # of the whole group at output 0, in input pixels

    def place(self, kernel: Pair, centre: tuple[float, float] | None = None) -> Pair | None:
        """The corner at which a ``kernel`` looks where its source did (``centre``; the group's by default).

        None where that is simply in the middle.
        """
        corners, middles = [], []
        for axis, target in enumerate(centre or self.centre):
            room = self.kernel[axis] - kernel[axis]
            corner = (target + self.pad[axis]) / self.dilation[axis] - (kernel[axis] - 1) / 2
            corners.append(min(max(floor(corner + 0.5), 0), max(room, 0)))
            middles.append(room // 2)
        return None if corners == middles else (corners[0], corners[1])


def take_in(
    mode: str,
    conv: Conv,
    before: Sequence[Windows],
    behind: Sequence[Windows],
    sizes: tuple[int, ...],
    outs: tuple[int, ...],
) -> Geometry | str:
    """The geometry of ``conv`` with the pools before and behind it folded into its stride.

    ``sizes`` and ``outs`` are the group's input and output. A reason where no kernel gives these outputs.
    """
    own, wholes = conv_windows(conv), compose([*before, conv_windows(conv), *behind])
    picks: list[Choice] = []
    for axis, whole in enumerate(wholes):
        pick = choose(
            mode, own[axis], whole, conv.kernel[axis], conv.dilation[axis], sizes[axis], outs[axis]
        )  # fmt: skip
        if pick is None:
            return f"no kernel of stride {whole.stride} gives the {outs[axis]} outputs needed"
        picks.append(pick)
    return Geometry(
        (picks[0].kernel, picks[1].kernel),
        (wholes[0].stride, wholes[1].stride),
        (picks[0].pad, picks[1].pad),
        (conv.dilation[0], conv.dilation[1]),
        all(pick.as_it_was for pick in picks),
        (wholes[0].centre, wholes[1].centre),
    )


def text(kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> str:
    """``7x7/4 pad 3``; both strides or pads where they differ."""

    def short(values: Sequence[int]) -> str:
        return by_x(values[:1] if len(set(values)) == 1 else values)

    return f"{by_x(kernel)}/{short(stride)} pad {short(pad)}"
