"""Weights files: every storage read, kept byte for byte, exchanged with real Caffe; broken ones refused."""

import filecmp
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebirth_caffe import caffemodel
from rebirth_caffe.caffemodel import Blob, Record, Weights, read, write_hdf5
from rebirth_caffe.errors import WeightsError
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Layer, Net
from rebirth_caffe.plan import Plan
from rebirth_caffe.schema import caffe_pb2
from rebirth_caffe.shapes import all_param_shapes
from rebirth_caffe.verify import verify

# A layer of every kind of weight blob.
TEXT = """name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 4 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 6 kernel_size: 3 group: 2 } }
layer { name: "norm" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "PReLU" bottom: "conv" top: "conv" prelu_param { channel_shared: true } }
layer { name: "factor" type: "Scale" bottom: "conv" top: "factor" scale_param { num_axes: 0 } }
layer { name: "fc" type: "InnerProduct" bottom: "factor" top: "fc" inner_product_param { num_output: 5 } }
"""
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "conv": [(6, 2, 3, 3), (6,)],
    "norm": [(6,), (6,), (1,)],
    "scale": [(6,), (6,)],
    "relu": [()],
    "factor": [()],
    "fc": [(5, 216), (5,)],
}


def values(seed: int = 0) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(seed)
    return {n: [random.normal(size=shape).astype("f4") for shape in shapes] for n, shapes in SHAPES.items()}


def arrays(weights: Weights) -> dict[str, list[np.ndarray]]:
    return {record.name: [blob.array for blob in record.blobs] for record in weights.records if record.blobs}


def same(a: dict[str, list[np.ndarray]], b: dict[str, list[np.ndarray]]) -> bool:
    """Equal bit for bit, shapes too."""
    return a.keys() == b.keys() and all(
        [(x.shape, x.tobytes()) for x in a[name]] == [(y.shape, y.tobytes()) for y in b[name]] for name in a
    )


def current(seed: int = 0) -> bytes:
    """What a Caffe of today writes."""
    net = caffe_pb2.NetParameter(name="small")
    for text_layer in Net.parse(TEXT).layers:
        layer = net.layer.add()
        layer.CopyFrom(text_layer.param)
        for array in values(seed).get(layer.name, []):
            # Caffe gives a scalar no shape at all.
            blob = layer.blobs.add(data=array.ravel())
            blob.shape.dim.extend(array.shape)
            if not array.shape:
                blob.ClearField("shape")
    return net.SerializeToString()


def v1(seed: int = 0) -> bytes:
    """What a Caffe of 2014 wrote: V1 layers, four dimensions."""
    net = caffe_pb2.NetParameter(name="small")
    kinds = {"conv": 4, "norm": 15, "scale": 26, "relu": 18, "factor": 26, "fc": 14}
    net.layers.add(name="data", type=5)
    for name, blobs in values(seed).items():
        layer = net.layers.add(name=name, type=kinds[name])
        for array in blobs:
            num, channels, height, width = (1,) * (4 - array.ndim) + array.shape
            layer.blobs.add(num=num, channels=channels, height=height, width=width, data=array.ravel())
    return net.SerializeToString()


def v0(seed: int = 0) -> bytes:
    """What a Caffe of 2013 wrote: a layer inside of a V1 layer."""
    net = caffe_pb2.NetParameter(name="small")
    for old in caffe_pb2.NetParameter.FromString(v1(seed)).layers:
        layer = net.layers.add().layer
        layer.name, layer.type = old.name, {"conv": "conv", "fc": "innerproduct"}.get(old.name, "relu")
        layer.blobs.extend(old.blobs)
    return net.SerializeToString()


def hdf5(path: Path, seed: int = 0) -> None:
    """What Caffe writes as HDF5, in another order than the net's."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, blobs in reversed(values(seed).items()):
            group = file.create_group(f"data/{name}")
            for i, array in enumerate(blobs):
                group.create_dataset(str(i), data=array)
        file.create_group("data/data")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    prototxt = tmp_path / "small.prototxt"
    prototxt.write_text(TEXT)
    (tmp_path / "current.caffemodel").write_bytes(current())
    (tmp_path / "v1.caffemodel").write_bytes(v1())
    return {"net": prototxt, "current": tmp_path / "current.caffemodel", "V1": tmp_path / "v1.caffemodel"}


# ---- reading and writing ----------------------------------------------------------------------------------


def test_current_storage(files, tmp_path):
    weights = read(files["current"])
    assert (weights.name, weights.storage) == ("small", "current")
    assert [(r.name, r.type) for r in weights.records] == [(x.name, x.type) for x in Net.parse(TEXT).layers]
    assert same(arrays(weights), values())


def test_v1_storage(files, tmp_path):
    weights = read(files["V1"])
    assert (weights.name, weights.storage) == ("small", "V1")
    types = {"data": "Data", "conv": "Convolution", "norm": "LRN", "scale": "Power", "relu": "ReLU",
             "factor": "Power", "fc": "InnerProduct"}  # fmt: skip
    assert {r.name: r.type for r in weights.records} == types
    legacy = arrays(weights)
    assert legacy["fc"][0].shape == (1, 1, 5, 216)
    assert legacy["fc"][1].shape == (1, 1, 1, 5)
    net = Net.load(files["net"], files["V1"])
    fitted = {x.name: [b.reshaped(s) for b, s in zip(x.blobs, SHAPES[x.name], strict=True)]
              for x in net.layers if x.blobs}  # fmt: skip
    assert same(fitted, values())


@pytest.mark.parametrize("storage", ["current", "V1"])
def test_a_net_written_unchanged_keeps_every_blobs_bytes(storage, files, tmp_path):
    out = tmp_path / "out.caffemodel"
    Net.load(files["net"], files[storage]).write_weights(out)
    if storage == "current":
        assert out.read_bytes() == files[storage].read_bytes()
    before = caffe_pb2.NetParameter.FromString(files[storage].read_bytes())
    after = caffe_pb2.NetParameter.FromString(out.read_bytes())
    assert [x.name for x in after.layer] == [x.name for x in Net.parse(TEXT).layers]
    stored = before.layer if storage == "current" else before.layers
    blobs = {x.name: [b.SerializeToString() for b in x.blobs] for x in stored}
    assert {x.name: [b.SerializeToString() for b in x.blobs] for x in after.layer} == blobs


def test_layers_that_did_not_change_keep_their_bytes_in_a_changed_net(files, tmp_path):
    """Unknown fields of a fork, diffs, double precision: nothing is touched."""
    message = caffe_pb2.NetParameter.FromString(current())
    conv = message.layer[1]
    conv.blobs[0].diff.extend([1, 2, 3])
    conv.blobs[1].double_data.extend(conv.blobs[1].data)
    del conv.blobs[1].data[:]
    raw = conv.SerializeToString() + b"\xc2\x3e\x03new" + b"\xc8\x3e\x07"  # fields 1000 and 1001
    file = b"".join(
        b"\xa2\x06" + caffemodel._varint(len(r)) + r
        for r in (raw if x is conv else x.SerializeToString() for x in message.layer)
    )
    files["current"].write_bytes(b"\n\x05small" + file)
    net = Net.load(files["net"], files["current"])
    assert net.layer("conv").blobs[1].array.dtype == np.float32
    assert net.layer("conv").blobs[1].array.tobytes() == values()["conv"][1].tobytes()

    new = np.full((5, 216), 7, "f4")

    def swap(layer: Layer) -> list[Layer]:
        if layer.name != "fc":
            return [layer]
        reborn = Layer.from_text(layer.text)
        reborn.record = Record(layer.name, layer.type, [Blob(new), layer.blobs[1]])
        return [reborn]

    out = tmp_path / "out.caffemodel"
    net.replace(swap).write_weights(out)
    assert raw in out.read_bytes()
    assert read(out).by_name()["fc"].blobs[0].array.tobytes() == new.tobytes()
    kept = [bytes(r.raw) for r in read(out).records if r.raw is not None and r.name != "fc"]
    assert kept == [
        bytes(r.raw) for r in read(files["current"]).records if r.raw is not None and r.name != "fc"
    ]


def test_a_rewired_layer_is_stored_with_its_new_wiring(files, tmp_path):
    net = Net.load(files["net"], files["current"])
    net.replace(lambda x: [x.rewired(["other"], ["fc"]) if x.name == "fc" else x]).write_weights(
        tmp_path / "out"
    )
    stored = caffe_pb2.NetParameter.FromString((tmp_path / "out").read_bytes()).layer[-1]
    assert (stored.name, list(stored.bottom)) == ("fc", ["other"])
    assert same(arrays(read(tmp_path / "out")), values())


def test_values_not_packed_and_in_pieces(tmp_path):
    array = np.arange(6, dtype="f4")
    doubles = array.astype("f8")
    blobs = [
        b"".join(b"\x2d" + x.tobytes() for x in array),  # value by value
        b"\x2a\x08" + array[:2].tobytes() + b"".join(b"\x2d" + x.tobytes() for x in array[2:5]) + b"\x2a\x00"
        b"\x2a\x04" + array[5:].tobytes(),
        b"\x42\x30" + doubles.tobytes(),
        b"".join(b"\x41" + x.tobytes() for x in doubles),
    ]  # fmt: skip
    shape = b"\x3a\x04\x0a\x02\x02\x03"
    layer = b"\x0a\x01x" + b"".join(b"\x3a" + bytes([len(b + shape)]) + b + shape for b in blobs)
    path = tmp_path / "w"
    path.write_bytes(b"\xa2\x06" + caffemodel._varint(len(layer)) + layer)
    (record,) = read(path).records
    for blob in record.blobs:
        assert blob.array.dtype == np.float32
        assert blob.array.tolist() == [[0, 1, 2], [3, 4, 5]]
    # and protobuf agrees
    stored = caffe_pb2.NetParameter.FromString(path.read_bytes()).layer[0].blobs
    assert [list(b.data) or list(b.double_data) for b in stored] == [list(range(6))] * 4


def test_blobs_by_hand():
    for array in (np.float32(3), np.zeros((0, 3), "f4"), np.arange(24, dtype="f4").reshape(2, 3, 4).T):
        blob = Blob(array)  # type: ignore[arg-type]
        assert blob.shape == array.shape
        message = caffe_pb2.BlobProto.FromString(b"".join(bytes(piece) for piece in blob.wire()))
        assert tuple(message.shape.dim) == array.shape
        assert np.array(message.data, "f4").tobytes() == array.tobytes()
        again = Blob(raw=memoryview(message.SerializeToString()))
        assert (again.shape, again.array.tobytes()) == (array.shape, array.tobytes())


def test_the_last_layer_of_a_name_counts_and_strangers_are_kept_apart(files):
    message = caffe_pb2.NetParameter.FromString(current())
    message.layer.add(name="loss1/conv", type="Convolution").blobs.add(data=[1]).shape.dim.append(1)
    message.layer.add(name="nothing", type="ReLU")
    message.layer.add().CopyFrom(message.layer[1])
    message.layer[-1].blobs[1].data[0] = 99
    files["current"].write_bytes(message.SerializeToString())
    net = Net.load(files["net"], files["current"])
    assert net.layer("conv").blobs[1].array[0] == 99
    assert [record.name for record in net.strangers] == ["loss1/conv"]


# ---- with real Caffe --------------------------------------------------------------------------------------

SAVE = """
net = caffe.Net(prototxt, 1)
for blobs in net.params.values():
    for blob in blobs:
        blob.data[...] = np.random.standard_normal(blob.data.shape)
net.save(weights)
"""
DUMP = """
net = caffe.Net(prototxt, 1, weights=weights)
np.savez(out, **{f"{name}:{i}": b.data for name, blobs in net.params.items() for i, b in enumerate(blobs)})
result = None
"""


def from_npz(path: Path) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    with np.load(path) as stored:
        for key in sorted(stored):
            found.setdefault(key.split(":")[0], []).append(stored[key])
    return found


@pytest.mark.parametrize("storage", ["current", "V1"])
def test_caffe_loads_what_we_write(storage, files, in_caffe, tmp_path):
    out, dump = tmp_path / "out.caffemodel", tmp_path / "dump.npz"
    Net.load(files["net"], files[storage]).write_weights(out)
    in_caffe(DUMP, prototxt=str(files["net"]), weights=str(out), out=str(dump))
    assert same(from_npz(dump), values())


def test_caffe_loads_new_blobs(files, in_caffe, tmp_path):
    net = Net.load(files["net"])
    for layer in net.layers:
        layer.record = Record(layer.name, layer.type, [Blob(a) for a in values(3).get(layer.name, [])])
    out, dump = tmp_path / "out.caffemodel", tmp_path / "dump.npz"
    net.write_weights(str(out))
    in_caffe(DUMP, prototxt=str(files["net"]), weights=str(out), out=str(dump))
    assert same(from_npz(dump), values(3))
    assert {x.name: s for x, s in all_param_shapes(net).items() if s} == SHAPES


CONV = 'type: "Convolution" bottom: "{}" top: "{}" convolution_param {{ num_output: 3 kernel_size: 3 }}'
ONE_NAME = f"""input: "data" input_shape {{ dim: 1 dim: 3 dim: 9 dim: 9 }}
layer {{ name: "x" {CONV.format("data", "a")} }}
layer {{ name: "x" type: "ReLU" bottom: "a" top: "a" }}
layer {{ name: "y" {CONV.format("a", "b")} }}
layer {{ name: "x" {CONV.format("b", "c")} }}
"""


def test_of_layers_of_one_name_the_first_has_the_weights(in_caffe, tmp_path):
    """As in Caffe, which leaves the others to their fillers, zeros here."""
    net = Net.parse(ONE_NAME)
    fill_missing(net)
    assert [len(layer.blobs) for layer in net.layers] == [2, 0, 2, 0]
    path, weights = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
    net.write(path)
    net.write_weights(weights)
    assert [(r.name, len(r.blobs)) for r in read(weights).records] == [("x", 2), ("y", 2)]
    loaded = Net.load(path, weights)
    assert [len(layer.blobs) for layer in loaded.layers] == [2, 0, 2, 0]
    said = in_caffe(
        "layers = caffe.Net(prototxt, 1, weights=weights).layers\n"
        "result = [[float(b.data.sum()) for b in layer.blobs] for layer in layers if layer.type != 'Input']",
        prototxt=str(path),
        weights=str(weights),
    )
    assert said[3] == [0, 0]
    for layer, sums in zip(loaded.layers[:3], said, strict=False):
        assert sums == pytest.approx([blob.array.sum() for blob in layer.blobs], rel=1e-5, abs=1e-5)
    said = verify(loaded, Plan("", ())).reason
    assert said.endswith("layer 'x' has the name of one above it: no file has its weights")
    for blob in net.layers[0].blobs:
        blob.array[:] = np.nan
    net.write_weights(weights)
    with pytest.raises(WeightsError, match=r"NaN or infinite in 'x' \(84\);"):
        Net.load(path, weights)


def test_weights_that_caffe_cannot_give_to_layers_of_one_name_are_refused(in_caffe, tmp_path):
    path, weights = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
    path.write_text(ONE_NAME)
    in_caffe("caffe.Net(prototxt, 1).save(weights)\nresult = 0", prototxt=str(path), weights=str(weights))
    with pytest.raises(in_caffe.Refused, match="Incompatible number of blobs for layer x"):
        in_caffe("result = caffe.Net(prototxt, 1, weights=weights)", prototxt=str(path), weights=str(weights))
    with pytest.raises(WeightsError, match="layer 'x' is in it twice, with other blobs, so that"):
        Net.load(path, weights)
    h5 = tmp_path / "net.caffemodel.h5"
    write_hdf5(h5, [Record("x", "", [Blob(np.ones((3, 3, 3, 3), "f4")), Blob(np.ones(3, "f4"))])])
    with pytest.raises(WeightsError, match=r":5: layer 'x' is not the only one .* give it a name of its own"):
        Net.load(path, h5)


def test_we_read_what_caffe_saves(files, in_caffe, tmp_path):
    out, dump = tmp_path / "out.caffemodel", tmp_path / "dump.npz"
    in_caffe(SAVE + DUMP, prototxt=str(files["net"]), weights=str(out), out=str(dump))
    found = arrays(read(out))
    assert same(found, from_npz(dump))
    assert found.keys() == SHAPES.keys()
    rewritten = tmp_path / "again.caffemodel"
    Net.load(files["net"], out).write_weights(rewritten)
    assert rewritten.read_bytes() == out.read_bytes()


# ---- other storage ----------------------------------------------------------------------------------------


def test_v0_storage(tmp_path):
    path = tmp_path / "v0.caffemodel"
    path.write_bytes(v0())
    weights = read(path)
    assert weights.storage == "V0"
    assert {r.name: r.type for r in weights.records}.items() >= {
        "conv": "Convolution",
        "fc": "InnerProduct",
    }.items()
    (tmp_path / "net").write_text(TEXT)
    net = Net.load(tmp_path / "net", path)
    fitted = {x.name: [b.reshaped(s) for b, s in zip(x.blobs, SHAPES[x.name], strict=True)]
              for x in net.layers if x.blobs}  # fmt: skip
    assert same(fitted, values())


def test_hdf5_storage(files, tmp_path):
    path = tmp_path / "any.name"
    hdf5(path)
    weights = read(path)
    assert (weights.name, weights.storage) == ("any", "HDF5")
    assert same(arrays(weights), values())
    net, out = Net.load(files["net"], path), tmp_path / "out.caffemodel"
    net.write_weights(out)
    assert same(arrays(read(out)), values())


def test_caffe_loads_our_hdf5_and_we_read_caffes(files, in_caffe, tmp_path):
    ours, caffes, dump = tmp_path / "ours.caffemodel.h5", tmp_path / "caffes.h5", tmp_path / "dump.npz"
    caffemodel.write_hdf5(ours, read(files["current"]).records)
    code = SAVE.replace("net.save(weights)", "net.load_hdf5(ours); net.save_hdf5(weights)") + DUMP
    given = {"prototxt": str(files["net"]), "ours": str(ours), "weights": str(caffes), "out": str(dump)}
    in_caffe(code, **given)
    assert same(from_npz(dump), values())
    assert same(arrays(read(caffes)), values())


def test_caffe_loads_old_blobs_as_hdf5(in_caffe, tmp_path):
    """In HDF5 it wants today's shapes."""
    (tmp_path / "v0").write_bytes(v0())
    records = [record for record in read(tmp_path / "v0").records if record.name in ("conv", "fc")]
    caffemodel.write_hdf5(tmp_path / "w.h5", records)
    kept = TEXT.split('layer { name: "norm"')[0] + TEXT[TEXT.index('layer { name: "fc"') :]
    (tmp_path / "net").write_text(kept.replace('bottom: "factor"', 'bottom: "conv"'))
    found = tmp_path / "dump.npz"
    in_caffe(DUMP, prototxt=str(tmp_path / "net"), weights=str(tmp_path / "w.h5"), out=str(found))
    assert same(from_npz(found), {name: values()[name] for name in ("conv", "fc")})


def test_a_layer_with_a_slash_is_read_and_not_written(tmp_path):
    """Caffe would take the part before the slash for the layer's name."""
    import h5py

    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["data/conv1/7x7_s2/0"] = np.ones(3, "f4")
        file["data/conv1/7x7_s2/1"] = np.ones(2, "f8")
    (record,) = [r for r in read(tmp_path / "in.h5").records if r.blobs]
    assert (record.name, [b.shape for b in record.blobs]) == ("conv1/7x7_s2", [(3,), (2,)])
    with pytest.raises(WeightsError, match="HDF5 has no place for a layer called 'conv1/7x7_s2'; write a"):
        caffemodel.write_hdf5(tmp_path / "out.h5", [record])
    assert not (tmp_path / "out.h5").exists()


def test_hdf5_that_is_no_caffemodel(tmp_path):
    import h5py

    path = tmp_path / "w.h5"

    def refused(*fill: tuple[str, object]) -> str:
        with h5py.File(path, "w") as file:
            for name, value in fill:
                file[name] = value
        with pytest.raises(WeightsError) as caught:
            read(path)
        return str(caught.value).removeprefix(f"{path}: ")

    one = np.ones(1, "f4")
    assert refused(("x", one)) == "HDF5 without a group 'data'; not a caffemodel"
    assert refused(("data/conv/2", one)).startswith("layer 'conv': a blob is missing; damaged")
    assert refused(("data/conv/weight", one)).startswith("layer 'conv': 'weight' is no blob of numbers")
    assert refused(("data/conv/0", np.ones(1, "i4"))).startswith("layer 'conv': '0' is no blob of numbers")
    assert refused(("data/conv/0", h5py.ExternalLink("/etc/passwd", "/"))).startswith(
        "layer 'conv': '0' is a link to elsewhere"
    )
    assert refused(("data/conv", h5py.SoftLink("/data"))).startswith(
        "layer '': 'conv' is a link to elsewhere"
    )
    assert refused(("data/" + "a/" * 20 + "0", one)).endswith("groups more than 16 deep; not a caffemodel")
    with h5py.File(path, "w") as file:
        file.create_dataset("data/conv/0", shape=(2**20, 2**20), dtype="f4", chunks=(2**10, 2**10))
    with pytest.raises(WeightsError, match=r"blob 0 of \(1048576, 1048576\) is larger than the file"):
        read(path)
    whole = path.read_bytes()
    for size in (9, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match="HDF5 that cannot be read: "):
            read(path)


def test_hdf5_whose_library_comes_to_no_end():
    """Closing this damaged file takes all memory there is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(WeightsError, match=r"endless\.h5: HDF5 .*caffemodel"):
        read(Path(__file__).with_name("endless.h5"))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5


def test_hdf5_whose_reader_dies(tmp_path, monkeypatch):
    hdf5(tmp_path / "w.h5")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WeightsError, match=r"its library came to no end; damaged"):
        read(tmp_path / "w.h5")


def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(WeightsError, match=f"{path}: is a pipe or a device; give a file"):
            read(path)


def test_a_file_of_two_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "w.caffemodel"
    with path.open("wb") as file:
        file.truncate(2**31)
    start = time.process_time()
    with pytest.raises(WeightsError, match=r"w.caffemodel: 2.1 GB; a binary caffemodel ends below 2 GB"):
        read(path)
    assert time.process_time() - start < 1


def test_two_gigabytes_are_not_written(tmp_path):
    blob = Blob(np.zeros(1, "f4"))
    blob.raw = memoryview(bytes(2**20))  # 2^11 times
    record = Record("a", "X", [blob] * 2**11)
    with pytest.raises(WeightsError, match=r"would be 2\.1 GB; a binary caffemodel ends below 2 GB"):
        caffemodel.write(tmp_path / "w", caffe_pb2.NetParameter(), [(b"", record)])
    assert not (tmp_path / "w").exists()


def test_a_large_file_is_held_once(tmp_path):
    """In a process of its own; what other tests have used is memory it could have again."""
    path, count = tmp_path / "w.caffemodel", 50_000_000
    blob = b"\x3a\x06\x0a\x04" + caffemodel._varint(count) + b"\x2a" + caffemodel._varint(4 * count)
    layer = b"\x0a\x01a\x3a" + caffemodel._varint(len(blob) + 4 * count) + blob
    head = b"\xa2\x06" + caffemodel._varint(len(layer) + 4 * count) + layer
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 4 * count)
    code = (
        "import resource, sys; from rebirth_caffe import caffemodel, upgrade\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); w = caffemodel.read(sys.argv[1]); total = w.records[0].blobs[0].array.sum()\n"
        "caffemodel.write(upgrade.Path(sys.argv[2]), *upgrade.upgrade_weights(w, ''))\n"
        "print(len(w.source), 1024 * (peak() - before))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    size, more = map(int, done.stdout.split())
    assert size == len(head) + 4 * count
    assert more < 1.1 * size
    assert filecmp.cmp(path, tmp_path / "out", shallow=False)


def test_weights_that_are_no_numbers_are_reported_by_layer(files):
    message = caffe_pb2.NetParameter.FromString(current())
    by_name = {layer.name: layer for layer in message.layer}
    by_name["conv"].blobs[0].data[3] = float("nan")
    by_name["conv"].blobs[1].data[0] = float("-inf")
    by_name["fc"].blobs[1].data[2] = float("inf")
    message.layer.add(name="stranger").blobs.add(data=[float("nan")])
    files["current"].write_bytes(message.SerializeToString())
    with pytest.raises(WeightsError) as caught:
        Net.load(files["net"], files["current"])
    assert str(caught.value).startswith(
        f"{files['current']}: weights that are NaN or infinite in 'conv' (2), 'fc' (1); "
    )


# ---- what does not fit ------------------------------------------------------------------------------------


def refusal(files: dict[str, Path], change: dict[str, str]) -> str:
    text = TEXT
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    files["net"].write_text(text)
    with pytest.raises(WeightsError) as caught:
        Net.load(files["net"], files["current"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_output: 5": "num_output: 6"},
            "'fc' blob 0 is 5x216, the net needs 6x216; weights of another net,",
        ),
        ({"kernel_size: 3": "kernel_size: 1"}, "'conv' blob 0 is 6x2x3x3, the net needs 6x2x1x1"),
        ({"group: 2": "group: 1"}, "'conv' blob 0 is 6x2x3x3, the net needs 6x4x3x3"),
        ({"group: 2": "bias_term: false"}, "'conv' has 2 blobs, the net needs 1; weights of another net?"),
        ({"channel_shared: true": ""}, "'relu' blob 0 is scalar, the net needs 6;"),
    ],
)
def test_blobs_that_do_not_fit_name_the_layer_and_both_shapes(change, message, files):
    said = refusal(files, change)
    assert said.startswith(f"{files['current']}: layer {message}")


def test_weights_of_another_net(files):
    names = {f'name: "{name}"': f'name: "my_{name}"' for name in SHAPES}
    assert refusal(files, names) == (
        f"{files['current']}: no layer with weights is called as one of {files['net']}; wrong pair?"
    )


# ---- broken files -----------------------------------------------------------------------------------------


def complaint(data: bytes, path: Path) -> str | None:
    """What is wrong with a file, in one line, or None; no other error may come."""
    path.write_bytes(data)
    try:
        for record in read(path).records:
            for blob in record.blobs:
                assert blob.array.size * 4 <= len(data)
    except WeightsError as error:
        return str(error)
    return None


@pytest.mark.parametrize("data", [current(), v1()], ids=["current", "V1"])
def test_a_file_cut_short_is_refused_wherever_the_cut_is(data, tmp_path):
    path = tmp_path / "w"
    message = caffe_pb2.NetParameter.FromString(data)
    layers = message.layer or message.layers
    # Between two layers a file looks complete; only the net can tell.
    ends, end = set(), len(data)
    for layer in reversed(layers):
        ends.add(end)
        size = layer.ByteSize()
        end -= size + len(caffemodel._varint(size)) + (2 if message.layer else 1)
    whole = 0
    for cut in [*range(200), *range(200, len(data), 7), *range(len(data) - 50, len(data))]:
        said = complaint(data[:cut], path)
        assert (said is None) == (cut in ends)
        assert said is None or (said.startswith(f"{path}: ") and "\n" not in said)
        assert said is None or any(words in said for words in ("cut short", "holds no layers")), said
        whole += said is None
    assert whole < len(layers)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no layers; not a caffemodel, or an empty one"),
        (b"\n\x05small", "holds no layers"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 that cannot be read: "),
        (b"name: 'x'\nlayer { name: 'a' }\n", "not a caffemodel"),
        (b"PK\x03\x04" + bytes(50), "not a caffemodel"),
        (b"\x7fELF" + bytes(50), "not a caffemodel"),
        (bytes(100), "no field at byte"),
        (b"\xff" * 100, "no number at byte 10; not a caffemodel, or damaged"),
        (caffe_pb2.BlobProto(num=1, data=[1, 2, 3]).SerializeToString(), "a mean file or a solver's state?"),
        (caffe_pb2.SolverState(iter=5, learned_net="x").SerializeToString(), "a mean file or a solver's"),
        (b"\xa2\x06\xff\xff\xff\xff\x0fabc", "cut short: 4294967295 bytes announced, 3 left"),
        (b"\xa2\x06\x06\x3a\x04\x2a\x02ab", "layer 1 blob 0: 2 bytes are no whole number of values"),
        (b"\xa2\x06\x04\x3a\x02\x3a\x7f", "cut short: 127 bytes announced, 0 left"),
        (b"\xa2\x06\x06\x3a\x04\x3a\x02\x0a\x7f", "broken shape"),
        (b"\xa2\x06\x08\x0a\x01x\x3a\x03\x3a\x01\x07", "broken shape"),
        # Announced dimensions of 2^40 and a negative one
        (b"\xa2\x06\x0c\x3a\x0a\x3a\x08\x0a\x06\x80\x80\x80\x80\x80\x20", "1099511627776 but 0 values"),
        (b"\xa2\x06\x11\x3a\x0f\x3a\x0d\x0a\x0b\x00" + b"\xff" * 9 + b"\x01", "-1 but 0 values; damaged"),
        (
            b"\xa2\x06\x0e\x3a\x0c\x08\x80\x80\x80\x80\x08\x10\x01\x18\x01\x20\x01",
            "shape 2147483648x1x1x1 but 0 values; damaged",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_refused_for_what_they_are(data, message, tmp_path):
    said = complaint(data, tmp_path / "w")
    assert said is not None
    assert message in said
    assert said.startswith(f"{tmp_path / 'w'}: ")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: no such file; check the path of the weights"):
        read(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"is a directory; give the .caffemodel file in it"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be read: Not a directory"):
        read(tmp_path / "file" / "w")


def test_fields_of_another_wire_type_are_none_of_ours(tmp_path):
    """As in protobuf a known number of an unknown kind is passed over; nothing is allocated for it."""
    layer = b"\x0a\x01x" + b"\x38\x05"  # blobs as a number
    layer += (
        b"\x3a\x0c" + b"\x38\xff\xff\xff\xff\x0f" + b"\x28\xff\xff\xff\xff\x0f"
    )  # shape and data as numbers
    v1_layer = b"\x22\x01y" + b"\x2a\x03abc"  # a type as bytes
    path = tmp_path / "w"
    path.write_bytes(b"\xa2\x06" + bytes([len(layer)]) + layer + b"\x12" + bytes([len(v1_layer)]) + v1_layer)
    first, second = read(path).records
    assert (first.name, [blob.shape for blob in first.blobs]) == ("x", [(0,)])
    assert (second.name, second.type, second.blobs) == ("y", "", [])


def test_a_damaged_file_costs_neither_time_nor_memory(tmp_path, grown):
    """A million values one by one, and dimensions of a terabyte."""
    unpacked = b"\x2d\x00\x00\x80\x3f" * 1_000_000
    blob = unpacked + b"\x3a\x06\x0a\x04\xc0\x84\x3d\x01"
    layer = b"\x3a" + caffemodel._varint(len(blob)) + blob
    start = time.process_time()
    said = complaint(b"\xa2\x06" + caffemodel._varint(len(layer)) + layer, tmp_path / "w")
    assert said is None
    assert (
        complaint(b"\xa2\x06\x0c\x3a\x0a\x3a\x08\x0a\x06\x80\x80\x80\x80\x80\x20", tmp_path / "w") is not None
    )
    assert time.process_time() - start < 20
    assert grown() < 100


@st.composite
def mutated(draw):
    data = bytearray(draw(st.sampled_from([current(), v1()])))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from([60, 600, 6000])))))
        new = draw(
            st.one_of(
                st.binary(max_size=3), st.sampled_from([b"\xff" * 5, b"\x80" * 9, b"\x0b", b"\xa2\x06"])
            )
        )
        data[at : at + draw(st.integers(0, 3))] = new
    return bytes(data)


@settings(max_examples=300, deadline=20_000)
@given(data=mutated())
def test_a_mutated_file_is_read_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "mutated.caffemodel"
    if complaint(data, path) is None:
        net = path.with_name("mutated.prototxt")
        net.write_text(TEXT)
        try:
            loaded = Net.load(net, path)
        except WeightsError:
            return
        loaded.write_weights(path)
        assert same(
            arrays(read(path)), {x.name: [b.array for b in x.blobs] for x in loaded.layers if x.blobs}
        )


@given(st.binary(max_size=200))
def test_garbage_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "garbage"
    said = complaint(data, path)
    assert said is None or (said.startswith(f"{path}: ") and "\n" not in said)
