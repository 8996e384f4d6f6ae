"""A collection of nets, our own in corpus/ first, through the whole tool and real Caffe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rebirth_caffe.corpus import FAILED, OK, REFUSED, Checked, Limits, check
from rebirth_caffe.engines.caffe import Caffe, CaffeEngine
from rebirth_caffe.net import Net

ROOT = Path(__file__).resolve().parent.parent
CORPUS = Path(__file__).parent / "corpus"
PATHS = sorted(CORPUS.rglob("*.prototxt"))


@pytest.fixture(scope="module")
def checked(caffe: Caffe) -> dict[str, Checked]:
    results = check(PATHS, CaffeEngine(caffe), jobs=2)
    return {str(one.path.relative_to(CORPUS)): one for one in results}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_our_corpus(path, checked):
    one = checked[str(path.relative_to(CORPUS))]
    if path.parent.name == "refused":
        why = path.read_text().splitlines()[0].removeprefix("# refused: ")
        assert (one.status, why in one.note) == (REFUSED, True)
        assert one.caffe.startswith("refuses it")
        return
    assert (one.status, one.note, one.written) == (OK, "", True)
    if path.parent.name == "forks":
        assert not one.built
        assert one.caffe.startswith(("same in the ", "not asked: everything in it depends"))
    else:
        assert (one.caffe.split(",")[0], one.built) == ("same", True)


def test_what_our_corpus_has_to_merge(checked):
    """Exact and other merges stop where they have to, and nowhere else."""
    counts = {name: (one.exact, one.merges) for name, one in checked.items() if one.exact or one.merges}
    assert counts == json.loads((CORPUS / "merges.json").read_text(), object_hook=_pairs)


def _pairs(data: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values) for name, values in data.items()}


def test_a_shared_blob_is_never_changed(checked):
    assert "conv_l" in (CORPUS / "quirks/shared_params.prototxt").read_text()
    one = checked["quirks/shared_params.prototxt"]
    assert one.exact == 1  # the convolution whose named weights nobody else has


GOOD = (CORPUS / "quirks/no_fixed_input.prototxt").read_text()


def test_limits_hold_and_one_file_is_no_others_business(caffe, tmp_path):
    (tmp_path / "a.prototxt").write_text(GOOD)
    relu = 'layer { name: "x" type: "ReLU" bottom: "up" top: "up" }\n'
    (tmp_path / "b.prototxt").write_text(GOOD + relu * 20_000)
    paths = [tmp_path / "b.prototxt", tmp_path / "a.prototxt"]
    slow, quick = check(paths, CaffeEngine(caffe), limits=Limits(seconds=1))
    assert (slow.status, slow.note) == (FAILED, "takes more than 1 s")
    assert (quick.status, quick.caffe) == (OK, "same")
    (late,) = check([tmp_path / "a.prototxt"], CaffeEngine(caffe), limits=Limits(caffe_seconds=0.01))
    assert (late.status, late.caffe) == (OK, "not known: Caffe takes more than 0.01 s")
    tight = Limits(seconds=60, memory=Limits().memory // 20)
    (small,) = check([tmp_path / "b.prototxt"], None, limits=tight)
    assert small.status == FAILED
    assert small.note.startswith(("MemoryError", "its process ended with"))  # Python may not get to say it


def test_what_must_not_be_is_found(caffe, tmp_path, monkeypatch):
    """Shapes that are not Caffe's, and exact merges that change what is computed."""
    path = tmp_path / "net.prototxt"
    path.write_text(GOOD)
    from rebirth_caffe import shapes
    from rebirth_caffe.init import exact

    monkeypatch.setitem(shapes.RULES, "Deconvolution", lambda layer, bottoms: [(1, 2, 3, 3)])
    (wrong,) = check([path], CaffeEngine(caffe))
    assert (wrong.status, wrong.note) == (FAILED, "blob 'up' is (1, 2, 2, 2) in Caffe, (1, 2, 3, 3) here")
    monkeypatch.undo()
    affine = exact._own_affine
    monkeypatch.setattr(exact, "_own_affine", lambda layer: (1.01 * affine(layer)[0], affine(layer)[1]))
    (wrong,) = check([path], CaffeEngine(caffe))
    assert wrong.status == FAILED
    assert wrong.note.startswith("output 'up' differs by ")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = ROOT / "tools/check_corpus.py"
    return subprocess.run(
        [sys.executable, str(tool), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/good.prototxt").write_text(GOOD)
    (tmp_path / "solver.prototxt").write_text('net: "x"\n')
    done = command(tmp_path, "--no-caffe", "--jobs", 1)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, _, totals, *_ = done.stdout.splitlines()
    assert first.split(" s  ")[1] == "deep/good.prototxt  5 layers, 0 merges, 1 exact"
    assert second.startswith("refused ")
    assert totals == "2 files: 1 ok, 1 refused, 0 failed"
    done = command(tmp_path, "--no-caffe", "--json")
    assert [one["status"] for one in json.loads(done.stdout)] == ["ok", "refused"]
    done = command(tmp_path / "none")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path}/none: no such directory; give one with prototxts\n",
    )


def test_stock_caffe_has_the_types_we_say_it_has(in_caffe):
    from rebirth_caffe.shapes import STOCK

    assert set(in_caffe("result = list(caffe.layer_type_list())")) == STOCK


def test_every_net_of_ours_is_small():
    assert all(len(path.read_bytes()) < 4000 for path in PATHS)
    assert len(PATHS) > 25
    assert Net.load(CORPUS / "eras/v0.prototxt").converted
