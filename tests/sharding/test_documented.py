"""What ``docs/sharding.md`` says that no other test shows, and the page itself."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.paths import EXAMPLES, ROOT
from helpers.ranks import pool
from helpers.sharded import meshes, whole
from helpers.wrapped import NAMES, OPTIONS, Twin, backward, bound_of, made, net, wrap
from torch import nn

import stiefel.optimizers

PAGE = ROOT / "docs" / "sharding.md"
ROUNDING = 2e-6
"""How far sums over ranks may be from those of one process; what travels has equal bits."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose():
    return FENCE.sub("", PAGE.read_text(encoding="utf-8"))


# the page -----------------------------------------------------------------------------------------


def test_every_block_runs_in_order(tmp_path, monkeypatch):
    """On a mesh of one process, with the names that a reader has."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import common

    torch.manual_seed(0)
    models = [common.build_model(32, 1, 2, 16, seed=0) for _ in range(2)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        namespace = {"mesh": mesh, "model": models[0], "wide": models[1], "folder": tmp_path}
        namespace["batch"] = torch.randint(256, (2, 17))
        before = [p.detach().clone() for p in models[0].parameters()]
        text = PAGE.read_text(encoding="utf-8")
        blocks = [match for match in FENCE.finditer(text) if match[1] == "python"]
        assert blocks
        for block in blocks:
            lines = "\n" * text.count("\n", 0, block.start(2))
            exec(compile(lines + block[2], str(PAGE), "exec"), namespace)
        after = [whole(p) for p in models[0].parameters()]
        assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    finally:
        dist.destroy_process_group()


def test_every_class_is_in_the_table():
    public = [getattr(stiefel.optimizers, name) for name in stiefel.optimizers.__all__]
    classes = {c.__name__ for c in public if isinstance(c, type) and hasattr(c, "assignment")}
    named = set(re.findall(r"`(\w+)`", prose()))
    assert classes - {"StackedOptimizer"} <= named


def test_the_page_is_short_and_names_files_that_are_there():
    assert len(PAGE.read_text().splitlines()) <= 160
    files = set(re.findall(r"\b(?:tests|examples|bench)/[\w/]+\.py", PAGE.read_text()))
    assert files and not [file for file in files if not (ROOT / file).is_file()]
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", prose()) if "://" not in link]
    assert not [link for link in links if not (PAGE.parent / link).exists()]


# meshes of two axes -------------------------------------------------------------------------------


def over_two_axes(rank, world, name, kind):
    """Training beside a twin: replicas of shards, or tensor parallelism below the shards."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    square, model = meshes(world)["square"], net(name)
    twin = Twin(model, lambda m: made(name, m))
    if kind == "replicas":
        wrap(model, world, mesh=square)
    else:
        for block in model.layers:
            parallelize_module(
                block, square["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
            )
        wrap(model, world, mesh=square["a"], shard_placement_fn=None)
    optimizer = made(name, model)
    for k in range(3):
        optimizer.zero_grad()
        backward(model, k, rank if kind == "replicas" else rank // 2)
        twin.step(model)
        optimizer.step()
    return twin.far(model), twin.state_far(model, optimizer)


@pytest.mark.parametrize("kind", ["replicas", "tensor"])
@pytest.mark.parametrize("name", [n for n in NAMES if "LoRA" not in n])
def test_meshes_of_two_axes(name, kind):
    bound = max(bound_of(name), ROUNDING)
    for far, state_far in pool(4).run(over_two_axes, name, kind):
        assert far <= bound
        assert state_far <= bound


# keywords -----------------------------------------------------------------------------------------


def sent(rank, world, name, dtype):
    """Bytes of this rank before any step, and how far three steps go from those of None."""
    found = []
    for comm_dtype in (None, dtype):
        model = wrap(net(name), world)
        optimizer = made(name, model, comm_dtype=comm_dtype)
        for k in range(3):
            optimizer.zero_grad()
            backward(model, k, rank)
            optimizer.step()
        row_bytes = sum(row.bytes_per_step for row in optimizer.assignment())
        found.append((row_bytes, [whole(p) for p in model.parameters()]))
    (first, weights), (second, others) = found
    far = max((x - y).abs().max().item() for x, y in zip(weights, others, strict=True))
    return first, second, far


@pytest.mark.parametrize("name", ["Muon", "ARO"])
def test_half_precision_on_the_wire(name):
    """What meets is halved; of what rides only the gradient is."""
    for first, second, far in pool(2).run(sent, name, "bfloat16"):
        assert second < first
        assert 0 < far < 0.05
        if name == "Muon":
            assert 2 * second == first


def drawn(rank, world, named):
    """FRUGAL on shards beside FRUGAL on whole weights in reverse order."""
    model = net("FRUGAL")
    options = {"lr": 0.02, **OPTIONS["FRUGAL"]}

    def build(m, backwards):
        items = [(n, p) for n, p in m.named_parameters() if "layers" in n and p.ndim == 2]
        items = items[::-1] if backwards else items
        return stiefel.optimizers.FRUGAL(items if named else [p for _, p in items], **options)

    twin = Twin(model, lambda m: build(m, True))
    wrap(model, world)
    optimizer = build(model, False)
    for k in range(3):
        optimizer.zero_grad()
        backward(model, k, rank)
        twin.step(model)
        optimizer.step()
    return twin.far(model)


def test_random_draws_go_by_names_where_all_have_one():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert max(pool(2).run(drawn, True)) == 0
        assert min(pool(2).run(drawn, False)) > 1e-3


# traps --------------------------------------------------------------------------------------------


def kept_unsharded(rank, world, name, again):
    """Training under ``set_reshard_after_backward(False)``, with a call of reshard or without."""
    model = net("Muon")
    twin = Twin(model, lambda m: made(name, m))
    wrap(model, world)
    optimizer = made(name, model)
    model.set_reshard_after_backward(False)
    modules = [model, *model.layers]
    far = []
    for k in range(3):
        for m, o in ((twin.model, twin.optimizer), (model, optimizer)):
            o.zero_grad()
            backward(m, k)
        kinds = [type(p).__name__ for p in model.parameters()]
        if again:
            for module in modules:
                module.reshard()
        for o in (twin.optimizer, optimizer):
            o.step()
    for module in modules:
        module.reshard()
    far = twin.far(model)
    return far, set(kinds)


@pytest.mark.parametrize("name", ["torch.AdamW", "Muon"])
def test_unsharded_weights_do_not_see_a_step(name):
    """The next forward pass computes with old weights, unless they are resharded before."""
    for far, kinds in pool(2).run(kept_unsharded, name, False):
        assert far > 1e-3 and kinds == {"Parameter"}
    for far, _ in pool(2).run(kept_unsharded, name, True):
        assert far < 1e-5


def built_between(rank, world):
    """An optimizer of a list that is made between forward and backward."""
    model = wrap(net("Muon"), world, reshard_after_forward=False)
    tokens = torch.arange(10).view(2, 5)
    loss = model(tokens).square().mean()
    names = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    optimizer = stiefel.optimizers.Muon(names, lr=0.1)
    loss.backward()
    before = [whole(p) for p in model.parameters()]
    optimizer.step()
    missing = [p.grad is None for _, p in names]
    same = [torch.equal(whole(p), q) for p, q in zip(model.parameters(), before, strict=True)]
    return missing, same


def test_an_optimizer_of_unsharded_parameters_trains_nothing():
    for missing, same in pool(2).run(built_between):
        assert all(missing) and all(same)


def clipped(rank, world, kind):
    """torch's own clipping: the total norm, or its error."""
    from torch.distributed.fsdp import fully_shard

    square, model = meshes(world)["square"], net("Muon")
    twin = Twin(model, lambda m: made("Muon", m))
    if kind == "one mesh":
        wrap(model, world)
    else:
        fully_shard(model.layers[0], mesh=square["a"])
        if kind == "two meshes":
            fully_shard(model.layers[1], mesh=square["b"])
    backward(model, 0)
    backward(twin.model, 0)
    chosen = model.layers if kind == "two meshes" else model
    try:
        norm = nn.utils.clip_grad_norm_(chosen.parameters(), 1.0)
    except RuntimeError as error:
        return str(error)
    expected = nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
    return (whole(norm) - expected).abs().item()


def test_clipping_by_torch_needs_one_mesh():
    assert all(far < 1e-5 for far in pool(4).run(clipped, "one mesh"))
    assert all("mixed torch.Tensor and DTensor" in x for x in pool(4).run(clipped, "plain too"))
    assert all("same mesh" in x for x in pool(4).run(clipped, "two meshes"))
