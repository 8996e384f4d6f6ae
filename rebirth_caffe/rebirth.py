"""The whole job in one call: read, propose, apply, derive, report, write.

>>> from rebirth_caffe.rebirth import rebirth
>>> result = rebirth("deploy.prototxt", weights="net.caffemodel")
>>> result.write("net_rebirth")
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plan as plans
from .calibration import Calibration, Fitted, Start, Tell, transform_of
from .cost import Cost, cost
from .derive import deploy, is_trainable
from .errors import NetError, RebirthError
from .init import METHODS
from .merge import Merge, Refusal
from .net import TRAIN, Net
from .plan import Plan, Proposal
from .rules import KERNELS
from .solver import data_layer
from .stages import FOLDERS, SENSITIVITY, Training, prepare
from .stages import write as write_stages
from .transform import Transform

if TYPE_CHECKING:
    from .sensitivity import Sensitivity
    from .verify import Verified

FILES = ("deploy.prototxt", "train_val.prototxt", "weights.caffemodel", "plan.yaml", "report.json")


@dataclass
class Result:
    """A reborn net and how it came about."""

    original: Net
    net: Net  # of the kind that was given: deploy or train_val
    deployed: Net | None  # None where ``no_deploy`` says why none can be derived from the train_val
    plan: Plan
    refused: list[Refusal]
    before: Cost  # of the deploy nets (of the nets given, where there are none), for one image
    after: Cost
    no_deploy: str = ""
    sources: tuple[Path, ...] = ()  # the files it was read from
    training: Training | None = None
    start: Start = field(default_factory=Start)
    exact: bool = False  # nothing but exact merges was asked for: to be verified before it is written
    caffe: str | None = None  # where the Caffe to verify it in is
    verified: Verified | None = None
    fitted: list[Fitted] = field(default_factory=list)  # where the layers started from images
    errors: dict[str, float] = field(default_factory=dict)  # then, of what merges give, by id
    images: Calibration | None = None  # those, or what the sensitivity was measured with
    sensitivity: list[Sensitivity] = field(default_factory=list)  # where it was asked for

    @property
    def deploy(self) -> Net:
        """The reborn deploy net. Raises NetError where none can be derived from the train_val given."""
        if self.deployed is None:
            raise NetError(self.no_deploy)
        return self.deployed

    @property
    def merges(self) -> list[Merge]:
        """The merges that were applied."""
        return self.plan.active

    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "before": _cost(self.before),
            "after": _cost(self.after),
            "merges": [
                {
                    "id": m.id,
                    "kind": m.kind,
                    "exact": m.exact,
                    "absorbs": list(m.absorbs),
                    "becomes": [spec.name for spec in m.becomes if not spec.kept],
                    "stage": m.stage or None,
                    **({"error": self.errors[m.id]} if m.id in self.errors else {}),
                }
                for m in self.merges
            ],
            "refused": [{"layers": list(r.layers), "reason": r.reason} for r in self.refused],
            **({"fitted": [asdict(fitted) for fitted in self.fitted]} if self.fitted else {}),
            **({"sensitivity": [asdict(one) for one in self.sensitivity]} if self.sensitivity else {}),
            **({} if self.verified is None else {"verified": asdict(self.verified)}),
        }

    @cached_property
    def fork_weights(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Weights that layers keep in fields of their fork's own: layer -> field -> shape."""
        schema = self.net.schema
        if schema is None:
            return {}
        found = {
            layer.name: layer.record.fork_blobs(schema.descriptor)
            for layer in self.net.layers
            if layer.record is not None
        }
        return {
            name: {field: blob.shape for field, blob in blobs.items()}
            for name, blobs in found.items()
            if blobs
        }

    @cached_property
    def without_weights(self) -> list[str]:
        """Layers that should have weights and got none from the file."""
        if not any(layer.blobs for layer in self.net.layers):
            return []
        from .shapes import all_param_shapes

        return [layer.name for layer, s in all_param_shapes(self.net).items() if s and not layer.blobs]

    def write(self, out: Path | str, force: bool = False) -> list[Path]:
        """Write the files into the directory ``out`` and return their paths.

        All of them or none: whatever goes wrong, nothing is left behind. An existing directory is an error
        unless ``force``; then what an earlier run wrote there is replaced, and anything else left alone.
        What is said to be exact is computed beside the original first (see ``verify``), and refused where it
        is not.
        """
        out = Path(out)
        may_write(out, force)
        self._may_replace(out)
        if self.exact:
            from .verify import verify

            self.verified = verify(self.original, self.plan, self.caffe, self.start.seed)
        try:
            with ExitStack() as cleanup:
                # The clean-up is there before what it cleans: an interrupt may come between any two lines.
                for parent in reversed([p for p in out.parents if not p.exists()]):
                    cleanup.callback(_remove_if_empty, parent)
                    parent.mkdir()
                replacing = out.exists()
                work = (out if replacing else out.parent) / f".rebirth.{os.urandom(8).hex()}"
                cleanup.callback(_remove, work)
                work.mkdir(0o700)
                names = self._write_into(work)
                if replacing:
                    _exchange(work, out, names)
                else:
                    work.chmod(0o777 & ~_umask())
                    work.rename(out)
        except OSError as error:
            raise RebirthError(
                f"{out}: cannot be written: {error.strerror or error}; "
                "nothing was, check its permissions and free space or give another --out"
            ) from None
        return [out / name for name in names]

    def _may_replace(self, out: Path) -> None:
        """Raise RebirthError where files in ``out`` were read as input, or are not ours."""
        if not os.path.lexists(out):
            return
        for path in (out / name for name in FILES):
            if path.exists() and any(path.samefile(source) for source in self.sources if source.exists()):
                raise RebirthError(f"{path}: was read as input and would be replaced; give another --out")
        strange = [name for name in self._files() if (out / name).exists()]
        if strange and not _is_ours(out):
            raise RebirthError(f"{out / strange[0]}: is not from an earlier run; give another --out")

    def _files(self) -> list[str]:
        """The files there are to write, of FILES."""
        absent = {
            "deploy.prototxt": self.deployed is None,
            "train_val.prototxt": not is_trainable(self.net),
            "weights.caffemodel": not any(layer.blobs for layer in self.net.layers),
        }
        return [name for name in FILES if not absent.get(name, False)]

    def _write_into(self, folder: Path) -> list[str]:
        """Write every file there is to write; their names."""
        files = self._files()
        if self.deployed is not None:
            self.deployed.write(folder / "deploy.prototxt")
        if "train_val.prototxt" in files:
            self.net.write(folder / "train_val.prototxt")
        if "weights.caffemodel" in files:
            self.net.write_weights(folder / "weights.caffemodel")
        (folder / "plan.yaml").write_text(plans.dump(self.plan), "utf-8")
        (folder / "report.json").write_text(json.dumps(self.report(), indent=2) + "\n", "utf-8")
        if self.sensitivity:
            rows = [asdict(one) for one in self.sensitivity]
            (folder / SENSITIVITY).write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
        if self.training is not None:
            write_stages(folder, self.original, self.plan, self.training, self.start)
        return [name for name in (*FILES, SENSITIVITY, *FOLDERS) if (folder / name).exists()]


def may_write(out: Path, force: bool = False) -> None:
    """Raise RebirthError where ``Result.write`` would refuse this directory whatever the result is."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise RebirthError(f"{out}: exists and is no directory; give another --out")
    if not force:
        raise RebirthError(f"{out}: exists already; give another --out, or --force to replace its files")
    if (out / "retrain").exists():
        raise RebirthError(f"{out}: holds a training run (retrain/); give another --out, or remove that")
    for path in (out / name for name in FILES):
        if path.is_dir():
            raise RebirthError(f"{path}: is a directory; give another --out")


def _exchange(work: Path, out: Path, names: Sequence[str]) -> None:
    """Put the files ``names`` of ``work`` into ``out``, or, on any failure, leave ``out`` as it was.

    The other files of an earlier run go: they do not belong to these.
    """
    ours = _is_ours(out)
    before = work / "before"
    before.mkdir()
    with ExitStack() as undo:
        for name in (*FILES, SENSITIVITY, *FOLDERS) if ours else names:
            if os.path.lexists(out / name):
                undo.callback(_put_back, before / name, out / name)
                (out / name).replace(before / name)
            if name in names:
                undo.callback(_remove, out / name)
                (work / name).replace(out / name)
        undo.pop_all()


def _is_ours(out: Path) -> bool:
    """Whether an earlier run wrote this directory."""
    return all((out / name).exists() for name in ("plan.yaml", "report.json"))


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; an interrupt does not leave half of it."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _put_back(saved: Path, path: Path) -> None:
    if os.path.lexists(saved):
        saved.replace(path)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's garbage collector: what is made here lives on, and it would search all of it again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collector()
def rebirth(
    prototxt: Path | str,
    weights: Path | str | None = None,
    *,
    plan: Path | str | Plan | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    exact: bool = False,
    reduce: float = 0.5,
    kernel: str = "keep",
    init: str = "inherit",
    seed: int = 0,
    image: tuple[int, int, int] | None = None,
    proto: Path | str | None = None,
    training: Training | None = None,
    caffe: str | None = None,
    calibration: Calibration | None = None,
    sensitivity: bool = False,
    tell: Tell = lambda done, total: None,
    named: Callable[[str], None] = lambda name: None,
) -> Result:
    """Read a net, merge what can be merged, and return the reborn one; nothing is written.

    Args:
        prototxt: a deploy or train_val file.
        weights: its .caffemodel; without one only structure is rewritten.
        plan: a plan.yaml (or Plan) to apply instead of asking the rules.
        only, skip: ids of merges or training steps to make alone, or to leave out.
        exact: only merges that change nothing the net computes, all of them; verified when written.
        reduce: what is left of the reducers that feed an absorbing branch, 0 < reduce <= 1.
        kernel: keep, cover or auto (see ``rules.geometry.choose``).
        init: weights of reborn layers, xavier, inherit or lsq.
        seed: of everything random.
        image: channels, height and width of the images a Data layer reads, where its prototxt does not say
            (a crop_size gives the size, mean values the channels).
        proto: the caffe.proto of the fork the net is for.
        training: databases (and a solver template) to write the files of training for.
        caffe: where the Caffe is that verifies ``exact`` and computes ``calibration``, as in
            ``engines.caffe.find_caffe``.
        calibration: the images of ``lsq`` and of ``sensitivity``, by default those to train on; where they
            are given and not for ``sensitivity``, ``inherit`` scales by them what it copies (see
            ``init.rescale``). What is done to each is as in the net's Data layer, where it has one.
        sensitivity: measure every merge alone (see ``sensitivity``), on the test images of ``training``, too.
        tell: hears how many images of how many have been seen.
        named: hears what the net is called before anything takes long; what it raises ends the work.

    Raises RebirthError with the place, what is wrong and what to do.
    """
    if not 0 < reduce <= 1:
        raise RebirthError(f"--reduce {reduce:g}: give a ratio above 0 and at most 1, like 0.5")
    for name, value, known in (("kernel", kernel, KERNELS), ("init", init, METHODS)):
        if value not in known:
            raise RebirthError(f"--{name} {value}: give one of {', '.join(known)}")
    if seed < 0:
        raise RebirthError(f"--seed {seed}: give a whole number from 0")
    schema = None
    if proto is not None:
        from .schema import fork

        schema = fork.load(proto)
    net = Net.load(prototxt, weights, image, schema)
    if training is not None:
        net = prepare(net, training)
    if plan is None:
        proposal = plans.propose(net, kernel, reduce, exact, only, skip)
    else:
        given = plan if isinstance(plan, Plan) else plans.load(Path(plan))
        proposal = Proposal(plans.select(net, given, only, skip, exact))
    named(net.name)
    fitting = init == "lsq" or (init == "inherit" and calibration is not None and not sensitivity)
    images = _images(net, training, calibration) if fitting or sensitivity else None
    start = Start(init, seed, images if fitting else None)
    reborn = plans.apply(net, proposal.plan, init, seed)
    fitted: list[Fitted] = []
    errors: dict[str, float] = {}
    if start.calibration is not None:
        from .engines import any_engine
        from .fit import fit, output_errors

        engine, made = any_engine(caffe), proposal.plan
        reborn, fitted = fit(net, reborn, made, start, engine, tell=tell)
        errors = output_errors(net, reborn, made, start.calibration, engine, tell=tell)
    alone: list[Sensitivity] = []
    if sensitivity:
        from . import sensitivity as merges
        from .engines import any_engine

        tested_on = None if training is None else training.data.test
        alone = merges.sensitivity(net, Start("lsq", seed, images), any_engine(caffe), tested_on, tell)
    shipped, deployed, why = net, None, ""
    try:
        shipped = deploy(net)
    except NetError as error:
        if training is not None:
            raise
        why = str(error)
    else:
        deployed = plans.without_dropout(deploy(reborn))
    return Result(
        original=net,
        net=reborn,
        deployed=deployed,
        plan=proposal.plan,
        refused=proposal.refused,
        before=cost(shipped),
        after=cost(deployed or reborn),
        no_deploy=why,
        sources=tuple(Path(path) for path in (prototxt, weights) if path is not None),
        training=training,
        exact=exact,
        caffe=caffe,
        start=start,
        fitted=fitted,
        errors=errors,
        images=images,
        sensitivity=alone,
    )


def _images(net: Net, training: Training | None, given: Calibration | None) -> Calibration | None:
    """The images to calibrate on. Raises RebirthError where they are to go in otherwise than the net's."""
    if given is None and training is not None:
        layer = data_layer(net, TRAIN)
        assert layer is not None
        given = Calibration(layer.param.data_param.source)
    if given is None or data_layer(net) is None:
        return given
    own = transform_of(net)
    same = replace(own, mirror=False, mean_file=given.transform.mean_file)  # whose path may be another
    if given.transform not in (Transform(), same):
        raise RebirthError(
            f"{net.path}: its Data layer says what is done to an image; leave out --mean-value, --scale and "
            "the like"
        )
    return replace(given, transform=own)


def _cost(c: Cost) -> dict[str, int]:
    return {
        "layers": c.layers,
        "macs": c.macs,
        "params": c.params,
        "activation_bytes": c.activation_bytes,
        "peak_activation_bytes": c.peak_activation_bytes,
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
