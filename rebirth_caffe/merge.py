"""The data a rule proposes: merges and refusals. No behaviour; ``plan.py`` applies them.

A merge replaces a group of layers. The blobs it reads from outside are called ``@in`` (``@in2``, ... in the
order they are read in), those it gives to the outside ``@out`` (``@out2``, ...), so that merges do not depend
on each other's names, and what the rest of the net reads keeps its name and its shape. A merge that has to be
retrained reads one blob and gives one.
"""

from __future__ import annotations

from dataclasses import dataclass

IN, OUT = "@in", "@out"
EXACT_KINDS = ("fold", "drop", "compose", "reorder", "join", "stride")
KINDS = (*EXACT_KINDS, "streamline", "branches")
GEOMETRY = ("num_output", "kernel", "stride", "pad", "dilation", "group")
NEW_TYPES = ("Convolution", "Slice")  # of layers a merge brings along
TENSOR = ("Convolution", "InnerProduct")  # layer types that can be reborn


def border(name: str, index: int) -> str:
    """The name of the blob ``index`` at a merge's border: @in, @in2, ...; @out, @out2, ..."""
    return name if index == 0 else f"{name}{index + 1}"


@dataclass(frozen=True)
class Rows:
    """Where some output channels of a reborn layer come from: ``layer``'s, its kernel placed at ``at``.

    ``at`` is the (row, column) of the source kernel's corner in the new one; None centres it. A ``layer`` of
    ``@in`` stands for the merge's input itself, passed on unchanged.
    """

    layer: str
    at: tuple[int, int] | None = None


@dataclass(frozen=True)
class Spec:
    """One layer of what a merge becomes.

    A spec whose name is that of ``like`` keeps that layer, on other blobs. Any other is a reborn layer: made
    after ``like`` (type, training options, bias filler, unknown fields) with the geometry given here, and
    ``like``'s where it is None. Its output channels come from ``rows`` in order.

    A spec with a ``type`` is like no other layer: a Slice at the channels ``slice_point``, or a 1x1
    Convolution of one channel a group that passes on every ``stride``-th pixel.
    """

    name: str
    like: str  # "" with a ``type``
    bottom: tuple[str, ...]
    top: tuple[str, ...]
    num_output: int | None = None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    pad: tuple[int, int] | None = None
    group: int | None = None
    rows: tuple[Rows, ...] = ()
    dilation: tuple[int, int] | None = None
    type: str = ""
    slice_point: tuple[int, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether this is a layer of the original, not a reborn one."""
        return self.name == self.like


@dataclass(frozen=True)
class Merge:
    """A group of layers (``absorbs``, and those ``becomes`` keeps) and what it becomes.

    ``stage`` names the training step it is re-learned in, "" where it is exact and needs none. A merge that
    is not ``enabled`` is an offer; enabled, it takes the place of the merge ``instead_of``.
    """

    id: str
    kind: str
    stage: str
    absorbs: tuple[str, ...]
    becomes: tuple[Spec, ...]
    enabled: bool = True
    instead_of: str = ""
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether the net computes the same function in TEST after this merge."""
        return self.kind in EXACT_KINDS

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer of the group: absorbed and kept."""
        return (*self.absorbs, *(spec.name for spec in self.becomes if spec.kept))


@dataclass(frozen=True)
class Refusal:
    """Layers that looked like a merge and are none, and why."""

    layers: tuple[str, ...]
    reason: str
