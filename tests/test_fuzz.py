"""A part of what tests/fuzz/fuzz.py does for long: the kept corpus, and a few thousand mutations of it."""

from pathlib import Path

import pytest

from tests.fuzz.fuzz import MEGABYTES, READERS, Figures, corpus, one, peak_megabytes, run


@pytest.mark.parametrize("reader", READERS)
def test_every_file_of_the_corpus_is_read_or_refused_in_one_line(reader, tmp_path):
    assert sum(one(READERS[reader], data, tmp_path / "input") for data in corpus(reader)) > 0


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files_are_read_or_refused_in_one_line(reader):
    figures = Figures()
    run(reader, seed=1, numbers=range(4000), figures=figures, seconds=15)
    assert figures.inputs > 100
    assert 0 < figures.read <= figures.inputs
    assert peak_megabytes() < MEGABYTES


def test_an_input_follows_from_its_number(monkeypatch):
    """What broke a rule once is made again by its reader, seed and number."""
    seen: list[bytes] = []
    monkeypatch.setitem(READERS, "log", lambda path: seen.append(path.read_bytes()))
    for numbers in (range(5), range(4, 5)):
        run("log", seed=3, numbers=numbers, figures=Figures())
    assert len(set(seen)) == 5
    assert seen[4] == seen[5]


def test_a_reader_that_breaks_a_rule_is_found(monkeypatch, tmp_path):
    def fails(path: Path) -> None:
        raise KeyError("x")

    monkeypatch.setitem(READERS, "log", fails)
    with pytest.raises(AssertionError, match="log 0 0: b'"):
        run("log", seed=0, numbers=range(1), figures=Figures())
    figures = Figures()
    run("log", seed=0, numbers=range(2), figures=figures, crashes=tmp_path / "crashes")
    assert figures.broken == figures.inputs == 2
    assert "KeyError" in (tmp_path / "crashes/log-0-1.txt").read_text()
