"""Random fork-join nets: whatever is merged, what is read keeps its size, and real Caffe takes the result."""

from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebirth_caffe import plan as plans
from rebirth_caffe.derive import deploy, is_trainable
from rebirth_caffe.net import Net
from rebirth_caffe.plan import Plan
from rebirth_caffe.shapes import conv_size, infer, pool_size
from tests.nets import compute, difference, fc, layer, with_weights

Draw = Any
POINTWISE = ("ReLU", "ReLU", "ReLU", "LRN", "BatchNorm", "Scale", "PReLU", "ELU", "Dropout", "TanH")
# Of a second reader: what it needs, and where it is in the net.
PARAMS = "convolution_param { num_output: 4 kernel_size: 1 } pooling_param { kernel_size: 2 stride: 2 }"
RULES = ("", "", "include { phase: TRAIN }", "include { phase: TEST }", 'include { stage: "x" }')


@dataclass(frozen=True)
class At:
    """A blob on the way: name, channels, height and width."""

    name: str
    channels: int
    size: tuple[int, ...]
    read: bool = False  # by another layer already: none may work in place on it


@dataclass
class Builder:
    """Draws a net layer by layer."""

    draw: Draw
    lines: list[str] = field(default_factory=list)
    count: int = 0

    def one(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{self.one('', 'a/', 'a/b_')}{kind}{self.count}"

    def add(self, kind: str, at: At, params: str = "", inplace: bool = False, extra: str = "") -> str:
        name = self.name(kind.lower())
        top = at.name if inplace else name
        self.lines.append(layer(name, kind, at.name, top, f"{params} {extra}"))
        return top

    def conv(self, at: At, kernel: tuple[int, ...], stride: int, pad: tuple[int, ...], n: int = 0) -> At:
        n = n or self.one(4, 6, 8, 12, 16)
        group = self.one(1, 1, 1, 1, 2) if at.channels % 2 == 0 else 1
        dilation = self.one(1, 1, 1, 2) if stride == 1 and max(kernel) > 1 else 1
        extent = tuple(dilation * (k - 1) + 1 for k in kernel)
        pad = tuple(dilation * p for p in pad) if dilation > 1 else pad
        size = tuple(conv_size(s, e, stride, p) for s, e, p in zip(at.size, extent, pad, strict=True))
        if min(size) < 1:
            return at
        params = (
            f"num_output: {n} kernel_h: {kernel[0]} kernel_w: {kernel[1]} pad_h: {pad[0]} pad_w: {pad[1]} "
            f"stride: {stride} group: {group} dilation: {dilation} {self.one('', '', 'bias_term: false')}"
        )
        return At(self.add("Convolution", at, f"convolution_param {{ {params} }}"), n, size)

    def pool(self, at: At, kernel: int, stride: int, pad: int) -> At:
        size = tuple(pool_size(s, kernel, stride, pad) for s in at.size)
        if min(size) < 1 or max(size) < 1:
            return at
        params = f"kernel_size: {kernel} stride: {stride} pad: {pad} pool: {self.one('MAX', 'MAX', 'AVE')}"
        return At(self.add("Pooling", at, f"pooling_param {{ {params} }}"), at.channels, size)

    def pointwise(self, at: At) -> At:
        kind = self.one(*POINTWISE)
        inplace = self.draw(st.booleans()) and kind != "LRN" and not at.read
        slope = self.one(0, 0, 0.1)
        params = {
            "Scale": "scale_param { bias_term: true }",
            "ReLU": f"relu_param {{ negative_slope: {slope} }}",
        }
        top = self.add(kind, at, params.get(kind, ""), inplace)
        return At(top, at.channels, at.size)

    def same(self, at: At, depth: int) -> At:
        """A step that keeps the size."""
        kind = self.one("conv", "conv", "conv", "pool", "point", "point", "block" if depth else "point")
        if kind == "conv":
            k = self.one((1, 1), (1, 1), (3, 3), (5, 5), (1, 3), (3, 1))
            return self.conv(at, k, 1, (k[0] // 2, k[1] // 2))
        if kind == "pool":
            return self.pool(at, 3, 1, 1)
        return self.block(at, depth - 1) if kind == "block" else self.pointwise(at)

    def halving(self, at: At) -> At:
        """A step that may end a branch of stride 2."""
        if self.draw(st.booleans()):
            k = self.one(1, 3, 5)
            return self.conv(at, (k, k), 2, (k // 2, k // 2))
        return self.pool(at, self.one(2, 3), 2, self.one(0, 0, 1))

    def free(self, at: At, depth: int) -> At:
        kind = self.one("conv", "same", "same", "pool", "pool", "block", "block", "shortcut", "second")
        if kind == "conv":
            k = self.one(1, 2, 3, 4, 5)
            return self.conv(at, (k, k), self.one(1, 1, 2), (self.draw(st.integers(0, k - 1)),) * 2)
        if kind == "pool":
            k = self.one(2, 3)
            return self.pool(at, k, self.one(1, 2, 2, k), self.draw(st.integers(0, 1)))
        if kind == "block":
            return self.block(at, depth)
        if kind == "shortcut":
            out = self.conv(at, (3, 3), 1, (1, 1), at.channels)
            name = self.name("sum")
            if out.name == at.name or out.size != at.size:
                return replace(at, read=True)
            self.lines.append(layer(name, "Eltwise", f"{at.name} {out.name}"))
            return At(name, at.channels, at.size)
        if kind == "second":
            self.add(self.one("Convolution", "Pooling", "ReLU"), at, PARAMS, extra=self.one(*RULES))
            return replace(at, read=True)
        return self.same(at, depth)

    def block(self, at: At, depth: int) -> At:
        halved = self.draw(st.integers(0, 3)) == 0
        ends, at = [], replace(at, read=True)
        for _ in range(self.draw(st.integers(2, 4))):
            end = at
            for _ in range(self.draw(st.integers(0, 3))):
                end = self.same(end, depth)
            end = self.halving(end) if halved else end
            if self.draw(st.booleans()):
                end = At(self.add("ReLU", end, inplace=not end.read), end.channels, end.size)
            ends.append(end)
        ends = [end for end in ends if end.size == ends[0].size]
        name = self.name("join")
        self.lines.append(layer(name, "Concat", " ".join(end.name for end in ends)))
        return At(name, sum(end.channels for end in ends), ends[0].size)


@st.composite
def random_net(draw: Draw) -> Net:
    """A net with blocks, shortcuts and second readers; deploy, or a train_val with a loss and an accuracy."""
    b = Builder(draw)
    at = At("data", draw(st.integers(1, 4)), (draw(st.integers(7, 20)), draw(st.integers(7, 20))))
    dims = (1, at.channels, *at.size)
    trained = draw(st.integers(0, 3)) == 0
    shape = f"shape {{ {' '.join(f'dim: {d}' for d in dims)} }}"
    if trained:
        b.lines.append(
            f'layer {{ name: "data" type: "DummyData" top: "data" top: "label" dummy_data_param '
            f'{{ {shape} shape {{ dim: 1 }} data_filler {{ type: "gaussian" }} data_filler {{ }} }} }}'
        )
        at = replace(at, read=True)
    else:
        b.lines.append(f'layer {{ name: "data" type: "Input" top: "data" input_param {{ {shape} }} }}')
    for _ in range(draw(st.integers(2, 7))):
        at = b.free(at, 1)
    b.lines.append(fc("fc", at.name))
    if trained:
        b.lines.append(layer("loss", "SoftmaxWithLoss", "fc label"))
        b.lines.append(layer("accuracy", "Accuracy", "fc label", None, "include { phase: TEST }"))
    return Net.parse("\n".join(b.lines) + "\n", "random.prototxt")


OPTIONS = st.fixed_dictionaries(
    {"kernel": st.sampled_from(["keep", "auto", "cover"]), "reduce": st.sampled_from([0.25, 0.5, 1.0])}
)
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def sizes(net: Net) -> list[dict[str, Any]]:
    """Blob -> shape in every state of the net."""
    return [{value.name: shape for value, shape in infer(view).items()} for view in net.graph.views]


def all_enabled(net: Net, plan: Plan) -> list[Plan]:
    """The plan, and the plan with each of its offers taken."""
    offers = [merge.id for merge in plan.merges if not merge.enabled]
    return [plan, *(plans.select(net, plan, only=[id_]) for id_ in offers)]


@settings(SLOW, max_examples=150)
@given(net=random_net(), options=OPTIONS, init=st.sampled_from(["inherit", "xavier"]))
def test_what_is_read_keeps_its_size_and_the_plan_says_it_all(net, options, init, tmp_path_factory):
    net = with_weights(net)
    proposal = plans.propose(net, **options)
    for plan in all_enabled(net, proposal.plan):
        reborn = plans.apply(net, plan, init)
        for before, after in zip(sizes(net), sizes(reborn), strict=True):
            assert {name: after[name] for name in before if name in after} == {
                name: before[name] for name in before if name in after
            }
        for view, new in zip(net.graph.views, reborn.graph.views, strict=True):
            assert {v.name for v in view.outputs} == {v.name for v in new.outputs}

        path = tmp_path_factory.getbasetemp() / "plan.yaml"
        path.write_text(plans.dump(plan))
        loaded = plans.load(path)
        assert loaded == plan
        again = plans.apply(net, loaded, init)
        assert again.text() == reborn.text()
        blobs = [[(x.name, b.array.tobytes()) for x in n.layers for b in x.blobs] for n in (again, reborn)]
        assert blobs[0] == blobs[1]


@settings(SLOW, max_examples=60)
@given(net=random_net(), options=OPTIONS)
def test_real_caffe_takes_what_became_of_it(net, options, in_caffe, tmp_path_factory):
    net = with_weights(net)
    reborn = plans.apply(net, plans.propose(net, **options).plan)
    pair = [deploy(net), deploy(reborn)] if is_trainable(net) else [net, reborn]
    found = compute(in_caffe, tmp_path_factory.getbasetemp(), pair)
    for one, values in zip(pair, found, strict=True):
        ours = {v.name: shape for v, shape in infer(one.graph.view(1)).items()}
        assert ours == {name: values[name].shape for name in ours}
    for value in pair[0].graph.view(1).outputs:
        assert found[1][value.name].shape == found[0][value.name].shape


@settings(SLOW, max_examples=60)
@given(net=random_net())
def test_exact_merges_compute_the_same_in_real_caffe(net, in_caffe, tmp_path_factory):
    net = with_weights(net)
    plan = plans.propose(net, exact=True).plan
    path = tmp_path_factory.getbasetemp() / "exact.yaml"
    path.write_text(plans.dump(plan))
    assert plans.load(path) == plan
    reborn = plans.apply(net, plan)
    pair = [deploy(net), deploy(reborn)] if is_trainable(net) else [net, reborn]
    found = compute(in_caffe, tmp_path_factory.getbasetemp(), pair)
    for value in pair[0].graph.view(1).outputs:
        assert difference(found[0][value.name], found[1][value.name]) < 1e-5
