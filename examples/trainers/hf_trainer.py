"""Hugging Face Trainer: an optimizer, or its class with keywords; stopped and resumed.

python examples/trainers/hf_trainer.py
"""

import tempfile

import tiny

tiny.needs("transformers", "accelerate")

from transformers import Trainer, TrainingArguments  # noqa: E402

from stiefel.optimizers import Muon  # noqa: E402


def trainer(model, folder, **how):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=tiny.STEPS,
        save_steps=tiny.HALF,
        per_device_train_batch_size=tiny.BATCH,
        lr_scheduler_type="cosine",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=tiny.rows(), **how)


with tempfile.TemporaryDirectory() as folder:
    # 1: an optimizer that you have built; the Trainer still makes the schedule.
    # An lr of 0.01 is for a tiny model
    model = tiny.hub_llama()
    optimizer = Muon(model, lr=1e-2, weight_decay=0.1)
    tiny.show(optimizer)
    before = tiny.loss(model)
    trainer(model, folder, optimizers=(optimizer, None)).train()

    # 2: a class and its keywords. "model" tells embeddings from matrices; the Trainer takes it out
    # of the dict, so each run needs a new one. lr has to be among them, since the Trainer hands
    # over no learning rate of its own
    other = tiny.hub_llama()
    keywords = {"model": other, "lr": 1e-2, "weight_decay": 0.1}
    trainer(other, folder + "/other", optimizer_cls_and_kwargs=(Muon, keywords)).train()
    tiny.verdict(before, tiny.loss(other), model, other, "optimizer_cls_and_kwargs")

    # 3: from the checkpoint after half of the steps
    resumed = tiny.hub_llama(seed=1)
    how = {"optimizers": (Muon(resumed, lr=1e-2, weight_decay=0.1), None)}
    trainer(resumed, folder, **how).train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    tiny.verdict(before, tiny.loss(resumed), model, resumed, "optimizers=")
