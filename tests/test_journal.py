"""The journal: what is in it has happened, and only one process writes it."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rebirth_caffe.errors import RebirthError
from rebirth_caffe.journal import Journal, sole_user, sync


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def test_events_are_read_back_in_order(path):
    journal = Journal(path)
    assert journal.events == []
    assert not path.exists()
    journal.add("segment", step="a", iteration=5, rate=0.1)
    journal.add("segment", step="b", iteration=5, rate=0.1)
    journal.add("segment", step="a", iteration=10, rate=1.0)
    again = Journal(path)
    assert again.events == journal.events
    assert [e["iteration"] for e in again.all("segment", step="a")] == [5, 10]
    assert again.all("segment", step="a", rate=0.1) == again.events[:1]
    last = again.find("segment", step="a")
    assert last is not None
    assert last["iteration"] == 10
    assert again.find("step") is None
    assert again.all("segment", nothing=1) == []


def test_every_event_is_on_disk_before_add_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    Journal(path).add("begin")
    assert synced[0] == len('{"event": "begin"}\n')
    assert len(synced) > 1  # the new file's directory, too


@pytest.mark.parametrize("left", [b'{"event": "se', b"\0" * 40, b'{"event": "segment"}', b"\xff\xfe", b"{"])
def test_a_last_line_that_was_cut_never_happened(path, left):
    Journal(path).add("begin")
    whole = path.read_bytes()
    path.write_bytes(whole + left)
    onlooker = Journal(path, read_only=True)
    assert [e["event"] for e in onlooker.events] == ["begin"]
    assert path.read_bytes() == whole + left
    journal = Journal(path)
    assert [e["event"] for e in journal.events] == ["begin"]
    assert path.read_bytes() == whole
    journal.add("original")
    assert [e["event"] for e in Journal(path).events] == ["begin", "original"]


@pytest.mark.parametrize("line", [b"{", b"\xff", b"5", b"null", b'"event"', b"{}", b"[]", b"\0\0"])
def test_other_damage_is_named_with_its_line_and_left_alone(path, line):
    Journal(path).add("begin")
    path.write_bytes(path.read_bytes() + line + b'\n{"event": "step"}\n')
    before = path.read_bytes()
    with pytest.raises(RebirthError, match=r"journal\.jsonl:2: damaged; remove .* to train again"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_cut_through_any_byte_leaves_a_whole_journal(path):
    journal = Journal(path)
    for i in range(3):
        journal.add("segment", iteration=i, name="ä\n")
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        events = Journal(path).events
        assert events == journal.events[: data[:cut].count(b"\n")]


def hold(folder: Path, seconds: float, ready: str) -> None:
    with sole_user(folder):
        Path(ready).touch()
        time.sleep(seconds)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestSoleUser:
    def test_a_second_process_is_refused_and_the_first_one_s_end_frees_it(self, tmp_path):
        ready = tmp_path / "ready"
        process = multiprocessing.get_context("fork").Process(
            target=hold, args=(tmp_path / "x", 60, str(ready))
        )
        process.start()
        try:
            wait_for(ready)
            with (
                pytest.raises(RebirthError, match=r"x: another process is at work here"),
                sole_user(tmp_path / "x", patience=0.1),
            ):
                pass
            process.kill()
            with sole_user(tmp_path / "x"):
                pass
        finally:
            process.kill()
            process.join()

    def test_it_waits_for_a_process_that_is_just_ending(self, tmp_path):
        ready = tmp_path / "ready"
        process = multiprocessing.get_context("fork").Process(
            target=hold, args=(tmp_path / "x", 0.3, str(ready))
        )
        process.start()
        wait_for(ready)
        with sole_user(tmp_path / "x", patience=20):
            pass
        process.join()

    def test_a_child_that_inherited_the_lock_keeps_it(self, tmp_path):
        with sole_user(tmp_path / "x") as lock:
            child = subprocess.Popen(
                [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
            )
        try:
            with pytest.raises(RebirthError, match="another process"), sole_user(tmp_path / "x", patience=0):
                pass
        finally:
            child.communicate()
        with sole_user(tmp_path / "x", patience=5):
            pass

    def test_a_file_system_without_locks_says_so(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.raises(OSError, match="not supported"), sole_user(tmp_path / "x"):
            pass


def test_sync_reaches_files_and_their_directories(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("os.fsync", lambda handle: seen.append(Path(f"/proc/self/fd/{handle}").readlink()))
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps(name))
    sync(tmp_path / "a", tmp_path / "b")
    assert seen == [tmp_path / "a", tmp_path / "b", tmp_path]
