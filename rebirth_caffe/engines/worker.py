"""The child process behind a session: builds one net in a runtime and answers requests about it.

It runs in the runtime's own Python (3.5 or newer, with NumPy and the runtime), so it imports nothing of this
package and keeps to that Python's syntax.

Protocol, the same in both directions: a line of JSON; where it has ``"arrays": [[name, shape], ...]``, those
arrays follow as little-endian float32 bytes. The first request opens the net, each later one calls a method
of the backend. A reply is ``{"result": ...}`` or ``{"error": "..."}``. Caffe prints on stdout and aborts the
process on a failed check: what it said is then in stderr.
"""
# ruff: noqa: B905, UP006, UP032, UP035, UP045, PTH100, PTH120

import json
import os
import re
import resource
import sys
import time
import types
from collections import OrderedDict
from typing import IO, Any, Dict, List, Optional, Sequence, Tuple

import numpy as np


def send(stream: IO[bytes], message: Dict[str, Any], arrays: "Sequence[Tuple[str, Any]]" = ()) -> None:
    """Write one message and its arrays (name, array), which travel as float32."""
    data = [(name, np.asarray(array, "<f4")) for name, array in arrays]
    if data:
        message = dict(message, arrays=[[name, list(np.shape(array))] for name, array in data])
    stream.write(json.dumps(message).encode() + b"\n")
    for _, array in data:
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> "Tuple[Dict[str, Any], Dict[str, Any]]":
    """Read one message and its arrays by name. Raises EOFError where the other side has gone."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message = json.loads(line.decode())
    arrays = OrderedDict()  # type: Dict[str, Any]
    for name, shape in message.pop("arrays", ()):
        size = 4 * int(np.prod(shape, dtype=np.int64))
        data = stream.read(size)
        if len(data) != size:
            raise EOFError
        arrays[name] = np.frombuffer(bytearray(data), "<f4").reshape(shape)
    return message, arrays


class Refusal(Exception):
    """A request that cannot be answered; the message goes to the person as it is."""


class Backend:
    """One open net. ``inputs`` are the blobs the caller fills: name -> shape."""

    inputs = {}  # type: Dict[str, Tuple[int, ...]]  # noqa: RUF012  every backend sets its own
    warm = False  # True once the current outputs have been computed once: nothing is left to allocate
    resident_before = 0  # bytes resident before the net was opened

    def set_input(self, name: str, array: Any) -> None:
        raise NotImplementedError

    def run(self) -> None:
        """Compute the net's outputs from its inputs."""
        raise NotImplementedError

    def values(self, names: Optional[List[str]]) -> "List[Tuple[str, Any]]":
        """Compute the net and give these blobs' values, or its outputs'."""
        raise NotImplementedError

    def blobs(self) -> "List[Tuple[str, List[int]]]":
        raise NotImplementedError

    def profile(self) -> "List[Tuple[str, str, float]]":
        """Compute the net once; (layer, type, seconds) of each layer."""
        raise NotImplementedError

    def blob_bytes(self) -> "Tuple[int, int]":
        """Bytes of the weights and of the activations, after a forward."""
        raise NotImplementedError

    def randomise(self) -> None:
        """Fill the inputs with the same normal noise in every engine.

        A blob of one number per image can only be a label, which has to be a class: zero.
        """
        noise = np.random.RandomState(0)
        for name, shape in self.inputs.items():
            label = int(np.prod(shape)) == shape[0]
            self.set_input(
                name, np.zeros(shape, "f4") if label else noise.standard_normal(shape).astype("f4")
            )

    def forward(self, inputs: Dict[str, Any], names: Optional[List[str]]) -> "List[Tuple[str, Any]]":
        if inputs and set(inputs) != set(self.inputs):
            raise Refusal(
                "the net's inputs are {}, given were {}".format(", ".join(self.inputs), ", ".join(inputs))
            )
        for name, array in inputs.items():
            if array.shape != tuple(self.inputs[name]):
                raise Refusal(
                    "input {} has shape {}, the net takes {}".format(
                        name, array.shape, tuple(self.inputs[name])
                    )
                )
            self.set_input(name, array)
        if not inputs:
            self.randomise()
        return self.values(names)

    def warm_up(self) -> None:
        if not self.warm:
            self.run()
            self.warm = True

    def time_forward(self) -> float:
        self.warm_up()
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    def time_layers(self) -> "List[Tuple[str, str, float]]":
        self.warm_up()
        return self.profile()

    def memory(self) -> Dict[str, int]:
        self.warm_up()
        weights, activations = self.blob_bytes()
        return {
            "weights_bytes": weights,
            "activation_bytes": activations,
            "peak_rss_bytes": resident("VmHWM") - self.resident_before,
        }


class CaffeBackend(Backend):
    """pycaffe on the CPU."""

    def __init__(self, request: Dict[str, Any]) -> None:
        with open(request["prototxt"], "rb") as file:
            caffe = import_caffe(python_layers=b"Python" in file.read())
        caffe.set_mode_cpu()
        caffe.set_random_seed(0)  # layers without weights draw the same ones each time
        self.resident_before = reset_peak()
        self.net = caffe.Net(request["prototxt"], getattr(caffe, request["phase"]))
        if request["weights"]:
            self.net.copy_from(request["weights"])
        batch = request["batch"]
        if batch is not None:
            if not self.net.inputs:
                raise Refusal("no Input layer to set the batch of; its data layers decide it")
            for name in self.net.inputs:
                self.net.blobs[name].reshape(batch, *list(self.net.blobs[name].shape)[1:])
            self.net.reshape()
        self.inputs = OrderedDict((name, tuple(self.net.blobs[name].shape)) for name in self.net.inputs)
        self.last = len(self.net.layers) - 1
        self.randomise()

    def set_input(self, name: str, array: Any) -> None:
        self.net.blobs[name].data[...] = array

    def run(self) -> None:
        self.net._forward(0, self.last)

    def values(self, names: Optional[List[str]]) -> "List[Tuple[str, Any]]":
        names = list(self.net.outputs) if names is None else names
        for name in names:
            if name not in self.net.blobs:
                raise Refusal("no blob named {}".format(name))
        self.run()
        return [(name, self.net.blobs[name].data) for name in names]

    def blobs(self) -> "List[Tuple[str, List[int]]]":
        # Where a blob has several readers, Caffe inserts a Split layer whose tops nobody wrote down.
        hidden = set()
        for name, layer in zip(self.net._layer_names, self.net.layers):
            tops = self.net.top_names[name]
            if layer.type == "Split" and tops == ["{}_{}".format(name, i) for i in range(len(tops))]:
                hidden.update(tops)
        return [(name, list(blob.shape)) for name, blob in self.net.blobs.items() if name not in hidden]

    def profile(self) -> "List[Tuple[str, str, float]]":
        result = []
        for i, (name, layer) in enumerate(zip(self.net._layer_names, self.net.layers)):
            start = time.perf_counter()
            self.net._forward(i, i)
            result.append((name, layer.type, time.perf_counter() - start))
        return result

    def blob_bytes(self) -> "Tuple[int, int]":
        # Blobs that share their memory (Split, Reshape, shared weights) count once.
        weights = {blob.data.ctypes.data: blob.count for layer in self.net.layers for blob in layer.blobs}
        values = {}  # type: Dict[int, int]
        for blob in self.net.blobs.values():
            address = blob.data.ctypes.data
            values[address] = max(blob.count, values.get(address, 0))
        return 4 * sum(weights.values()), 4 * sum(values.values())


class OpenCVBackend(Backend):
    """cv2.dnn on the CPU.

    It keeps neither the inputs' names nor the blobs', so the request brings ``inputs`` (name, shape),
    ``values`` (blob, the layer that wrote it last, which of its tops) and ``outputs`` (names).
    """

    def __init__(self, request: Dict[str, Any]) -> None:
        import cv2

        self.cv2 = cv2
        cv2.setNumThreads(request["threads"])
        self.resident_before = reset_peak()
        self.net = cv2.dnn.readNetFromCaffe(request["prototxt"], request["weights"])
        self.inputs = OrderedDict((name, tuple(shape)) for name, shape in request["inputs"])
        self.writers = OrderedDict((blob, (layer, top)) for blob, layer, top in request["values"])
        self.outputs = request["outputs"]
        self.given = {}  # type: Dict[str, Any]
        # OpenCV makes its layers when they are first wanted; here it can still be said which one it refuses.
        self.layers = []  # type: List[Tuple[str, str, int]]
        for name in self.net.getLayerNames():
            number = self.net.getLayerId(name)
            try:
                self.layers.append((name, self.net.getLayer(number).type, number))
            except cv2.error as error:
                raise Refusal("layer '{}': {}".format(name, reason(error))) from None
        self.randomise()

    def set_input(self, name: str, array: Any) -> None:
        self.given[name] = array
        self.net.setInput(array, name)

    def fetch(self, names: List[str]) -> "Dict[str, Any]":
        first = [name for name in names if self.writers[name][1] == 0]
        layers = list(OrderedDict.fromkeys(self.writers[name][0] for name in first))
        found = dict(zip(layers, self.net.forwardAndRetrieve(layers))) if layers else {}
        values = {name: found[self.writers[name][0]][0] for name in first}
        # A layer's further tops are overwritten by what is computed after it, so nothing must be.
        for name in set(names) - set(first):
            layer, top = self.writers[name]
            values[name] = self.net.forwardAndRetrieve([layer])[0][top]
        return values

    def run(self) -> None:
        self.fetch(self.outputs)

    def values(self, names: Optional[List[str]]) -> "List[Tuple[str, Any]]":
        names = self.outputs if names is None else names
        for name in names:
            if name not in self.writers and name not in self.given:
                raise Refusal("no blob named {}".format(name))
        self.warm = False  # the net is fused anew for every set of outputs
        found = self.fetch([name for name in names if name in self.writers])
        return [(name, found.get(name, self.given.get(name))) for name in names]

    def blobs(self) -> "List[Tuple[str, List[int]]]":
        shapes = [list(shape) for shape in self.inputs.values()]
        ids, _, tops = self.net.getLayersShapes(shapes)
        by_id = dict(zip(np.ravel(ids).tolist(), tops))
        result = [(name, list(shape)) for name, shape in self.inputs.items()]
        for blob, (layer, top) in self.writers.items():
            result.append((blob, [int(dim) for dim in by_id[self.net.getLayerId(layer)][top]]))
        return result

    def profile(self) -> "List[Tuple[str, str, float]]":
        self.run()
        ticks = np.ravel(self.net.getPerfProfile()[1]).tolist()
        frequency = self.cv2.getTickFrequency()
        return [(name, kind, tick / frequency) for (name, kind, _), tick in zip(self.layers, ticks)]

    def blob_bytes(self) -> "Tuple[int, int]":
        # Layer 0 is the inputs. (The form for the whole net takes only one input.)
        shapes = [list(shape) for shape in self.inputs.values()]
        ids = [0] + [number for _, _, number in self.layers]
        pairs = [self.net.getMemoryConsumption(number, shapes) for number in ids]
        return sum(int(weights) for weights, _ in pairs), sum(int(blobs) for _, blobs in pairs)


BACKENDS = {"caffe": CaffeBackend, "opencv": OpenCVBackend}  # type: Dict[str, Any]


def import_caffe(python_layers: bool = False) -> Any:
    """Import pycaffe, without caffe.io unless the net's Python layers may want it: it alone takes a second
    (it loads SciPy and scikit-image) and is where an otherwise sound Caffe often fails to import."""
    if not python_layers:
        sys.modules.setdefault("caffe.io", types.ModuleType("caffe.io"))
    import caffe

    if not hasattr(caffe, "Net"):
        raise ImportError(
            "{} has no Net: not Caffe's module (PyPI's caffe is an empty placeholder)".format(
                getattr(caffe, "__file__", None) or "its caffe module"
            )
        )
    return caffe


def resident(field: str) -> int:
    """Bytes resident in memory: now (VmRSS) or at most so far (VmHWM); 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(field + r":\s*(\d+) kB", file.read())
    except OSError:
        return 0
    return 1024 * int(found.group(1)) if found else 0


def reset_peak() -> int:
    """Make VmHWM start again from here; gives the bytes resident now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # some containers forbid it: the peak then includes what importing the runtime took for a moment
    return resident("VmRSS")


def reason(error: BaseException) -> str:
    """One line of an exception: OpenCV's without where in its sources, a plain one with its type."""
    text = " ".join(str(getattr(error, "err", "") or error).split())
    if isinstance(error, Refusal) or hasattr(error, "err"):
        return text
    return "{}: {}".format(type(error).__name__, text)


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Open the net of the first request, then answer until the other side closes the pipe."""
    backend = None  # type: Any
    while True:
        try:
            request, arrays = receive(requests)
        except EOFError:
            return
        try:
            result = None
            values = []  # type: List[Tuple[str, Any]]
            if request["do"] == "open":
                backend = BACKENDS[request["backend"]](request)
            elif request["do"] == "forward":
                values = backend.forward(arrays, request["outputs"])
            else:
                result = getattr(backend, request["do"])()
            send(replies, {"result": result}, values)
        except Exception as error:
            send(replies, {"error": reason(error)})


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]  # its caffe.py is not Caffe
    if sys.argv[1:] == ["--probe"]:
        print(getattr(import_caffe(), "__version__", "of unknown version"))
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a failed check of Caffe's aborts the process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a runtime prints must not end up between the replies
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
