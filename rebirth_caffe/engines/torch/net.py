"""A net of ours as a torch module: the layers of one view over the weights it was loaded with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...caffemodel import Blob, Record
from ...errors import EngineError
from ...net import TRAIN, Layer, Value, View
from ...shapes import LOSSES, Shape, infer, param_shapes
from .layers import Compute, compute_of, whole

Watch = Callable[[Layer, Iterable[Tensor]], None]

INPUTS = ("Data", "Input")
# Layers whose backward needs their bottoms only: what comes out of them may be overwritten.
_OVERWRITABLE = ("Convolution", "Deconvolution", "InnerProduct", "BatchNorm")


@dataclass(frozen=True)
class Parameter:
    """A blob that may learn: its tensor and Caffe's multipliers. ``lr_mult`` 0 is a frozen one."""

    tensor: Tensor
    lr_mult: float
    decay_mult: float


@dataclass
class _Step:
    """One layer at work: where its bottoms and tops lie among the values, and what can be forgotten after."""

    layer: Layer
    compute: Compute
    blobs: list[Tensor]
    bottoms: list[int]
    tops: list[int]
    detached: list[bool]  # bottoms that ``propagate_down: false`` cuts off
    loss_weights: list[float]
    last_read: list[int]


class TorchNet(nn.Module):
    """The layers of a view. Called with the values of its inputs it gives the loss and values by name.

    The loss is the sum of every top times its loss_weight. A value is kept until its last reader has read
    it, or to the end where it is asked for.
    """

    def __init__(self, view: View, batch: int | None = None) -> None:
        """``batch`` replaces the first axis of the inputs.

        Raises EngineError for a layer that is not known, or has no weights, and where shapes are missing.
        """
        super().__init__()
        self.view = view
        values = list(view.values)
        self._index = {value: i for i, value in enumerate(values)}
        shapes = infer(view, batch)
        self.shapes: dict[str, Shape] = {v.name: shape for v in values if (shape := shapes[v]) is not None}
        self.inputs = [v.name for v in values if v.producer is None or v.producer.type in INPUTS]
        self._at_start = [self._index[v] for v in values if v.producer is None or v.producer.type in INPUTS]
        self._last = {v.name: self._index[v] for v in values}  # a blob written in place has its last value
        self.weights = nn.ParameterList()
        self.params: list[Parameter] = []
        self.owned: list[tuple[Layer, list[Tensor]]] = []
        self._shared: dict[str, Tensor] = {}
        learning = _feeding_a_loss(view)
        last_reader = {self._index[v]: v.readers[-1][0] for v in values if v.readers}
        self._steps: list[_Step] = []
        for layer in view.layers:
            if layer.type in INPUTS:
                continue
            bottoms = [self._known(shapes[v], v) for v in view.bottoms[layer]]
            compute = compute_of(layer, bottoms, view.state.phase == TRAIN)
            if self._may_overwrite(layer):
                compute = _relu_in_place
            down = [] if view.net.header.force_backward else list(layer.param.propagate_down)  # as in Caffe
            self._steps.append(
                _Step(
                    layer,
                    compute,
                    self._blobs(layer, bottoms, layer in learning),
                    [self._index[v] for v in view.bottoms[layer]],
                    [self._index[v] for v in view.tops[layer]],
                    [not flag for flag in down] or [False] * len(bottoms),
                    loss_weights(layer),
                    [i for i in {self._index[v] for v in view.bottoms[layer]} if last_reader[i] is layer],
                )
            )

    def _known(self, shape: Shape | None, value: Value) -> Shape:
        if shape is None:
            where = value.producer.where if value.producer else self.view.net.path
            raise EngineError(f"{where}: the size of its top '{value.name}' is not in the file; see --image")
        return shape

    def _may_overwrite(self, layer: Layer) -> bool:
        """Whether a layer is a plain ReLU in place on what nobody else needs."""
        if layer.type != "ReLU" or layer.param.relu_param.negative_slope or layer.top != layer.bottom:
            return False
        producer = self.view.bottoms[layer][0].producer
        return producer is not None and producer.type in _OVERWRITABLE

    def _blobs(self, layer: Layer, bottoms: list[Shape], learning: bool) -> list[Tensor]:
        """A layer's weights as tensors; those it shares with a layer above are that layer's."""
        shapes = param_shapes(layer, list(bottoms)) or []
        if len(layer.blobs) != len(shapes):
            raise EngineError(f"{layer.where}: has {len(layer.blobs)} blobs of weights, needs {len(shapes)}")
        tensors = []
        for i, (blob, shape) in enumerate(zip(layer.blobs, shapes, strict=True)):
            spec = layer.spec(i)
            if spec.name in self._shared:
                tensors.append(self._shared[spec.name])
                continue
            values = torch.from_numpy(blob.reshaped(shape).copy())
            if values.dim() == 4:  # with the strides that its gradient will have, also for a 1x1 kernel
                values = torch.empty(shape, memory_format=torch.channels_last).copy_(values)
            lr_mult = 0.0 if layer.type == "BatchNorm" else spec.lr_mult
            tensor = nn.Parameter(values, requires_grad=learning and lr_mult != 0)
            self.weights.append(tensor)
            self.params.append(Parameter(tensor, lr_mult, spec.decay_mult))
            if spec.name:
                self._shared[spec.name] = tensor
            tensors.append(tensor)
        self.owned.append((layer, tensors))
        return tensors

    def forward(
        self, inputs: Mapping[str, Tensor], outputs: Collection[str] = (), watch: Watch | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the values (float32) of the blobs named by ``outputs``.

        ``watch`` hears of each layer that has been computed, and what values there are then.
        """
        kept = {self._last[name] for name in outputs}
        values: dict[int, Tensor] = {
            i: channels_last(inputs[name]) for i, name in zip(self._at_start, self.inputs, strict=True)
        }
        losses = []
        for step in self._steps:
            bottoms = [
                values[i].detach() if cut else values[i]
                for i, cut in zip(step.bottoms, step.detached, strict=True)
            ]
            tops = step.compute(step.blobs, bottoms)
            del bottoms
            values.update(zip(step.tops, tops, strict=True))
            if watch is not None:
                watch(step.layer, values.values())
            for i in step.last_read:
                if i not in kept:
                    del values[i]
            losses += [
                weight * (top if top.dim() == 0 else whole(top).sum())
                for weight, top in zip(step.loss_weights, tops, strict=True)
                if weight
            ]
        loss = sum(losses[1:], losses[0]) if losses else torch.zeros(())
        return loss, {name: whole(values[self._last[name]]) for name in outputs}

    def write_back(self) -> None:
        """Give the layers of the view the weights as they are now."""
        for layer, tensors in self.owned:
            if tensors:
                layer.record = Record(layer.name, layer.type, [Blob(to_numpy(t)) for t in tensors])


def loss_weights(layer: Layer) -> list[float]:
    """What each top counts in the loss: as the layer says, 1 for a loss layer's first, 0 for all else."""
    given = list(layer.param.loss_weight) or [1.0 if layer.type in LOSSES else 0.0]
    return [*given, *[0.0] * len(layer.top)][: len(layer.top)]


def channels_last(x: Tensor) -> Tensor:
    """Images in the order convolutions are fastest in; everything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def to_numpy(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A copy of the values, in the order of Caffe's files."""
    return np.array(tensor.detach().cpu().numpy(), np.float32, order="C")


def _relu_in_place(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
    return [bottoms[0].relu_()]


def _feeding_a_loss(view: View) -> set[Layer]:
    """The layers a gradient reaches: others do not learn, as in Caffe."""
    wanted: set[Value] = set()
    found = set()
    for layer in reversed(view.layers):
        if any(loss_weights(layer)) or any(value in wanted for value in view.tops[layer]):
            found.add(layer)
            down = list(layer.param.propagate_down) or [True] * len(layer.bottom)
            wanted.update(v for v, flag in zip(view.bottoms[layer], down, strict=True) if flag)
    return found
