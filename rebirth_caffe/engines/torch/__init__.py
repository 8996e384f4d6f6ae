"""PyTorch: an optional engine that computes and trains Caffe's nets on CPUs and GPUs.

Nothing here is imported before it is wanted, and ``import torch`` itself takes seconds.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata, util
from pathlib import Path

from ...errors import EngineError
from .. import Session
from ..child import ChildSession, check_files, thread_variables

DEVICES = ("cpu", "cuda")
INSTALL = "pip install -r requirements-torch.txt"
_ROOT = Path(__file__).resolve().parents[3]


class TorchEngine:
    """torch, in float32. Layers without weights get them from their fillers."""

    name = "torch"

    def __init__(self, device: str = "cpu") -> None:
        """Raises EngineError where torch is not installed."""
        if util.find_spec("torch") is None:
            raise EngineError(f"PyTorch is not installed; run: {INSTALL}")
        self.version = metadata.version("torch")
        self.device = device

    def open(
        self,
        prototxt: Path,
        weights: Path | None,
        *,
        threads: int = 1,
        batch: int | None = None,
        phase: str = "TEST",
    ) -> Session:
        """Build a net; see ``engines.Engine``. Raises EngineError for a layer that torch has not, and for
        layers that read data."""
        check_files(prototxt, weights)
        request = {
            "backend": "torch",
            "prototxt": str(prototxt),
            "weights": None if weights is None else str(weights),
            "batch": batch,
            "phase": phase,
            "threads": threads,
            "device": self.device,
        }
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **thread_variables(threads), "PYTHONPATH": path}
        command = [sys.executable, "-m", "rebirth_caffe.engines.torch.worker"]
        return ChildSession("torch", command, environment, request)
