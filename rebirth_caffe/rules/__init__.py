"""Rules propose merges; each family is one file.

exact      fold_affine       BatchNorm, Scale beside conv   =>  conv
           compose           conv -> conv, conv -> AVE pool =>  conv, where cheaper
           reorder           ReLU -> MAX pool               =>  MAX pool -> ReLU, and the like
           pull_stride       conv -> ... -> 1x1 conv of s   =>  conv of s -> ... -> 1x1 conv
           join_siblings     x -> [conv | conv]             =>  x -> conv (-> Slice)
           drop_dropout      x -> Dropout (deploy)          =>  x
           drop_unused       what nobody reads, what passes its input on
retrained  merge_branches    fork -> conv chains -> Concat  =>  fewer, wider branches
           merge_streamline  conv -> pool / LRN / BN ...    =>  conv of a larger stride

A rule looks at a net and returns data: merges and refusals. It never edits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, count

from ..merge import Merge, Refusal
from ..net import Layer

KERNELS = ("keep", "cover", "auto")


@dataclass(frozen=True)
class Options:
    """What a person may ask of the rules.

    ``kernel``: keep (the original kernel), cover (the whole receptive field of convolution and pool) or auto
    (the smallest well-centred one). ``reduce``: what is left of the reducers that feed an absorbing branch.
    """

    kernel: str = "keep"
    reduce: float = 0.5


@dataclass
class Findings:
    """What rules found in a net; each adds to what those before it found."""

    merges: list[Merge] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    taken: set[Layer] = field(default_factory=set)  # layers of a merge, not to be merged again
    ids: set[str] = field(default_factory=set)

    def refuse(self, reason: str, layers: Iterable[Layer]) -> None:
        """Note why these layers are not merged."""
        self.refused.append(Refusal(tuple(layer.name for layer in layers), reason))

    def add(self, merge: Merge, group: Iterable[Layer]) -> None:
        """Note a merge of these layers; they are not to be merged again."""
        self.merges.append(merge)
        self.taken.update(group)

    def id(self, *wanted: str) -> str:
        """The first of these ids that no merge has, for one that is about to be made."""
        numbered = (f"{wanted[-1]}:{i}" for i in count(2))
        new = next(id_ for id_ in chain(wanted, numbered) if id_ not in self.ids)
        self.ids.add(new)
        return new
