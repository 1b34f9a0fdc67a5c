"""What accelerate and transformers do under FSDP2, step by step, on CPUs.

They build the optimizer first, put empty tensors in the place of its parameters, wrap the model,
and then hand over the new parameters. On a CPU accelerate itself chooses plain data parallelism,
so the steps stand here; with GPUs `accelerate launch --use_fsdp --fsdp_version 2` takes them.

torchrun --nproc-per-node 2 examples/trainers/accelerate_fsdp2.py
"""

import tempfile
from datetime import timedelta

import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stiefel.optimizers import Muon

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
mesh = init_device_mesh("cpu", (dist.get_world_size(),))


def prepared(seed=0):
    model = tiny.Llama(seed)
    optimizer = Muon(model, lr=1e-2)  # 1: on whole weights, as a user of accelerate builds it
    names = {id(p): name for name, p in model.named_parameters()}
    places = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # 2: whole weights are let go
        group["params"] = [torch.empty(1, dtype=p.dtype) for p in group["params"]]
    for layer in model.layers:  # 3: the model is sharded
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group, listed in zip(optimizer.param_groups, places, strict=True):
        group["params"] = [sharded[name] for name in listed]  # 4: shards take their places
    return model, optimizer


found = [tempfile.mkdtemp()]
dist.broadcast_object_list(found)
folder, batches = found[0], tiny.batches()
model, optimizer = prepared()
tiny.show(optimizer)
before = tiny.loss(model)
tiny.train_share(model, optimizer, batches[: tiny.HALF])
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
tiny.train_share(model, optimizer, batches[tiny.HALF :])
after, ended = tiny.loss(model), tiny.weights(model)

resumed, optimizer = prepared(seed=1)
weights, state = get_state_dict(resumed, optimizer)
dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
set_state_dict(resumed, optimizer, model_state_dict=weights, optim_state_dict=state)
tiny.train_share(resumed, optimizer, batches[tiny.HALF :])
tiny.verdict(before, after, ended, resumed)
dist.destroy_process_group()
