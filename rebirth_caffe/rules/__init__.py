"""Rules propose merges; each family is one file.

exact      fold_batchnorm    conv -> BatchNorm -> Scale     =>  conv
           drop_dropout      x -> Dropout (deploy)          =>  x
retrained  merge_streamline  conv -> pool / LRN / BN ...    =>  conv of a larger stride
           merge_branches    fork -> conv chains -> Concat  =>  fewer, wider branches

A rule looks at a net and returns data: merges and refusals. It never edits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..merge import Merge, Refusal


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
    """What rules found in a net."""

    merges: list[Merge] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
