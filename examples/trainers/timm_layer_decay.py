"""timm: a learning rate for each depth of a vision transformer, by param_groups_layer_decay.

python examples/trainers/timm_layer_decay.py
"""

import copy

import tiny

tiny.needs("timm")

import torch  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.optim import param_groups_layer_decay  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from stiefel.optimizers import Muon  # noqa: E402


def made(seed=0):
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
    for group in groups:  # timm leaves the factor to its own schedulers
        group["lr"] = 1e-2 * group["lr_scale"]
    # model= tells patches, tokens, positions and the head from the matrices between them
    return model, Muon(groups, lr=1e-2, model=model)


def images(count, seed):
    """Noise whose mean says the class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=draw)
    noise = torch.randn(count, 3, 16, 16, generator=draw)
    return noise + (labels - 1.5).view(-1, 1, 1, 1), labels


def loss(model):
    with torch.no_grad():
        x, y = images(64, seed=99)
        return float(cross_entropy(model(x), y))


def train(model, optimizer, steps):
    for step in steps:
        x, y = images(16, step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


model, optimizer = made()
tiny.show(optimizer)
before = loss(model)
train(model, optimizer, range(tiny.HALF))
saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
train(model, optimizer, range(tiny.HALF, tiny.STEPS))

resumed, optimizer = made(seed=1)
resumed.load_state_dict(saved[0])
optimizer.load_state_dict(saved[1])
train(resumed, optimizer, range(tiny.HALF, tiny.STEPS))
tiny.verdict(before, loss(model), model, resumed)
