"""Retraining under real Caffe: killed at any moment it ends like a run that was not; every ending is told."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rebirth_caffe import caffemodel, prototxt
from rebirth_caffe import plan as plans
from rebirth_caffe import retrain as module
from rebirth_caffe.engines import training
from rebirth_caffe.engines.caffe import Caffe
from rebirth_caffe.engines.training import (
    CaffeTrainer,
    Diverged,
    Run,
    Snapshot,
    check_snapshot,
    newest_snapshot,
    snapshot_files,
    train,
)
from rebirth_caffe.errors import EngineError, PlanError, RebirthError
from rebirth_caffe.evaluate import Accuracy, NotFinite
from rebirth_caffe.journal import Journal
from rebirth_caffe.net import Net
from rebirth_caffe.plan import Plan
from rebirth_caffe.retrain import Options, retrain
from rebirth_caffe.retrain_command import segment_for
from rebirth_caffe.schema import caffe_pb2
from tests import tiny

TOOL = tiny.ROOT / "tools" / "retrain.py"
OPTIONS = Options(iterations=6, final_iterations=4, segment=3)
FLAGS = ["--iterations", "6", "--final-iterations", "4", "--segment", "3"]


@pytest.fixture(scope="session")
def fashion(tmp_path_factory, caffe):
    """The tiny net, trained by real Caffe on Fashion-MNIST's images (without network, synthetic ones)."""

    return tiny.trained(tmp_path_factory, caffe)


@pytest.fixture(scope="session")
def unkilled(tmp_path_factory, caffe, fashion):
    """A whole run that nobody disturbed."""

    def make(folder: Path) -> None:
        home = tiny.reborn(fashion, folder / "home")
        retrain(home, OPTIONS, CaffeTrainer(caffe))

    return tiny.once(tiny.shared_folder(tmp_path_factory) / "unkilled", make) / "home"


@pytest.fixture
def home(tmp_path, fashion):
    """A directory to train in."""
    return tiny.reborn(fashion, tmp_path / "home")


@pytest.fixture
def finished(tmp_path, unkilled):
    """A copy of the finished run."""
    shutil.copytree(unkilled, tmp_path / "finished")
    return tmp_path / "finished"


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a person gives it."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def weights_of(home: Path) -> dict[str, list[bytes]]:
    records = caffemodel.read(home / "final/weights.caffemodel").records
    return {r.name: [blob.array.tobytes() for blob in r.blobs] for r in records if r.blobs}


def events(home: Path) -> list[str]:
    return [e["event"] for e in tiny.journal(home)]


def without_seconds(home: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in tiny.journal(home)]


def same_end(home: Path, unkilled: Path) -> None:
    """Not a bit is different, and nothing was done twice."""
    assert (home / "final/weights.caffemodel").read_bytes() == (
        unkilled / "final/weights.caffemodel"
    ).read_bytes()
    mine, other = (
        [{k: v for k, v in e.items() if k not in ("seconds", "files")} for e in tiny.journal(h)]
        for h in (home, unkilled)
    )
    assert mine == other
    left = [p.name for p in home.rglob("*") if p.suffix == ".solverstate" or p.name.startswith(".")]
    assert left == []


# ------------------------------------------------------------------------------------------------- killed


def test_the_weights_of_the_losses_shift_some_twenty_times():
    assert [segment_for(n, "labels") for n in (6, 300, 4000, 90_000)] == [100, 100, 200, 1000]
    assert [segment_for(n, "") for n in (6, 300, 90_000)] == [1000] * 3


class TestKilled:
    def test_a_run_leaves_what_it_promises(self, unkilled, fashion):
        assert events(unkilled) == [
            *["begin", "original"],
            *["segment", "segment", "tested", "step"] * 2,
            *["segment", "segment", "tested", "step"],
        ]
        found = json.loads((unkilled / "final/accuracy.json").read_text())
        assert [step["stage"] for step in found["steps"]] == ["conv1", "conv2", "fine-tune"]
        for step in found["steps"]:
            assert step["iterations"] == (4 if step["stage"] == "fine-tune" else 6)
            assert step["seconds"] > 0
            assert 0 <= step["top1"] <= step["top5"] <= 1
            assert step["kept"] is True
        assert found["original"]["images"] == found["final"]["images"] == tiny.TEST_IMAGES
        assert found["original"]["top1"] > 0.3  # it has learned something, ten classes
        assert found["final"]["macs"] < found["original"]["macs"]
        steps = found["steps"]
        assert [s["macs_before"] for s in steps] == [
            found["original"]["macs"],
            *(s["macs"] for s in steps[:2]),
        ]
        names = {path.name for path in (unkilled / "final").iterdir()}
        assert names == {
            *("deploy.prototxt", "train_val.prototxt", "weights.caffemodel", "plan.yaml", "accuracy.json")
        }

    def test_on_the_way_it_tests_and_changes_nothing(self, home, unkilled, caffe):
        """At the start and in the middle of every step; killed right after, it does not test there again."""
        options = dataclasses.replace(OPTIONS, test_interval=3)
        heard: list[dict[str, Any]] = []

        def tell(what: str, details: dict[str, Any]) -> None:
            if what == "curve":
                heard.append(details)
                raise KeyboardInterrupt

        for _ in range(6):
            with pytest.raises(KeyboardInterrupt):
                retrain(home, options, CaffeTrainer(caffe), tell)
        retrain(home, options, CaffeTrainer(caffe), tell)
        assert [(e["step"], e["iteration"]) for e in heard] == [
            (step, at) for step in ("01-conv1", "02-conv2", "03-fine-tune") for at in (0, 3)
        ]
        found = json.loads((home / "final/accuracy.json").read_text())
        assert [e["top1"] for e in found["curve"]] == [e["top1"] for e in heard]
        assert heard[4]["top1"] == found["steps"][1]["top1"]  # nothing was merged in between
        assert all(0.1 < e["top1"] <= e["top5"] for e in found["curve"] if e["iteration"])
        assert weights_of(home) == weights_of(unkilled)

    def test_every_segment_has_learned_from_the_one_before(self, unkilled):
        """Weights move in every step, and the layers that are reborn in it begin where init put them."""
        before = caffemodel.read(unkilled / "original/weights.caffemodel").by_name()
        for step in [e for e in tiny.journal(unkilled) if e["event"] == "step"]:
            after = caffemodel.read(unkilled / step["weights"]).by_name()
            moved = [
                not np.array_equal(a.array.ravel(), b.array.ravel())
                for name in before.keys() & after.keys()
                for a, b in zip(before[name].blobs, after[name].blobs, strict=True)
            ]
            assert moved
            assert all(moved)
            before = after

    def test_each_segment_goes_on_in_the_data_where_the_last_one_stopped(self, home, caffe, monkeypatch):
        runs: list[Run] = []
        monkeypatch.setattr(training, "train", recorder(runs))
        monkeypatch.setattr(module, "evaluate_net", lambda *_, **__: Accuracy(0.5, 0.9, 1.0, 200))
        retrain(
            home,
            dataclasses.replace(OPTIONS, iterations=50, segment=8, final_iterations=0),
            CaffeTrainer(caffe),
        )
        batches = 21  # of 16 in 330 images
        assert [r.skip for r in runs] == [i % batches for i in (0, 8, 16, 24, 32, 40, 48)] * 2
        assert [r.until for r in runs] == [8, 16, 24, 32, 40, 48, 50] * 2
        assert [r.state is None for r in runs] == [True, *[False] * 6] * 2
        assert all(r.lock is not None for r in runs)  # a killed run's child keeps the next one waiting
        assert len({module._seed(0, step, 1, at) for step in "ab" for at in range(9)}) == 18

    def test_killed_at_every_line_of_the_journal(self, home, unkilled, caffe):
        """In front of each line, in the middle of it, and behind it: a fork dies there, another goes on."""
        total = len(events(unkilled))
        for number in range(1, total):
            for place in ("middle", "after") if number % 3 else ("before", "after"):
                assert dies(home, caffe, number, place), f"{place} line {number}"
                whole = (home / "retrain/journal.jsonl").read_bytes().count(b"\n")
                assert whole == number + (place == "after"), f"{place} line {number}"
        assert retrain(home, OPTIONS, CaffeTrainer(caffe)) is not None
        same_end(home, unkilled)

    def test_the_command_killed_while_caffe_trains_and_while_it_writes(self, tmp_path, fashion, unkilled):
        """SIGKILL to the command: Caffe must go with it. Then a torn snapshot, as power loss leaves."""
        home = tiny.reborn(fashion, tmp_path / "a b")
        for number in (3, 7):  # lines of the journal there are when it dies
            command = subprocess.Popen(
                [sys.executable, str(TOOL), "a b", *FLAGS],
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            path, child = home / "retrain/journal.jsonl", 0
            deadline = time.monotonic() + 60
            while not child:
                assert time.monotonic() < deadline
                assert command.poll() is None
                lines = path.read_bytes().count(b"\n") if path.exists() else 0
                child = next(iter(trainers(command.pid)), 0) if lines >= number else 0
                time.sleep(0.002)
            time.sleep(0.05 * number)  # somewhere in the middle
            command.kill()
            command.wait()
        last = [e for e in tiny.journal(home) if e["event"] == "segment"][-1]
        folder = home / Path(last["weights"]).parent
        for left in (".caffemodel", ".solverstate"):  # of the segment that was not finished, and of others
            (folder / f"a1r1_iter_{last['iteration'] + 3}{left}").write_bytes(b"\x0a")
            (folder / f"a1r1_iter_99{left}").write_bytes(b"torn")
        (home / "retrain/.test.xyz").mkdir()
        (home / ".final.xyz").mkdir()
        done = run("a b", *FLAGS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        same_end(home, unkilled)
        assert (home / "training.png").read_bytes().startswith(b"\x89PNG")

    def test_moved_in_the_middle_and_with_a_relative_path(self, tmp_path, home, caffe, unkilled, monkeypatch):
        assert dies(home, caffe, 2, "after")
        (tmp_path / "else where").mkdir()
        home.rename(tmp_path / "else where/moved")
        monkeypatch.chdir(tmp_path / "else where")
        reached = tiny.journal(Path("moved"))[-1]
        assert (reached["event"], reached["iteration"]) == ("segment", 3)
        notes: list[str] = []
        tell = lambda what, details: notes.append(details["text"]) if what == "note" else None  # noqa: E731
        assert retrain(Path("moved"), OPTIONS, CaffeTrainer(caffe), tell) is not None
        assert notes == ["conv1: going on from iteration 3 of 6"]
        same_end(Path("moved"), unkilled)

    def test_a_finished_run_does_nothing_again(self, finished, unkilled, caffe, monkeypatch):
        monkeypatch.setattr(training, "train", None)
        monkeypatch.setattr(module, "evaluate_net", None)
        stamps = {p: p.stat().st_mtime_ns for p in (finished / "final").iterdir()}
        again = retrain(finished, OPTIONS, CaffeTrainer(caffe))
        assert again is not None
        assert again.to_json() == json.loads((unkilled / "final/accuracy.json").read_text())
        assert {p: p.stat().st_mtime_ns for p in (finished / "final").iterdir()} == stamps
        assert tiny.journal(finished) == tiny.journal(unkilled)

    @pytest.mark.parametrize("death", [0, 1, 2, None])
    def test_final_is_replaced_at_once(self, finished, unkilled, caffe, death):
        """Killed between any two renames: the next run leaves the same, and never a mixture."""
        (finished / "final/accuracy.json").write_text("of a run before")
        (finished / "final/mine.txt").write_text("")
        if death is not None:
            pid = os.fork()
            if not pid:
                with pytest.MonkeyPatch.context() as patch:
                    real, count = Path.rename, iter(range(9))

                    def rename(self: Path, target: Path) -> Path:
                        if next(count) == death:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return real(self, target)

                    patch.setattr(Path, "rename", rename)
                    remove = shutil.rmtree

                    def halfway(path: Path, **options: Any) -> None:
                        """A half removed final/ must never be seen."""
                        if path.name == "final":
                            (path / "plan.yaml").unlink()
                            os.kill(os.getpid(), signal.SIGKILL)
                        remove(path, **options)

                    patch.setattr(shutil, "rmtree", halfway)
                    retrain(finished, OPTIONS, CaffeTrainer(caffe))
                os._exit(0)
            os.waitpid(pid, 0)
            if (finished / "final").exists():
                assert (finished / "final/plan.yaml").exists()
                whole = (finished / "final/accuracy.json").read_text() != "of a run before"
                assert whole != (finished / "final/mine.txt").exists()
        retrain(finished, OPTIONS, CaffeTrainer(caffe))
        for path in (unkilled / "final").iterdir():
            assert (finished / "final" / path.name).read_bytes() == path.read_bytes()
        assert not (finished / "final/mine.txt").exists()
        assert [p for p in finished.iterdir() if p.name.startswith(".")] == []

    def test_a_second_process_refuses_in_one_line(self, finished):
        from rebirth_caffe.journal import sole_user

        with sole_user(finished / "retrain"):
            done = run(finished, *FLAGS)
        assert done.returncode == 2
        assert (
            done.stderr
            == f"error: {finished}/retrain: another process is at work here; wait for it or stop it\n"
        )

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_told_to_stop_or_killed_it_takes_caffe_with_it(self, home, number):
        command = subprocess.Popen(
            [sys.executable, str(TOOL), str(home), "--iterations", "100000", "--segment", "50000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not (found := trainers(command.pid)):
            assert time.monotonic() < deadline
            assert command.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        command.send_signal(number)
        _, said = command.communicate(timeout=20)
        if number == signal.SIGINT:
            assert command.returncode == 130
            assert said == "interrupted; the same command goes on from the last snapshot\n"
        deadline = time.monotonic() + 5
        while any(runs(pid) for pid in found):
            assert time.monotonic() < deadline, "Caffe lives on"
            time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def trainers(parent: int) -> list[int]:
    """The children of a process that train."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            mine = int(status.read_text().rpartition(")")[2].split()[1]) == parent
            if mine and b"trainer.py" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except (OSError, ValueError):
            continue
    return found


def dies(home: Path, caffe: Caffe, number: int, place: str) -> bool:
    """Run in a fork that kills itself at the journal's line ``number`` (from 0); whether it got there."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    real = Journal.add

    def add(self: Journal, event: str, **details: Any) -> Any:
        if len(self.events) != number:
            return real(self, event, **details)
        if place == "middle":
            line = json.dumps({"event": event, **details}).encode()
            with self.path.open("ab") as file:
                file.write(line[: len(line) // 2])
        if place == "after":
            real(self, event, **details)
        os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = add  # type: ignore[method-assign]
    try:
        retrain(home, OPTIONS, CaffeTrainer(caffe))
    finally:
        os._exit(0)


# ---------------------------------------------------------------------------------------------- final files


class TestFinal:
    def test_the_files_run_in_caffe_and_in_opencv(self, unkilled, fashion, caffe):
        final = unkilled / "final"
        found = json.loads((final / "accuracy.json").read_text())["final"]
        tool = tiny.ROOT / "tools/evaluate.py"
        for engine in ("caffe", "opencv"):
            done = subprocess.run(
                [
                    *(
                        sys.executable,
                        str(tool),
                        str(final / "deploy.prototxt"),
                        str(final / "weights.caffemodel"),
                    ),
                    *("--data", str(fashion / "test.lmdb"), "--engine", engine, "--json"),
                    *("--crop", "24", "--mean-value", "70", "--scale", "0.02"),
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            again = json.loads(done.stdout)
            assert again["loss"] == pytest.approx(found["loss"], rel=1e-4)
            assert abs(again["top1"] - found["top1"]) <= (0 if engine == "caffe" else 0.01)

    def test_images_that_go_in_untouched_are_pointed_out(self, unkilled, fashion):
        final = unkilled / "final"
        files = str(final / "deploy.prototxt"), str(final / "weights.caffemodel")
        command = [sys.executable, str(tiny.ROOT / "tools/evaluate.py"), *files, "--crop", "24"]
        note = "images go in as they are, 0 to 255; else give the net's --mean-value and --scale"
        for flags, notes in (((), [note]), (("--scale", "0.02"), [])):
            done = subprocess.run(
                [*command, *flags, "--data", str(fashion / "test.lmdb")],
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout.startswith("top-1 ")
            assert done.stdout.splitlines()[1:] == notes

    def test_the_plan_in_final_makes_the_final_net(self, unkilled):
        net = Net.load(unkilled / "original/train_val.prototxt")
        made = plans.apply(net, plans.load(unkilled / "final/plan.yaml"))
        assert made.text() == (unkilled / "final/train_val.prototxt").read_text()
        Net.load(unkilled / "final/train_val.prototxt", unkilled / "final/weights.caffemodel")

    def test_deploy_has_neither_dropout_nor_auxiliary_head_nor_data(self, unkilled):
        net = Net.load(unkilled / "final/deploy.prototxt", unkilled / "final/weights.caffemodel")
        assert [layer.type for layer in net.layers] == [
            *("Input", "Convolution", "ReLU", "Convolution", "ReLU", "InnerProduct", "Softmax")
        ]
        assert all(layer.blobs for layer in net.layers if layer.type in ("Convolution", "InnerProduct"))


# ------------------------------------------------------------------------------- decisions, without training


def recorder(runs: list[Run], losses: Any = lambda run: [1.0]) -> Any:
    """Stands in for Caffe: keeps the weights it starts from, counts on, says ``losses``."""

    def fake(caffe: Caffe, run: Run, progress: Any) -> None:
        solver = caffe_pb2.SolverParameter()
        prototxt.to_message(prototxt.parse((run.home / run.solver).read_text()), solver)
        before = caffe_pb2.SolverState()
        if run.state is not None:
            before.ParseFromString((run.home / run.state).read_bytes())
        runs.append(run)
        for i, loss in enumerate(losses(run)):
            if not np.isfinite(loss):
                raise Diverged("the loss became nan at iteration 0")
            progress(before.iter + i, loss)
        made = snapshot_files(solver.snapshot_prefix, run.until)
        source = run.weights if run.state is None else before.learned_net
        assert source is not None
        shutil.copy(run.home / source, run.home / made.weights)
        state = caffe_pb2.SolverState(iter=run.until, learned_net=made.weights)
        (run.home / made.state).write_bytes(state.SerializeToString())

    return fake


class Played:
    """A run in which training and testing are played: ``top1`` is what each test in turn finds."""

    def __init__(
        self, monkeypatch: Any, home: Path, caffe: Caffe, top1: Any, losses: Any = lambda run: [1.0]
    ):
        self.home, self.caffe = home, caffe
        self.runs: list[Run] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.left = iter(top1)
        monkeypatch.setattr(training, "train", recorder(self.runs, losses))
        monkeypatch.setattr(module, "evaluate_net", self.test)

    def test(self, *_: Any, **__: Any) -> Accuracy:
        top1 = next(self.left)
        if isinstance(top1, Exception):
            raise top1
        return Accuracy(top1, 0.99, 1.0, 200)

    def __call__(self, until: str = "", **options: Any) -> Any:
        given = dataclasses.replace(Options(iterations=6, segment=3), **options)
        return retrain(
            self.home, given, CaffeTrainer(self.caffe), lambda w, d: self.told.append((w, dict(d))), until
        )

    @property
    def notes(self) -> list[str]:
        return [details["text"] for what, details in self.told if what == "note"]

    @property
    def rates(self) -> list[tuple[str, float]]:
        """Segment by segment: attempt, and the rate that the solver had."""
        segments = [e for e in tiny.journal(self.home) if e["event"] == "segment"]
        return [(f"{e['step']} {e['attempt']}", e["rate"]) for e in segments]


@pytest.fixture
def played(monkeypatch, home, caffe):
    return lambda top1, losses=lambda run: [1.0]: Played(monkeypatch, home, caffe, top1, losses)


class TestMaxDrop:
    def test_without_it_every_step_is_kept(self, played):
        outcome = played([0.9, 0.1, 0.2])()
        assert [s["kept"] for s in outcome.steps] == [True, True]
        assert outcome.final.top1 == 0.2

    @pytest.mark.parametrize(("top1", "kept"), [(0.911, True), (0.9109, False)])
    def test_it_is_in_points_and_met_where_the_drop_is_as_large(self, played, top1, kept):
        """0.915 - 0.911 is 0.4000000000000004 points for a computer."""
        run = played([0.915, top1, top1, 0.915])
        outcome = run(max_drop=0.4)
        assert outcome.steps[0]["kept"] is kept
        assert bool(run.notes) is not kept

    def test_a_step_is_trained_longer_once_and_kept_if_that_helps(self, played, home):
        run = played([0.9, 0.5, 0.89, 0.9])
        outcome = run(max_drop=2.0)
        first = outcome.steps[0]
        assert (first["kept"], first["iterations"], first["top1"]) == (True, 12, 0.89)
        assert run.notes == ["conv1: top-1 50.00%, 40.00 points below the original; training it longer, once"]
        assert [a for a, _ in run.rates] == ["01-conv1 1"] * 2 + ["01-conv1 2"] * 2 + ["02-conv2 1"] * 2
        second = run.runs[2]
        assert second.weights == "retrain/01-conv1/a1r1_iter_6.caffemodel"  # where the first attempt ended
        assert second.state is None
        assert second.skip == 0

    def test_a_step_that_stays_below_is_rolled_back_and_the_rest_goes_on(self, played, home):
        run = played([0.9, 0.5, 0.6, 0.89])
        outcome = run(max_drop=2.0)
        lost, kept = outcome.steps
        assert (lost["stage"], lost["kept"], lost["top1"], lost["iterations"]) == ("conv1", False, 0.6, 12)
        assert lost["macs"] != lost["macs_before"] == outcome.macs[0] == kept["macs_before"]
        assert (kept["stage"], kept["kept"]) == ("conv2", True)
        assert run.notes[-1] == "conv1: top-1 60.00%, 30.00 points below the original; rolled back"
        final = Net.load(home / "final/train_val.prototxt")
        assert {"conv1", "pool1", "norm1", "relu1"} <= {layer.name for layer in final.layers}
        assert "conv2" not in {layer.name for layer in final.layers}
        plan = plans.load(home / "final/plan.yaml")
        assert {m.id: m.enabled for m in plan.merges}["conv1"] is False
        assert next(m.note for m in plan.merges if m.id == "conv1").startswith("rolled back: top-1 60.00%")
        original = Net.load(home / "original/train_val.prototxt")
        assert plans.apply(original, plan).text() == (home / "final/train_val.prototxt").read_text()
        assert list((home / "retrain/01-conv1").glob("*.caffemodel")) == []

    def test_all_rolled_back_leaves_the_original(self, played, home):
        outcome = played([0.9, *[0.1] * 4])(max_drop=1.0)
        assert [s["kept"] for s in outcome.steps] == [False, False]
        assert outcome.macs[0] == outcome.macs[1]
        final = caffemodel.read(home / "final/weights.caffemodel").by_name()
        first = caffemodel.read(home / "original/weights.caffemodel").by_name()
        for name in ("conv1", "conv2", "fc"):
            assert final[name].blobs[0].array.tobytes() == first[name].blobs[0].array.tobytes()

    def test_the_fine_tune_is_never_rolled_back(self, played):
        outcome = played([0.9, 0.9, 0.9, 0.1])(max_drop=0.0, final_iterations=2)
        assert [(s["stage"], s["kept"]) for s in outcome.steps][-1] == ("fine-tune", True)

    def test_a_step_that_needs_one_rolled_back_is_left_out(self, played, home, monkeypatch):
        real = plans.apply

        def apply(net: Net, plan: Plan, *more: Any) -> Net:
            if [m.id for m in plan.merges] == ["conv2"] and any(x.name == "conv1" for x in net.layers):
                raise PlanError("merge 'conv2': the net has no layer 'conv1/rebirth' at this point")
            return real(net, plan, *more)

        monkeypatch.setattr(plans, "apply", apply)
        run = played([0.9, 0.1, 0.1])
        outcome = run(max_drop=1.0)
        left = outcome.steps[1]
        assert (left["kept"], left["top1"], left["iterations"]) == (False, None, 0)
        assert "no layer 'conv1/rebirth'" in left["reason"]
        assert run.notes[-1].startswith("conv2: left out, as conv1 was rolled back")
        assert run(max_drop=1.0).steps == outcome.steps  # and so again

    def test_a_merge_whose_substitute_is_rolled_back_does_not_come_back(self, played, home):
        plan = plans.load(home / "plan.yaml")
        first, *rest = (m for m in plan.merges if m.stage)
        other = dataclasses.replace(first, id="conv1+", instead_of="conv1")
        (home / "plan.yaml").write_text(plans.dump(Plan(plan.net, (first, other, *rest))))
        played([0.9, 0.1, 0.1, 0.9])(max_drop=1.0)
        kept = plans.load(home / "final/plan.yaml")
        assert [m.id for m in kept.active] == ["conv2"]


def alone(home: Path, **numbers: tuple[float, float]) -> None:
    """A sensitivity.json: top-1 and milliseconds saved of each merge alone, in the geometry of the plan."""
    rows = [
        {"merge": name, "stage": name, "kernel": kernel, "reduce": 1.0, "error": 0.5}
        | {"before_ms": 1.0, "after_ms": 1.0 - saved, "top1": top1 if kernel == "keep" else 0.0}
        for name, (top1, saved) in numbers.items()
        for kernel in ("keep", "auto")
    ]
    (home / "sensitivity.json").write_text(json.dumps(rows))


class TestGivingUpOneMerge:
    """A step of several merges that stays below."""

    def test_it_gives_up_what_loses_most_for_a_millisecond(self, played, home):
        alone(home, conv1=(0.8, 0.5), conv2=(0.85, 0.1))  # 20 and 50 points a millisecond
        run = played([0.9, 0.5, 0.6, 0.89])
        outcome = run(schedule="joint", max_drop=2.0)
        lost, kept = outcome.steps
        assert (lost["stage"], lost["kept"], lost["merges"]) == ("joint", False, ["conv1", "conv2"])
        assert lost["dropped"] == {
            "merge": "conv2",
            "lost": pytest.approx(0.05),
            "of": "top1",
            "saved_ms": pytest.approx(0.1),
        }
        assert (kept["stage"], kept["kept"], kept["merges"], kept["top1"]) == ("joint", True, ["conv1"], 0.89)
        assert kept["macs"] < kept["macs_before"] == lost["macs_before"]
        assert run.notes == [
            "joint: top-1 50.00%, 40.00 points below the original; training it longer, once",
            "joint: top-1 60.00%, 30.00 points below the original; going on without conv2: "
            "by itself it costs 5.00 points of top-1 and saves 0.100 ms",
        ]
        assert json.loads((home / "final/accuracy.json").read_text())["steps"] == outcome.steps
        plan = plans.load(home / "final/plan.yaml")
        assert {m.id: m.enabled for m in plan.merges if not m.exact} == {"conv1": True, "conv2": False}
        assert next(m.note for m in plan.merges if m.id == "conv2") == (
            "rolled back: top-1 60.00% after 12 iterations; "
            "by itself it costs 5.00 points of top-1 and saves 0.100 ms"
        )
        original = Net.load(home / "original/train_val.prototxt")
        assert plans.apply(original, plan).text() == (home / "final/train_val.prototxt").read_text()
        assert list((home / "retrain/01-joint").glob("*.caffemodel")) == []
        assert run(schedule="joint", max_drop=2.0).steps == outcome.steps  # and so again, with nothing to do
        assert len(run.runs) == 6

    def test_without_accuracies_it_judges_by_the_error_and_what_saves_nothing_goes_first(self, played, home):
        alone(home, conv1=(0.9, 0.0), conv2=(0.1, 0.5))
        rows = json.loads((home / "sensitivity.json").read_text())
        (home / "sensitivity.json").write_text(json.dumps([{**row, "top1": None} for row in rows]))
        outcome = played([0.9, 0.5, 0.5, 0.9])(schedule="joint", max_drop=2.0)
        wanted = {"merge": "conv1", "lost": 0.5, "of": "error", "saved_ms": 0.0}
        assert [step.get("dropped") for step in outcome.steps] == [wanted, None]

    def test_the_last_one_is_rolled_back_and_what_was_to_be_learned_again_left_out(self, played, home):
        alone(home, conv1=(0.8, 0.5), conv2=(0.85, 0.1))
        run = played([0.9, 0.5, 0.5, 0.6])
        outcome = run(schedule="joint-then-steps", max_drop=2.0)
        assert [(s["stage"], s["merges"], s["kept"], s["iterations"]) for s in outcome.steps] == [
            ("joint", ["conv1", "conv2"], False, 12),
            ("joint", ["conv1"], False, 6),  # it went on from there: that was longer already
            ("conv1", [], False, 0),
            ("conv2", [], False, 0),
        ]
        assert outcome.steps[2]["reason"] == "its merges were rolled back"
        assert outcome.macs[0] == outcome.macs[1]

    def test_a_damaged_file_is_named(self, played, home):
        (home / "sensitivity.json").write_text('[{"merge": "conv1"}]')
        with pytest.raises(RebirthError, match=r"sensitivity\.json: damaged; make it again"):
            played([0.9, 0.5, 0.5])(schedule="joint", max_drop=2.0)

    def test_what_was_not_measured_is_now_once_and_the_rest_goes_on_as_trained(self, home, caffe):
        """Under real Caffe, killed on the way: nothing is measured twice."""
        options = dataclasses.replace(OPTIONS, schedule="joint", max_drop=0.0)
        starts: list[dict[str, list[bytes]]] = []

        def tell(what: str, details: dict[str, Any]) -> None:
            if what == "note" and "going on without" in details["text"] and not starts:
                starts.append({})
                raise KeyboardInterrupt
            if what == "progress" and (home / "retrain/01-joint.1").exists() and len(starts) == 1:
                ended = next(e for e in tiny.journal(home) if e["event"] == "step")["weights"]
                for path in (home / ended, home / "retrain/01-joint.1/start.caffemodel"):
                    records = caffemodel.read(path).records
                    starts.append({r.name: [blob.array.tobytes() for blob in r.blobs] for r in records})

        with pytest.raises(KeyboardInterrupt):
            retrain(home, options, CaffeTrainer(caffe), tell)
        outcome = retrain(home, options, CaffeTrainer(caffe), tell)
        assert outcome is not None
        assert sorted(e["merge"] for e in tiny.journal(home) if e["event"] == "alone") == ["conv1", "conv2"]
        given_up = outcome.steps[0]["dropped"]
        assert given_up["of"] == "top1"
        assert outcome.steps[1]["merges"] == [{"conv1": "conv2", "conv2": "conv1"}[given_up["merge"]]]
        _, ended, begun = starts
        first = caffemodel.read(home / "original/weights.caffemodel").by_name()[given_up["merge"]]
        assert begun[given_up["merge"]] == [blob.array.tobytes() for blob in first.blobs]
        others = {name for name in begun if begun[name]} - {given_up["merge"]}
        assert {"fc", f"{outcome.steps[1]['merges'][0]}/rebirth"} <= others
        assert all(begun[name] == ended[name] for name in others)


class TestDivergence:
    NAN = staticmethod(lambda stage, rate: lambda run: [np.nan if stage in run.solver and rate(run) else 1.0])

    @staticmethod
    def base_lr(run: Run) -> float:
        solver = caffe_pb2.SolverParameter()
        prototxt.to_message(prototxt.parse((run.home / run.solver).read_text()), solver)
        return solver.base_lr

    def test_the_rate_goes_down_once_and_says_so(self, played, home):
        run = played([0.9] * 3, self.NAN("conv1", lambda r: self.base_lr(r) > 0.005))
        outcome = run()
        assert run.notes == [
            "conv1: diverged, the loss became nan at iteration 0; "
            "starting it again at a tenth of the learning rate"
        ]
        assert run.rates == [("01-conv1 1", 0.1)] * 2 + [("02-conv2 1", 1.0)] * 2
        assert [round(self.base_lr(r), 6) for r in run.runs][-1] == 0.01
        assert "base_lr: 0.001\n" in (home / "retrain/01-conv1/solver.prototxt").read_text()
        assert [s["iterations"] for s in outcome.steps] == [6, 6]

    def test_a_second_time_ends_in_one_line(self, played, home):
        run = played([0.9] * 3, self.NAN("conv1", lambda r: True))
        wanted = (
            r"step 'conv1' diverged again, at a tenth of its learning rate: "
            r"the loss became nan at iteration 0; "
            r"lower base_lr in .*original/solver.prototxt, remove .*retrain and start again"
        )
        for _ in range(2):  # and so it does when started again, at once
            with pytest.raises(RebirthError, match=wanted):
                run()
        assert len(run.notes) == 1

    def test_the_longer_training_keeps_the_lower_rate(self, played):
        run = played([0.9, 0.1, 0.9, 0.9], self.NAN("conv1", lambda r: self.base_lr(r) > 0.005))
        run(max_drop=1.0)
        assert run.rates == [("01-conv1 1", 0.1)] * 2 + [("01-conv1 2", 0.1)] * 2 + [("02-conv2 1", 1.0)] * 2
        assert sum("diverged" in note for note in run.notes) == 1

    def test_diverging_in_the_longer_training_leaves_the_first_one_alone(self, played, home):
        run = played(
            [0.9, 0.1, 0.9, 0.9, 0.9],
            self.NAN("conv1", lambda r: "a2r1_" in (r.state or "") and self.base_lr(r) > 0.005),
        )
        outcome = run(max_drop=1.0)
        steps = ["01-conv1 1", "01-conv1 1", "01-conv1 2", "01-conv1 2", "01-conv1 2"]
        assert (
            run.rates == list(zip(steps, [1.0, 1.0, 1.0, 0.1, 0.1], strict=True)) + [("02-conv2 1", 1.0)] * 2
        )
        assert outcome.steps[0]["iterations"] == 12
        restarted = [r for r in run.runs if r.state is None and r.weights and "a1r1_iter_6" in r.weights]
        assert len(restarted) == 2

    def test_killed_in_the_longer_training_it_goes_on_there(self, played, home):
        """With the first attempt's segments as they are, whatever rate the second one came down to."""

        def losses(run: Run) -> list[float]:
            if "a2" in (run.state or "") and self.base_lr(run) > 0.005:
                return [np.nan]
            if "a2r0.1_iter_3" in (run.state or "") and len(run_.runs) < 7:
                raise KeyboardInterrupt
            return [1.0]

        run_ = played([0.9, 0.1, 0.9, 0.9], losses)
        with pytest.raises(KeyboardInterrupt):
            run_(max_drop=1.0)
        assert len(run_.runs) == 6  # two segments, two that led to NaN, two of which one was killed
        before = run_.rates
        assert before == [("01-conv1 1", 1.0)] * 2 + [("01-conv1 2", 1.0), ("01-conv1 2", 0.1)]
        outcome = run_(max_drop=1.0)
        assert run_.rates == [*before, ("01-conv1 2", 0.1), *[("02-conv2 1", 1.0)] * 2]
        assert run_.runs[6].state == "retrain/01-conv1/a2r0.1_iter_3.solverstate"
        assert outcome.steps[0]["iterations"] == 12

    def test_a_net_that_tests_as_no_number_has_diverged(self, played):
        run = played([0.9, NotFinite("the net's output is not finite"), 0.9, 0.9])
        run()
        assert run.rates == [("01-conv1 1", 1.0)] * 2 + [("01-conv1 1", 0.1)] * 2 + [("02-conv2 1", 1.0)] * 2

    def test_a_loss_that_has_risen_far_and_stays_there(self, played):
        run = played(
            [0.9] * 4,
            lambda r: [0.3, *[2.3] * 11] if self.base_lr(r) > 0.005 and "conv1" in r.solver else [0.3],
        )
        run()
        assert run.notes[0].startswith("conv1: diverged, the loss rose from 0.3 to 2.3 by iteration 3; ")

    @pytest.mark.parametrize(
        "losses", [[2.3] * 20, [0.3, *[1.2] * 20], [0.1, 9.0, *[0.1] * 20], [0.1, 9, 9, 9]]
    )
    def test_noise_and_a_bad_start_are_no_divergence(self, losses):
        assert not module._risen(losses)

    def test_in_real_caffe(self, tmp_path, fashion, caffe):
        """A rate far too high: NaN is seen, whether Caffe displays it or only the weights show it."""
        solver = tiny.SOLVER.replace("base_lr: 0.01", "base_lr: 1e9\nclip_gradients: -1\ndisplay: 100")
        home = tiny.reborn(fashion, tmp_path / "home", solver=solver)
        told: list[str] = []
        with pytest.raises(RebirthError, match="step 'conv1' diverged again") as caught:
            retrain(
                home,
                Options(6, segment=6),
                CaffeTrainer(caffe),
                lambda what, d: told.append(d.get("text", "")),
            )
        assert str(caught.value).count("\n") == 0
        assert sum("starting it again at a tenth" in text for text in told) == 1


class TestSameAsBefore:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"iterations": 7}, "with --iterations 6; "),
            ({"segment": 5}, "with --segment 3; "),
            ({"max_drop": 1.0}, "without --max-drop; "),
            ({"final_iterations": 0}, "with --final-iterations 4; "),
            ({"threads": 2}, "with --threads 1; "),
            ({"gpus": ("0", "1")}, "without --gpu; "),
            ({"scores": 16.0}, "with --scores 4.0; "),
            ({"iterations": 7, "max_drop": 1.0}, "with --iterations 6, without --max-drop; "),
        ],
    )
    def test_other_options_are_refused(self, finished, caffe, change, said):
        with pytest.raises(
            RebirthError, match=f"this run began {said}go on like that, or remove .*retrain to"
        ):
            retrain(finished, dataclasses.replace(OPTIONS, **change), CaffeTrainer(caffe))

    def test_an_option_that_a_run_did_not_know_yet_is_as_if_not_given(self, finished, caffe):
        journal = finished / "retrain/journal.jsonl"
        text = journal.read_text()
        assert '"scores": 4.0' in text
        journal.write_text(text.replace('"scores": 4.0', '"older": 0'))
        assert retrain(finished, OPTIONS, CaffeTrainer(caffe)) is not None
        with pytest.raises(RebirthError, match=r"this run began with --scores 4\.0; go on like that"):
            retrain(finished, dataclasses.replace(OPTIONS, scores=2.0), CaffeTrainer(caffe))

    @pytest.mark.parametrize(
        "name",
        ["plan.yaml", "original/solver.prototxt", "original/settings.json", "original/weights.caffemodel"],
    )
    def test_other_files_are_refused(self, finished, caffe, name):
        path = finished / name
        if name == "plan.yaml":
            plan = plans.load(path)
            merges = tuple(dataclasses.replace(m, enabled=m.id != "conv2") for m in plan.merges)
            path.write_text(plans.dump(Plan(plan.net, merges)))
        elif name.endswith(".json"):
            path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        else:
            path.write_bytes(path.read_bytes() + b"\n")
        if name.endswith("caffemodel"):
            path.write_bytes((finished / "final/weights.caffemodel").read_bytes())
        with pytest.raises(
            RebirthError, match=f"{name}: has changed since this run began; put it back, or rem"
        ):
            retrain(finished, OPTIONS, CaffeTrainer(caffe))

    def test_comments_in_the_plan_may_change(self, finished, caffe):
        with (finished / "plan.yaml").open("a") as file:
            file.write("# seen\n")
        assert retrain(finished, OPTIONS, CaffeTrainer(caffe)) is not None

    def test_removing_the_runs_directory_starts_again(self, finished, played, monkeypatch, caffe):
        shutil.rmtree(finished / "retrain")
        run = Played(monkeypatch, finished, caffe, [0.5] * 9)
        run(iterations=5)
        assert json.loads((finished / "final/accuracy.json").read_text())["final"]["top1"] == 0.5


class TestStage:
    def test_it_stops_after_that_step_and_a_later_run_goes_on(self, played, home):
        run = played([0.9, 0.8, 0.7])
        assert run(until="conv1") is None
        assert not (home / "final").exists()
        assert [e["stage"] for e in tiny.journal(home) if e["event"] == "step"] == ["conv1"]
        count = len(run.runs)
        assert run(until="conv1") is None
        assert len(run.runs) == count
        outcome = run()
        assert [s["top1"] for s in outcome.steps] == [0.8, 0.7]
        assert [r.solver for r in run.runs] == ["retrain/01-conv1/solver.prototxt"] * 2 + [
            "retrain/02-conv2/solver.prototxt"
        ] * 2

    def test_an_unknown_one_is_refused_before_anything_is_done(self, played, home):
        with pytest.raises(
            RebirthError, match="--stage conv9: no step is called that; there are conv1, conv2"
        ):
            played([0.9])(until="conv9")
        assert not (home / "retrain/journal.jsonl").exists()

    def test_a_plan_s_step_may_be_called_like_the_fine_tune(self, played, home):
        plan = plans.load(home / "plan.yaml")
        renamed = tuple(
            dataclasses.replace(m, stage="fine-tune") if m.id == "conv1" else m for m in plan.merges
        )
        (home / "plan.yaml").write_text(plans.dump(Plan(plan.net, renamed)))
        run = played([0.9] * 5)
        outcome = run(final_iterations=2)
        assert [(s["stage"], s["merges"]) for s in outcome.steps] == [
            *(("fine-tune", ["conv1"]), ("conv2", ["conv2"]), ("fine-tune", []))
        ]
        assert len(run.runs) == 5


# --------------------------------------------------------------------------------------- what goes wrong


class TestRefusals:
    def test_without_weights_it_says_how_to_make_the_directory(self, tmp_path, fashion, home, caffe):
        (home / "original/weights.caffemodel").unlink()
        done = run(home)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {home}/original/weights.caffemodel: no such file; make the directory with "
            "rebirth_net.py --weights ... --train-data ... --test-data ...\n"
        )

    def test_a_directory_that_is_none_of_ours(self, tmp_path):
        done = run(tmp_path)
        assert done.returncode == 2
        assert "settings.json: no such file; make the directory with rebirth_net.py" in done.stderr
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"init": "inherit"}', '{"init": 1, "seed": "x"}'])
    def test_damaged_settings(self, home, caffe, text):
        (home / "original/settings.json").write_text(text)
        with pytest.raises(RebirthError, match=r"settings\.json: damaged; make the directory again"):
            retrain(home, OPTIONS, CaffeTrainer(caffe))

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--gpu", "x"], "'x' is not device numbers, like 0,1, nor all"),
            (["--gpu", "0,"], "'0,' is not device numbers"),
            (["--iterations", "0"], "'0' is no whole number from 1"),
            (["--segment", "-1"], "'-1' is no whole number from 1"),
            (["--threads", "no"], "'no' is no whole number from 1"),
            (["--max-drop", "-1"], "'-1' is no number of points from 0 to 100"),
            (["--max-drop", "nan"], "'nan' is no number of points"),
            (["--caffe", "/nonexistent"], "--caffe /nonexistent: no such file or directory"),
        ],
    )
    def test_wrong_options_are_one_line(self, home, flags, said):
        done = run(home, *flags)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (home / "retrain").exists()

    def test_help_needs_nothing_but_python(self):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(TOOL), "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        for heavy in ("numpy", "lmdb", "google.protobuf", "rich", "matplotlib"):
            assert f" {heavy}\n" not in done.stderr

    def test_caffe_s_failure_is_one_line_with_what_it_said_last(self, home, caffe):
        net = home / "original/train_val.prototxt"
        net.write_text(net.read_text().replace("mirror: true", 'mirror: true mean_file: "none"'))
        with pytest.raises(EngineError) as caught:
            retrain(home, OPTIONS, CaffeTrainer(caffe))
        said = str(caught.value)
        assert "retrain/01-conv1/solver.prototxt: Caffe failed: " in said
        assert "mean_file" in said
        assert "caffe.log)" in said
        assert "\n" not in said
        assert "Check failed" in (home / "retrain/01-conv1/caffe.log").read_text()
        assert events(home) == ["begin", "original"]

    def test_a_gpu_that_this_caffe_cannot_use(self, home, caffe):
        with pytest.raises(EngineError, match=r"Caffe failed: .*GPU"):
            retrain(home, dataclasses.replace(OPTIONS, gpus=("0",)), CaffeTrainer(caffe))

    def test_a_missing_database_is_named(self, home, caffe):
        net = home / "original/train_val.prototxt"
        net.write_text(net.read_text().replace("test.lmdb", "gone.lmdb"))
        with pytest.raises(RebirthError, match=r"gone\.lmdb: no such database"):
            retrain(home, OPTIONS, CaffeTrainer(caffe))

    def test_a_full_disk_is_one_line_and_the_run_goes_on_later(self, home, played, monkeypatch):
        run = played([0.9, 0.9, 0.9])

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Net, "write_weights", full)
            with pytest.raises(
                RebirthError, match="No space left on device; free some space and run the same"
            ):
                run()
        assert run().final.top1 == 0.9

    @pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
    def test_a_snapshot_that_caffe_could_not_write_whole(self, home, played, monkeypatch, keep):
        """It does not notice a full disk: we do, and the segment is done again."""
        run = played([0.9, 0.9, 0.9])
        real = vars(training)["train"]

        def cut(caffe: Caffe, what: Run, progress: Any) -> None:
            real(caffe, what, progress)
            made = snapshot_files("retrain/01-conv1/a1r1", what.until).weights
            size = (what.home / made).stat().st_size
            os.truncate(what.home / made, int(keep * size) if keep != 1 else size - 1)

        with monkeypatch.context() as patch:
            patch.setattr(training, "train", cut)
            with pytest.raises(EngineError, match="snapshot is missing or not whole; is the disk full"):
                run()
        assert events(home) == ["begin", "original"]
        assert run().final.top1 == 0.9


# ----------------------------------------------------------------------------------------- the child process


class TestTraining:
    def solver(self, folder: Path, fashion: Path, **changes: str) -> str:
        text = tiny.WHOLE.replace('"train_val', f'"{fashion}/train_val')
        (folder / "solver.prototxt").write_text(text)
        return "solver.prototxt"

    @pytest.mark.parametrize(
        ("gpus", "state", "wanted"),
        [
            (("0", "1"), None, ["-solver", "s", "-weights", "w", "-gpu", "0,1"]),
            (("all",), None, ["-solver", "s", "-weights", "w", "-gpu", "all"]),
            (("2", "3"), "x", ["-solver", "s", "-snapshot", "x", "-gpu", "2,3"]),
        ],
    )
    def test_several_gpus_are_caffe_s_own_business(self, gpus, state, wanted):
        caffe = Caffe(Path("/c/caffe"), Path("/c/python"))
        command, request = training._command(caffe, Run(Path(), "s", 9, "w", state, gpus=gpus))
        assert command == ["/c/caffe", "train", *wanted]
        assert request == ""

    def test_one_gpu_is_pycaffe_s(self):
        caffe = Caffe(Path("/c/caffe"), Path("/c/python"))
        command, request = training._command(caffe, Run(Path(), "s", 9, "w", gpus=("3",)))
        assert command[0] == "/c/python"
        assert json.loads(request)["gpu"] == 3
        assert json.loads(training._command(caffe, Run(Path(), "s", 9))[1])["gpu"] is None

    def test_several_gpus_need_the_command(self):
        with pytest.raises(EngineError, match="several GPUs need the caffe command"):
            training._command(Caffe(None, Path("/c/python")), Run(Path(), "s", 9, gpus=("all",)))

    def test_several_gpus_run_a_step_in_one_go_from_the_newest_whole_snapshot(self, played, monkeypatch):
        run = played([0.9] * 3)
        given: dict[str, Any] = {"gpus": ("0", "1"), "iterations": 30, "segment": 10}
        seen: list[str] = []
        real = vars(training)["train"]

        def killed(caffe: Caffe, what: Run, progress: Any) -> None:
            """Leaves whole snapshots at 10 and 20, a torn one at 30, and is killed."""
            seen.append((what.home / what.solver).read_text())
            for at in (10, 20, 30):
                real(caffe, dataclasses.replace(what, until=at), progress)
            (what.home / "retrain/01-conv1/a1r1_iter_30.solverstate").write_bytes(b"\x08")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(training, "train", killed)
            with pytest.raises(KeyboardInterrupt):
                run(**given)
        run.runs.clear()
        run(**given)
        assert "snapshot: 10\n" in seen[0]
        assert "max_iter: 30\n" in seen[0]
        assert run.runs[0].state == "retrain/01-conv1/a1r1_iter_20.solverstate"
        assert [(r.until, r.skip) for r in run.runs] == [(30, 0)] * 2

    def test_progress_is_what_caffe_displays(self, tmp_path, fashion, caffe):
        seen: list[tuple[int, float]] = []
        what = Run(tmp_path, self.solver(tmp_path, fashion), 120, log="caffe.log")
        (tmp_path / "train.lmdb").symlink_to(fashion / "train.lmdb")
        (tmp_path / "test.lmdb").symlink_to(fashion / "test.lmdb")
        train(caffe, what, lambda iteration, loss: seen.append((iteration, loss)))
        assert [iteration for iteration, _ in seen] == [0, 50, 100]
        assert seen[-1][1] < seen[0][1]
        assert "Iteration 100" in (tmp_path / "caffe.log").read_text()
        check_snapshot(tmp_path, snapshot_files("original", 120), 120, {"conv1", "aux", "fc"})

    def test_two_segments_are_one_training_where_nothing_is_random(self, tmp_path, fashion, caffe):
        """The data go on where they stopped, across the end of the database, and so does the momentum."""
        net = tiny.NET.replace("mirror: true crop_size: 24", "")
        net = net.replace('name: "drop"', 'include { phase: TEST } name: "drop"')
        (tmp_path / "train_val.prototxt").write_text(
            net.replace("train.lmdb", str(fashion / "train.lmdb")).replace(
                "batch_size: 16", "batch_size: 110"
            )
        )
        (tmp_path / "s").write_text(tiny.WHOLE)
        whole, half = snapshot_files("original", 5), snapshot_files("original", 2)
        train(caffe, Run(tmp_path, "s", 5), lambda i, x: None)
        at_once = (tmp_path / whole.weights).read_bytes()
        train(caffe, Run(tmp_path, "s", 2), lambda i, x: None)
        wrong = Run(tmp_path, "s", 5, state=half.state)
        for skip, same in ((2, True), (0, False), (1, False)):
            train(caffe, dataclasses.replace(wrong, skip=skip), lambda i, x: None)
            assert ((tmp_path / whole.weights).read_bytes() == at_once) is same, skip

    @pytest.mark.parametrize(
        ("line", "wanted"),
        [
            (
                "I1122 21:56:03.1 7 solver.cpp:239] Iteration 200 (5.2 iter/s, 19s/100 iters), loss = 0.57",
                1,
            ),
            ("I1122 solver.cpp:239] Iteration 200, loss = 0.57", 1),
            ("I1122 sgd_solver.cpp:105] Iteration 200, lr = 0.01", 0),
        ],
    )
    def test_the_log_of_every_caffe(self, line, wanted):
        found = training._PROGRESS.search(line)
        assert (found is not None) == wanted
        if found is not None:
            assert found.groups() == ("200", "0.57")

    @pytest.mark.parametrize("loss", ["nan", "-nan", "inf", "-inf", "1.#QNAN"])
    def test_a_loss_that_is_no_number_ends_the_child(self, tmp_path, loss):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\necho 'Iteration 7, loss = {loss}' >&2\nexec sleep 60\n")
        python.chmod(0o755)
        begun = time.monotonic()
        with pytest.raises(Diverged, match=r"became .* at iteration 7"):
            train(Caffe(None, python), Run(tmp_path, "s", 9), lambda i, x: None)
        assert time.monotonic() - begun < 20

    def test_a_caffe_that_is_killed_or_cannot_be_run(self, tmp_path):
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\nkill -9 $$\n")
        python.chmod(0o755)
        with pytest.raises(EngineError, match=r"s: Caffe failed: ended by SIGKILL \(out of memory\?\)"):
            train(Caffe(None, python), Run(tmp_path, "s", 9), lambda i, x: None)
        with pytest.raises(EngineError, match="cannot be run: No such file"):
            train(Caffe(None, tmp_path / "none"), Run(tmp_path, "s", 9), lambda i, x: None)

    def test_a_snapshot_is_read_back(self, unkilled, tmp_path):
        weights = next((unkilled / "retrain/01-conv1").glob("*.caffemodel"))
        shutil.copy(weights, tmp_path / "w")
        names = {r.name for r in caffemodel.read(weights).records if r.blobs}
        state = caffe_pb2.SolverState(iter=6, learned_net="w")
        (tmp_path / "s").write_bytes(state.SerializeToString())
        snapshot = Snapshot("w", "s")
        check_snapshot(tmp_path, snapshot, 6, names)
        for wrong in ((5, names), (6, {*names, "more"})):
            with pytest.raises(EngineError, match="not whole"):
                check_snapshot(tmp_path, snapshot, *wrong)
        data = bytearray(weights.read_bytes())
        at = data.index(caffemodel.read(weights).by_name()["fc"].blobs[0].array.tobytes())
        data[at : at + 4] = np.float32(np.nan).tobytes()
        (tmp_path / "w").write_bytes(data)
        with pytest.raises(Diverged, match="weights of layer 'fc' are no numbers any more at iteration 6"):
            check_snapshot(tmp_path, snapshot, 6, names)
        assert newest_snapshot(tmp_path, "x", names) is None
