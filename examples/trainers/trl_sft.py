"""trl's SFTTrainer, which takes an optimizer as the Hugging Face Trainer does.

python examples/trainers/trl_sft.py
"""

import tempfile

import tiny

tiny.needs("trl", "datasets", "tokenizers")

from datasets import Dataset  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from stiefel.optimizers import Muon  # noqa: E402

LETTERS = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token="?"))
LETTERS.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=LETTERS, pad_token="\0", eos_token="\1", unk_token="?"
)
LINES = [bytes(row["input_ids"].tolist()).decode("latin1") for row in tiny.rows()]


def trainer(model, optimizer, folder):
    config = SFTConfig(
        output_dir=folder,
        max_steps=tiny.STEPS,
        save_steps=tiny.HALF,
        per_device_train_batch_size=tiny.BATCH,
        max_length=tiny.SEQ,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"text": LINES}),
        processing_class=TOKENIZER,
        optimizers=(optimizer, None),
    )


with tempfile.TemporaryDirectory() as folder:
    model = tiny.hub_llama()
    optimizer = Muon(model, lr=1e-2)
    tiny.show(optimizer)
    before = tiny.loss(model)
    trainer(model, optimizer, folder).train()

    resumed = tiny.hub_llama(seed=1)
    made = trainer(resumed, Muon(resumed, lr=1e-2), folder)
    made.train(resume_from_checkpoint=f"{folder}/checkpoint-{tiny.HALF}")
    tiny.verdict(before, tiny.loss(model), model, resumed)
