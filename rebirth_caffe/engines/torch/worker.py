"""The child process behind a torch session: ``engines.worker`` with torch as its backend."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ...caffemodel import Array
from ...errors import RebirthError
from ...init.fill import fill_missing
from ...net import Layer, Net
from ...schema import caffe_pb2
from .. import worker
from .net import TorchNet, to_numpy


class TorchBackend(worker.Backend):
    """One net, without gradients."""

    def __init__(self, request: dict[str, Any]) -> None:
        torch.set_num_threads(request["threads"])
        torch.set_grad_enabled(False)
        try:
            self.device = torch.device(request["device"])
            self.resident_before = worker.reset_peak()
            net = Net.load(request["prototxt"], request["weights"])
            fill_missing(net)
            view = net.graph.view(caffe_pb2.Phase.Value(request["phase"]))
            makers = ("Input", "Parameter")
            reading = next((x for x in view.layers if not x.bottom and x.type not in makers), None)
            if reading is not None:
                raise worker.Refusal(f"{reading.where}: reads data; give a deploy net")
            self.net = TorchNet(view, request["batch"]).to(self.device)
        except RebirthError as error:
            raise worker.Refusal(str(error)) from None
        self.inputs = {name: self.net.shapes[name] for name in self.net.inputs}
        self.outputs = list(dict.fromkeys(v.name for v in view.outputs if v.name not in self.inputs))
        self.given: dict[str, Any] = {}
        self.randomise()

    def set_input(self, name: str, array: Any) -> None:
        self.given[name] = torch.from_numpy(array.copy()).to(self.device)

    def run(self) -> None:
        self.net(self.given, self.outputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def values(self, names: Sequence[str] | None) -> list[tuple[str, Array]]:
        names = self.outputs if names is None else names
        for name in names:
            if name not in self.net.shapes:
                raise worker.Refusal(f"no blob named {name}")
        return [(name, to_numpy(value)) for name, value in self.net(self.given, names)[1].items()]

    def blobs(self) -> list[tuple[str, list[int]]]:
        return [(name, list(shape)) for name, shape in self.net.shapes.items()]

    def profile(self) -> list[tuple[str, str, float]]:
        result = []
        before = time.perf_counter()

        def done(layer: Layer, values: Iterable[Any]) -> None:
            nonlocal before
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            result.append((layer.name, layer.type, now - before))
            before = now

        self.net(self.given, self.outputs, done)
        return result

    def blob_bytes(self) -> tuple[int, int]:
        """Of the activations those that are there at the same time."""
        most = 0

        def count(layer: Layer, values: Iterable[Any]) -> None:
            nonlocal most
            memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in values}
            most = max(most, sum(memory.values()))

        self.net(self.given, self.outputs, count)
        return sum(4 * weight.numel() for weight in self.net.weights), most


worker.BACKENDS["torch"] = TorchBackend

if __name__ == "__main__":
    worker.main()
