"""OpenCV's dnn module: runs deploy nets from pip alone."""

from __future__ import annotations

import os
import sys
from importlib import metadata, util
from pathlib import Path

from ..errors import EngineError
from ..net import TEST, Net
from ..shapes import infer
from . import Session
from .child import ChildSession, check_files, thread_variables, worker_command

_PACKAGES = [
    f"opencv-{contrib}python{headless}" for contrib in ("", "contrib-") for headless in ("-headless", "")
]

_INSTALL = "pip install 'opencv-python-headless<5'"


class OpenCVEngine:
    """cv2.dnn on the CPU. It runs deploy nets only, and only with weights."""

    name = "opencv"

    def __init__(self) -> None:
        """Raises EngineError where there is no OpenCV that reads Caffe's files."""
        if util.find_spec("cv2") is None:
            raise EngineError(f"OpenCV is not installed; run: {_INSTALL}")
        self.version = _version()
        if self.version.split(".")[0].isdigit() and int(self.version.split(".")[0]) >= 5:
            raise EngineError(f"OpenCV {self.version} no longer reads Caffe's files; run: {_INSTALL}")

    def open(
        self,
        prototxt: Path,
        weights: Path | None,
        *,
        threads: int = 1,
        batch: int | None = None,
        phase: str = "TEST",
    ) -> Session:
        """Build a net; see ``engines.Engine``. Raises EngineError without weights, for layers that make
        data and for nets whose layers depend on the phase."""
        check_files(prototxt, weights)
        if weights is None:
            raise EngineError(f"{prototxt}: OpenCV needs the net's weights; give a caffemodel")
        net = Net.load(prototxt)
        view = net.graph.view(TEST)
        if phase != "TEST" or view.layers != net.layers:
            raise EngineError(f"{prototxt}: OpenCV knows no phases; give a deploy net")
        shapes = infer(view, batch)
        inputs, writers = [], {}
        for value in view.values:
            producer = value.producer
            if producer is None or producer.type == "Input":
                inputs.append((value.name, shapes[value]))
            elif not producer.bottom:
                raise EngineError(f"{producer.where}: OpenCV has no {producer.type} layer; give a deploy net")
            else:
                writers[value.name] = (producer.name, value.index)
        request = {
            "backend": "opencv",
            "prototxt": str(prototxt),
            "weights": str(weights),
            "threads": threads,
            "inputs": inputs,
            "values": [(blob, layer, top) for blob, (layer, top) in writers.items()],
            "outputs": list(dict.fromkeys(v.name for v in view.outputs if v.name in writers)),
        }
        environment = {**os.environ, **thread_variables(threads)}
        return ChildSession("OpenCV", worker_command(sys.executable), environment, request)


def _version() -> str:
    """The version of the installed OpenCV, without importing it where pip knows."""
    for package in _PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    import cv2

    return str(cv2.__version__)
