"""Originals of our own: a training directory for a net that has no weights yet."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from . import plan as plans
from . import prototxt, stages
from .calibration import Start
from .errors import RebirthError
from .init.fill import fill_missing
from .net import TEST, TRAIN, Net
from .plan import Plan
from .schema import caffe_pb2
from .solver import TrainData, data_layer


def begin(
    folder: Path,
    out: Path,
    train_data: str | None = None,
    test_data: str | None = None,
    iterations: int | None = None,
    seed: int = 1,
    weights: Path | None = None,
    solver: Path | None = None,
) -> int:
    """Make the directory ``out`` in which ``retrain`` trains the net of ``folder``.

    It starts from ``weights`` or from the fillers, and follows ``solver`` or the folder's own. A directory
    that is there is left as it is: its run goes on. Returns the iterations to train. Raises RebirthError
    where the net reads no database, or one that is not there.
    """
    solver = solver or folder / "solver.prototxt"
    param = caffe_pb2.SolverParameter()
    prototxt.to_message(prototxt.parse(prototxt.read_text(solver), solver), param, solver)
    total = iterations or param.max_iter
    if out.exists():
        if not (out / "original").is_dir():
            raise RebirthError(f"{out}: exists and is no training directory; give another --out")
        return total
    net = Net.load(folder / "train_val.prototxt", weights)
    sources = [data_layer(net, phase) for phase in (TRAIN, TEST)]
    if sources[0] is None or sources[1] is None:
        raise RebirthError(f"{net.path}: has no Data layers; training from nothing needs them")
    train, test = (layer.param.data_param.source for layer in sources if layer is not None)
    training = stages.Training(TrainData(train_data or train, test_data or test), solver, total)
    net = stages.prepare(net, training)
    fill_missing(net, seed)
    plan = Plan(net.name, ())
    work = Path(tempfile.mkdtemp(prefix=".original.", dir=out.resolve().parent))
    try:
        stages.write(work, net, plan, training, Start("xavier", seed))
        (work / "plan.yaml").write_text(plans.dump(plan), "utf-8")
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return total
