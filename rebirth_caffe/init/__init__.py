"""Weights for the layers a merge makes: folded (exact), inherited, or drawn from a filler."""

from __future__ import annotations

from ..caffemodel import Array
from ..merge import Merge
from ..net import Net

METHODS = ("xavier", "inherit")


def weights_for(net: Net, merge: Merge, method: str, seed: int) -> dict[str, list[Array]]:
    """Blobs for every reborn layer of ``merge``, by name, from the weights in ``net`` (before the merge).

    ``method`` is ``xavier`` or ``inherit``; folding is exact whatever the method. A layer made after one
    that has no weights gets none. Raises WeightsError where folding lacks a blob.
    """
    from .fold import fold
    from .reborn import reborn

    return fold(net, merge) if merge.exact else reborn(net, merge, method, seed)
