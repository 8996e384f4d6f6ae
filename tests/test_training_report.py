"""What a person sees of training: lines that show life, a table, a picture."""

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rebirth_caffe import training_report as module
from rebirth_caffe.evaluate import Accuracy
from rebirth_caffe.journal import Journal
from rebirth_caffe.retrain import Outcome
from rebirth_caffe.training_report import Screen, draw, duration

STEP: dict[str, Any] = {
    "top1": 0.9,
    "top5": 0.99,
    "loss": 0.3,
    "kept": True,
    "iterations": 2000,
    "seconds": 75.0,
    "macs": 5_000_000,
}


@pytest.fixture
def clock(monkeypatch):
    """The seconds it is."""
    now = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def screen(seconds: float = 30) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    return Screen(file, seconds), file


class TestLines:
    def test_where_the_output_is_no_terminal_a_line_now_and_then_shows_life(self, clock):
        shown, file = screen()
        with shown:
            shown.tell("run", {"steps": [("conv1", 1000), ("conv2", 1000)], "done": []})
            shown.tell("original", {"top1": 0.915, "top5": 0.99, "loss": 0.25})
            shown.tell("step", {"stage": "conv1", "iterations": 1000})
            for i in range(0, 1000, 20):
                clock[0] += 2  # 0.1 s an iteration
                shown.tell("progress", {"stage": "conv1", "iteration": i, "of": 1000, "loss": 1 - i / 1000})
            shown.tell("result", {**STEP, "stage": "conv1"})
        lines = file.getvalue().splitlines()
        assert lines[0] == "original: top-1 91.50%, top-5 99.00%, loss 0.2500"
        assert lines[1] == (
            "step 1/2, conv1: iteration 280/1,000, loss 0.8100, top-1 91.50% (original), 1:12 left, "
            "about 2:52 for all steps"
        )
        assert lines[-1] == "conv1: top-1 90.00%, top-5 99.00%, loss 0.3000, 2,000 iterations, 1:15"
        assert len(lines) == 2 + 100 // 30

    def test_the_accuracy_of_the_last_step_is_in_the_next_one_s_line(self, clock):
        shown, file = screen(seconds=0)
        shown.tell("run", {"steps": [("a", 10), ("b", 10)], "done": ["a"]})
        shown.tell("result", {**STEP, "stage": "a"})
        shown.tell("result", {**STEP, "stage": "lost", "top1": 0.1, "kept": False})
        shown.tell("step", {"stage": "b", "iterations": 10})
        shown.tell("progress", {"stage": "b", "iteration": 5, "of": 10, "loss": 1.0})
        text = file.getvalue()
        assert "done before: a\n" in text
        assert ", rolled back\n" in text
        assert "step 2/2, b: iteration 5/10, loss 1.0000, top-1 90.00% after a\n" in text

    def test_a_step_that_begins_again_is_timed_again(self, clock):
        shown, file = screen(seconds=0)
        shown.tell("step", {"stage": "b", "iterations": 100})
        for iteration, second in ((0, 0), (50, 500), (0, 510), (50, 520)):
            clock[0] = second
            shown.tell("progress", {"stage": "b", "iteration": iteration, "of": 100, "loss": 1.0})
        assert file.getvalue().splitlines()[-1] == "b: iteration 50/100, loss 1.0000, 0:10 left"

    def test_resumed_in_the_middle_the_time_left_is_right(self, clock):
        shown, file = screen(seconds=0)
        shown.tell("step", {"stage": "b", "iterations": 100})
        for iteration, second in ((80, 0), (90, 5)):
            clock[0] = second
            shown.tell("progress", {"stage": "b", "iteration": iteration, "of": 100, "loss": 1.0})
        assert "0:05 left" in file.getvalue().splitlines()[-1]

    def test_testing_shows_life_too_and_long_lines_are_not_broken(self, clock):
        shown, file = screen()
        for done in range(0, 50_000, 100):
            clock[0] += 0.1
            shown.tell("testing", {"what": "x" * 200, "done": done, "of": 50_000})
        lines = file.getvalue().splitlines()
        assert len(lines) == 1
        assert lines[0].endswith("x: 29,900/50,000 images") or "images" in lines[0]

    def test_names_are_no_markup(self, clock):
        shown, file = screen(seconds=0)
        shown.tell("note", {"text": "[red]a[/b]"})
        assert file.getvalue() == "[red]a[/b]\n"

    def test_a_terminal_gets_one_live_line(self, monkeypatch, clock):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        file = io.StringIO()
        file.isatty = lambda: True  # type: ignore[method-assign]
        with Screen(file) as shown:
            assert shown.live
            shown.tell("step", {"stage": "b", "iterations": 100})
            shown.tell("progress", {"stage": "b", "iteration": 50, "of": 100, "loss": 1.25})
            shown.progress.refresh()
        assert "loss 1.2500" in file.getvalue()

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0:00"),
            (7.4, "0:07"),
            (3599, "59:59"),
            (3600, "1 h 00"),
            (11_100, "3 h 05"),
            (190_000, "2 d 4 h"),
        ],
    )
    def test_durations(self, seconds, text):
        assert duration(seconds) == text


def test_the_table_has_every_step_and_what_became_of_it():
    shown, file = screen()
    left = {**STEP, "stage": "c", "kept": False, "top1": None, "top5": None, "loss": None, "iterations": 0}
    steps: list[dict[str, Any]] = [{**STEP, "stage": "a"}, {**STEP, "stage": "b", "kept": False}, left]
    first, last = Accuracy(0.915, 0.995, 0.25, 100), Accuracy(0.91, 0.99, 0.26, 100)
    shown.summary(Outcome(first, last, steps, [], (7_000_000, 3_000_000)))
    rows = [line.split() for line in file.getvalue().splitlines() if "%" in line or " - " in line]
    assert rows[0] == ["original", "91.50%", "99.50%", "0.2500", "7.0"]
    assert rows[1] == ["a", "90.00%", "99.00%", "0.3000", "2,000", "1:15", "5.0"]
    assert rows[2][-2:] == ["rolled", "back"]
    assert rows[3][0] == "c"
    assert rows[3][-2:] == ["left", "out"]
    assert rows[4] == ["final", "91.00%", "99.00%", "0.2600", "3.0"]


def write(home: Path, steps: list[dict[str, Any]], segments: list[dict[str, Any]]) -> None:
    (home / "retrain").mkdir()
    journal = Journal(home / "retrain/journal.jsonl")
    journal.add("begin")
    journal.add("original", top1=0.915, top5=0.995, loss=0.25)
    for segment in segments:
        journal.add(**{"event": "segment", "attempt": 1, "rate": 1.0, **segment})
    for step in steps:
        journal.add("step", **STEP | step)


def segment(step: str, iteration: int, **more: Any) -> dict[str, Any]:
    losses = [(i, 1 / (1 + i)) for i in range(iteration - 100, iteration, 10)]
    return {"step": step, "iteration": iteration, "losses": losses, **more}


class TestPicture:
    def test_it_is_one_and_is_replaced_at_once(self, tmp_path):
        write(tmp_path, [{"step": "01-a", "stage": "a"}], [segment("01-a", 100), segment("02-b", 100)])
        (tmp_path / "training.png").write_text("old")
        assert draw(tmp_path) == tmp_path / "training.png"
        image = cv2.imread(str(tmp_path / "training.png"))
        assert image is not None
        assert image.shape[0] > 600
        assert image.shape[1] > 1000
        assert image.std() > 10
        assert sorted(p.name for p in tmp_path.iterdir()) == ["retrain", "training.png"]

    @pytest.mark.parametrize("name", ["retrain", "none"])
    def test_without_anything_trained_there_is_none(self, tmp_path, name):
        (tmp_path / name).mkdir()
        if name == "retrain":
            Journal(tmp_path / "retrain/journal.jsonl").add("begin")
        assert draw(tmp_path) is None
        assert not (tmp_path / "training.png").exists()

    def test_steps_follow_one_another_with_all_that_counts(self, tmp_path):
        """What diverged does not count; a longer training comes behind the first one."""
        write(
            tmp_path,
            [{"step": "01-a", "stage": "a", "kept": False}],
            [
                segment("01-a", 100, attempt=1, rate=1.0),
                *(segment("01-a", i, attempt=1, rate=0.1) for i in (100, 200)),
                *(segment("01-a", i, attempt=2, rate=0.1) for i in (100, 200)),
                segment("02-x", 100),
                *(
                    {"event": "curve", "step": "01-a", "attempt": a, "rate": r, "iteration": 100, "top1": t}
                    for a, r, t in ((1, 1.0, 0.1), (1, 0.1, 0.5), (2, 0.1, 0.75))
                ),
            ],
        )
        first, second = module._drawn(Journal(tmp_path / "retrain/journal.jsonl"))
        assert (first.start, first.length, first.stage) == (0, 400, "a")
        assert [x for x, _ in first.points] == list(range(0, 400, 10))
        assert (first.top1, second.top1) == ([(100, 50.0), (300, 75.0)], [])
        assert (second.start, second.length, second.stage, second.end) == (400, 100, "x", None)
        draw(tmp_path)

    def test_a_journal_that_is_being_written_is_left_alone(self, tmp_path):
        write(tmp_path, [], [segment("01-a", 100)])
        path = tmp_path / "retrain/journal.jsonl"
        with path.open("ab") as file:
            file.write(b'{"event": "seg')
        before = path.read_bytes()
        draw(tmp_path)
        assert path.read_bytes() == before

    def test_one_wild_value_does_not_flatten_all_others(self):
        calm = [1.0] * 99
        top = module._top([*calm, 50.0])
        assert top is not None
        assert top < 3
        assert module._top([1.0, 2.0]) == pytest.approx(2.1)
        assert module._top([]) is None

    def test_the_running_median(self):
        values = list(np.arange(100.0))
        assert module._smooth(values)[50] == 50
        assert module._smooth([1.0]) == [1.0]
        assert module._smooth([]) == []


def test_the_json_of_a_run_is_plain():
    outcome = Outcome(Accuracy(0.9, 1.0, 0.1, 5), Accuracy(0.8, 1.0, 0.2, 5), [dict(STEP)], [], (9, 8))
    found = json.loads(json.dumps(outcome.to_json()))
    assert found["original"] == {"top1": 0.9, "top5": 1.0, "loss": 0.1, "images": 5, "macs": 9}
    assert found["final"]["macs"] == 8
    assert found["steps"] == [STEP]
