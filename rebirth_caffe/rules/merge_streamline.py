"""Streamline merging: non-tensor layers next to a convolution go, and the convolution is reborn.

conv -> (ReLU, Pooling, LRN, BatchNorm, Scale in any order)  =>  conv of stride s*sp -> ReLU
pool -> conv, where nothing below can take the pool          =>  conv of stride sp*s

The merge is approximate: the reborn convolution re-learns what the group did. The output keeps its size, so
the kernel or pad may have to change with the stride. With the kernel left as it was (``keep``) a pool is
merged where nothing but the stride changes; elsewhere that merge is an offer in the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .. import params
from ..merge import IN, OUT, TENSOR, Merge, Rows, Spec
from ..net import Layer
from . import Findings, Options, geometry
from .geometry import Geometry, Window, Windows, take_in
from .match import REBIRTH, Chain, Matcher, follow, unabsorbable


def propose(m: Matcher, options: Options, found: Findings) -> None:
    """Merges behind (and in front of) every convolution and InnerProduct that no other merge has taken."""
    for layer in m.net.layers:
        if layer.type in TENSOR and layer in m.deployed and layer not in found.taken:
            _behind(m, layer, options, found)
    for layer in m.net.layers:
        if layer.type == "Pooling" and layer in m.deployed and layer not in found.taken:
            _in_front(m, layer, options, found)


def _behind(m: Matcher, conv: Layer, options: Options, found: Findings) -> None:
    """conv -> chain: what goes at once, and what is only offered."""
    chain = follow(m, conv)
    if chain.refusal is not None:
        found.refuse(chain.refusal, [conv, *chain.beyond])
    if not chain.layers:
        return
    reason = m.untouchable(conv)
    if reason is not None:
        found.refuse(reason, [conv, *(x for x in chain.layers if x not in chain.activations)])
        return
    whole = _taking_in(m, conv, chain.pools, chain.layers[-1], options)
    if isinstance(whole, str):
        found.refuse(whole, [conv, *chain.pools])
        if not chain.normalising:
            return
    found.taken.update([conv, *chain.layers])
    base = found.id(_short(conv), conv.name)
    if whole is None or (isinstance(whole, Geometry) and (options.kernel != "keep" or whole.as_it_was)):
        found.merges.append(_merge(m, base, base, conv, chain, whole, []))
        return
    # Taking the pools in has a price. They stay; the rest goes.
    if chain.normalising:
        found.merges.append(_merge(m, base, base, conv, chain, None, chain.pools))
    if isinstance(whole, str):
        return
    offer_id = found.id("+".join([base, *(pool.name for pool in chain.pools)]))
    stage = base if chain.normalising else offer_id
    offer = _merge(m, offer_id, stage, conv, chain, whole, [])
    note = f"takes {describe(offer.becomes[0])} where {_describe(conv)} and the pool were"
    instead_of = base if chain.normalising else ""
    found.merges.append(replace(offer, enabled=False, instead_of=instead_of, note=note))
    found.refuse(
        f"the kernel or pad would change ({note}); enable '{offer_id}' in the plan, "
        "or ask for --kernel auto or cover",
        [conv, *chain.pools],
    )


def _short(layer: Layer) -> str:
    """What people call a layer: ``conv1`` for conv1/7x7_s2."""
    return layer.name.split("/")[0]


def _taking_in(
    m: Matcher, conv: Layer, pools: Sequence[Layer], last: Layer, options: Options
) -> Geometry | str | None:
    """The geometry of ``conv`` with the pools up to ``last`` folded in; None where there are none to fold."""
    if not pools:
        return None
    before, after = m.input_shapes.get((conv, 0)), m.shapes.get((last, 0))
    if before is None or after is None:
        return f"the size of '{conv.bottom[0]}' is not known"
    behind = [pool_windows(pool) for pool in pools]
    return take_in(options.kernel, params.conv(conv.param), [], behind, before[2:], after[2:])


def _merge(
    m: Matcher,
    id_: str,
    stage: str,
    conv: Layer,
    chain: Chain,
    geometry: Geometry | None,
    keep: list[Layer],
) -> Merge:
    """conv -> activation -> kept pools, everything else of the chain absorbed."""
    steps = [*chain.activations[:1], *keep]
    at = m.fresh(conv, REBIRTH) if keep else OUT
    specs = [reborn_spec(m, conv, IN, at, geometry)]
    for layer in steps:
        top = at if layer not in keep else OUT if layer is keep[-1] else layer.top[0]
        specs.append(Spec(layer.name, layer.name, (at,), (top,)))
        at = top
    gone = (conv, *(x for x in chain.layers if x not in steps))
    return Merge(id_, "streamline", stage, tuple(x.name for x in gone), tuple(specs))


def reborn_spec(
    m: Matcher,
    layer: Layer,
    bottom: str,
    top: str,
    geometry: Geometry | None,
    num_output: int | None = None,
    rows: tuple[Rows, ...] = (),
) -> Spec:
    """A Convolution or InnerProduct reborn; without a geometry its kernel, stride and pad stay.

    ``rows`` are all its output channels' sources, by default the layer's own.
    """
    name = m.fresh(layer, REBIRTH)
    if layer.type == "InnerProduct":
        n = num_output or layer.param.inner_product_param.num_output
        return Spec(name, layer.name, (bottom,), (top,), n, rows=rows or (Rows(layer.name),))
    n = num_output or layer.param.convolution_param.num_output
    shape = m.input_shapes.get((layer, 0))
    if shape is None or len(shape) != 4:  # as many axes as it has
        return Spec(name, layer.name, (bottom,), (top,), n, rows=rows or (Rows(layer.name),))
    conv = params.conv(layer.param)
    kernel, stride, pad = conv.kernel, conv.stride, conv.pad
    at = None
    if geometry is not None:
        kernel, stride, pad = geometry.kernel, geometry.stride, geometry.pad
        at = geometry.place((conv.kernel[0], conv.kernel[1]))
    return Spec(
        name,
        layer.name,
        (bottom,),
        (top,),
        n,
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (pad[0], pad[1]),
        conv.group,
        rows or (Rows(layer.name, at),),
    )


def pool_windows(pool: Layer) -> Windows:
    """A (not global) pool's windows."""
    p = params.pool(pool.param)
    assert p.kernel is not None
    height, width = (Window(*axis) for axis in zip(p.kernel, p.stride, p.pad, strict=True))
    return height, width


def _in_front(m: Matcher, pool: Layer, options: Options, found: Findings) -> None:
    """A pool that nothing below absorbs and that feeds one convolution: the convolution takes its stride."""
    conv = m.only_reader(pool)
    if conv is None or conv.type != "Convolution" or conv in found.taken:
        return
    geometry = _taking_in_front(m, pool, conv, options)
    if isinstance(geometry, str):
        found.refuse(geometry, [pool, conv])
        return
    spec = reborn_spec(m, conv, IN, OUT, geometry)
    enabled = options.kernel != "keep" or geometry.as_it_was
    note = "" if enabled else f"takes {describe(spec)} where the pool and {_describe(conv)} were"
    id_ = found.id(_short(conv) if enabled else f"{_short(pool)}+{_short(conv)}", f"{pool.name}+{conv.name}")
    found.merges.append(
        Merge(id_, "streamline", id_, (pool.name, conv.name), (spec,), enabled, note=note)
    )  # fmt: skip
    found.taken.update([pool, conv])
    if not enabled:
        found.refuse(
            f"the kernel or pad would change ({note}); enable '{id_}' in the plan, "
            "or ask for --kernel auto or cover",
            [pool, conv],
        )


def _taking_in_front(m: Matcher, pool: Layer, conv: Layer, options: Options) -> Geometry | str:
    """The geometry of ``conv`` with the pool in front of it folded in, or why not."""
    reason = m.untouchable(conv) or unabsorbable(m, pool)
    if reason is not None:
        return reason
    before, after = m.input_shapes.get((pool, 0)), m.shapes.get((conv, 0))
    if before is None or after is None:
        return f"the size of '{pool.bottom[0]}' is not known"
    own = params.conv(conv.param)
    if max(own.dilation) > 1:
        return f"'{conv.name}' is dilated: its taps would not fit the new grid"
    return take_in(options.kernel, own, [pool_windows(pool)], [], before[2:], after[2:])


def describe(spec: Spec) -> str:
    """``7x7/4 pad 3`` for a reborn convolution."""
    if spec.kernel is None or spec.stride is None or spec.pad is None:
        return f"{spec.num_output} outputs"
    return geometry.text(spec.kernel, spec.stride, spec.pad)


def _describe(layer: Layer) -> str:
    """The same for a layer of the net."""
    conv = params.conv(layer.param)
    return geometry.text(conv.kernel, conv.stride, conv.pad)
