"""The child process that trains: one solver, from a snapshot to an iteration, in Caffe's own Python.

Like worker.py it imports nothing of this package and keeps to Python 3.5's syntax. Standard input holds one
line of JSON:

    solver   path of the solver prototxt
    weights  caffemodel to start from, or null
    state    solverstate to go on from, or null (then weights is ignored)
    skip     batches that the data layers of the training net shall read and drop first
    until    iteration to stop at
    gpu      device number, or null for the CPU
    io       whether anything may want caffe.io, which takes most of the time of importing caffe

It snapshots at the end. What Caffe has to say goes to stderr, where the parent reads it.
"""
# ruff: noqa: PTH100, PTH120

import json
import os
import resource
import sys
import types

DATA = ("Data", "ImageData", "HDF5Data", "WindowData")


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]  # its caffe.py is not Caffe
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a failed check of Caffe's aborts the process
    request = json.loads(sys.stdin.readline())
    if not request["io"]:
        sys.modules["caffe.io"] = types.ModuleType("caffe.io")
    import caffe

    if request["gpu"] is None:
        caffe.set_mode_cpu()
    else:
        caffe.set_device(request["gpu"])
        caffe.set_mode_gpu()
    solver = caffe.get_solver(str(request["solver"]))
    if request["state"] is not None:
        solver.restore(str(request["state"]))
    elif request["weights"] is not None:
        solver.net.copy_from(str(request["weights"]))
    sources = [i for i, layer in enumerate(solver.net.layers) if layer.type in DATA]
    for _ in range(request["skip"]):
        for i in sources:
            solver.net._forward(i, i)
    solver.step(request["until"] - solver.iter)
    solver.snapshot()


main()
