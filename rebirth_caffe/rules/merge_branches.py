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

from .. import params
from ..merge import IN, OUT, Merge, Refusal, Rows, Spec
from ..net import Layer
from . import Findings, Options
from .match import ACTIVATION, NORMALISING, REBIRTH, Chain, Matcher, follow
from .merge_streamline import conv_spec, pool_windows

# A merge that costs more than this many times the multiply-adds it replaces is offered, not made.
WORTH = 1.5
# So many like blocks in a row are re-trained in one step, as the paper does with GoogLeNet's 4b-4d.
RUN = 3


@dataclass
class Branch:
    """A chain of layers from the fork to the Concat, and the branches it takes in."""

    layers: list[Layer]
    window: int  # input pixels one output sees, along the larger axis
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
    def kernel(self) -> int:
        """The largest side of the last convolution's kernel; 0 in a branch without one."""
        return max(params.conv(self.convs[-1].param).extent) if self.convs else 0

    @property
    def activation(self) -> Layer | None:
        """What the branch ends with, behind its last convolution or pool."""
        return self.layers[-1] if self.layers and self.layers[-1].type in ACTIVATION else None

    @property
    def name(self) -> str:
        return self.convs[-1].name if self.convs else self.layers[-1].name if self.layers else "the input"


def propose(m: Matcher, options: Options, taken: set[Layer]) -> Findings:
    """A merge for every Concat of convolution chains that start from one blob."""
    found = Findings()
    names: set[str] = set()
    blocks: list[tuple[Layer, Merge]] = []
    for concat in m.graph.net.layers:
        if concat.type == "Concat" and concat in m.deployed:
            _block(m, concat, options, taken, names, found, blocks)
    _name_stages(m, blocks, found)
    return found


def _block(
    m: Matcher,
    concat: Layer,
    options: Options,
    taken: set[Layer],
    names: set[str],
    found: Findings,
    blocks: list[tuple[Layer, Merge]],
) -> None:
    branches = _branches(m, concat)
    if isinstance(branches, str):
        found.refused.append(Refusal((concat.name,), branches))
        return
    if not any(branch.convs for branch in branches):
        return
    tail = follow(m, concat, tuple(b.activation for b in branches if b.activation is not None))
    if tail.refusal is not None and tail.beyond[0].type == "Pooling":
        found.refused.append(Refusal((concat.name, *(x.name for x in tail.beyond)), tail.refusal))
    heads = list(branches)
    refused = _absorb(heads)
    for branch, why in refused:
        found.refused.append(Refusal(tuple(x.name for x in branch.layers) or (concat.name,), why))
    if len(heads) == len(branches) and not tail.layers:
        if not refused:
            found.refused.append(
                Refusal((concat.name,), "no branch is small enough for another to take it in")
            )
        return
    everything = [layer for branch in branches for layer in branch.layers]
    reason = _untouchable(m, concat, branches, heads, bool(tail.layers))
    if reason is None and any(layer in taken for layer in (*everything, *tail.layers)):
        reason = "another merge has taken its layers"
    if reason is not None:
        found.refused.append(Refusal(tuple(x.name for x in everything if x.type == "Convolution"), reason))
        return
    merge = _merge(m, concat, branches, heads, tail, options, names)
    if isinstance(merge, str) and tail.pools:  # the block without its pool
        found.refused.append(Refusal((concat.name, *(x.name for x in tail.pools)), merge))
        tail = Chain()
        merge = _merge(m, concat, branches, heads, tail, options, names) if len(heads) < len(branches) else ""
    if isinstance(merge, str):
        if merge:
            found.refused.append(Refusal((concat.name,), merge))
        return
    taken.update([concat, *everything, *tail.layers])
    blocks.append((concat, merge))


def _branches(m: Matcher, concat: Layer) -> list[Branch] | str:
    """The branches of a Concat from one blob, in its order, or why they are none."""
    p = concat.param.concat_param
    if (p.concat_dim if p.HasField("concat_dim") else p.axis) != 1:
        return "it does not join channels"
    if not concat.name or m.names[concat.name] > 1 or len(concat.top) != 1:
        return "it has no name of its own, or several tops"
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
        branches.append(Branch(layers, _window(m, layers), shape[1]))
    if any(fork != forks[0] for fork in forks):
        if not any(branch.convs for branch in branches):
            return branches
        names = sorted({fork.name if fork is not None else "the input" for fork, _ in forks})
        return f"its branches start from different layers: {', '.join(names[:4])}"
    if not branches:
        return "it has no bottoms"
    return branches


def _part_of_a_branch(m: Matcher, layer: Layer, reader: Layer) -> bool:
    kinds = ("Convolution", "Pooling", *NORMALISING, *ACTIVATION)
    return layer.type in kinds and m.simple(layer) and m.only_reader(layer) is reader


def _top_index(layer: Layer | None, name: str) -> int | str:
    """Which blob of the fork; of an input of the net, its name."""
    return name if layer is None else layer.top.index(name)


def _window(m: Matcher, layers: list[Layer]) -> int:
    size, step = 1, 1
    for layer in layers:
        if layer.type == "Convolution":
            conv = params.conv(layer.param)
            extent, stride = max(conv.extent), max(conv.stride)
        elif layer.type == "Pooling" and not m.is_global(layer):
            windows = pool_windows(m, layer)
            extent, stride = max(w.size for w in windows), max(w.stride for w in windows)
        else:
            continue
        size += (extent - 1) * step
        step *= stride
    return size


def _absorb(heads: list[Branch]) -> list[tuple[Branch, str]]:
    """Steps 1 and 2: pool and 1x1 branches move into a neighbour; ``heads`` keeps those that remain."""
    refused = []
    pooled = [b for b in heads if b.pooled]
    small = [b for b in heads if not b.pooled and b.convs and b.window == 1]
    movable = [*pooled, *small]
    for branch in movable:
        place = heads.index(branch)
        neighbours = [heads[i] for i in (place - 1, place + 1) if 0 <= i < len(heads)]
        hosts = [h for h in neighbours if h.convs and not h.pooled and h.kernel >= max(branch.window, 2)]
        alike = [h for h in hosts if _same_end(branch, h)]
        if not hosts:
            refused.append(
                (
                    branch,
                    f"no neighbour of '{branch.name}' in the Concat has a kernel of {branch.window} or more",
                )
            )
        elif not alike:
            refused.append((branch, f"'{branch.name}' and '{hosts[0].name}' end in different functions"))
        else:
            # A pool's window wants the largest kernel, a 1x1 the smallest that holds it.
            host = (max if branch.pooled else min)(alike, key=lambda h: h.kernel)
            if heads.index(host) > place:
                host.before = [*branch.before, branch, *branch.after, *host.before]
            else:
                host.after = [*host.after, *branch.before, branch, *branch.after]
            heads.remove(branch)
    return refused


def _same_end(branch: Branch, host: Branch) -> bool:
    """Whether both end in the same function; a pool passed on as it is fits any."""
    if not branch.convs:
        return True
    ends = [b.activation for b in (branch, host)]
    if ends[0] is None or ends[1] is None:
        return ends[0] is ends[1]
    a, b = (end.param for end in ends if end is not None)
    same_slope = a.relu_param.negative_slope == b.relu_param.negative_slope
    return a.type == b.type and a.type != "PReLU" and same_slope and a.elu_param.alpha == b.elu_param.alpha


def _untouchable(
    m: Matcher, concat: Layer, branches: list[Branch], heads: list[Branch], whole: bool
) -> str | None:
    """Why the convolutions that would be rewritten must not be."""
    for branch in branches:
        if branch not in heads or branch.before or branch.after or whole:
            for conv in branch.convs:
                reason = m.untouchable(conv)
                if reason is not None:
                    return reason
        if (branch.before or branch.after) and params.conv(branch.convs[-1].param).group > 1:
            return f"'{branch.convs[-1].name}' is grouped and cannot take in another branch's channels"
    return None


def _merge(
    m: Matcher,
    concat: Layer,
    branches: list[Branch],
    heads: list[Branch],
    tail: Chain,
    options: Options,
    names: set[str],
) -> Merge | str:
    """The block's merge with its tail's pools as strides, or why that cannot be."""
    end = tail.layers[-1] if tail.layers else concat
    specs: list[Spec] = []
    as_it_was = True
    joins = len(heads) > 1
    tops: list[str] = []
    new_names: set[str] = set()
    for head in heads:
        made = _head(m, head, branches, tail, end, options, names | new_names, joins)
        if isinstance(made, str):
            return made
        specs += made[0]
        tops.append(made[1])
        as_it_was = as_it_was and made[2]
        new_names.update(spec.name for spec in made[0] if not spec.kept)
    if tail.pools and options.kernel == "keep" and not as_it_was:
        return "a pool behind it would need another kernel or pad; ask for --kernel auto or cover"
    names.update(new_names)
    if joins:
        specs.append(Spec(concat.name, concat.name, tuple(tops), (OUT,)))
    specs += [Spec(x.name, x.name, (OUT,), (OUT,)) for x in tail.activations[:1] if _needed(x, heads)]
    kept = {spec.name for spec in specs if spec.kept}
    everything = [*(layer for branch in branches for layer in branch.layers), concat, *tail.layers]
    ordered = [layer for layer in m.graph.net.layers if layer in set(everything)]
    absorbs = tuple(layer.name for layer in ordered if layer.name not in kept)
    ratio = _ratio(m, branches, specs, end)
    enabled = ratio <= WORTH
    note = "" if enabled else f"takes {ratio:.1f} times the multiply-adds: no reducer to shrink"
    kind = "branches" if len(heads) < len(branches) else "streamline"
    return Merge("", kind, "", absorbs, tuple(specs), enabled, "", note)


def _needed(activation: Layer, heads: list[Branch]) -> bool:
    """Whether an activation behind the Concat does what not every branch does already."""
    return not all(h.activation is not None for h in heads)


def _head(
    m: Matcher,
    head: Branch,
    branches: list[Branch],
    tail: Chain,
    end: Layer,
    options: Options,
    taken: set[str],
    joins: bool,
) -> tuple[list[Spec], str, bool] | str:
    """A remaining branch: its specs, the blob it ends in, and whether kernels stayed as they were."""
    absorbs = bool(head.before or head.after)
    if tail.pools and (not head.convs or head.pooled):
        return f"branch '{head.name}' does not end in a convolution that could take the pool's stride"
    taken = set(taken)
    specs: list[Spec] = []
    at, as_it_was = IN, True
    last = head.convs[-1] if head.convs else None
    shrinks = any(branch.convs and not branch.pooled for branch in (*head.before, *head.after))
    final = head.layers[-1] if head.layers else None
    for layer in head.layers:
        if layer.type in NORMALISING and (absorbs or tail.layers):
            continue  # approximate anyway: the branch re-learns it
        is_final = layer is final or all(
            x.type in NORMALISING for x in head.layers[head.layers.index(layer) + 1 :]
        )
        if layer.type != "Convolution":
            top = at if layer.type in ACTIVATION else layer.top[0]
            top = OUT if is_final and not joins else top
            if layer.type in ACTIVATION and top == OUT and specs:  # in place: what is below writes there too
                specs[-1] = replace(specs[-1], top=(OUT,))
                at = OUT
            specs.append(Spec(layer.name, layer.name, (at,), (top,)))
            at = top
            continue
        conv = params.conv(layer.param)
        reborn = layer is last and (absorbs or bool(tail.layers))
        reduced = layer is not last and shrinks and max(conv.kernel) == 1 and options.reduce < 1
        n = _reduced(conv.num_output, options.reduce) if reduced else conv.num_output
        changed = reborn or (reduced and n != conv.num_output) or _below_changed(specs)
        if not changed:
            top = OUT if is_final and not joins else layer.top[0]
            specs.append(Spec(layer.name, layer.name, (at,), (top,)))
            at = top
            continue
        name = m.fresh(layer.name, REBIRTH, taken)
        top = OUT if is_final and not joins else name
        rows: tuple[Rows, ...] = ()
        if layer is last:
            rows = (
                *(Rows(branch.name if branch.convs else IN) for branch in head.before),
                Rows(layer.name),
                *(Rows(branch.name if branch.convs else IN) for branch in head.after),
            )
            n += sum(branch.channels for branch in (*head.before, *head.after))
        pools = tail.pools if layer is last else []
        made = conv_spec(m, layer, name, at, top, pools, end if layer is last else layer, options, n, rows)
        if isinstance(made, str):
            return made
        specs.append(made[0])
        as_it_was = as_it_was and made[1]
        at = top
    return specs, at, as_it_was


def _below_changed(specs: list[Spec]) -> bool:
    """Whether the last convolution below in this branch has another num_output now."""
    return any(not spec.kept for spec in specs)


def _reduced(num_output: int, ratio: float) -> int:
    """What is left of a reducer: ``ratio`` of it, up to a multiple of 8, never more than before."""
    return min(num_output, 8 * math.ceil(num_output * ratio / 8))


def _ratio(m: Matcher, branches: list[Branch], specs: list[Spec], end: Layer) -> float:
    """Multiply-adds of the merged block over those of the original."""
    before = 0
    size_of: dict[str, int] = {}
    inputs: dict[str, int] = {}
    for branch in branches:
        for conv in branch.convs:
            shape, source = m.shapes[conv, 0], m.input_shapes[conv, 0]
            assert shape is not None
            assert source is not None
            g = params.conv(conv.param)
            before += math.prod(shape[1:]) * math.prod(g.kernel) * source[1] // g.group
            size_of[conv.name] = math.prod(shape[2:])
            inputs[conv.name] = source[1]
    final = m.shapes[end, 0]
    assert final is not None
    lasts = {branch.convs[-1].name for branch in branches if branch.convs}
    after, width = 0, dict[str, int]()
    for spec in specs:
        if spec.like not in size_of:
            width[spec.top[0]] = width.get(spec.bottom[0], 0)
            continue
        g = params.conv(m.graph.net.layer(spec.like).param)
        channels = width.get(spec.bottom[0], inputs[spec.like])
        n, kernel = spec.num_output or g.num_output, spec.kernel or g.kernel
        size = math.prod(final[2:]) if spec.like in lasts else size_of[spec.like]
        after += n * size * math.prod(kernel) * channels // g.group
        width[spec.top[0]] = n
    return after / max(before, 1)


def _id(m: Matcher, layers: list[Layer]) -> str:
    """What the layers' names begin with, up to a separator."""
    names = [layer.name for layer in layers]
    prefix = os.path.commonprefix(names)
    if "/" in prefix:
        prefix = prefix[: prefix.rindex("/")]
    return prefix.rstrip("/_-.") or names[-1]


def _name_stages(m: Matcher, blocks: list[tuple[Layer, Merge]], found: Findings) -> None:
    """Give blocks their ids (without what all of them begin with) and like neighbours one training step."""
    net = m.graph.net
    layers = [[net.layer(name) for name in merge.layers if name != concat.name] for concat, merge in blocks]
    ids = [_id(m, [x for x in group if x.type == "Convolution"] or group) for group in layers]
    common = os.path.commonprefix(ids)
    cut = max(common.rfind("_"), common.rfind("/"), common.rfind("-")) + 1 if len(ids) > 1 else 0
    ids = [id_[cut:] or id_ for id_ in ids]
    ids = [id_ if ids.count(id_) == 1 else f"{id_}:{blocks[i][0].name}" for i, id_ in enumerate(ids)]
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
                found.refused.append(Refusal(merge.absorbs, f"{merge.note}; enable '{ids[j]}' in the plan"))
        start = i


def _input_shape(m: Matcher, layers: list[Layer]) -> object:
    first = next(layer for layer in m.graph.net.layers if layer in set(layers))
    return m.input_shapes.get((first, 0))


def _adjacent(m: Matcher, concat: Layer, layers: list[Layer]) -> bool:
    """Whether a block reads the Concat before it."""
    return any(concat in m.graph.producers(layer) for layer in layers)
