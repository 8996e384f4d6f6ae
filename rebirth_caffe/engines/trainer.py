"""The child process that trains: one solver, from a snapshot to an iteration, in Caffe's own Python.

Like worker.py it imports nothing of this package and keeps to Python 3.5's syntax. Standard input holds one
line of JSON:

    solver   path of the solver prototxt
    weights  caffemodel to start from, or null
    state    solverstate to go on from, or null (then weights is ignored)
    skip     batches that the data layers of the training net shall read and drop first
    until    iteration to stop at
    gpu      device number, or null for the CPU

It snapshots at the end. What Caffe has to say goes to stderr, where the parent reads it.
"""

import json
import sys

sys.path[:] = [path for path in sys.path if path != sys.path[0]]  # a caffe.py lies beside this file
import caffe  # noqa: E402

DATA = ("Data", "ImageData", "HDF5Data", "WindowData")


def main() -> None:
    request = json.loads(sys.stdin.readline())
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
