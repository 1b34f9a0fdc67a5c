"""Lightning: one optimizer with a schedule, a resumed run, and BackboneFinetuning.

python examples/trainers/lightning_fit.py
"""

import logging
import tempfile
import warnings

import tiny

tiny.needs("lightning")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint  # noqa: E402
from torch.optim.lr_scheduler import CosineAnnealingLR  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from stiefel.optimizers import Muon  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class LM(L.LightningModule):
    """One optimizer trains all of the model, so automatic optimization is enough."""

    def __init__(self, seed=0):
        super().__init__()
        self.model = tiny.Llama(seed)

    def training_step(self, batch, index):
        return self.model(batch)

    def configure_optimizers(self):
        optimizer = Muon(self.model, lr=1e-2)
        schedule = CosineAnnealingLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoParts(L.LightningModule):
    """A backbone that is frozen at first, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16))
        self.head = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(16, 4))

    def training_step(self, batch, index):
        return self.head(self.backbone(batch)).square().mean()

    def configure_optimizers(self):
        # what is frozen comes later, by add_param_group; model= says what each parameter is
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        return Muon(trained, lr=1e-2, model=self)


def fit(module, folder, data, epochs, *callbacks, ckpt_path=None):
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0 if isinstance(module, LM) else None,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=tiny.BATCH), ckpt_path=ckpt_path)
    return trainer


with tempfile.TemporaryDirectory() as folder:
    data = [row["input_ids"] for row in tiny.rows()]
    whole, keep = LM(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    before = tiny.loss(whole.model)
    trainer = fit(whole, folder, data, 2, keep)
    tiny.show(trainer.optimizers[0])
    resumed = LM(seed=1)
    fit(resumed, folder, data, 2, ckpt_path=f"{folder}/epoch=0.ckpt")
    tiny.verdict(before, tiny.loss(whole.model), whole, resumed)

    tuned, data = TwoParts(), torch.randn(16, 8)
    start = tiny.weights(tuned)
    loss = float(tuned.training_step(data, 0))
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer = fit(tuned, folder, data, 3, unfreeze)
    print(trainer.optimizers[0].assignment())
    print("BackboneFinetuning: loss", loss, "to", float(tuned.training_step(data, 0)))
    still = [name for name, x in tiny.weights(tuned).items() if torch.equal(x, start[name])]
    if still or len(trainer.optimizers[0].param_groups) != 2:
        raise SystemExit(f"never trained: {still}")
