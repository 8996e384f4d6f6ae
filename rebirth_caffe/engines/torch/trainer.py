"""Training on torch: the same runs, the same snapshots as under real Caffe, by one process or by many.

Several processes are torchrun's. The first drives (``TorchTrainer.train``), the others follow: they are told
each run and train their share of every batch. As in Caffe on several GPUs each takes a whole batch, so that
N processes learn from batches N times as large.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import platform
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ... import prototxt
from ...data import lmdb_info
from ...errors import EngineError
from ...init.fill import fill_missing
from ...net import TRAIN, Net, State, View
from ...schema import caffe_pb2
from .. import Engine
from ..training import Diverged, Run, snapshot_files
from . import TorchEngine
from .data import Batches
from .net import TorchNet, channels_last
from .solver import Solver, read_state

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PATIENCE = timedelta(days=1)  # the others wait while the first one tests


class TorchTrainer:
    """torch on the CPU or GPUs, in float32 or, where it pays, in bfloat16."""

    def __init__(self, device: str = "cpu", amp: bool = False, workers: int = 0, alone: bool = False) -> None:
        """``device``: cpu or cuda; ``amp``: compute in bfloat16 where that will do; ``workers``: processes
        that read data, 0 for none.

        ``alone``: leave torchrun's other processes out.

        Raises EngineError where there is no such device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError("--device cuda: PyTorch finds no GPU; give --device cpu")
        self.rank, self.size = (
            (0, 1) if alone else (_from_torchrun("RANK", 0), _from_torchrun("WORLD_SIZE", 1))
        )
        self.device = torch.device(device, _from_torchrun("LOCAL_RANK", 0) if device == "cuda" else None)
        if device == "cpu":
            _keep_freed_memory()
        self.amp, self.workers = amp, workers
        self.engine: Engine = TorchEngine(device)

    def train(self, run: Run, progress: Callable[[int, float], None]) -> None:
        """Train and snapshot; ``progress`` hears (iteration, loss). See ``engines.training.Trainer``."""
        if self.size > 1:
            _tell(dataclasses.replace(run, lock=None))
        self._train(run, progress)

    @contextmanager
    def together(self) -> Iterator[bool]:
        """Holds the processes of a run together; gives whether this one is the first, which drives.

        The others have done all their work when it gives False.
        """
        if self.size == 1:
            yield True
            return
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE
        )
        try:
            if self.rank:
                self._follow()
            try:
                yield self.rank == 0
            finally:
                if not self.rank:
                    with suppress(RuntimeError):  # a worker that has died no longer listens
                        _tell(None)
        finally:
            dist.destroy_process_group()

    def _follow(self) -> None:
        while (run := _told()) is not None:
            with suppress(Diverged):  # the first process decides what comes next
                self._train(run, lambda iteration, loss: None)

    def _train(self, run: Run, progress: Callable[[int, float], None]) -> None:
        try:
            self._iterate(run, progress)
        except torch.OutOfMemoryError:
            raise EngineError("the GPU's memory is full; lower the batch_size, or raise iter_size") from None
        except (RuntimeError, IndexError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EngineError(f"{run.home / run.solver}: torch failed: {lines[0][:300]}") from None

    def _iterate(self, run: Run, progress: Callable[[int, float], None]) -> None:
        torch.set_num_threads(run.threads)
        path = run.home / run.solver
        param = caffe_pb2.SolverParameter()
        prototxt.to_message(prototxt.parse(prototxt.read_text(path), path), param, path)
        torch.manual_seed(max(param.random_seed, 0) * self.size + self.rank)
        state = None if run.state is None else read_state(run.home / run.state)
        weights = run.weights if state is None else state.learned_net
        net = Net.load(run.home / param.net, None if weights is None else run.home / weights)
        view = _training_view(net, param)
        layer = next((x for x in view.layers if x.type == "Data"), None)
        if layer is None:
            raise EngineError(f"{net.path}: reads no LMDB in TRAIN, and torch knows no other data")
        net.image = lmdb_info(layer.param.data_param.source)[1:]
        fill_missing(net)
        module = TorchNet(view).to(self.device)
        solver = Solver(param, module.params, str(path))
        if state is not None:
            solver.restore(state, run.home / str(run.state))
        batches = Batches(layer, max(param.random_seed, 0), run.skip, self.rank, self.size).read(
            (run.until - solver.iteration) * param.iter_size, self.workers
        )
        losses: deque[Tensor] = deque(maxlen=param.average_loss)
        while solver.iteration < run.until:
            losses.append(self._gradients(module, layer.top, batches, param.iter_size))
            if param.display and solver.iteration % param.display == 0:
                loss = self._mean(losses)
                if not math.isfinite(loss):
                    raise Diverged(f"the loss became {loss} at iteration {solver.iteration}")
                progress(solver.iteration, loss)
            solver.step()
        if self.rank == 0:
            made = snapshot_files(param.snapshot_prefix, run.until)
            module.write_back()
            net.write_weights(run.home / made.weights)
            (run.home / made.state).write_bytes(solver.state(made.weights).SerializeToString())

    def _gradients(
        self,
        module: TorchNet,
        tops: tuple[str, ...],
        batches: Iterator[tuple[Tensor, Tensor]],
        parts: int,
    ) -> Tensor:
        """Leave the gradients of ``parts`` batches, summed, averaged over processes; their mean loss."""
        total = torch.zeros((), device=self.device)
        for _ in range(parts):
            values = next(batches)
            given = {
                name: channels_last(value.to(self.device, non_blocking=True))
                for name, value in zip(tops, values, strict=False)
            }
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                loss, _ = module(given)
            loss.backward()
            total += loss.detach()
        if self.size > 1:
            self._average([weight.grad for weight in module.weights if weight.grad is not None])
        return total / parts

    def _average(self, gradients: list[Tensor]) -> None:
        """Give every process the mean of all processes' gradients.

        Not by DistributedDataParallel: it holds on to gloo's threads after the group has ended, and one that
        still tidies up when Python ends aborts the process (PyTorch 2.13).
        """
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _mean(self, losses: deque[Tensor]) -> float:
        """The mean of the last losses, of all processes."""
        mean = torch.stack(tuple(losses)).mean()
        if self.size > 1:
            dist.all_reduce(mean)
            mean /= self.size
        return float(mean)


def _keep_freed_memory() -> None:
    """Tell glibc to reuse what an iteration has freed for the next one.

    Left alone it maps every large tensor anew and gives it back, and the kernel clears each page each time:
    a third of GoogLeNet's training time. Other C libraries have no such option.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _from_torchrun(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _training_view(net: Net, param: caffe_pb2.SolverParameter) -> View:
    """What Caffe's solver trains: TRAIN, with the level and stages of net and solver."""
    own, more = net.header.state, param.train_state
    level = more.level if more.HasField("level") else own.level
    return View(net, State(TRAIN, level, frozenset([*own.stage, *more.stage])))


def _tell(run: Run | None) -> None:
    dist.broadcast_object_list([run], src=0, device=torch.device("cpu"))


def _told() -> Run | None:
    box: list[Run | None] = [None]
    try:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    except RuntimeError:
        raise EngineError("the first process has gone; start the run again, it goes on") from None
    return box[0]
