"""Branch merging: the branches of a fork-join block become fewer, wider ones.

x -> [1x1 | 1x1 -> 3x3 | 1x1 -> 5x5 | pool -> 1x1] -> Concat  =>  x -> [1x1' -> 3x3' | 1x1 -> 5x5'] -> Concat

1. A branch with a pool goes into a convolution branch whose last kernel is at least as large as its window;
   the absorber's num_output grows by the absorbed channels.
2. A 1x1 branch goes into a branch with a larger last kernel.
3. The 1x1 reducers of a branch that took in a 1x1 branch shrink (``reduce``, up to a multiple of 8).

A branch only goes into a neighbour in the Concat, so that the order of the channels stays. A pool behind the
Concat becomes the stride of every branch's last convolution. Blocks are found by their shape, not by name.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from itertools import takewhile

from .. import params
from ..merge import IN, OUT, Merge, Rows, Spec
from ..net import Layer
from ..shapes import MaybeShape
from . import Findings, Options
from .geometry import Geometry, Windows, compose, conv_windows, take_in
from .match import ACTIVATION, NORMALISING, REBIRTH, Chain, Matcher, follow, plain_relu, unabsorbable
from .merge_streamline import pool_windows, reborn_spec

# A merge that costs more than this many times the multiply-adds it replaces is offered, not made.
WORTH = 1.5
# So many like blocks in a row are re-trained in one step, as the paper does with GoogLeNet's 4b-4d.
RUN = 3


@dataclass(eq=False)
class Branch:
    """A chain of layers from the fork to the Concat, and the branches it takes in."""

    layers: list[Layer]
    channels: int
    before: list[Branch] = field(default_factory=list)  # absorbed, in Concat order
    after: list[Branch] = field(default_factory=list)

    @property
    def convs(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.type == "Convolution"]

    @property
    def pooled(self) -> bool:
        return any(layer.type == "Pooling" for layer in self.layers)

    @property
    def absorbed(self) -> list[Branch]:
        return [*self.before, *self.after]

    @property
    def kernel(self) -> tuple[int, ...]:
        """What the last convolution's kernel spans; nothing in a branch without one."""
        return params.conv(self.convs[-1].param).extent if self.convs else (0, 0)

    @property
    def windows(self) -> Windows:
        """What one output sees of the fork."""
        return _windows(self.layers)

    @property
    def activations(self) -> list[Layer]:
        """What the branch ends with, behind its last convolution or pool."""
        behind = reversed([layer for layer in self.layers if layer.type not in NORMALISING])
        return list(takewhile(lambda layer: layer.type in ACTIVATION, behind))

    @property
    def ends_in_convolution(self) -> bool:
        """Whether nothing but activations and normalisations follows the last convolution."""
        return bool(self.convs) and not _pools(self.layers[self.layers.index(self.convs[-1]) :])

    @property
    def name(self) -> str:
        return self.convs[-1].name if self.convs else self.layers[-1].name if self.layers else "the input"


def _pools(layers: list[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.type == "Pooling"]


def _windows(layers: list[Layer]) -> Windows:
    """What the last of a chain sees of the first one's input; global pools left out."""
    windows = []
    for layer in layers:
        if layer.type == "Convolution":
            windows.append(conv_windows(params.conv(layer.param)))
        elif layer.type == "Pooling" and params.pool(layer.param).kernel is not None:
            windows.append(pool_windows(layer))
    return compose(windows)


def propose(m: Matcher, options: Options, found: Findings) -> None:
    """A merge for every Concat of convolution chains that start from one blob."""
    blocks: list[tuple[Layer, Merge]] = []
    for concat in m.net.layers:
        if concat.type == "Concat" and concat in m.deployed:
            merge = _merge_at(m, concat, options, found)
            if merge is not None:
                blocks.append((concat, merge))
    _name_stages(m, blocks, found)


def _merge_at(m: Matcher, concat: Layer, options: Options, found: Findings) -> Merge | None:
    """The merge of the block that a Concat closes."""
    branches = _branches(m, concat)
    if isinstance(branches, str):
        found.refuse(branches, [concat])
        return None
    if not any(branch.convs for branch in branches):
        return None
    tail = follow(m, concat, [layer for branch in branches for layer in branch.activations])
    if tail.refusal is not None:
        found.refuse(tail.refusal, [concat, *tail.beyond])
    heads = list(branches)
    refused = _absorb(m, heads)
    for branch, why in refused:
        found.refuse(why, branch.layers or [concat])
    if len(heads) == len(branches) and not tail.layers:
        if not refused:
            found.refuse("no branch is small enough for another to take it in", [concat])
        return None
    everything = [layer for branch in branches for layer in branch.layers]
    reason = _untouchable(m, branches, heads, bool(tail.layers))
    if reason is None and not found.taken.isdisjoint([*everything, *tail.layers]):
        reason = "another merge has taken its layers"
    if reason is not None:
        found.refuse(reason, [x for x in everything if x.type == "Convolution"])
        return None
    merge = _Block(m, options, concat, branches, heads, tail).merge()
    if isinstance(merge, str):
        found.refuse(merge, [concat, *tail.layers])
        if len(heads) == len(branches):
            return None
        tail = Chain()  # the block without what follows it
        merge = _Block(m, options, concat, branches, heads, tail).merge()
    assert not isinstance(merge, str)  # a branch that keeps its sizes always fits
    found.taken.update([concat, *everything, *tail.layers])
    return merge


def _branches(m: Matcher, concat: Layer) -> list[Branch] | str:
    """The branches of a Concat from one blob, in its order, or why they are none."""
    p = concat.param.concat_param
    if (p.concat_dim if p.HasField("concat_dim") else p.axis) != 1:
        return "it does not join channels"
    if not concat.name or m.names[concat.name] > 1 or len(concat.top) != 1:
        return "it has no name of its own, or several tops"
    if concat.strange is not None:
        return f"it has a field stock Caffe does not know, {concat.strange.name}"
    branches: list[Branch] = []
    forks: list[tuple[Layer | None, int | str]] = []
    for i in range(len(concat.bottom)):
        layers: list[Layer] = []
        reader, index = concat, i
        while True:
            producers = m.graph.producers(reader, index)
            if len(producers) != 1:
                return f"its bottom {i} has different producers in different phases"
            above = producers[0]
            if above is None or not _part_of_a_branch(m, above, reader):
                forks.append((above, _top_index(above, reader.bottom[index])))
                break
            layers.insert(0, above)
            reader, index = above, 0
        shape = m.input_shapes.get((concat, i))
        if shape is None or len(shape) != 4:
            return f"the size of '{concat.bottom[i]}' is not known, or not 2-D"
        branches.append(Branch(layers, shape[1]))
    if any(fork != forks[0] for fork in forks) and any(branch.convs for branch in branches):
        names = sorted({fork.name if fork is not None else "the input" for fork, _ in forks})
        return f"its branches start from different layers: {', '.join(names[:4])}"
    return branches


def _part_of_a_branch(m: Matcher, layer: Layer, reader: Layer) -> bool:
    kinds = ("Convolution", "Pooling", *NORMALISING, *ACTIVATION)
    return layer.type in kinds and m.simple(layer) and m.only_reader(layer) is reader


def _top_index(layer: Layer | None, name: str) -> int | str:
    """Which blob of the fork; of an input of the net, its name."""
    return name if layer is None else layer.top.index(name)


# ---- which branch goes into which -------------------------------------------------------------------------


def _absorb(m: Matcher, heads: list[Branch]) -> list[tuple[Branch, str]]:
    """Steps 1 and 2: pool and 1x1 branches move into a neighbour; ``heads`` keeps those that remain.

    Again as long as one moves, because that makes new neighbours. Returns those that had to stay, and why.
    """
    while True:
        pooled = [b for b in heads if b.pooled]
        small = [b for b in heads if not b.pooled and b.convs and _size(b) == (1, 1)]
        refused: list[tuple[Branch, str]] = []
        for branch in (*pooled, *small):
            host = _host(m, heads, branch)
            if isinstance(host, str):
                refused.append((branch, host))
                continue
            if heads.index(host) > heads.index(branch):
                host.before.insert(0, branch)
            else:
                host.after.append(branch)
            heads.remove(branch)
            break
        else:
            return refused


def _size(branch: Branch) -> tuple[int, int]:
    height, width = branch.windows
    return height.size, width.size


def _host(m: Matcher, heads: list[Branch], branch: Branch) -> Branch | str:
    """The neighbour that takes a branch in, or why none does."""
    why = next((why for pool in _pools(branch.layers) if (why := unabsorbable(m, pool))), None)
    if why is not None:
        return why
    place, size = heads.index(branch), _size(branch)
    neighbours = [heads[i] for i in (place - 1, place + 1) if 0 <= i < len(heads)]
    hosts = [
        h
        for h in neighbours
        if h.convs
        and not h.pooled
        and max(h.kernel) > 1
        and all(k >= s for k, s in zip(h.kernel, size, strict=True))
    ]
    alike = [h for h in hosts if _same_end(branch, h)]
    free = [h for h in alike if params.conv(h.convs[-1].param).group == 1]
    if not hosts:
        least = size if max(size) > 1 else (2, 2)
        return f"no neighbour of '{branch.name}' in the Concat has a kernel of {least[0]}x{least[1]} or more"
    if not alike:
        return f"'{branch.name}' and '{hosts[0].name}' end in different functions"
    if not free:
        return f"'{alike[0].name}' is grouped and cannot take in another branch's channels"
    # A pool's window wants the largest kernel, a 1x1 the smallest that holds it.
    return (max if branch.pooled else min)(free, key=lambda h: math.prod(h.kernel))


def _same_end(branch: Branch, host: Branch) -> bool:
    """Whether both end in the same function; a pool passed on as it is, in one that passes it on."""
    if not branch.convs:
        return all(layer.type in ("ReLU", "ELU") for layer in host.activations)
    ends = [[_function(layer) for layer in b.activations] for b in (branch, host)]
    return ends[0] == ends[1] and all(layer.type != "PReLU" for layer in host.activations)


def _function(activation: Layer) -> tuple[str, float, float]:
    p = activation.param
    return p.type, p.relu_param.negative_slope, p.elu_param.alpha


def _untouchable(m: Matcher, branches: list[Branch], heads: list[Branch], whole: bool) -> str | None:
    """Why the convolutions that would be rewritten must not be."""
    for branch in branches:
        if branch not in heads or branch.absorbed or whole:
            for conv in branch.convs:
                reason = m.untouchable(conv)
                if reason is not None:
                    return reason
    return None


# ---- the merge --------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """A fork-join block whose branches know what they take in, on its way to a merge."""

    m: Matcher
    options: Options
    concat: Layer
    branches: list[Branch]
    heads: list[Branch]  # the branches that remain
    tail: Chain  # what follows the Concat and goes too

    @property
    def end(self) -> Layer:
        return self.tail.layers[-1] if self.tail.layers else self.concat

    def merge(self) -> Merge | str:
        """The merge, without its id and stage; a reason where the tail does not fit."""
        joins = len(self.heads) > 1
        specs: list[Spec] = []
        tops: list[str] = []
        for head in self.heads:
            made = self._head(head)
            if isinstance(made, str):
                return made
            specs += made
            tops.append(made[-1].top[0] if made else IN)
        if joins:
            specs.append(Spec(self.concat.name, self.concat.name, tuple(tops), (OUT,)))
        else:
            specs = [_renamed(spec, tops[0], OUT) for spec in specs]
        if self.tail.activations and not self._activated():
            name = self.tail.activations[0].name
            specs.append(Spec(name, name, (OUT,), (OUT,)))
        kept = {spec.name for spec in specs if spec.kept}
        group = {self.concat, *self.tail.layers, *(layer for b in self.branches for layer in b.layers)}
        absorbs = tuple(x.name for x in self.m.net.layers if x in group and x.name not in kept)
        ratio = self._ratio(specs)
        note = "" if ratio <= WORTH else f"takes {ratio:.1f} times the multiply-adds: no reducer to shrink"
        kind = "branches" if len(self.heads) < len(self.branches) else "streamline"
        return Merge("", kind, "", absorbs, tuple(specs), not note, "", note)

    def _activated(self) -> bool:
        """Whether every branch ends with what the tail's activation would do again."""
        return all(head.activations and all(map(plain_relu, head.activations)) for head in self.heads)

    def _relearns(self, head: Branch) -> bool:
        """Whether the last convolution of a branch learns more than it did: it needs no normalisation."""
        return bool(head.absorbed or self.tail.layers)

    def _head(self, head: Branch) -> list[Spec] | str:
        """A remaining branch from @in to the blob the last spec gives."""
        if self.tail.layers and not head.ends_in_convolution:
            return f"branch '{head.name}' does not end in a convolution that could take in what follows"
        specs: list[Spec] = []
        at, changed = IN, False
        for layer in head.layers:
            if layer.type in NORMALISING and self._relearns(head):
                continue
            if layer.type == "Convolution":
                spec = self._conv(head, layer, at, changed)
                if isinstance(spec, str):
                    return spec
                changed = changed or not spec.kept
            else:  # a blob that changes does not keep its name
                in_place = changed or layer.bottom == layer.top
                spec = Spec(layer.name, layer.name, (at,), (at,) if in_place else layer.top)
            specs.append(spec)
            at = spec.top[0]
        return specs

    def _conv(self, head: Branch, layer: Layer, at: str, changed: bool) -> Spec | str:
        """A convolution of a remaining branch; ``changed`` where what it reads has other channels now."""
        old = params.conv(layer.param)
        if layer is head.convs[-1] and self._relearns(head):
            geometry = self._geometry(layer)
            if isinstance(geometry, str):
                return geometry
            n = old.num_output + sum(branch.channels for branch in head.absorbed)
            rows = (
                *(self._rows(branch, head, geometry) for branch in head.before),
                Rows(layer.name, geometry.place((old.kernel[0], old.kernel[1]))),
                *(self._rows(branch, head, geometry) for branch in head.after),
            )
            return reborn_spec(self.m, layer, at, self.m.fresh(layer, REBIRTH), geometry, n, rows)
        n = _reduced(old.num_output, self.options.reduce) if _shrinks(head, layer) else old.num_output
        if n == old.num_output and not changed:
            return Spec(layer.name, layer.name, (at,), layer.top)
        return reborn_spec(self.m, layer, at, self.m.fresh(layer, REBIRTH), None, n)

    def _geometry(self, last: Layer) -> Geometry | str:
        """The geometry of a branch's last convolution with the tail's pools as its stride."""
        before, after = self.m.input_shapes[last, 0], self.m.shapes[self.end, 0]
        assert before is not None
        assert after is not None
        behind = [pool_windows(pool) for pool in self.tail.pools]
        mode = self.options.kernel if behind else "keep"
        geometry = take_in(mode, params.conv(last.param), [], behind, before[2:], after[2:])
        if mode == "keep" and isinstance(geometry, Geometry) and not geometry.as_it_was:
            return "a pool behind it would need another kernel or pad; ask for --kernel auto or cover"
        return geometry

    def _rows(self, branch: Branch, host: Branch, geometry: Geometry) -> Rows:
        """An absorbed branch's channels, its kernel where it looks in the host's last convolution."""
        windows = compose([branch.windows, *(pool_windows(pool) for pool in self.tail.pools)])
        below = _windows(host.layers[: host.layers.index(host.convs[-1])])
        height, width = ((w.centre - b.centre) / b.stride for w, b in zip(windows, below, strict=True))
        kernel = params.conv(branch.convs[-1].param).kernel if branch.convs else (1, 1)
        at = geometry.place((kernel[0], kernel[1]), (height, width))
        return Rows(branch.name if branch.convs else IN, at)

    def _ratio(self, specs: list[Spec]) -> float:
        """Multiply-adds of the merged block over those of the original."""
        net, final = self.m.net, self.m.shapes[self.end, 0]
        assert final is not None
        channels: dict[str, int] = {}  # of the blobs behind the convolutions
        after = 0
        for spec in specs:
            layer = net.layer(spec.like)
            if layer.type != "Convolution":
                if spec.bottom[0] in channels:
                    channels[spec.top[0]] = channels[spec.bottom[0]]
                continue
            last = not spec.kept and any(layer is head.convs[-1] for head in self.heads if head.convs)
            after += self._macs(layer, spec, channels.get(spec.bottom[0]), final if last else None)
            channels[spec.top[0]] = spec.num_output or params.conv(layer.param).num_output
        before = sum(self._macs(conv) for branch in self.branches for conv in branch.convs)
        return after / max(before, 1)

    def _macs(
        self, conv: Layer, spec: Spec | None = None, inputs: int | None = None, out: MaybeShape = None
    ) -> int:
        """Multiply-adds of a convolution; of what it became where that is given."""
        old, source, shape = (
            params.conv(conv.param),
            self.m.input_shapes[conv, 0],
            out or self.m.shapes[conv, 0],
        )
        assert source is not None
        assert shape is not None
        n, kernel = old.num_output, old.kernel
        if spec is not None:
            n, kernel = spec.num_output or n, spec.kernel or kernel
        return n * math.prod(shape[2:]) * math.prod(kernel) * (inputs or source[1]) // old.group


def _renamed(spec: Spec, old: str, new: str) -> Spec:
    """A spec with another name for one of its blobs."""

    def names(blobs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if blob == old else blob for blob in blobs)

    return replace(spec, bottom=names(spec.bottom), top=names(spec.top))


def _shrinks(head: Branch, layer: Layer) -> bool:
    """Whether a layer is a 1x1 reducer in a branch that took in a 1x1 branch, and what follows allows it."""
    conv = params.conv(layer.param)
    took = any(branch.convs and not branch.pooled for branch in head.absorbed)
    if layer is head.convs[-1] or not took or max(conv.kernel) > 1 or conv.group > 1:
        return False
    following = head.convs[head.convs.index(layer) + 1]
    between = head.layers[head.layers.index(layer) : head.layers.index(following)]
    # A slope for each channel, and groups of channels, count on the channels there are.
    return params.conv(following.param).group == 1 and all(x.type != "PReLU" for x in between)


def _reduced(num_output: int, ratio: float) -> int:
    """What is left of a reducer: ``ratio`` of it, up to a multiple of 8, never more than before."""
    return min(num_output, 8 * math.ceil(round(num_output * ratio / 8, 9)))


# ---- names ------------------------------------------------------------------------------------------------


def _name(concat: Layer, convs: list[Layer]) -> str:
    """What the names of a block's convolutions begin with, up to a separator; else its Concat's name."""
    prefix = os.path.commonprefix([layer.name for layer in convs])
    if "/" in prefix:
        prefix = prefix[: prefix.rindex("/")]
    return prefix.rstrip("/_-.") or concat.name


def _name_stages(m: Matcher, blocks: list[tuple[Layer, Merge]], found: Findings) -> None:
    """Give blocks their ids (without what all of them begin with) and like neighbours one training step."""
    layers = [[m.net.layer(name) for name in merge.layers if name != concat.name] for concat, merge in blocks]
    names = [
        _name(concat, [x for x in group if x.type == "Convolution"])
        for group, (concat, _) in zip(layers, blocks, strict=True)
    ]
    common = os.path.commonprefix(names)
    cut = max(common.rfind("_"), common.rfind("/"), common.rfind("-")) + 1 if len(names) > 1 else 0
    names = [name[cut:] or name for name in names]
    ids = [
        found.id(*[name] * (names.count(name) == 1), concat.name)
        for name, (concat, _) in zip(names, blocks, strict=True)
    ]
    inputs = [_input_shape(m, group) for group in layers]
    start = 0
    for i in range(1, len(blocks) + 1):
        if i < len(blocks) and inputs[i] == inputs[start] and _adjacent(m, blocks[i - 1][0], layers[i]):
            continue
        alike = ids[start:i]
        stage = f"{alike[0]}-{alike[-1]}" if len(alike) >= RUN else ""
        for j in range(start, i):
            merge = blocks[j][1]
            found.merges.append(replace(merge, id=ids[j], stage=stage or ids[j]))
            if not merge.enabled:
                reason = f"{merge.note}; enable '{ids[j]}' in the plan"
                found.refuse(reason, map(m.net.layer, merge.absorbs))
        start = i


def _input_shape(m: Matcher, layers: list[Layer]) -> object:
    first = next(layer for layer in m.net.layers if layer in set(layers))
    return m.input_shapes.get((first, 0))


def _adjacent(m: Matcher, concat: Layer, layers: list[Layer]) -> bool:
    """Whether a block reads the Concat before it."""
    return any(concat in m.graph.producers(layer) for layer in layers)
