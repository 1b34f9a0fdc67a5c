"""One of two gloo processes: ``python two_ranks.py RANK STORE OUT CLASS...`` writes what it saw.

Every class trains a small model under ZeroRedundancyOptimizer and DistributedDataParallel, then
saves. A class that is refused writes the sentence.
"""

import datetime
import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from stiefel import optimizers

OPTIONS = {"GaLore": {"rank": 2}, "Fira": {"rank": 2}, "DCTAdamW": {"rank": 2}}


def train(cls, number, **options):
    """Two steps on this rank's data; what the test compares."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4))
    before = [p.detach().clone() for p in model.parameters()]
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=cls, lr=0.01, weight_decay=0.1, **options
    )
    for step in range(2):
        draw = torch.Generator().manual_seed(10 * step + number)
        optimizer.zero_grad()
        ddp(torch.randn(5, 6, generator=draw)).square().mean().backward()
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    weights = list(model.parameters())
    return {
        "groups": len(optimizer.param_groups),
        "moved": [not torch.equal(p, q) for p, q in zip(weights, before, strict=True)],
        "finite": all(bool(p.isfinite().all()) for p in weights),
        "weights": [p.detach().double().sum().item() for p in weights],
        "saved": len(optimizer.state_dict()["state"]) if number == 0 else None,
    }


def main(rank, store, out, names):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience
    )
    results = {}
    for name in names:
        cls = torch.optim.AdamW if name == "AdamW" else getattr(optimizers, name)
        try:
            results[name] = train(cls, rank, **OPTIONS.get(name, {}))
        except Exception as error:  # the test says which class failed on which rank
            kind = "refused" if isinstance(error, ValueError) else "error"
            results[name] = {kind: f"{type(error).__name__}: {error}"}
    with open(out, "w") as file:
        json.dump(results, file)
    sys.stdout.flush()
    os._exit(0)  # the other rank may have left already, and gloo would wait for it


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
