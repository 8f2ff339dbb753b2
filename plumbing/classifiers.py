"""A VGG of one's own, a narrow VGG-16 trained on the labels at hand; or a scorer for the metrics."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from perceptual import NAMES, VGGTaps, normalize_images
from plumbing.images import to_float
from plumbing.models import load_model
from plumbing.processes import mix, on_rank0, print0, seeded_rows, to_device
from plumbing.stages import DEPENDS, needs_vgg, refuse_other_config, refuse_other_images
from plumbing.validation import ratio, val_batches
from plumbing.weights import ResNet, build_vgg16, fold_batch_norm, load_vgg16_of
from train import build_ema, build_optimizer, lr_at, set_lr, train_stage


def vgg_of(run):
    """The frozen VGG of a run's perceptual loss, trained now where it is the run's own and not finished."""
    source = run.config["vgg"]
    own = run.out / "vgg.pt" if source == "own" else Path(source)
    if needs_vgg(run):
        print0(f"note: the perceptual loss needs a VGG and {own} is not finished: training it first")
        train_stage(run, "vgg")
    if own.suffix == ".pt":
        vgg, ckpt = load_model(own, ("vgg",), run.device)
        if source == "own":
            refuse_other_config(own, DEPENDS["vgg"], ckpt["config"], run.config)
            refuse_other_images(own, ckpt, run)
        return vgg.to(memory_format=torch.channels_last)
    return VGGTaps(load_vgg16_of(source)).to(run.device, memory_format=torch.channels_last)


def train_classifier(run, stage):
    """Classification with batch norm, which is folded away when a VGG is loaded. Not in the paper."""
    c, device = run.config["classifier"], run.device
    sizes = dict(width=c["width"], num_classes=run.train.num_classes)
    if stage == "vgg":
        sizes |= dict(hidden=c["hidden"], skip_pools=c["skip_pools"], batch_norm=True)
    torch.manual_seed(mix(run.config["seed"], stage))
    vgg = (build_vgg16 if stage == "vgg" else ResNet)(**sizes)
    vgg, vgg.sizes = vgg.to(device, memory_format=torch.channels_last), sizes
    optimizer, ema = build_optimizer(vgg, c), build_ema(vgg, c["ema"])
    net = run.wrap(vgg, run.example())
    start = run.start(stage, model=vgg, optimizer=optimizer, ema=ema)
    stream = run.stream(c["batch"], start)
    for step in run.loop(stage, start):
        set_lr(lr_at(step, c), optimizer)
        pixels, labels = next(stream)
        x, labels = to_float(pixels, device), to_device(labels, device)
        x = random_shift(x, run.config["seed"], step, c["batch"])
        vgg.train()
        optimizer.zero_grad(set_to_none=True)
        with run.autocast:
            logits = net(normalize_images(x))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=c["label_smoothing"])
        loss.backward()
        run.update(optimizer, "vgg", c["clip"])
        if ema:
            ema.update_parameters(vgg)
        if run.due("log", stage, step):
            run.log(stage, step, lr=lr_at(step, c), loss=loss)
        if run.due("eval", stage, step):
            evaluate_classifier(run, stage, step, ema.module if ema else vgg)
        if run.due("save", stage, step):
            if stage == "vgg" and c["scale_taps"]:
                vgg.sizes["scale"] = on_rank0(lambda: tap_scales(run, ema.module if ema else vgg))
            run.save(stage, step, vgg, ema, optimizer=optimizer)


@torch.no_grad()
def tap_scales(run, vgg, num=1000):
    """By what the features are multiplied when this VGG is loaded, dict of `NAMES` (ours; see
    `plumbing.weights.scale_taps`): so that each tap has variance 1 over the training images, the mean over
    its channels and places of their variances. The term d_l (Eq. 4) of two different images is then about 2
    in every layer, so that no layer leads by its scale alone, and `per_weight` means the same for every
    vgg. Of `num` images, drawn by the seed; a tap that does not vary keeps its scale.
    """
    draw = random.Random(mix(run.config["seed"], "taps"))
    drawn, sums = draw.sample(range(len(run.train)), min(num, len(run.train))), {}
    taps = VGGTaps(fold_batch_norm(vgg))
    for first in range(0, len(drawn), 50):
        x = torch.stack([run.train.view(i) for i in drawn[first : first + 50]])
        for name, feature in taps(to_float(x, run.device), NAMES).items():
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
def evaluate_classifier(run, stage, step, vgg, limit=5000):
    """Share of validation images that the VGG or scorer in training classifies rightly."""
    vgg.eval()
    right = total = 0
    for indices, x in val_batches(run, limit):
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        with run.autocast:
            right += (vgg(normalize_images(x)).argmax(1) == labels).sum().item()
        total += len(labels)
    run.log(stage, step, val_accuracy=ratio(run, [right, total])[0])
