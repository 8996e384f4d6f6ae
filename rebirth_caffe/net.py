"""A Caffe net as a graph that can be written back byte for byte.

A Net is the text of its file cut into pieces, some of them layers with their weights. What a layer reads
and who reads it depends on phase, level and stages: a View is the net of one such state in single-assignment
form (an in-place layer makes a new Value under the old blob name), a Graph the union over all states the
file is meant for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import Message as ProtoMessage

from . import caffemodel, prototxt
from .caffemodel import Array, Blob, Record
from .errors import NetError, WeightsError
from .prototxt import Field, Message
from .schema import caffe_pb2

if TYPE_CHECKING:
    from .schema.fork import Schema

TRAIN, TEST = caffe_pb2.TRAIN, caffe_pb2.TEST
MAX_STATES = 1_000_000  # times layers: every state is a net of its own; people's nets have two to ten
# What in a layer has no part in what it computes from its weights.
_HARMLESS = ("param", "weight_filler", "bias_filler", "filler", "engine")
# Forks' pooling_param.ceil_mode, which says what round_mode does.
_CEIL, _FLOOR = caffe_pb2.PoolingParameter.CEIL, caffe_pb2.PoolingParameter.FLOOR
_CEIL_MODE = {"true": _CEIL, "1": _CEIL, "false": _FLOOR, "0": _FLOOR}


class Layer:
    """One ``layer { }`` of a file: its exact text, its typed parameters, its weights.

    A layer is never changed; an edit makes a new one.
    """

    def __init__(self, text: str, tree: Message, *, path: str = "", line: int = 0, offset: int = 0) -> None:
        self.text = text  # with the comments above it
        self.tree = tree
        self.path = path
        self.line = line
        self.offset = offset  # where ``text`` starts in the text the tree's spans count in
        self.param = caffe_pb2.LayerParameter()
        self.unknown: list[Field] = prototxt.to_message(tree, self.param, path or "<text>")
        self.record: Record | None = None
        for ceil_mode in self._ceil_modes():
            self.param.pooling_param.round_mode = _CEIL_MODE[str(ceil_mode.value)]

    @classmethod
    def from_text(cls, text: str, *, path: str = "", line: int = 0) -> Layer:
        """A layer from a piece of prototxt that holds just it (and comments)."""
        tree = prototxt.parse(text, path or "<text>")
        found = tree.fields
        if len(found) != 1 or found[0].name != "layer" or not isinstance(found[0].value, Message):
            raise NetError(f"{path or '<text>'}:{line}: expected exactly one layer {{ ... }}")
        if line:  # of the whole file, not of this piece
            above = line - found[0].line
            for f in tree.walk():
                f.line += above
        return cls(text, found[0].value, path=path, line=line)

    def __repr__(self) -> str:
        return f"<Layer {self.name!r} {self.type}>"

    @cached_property
    def name(self) -> str:
        return self.param.name

    @cached_property
    def type(self) -> str:
        return self.param.type

    @cached_property
    def bottom(self) -> tuple[str, ...]:
        return tuple(self.param.bottom)

    @cached_property
    def top(self) -> tuple[str, ...]:
        return tuple(self.param.top)

    @cached_property
    def strange(self) -> Field | None:
        """The first field stock Caffe does not know and that may change what the layer computes.

        How it is trained, filled and which library computes it does not.
        """
        known = {*map(id, self.unknown)} - {*map(id, self._ceil_modes())}

        def search(tree: Message) -> Field | None:
            for f in tree.fields:
                if f.name in _HARMLESS:
                    continue
                if id(f) in known:
                    return f
                found = search(f.value) if isinstance(f.value, Message) else None
                if found is not None:
                    return found
            return None

        return search(self.tree) if known else None

    def _ceil_modes(self) -> list[Field]:
        """The fields of a fork that say as much as one of stock Caffe."""
        pooling = self.tree.message("pooling_param") if self.unknown else None
        return [f for f in pooling.all("ceil_mode") if f.value in _CEIL_MODE] if pooling is not None else []

    @property
    def blobs(self) -> list[Blob]:
        """The layer's weights; empty where it has none or none were given."""
        return self.record.blobs if self.record is not None else []

    @property
    def where(self) -> str:
        """``file:line: layer 'name'`` for messages."""
        return f"{self.path}:{self.line}: layer '{self.name}'" if self.line else f"layer '{self.name}'"

    @property
    def comments(self) -> str:
        """What stands above the layer in the file: blank lines and comments."""
        return self.text[: self._field().start - self.offset]

    def _field(self) -> Field:
        """The ``layer { }`` field itself, in the coordinates of ``text``."""
        found = prototxt.parse(self.text, self.path).fields[0]
        return Field("layer", found.value, start=found.start + self.offset, end=found.end + self.offset)

    def rewired(self, bottom: Sequence[str], top: Sequence[str]) -> Layer:
        """This layer on other blobs; every other byte of it stays. Counts must not change."""
        if len(bottom) != len(self.bottom) or len(top) != len(self.top):
            raise NetError(f"{self.where}: rewired from {self.bottom}->{self.top} to {bottom}->{top}")
        if (tuple(bottom), tuple(top)) == (self.bottom, self.top):
            return self
        pieces, at = [], 0
        wanted = {"bottom": iter(bottom), "top": iter(top)}
        for f in self.tree.fields:
            if f.name in wanted and isinstance(f.value, str):
                new = prototxt.quote(next(wanted[f.name]))
                if prototxt.unquote(f.value) != prototxt.unquote(new):
                    pieces += [self.text[at : f.value_start - self.offset], new]
                    at = f.value_end - self.offset
        layer = Layer.from_text("".join(pieces) + self.text[at:], path=self.path, line=self.line)
        if self.record is not None:
            layer.record = self.record.rewired(bottom, top)
        return layer

    def again(self, tree: Message) -> Layer:
        """This layer with another tree: its comments above stay, and its weights."""
        newline = "\r\n" if "\r\n" in self.text else "\n"
        text = self.comments + prototxt.render(Message([Field("layer", tree)]), newline=newline)
        layer = Layer.from_text(text, path=self.path, line=self.line)
        if self.record is not None:
            layer.record = Record(self.record.name, self.record.type, self.record.blobs)
        return layer

    def spec(self, index: int) -> caffe_pb2.ParamSpec:
        """Training options of blob ``index``: Caffe's defaults where the file gives none."""
        return self.param.param[index] if index < len(self.param.param) else caffe_pb2.ParamSpec()

    def shared_params(self) -> list[str]:
        """Names under which blobs of this layer may be shared with other layers."""
        return [p.name for p in self.param.param if p.name]


@dataclass(frozen=True)
class State:
    """What decides which layers are in a net (NetState)."""

    phase: int = TEST
    level: int = 0
    stages: frozenset[str] = frozenset()

    def includes(self, layer: Layer) -> bool:
        """Caffe's rule: any ``include`` that is met, or no ``exclude`` that is met."""
        p = layer.param
        if p.include and p.exclude:
            raise NetError(f"{layer.where}: include and exclude rules together; give only one kind")
        if p.include:
            return any(self._meets(rule) for rule in p.include)
        return not any(self._meets(rule) for rule in p.exclude)

    def _meets(self, rule: caffe_pb2.NetStateRule) -> bool:
        return not (
            (rule.HasField("phase") and rule.phase != self.phase)
            or (rule.HasField("min_level") and self.level < rule.min_level)
            or (rule.HasField("max_level") and self.level > rule.max_level)
            or any(stage not in self.stages for stage in rule.stage)
            or any(stage in self.stages for stage in rule.not_stage)
        )

    def __str__(self) -> str:
        words = ["TRAIN" if self.phase == TRAIN else "TEST", *sorted(self.stages)]
        return " ".join([*words, f"level {self.level}"] if self.level else words)


@dataclass(eq=False)
class Value:
    """What one layer writes under a blob name, until another layer writes there again."""

    name: str
    producer: Layer | None  # None for an input of the net
    index: int  # which top of the producer, or which input of the net
    readers: list[tuple[Layer, int]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Value {self.name!r} of {self.producer}>"


class View:
    """The net of one State in single-assignment form."""

    def __init__(self, net: Net, state: State) -> None:
        self.net = net
        self.state = state
        self.layers = [layer for layer in net.layers if state.includes(layer)]
        self.inputs = [Value(name, None, i) for i, name in enumerate(net.header.input)]
        self.bottoms: dict[Layer, list[Value]] = {}
        self.tops: dict[Layer, list[Value]] = {}
        current = {value.name: value for value in self.inputs}
        for layer in self.layers:
            for name in layer.bottom:
                if name not in current:
                    raise _MissingBottom(self, layer, name)
            self.bottoms[layer] = [current[name] for name in layer.bottom]
            for i, value in enumerate(self.bottoms[layer]):
                value.readers.append((layer, i))
            self.tops[layer] = [Value(name, layer, i) for i, name in enumerate(layer.top)]
            for value in self.tops[layer]:
                in_place = value.index < len(layer.bottom) and layer.bottom[value.index] == value.name
                if value.name in current and not in_place:
                    before = current[value.name].producer
                    raise NetError(
                        f"{layer.where}: top '{value.name}' is already a top of "
                        f"{before.where if before else 'the net itself'}; rename one of them"
                    )
                current[value.name] = value
        for layer in self.layers:
            for old, value in zip(self.bottoms[layer], self.tops[layer], strict=False):
                other = [reader for reader, _ in old.readers if reader is not layer]
                if old.name == value.name and len(old.readers) > 1:
                    who = other[0].where if other else "it itself a second time"
                    raise NetError(
                        f"{layer.where}: works in place on '{value.name}', which is also read by {who}; "
                        "give its top a name of its own"
                    )

    @property
    def values(self) -> Iterator[Value]:
        """Every value, in the order it is written."""
        return chain(self.inputs, *(self.tops[layer] for layer in self.layers))

    @property
    def outputs(self) -> list[Value]:
        """Values nobody reads: the net's outputs."""
        return [value for value in self.values if not value.readers]


class _MissingBottom(NetError):
    """A bottom nobody above produces, in one state."""

    def __init__(self, view: View, layer: Layer, blob: str) -> None:
        below = [x for x in view.layers if blob in x.top]
        elsewhere = [x for x in view.net.layers if blob in x.top]
        self.meant = bool(below) or not elsewhere  # otherwise the file is not meant for this state
        if below:
            message = (
                f"bottom '{blob}' is produced only below, by {below[0].where}; "
                "a cycle, or layers out of order: move the producer up"
            )
        elif elsewhere:
            message = f"bottom '{blob}' is produced in another phase or stage only ({view.state})"
        else:
            message = f"bottom '{blob}' is the top of no layer and no input; correct the name or add it"
        super().__init__(f"{layer.where}: {message}")


class Graph:
    """Who reads what, over every state the file is meant for."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.views: list[View] = []
        self._plainest: dict[int, View] = {}  # by phase
        untyped = next((layer for layer in net.layers if not layer.type), None)
        if untyped is not None:
            raise NetError(f"{untyped.where}: has no type; give it one, or remove the layer")
        refused: list[NetError] = []
        for state, own in _states(net):
            try:
                view = View(net, state)
            except NetError as error:
                meant = error.meant if isinstance(error, _MissingBottom) else own
                if meant:
                    raise
                refused.append(error)
                continue
            if not view.layers:
                continue
            same = next((other for other in self.views if other.layers == view.layers), None)
            if same is None:
                self.views.append(view)
            self._plainest.setdefault(state.phase, same or view)
        if not self.views:
            raise refused[0] if refused else NetError(f"{net.path}: holds no layers; is it a solver?")
        self._readers: dict[tuple[Layer, int], list[tuple[Layer, int]]] = {}
        self._producers: dict[tuple[Layer, int], list[Layer | None]] = {}
        for view in self.views:
            for value in view.values:
                if value.producer is not None:
                    readers = self._readers.setdefault((value.producer, value.index), [])
                    readers += [reader for reader in value.readers if reader not in readers]
                for reader in value.readers:
                    producers = self._producers.setdefault(reader, [])
                    if value.producer not in producers:
                        producers.append(value.producer)

    def readers(self, layer: Layer, top: int = 0) -> list[tuple[Layer, int]]:
        """Every (layer, bottom index) that reads this top in some state."""
        return self._readers.get((layer, top), [])

    def producers(self, layer: Layer, bottom: int = 0) -> list[Layer | None]:
        """Every layer that produces this bottom in some state; None stands for an input of the net."""
        return self._producers.get((layer, bottom), [])

    def border(self, layers: Sequence[Layer]) -> tuple[list[tuple[Layer, int]], list[tuple[Layer, int]]]:
        """What layers, in the file's order, read from outside (each blob's first reader and its bottom index)
        and what they give to the outside (its maker and top index): what others read, and what nobody does.
        """
        inside = set(layers)
        sources: dict[tuple[object, ...], tuple[Layer, int]] = {}
        outs = []
        for layer in layers:
            for i, name in enumerate(layer.bottom):
                producers = [p for p in self.producers(layer, i) if p not in inside]
                if producers:
                    sources.setdefault((name, *producers), (layer, i))
            for i in range(len(layer.top)):
                readers = self.readers(layer, i)
                if not readers or any(reader not in inside for reader, _ in readers):
                    outs.append((layer, i))
        return list(sources.values()), outs

    def view(self, phase: int) -> View:
        """The view for a phase: the plainest one there is, of the other phase if this one has none."""
        return self._plainest.get(phase, self.views[0])

    def shadowed(self, hdf5: bool = False) -> set[Layer]:
        """The layers that no weights file reaches: in every state they are in another one has their name.

        Of layers of one name Caffe gives binary weights to the first, those of an ``hdf5`` file to the last.
        """
        reached: set[Layer] = set()
        for view in self.views:
            named: dict[str, Layer] = {}
            for layer in reversed(view.layers) if hdf5 else view.layers:
                named.setdefault(layer.name, layer)
            reached.update(named.values())
        return {layer for view in self.views for layer in view.layers} - reached

    def same_views(self, a: Layer, b: Layer) -> bool:
        """Whether two layers are in the same views."""
        return all((a in view.bottoms) == (b in view.bottoms) for view in self.views)


def _states(net: Net) -> Iterator[tuple[State, bool]]:
    """The states a file distinguishes: both phases, each level, each stage and set of stages it names.

    With each, whether its level and stages are the file's own: those it is meant for in any case.
    """
    rules = [r for layer in net.layers for r in chain(layer.param.include, layer.param.exclude)]
    own = net.header.state
    lowest = {r.min_level for r in rules if r.HasField("min_level")}
    above = {r.max_level + 1 for r in rules if r.HasField("max_level")}
    levels = dict.fromkeys([own.level, *sorted({0} | lowest | {level - 1 for level in above} | above)])
    stages = sorted({stage for r in rules for stage in chain(r.stage, r.not_stage)})
    sets = dict.fromkeys(
        frozenset({*own.stage, *more})
        for more in [[], *([stage] for stage in stages), *(r.stage for r in rules)]
    )
    if 2 * len(levels) * len(sets) * len(net.layers) > MAX_STATES:
        raise NetError(
            f"{net.path}: its layers are meant for {len(levels)} levels and {len(sets)} sets of stages; "
            "remove those you do not use"
        )
    for level, stage_set, phase in product(levels, sets, (TEST, TRAIN)):
        yield State(phase, level, stage_set), level == own.level and stage_set == frozenset(own.stage)


class Net:
    """A prototxt with, optionally, its weights. Edits make a new Net."""

    def __init__(self, path: str, items: Iterable[Layer | str], header: caffe_pb2.NetParameter) -> None:
        self.path = path
        self.items = list(items)
        self.header = header  # everything but the layers
        self.strangers: list[Record] = []  # weights of layers this net does not have
        self.image: tuple[int, int, int] | None = None  # C x H x W of a database the file only names
        self.converted = False  # its files are in a format that not every engine reads
        self.schema: Schema | None = None  # of the fork the file is for

    @classmethod
    def load(
        cls,
        prototxt_path: Path | str,
        weights: Path | str | None = None,
        image: tuple[int, int, int] | None = None,
        schema: Schema | None = None,
    ) -> Net:
        """Read a net and, if given, its weights and the images (C x H x W) its Data layers read.

        ``schema`` is that of the fork the net is for: its fields, too, must then have values of their kind.

        Raises PrototxtError, NetError or WeightsError with the place and what to do.
        """
        path = Path(prototxt_path)
        net = cls.parse(prototxt.read_text(path), path)
        net.image = image
        if schema is not None:
            net.schema = schema
            for layer in net.layers:
                net.message(layer)
        return net.with_weights(weights) if weights is not None else net

    @classmethod
    def parse(cls, text: str, path: Path | str = "<text>") -> Net:
        """Read a net from text; one of an older era is upgraded first, as Caffe does."""
        tree = prototxt.parse(text, path)
        converted = False
        if any(f.name == "layers" for f in tree.fields):
            from .upgrade import upgrade

            upgraded = upgrade(text, path)
            text, tree = upgraded.text, upgraded.tree(path)
            converted = True
        items: list[Layer | str] = []
        header_fields = Message()
        at = 0
        for f in tree.fields:
            end = prototxt.end_of_field(text, f.end)
            if f.name == "layer":
                if not isinstance(f.value, Message) or f.start == f.value_start:
                    raise NetError(f"{path}:{f.line}: write each layer as layer {{ ... }}")
                items.append(Layer(text[at:end], f.value, path=str(path), line=f.line, offset=at))
            else:
                items.append(text[at:end])
                header_fields.fields.append(f)
            at = end
        items.append(text[at:])
        header = caffe_pb2.NetParameter()
        unknown = prototxt.to_message(header_fields, header, path)
        net = cls(str(path), items, header)
        net.converted = converted
        if not net.layers:
            hint = f" ('{unknown[0].name}' at line {unknown[0].line} is no field of a net)" if unknown else ""
            raise NetError(f"{path}: holds no layer{hint}; give a deploy or train_val prototxt")
        return net

    @property
    def name(self) -> str:
        return self.header.name or Path(self.path).stem.encode("utf-8", "replace").decode()

    @cached_property
    def layers(self) -> list[Layer]:
        return [item for item in self.items if isinstance(item, Layer)]

    @cached_property
    def places(self) -> dict[Layer, int]:
        """Where in the file each layer stands."""
        return {layer: i for i, layer in enumerate(self.layers)}

    @cached_property
    def _named(self) -> dict[str, list[Layer]]:
        named: dict[str, list[Layer]] = {}
        for layer in self.layers:
            named.setdefault(layer.name, []).append(layer)
        return named

    @cached_property
    def graph(self) -> Graph:
        """The graph of this net. Raises NetError for a missing bottom, a cycle, a top written twice."""
        return Graph(self)

    def layer(self, name: str) -> Layer:
        """The layer called ``name``. Raises NetError where there is none, or more than one."""
        found = self._named.get(name, [])
        if len(found) != 1:
            raise NetError(
                f"{self.path}: {'no layer is' if not found else f'{len(found)} layers are'} called '{name}'"
            )
        return found[0]

    @property
    def newline(self) -> str:
        """The line ending the file uses."""
        return "\r\n" if "\r\n" in self.layers[0].text else "\n"

    def text(self) -> str:
        """The whole file: an unchanged net gives exactly what was read."""
        return "".join(item if isinstance(item, str) else item.text for item in self.items)

    def write(self, path: Path | str) -> None:
        """Write the prototxt."""
        Path(path).write_bytes(prototxt.encode(self.text()))

    def edited(self, items: Iterable[Layer | str]) -> Net:
        """A net of other pieces under the same header."""
        net = Net(self.path, items, self.header)
        net.strangers = self.strangers
        net.image = self.image
        net.converted = self.converted
        net.schema = self.schema
        return net

    def replace(self, swap: Callable[[Layer], Iterable[Layer]]) -> Net:
        """A net in which every layer is replaced by what ``swap`` gives for it."""
        items: list[Layer | str] = []
        for item in self.items:
            items += [item] if isinstance(item, str) else list(swap(item))
        return self.edited(items)

    # ---- weights ------------------------------------------------------------------------------------------

    def with_weights(self, path: Path | str) -> Net:
        """This net with the weights of a caffemodel, matched by layer name as Caffe does.

        Layers that a file cannot reach (see ``Graph.shadowed``) get none. Raises WeightsError where a blob
        does not fit its layer, or nothing fits at all.
        """
        from .shapes import check_weights

        weights = caffemodel.read(path)
        by_name = weights.by_name()
        names = {layer.name for layer in self.layers}
        shadowed = self.graph.shadowed(weights.storage == "HDF5")
        _check_names(self, weights, path, shadowed)

        def load(layer: Layer) -> list[Layer]:
            loaded = Layer(layer.text, layer.tree, path=layer.path, line=layer.line, offset=layer.offset)
            loaded.record = None if layer in shadowed else by_name.get(layer.name)
            return [loaded]

        net = self.replace(load)
        if not any(layer.blobs for layer in net.layers):
            raise WeightsError(f"{path}: no layer with weights is called as one of {self.path}; wrong pair?")
        net.strangers = [r for r in weights.records if r.name not in names and r.blobs]
        net.converted |= weights.storage in ("V0", "HDF5")
        check_weights(net, path)
        _check_finite(net, path)
        return net

    def with_blobs(self, blobs: Mapping[str, Sequence[Array]]) -> Net:
        """This net with other weights in the layers named."""

        def swap(layer: Layer) -> list[Layer]:
            if layer.name not in blobs:
                return [layer]
            changed = Layer(layer.text, layer.tree, path=layer.path, line=layer.line, offset=layer.offset)
            changed.record = Record(layer.name, layer.type, [Blob(array) for array in blobs[layer.name]])
            return [changed]

        return self.replace(swap)

    def without_weights(self) -> Net:
        """This net as its prototxt alone gives it."""
        net = Net.parse(self.text(), self.path)
        net.image = self.image
        net.schema = self.schema
        return net

    def message(self, layer: Layer) -> ProtoMessage:
        """The layer as a message of the fork's schema, of stock Caffe's where none was given."""
        if self.schema is None:
            return layer.param
        message = self.schema.layer()
        prototxt.to_message(layer.tree, message, layer.path)
        return message

    def write_weights(self, path: Path | str) -> None:
        """Write the weights of every layer, in current storage; unchanged layers keep their bytes.

        A layer that should have weights and has none is left out: Caffe fills what a file does not name, and
        refuses a file that names it without them.
        """
        from .shapes import RULES, WEIGHTS

        records: dict[str, tuple[bytes, Record]] = {}
        for layer in self.layers:
            if layer.record is None and (layer.type in WEIGHTS or layer.type not in RULES):
                continue
            record = layer.record or Record(layer.name, layer.type, [])
            if layer.name not in records or (record.blobs and not records[layer.name][1].blobs):
                records[layer.name] = (self.message(layer).SerializePartialToString(), record)
        caffemodel.write(Path(path), caffe_pb2.NetParameter(name=self.name), records.values())


def _check_names(net: Net, weights: caffemodel.Weights, path: Path | str, shadowed: set[Layer]) -> None:
    """Raise WeightsError where layers of one name cannot have their weights, now or when written again."""
    by_name = weights.by_name()
    names = {layer.name for layer in net.layers}
    for record in weights.records:
        last = by_name[record.name]
        if record.name in names and [b.shape for b in record.blobs] != [b.shape for b in last.blobs]:
            raise WeightsError(
                f"{path}: layer '{record.name}' is in it twice, with other blobs, so that Caffe cannot load "
                "it; give the layers names of their own and train again"
            )
    for layer in net.graph.shadowed() - shadowed:
        if layer.name in by_name and by_name[layer.name].blobs:
            raise WeightsError(
                f"{path}: {layer.where} is not the only one of its name, and Caffe gives it weights of an "
                "HDF5 file, but none of a binary one; give it a name of its own, in both files"
            )


def _check_finite(net: Net, path: Path | str) -> None:
    """Raise WeightsError where weights are no numbers, with every layer that has such."""
    bad = {
        layer.name: sum(int(np.count_nonzero(~np.isfinite(blob.array))) for blob in layer.blobs)
        for layer in net.layers
        if layer.blobs
    }
    if any(bad.values()):
        layers = ", ".join(f"'{name}' ({count})" for name, count in bad.items() if count)
        raise WeightsError(
            f"{path}: weights that are NaN or infinite in {layers}; the training went astray, "
            "take an earlier snapshot"
        )
