"""Streamline merging: non-tensor layers next to a convolution go, and the convolution is reborn.

conv -> (ReLU, Pooling, LRN, BatchNorm, Scale in any order)  =>  conv of stride s*sp -> ReLU
pool -> conv, where nothing below can take the pool          =>  conv of stride sp*s

The merge is approximate: the reborn convolution re-learns what the group did. The output keeps its size, so
the kernel or pad may have to change with the stride. With the kernel left as it was (``keep``) a pool is
merged where nothing but the stride changes; elsewhere that merge is an offer in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from math import floor

from .. import params
from ..merge import IN, OUT, Merge, Refusal, Rows, Spec
from ..net import Layer
from . import Findings, Options
from .geometry import Choice, Window, choose
from .match import REBIRTH, Chain, Matcher, follow


def propose(m: Matcher, options: Options, taken: set[Layer]) -> Findings:
    """Merges behind (and in front of) every convolution and InnerProduct that no other merge has taken."""
    found = Findings()
    names: set[str] = set()
    for layer in m.graph.net.layers:
        if layer in taken or layer not in m.deployed:
            continue
        if layer.type in ("Convolution", "InnerProduct"):
            _behind(m, layer, options, taken, names, found)
    for layer in m.graph.net.layers:
        if layer.type == "Pooling" and layer not in taken and layer in m.deployed:
            _in_front(m, layer, options, taken, names, found)
    return found


def _behind(
    m: Matcher, conv: Layer, options: Options, taken: set[Layer], names: set[str], found: Findings
) -> None:
    chain = follow(m, conv)
    if chain.refusal is not None:
        found.refused.append(Refusal((conv.name, *(x.name for x in chain.beyond)), chain.refusal))
    if not chain.layers:
        return
    group = (conv.name, *(x.name for x in chain.layers if x not in chain.activations))
    reason = m.untouchable(conv)
    if reason is None and any(x in taken for x in chain.layers):
        reason = "another merge has taken them"
    if reason is not None:
        found.refused.append(Refusal(group, reason))
        return
    base = conv.name.split("/")[0]
    name = m.fresh(conv.name, REBIRTH, names)
    kept = conv_spec(m, conv, name, IN, OUT, [], conv, options)
    if isinstance(kept, str):
        found.refused.append(Refusal(group, kept))
        return
    taken.update([conv, *chain.layers])
    if not chain.pools:
        found.merges.append(_merge(base, conv, chain, kept[0], ()))
        return
    whole = conv_spec(m, conv, name, IN, OUT, chain.pools, chain.layers[-1], options)
    offered = isinstance(whole, str) or (options.kernel == "keep" and not whole[1])
    if not offered:
        assert not isinstance(whole, str)
        found.merges.append(_merge(base, conv, chain, whole[0], ()))
        return
    pools = tuple(x.name for x in chain.pools)
    if chain.normalising:
        found.merges.append(_merge(base, conv, chain, kept[0], chain.pools))
    if isinstance(whole, str):
        found.refused.append(Refusal((conv.name, *pools), whole))
        return
    note = f"takes {describe(whole[0])} where {describe_conv(conv)} and the pool were"
    found.merges.append(
        _merge(
            "+".join([base, *pools]),
            conv,
            chain,
            whole[0],
            (),
            enabled=False,
            instead_of=base if chain.normalising else "",
            note=note,
        )
    )
    found.refused.append(
        Refusal(
            (conv.name, *pools),
            f"the kernel or pad would change ({note}); enable '{'+'.join([base, *pools])}' in the plan, "
            "or ask for --kernel auto or cover",
        )
    )


def _merge(
    id_: str,
    conv: Layer,
    chain: Chain,
    reborn: Spec,
    keep: Iterable[Layer],
    enabled: bool = True,
    instead_of: str = "",
    note: str = "",
) -> Merge:
    """conv -> activation -> kept pools, everything else of the chain absorbed."""
    keep = list(keep)
    first = chain.activations[:1]
    steps = [*first, *keep]
    at = reborn.name if keep else OUT
    specs = [replace(reborn, top=(at,))]
    for layer in steps:
        top = at if layer in first else layer.top[0]
        if keep and layer is keep[-1]:
            top = OUT
        specs.append(Spec(layer.name, layer.name, (at,), (top,)))
        at = top
    gone = (conv, *(x for x in chain.layers if x not in steps))
    return Merge(
        id_,
        "streamline",
        instead_of or id_,
        tuple(x.name for x in gone),
        tuple(specs),
        enabled,
        instead_of,
        note,
    )


def conv_spec(
    m: Matcher,
    layer: Layer,
    name: str,
    bottom: str,
    top: str,
    pools: list[Layer],
    last: Layer,
    options: Options,
    num_output: int | None = None,
    rows: tuple[Rows, ...] = (),
) -> tuple[Spec, bool] | str:
    """``layer`` reborn with ``pools`` behind it folded into its stride, giving ``last``'s output size.

    Returns the spec and whether the kernel and pad stayed as they were, or the reason why there is none.
    """
    if layer.type == "InnerProduct":
        n = num_output or layer.param.inner_product_param.num_output
        return Spec(name, layer.name, (bottom,), (top,), n, rows=rows or (Rows(layer.name),)), True
    before, after = m.input_shapes.get((layer, 0)), m.shapes.get((last, 0))
    if before is None or after is None or len(before) != 4:
        return f"the size of '{layer.bottom[0]}' or '{last.top[0]}' is not known, or not 2-D"
    conv = params.conv(layer.param)
    windows = [Window(*axis) for axis in zip(conv.extent, conv.stride, conv.pad, strict=True)]
    wholes = [
        reduce(Window.then, [pool_windows(m, pool)[axis] for pool in pools], windows[axis]) for axis in (0, 1)
    ]
    picks: list[Choice] = []
    for axis in (0, 1):
        pick = choose(
            options.kernel if pools else "keep",
            windows[axis],
            wholes[axis],
            conv.kernel[axis],
            conv.dilation[axis],
            before[2 + axis],
            after[2 + axis],
        )
        if pick is None:
            return f"no kernel of stride {wholes[axis].stride} gives the {after[2 + axis]} outputs needed"
        picks.append(pick)
    at = tuple(_corner(wholes[i].centre, conv.kernel[i], conv.dilation[i], picks[i]) for i in (0, 1))
    centred = tuple((picks[i].kernel - conv.kernel[i]) // 2 for i in (0, 1))
    own = Rows(layer.name, None if at == centred else (at[0], at[1]))
    spec = Spec(
        name,
        layer.name,
        (bottom,),
        (top,),
        num_output or conv.num_output,
        (picks[0].kernel, picks[1].kernel),
        (wholes[0].stride, wholes[1].stride),
        (picks[0].pad, picks[1].pad),
        conv.group,
        tuple(own if r.layer == layer.name else r for r in rows) or (own,),
    )
    return spec, all(pick.as_it_was for pick in picks)


def _corner(centre: float, kernel: int, dilation: int, pick: Choice) -> int:
    """Where the original kernel goes in the new one so that it looks at the centre of the group's window."""
    corner = (centre + pick.pad) / dilation - (kernel - 1) / 2
    return min(max(floor(corner + 0.5), 0), pick.kernel - kernel)


def pool_windows(m: Matcher, pool: Layer) -> tuple[Window, Window]:
    """A (not global) pool's windows over height and width."""
    p = params.pool(pool.param)
    assert p.kernel is not None
    return Window(p.kernel[0], p.stride[0], p.pad[0]), Window(p.kernel[1], p.stride[1], p.pad[1])


def _in_front(
    m: Matcher, pool: Layer, options: Options, taken: set[Layer], names: set[str], found: Findings
) -> None:
    """A pool that nothing below absorbs and that feeds one convolution: the convolution takes its stride."""
    conv = m.only_reader(pool)
    if conv is None or conv.type != "Convolution" or conv in taken:
        return
    group = (pool.name, conv.name)
    reason = m.untouchable(conv)
    if reason is None and not m.simple(pool):
        reason = f"'{pool.name}' has several bottoms or tops, or a name that is not its own"
    if reason is None and m.is_global(pool):
        reason = f"'{pool.name}' is the global pool"
    p = params.pool(pool.param)
    if reason is None and p.method == "STOCHASTIC":
        reason = f"'{pool.name}' pools stochastically"
    before, after = m.input_shapes.get((pool, 0)), m.shapes.get((conv, 0))
    if reason is None and (before is None or after is None):
        reason = f"the size of '{pool.bottom[0]}' is not known"
    if reason is not None:
        found.refused.append(Refusal(group, reason))
        return
    assert before is not None
    assert after is not None
    g = params.conv(conv.param)
    if max(g.dilation) > 1:
        found.refused.append(Refusal(group, f"'{conv.name}' is dilated: its taps would not fit the new grid"))
        return
    picks = []
    fronts = pool_windows(m, pool)
    for axis in (0, 1):
        own = Window(g.extent[axis], g.stride[axis], g.pad[axis])
        whole = fronts[axis].then(own)
        pick = choose(
            options.kernel, Window(own.size, whole.stride, own.pad), whole, g.kernel[axis], 1,
            before[2 + axis], after[2 + axis],
        )  # fmt: skip
        if pick is None:
            found.refused.append(
                Refusal(
                    group, f"no kernel of stride {whole.stride} gives the {after[2 + axis]} outputs needed"
                )
            )
            return
        picks.append(pick)
    spec = Spec(
        m.fresh(conv.name, REBIRTH, names),
        conv.name,
        (IN,),
        (OUT,),
        g.num_output,
        (picks[0].kernel, picks[1].kernel),
        (g.stride[0] * fronts[0].stride, g.stride[1] * fronts[1].stride),
        (picks[0].pad, picks[1].pad),
        g.group,
        (Rows(conv.name),),
    )
    enabled = options.kernel != "keep" or all(pick.as_it_was for pick in picks)
    note = "" if enabled else f"takes {describe(spec)} where the pool and {describe_conv(conv)} were"
    id_ = f"{pool.name.split('/')[0]}+{conv.name.split('/')[0]}" if not enabled else conv.name.split("/")[0]
    found.merges.append(Merge(id_, "streamline", id_, group, (spec,), enabled, "", note))
    taken.update([pool, conv])
    if not enabled:
        found.refused.append(
            Refusal(group, f"the kernel or pad would change ({note}); enable '{id_}' in the plan")
        )


def describe(spec: Spec) -> str:
    """``7x7/4 pad 3`` for a reborn convolution."""
    if spec.kernel is None or spec.stride is None or spec.pad is None:
        return f"{spec.num_output} outputs"
    return geometry_text(spec.kernel, spec.stride, spec.pad)


def describe_conv(layer: Layer) -> str:
    """The same for a layer of the net."""
    conv = params.conv(layer.param)
    return geometry_text(conv.kernel, conv.stride, conv.pad)


def geometry_text(kernel: tuple[int, ...], stride: tuple[int, ...], pad: tuple[int, ...]) -> str:
    """``7x7/4 pad 3``; both strides or pads where they differ."""

    def short(values: tuple[int, ...]) -> str:
        return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))

    return f"{'x'.join(map(str, kernel))}/{short(stride)} pad {short(pad)}"
