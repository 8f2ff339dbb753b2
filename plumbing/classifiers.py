"""What the stages `vgg` and `resnet` of train.py use besides their loop."""

import random

import torch
import torch.nn.functional as F

from plumbing.images import to_float
from plumbing.processes import mix, seeded_rows, to_device
from plumbing.validation import ratio, val_batches


@torch.no_grad()
def tap_scales(run, taps, names, num=1000):
    """{name: factor} of the features `names` of a VGG, for `plumbing.weights.scale_taps` (ours): so that each
    tap has variance 1 over `num` training images, the mean over its channels and places. No layer of Eq. 4
    leads by its scale alone then. A tap that does not vary keeps its scale."""
    draw = random.Random(mix(run.config["seed"], "taps"))
    drawn, sums = draw.sample(range(len(run.train)), min(num, len(run.train))), {}
    for first in range(0, len(drawn), 50):
        x = torch.stack([run.train.view(i) for i in drawn[first : first + 50]])
        for name, feature in taps(to_float(x, run.device), names).items():
            new = torch.stack([feature.double().sum(0), feature.double().square().sum(0)])
            sums[name] = sums.get(name, 0) + new
    moments = {name: total / len(drawn) for name, total in sums.items()}
    variance = {name: (square - mean**2).mean().item() for name, (mean, square) in moments.items()}
    return {name: v**-0.5 if v > 1e-12 else 1.0 for name, v in variance.items()}


def random_shift(x, seed, step, batch):
    """Shifts each image by up to an eighth of its side (edges reflected); a function of (seed, step, row)."""
    reach = x.shape[-1] // 8
    rows = seeded_rows(batch, 2, seed=mix(seed, "shift", step))
    offsets = to_device((rows * (2 * reach + 1)).long(), x.device)
    side = torch.arange(x.shape[-1], device=x.device)
    top, left = offsets[:, :1] + side, offsets[:, 1:] + side  # (B, S): the pixels of each image
    padded = F.pad(x, (reach,) * 4, mode="reflect").permute(0, 2, 3, 1)  # (B, H, W, 3)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[image, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(run, classify, limit=5000):
    """Share of the first `limit` validation images whose class `classify` finds, (B, 3, H, W) -> logits."""
    right = total = 0
    for indices, x in val_batches(run, limit):
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        with run.autocast:
            right += (classify(x).argmax(1) == labels).sum().item()
        total += len(labels)
    return ratio(run, [right, total])[0]
