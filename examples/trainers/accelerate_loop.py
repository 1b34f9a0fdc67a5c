"""accelerate: prepare, accumulate, clip, save and load; on one process or several.

python examples/trainers/accelerate_loop.py
torchrun --nproc-per-node 2 examples/trainers/accelerate_loop.py    (or accelerate launch)
"""

import tempfile
from datetime import timedelta

import tiny

tiny.needs("accelerate")

from accelerate import Accelerator, InitProcessGroupKwargs  # noqa: E402
from accelerate.utils import broadcast_object_list, set_seed  # noqa: E402
from torch.optim.lr_scheduler import CosineAnnealingLR  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from stiefel.optimizers import Muon  # noqa: E402

patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[patience])


def prepared(seed=0):
    model = tiny.Llama(seed)
    optimizer = Muon(model, lr=1e-2)
    schedule = CosineAnnealingLR(optimizer, 100)
    parts = accelerator.prepare(model, optimizer, schedule)
    tiny.show(optimizer)  # through accelerate's wrapper: parts[1].optimizer.assignment()
    return parts


def train(model, optimizer, schedule, batches):
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


set_seed(0)
rows = [row["input_ids"] for row in tiny.rows(256)]
loader = accelerator.prepare(DataLoader(rows, batch_size=tiny.BATCH))  # each process has its part
batches = list(loader)
half = len(batches) // 4 * 2
folder = broadcast_object_list([tempfile.mkdtemp()])[0]

whole = prepared()
before = tiny.loss(accelerator.unwrap_model(whole[0]))
train(*whole, batches[:half])
accelerator.save_state(folder)
train(*whole, batches[half:])

accelerator.free_memory()  # forgets the first run's objects, so that the second's are loaded
resumed = prepared(seed=1)
accelerator.load_state(folder)
train(*resumed, batches[half:])

one, two = (accelerator.unwrap_model(parts[0]) for parts in (whole, resumed))
tiny.verdict(before, tiny.loss(one), one, two, f"process 1 of {accelerator.num_processes}")
accelerator.end_training()
