"""AdamW on shards: what one process has on whole tensors, on real ranks and cut by hand."""

import contextlib
import copy
import itertools
import math
import sys
import warnings
from functools import cache

import pytest
import torch
from helpers.problems import same, tensors
from helpers.ranks import pool
from torch import nn

from stiefel.kernels import LOW_PRECISION_DTYPES
from stiefel.optimizers import GaLore, Muon
from stiefel.optimizers._driver import adamw, adamw_write
from stiefel.optimizers._driver.adamw_write import places_of
from stiefel.optimizers._driver.layout import box_of, layout_of, local, part

NAN = float("nan")
SHAPES = [(7,), (2,), (1,), (), (6, 10), (5, 3), (1, 40), (40, 1), (3, 5, 4), (9, 64)]
ALIGNED = [(192,), (2,), (), (24, 192), (12, 8, 48)]
"""Shards of these begin and end where torch's fused kernel on CPU has full vectors."""
MODES = ["stochastic", "kahan", "eco"]
FORMS = {
    "default": {},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}
CUTS = [
    *itertools.product([(2,), (3,), (4,)], ["0", "1", "r"]),
    *itertools.product([(2, 2)], ["r0", "0r", "01", "10", "00", "r1"]),
]
"""Shapes of meshes, and per axis the dimension that it cuts or r for replicas."""
every_cut = pytest.mark.parametrize(
    ("sizes", "cuts"), [pytest.param(*x, id=f"{'x'.join(map(str, x[0]))}-{x[1]}") for x in CUTS]
)
every_form = pytest.mark.parametrize("form", FORMS)
every_mode = pytest.mark.parametrize("mode", MODES)
some_cuts = pytest.mark.parametrize(
    ("sizes", "cuts"), [((2,), "0"), ((3,), "1"), ((2, 2), "r0"), ((2, 2), "01")]
)


def on_ranks(function, sizes, *args):
    """What the function returns on the ranks of a mesh."""
    return pool(math.prod(sizes)).run(function, sizes, *args)


# what ranks run -------------------------------------------------------------------------------


@cache
def mesh_of(sizes):
    """The mesh of this shape, made once."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))


def placements_of(cuts, ndim):
    """Placements; a dimension that the tensor does not have is not cut."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if c == "r" or int(c) >= ndim else Shard(int(c)) for c in cuts]


def cut(X, sizes, cuts):
    """A DTensor of a tensor that all ranks have, cut by torch and without communication."""
    from torch.distributed.tensor import distribute_tensor

    placements = placements_of(cuts, X.dim())
    return distribute_tensor(X.detach().clone(), mesh_of(sizes), placements, src_data_rank=None)


def drawn(shape, seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(shape, generator=draw, dtype=torch.float64)
    if dtype.is_complex:
        X = torch.complex(X, torch.randn(shape, generator=draw, dtype=torch.float64))
    return X.to(dtype)


def problem(shapes, dtype, steps=3):
    """Whole weights, and per step their gradients."""
    weights = [nn.Parameter(drawn(shape, i, dtype)) for i, shape in enumerate(shapes)]
    series = [
        [0.1 * drawn(shape, 100 * t + i, dtype) for i, shape in enumerate(shapes)]
        for t in range(1, steps + 1)
    ]
    return weights, series


def build(params, mode="auto", *, group=None, **options):
    """AdamW on all of these parameters."""
    options = {"lr": 1e-2, "adamw_betas": (0.9, 0.99), "weight_decay": 0.1, **options}
    return Muon([{"params": params, "rule": "adamw", **(group or {})}], write=mode, **options)


def by_torch(params, **options):
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, **options}
    return torch.optim.AdamW(params, **options)


def step(optimizer, params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.step()


def assert_held(shards, wholes, what, rtol=0.0):
    """Compare what this rank holds with its part of whole tensors, and state with state."""
    for i, (shard, whole) in enumerate(zip(shards, wholes, strict=True)):
        held = shard.to_local() if hasattr(shard, "placements") else shard
        expected = whole
        if hasattr(shard, "placements"):
            from torch.distributed.tensor import distribute_tensor

            expected = distribute_tensor(
                whole.detach().clone(), shard.device_mesh, shard.placements, src_data_rank=None
            ).to_local()
        assert held.dtype == expected.dtype
        assert held.numel() == expected.numel()
        held, expected = held.detach().flatten(), expected.detach().flatten()
        torch.testing.assert_close(
            held, expected, rtol=rtol, atol=0.0, equal_nan=True, msg=f"{what}: tensor {i}"
        )


def assert_alike(shards, split, wholes, whole, what, rtol=0.0):
    """Weights and state of two optimizers agree."""
    assert_held(shards, wholes, f"{what}, weights", rtol)
    for p, q in zip(shards, wholes, strict=True):
        entry, expected = split.state[p], whole.state[q]
        assert entry.keys() == expected.keys()
        assert same(entry["step"], expected["step"])
        names = [name for name in entry if name != "step"]
        assert_held(
            [entry[x] for x in names], [expected[x] for x in names], f"{what}, {names}", rtol
        )


@contextlib.contextmanager
def chunks_of(count):
    """Small chunks, so that small parameters are cut, too."""
    limits = {(adamw_write, "MAX_CHUNK_NUMEL"): count, (adamw, "MAX_COPIED_NUMEL"): count}
    limits[adamw, "MAX_JOINED_NUMEL"] = count // 4
    old = {key: getattr(*key) for key in limits}
    for (module, name), value in limits.items():
        setattr(module, name, value)
    yield
    for (module, name), value in old.items():
        setattr(module, name, value)


# against torch --------------------------------------------------------------------------------


def follows_torch(rank, world, sizes, cuts, shapes, dtype, form, options, rtol):
    weights, series = problem(shapes, dtype)
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    split = build(shards, "nearest", **FORMS[form], **options)
    whole = by_torch(weights, **FORMS[form], **options)
    for t, grads in enumerate(series):
        step(whole, weights, grads)
        step(split, shards, [cut(G, sizes, cuts) for G in grads])
        assert_alike(shards, split, weights, whole, f"step {t}", rtol)


@every_cut
@pytest.mark.parametrize("form", ["foreach", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_have_the_bits_of_torch_on_one_process(sizes, cuts, form, dtype):
    on_ranks(follows_torch, sizes, cuts, SHAPES, dtype, form, {}, 0.0)


@some_cuts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
def test_other_dtypes(sizes, cuts, dtype):
    on_ranks(follows_torch, sizes, cuts, SHAPES, dtype, "default", {}, 0.0)


@every_cut
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_shards_have_the_bits_of_full_vectors(sizes, cuts, dtype):
    on_ranks(follows_torch, sizes, cuts, ALIGNED, dtype, "fused", {}, 0.0)
    # the kernel on CPU rounds what is left over after full vectors in another order
    rtol = 8 * torch.finfo(dtype).eps
    on_ranks(follows_torch, sizes, cuts, SHAPES, dtype, "fused", {}, rtol)


@some_cuts
@every_form
@pytest.mark.parametrize(
    "options",
    [{"maximize": True}, {"weight_decay": 0.0}, {"lr": torch.tensor(1e-2)}],
    ids=["maximize", "no decay", "tensor lr"],
)
def test_options_are_those_of_torch(sizes, cuts, form, options):
    if form in ("foreach", "default") and isinstance(options.get("lr"), torch.Tensor):
        pytest.skip("torch takes a tensor lr with foreach under capturable alone")
    on_ranks(follows_torch, sizes, cuts, ALIGNED, torch.float32, form, options, 0.0)


# against our own run on one process -----------------------------------------------------------


def follows_one_process(rank, world, sizes, cuts, shapes, dtype, mode, options, count):
    weights, series = problem(shapes, dtype)
    weights2 = [nn.Parameter(W.detach().clone()) for W in weights]
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    whole, split = build(weights2, mode, **options), build(shards, mode, **options)
    for t, grads in enumerate(series):
        step(whole, weights2, grads)
        with chunks_of(count) if count else contextlib.nullcontext():
            step(split, shards, [cut(G, sizes, cuts) for G in grads])
        assert_alike(shards, split, weights2, whole, f"step {t}")


@every_cut
@every_mode
def test_every_write_has_the_bits_of_one_process(sizes, cuts, mode):
    for count in (None, 64):
        on_ranks(
            follows_one_process, sizes, cuts, SHAPES, torch.bfloat16, mode, FORMS["loop"], count
        )


@pytest.mark.parametrize(("sizes", "cuts"), [((2,), "0"), ((2, 2), "01")])
@every_mode
@pytest.mark.parametrize("dtype", LOW_PRECISION_DTYPES)
def test_every_form_and_dtype_writes_alike(sizes, cuts, mode, dtype):
    for form in ("foreach", "fused"):
        shapes = ALIGNED if form == "fused" else SHAPES
        on_ranks(follows_one_process, sizes, cuts, shapes, dtype, mode, FORMS[form], None)


@some_cuts
@pytest.mark.parametrize("mode", ["nearest", *MODES])
def test_decays_differ_by_parameter(sizes, cuts, mode):
    decays = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 1.0]
    options = {"group": {"decays": decays}, "foreach": False}
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    on_ranks(follows_one_process, sizes, cuts, SHAPES, dtype, mode, options, 64)


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_decay_is_masked_and_scheduled_alike(mode):
    own = {"cautious": True, "decay_schedule": "corrected", "decay_lr": 2e-3, "foreach": False}
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    on_ranks(follows_one_process, (2,), "1", SHAPES, dtype, mode, own, 64)


def follows_galore(rank, world, sizes, cuts, dtype, mode, correct_bias):
    def train(params, gradient_of):
        optimizer = GaLore(
            [{"params": params, "rule": "adamw", "write": mode}],
            rank=2,
            **{"lr": 1e-2, "weight_decay": 0.1, "compat": "reference"},
        )
        if not correct_bias:
            optimizer._adamw_order = lambda group: (False, 1e-6)
        for grads in series:
            step(optimizer, params, [gradient_of(G) for G in grads])
        return optimizer

    weights, series = problem(SHAPES, dtype, steps=3)
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    whole, split = train(weights, lambda G: G), train(shards, lambda G: cut(G, sizes, cuts))
    assert_alike(shards, split, weights, whole, "published order")


@some_cuts
@pytest.mark.parametrize("mode", ["nearest", *MODES])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_the_published_order_of_galore_is_followed(sizes, cuts, mode, correct_bias):
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    on_ranks(follows_galore, sizes, cuts, dtype, mode, correct_bias)


def follows_with_strides(rank, world, sizes, mode, form, dtype):
    """Local weights, gradients or both that do not lie row by row."""
    from torch.distributed.tensor import DTensor

    shapes = [(8 * world, 16), (4 * world, 8, 2, 8)]
    weights, series = problem(shapes, dtype, steps=3)
    series = [[G.clone() for G in grads] for grads in series]

    def strided(X, t):
        held = cut(X, sizes, "0").to_local()
        if t != 1:
            held = held.mT.contiguous().mT
            if X.dim() == 4:
                held = held.contiguous(memory_format=torch.channels_last)
        return DTensor.from_local(
            held, mesh_of(sizes), placements_of("0", 2), shape=X.shape, stride=X.stride()
        )

    shards = [nn.Parameter(strided(W.detach(), 0)) for W in weights]
    addresses = [shard.to_local().data_ptr() for shard in shards]
    whole = build(weights, mode, **FORMS[form])
    split = build(shards, mode, **FORMS[form])
    for t, grads in enumerate(series):
        step(whole, weights, grads)
        step(split, shards, [strided(G, t) for G in grads])
        assert_alike(shards, split, weights, whole, f"step {t}")
    assert addresses == [shard.to_local().data_ptr() for shard in shards]
    assert not any(shard.to_local().is_contiguous() for shard in shards)
    for shard in shards:
        entry = split.state[shard]
        assert all(entry[x].to_local().is_contiguous() for x in ("exp_avg", "exp_avg_sq"))


@every_form
@pytest.mark.parametrize("mode", ["nearest", *MODES])
def test_memory_formats_keep_the_bits(mode, form):
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    on_ranks(follows_with_strides, (2,), mode, form, dtype)


# strided shards of FSDP2 over tensor parallelism ----------------------------------------------


class Linear(nn.Module):
    """A layer whose weight says at which places of the whole its entries are."""

    def __init__(self, rows, cols):
        super().__init__()
        self.layer = nn.Linear(cols, rows, bias=True)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(rows * cols).view(rows, cols))
            self.layer.bias.copy_(torch.arange(rows))

    def forward(self, X):
        return self.layer(X)


def follows_over_tensor_parallelism(rank, world, sizes, rows, cols, style, mode):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = mesh_of(sizes)
    model = Linear(rows, cols)
    styles = {"columns": ColwiseParallel, "rows": RowwiseParallel}
    parallelize_module(model, mesh["b"], {"layer": styles[style]()})
    fully_shard(model, mesh=mesh["a"])
    places = [p.to_local().detach().long() for p in (model.layer.weight, model.layer.bias)]
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    weights, series = problem([(rows, cols), (rows,)], dtype, steps=3)

    def taken(X, i):
        p = (model.layer.weight, model.layer.bias)[i]
        held = X.detach().flatten()[places[i]]
        return DTensor.from_local(
            held, p.device_mesh, p.placements, run_check=False, shape=X.shape, stride=X.stride()
        )

    shards = [nn.Parameter(taken(W, i)) for i, W in enumerate(weights)]
    options = {"nonfinite": "ignore"}
    whole, split = build(weights, mode, **options), build(shards, mode, **options)
    for grads in series:
        step(whole, weights, grads)
        step(split, shards, [taken(G, i) for i, G in enumerate(grads)])
    for i, (shard, W) in enumerate(zip(shards, weights, strict=True)):
        assert torch.equal(shard.to_local(), W.detach().flatten()[places[i]])
    return [type(x).__name__ for x in shards[0].placements]


@pytest.mark.parametrize("mode", ["nearest", *MODES])
@pytest.mark.parametrize("style", ["columns", "rows"])
@pytest.mark.parametrize(
    ("sizes", "rows", "cols"), [((2, 2), 8, 6), ((2, 2), 7, 6), ((2, 2), 3, 5), ((3, 1), 7, 4)]
)
def test_strided_and_two_sided_shards(mode, style, sizes, rows, cols):
    found = on_ranks(follows_over_tensor_parallelism, sizes, rows, cols, style, mode)
    assert style == "rows" or sizes[1] == 1 or found[0] == ["_StridedShard", "Shard"]


# boxes cut by hand: more sides than ranks of this machine make -----------------------------------


class Box:
    """What a writer asks of a layout."""

    def __init__(self, shape, box):
        self.shape, self.box = shape, box


BOXES = [
    ((6, 5), ((2, 4), (0, 5))),
    ((6, 5), ((0, 6), (1, 3))),
    ((6, 5), ((2, 4), (1, 2))),
    ((6, 5), ((2, 3), (3, 4))),
    ((4, 3, 5), ((1, 3), (0, 3), (2, 5))),
    ((4, 3, 5), ((1, 3), (1, 3), (2, 5))),
    ((3, 4, 3, 5), ((0, 3), (1, 3), (1, 3), (2, 5))),
    ((3, 4, 3, 5, 4), ((1, 3), (1, 3), (0, 3), (2, 5), (1, 3))),
    ((3, 4, 3, 5, 4), ((0, 2), (1, 3), (1, 3), (2, 5), (1, 4))),
    ((9,), ((4, 4),)),
    ((6, 5), ((0, 6), (5, 5))),
]


@pytest.mark.parametrize(("shape", "box"), BOXES)
def test_places_of_a_box(shape, box):
    start, sides = places_of(shape, box)
    expected = part(torch.arange(math.prod(shape)).view(shape), box).flatten()
    found = torch.tensor(start)
    for size, by in sides:
        found = found.unsqueeze(-1) + by * torch.arange(size)
    assert torch.equal(found.flatten(), expected)
    assert all(size != 1 for size, _ in sides)


def test_places_of_random_boxes():
    draw = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    for _ in range(300):
        shape = tuple(number(1, 6) for _ in range(number(1, 6)))
        mesh = tuple(number(1, 4) for _ in range(number(1, 4)))
        from torch.distributed.tensor import Shard

        placements = [Shard(number(0, len(shape))) for _ in mesh]
        box = box_of(shape, mesh, placements, [number(0, size) for size in mesh])
        test_places_of_a_box(shape, box)


@every_mode
@every_form
@pytest.mark.parametrize("count", [None, 8])
@pytest.mark.parametrize(("shape", "box"), BOXES)
def test_a_box_has_the_bits_of_the_whole(shape, box, mode, form, count):
    if form == "fused":  # full vectors, and all but the last side as before
        if shape[-1] == box[-1][1] - box[-1][0] or not box[-1][1] - box[-1][0]:
            pytest.skip("has no last side to widen")
        shape = (*shape[:-1], 192)
        box = (*box[:-1], (64, 128))
    (W,), series = problem([shape], torch.bfloat16, steps=3)
    V = part(W.detach(), box).clone(memory_format=torch.contiguous_format)
    optimizers = build([W], mode, **FORMS[form]), build([nn.Parameter(V)], mode, **FORMS[form])
    group, entry = optimizers[1].param_groups[0], {}
    adamw.allocate(V, group, entry)
    writer = adamw_write.Writer(group, mode, 0, {0: Box(shape, box)})
    for (G,) in series:
        step(optimizers[0], [W], [G])
        with chunks_of(count) if count else contextlib.nullcontext():
            held = part(G, box).clone(memory_format=torch.contiguous_format)
            with torch.no_grad():
                adamw.step(group, [V], [held], [entry], writer=writer, positions=[0])
        assert torch.equal(V, part(W.detach(), box))
    state = optimizers[0].state[W]
    for name, value in entry.items():
        expected = state[name] if name == "step" else part(state[name], box)
        assert torch.equal(value, expected)


# plain and sharded parameters, several meshes, gradients in other layouts ------------------------


def mixed(rank, world, mode, form):
    """Plain weights and two meshes in one group."""
    layouts = [None, ((4,), "0"), ((2, 2), "r0"), ((2, 2), "01"), None, ((4,), "r")] * 2
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    shapes = [(5, 3)] * 6 + [(7,)] * 6
    weights, series = problem(shapes, dtype)

    def held(X, layout):
        return X.detach().clone() if layout is None else cut(X, *layout)

    shards = [nn.Parameter(held(W, layout)) for W, layout in zip(weights, layouts, strict=True)]
    whole, split = build(weights, mode, **FORMS[form]), build(shards, mode, **FORMS[form])
    calls, original = [], adamw.adamw

    def counted(params, *args, **kwargs):
        calls.append([type(p) for p in params])
        original(params, *args, **kwargs)

    for t, grads in enumerate(series):
        step(whole, weights, grads)
        adamw.adamw = counted
        try:
            step(split, shards, [held(G, x) for G, x in zip(grads, layouts, strict=True)])
        finally:
            adamw.adamw = original
        assert_alike(shards, split, weights, whole, f"step {t}")
    return calls


@pytest.mark.parametrize("mode", ["nearest", *MODES])
@pytest.mark.parametrize("form", ["default", "foreach", "loop"])
def test_plain_weights_and_two_meshes_share_a_call(mode, form):
    for calls in pool(4).run(mixed, mode, form):
        assert {kind for call in calls for kind in call} <= {torch.Tensor, nn.Parameter}
        if mode == "nearest":
            assert [len(call) for call in calls] == [12] * 3


def moved_gradients(rank, world, sizes, cuts, mode):
    """Gradients that lie in another way than their weight."""
    from torch.distributed.tensor import DTensor, Partial

    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    shapes = [(6, 10), (5, 3), (8, 4), (7,), (2,)]
    weights, series = problem(shapes, dtype, steps=4)
    series = [[(16 * G).round() for G in grads] for grads in series]  # sums of parts are exact
    mesh = mesh_of(sizes)
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    others = ["r" * len(sizes), "1" + "r" * (len(sizes) - 1), "partial", "flat"]

    def placed(G, way):
        if way == "partial":
            mine = (2 if rank == 0 else -1 if rank == 1 else 0) * G
            return DTensor.from_local(mine, mesh, [Partial()] * mesh.ndim)
        if way == "flat":  # another mesh
            return cut(G, (world,), "0")
        return cut(G, sizes, way)

    whole, split = build(weights, mode), build(shards, mode)
    for t, (grads, way) in enumerate(zip(series, others, strict=True)):
        step(whole, weights, grads)
        grads = [placed(G, way) for G in grads]
        before = [G.to_local().clone() for G in grads]
        step(split, shards, grads)
        assert_alike(shards, split, weights, whole, f"step {t}, {way}")
        assert same(before, [G.to_local() for G in grads])


@some_cuts
@pytest.mark.parametrize("mode", ["nearest", *MODES])
def test_gradients_in_other_layouts_are_redistributed(sizes, cuts, mode):
    on_ranks(moved_gradients, sizes, cuts, mode)


def missing_gradients(rank, world, sizes, cuts, mode):
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    weights, series = problem(SHAPES, dtype, steps=6)
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    whole, split = build(weights, mode), build(shards, mode)
    for t, grads in enumerate(series):
        grads = [None if (i + t) % 3 == 0 else G for i, G in enumerate(grads)]
        step(whole, weights, grads)
        step(split, shards, [None if G is None else cut(G, sizes, cuts) for G in grads])
    assert_alike(shards, split, weights, whole, "missing")


@some_cuts
@pytest.mark.parametrize("mode", ["nearest", *MODES])
def test_missing_gradients(sizes, cuts, mode):
    on_ranks(missing_gradients, sizes, cuts, mode)


# bad gradients --------------------------------------------------------------------------------


def keeps_bad(rank, world, sizes, cuts, mode, form, wait, count):
    """A NaN in one shard: the parameter stays on all ranks, others move as without it."""
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    weights, series = problem(ALIGNED, dtype, steps=3)
    twins = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    split, twin = (build(ps, mode, **FORMS[form]) for ps in (shards, twins))
    split._wait = wait
    for t, grads in enumerate(series):
        if t == 1:
            for i in (0, 3):
                grads[i] = grads[i].clone()
                grads[i].view(-1)[5] = NAN
        alike = [cut(G, sizes, cuts) for G in grads]
        step(twin, twins, [None if t == 1 and i in (0, 3) else G for i, G in enumerate(alike)])
        with chunks_of(count), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(split, shards, [cut(G, sizes, cuts) for G in grads])
    assert split.skipped == {0: 1, 3: 1}
    for p, q in zip(shards, twins, strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        for name, value in twin.state[q].items():
            assert torch.equal(local(split.state[p][name]), local(value)), name


@pytest.mark.parametrize(("sizes", "cuts"), [((2,), "0"), ((2, 2), "r0")])
@pytest.mark.parametrize("mode", ["nearest", *MODES])
@pytest.mark.parametrize("wait", [True, False])
def test_a_bad_shard_leaves_its_parameter_on_all_ranks(sizes, cuts, mode, wait):
    for form, count in (("foreach", 32), ("loop", 2**20), ("fused", 32)):
        on_ranks(keeps_bad, sizes, cuts, mode, form, wait, count)


# state, files, refusals -----------------------------------------------------------------------


def state_of(rank, world, sizes, cuts, mode):
    """Allocate on one rank alone; what its state is."""
    found = []
    weights, _ = problem(SHAPES, torch.bfloat16)
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    if rank == world - 1:
        group = build(shards, mode).param_groups[0]
        for shard in shards:
            entry = {}
            adamw.allocate(shard, group, entry)
            clock = entry.pop("step")
            assert not hasattr(clock, "placements") and clock.item() == 0.0
            for name, value in entry.items():
                assert layout_of(value, "state") == layout_of(shard, "weight")
                held = value.to_local()
                assert held.is_contiguous() and held.numel() == shard.to_local().numel()
                assert not held.any() and value.shape == shard.shape
                assert value.stride() == shard.stride()
                found.append((name, held.dtype))
    return found


@every_cut
@pytest.mark.parametrize("mode", ["nearest", *MODES])
def test_state_lies_like_its_weight_and_is_made_by_each_rank_alone(sizes, cuts, mode):
    *_, found = on_ranks(state_of, sizes, cuts, mode)
    names = ["exp_avg", "exp_avg_sq", *(["residual"] if mode == "kahan" else [])]
    moment = torch.bfloat16 if mode == "nearest" else torch.float32
    dtypes = {"exp_avg": moment, "exp_avg_sq": moment, "residual": torch.bfloat16}
    assert found == [(name, dtypes[name]) for name in names] * len(SHAPES)


def resumes(rank, world, sizes, cuts, mode):
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    weights, series = problem(SHAPES, dtype, steps=6)
    shards = [nn.Parameter(cut(W, sizes, cuts)) for W in weights]
    optimizer = build(shards, mode)
    for grads in series[:3]:
        step(optimizer, shards, [cut(G, sizes, cuts) for G in grads])
    others = [nn.Parameter(shard.detach().clone()) for shard in shards]
    other = build(others, mode, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grads in series[3:]:
        for opt, ps in ((optimizer, shards), (other, others)):
            step(opt, ps, [cut(G, sizes, cuts) for G in grads])
    for p, q in zip(shards, others, strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        for name, value in optimizer.state[p].items():
            loaded = other.state[q][name]
            assert torch.equal(local(loaded), local(value))
            assert getattr(loaded, "placements", None) == getattr(value, "placements", None)


@pytest.mark.parametrize(("sizes", "cuts"), [((3,), "1"), ((2, 2), "r0")])
@pytest.mark.parametrize("mode", ["nearest", *MODES])
def test_a_run_resumes_in_equal_bits(sizes, cuts, mode):
    on_ranks(resumes, sizes, cuts, mode)


def refused_state(rank, world, way):
    """State that other code has put in: the sentence, and whether all stayed as it was."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    weights, series = problem([(4, 6), (4, 6)], torch.float32)
    shards = [nn.Parameter(cut(weights[0], (2,), "0")), nn.Parameter(weights[1].detach().clone())]

    def placed(grads):
        return [cut(grads[0], (2,), "0"), grads[1]]

    optimizer = build(shards)
    step(optimizer, shards, placed(series[0]))
    if way == "plain":
        p, value = shards[0], optimizer.state[shards[0]]["exp_avg"].full_tensor()
    elif way == "placements":
        p, value = (
            shards[0],
            optimizer.state[shards[0]]["exp_avg"].redistribute(None, [Replicate()]),
        )
    elif way == "mesh":
        p, value = shards[0], optimizer.state[shards[0]]["exp_avg"]
        reverse = DeviceMesh("cpu", [1, 0])
        value = DTensor.from_local(value.to_local(), reverse, value.placements)
    else:
        p, value = shards[1], cut(torch.zeros(4, 6), (2,), "0")
    optimizer.state[p]["exp_avg"] = value
    before = [local(q).clone() for q in shards]
    state = {key: local(x).clone() for key, x in tensors(optimizer).items()}
    text = ""
    try:
        step(optimizer, shards, placed(series[1]))
    except ValueError as error:
        text = str(error)
    assert same(before, [local(q) for q in shards])
    assert same(state, {key: local(x) for key, x in tensors(optimizer).items()})
    return text


@pytest.mark.parametrize("way", ["plain", "placements", "mesh", "sharded"])
def test_state_in_another_layout_is_refused(way):
    for text in pool(2).run(refused_state, way):
        assert "state 'exp_avg' of parameter" in text
        assert "load_state_dict()" in text


def refused_partial(rank, world):
    from torch.distributed.tensor import DTensor, Partial

    p = DTensor.from_local(torch.ones(4, 3), mesh_of((world,)), [Partial()], run_check=False)
    p = nn.Parameter(p)
    q = nn.Parameter(torch.ones(3))
    p.grad, q.grad = p.detach().clone(), torch.ones(3)
    optimizer = build([q, p])
    text = ""
    try:
        optimizer.step()
    except ValueError as error:
        text = str(error)
    assert torch.equal(q, torch.ones(3))
    assert not any(optimizer.state.values())
    return text


def test_partial_sums_are_refused_by_name():
    for text in pool(2).run(refused_partial):
        assert "parameter 1" in text and "Partial" in text and "redistribute" in text


# what plain parameters pay ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_plain_parameters_pay_nothing(dtype, form):
    weights, series = problem(SHAPES, dtype)
    optimizer = build(weights, **FORMS[form])
    for grads in series[:2]:
        step(optimizer, weights, grads)
    seen = set()

    def record(frame, event, argument):
        if event == "call":
            seen.add((frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name))

    for p, grad in zip(weights, series[2], strict=True):
        p.grad = grad
    sys.setprofile(record)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert ("adamw.py", "step") in seen
    assert not {name for name in seen if name[0] == "layout.py"}
    assert not {"held_lists", "_rows_of"} & {name for _, name in seen}
