"""Windows over one spatial axis: composing a pool onto a convolution, and choosing the reborn kernel.

A window of ``size`` pixels moves by ``stride`` and starts at ``-pad``: output i sees the input pixels
[stride*i - pad, stride*i - pad + size). Its centre is stride*i + (size - 1)/2 - pad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..shapes import conv_size


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
