"""The plan: which merges, in which order, in which training steps. Proposed by rules, edited by people.

``propose`` asks the rules, ``apply`` is the one place that edits a net, ``dump``/``load`` are plan.yaml.
Merges are applied in the plan's order; as many as do not touch each other go in one pass over the net.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .caffemodel import Blob, Record
from .errors import NetError, PlanError, WeightsError
from .merge import (
    EXACT_KINDS,
    GEOMETRY,
    IN,
    KINDS,
    NEW_TYPES,
    OUT,
    TENSOR,
    Merge,
    Refusal,
    Rows,
    Spec,
    border,
)
from .net import Graph, Layer, Net, View
from .prototxt import Field, Message, quote, render
from .shapes import check_weights, infer

VERSION = 1
SCHEDULES = ("steps", "joint", "joint-then-steps")
JOINT = "joint"  # the training step in which everything is learned at once
MAX_DEPTH = 20  # of a plan.yaml
MAX_BYTES = 2**21  # of one; a plan of a net of 10,000 layers is smaller


@dataclass(frozen=True)
class Step:
    """One training step: the ``merges`` made in it, or made before and learned ``again``."""

    name: str
    merges: tuple[Merge, ...]
    again: tuple[Merge, ...] = ()

    @property
    def new(self) -> list[str]:
        """The reborn layers that it is about."""
        return [s.name for merge in (*self.merges, *self.again) for s in merge.becomes if not s.kept]


@dataclass(frozen=True)
class Plan:
    """An ordered list of merges for one net."""

    net: str
    merges: tuple[Merge, ...]

    @property
    def active(self) -> list[Merge]:
        """The merges to apply: enabled, and not replaced by another that is."""
        replaced = {merge.instead_of for merge in self.merges if merge.enabled and merge.instead_of}
        return [merge for merge in self.merges if merge.enabled and merge.id not in replaced]

    @property
    def stages(self) -> list[str]:
        """The training steps, from bottom to top."""
        return list(dict.fromkeys(merge.stage for merge in self.active if merge.stage))

    def steps(self, schedule: str = "steps") -> list[Step]:
        """What there is to train, in order; ``schedule`` is one of SCHEDULES.

        ``steps``: a stage after the other, from bottom to top. ``joint``: all at once. ``joint-then-steps``:
        all at once, then the layers of one stage after the other once more. Raises PlanError for another.
        """
        if schedule not in SCHEDULES:
            raise PlanError(f"schedule {schedule}: give one of {', '.join(SCHEDULES)}")
        inexact = [merge for merge in self.active if not merge.exact]
        stages = [Step(s, tuple(m for m in inexact if m.stage == s)) for s in self.stages]
        stages = [step for step in stages if step.merges]
        if schedule == "steps" or not stages:
            return stages
        joint = Step(JOINT, tuple(inexact))
        return [joint] if schedule == "joint" else [joint, *(Step(s.name, (), s.merges) for s in stages)]

    def only(self, merges: Iterable[Merge]) -> Plan:
        """The exact merges of this plan and, of the others, these."""
        wanted = {merge.id for merge in merges}
        return Plan(self.net, tuple(m for m in self.active if m.exact or m.id in wanted))


@dataclass
class Proposal:
    """A plan and the candidates that did not make it."""

    plan: Plan
    refused: list[Refusal] = field(default_factory=list)


# ---- proposing --------------------------------------------------------------------------------------------


def propose(
    net: Net,
    kernel: str = "keep",
    reduce: float = 0.5,
    exact: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Proposal:
    """Ask every rule: exact ones first, the others on the net those leave.

    ``only`` and ``skip`` name merges or training steps. Merges that are left out stay in the plan, disabled.
    Raises PlanError for a name the plan does not have.
    """
    from .rules import Findings, Options, merge_branches, merge_streamline
    from .rules.match import Matcher

    ids: set[str] = set()
    plain = _exact_merges(net, ids, skip)
    found = Findings(ids=ids)
    if not exact:
        matcher, options = Matcher(plain.net), Options(kernel, reduce)
        merge_branches.propose(matcher, options, found)
        merge_streamline.propose(matcher, options, found)
    hands_off = plain.hands_off | {layer.name for layer in found.taken}
    around = _exact_merges(plain.net, ids, skip, hands_off, everything=exact)
    place = {layer.name: i for i, layer in enumerate(plain.net.layers)}
    retrained = sorted(found.merges, key=lambda m: min(place[name] for name in m.layers))
    merges = [*plain.merges, *around.merges, *retrained]
    refused = list(plain.refused)
    for more in (found.refused, around.refused if exact else []):
        told = {refusal.layers for refusal in refused}
        refused += [refusal for refusal in more if refusal.layers not in told]
    plan = select(net, Plan(net.name, tuple(merges)), only, skip, exact)
    # A layer refused here may have found its place there, or its offer been taken.
    placed = {name for merge in (*merges, *plan.active) if merge.enabled for name in merge.absorbs}
    return Proposal(plan, [refusal for refusal in refused if refusal.layers[-1] not in placed])


@dataclass
class _Exact:
    """Exact merges of a net, what they leave of it, and what was refused."""

    net: Net
    hands_off: set[str]  # layers that are not to be merged
    merges: list[Merge] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def _exact_merges(
    net: Net,
    ids: set[str],
    skip: Sequence[str],
    taken: Iterable[str] | None = None,
    everything: bool = False,
) -> _Exact:
    """Ask the exact rules again and again, each time on the net they leave, until they find nothing more.

    At first (``taken`` is None) those that clear the way for others; then, around the layers ``taken`` by
    merges that are retrained, those that make new layers, too; with ``everything`` also what one engine gains
    and another loses by.
    """
    from .derive import is_trainable
    from .rules import (
        Findings,
        compose,
        drop_dropout,
        drop_unused,
        fold_affine,
        join_siblings,
        pull_stride,
        reorder,
    )
    from .rules.match import Matcher

    rules = [drop_unused.propose, fold_affine.propose]
    if not is_trainable(net):
        rules += [drop_dropout.propose, drop_unused.propose_dead]
    if taken is not None:
        rules += [reorder.average_pools, compose.propose, pull_stride.propose, join_siblings.neighbours]
    if everything:
        rules += [join_siblings.sliced, reorder.relu_behind_pool]
    done = _Exact(net, set(taken or ()))
    while True:
        matcher = Matcher(done.net)
        found = Findings(ids=ids, taken={x for x in done.net.layers if x.name in done.hands_off})
        for rule in rules:
            rule(matcher, found)
        told = {refusal.layers[-1] for refusal in done.refused} | done.hands_off
        done.refused += [r for r in found.refused if r.layers[-1] not in told]
        if not found.merges:
            return done
        merges = [_disabled(m, "--skip") if m.id in skip else m for m in found.merges]
        done.hands_off.update(name for m in merges if not m.enabled for name in m.layers)
        done.net = apply(done.net, Plan(done.net.name, tuple(merges)))
        done.merges += merges


def select(
    net: Net, plan: Plan, only: Sequence[str] = (), skip: Sequence[str] = (), exact: bool = False
) -> Plan:
    """The plan with just the merges (or steps) ``only``, or all but ``skip``, or the exact ones enabled.

    With the merges named by ``only`` go those of ``net`` they build upon. Raises PlanError for a name the
    plan does not have.
    """
    choice = [merge for merge in plan.merges if merge.exact or not exact]
    known = {name for merge in choice for name in (merge.id, merge.stage) if name}
    kind = "exact merge" if exact else "merge"
    for name in (*only, *skip):
        if name not in known:
            raise PlanError(f"no {kind} is called '{name}'; there are {', '.join(sorted(known)) or 'none'}")
    merges = list(plan.merges)
    if skip:
        merges = [_disabled(m, "--skip") if {m.id, m.stage} & set(skip) else m for m in merges]
    if exact:
        merges = [m if m.exact else _disabled(m, "--exact") for m in merges]
    if only:
        merges = _only(net, merges, set(only))
    return Plan(plan.net, tuple(merges))


def _disabled(merge: Merge, why: str) -> Merge:
    return dataclasses.replace(merge, enabled=False, note=f"left out by {why}") if merge.enabled else merge


def _only(net: Net, merges: list[Merge], names: set[str]) -> list[Merge]:
    """Enable just the named merges and those they build upon."""
    wanted = {m.id for m in merges if m.id in names or (m.enabled and m.stage in names)}
    for merge in reversed(merges):
        if merge.id in wanted:
            wanted |= _foundations(net, merges, merge)
    return [
        dataclasses.replace(m, enabled=True) if m.id in wanted else _disabled(m, "--only") for m in merges
    ]


def _foundations(net: Net, merges: list[Merge], merge: Merge) -> set[str]:
    """The enabled merges that ``merge`` builds upon: they make its layers, put them on other blobs before it
    does, or take a layer away above one."""
    enabled = [m for m in merges if m.enabled]
    before = {m.id for m in merges[: merges.index(merge)] if m.exact}
    made = [
        m for m in enabled if any(s.name in merge.layers for s in m.becomes if not s.kept or m.id in before)
    ]
    taken_away = {name: m.id for m in enabled if not m.becomes for name in m.absorbs}
    needed = {m.id for m in made}
    group = {*merge.layers, *(name for m in made for name in m.absorbs)}
    todo = [layer for layer in net.layers if layer.name in group]
    while todo:
        layer = todo.pop()
        above = {p for i in range(len(layer.bottom)) for p in net.graph.producers(layer, i) if p is not None}
        gone = [p for p in above if taken_away.get(p.name, merge.id) != merge.id]
        needed |= {taken_away[p.name] for p in gone}
        todo += gone
    return needed


# ---- applying ---------------------------------------------------------------------------------------------


def apply(net: Net, plan: Plan, init: str = "inherit", seed: int = 0) -> Net:
    """The net after every active merge of the plan; deterministic for a seed.

    Reborn layers get weights where ``net`` has them (``init``: xavier or inherit), untouched layers keep
    their text and their blobs. Raises PlanError where a merge does not fit the net, naming the merge.
    """
    pending = plan.active
    while pending:
        batch = _disjoint(net, pending)
        net = _apply_batch(net, batch, init, seed)
        pending = pending[len(batch) :]
    try:
        check_weights(net, "the reborn net")
    except WeightsError as error:
        raise PlanError(f"the plan does not fit together: {error}") from None
    return net


def without_dropout(net: Net) -> Net:
    """``net`` as it is used when it is not trained: a net derived from a train_val still has its Dropouts."""
    from .rules import Findings, drop_dropout
    from .rules.match import Matcher

    found = Findings()
    drop_dropout.propose(Matcher(net), found)
    return apply(net, Plan(net.name, tuple(found.merges)))


def _disjoint(net: Net, pending: list[Merge]) -> list[Merge]:
    """The merges from the front whose layers are there and not each other's.

    Those that take a layer away make new neighbours for what follows them.
    """
    batch: list[Merge] = []
    used: set[str] = set()
    names = {layer.name for layer in net.layers}
    for merge in pending:
        if used.intersection(merge.layers) or not names.issuperset(merge.layers):
            break
        if batch and merge.becomes and not batch[-1].becomes:
            break
        used.update(merge.layers)
        batch.append(merge)
    if not batch:
        merge = pending[0]
        missing = next(name for name in merge.layers if name not in names)
        raise PlanError(
            f"merge '{merge.id}': the net has no layer '{missing}' at this point; "
            "is the plan for this net, or a merge before it disabled?"
        )
    return batch


@dataclass
class _Border:
    """The blobs a group reads (where each is read first) and those it gives (who gives it, as which top)."""

    readers: list[tuple[Layer, int]]
    outs: list[tuple[Layer, int]]

    @property
    def names(self) -> list[str]:
        """The blobs it gives."""
        return [maker.top[i] for maker, i in self.outs]


def _apply_batch(net: Net, batch: list[Merge], init: str, seed: int) -> Net:
    """One pass over the net for merges that do not share layers."""
    from .init import weights_for

    graph = net.graph
    group_of: dict[Layer, int] = {}
    for i, merge in enumerate(batch):
        for name in merge.layers:
            try:
                group_of[net.layer(name)] = i
            except NetError as error:
                raise PlanError(f"merge '{merge.id}': {error}") from None
        _check_merge(net, merge)
    groups: list[list[Layer]] = [[] for _ in batch]
    for layer in net.layers:
        if layer in group_of:
            groups[group_of[layer]].append(layer)
    borders = [_border(graph, m, g) for m, g in zip(batch, groups, strict=True)]

    # Blobs that vanish because nothing replaces their makers: who reads them reads what the group read.
    vanished = {
        b.outs[0]: b.readers[0]
        for merge, b in zip(batch, borders, strict=True)
        if not merge.becomes and b.outs
    }

    names: dict[tuple[Layer, int], str] = {}

    def read_name(layer: Layer, index: int) -> str:
        # The group whose output vanished may itself have read one that did, and so on for thousands.
        at, way = (layer, index), [(layer, index)]
        while at not in names:
            name = at[0].bottom[at[1]]
            makers = [(p, p.top.index(name)) for p in graph.producers(*at) if p is not None]
            gone = next((maker for maker in makers if maker in vanished), None)
            if gone is None:
                names[at] = name
            else:
                at = vanished[gone]
                way.append(at)
        names.update(dict.fromkeys(way, names[at]))
        return names[at]

    made: list[list[Layer]] = []
    for merge, group, around in zip(batch, groups, borders, strict=True):
        sources = [read_name(*reader) for reader in around.readers]
        made.append(_make(net, merge, group, sources, around.names))
        weights = weights_for(net, merge, init, seed)
        for layer in made[-1]:
            if layer.name in weights:
                layer.record = Record(layer.name, layer.type, [Blob(a) for a in weights[layer.name]])
    places = [_place(net, g, b) for g, b in zip(groups, borders, strict=True)]

    def swap(layer: Layer) -> Iterator[Layer]:
        if layer in group_of:
            i = group_of[layer]
            if layer is places[i]:
                yield from made[i]
        else:
            yield layer.rewired([read_name(layer, i) for i in range(len(layer.bottom))], layer.top)

    result = net.replace(swap)
    _check(net, result, batch, borders)
    return result


def _border(graph: Graph, merge: Merge, group: list[Layer]) -> _Border:
    """What a group reads and gives. Raises PlanError where the merge cannot have such a border."""
    readers, outs = graph.border(group)
    if merge.kind == "drop":
        from .rules.drop_unused import passes_on

        if not outs:
            return _Border(readers, outs)
        if not all(layer.type == "Dropout" or passes_on(layer) for layer in group):
            raise PlanError(
                f"merge '{merge.id}': a drop removes a Dropout, a layer that changes nothing, or layers "
                "nobody reads; correct it, or its kind"
            )
    if merge.exact and merge.becomes and readers and outs:
        return _Border(readers, outs)
    if len(readers) != 1:
        names = ", ".join(sorted({layer.bottom[i] for layer, i in readers})) or "nothing"
        raise PlanError(f"merge '{merge.id}' reads {names}; a merge reads exactly one blob from outside")
    if len(outs) != 1:
        names = ", ".join(sorted({layer.top[i] for layer, i in outs})) or "nothing"
        raise PlanError(f"merge '{merge.id}' gives {names}; other layers may read exactly one of its blobs")
    return _Border(readers, outs)


def _place(net: Net, group: list[Layer], around: _Border) -> Layer:
    """The first layer of a group by which everything it reads is there: what it becomes takes its place."""
    order = net.places
    producers = (p for reader, i in around.readers for p in net.graph.producers(reader, i) if p is not None)
    last = max((order[p] for p in producers), default=-1)
    return next(layer for layer in group if order[layer] > last)


def _make(net: Net, merge: Merge, group: list[Layer], sources: list[str], outs: list[str]) -> list[Layer]:
    """The layers a merge becomes, on real blob names."""
    names = {border(IN, i): name for i, name in enumerate(sources)}
    names.update({border(OUT, i): name for i, name in enumerate(outs)})
    layers: list[Layer] = []
    for spec in merge.becomes:
        bottom = [names.get(name, name) for name in spec.bottom]
        top = [names.get(name, name) for name in spec.top]
        if spec.type:
            layers.append(_brought_along(net, spec, bottom, top))
            continue
        like = net.layer(spec.like)
        if spec.kept and (len(bottom), len(top)) == (len(like.bottom), len(like.top)):
            layers.append(like.rewired(bottom, top))
            continue
        tree = like.tree.copy()
        tree.set("name", quote(spec.name))
        tree.set("bottom", *map(quote, bottom))
        tree.set("top", *map(quote, top))
        if not spec.kept:
            _set_geometry(tree, like, spec, merge)
        # What stood above the group stands above what it became.
        comments = group[0].comments if not layers else like.comments
        before = "" if not comments or comments.endswith(("\n", " ", "\t")) else net.newline
        body = render(Message([Field("layer", tree)]), newline=net.newline)
        layers.append(Layer.from_text(comments + before + body, path=like.path, line=like.line))
    return layers


def _brought_along(net: Net, spec: Spec, bottom: list[str], top: list[str]) -> Layer:
    """A layer that is like none of the net's: a Slice, or a Convolution that passes on some of the pixels."""
    tree = Message([Field("name", quote(spec.name)), Field("type", quote(spec.type))])
    tree.fields += [Field("bottom", quote(name)) for name in bottom]
    tree.fields += [Field("top", quote(name)) for name in top]
    if spec.type == "Slice":
        param = Message([Field("slice_point", str(point)) for point in spec.slice_point])
        tree.fields.append(Field("slice_param", param))
    else:
        assert spec.stride is not None
        frozen = Message([Field("lr_mult", "0"), Field("decay_mult", "0")])
        one = Message([Field("type", quote("constant")), Field("value", "1")])
        channels = str(spec.num_output)
        param = Message([Field("num_output", channels), Field("kernel_size", "1"), Field("group", channels)])
        param.fields += _pair("stride", spec.stride, 1)
        param.fields += [Field("bias_term", "false"), Field("weight_filler", one)]
        tree.fields += [Field("param", frozen), Field("convolution_param", param)]
    return Layer.from_text(render(Message([Field("layer", tree)]), newline=net.newline), path=net.path)


def _check_merge(net: Net, merge: Merge) -> None:
    """Raise PlanError where a merge says what cannot be, whatever blobs it reads."""

    def require(true: bool, otherwise: str) -> None:
        if not true:
            raise PlanError(f"merge '{merge.id}': {otherwise}")

    if merge.exact:
        claim = _is_not_exact(net, merge)
        require(claim is None, f"{claim}; correct it, or its kind")
    inside = {border(IN, i) for i in range(sum(len(net.layer(name).bottom) for name in merge.layers))}
    for spec in merge.becomes:
        where = f"layer '{spec.name}'"
        for name in spec.bottom:
            require(name in inside, f"{where} reads '{name}', which is neither @in nor given above it")
        inside.update(spec.top)
        if spec.type:
            require(spec.type in NEW_TYPES and merge.exact and not spec.like,
                    f"{where} is of type {spec.type}; a merge brings along a Slice or a Convolution that "
                    "passes on pixels, and only where it is exact")  # fmt: skip
            needed = ("slice_point",) if spec.type == "Slice" else ("num_output", "stride")
            lacking = [key for key in needed if not getattr(spec, key)]
            require(not lacking, f"{where} lacks its {' and '.join(lacking)}")
            continue
        for name in (spec.like, *(row.layer for row in spec.rows if row.layer != IN)):
            require(name in merge.layers, f"{where} is made after '{name}', no layer of this merge")
        kind = net.layer(spec.like).type
        require(spec.kept or kind in TENSOR, f"{where} is made after '{spec.like}', a {kind}; only a "
                "Convolution or InnerProduct can be reborn")  # fmt: skip
        given = [key for key in GEOMETRY if getattr(spec, key) is not None]
        if given and (spec.kept or merge.kind == "fold"):
            require(False, f"{where} keeps its weights: no {given[0]} can be given; give it another name")
        odd = [key for key in given if kind == "InnerProduct" and key != "num_output"]
        require(not odd, f"{where} is an InnerProduct: it has no {''.join(odd[:1])}")
    require(not merge.becomes or OUT in inside, "none of the layers it becomes gives @out")


def _is_not_exact(net: Net, merge: Merge) -> str | None:
    """Why a merge that says it is exact cannot be, as far as its layers' types tell."""
    from .rules.match import AFFINE

    types = [net.layer(name).type for name in merge.absorbs]
    reborn = [spec for spec in merge.becomes if not spec.kept and not spec.type]
    tensors = [kind for kind in types if kind in TENSOR]
    if merge.kind == "drop":
        good, what = not merge.becomes, "drop becomes nothing"
    elif merge.kind == "fold":
        good = len(merge.becomes) == len(tensors) == 1 and {*types} <= {*tensors, *AFFINE}
        what = "fold makes a Convolution or InnerProduct of itself and the BatchNorms and Scales beside it"
    elif merge.kind == "compose":
        good = len(types) == 2 and len(merge.becomes) == len(reborn) == 1 and {*types} <= {*TENSOR, "Pooling"}
        what = "compose makes one Convolution or InnerProduct of two, or of one and a Pooling"
    elif merge.kind == "reorder":
        good, what = not merge.absorbs and not reborn, "reorder keeps every layer"
    elif merge.kind == "join":
        good = len(reborn) == 1 and len(reborn[0].rows) == len(tensors) > 1
        what = "join makes one Convolution of several; its rows name them all"
    else:
        good = {spec.like for spec in reborn} == set(merge.absorbs) and set(types) == {"Convolution"}
        what = "stride gives Convolutions another stride, and nothing else"
    return None if good else f"a {what}"


def _set_geometry(tree: Message, like: Layer, spec: Spec, merge: Merge) -> None:
    """Write a reborn layer's geometry into its tree; what the spec does not give stays."""
    key = "convolution_param" if like.type == "Convolution" else "inner_product_param"
    p = tree.message(key)
    if p is None:
        raise NetError(f"{like.where}: {key} is missing; give it a num_output")
    if merge.kind in ("fold", "compose", "join"):  # these always have a bias
        p.fields[:] = [f for f in p.fields if f.name != "bias_term"]
    geometry = [Field("num_output", str(spec.num_output))] if spec.num_output is not None else []
    drop = [f.name for f in geometry]
    for name, pair, default in (
        ("pad", spec.pad, 0),
        ("kernel_size", spec.kernel, None),
        ("stride", spec.stride, 1),
        ("dilation", spec.dilation, 1),
    ):
        if pair is None:
            continue
        base = name.removesuffix("_size")
        drop += [name, f"{base}_h", f"{base}_w"]
        geometry += _pair(name, pair, default)
    at = next((i for i, f in enumerate(p.fields) if f.name in drop), len(p.fields))
    rest = [f for f in p.fields if f.name not in drop]
    p.fields[:] = [*rest[:at], *geometry, *rest[at:]]
    if spec.group not in (None, like.param.convolution_param.group):
        p.set("group", str(spec.group))
    filler = like.param.convolution_param if like.type == "Convolution" else like.param.inner_product_param
    if not merge.exact and filler.weight_filler.type != "xavier":  # the paper's start, whatever it was
        p.set("weight_filler", Message([Field("type", quote("xavier"))]))


def _pair(name: str, pair: tuple[int, int], default: int | None) -> list[Field]:
    """One of a convolution's fields for both axes, as Caffe's convolution_param has it."""
    if pair[0] == pair[1]:
        return [Field(name, str(pair[0]))] if pair[0] != default else []
    names = (name, name) if name == "dilation" else [f"{name.removesuffix('_size')}_{axis}" for axis in "hw"]
    return [Field(axis, str(value)) for axis, value in zip(names, pair, strict=True)]


def _check(before: Net, after: Net, batch: list[Merge], borders: list[_Border]) -> None:
    """What must hold after every batch: the graph is whole, and what is still read has its old size."""
    maker = {name: m.id for m, b in zip(batch, borders, strict=True) for name in b.names}
    for view in before.graph.views:
        try:
            sizes = {value.name: shape for value, shape in infer(View(after, view.state)).items()}
        except NetError as error:
            raise PlanError(f"after merging {', '.join(m.id for m in batch)}: {error}") from None
        # Of a blob that is written in place the last value, as above.
        for name, shape in {value.name: shape for value, shape in infer(view).items()}.items():
            now = sizes.get(name, shape)
            if now != shape and shape is not None:
                blame = maker.get(name) or ", ".join(m.id for m in batch)
                raise PlanError(
                    f"merge '{blame}': blob '{name}' would become {now} instead of {shape}; "
                    "correct its kernel, stride, pad or num_output"
                )


# ---- plan.yaml --------------------------------------------------------------------------------------------

_HEADER = """\
# What rebirth_net.py does to {net}, in this order. Edit it and give it back with --plan.
#   enabled: false leaves a merge out; instead_of names the merge that this one replaces when enabled
#   stage groups merges into training steps; exact merges ({exact}) need none
#   becomes lists the layers that stand for the absorbed ones; @in and @out (@in2, @out2 ...) are the blobs at
#   the border; a layer without like or type is one of the original, on these blobs
#   like is the layer a reborn one is made after; rows says where its output channels come from
"""
_MERGE_KEYS = {"id", "kind", "stage", "enabled", "instead_of", "note", "absorbs", "becomes"}
_SPEC_KEYS = {f.name for f in dataclasses.fields(Spec)}


def dump(plan: Plan) -> str:
    """A plan as YAML."""
    import yaml

    document = {"version": VERSION, "net": plan.net, "merges": [_merge_data(m) for m in plan.merges]}
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    body = yaml.dump(document, Dumper=dumper, sort_keys=False, default_flow_style=None, width=110)
    return _HEADER.format(net=plan.net.replace("\n", " "), exact=", ".join(EXACT_KINDS)) + body


def _merge_data(merge: Merge) -> dict[str, Any]:
    data: dict[str, Any] = {"id": merge.id, "kind": merge.kind}
    for key in ("stage", "instead_of", "note"):
        if getattr(merge, key):
            data[key] = getattr(merge, key)
    if not merge.enabled:
        data["enabled"] = False
    data["absorbs"] = list(merge.absorbs)
    data["becomes"] = [_spec_data(spec) for spec in merge.becomes]
    return data


def _spec_data(spec: Spec) -> dict[str, Any]:
    data: dict[str, Any] = {"name": spec.name, "like": spec.like, "type": spec.type}
    for key in ("like", "type"):
        if not data[key] or spec.kept:
            del data[key]
    data["bottom"], data["top"] = list(spec.bottom), list(spec.top)
    for key in (*GEOMETRY, "slice_point"):
        value = getattr(spec, key)
        if value not in (None, ()):
            data[key] = list(value) if isinstance(value, tuple) else value
    if spec.rows and spec.rows != (Rows(spec.like),):
        data["rows"] = [
            {"layer": r.layer, "at": list(r.at)} if r.at is not None else {"layer": r.layer}
            for r in spec.rows
        ]
    return data


def load(path: Path) -> Plan:
    """Read a plan.yaml. Raises PlanError with the place and what is wrong."""
    document = _document(path)
    reader = _Reader(str(path))
    document = reader.mapping(document, "the file", {"version", "net", "merges"})
    if document.get("version") != VERSION:
        shown = reprlib.repr(document.get("version"))
        raise PlanError(f"{path}: version is {shown}; this tool reads version {VERSION}")
    merges = tuple(
        reader.merge(m, i) for i, m in enumerate(reader.sequence(document.get("merges"), "merges"))
    )
    ids = [merge.id for merge in merges]
    twice = next((id_ for id_ in ids if ids.count(id_) > 1), None)
    if twice is not None:
        raise PlanError(f"{path}: two merges are called '{twice}'; ids must differ")
    for merge in merges:
        if merge.instead_of and merge.instead_of not in ids:
            raise PlanError(f"{path}: merge '{merge.id}': instead_of names '{merge.instead_of}', no merge")
    return Plan(str(document.get("net", "")), merges)


def _document(path: Path) -> Any:
    """What a YAML file holds; PlanError where it is none."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a safe loader: no code tags
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PlanError(f"{path}: larger than {MAX_BYTES >> 20} MB; not a plan")
        text = data.decode("utf-8")
        depth = 0
        event: Any
        for event in yaml.parse(text, Loader=loader):  # the loader itself would recurse until it crashes
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1
            if depth > MAX_DEPTH:
                raise PlanError(f"{path}:{line}: lists or mappings more than {MAX_DEPTH} deep; not a plan")
            if isinstance(event, yaml.AliasEvent):  # a few of them can stand for billions of merges
                raise PlanError(f"{path}:{line}: *{event.anchor} repeats a part of the file; write it out")
            if getattr(event, "tag", None) is not None:
                raise PlanError(f"{path}:{line}: the tag {event.tag} has no place in a plan; remove it")
        reader = loader(text)
        node = reader.get_single_node()
        _check_keys(node, path)
        return None if node is None else reader.construct_document(node)
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file; check the path of the plan") from None
    except IsADirectoryError:
        raise PlanError(f"{path}: is a directory; give the plan.yaml in it") from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    # The loader lets through what Python says of a date, a number or a truth value that is none.
    except (yaml.YAMLError, ValueError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        raise PlanError(f"{path}{line}: not YAML: {problem}; correct it, or write a new plan") from None


def _check_keys(node: Any, path: Path) -> None:
    """Raise PlanError where a mapping gives a key twice: the loader would take the last one."""
    value = "" if node is None else node.value
    if isinstance(value, str):
        return
    keys: set[str] = set()
    for item in value:
        if isinstance(item, tuple):
            key, item = item
            if isinstance(key.value, str):
                if key.value in keys:
                    raise PlanError(
                        f"{path}:{key.start_mark.line + 1}: '{key.value}' is given twice; keep one"
                    )
                keys.add(key.value)
        _check_keys(item, path)


class _Reader:
    """Checks a YAML document on the way into merges; every complaint names the file and the merge."""

    def __init__(self, path: str) -> None:
        self.path = path

    def mapping(self, data: Any, where: str, keys: Iterable[str]) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise PlanError(f"{self.path}: {where} is no mapping of keys to values; is it a plan.yaml?")
        unknown = [str(key) for key in data if key not in set(keys)]
        if unknown:
            raise PlanError(
                f"{self.path}: {where} has an unknown key '{unknown[0]}'; known are {', '.join(sorted(keys))}"
            )
        return data

    def sequence(self, data: Any, where: str) -> list[Any]:
        if not isinstance(data, list):
            raise PlanError(f"{self.path}: {where} is no list; write [a, b]")
        return data

    def merge(self, data: Any, index: int) -> Merge:
        where = f"merge {index + 1}"
        data = self.mapping(data, where, _MERGE_KEYS)
        id_ = self.word(data, "id", where)
        where = f"merge '{id_}'"
        kind = self.word(data, "kind", where)
        if kind not in KINDS:
            raise PlanError(f"{self.path}: {where}: kind '{kind}'; known are {', '.join(KINDS)}")
        stage = self.word(data, "stage", where, "" if kind in EXACT_KINDS else id_)
        if not isinstance(data.get("enabled", True), bool):
            raise PlanError(f"{self.path}: {where}: enabled is true or false")
        absorbs = self.words(data, "absorbs", where)
        becomes = tuple(self.spec(s, where) for s in self.sequence(data.get("becomes"), f"{where}: becomes"))
        if not absorbs and kind != "reorder":
            raise PlanError(f"{self.path}: {where}: absorbs no layer")
        return Merge(
            id_,
            kind,
            stage,
            absorbs,
            becomes,
            data.get("enabled", True),
            self.word(data, "instead_of", where, ""),
            self.word(data, "note", where, ""),
        )

    def spec(self, data: Any, where: str) -> Spec:
        data = self.mapping(data, f"{where}: becomes", _SPEC_KEYS)
        name = self.word(data, "name", where)
        where = f"{where}: layer '{name}'"
        type_ = self.word(data, "type", where, "")
        like = self.word(data, "like", where, "" if type_ else name)
        points = self.sequence(data.get("slice_point", []), f"{where}: slice_point")
        rows = tuple(
            Rows(
                self.word(self.mapping(r, f"{where}: rows", {"layer", "at"}), "layer", where),
                self.pair(r, "at", where, 0),
            )
            for r in self.sequence(data.get("rows", []), f"{where}: rows")
        )
        spec = Spec(
            name,
            like,
            self.words(data, "bottom", where),
            self.words(data, "top", where),
            self.count(data, "num_output", where),
            self.pair(data, "kernel", where, 1),
            self.pair(data, "stride", where, 1),
            self.pair(data, "pad", where, 0),
            self.count(data, "group", where),
            rows or ((Rows(like),) if like not in ("", name) else ()),
            self.pair(data, "dilation", where, 1),
            type_,
            tuple(self.count({"slice_point": p}, "slice_point", where) or 0 for p in points),
        )
        if not spec.bottom or not spec.top:
            raise PlanError(f"{self.path}: {where}: needs a bottom and a top")
        return spec

    def word(self, data: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
        value = data.get(key, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or (default is None and not value):
            raise PlanError(f"{self.path}: {where}: {key} is {reprlib.repr(value)}; give a name in quotes")
        return value

    def words(self, data: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
        values = self.sequence(data.get(key), f"{where}: {key}")
        return tuple(self.word({key: value}, key, where) for value in values)

    def count(self, data: dict[str, Any], key: str, where: str) -> int | None:
        value = data.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise PlanError(
                f"{self.path}: {where}: {key} is {reprlib.repr(value)}; give a whole number from 1"
            )
        return value

    def pair(self, data: dict[str, Any], key: str, where: str, least: int) -> tuple[int, int] | None:
        value = data.get(key)
        if value is None:
            return None
        values = [value, value] if isinstance(value, int) else value
        whole = isinstance(values, list) and all(
            isinstance(v, int) and not isinstance(v, bool) and least <= v < 2**16 for v in values
        )
        if not whole or len(values) != 2:
            raise PlanError(
                f"{self.path}: {where}: {key} is {reprlib.repr(value)}; "
                f"give [height, width], whole numbers from {least}"
            )
        return values[0], values[1]
