"""FSDP2 with a distributed checkpoint: sharded weights need nothing else.

torchrun --nproc-per-node 2 examples/trainers/fsdp2.py
"""

import tempfile
from datetime import timedelta

import tiny
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stiefel.optimizers import Muon

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
mesh = init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(seed=0):
    model = tiny.Llama(seed)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, Muon(model, lr=1e-2)


found = [tempfile.mkdtemp()]
dist.broadcast_object_list(found)
folder, batches = found[0], tiny.batches()
model, optimizer = sharded()
tiny.show(optimizer)  # the columns plan and bytes: what is sent for each weight in a step
before = tiny.loss(model)
tiny.train_share(model, optimizer, batches[: tiny.HALF])
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
tiny.train_share(model, optimizer, batches[tiny.HALF :])
after, ended = tiny.loss(model), tiny.weights(model)

resumed, optimizer = sharded(seed=1)
weights, state = get_state_dict(resumed, optimizer)
dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
set_state_dict(resumed, optimizer, model_state_dict=weights, optim_state_dict=state)
tiny.train_share(resumed, optimizer, batches[tiny.HALF :])
tiny.verdict(before, after, ended, resumed)
dist.destroy_process_group()
