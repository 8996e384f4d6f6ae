"""Convolutions of the same geometry on one blob become one.

x -> [conv | conv] -> Concat          =>  x -> conv -> Concat   where they are neighbours in it
x -> [conv -> ReLU | conv -> ReLU]    =>  x -> conv -> ReLU -> Slice

One convolution reads its input (and Caffe unrolls and packs it) once instead of several times; a Slice copies
the outputs. The latter is worth it where it copies no more values than are read less. ReLUs that all are the
same become one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import prod

from .. import params
from ..merge import OUT, Merge, Rows, Spec
from ..net import TEST, Layer, Value
from . import Findings
from .match import CUT, JOINED, Matcher, joins_channels, original_name


def neighbours(m: Matcher, found: Findings) -> None:
    """A merge for every set of like convolutions on one blob that meet again side by side."""
    for siblings in _families(m, found):
        for concat, run in _runs(m, siblings, found):
            found.add(_into_concat(m, concat, run, found), [*run, *_activations(m, run), concat])


def sliced(m: Matcher, found: Findings) -> None:
    """A merge for every other set of like convolutions on one blob."""
    for siblings in _families(m, found):
        if not _runs(m, siblings, found):
            _sliced(m, siblings, found)


def _families(m: Matcher, found: Findings) -> Iterator[list[Layer]]:
    """Every two or more like convolutions on one blob."""
    for value in m.graph.view(TEST).values:
        for siblings in _siblings(m, value):
            reasons = {conv: m.untouchable(conv) for conv in siblings if conv not in found.taken}
            family = [conv for conv, reason in reasons.items() if reason is None]
            if len(family) > 1:
                yield family
            elif len(reasons) > 1:
                found.refuse(next(filter(None, reasons.values())), reasons)


def _siblings(m: Matcher, value: Value) -> list[list[Layer]]:
    """The convolutions that read a value and could be one, in the file's order."""
    alike: dict[object, list[Layer]] = {}
    for reader, _ in value.readers:
        if reader.type != "Convolution" or len(m.shapes.get((reader, 0)) or ()) != 4:
            continue
        conv = params.conv(reader.param)
        if conv.group > 1 or m.graph.producers(reader) != m.graph.producers(value.readers[0][0]):
            continue
        rates = [(reader.spec(i).lr_mult, reader.spec(i).decay_mult) for i in (0, 1)]
        states = tuple(reader in view.bottoms for view in m.graph.views)
        key = (conv.kernel, conv.stride, conv.pad, conv.dilation, states, *rates)
        alike.setdefault(key, []).append(reader)
    return [group for group in alike.values() if len(group) > 1]


def _activations(m: Matcher, siblings: list[Layer]) -> list[Layer]:
    """The ReLU behind each sibling, where each has one and they are all the same."""
    relus = [m.only_reader(conv) for conv in siblings]
    found = [x for x in relus if x is not None and x.type == "ReLU" and m.simple(x)]
    same = len({relu.param.relu_param.negative_slope for relu in found}) == 1
    return found if same and len(found) == len(siblings) else []


def _ends(m: Matcher, siblings: list[Layer]) -> list[Layer]:
    """What gives each sibling's output: its ReLU, or itself."""
    return _activations(m, siblings) or siblings


def _runs(m: Matcher, siblings: list[Layer], found: Findings) -> list[tuple[Layer, list[Layer]]]:
    """Siblings whose outputs are neighbours in a Concat, in its order."""
    joined: dict[Layer, dict[int, Layer]] = {}  # Concat -> bottom index -> sibling
    for conv in siblings:
        relu = m.only_reader(conv)
        end = relu if relu is not None and relu.type == "ReLU" and m.simple(relu) else conv
        concat = m.only_reader(end)
        if concat is not None and concat not in found.taken and joins_channels(concat):
            joined.setdefault(concat, {})[concat.bottom.index(end.top[0])] = conv
    runs = []
    for concat, at in joined.items():
        for run in _consecutive(sorted(at)):
            chosen = [at[i] for i in run]
            ends = _ends(m, chosen)
            if len(run) > 1 and all(m.only_reader(end) is concat for end in ends):
                runs.append((concat, chosen))
                break  # the Concat is taken; what is left of it is seen in the next round
    return runs


def _consecutive(indices: list[int]) -> list[list[int]]:
    runs: list[list[int]] = [indices[:1]]
    for before, index in pairwise(indices):
        if index == before + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _joined(m: Matcher, siblings: list[Layer], bottom: str, top: str) -> list[Spec]:
    """The one convolution, and its ReLU where the siblings have one."""
    name = m.fresh(siblings[0], JOINED)
    total = sum(conv.param.convolution_param.num_output for conv in siblings)
    rows = tuple(Rows(conv.name) for conv in siblings)
    specs = [Spec(name, siblings[0].name, (bottom,), (top,), total, rows=rows)]
    specs += [Spec(relu.name, relu.name, (top,), (top,)) for relu in _activations(m, siblings)[:1]]
    return specs


def _merge(found: Findings, siblings: list[Layer], group: list[Layer], specs: list[Spec]) -> Merge:
    kept = {spec.name for spec in specs if spec.kept}
    gone = tuple(layer.name for layer in group if layer.name not in kept)
    return Merge(found.id(f"join:{original_name(siblings[0])}"), "join", "", gone, tuple(specs))


def _into_concat(m: Matcher, concat: Layer, run: list[Layer], found: Findings) -> Merge:
    """Neighbours in a Concat: it gets one bottom for all of them, or is not needed any more."""
    group = [*run, *_activations(m, run), concat]
    ins, _ = m.border(group)
    ends = [end.top[0] for end in _ends(m, run)]
    first = concat.bottom.index(ends[0])
    everything = len(ends) == len(concat.bottom)
    top = OUT if everything else m.fresh(run[0], JOINED)
    specs = _joined(m, run, ins[run[0], 0], top)
    if not everything:
        bottoms = [ins.get((concat, i), "") for i in range(len(concat.bottom))]
        bottoms[first : first + len(run)] = [top]
        specs.append(Spec(concat.name, concat.name, tuple(bottoms), (OUT,)))
    return _merge(found, run, group, specs)


def _sliced(m: Matcher, siblings: list[Layer], found: Findings) -> None:
    """Siblings that go different ways: their outputs are cut apart again."""
    conv = params.conv(siblings[0].param)
    shape = m.input_shapes[siblings[0], 0]
    assert shape is not None
    outputs = [x.param.convolution_param.num_output for x in siblings]
    if sum(outputs) > (len(siblings) - 1) * shape[1] * prod(conv.kernel):
        found.refuse("a Slice would copy more than one convolution reads less", siblings)
        return
    relus = _activations(m, siblings)
    group = [*siblings, *relus]
    if not found.taken.isdisjoint(group):
        return
    ins, outs = m.border(group)
    top = m.fresh(siblings[0], JOINED)
    tops = tuple(outs[end] for end in _ends(m, siblings))
    points = tuple(accumulate(outputs))[:-1]
    cut = Spec(m.fresh(siblings[0], CUT), "", (top,), tops, type="Slice", slice_point=points)
    specs = [*_joined(m, siblings, ins[siblings[0], 0], top), cut]
    found.add(_merge(found, siblings, group, specs), group)
