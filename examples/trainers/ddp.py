"""DistributedDataParallel, and the same with ZeroRedundancyOptimizer, which shares out the state.

torchrun --nproc-per-node 2 examples/trainers/ddp.py
"""

import tempfile
from datetime import timedelta
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from stiefel.optimizers import Muon, classify

dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def ddp(model):
    """Every process does the whole step, so nothing is sent for the optimizer."""
    return Muon(model, lr=1e-2)


def zero(model):
    """Every process steps its share of the parameters, and keeps the state of these alone.

    Groups carry the roles, since ZeroRedundancyOptimizer hands over no names.
    """
    matrices = {row.name for row in classify(model) if row.rule == "matrix"}
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in matrices], "rule": "Muon"},
        {"params": [p for n, p in named if n not in matrices and p.ndim > 1], "rule": "adamw"},
        {"params": [p for n, p in named if p.ndim < 2], "rule": "adamw", "weight_decay": 0.0},
    ]
    return ZeroRedundancyOptimizer(groups, optimizer_class=Muon, lr=1e-2, weight_decay=0.1)


def save(model, optimizer, path):
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save([model.state_dict(), optimizer.state_dict()], path)
    dist.barrier()


found = [tempfile.mkdtemp()]
dist.broadcast_object_list(found)
batches, ended = tiny.batches(2 * tiny.STEPS), []
for make in (ddp, zero):
    path = Path(found[0], make.__name__)
    model = DistributedDataParallel(tiny.Llama())
    optimizer = make(model.module)
    tiny.show(getattr(optimizer, "optim", optimizer))  # under ZeRO: this process's share
    before = tiny.loss(model.module)
    tiny.train_share(model, optimizer, batches[: tiny.STEPS])
    save(model, optimizer, path)
    tiny.train_share(model, optimizer, batches[tiny.STEPS :])

    resumed = DistributedDataParallel(tiny.Llama(seed=1))
    optimizer = make(resumed.module)
    state = torch.load(path, weights_only=True)
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    tiny.train_share(resumed, optimizer, batches[tiny.STEPS :])
    tiny.verdict(before, tiny.loss(model.module), model.module, resumed.module, make.__name__)
    ended.append(model.module)
tiny.verdict(before, tiny.loss(ended[1]), *ended, "ZeRO beside DDP")
dist.destroy_process_group()
