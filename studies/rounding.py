"""What `python -m studies export --half` did to a run: the same numbers before and after the rounding."""

import torch

from perceptual import LOGIT
from plumbing.data import images_of
from plumbing.errors import UserError
from plumbing.files import read_checkpoint
from plumbing.images import psnr, to_float
from plumbing.models import load_model
from plumbing.processes import mix, seeded_rand

MEASURES = dict(
    vgg="VGG's accuracy", phase1="PSNR of phase 1, dB", phase2="PSNR of phase 2, dB",
    ar="AR prior, nats per token", nar="NAR prior, nats per masked token")


def rounding(before, after, num=1000, batch=50):
    """Lines of Markdown: each number of a run on validation images, before and after its rounding.

    before, after: {"vgg", "phase1", "phase2", "ar", "nar": checkpoint}, or {"": the only one}
    Each side is on its own: its priors model the tokens of its own tokenizer.
    """
    first = next(iter(before.values()))
    ckpt = read_checkpoint(first, ("vgg", "resnet", *MEASURES))
    before, after = ({name or ckpt["stage"]: path for name, path in side.items()} for side in (before, after))
    try:
        data = images_of(first, ckpt["config"])[1]
    except UserError as error:
        return [f"What this did to its numbers was not measured: {error}."]
    num = min(num, len(data))
    x = to_float(torch.stack([data.view(i) for i in range(num)]), "cpu").split(batch)
    labels = torch.tensor([data.label(i) for i in range(num)]).split(batch)
    (old, tokens), (new, rounded) = (numbers(side, x, labels) for side in (before, after))
    lines = [f"Numbers of the run are of its weights before rounding. On {num:,} validation images:", "",
             "| | before rounding | after |", "|---|---|---|"]
    lines += [f"| {MEASURES[name]} | {old[name]:.4f} | {new[name]:.4f} |" for name in old]
    if len(tokens):
        lines += [f"| tokens that changed | | {(tokens != rounded).float().mean():.2%} |"]
    return lines


@torch.no_grad()
def numbers(paths, x, labels):
    """({stage: number}, tokens of all images) of checkpoints; x, labels: lists of batches"""
    found, tokens, tokenizer_stage = {}, [], "phase2" if "phase2" in paths else "phase1"
    if tokenizer_stage in paths:
        tokenizer = load_model(paths[tokenizer_stage], (tokenizer_stage,))[0]
        tokens = [tokenizer.encode(part) for part in x]
    for stage in (stage for stage in MEASURES if stage in paths):
        model = load_model(paths[stage], (stage,))[0]
        if stage == "vgg":
            values = [(model(part, [LOGIT])[LOGIT].argmax(1) == wanted).float()
                      for part, wanted in zip(x, labels, strict=True)]
        elif stage in ("phase1", "phase2"):
            values = [psnr(part, model.decode(model.encode(part))) for part in x]
        elif tokens:
            values = [nats(model, part, wanted, i) for i, (part, wanted) in enumerate(
                zip(tokens, labels, strict=True))]
        else:
            continue  # a prior alone, whose tokenizer is not handed on with it
        found[stage] = torch.cat(values).double().mean().item()
    return found, torch.cat(tokens) if tokens else []


def nats(prior, tokens, labels, i):
    """(1,): the loss of a batch of tokens; what a masked prior sees of them depends on i only."""
    noise = seeded_rand(len(tokens), tokens.shape[1] + 1, seed=mix("val", i))
    inputs, loss_mask = prior.inputs(tokens, noise)
    logits = prior(inputs, labels if prior.config.num_classes else None)
    return prior.loss(logits, tokens, loss_mask)[0][None]
