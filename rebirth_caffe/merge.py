"""The data a rule proposes: merges and refusals. No behaviour; ``plan.py`` applies them.

A merge replaces a group of layers that reads one blob from outside and gives one blob to the outside. Inside
a merge these two are called ``@in`` and ``@out``, so that merges do not depend on each other's names, and the
blob the rest of the net reads keeps its name and its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

IN, OUT = "@in", "@out"
EXACT_KINDS = ("fold", "drop")
KINDS = (*EXACT_KINDS, "streamline", "branches")
GEOMETRY = ("num_output", "kernel", "stride", "pad", "group")
TENSOR = ("Convolution", "InnerProduct")  # layer types that can be reborn


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
    """

    name: str
    like: str
    bottom: tuple[str, ...]
    top: tuple[str, ...]
    num_output: int | None = None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    pad: tuple[int, int] | None = None
    group: int | None = None
    rows: tuple[Rows, ...] = ()

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
