"""Real Caffe's answers for the tests: a program for pycaffe's Python, driven by conftest.py's ``in_caffe``.

A line of JSON in, ``[code, arguments]``, a line of JSON out, what the code leaves in ``result``. Each request
runs in a fork, because Caffe aborts the whole process on what it refuses: the answer is then what it said.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from typing import Any


def describe(path, phase=1, level=0, stages=(), weights=None, batch=None, forward=False):
    """A net's layers, blob and weight shapes; without the Split layers that Caffe puts in.

    ``bytes`` (after a forward) counts memory once that several blobs share.
    """
    net = caffe.Net(path, phase, level=level, stages=list(stages) or None, weights=weights)
    if batch is not None:
        for name in net.inputs:
            net.blobs[name].reshape(batch, *list(net.blobs[name].shape)[1:])
        net.reshape()
    names = list(net._layer_names)
    kept = [i for i, layer in enumerate(net.layers) if layer.type != "Split"]
    shapes = {name: list(blob.shape) for name, blob in net.blobs.items()}
    answer = {
        "layers": [[names[i], net.layers[i].type] for i in kept],
        "blobs": {n: s for n, s in shapes.items() if not re.search(r"_split_\d+$", n)},
        "params": {names[i]: [list(b.shape) for b in net.layers[i].blobs] for i in kept},
    }
    if forward:
        net.forward()
        pieces = {b.data.__array_interface__["data"][0]: b.data.nbytes for b in net.blobs.values()}
        answer["bytes"] = sum(pieces.values())
    return answer


def answer(code: str, arguments: dict[str, Any]) -> Any:
    """Run ``code`` in a fork; its result, or why there is none."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as out:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 2)
            try:
                scope = {"caffe": caffe, "np": numpy, "describe": describe, **arguments}
                exec(code, scope)
                out.write(json.dumps({"result": scope["result"]}).encode())
            except BaseException as error:
                traceback.print_exc()
                out.write(json.dumps({"refused": repr(error)}).encode())
            out.flush()
            os._exit(0)  # without pycaffe's clean-up, which would wait for its threads
        os.waitpid(child, 0)
        out.seek(0)
        said.seek(0)
        lines = said.read().decode("utf-8", "replace").splitlines()
        fatal = [line for line in lines if re.match(r"F\d{4}", line)] or lines[-1:] or ["it died"]
        return json.loads(out.read() or "null") or {"refused": fatal[0]}


if __name__ == "__main__":
    import caffe
    import numpy

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(*json.loads(line))) + "\n")
        answers.flush()
