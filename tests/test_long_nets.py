"""Nets of any length: what they cost grows no faster than they do."""

import cProfile
import pstats
import time
from pathlib import Path

import pytest

from rebirth_caffe.rebirth import rebirth
from tests.nets import conv, dropout, fc, layer, lrn, net, norm, relu, scale


def residual(blocks: int) -> str:
    """A net of eight layers a block, each of which has something to fold, to drop and to merge."""
    lines, at = [], "data"
    for i in range(blocks):
        c = f"c{i}"
        lines += [conv(c, at, 3, 3, "pad: 1"), norm(f"b{i}", c), scale(f"s{i}", c), relu(f"r{i}", c)]
        lines += [dropout(f"d{i}", c, f"d{i}"), lrn(f"n{i}", f"d{i}")]
        lines += [layer(f"e{i}", "Eltwise", f"n{i} {at}"), relu(f"f{i}", f"e{i}")]
        at = f"e{i}"
    return net(*lines, fc("fc", at), size=(1, 3, 8, 8)).text()


@pytest.mark.parametrize("exact", [True, False])
def test_ten_times_the_layers_cost_at_most_eleven_times_as_much(exact, tmp_path: Path):
    """Counted in calls, which, unlike seconds, are the same on every machine and at every run."""
    calls = []
    for blocks in (50, 500):
        path = tmp_path / f"{blocks}.prototxt"
        path.write_text(residual(blocks))
        profile = cProfile.Profile()
        result = profile.runcall(rebirth, path, exact=exact)
        assert len(result.merges) == (2 if exact else 3) * blocks
        calls.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
    assert calls[1] <= 11 * calls[0]


def test_ten_times_as_many_activations_in_a_row_too(tmp_path: Path):
    calls = []
    for count in (200, 2000):
        path = tmp_path / f"{count}.prototxt"
        path.write_text(net(conv("c", "data", 3, 3), *(relu(f"r{i}", "c") for i in range(count))).text())
        profile = cProfile.Profile()
        profile.runcall(rebirth, path)
        calls.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
    assert calls[1] <= 11 * calls[0]


def test_ten_thousand_layers_take_seconds(tmp_path: Path):
    (tmp_path / "long.prototxt").write_text(residual(1250))
    start = time.process_time()
    rebirth(tmp_path / "long.prototxt")
    assert time.process_time() - start < 15
