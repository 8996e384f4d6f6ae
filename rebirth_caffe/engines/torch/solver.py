"""Caffe's solvers: the learning rate of an iteration, what a gradient does to a weight, their state on disk.

h and v are what is remembered of a weight w, g its gradient, r the rate times lr_mult:

    SGD       h <- momentum h + r g                w -= h
    Nesterov  as SGD                               w -= (1 + momentum) h - momentum (h before)
    AdaGrad   h += g^2                             w -= r g / (sqrt h + delta)
    RMSProp   h <- rms_decay h + (1-rms_decay)g^2  w -= r g / (sqrt h + delta)
    AdaDelta  h <- momentum h + (1-momentum) g^2   u = g sqrt((v + delta) / (h + delta)),  w -= r u
              v <- momentum v + (1-momentum) u^2
    Adam      h <- momentum h + (1-momentum) g     w -= r c h / (sqrt v + delta),
              v <- momentum2 v + (1-momentum2) g^2 c = sqrt(1-momentum2^t) / (1-momentum^t), t from 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from ...caffemodel import Blob
from ...errors import EngineError
from ...schema import caffe_pb2
from .net import Parameter, to_numpy

Param = caffe_pb2.SolverParameter
TYPES = {"SGD": 1, "Nesterov": 1, "AdaGrad": 1, "RMSProp": 1, "AdaDelta": 2, "Adam": 2}  # histories
_LEGACY = {"SGD": "SGD", "NESTEROV": "Nesterov", "ADAGRAD": "AdaGrad", "RMSPROP": "RMSProp",
           "ADADELTA": "AdaDelta", "ADAM": "Adam"}  # fmt: skip
POLICIES = ("exp", "fixed", "inv", "multistep", "poly", "sigmoid", "step")


def learning_rate(p: Param, iteration: int) -> float:
    """The rate before each weight's lr_mult."""
    policy = p.lr_policy
    if policy == "fixed":
        factor = 1.0
    elif policy in ("step", "multistep"):
        factor = p.gamma ** steps_taken(p, iteration)
    elif policy == "exp":
        factor = p.gamma**iteration
    elif policy == "inv":
        factor = (1 + p.gamma * iteration) ** -p.power
    elif policy == "poly":
        factor = (1 - iteration / p.max_iter) ** p.power
    else:
        factor = 1 / (1 + math.exp(-p.gamma * (iteration - p.stepsize)))
    return float(p.base_lr * factor)


def steps_taken(p: Param, iteration: int) -> int:
    """How often step or multistep has lowered the rate."""
    if p.lr_policy == "step":
        return iteration // p.stepsize
    return sum(iteration >= value for value in p.stepvalue) if p.lr_policy == "multistep" else 0


class Solver:
    """Learns the parameters of a net, in place, from their gradients."""

    def __init__(self, param: Param, params: Sequence[Parameter], path: str = "<solver>") -> None:
        """Raises EngineError for a policy, type or regularisation that is not known."""
        self.param, self.params = param, params
        self.type = param.type
        if param.HasField("solver_type"):
            self.type = _LEGACY[Param.SolverType.Name(param.solver_type)]
        if self.type not in TYPES:
            raise EngineError(f"{path}: no solver is called '{self.type}'; give one of {', '.join(TYPES)}")
        if param.lr_policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise EngineError(f"{path}: no lr_policy is called '{param.lr_policy}'; give one of {known}")
        if param.lr_policy in ("step", "sigmoid") and param.stepsize < 1:
            raise EngineError(f"{path}: lr_policy '{param.lr_policy}' needs a stepsize of 1 or more")
        if param.regularization_type not in ("L1", "L2"):
            raise EngineError(f"{path}: regularization_type '{param.regularization_type}'; give L1 or L2")
        self.iteration = 0
        self.histories = [[_nothing_yet(p) for p in params] for _ in range(TYPES[self.type])]

    def step(self) -> None:
        """One iteration: the gradients there are, summed over iter_size batches, move the weights."""
        with torch.no_grad():
            p = self.param
            rate = learning_rate(p, self.iteration)
            share = self._clipped() / p.iter_size
            for i, parameter in enumerate(self.params):
                if parameter.lr_mult == 0:
                    continue
                w = parameter.tensor
                g = torch.zeros_like(w) if w.grad is None else w.grad
                if share != 1:
                    g.mul_(share)
                decay = p.weight_decay * parameter.decay_mult
                if decay:
                    g.add_(w if p.regularization_type == "L2" else w.sign(), alpha=decay)
                self._update(w, g, rate * parameter.lr_mult, [history[i] for history in self.histories])
                w.grad = None
            self.iteration += 1

    def _clipped(self) -> float:
        """The factor that brings the length of all gradients down to clip_gradients."""
        most = self.param.clip_gradients
        if most < 0:
            return 1.0
        norms = [p.tensor.grad.norm() for p in self.params if p.tensor.grad is not None]
        length = float(torch.stack(norms).norm()) if norms else 0.0
        return most / length if length > most else 1.0

    def _update(self, w: Tensor, g: Tensor, rate: float, history: Sequence[Tensor]) -> None:
        p, h = self.param, history[0]
        m, delta = p.momentum, p.delta
        if self.type == "SGD":
            w.sub_(h.mul_(m).add_(g, alpha=rate))
        elif self.type == "Nesterov":
            w.add_(h, alpha=m)
            w.sub_(h.mul_(m).add_(g, alpha=rate), alpha=1 + m)
        elif self.type == "AdaGrad":
            h.addcmul_(g, g)
            w.addcdiv_(g, h.sqrt().add_(delta), value=-rate)
        elif self.type == "RMSProp":
            h.mul_(p.rms_decay).addcmul_(g, g, value=1 - p.rms_decay)
            w.addcdiv_(g, h.sqrt().add_(delta), value=-rate)
        elif self.type == "AdaDelta":
            v = history[1]
            h.mul_(m).addcmul_(g, g, value=1 - m)
            u = g * ((v + delta) / (h + delta)).sqrt_()
            v.mul_(m).addcmul_(u, u, value=1 - m)
            w.sub_(u, alpha=rate)
        else:
            v, t = history[1], self.iteration + 1
            h.mul_(m).add_(g, alpha=1 - m)
            v.mul_(p.momentum2).addcmul_(g, g, value=1 - p.momentum2)
            correction = math.sqrt(1 - p.momentum2**t) / (1 - m**t)
            w.addcdiv_(h, v.sqrt().add_(delta), value=-rate * correction)

    # ---- state on disk: Caffe's own, either engine goes on from the other's --------------------------------

    def state(self, learned_net: str) -> caffe_pb2.SolverState:
        """What to go on from, beside the weights in ``learned_net``."""
        taken = steps_taken(self.param, self.iteration - 1)
        state = caffe_pb2.SolverState(iter=self.iteration, learned_net=learned_net, current_step=taken)
        for history in self.histories:
            for tensor in history:
                state.history.add().ParseFromString(b"".join(Blob(to_numpy(tensor)).wire()))
        return state

    def restore(self, state: caffe_pb2.SolverState, path: Path) -> None:
        """Go on from a state. Raises EngineError where it is of another net or kind of solver."""
        tensors = [tensor for history in self.histories for tensor in history]
        frozen = [p.lr_mult == 0 for p in self.params] * len(self.histories)
        blobs = [Blob(raw=memoryview(b.SerializeToString()), where=str(path)) for b in state.history]
        if [b.array.size for b in blobs] != [t.numel() for t in tensors]:
            raise EngineError(f"{path}: the state of another net, or of another type of solver")
        for tensor, blob, still in zip(tensors, blobs, frozen, strict=True):
            if not still:
                tensor.copy_(torch.from_numpy(blob.reshaped(tuple(tensor.shape)).copy()))
        self.iteration = state.iter


def _nothing_yet(p: Parameter) -> Tensor:
    """The history of a weight that has not moved; of one that never will it takes no memory."""
    return torch.zeros_like(p.tensor) if p.lr_mult else p.tensor.new_zeros(()).expand(p.tensor.shape)


def read_state(path: Path) -> caffe_pb2.SolverState:
    """A .solverstate file. Raises EngineError where it is none."""
    try:
        return caffe_pb2.SolverState.FromString(path.read_bytes())
    except DecodeError:
        raise EngineError(f"{path}: not a solver's state, or damaged") from None
