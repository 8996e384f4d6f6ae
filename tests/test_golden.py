"""What the zoo becomes, to the byte: a change that alters it shows as a diff of tests/golden/.

    REGENERATE_GOLDEN=1 python -m pytest tests/test_golden.py

writes the files anew, for review with ``git diff``.
"""

import os
from pathlib import Path

import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import rebirth

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "prototxts"
GOLDEN = Path(__file__).with_name("golden")
NETS = ("bvlc_googlenet", "bvlc_reference_caffenet", "bvlc_alexnet", "resnet_50")
CASES = [(net, kind, "keep") for net in NETS for kind in ("deploy", "train_val")] + [
    ("bvlc_googlenet", "deploy", "auto"),
    ("bvlc_googlenet", "deploy", "cover"),
]


@pytest.mark.parametrize(("net", "kind", "kernel"), CASES)
def test_the_zoo_becomes_what_it_became(net, kind, kernel):
    result = rebirth(ZOO / net / f"{kind}.prototxt", kernel=kernel)
    name = kind if kernel == "keep" else f"{kind}_{kernel}"
    files = {
        f"{name}.prototxt": result.net.text(),
        f"{name}_plan.yaml": plans.dump(result.plan),
    }
    if kind == "train_val":
        files[f"{name}_deployed.prototxt"] = result.deploy.text()
    for file, text in files.items():
        path = GOLDEN / net / file
        if os.environ.get("REGENERATE_GOLDEN"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        assert path.read_text("utf-8") == text, f"{path} differs; see this file's head"


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", ["deploy", "train_val"])
def test_what_is_not_in_a_merge_is_the_same_to_the_byte(net, kind):
    before = Net.load(ZOO / net / f"{kind}.prototxt")
    result = rebirth(ZOO / net / f"{kind}.prototxt")
    touched = {name for merge in result.merges for name in merge.layers}
    dropped = {top for m in result.merges if m.kind == "drop" for top in m.absorbs}
    after = {id(layer): layer.text for layer in result.net.layers}
    rest = [layer.text for layer in before.layers if layer.name not in touched]
    assert dropped <= touched
    assert rest
    assert set(rest) <= set(after.values())
