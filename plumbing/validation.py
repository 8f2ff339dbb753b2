"""Validation during training; each process takes a part of the images."""

import math
from functools import partial

import torch

from plumbing.codes import codebook_usage, count_codes
from plumbing.images import psnr, to_float, to_uint8
from plumbing.processes import all_reduce_mean, mix, print0, rank, seeded_rand, world
from plumbing.slices import generate_images


def val_batches(run, limit, batch=50):
    """(indices, images) of this process's share of the first `limit` validation images."""
    mine = list(range(rank(), min(limit, len(run.val)), world()))
    for i in range(0, len(mine), batch):
        indices = mine[i : i + batch]
        yield indices, to_float(torch.stack([run.val.view(j) for j in indices]), run.device)


def ratio(run, sums):
    """The first entries of a vector of sums over the last one, a count; summed over processes."""
    sums = all_reduce_mean(torch.tensor(sums, dtype=torch.float64).to(run.device))
    return (sums[:-1] / sums[-1].clamp(min=1)).tolist()


@torch.no_grad()
def evaluate_tokenizer(run, stage, step, tokenizer, limit=1000):
    """PSNR, L1 and hard codebook usage on validation images; a sheet of inputs above reconstructions."""
    tokenizer.eval()
    none = torch.zeros(1, *tokenizer.token_shape, dtype=torch.int64, device=run.device)
    counts = torch.zeros_like(count_codes(none, tokenizer.codebook_size), dtype=torch.float32)
    sums = [0.0, 0.0, 0]  # a process may have no image
    for _, x in val_batches(run, limit):
        with run.autocast:
            tokens = tokenizer.encode(x)
            x_hat = tokenizer.decode(tokens).float()
        counts += count_codes(tokens, tokenizer.codebook_size)
        values = psnr(x, x_hat).sum().item(), (x - x_hat).abs().mean((1, 2, 3)).sum().item(), len(x)
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    val_psnr, val_l1 = ratio(run, sums)
    usage, perplexity = codebook_usage(all_reduce_mean(counts))
    num_tokens = min(limit, len(run.val)) * tokenizer.token_shape[0]
    run.log(stage, step, val_psnr=val_psnr, val_l1=val_l1, usage=usage, perplexity=perplexity,
            usage_tokens=num_tokens)
    if num_tokens < PER_CODE * tokenizer.codebook_size and "few_tokens" not in run.warned:
        run.warned.add("few_tokens")
        print0(f"note: usage is counted on {num_tokens} validation tokens, few for {tokenizer.codebook_size} "
               "codes: it says little, and no alarm is raised")
    x = torch.stack([run.val.view(i) for i in range(min(10, len(run.val)))])
    with run.autocast:
        x_hat = to_uint8(tokenizer.decode(tokenizer.encode(to_float(x, run.device))))
    run.sheet(f"reconstructions_{stage}", torch.cat([x, x_hat]), len(x), sides=("input", "reconstruction"))


@torch.no_grad()
def evaluate_prior(run, stage, step, prior, tokenizer, codes, limit=5000, batch=100):
    """Nats per token and top-1 accuracy on validation codes, beside ln K and the unigram entropy; samples.

    NAR is measured at fixed mask ratios, the same at every call and in every run.
    """
    prior.eval()
    eager = partial(torch.compiler.set_stance, "force_eager")  # --compile is for steps, all of one shape
    classes, sums = prior.config.num_classes, [0.0, 0.0, 0]
    for start in range(rank() * batch, min(limit, len(codes["val"])), world() * batch):
        tokens = codes["val"][start : start + batch].long().to(run.device)
        labels = codes["val_labels"][start : start + batch].to(run.device) if classes else None
        noise = seeded_rand(len(tokens), tokens.shape[1] + 1, seed=mix("val", start)).to(run.device)
        inputs, loss_mask = prior.inputs(tokens, noise)
        with eager(), run.autocast:
            logits = prior(inputs, labels)
        loss, accuracy = prior.loss(logits, tokens, loss_mask)
        count = loss_mask.sum().item()
        values = loss.item() * count, accuracy.item() * count, count
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    loss, accuracy = ratio(run, sums)
    K = prior.config.codebook_size
    run.log(stage, step, val_loss=loss, val_top1=accuracy, ln_K=math.log(K),
            unigram_entropy=codes["unigram"])
    columns = min(10, classes or 8)
    num, seed, settings = columns * ROWS, run.config["seed"], run.config["sample"]
    labels = [i % columns for i in range(num)] if classes else None
    with eager(), run.autocast:
        images = generate_images(prior, tokenizer, num, labels, seed, settings, batch=min(num, 50))
    run.sheet(f"samples_{stage}", images, columns, names=[run.train.class_names[c] for c in labels or ()])


def early_warnings(rows, stage, c, codebook_size=0):
    """Signs of a run that goes wrong, with cause and remedy: {name: message}.

    rows: the lines of metrics.jsonl of this stage so far, oldest first;  c: its section of the preset
    codebook_size: K; a usage counted on less than PER_CODE * K tokens raises no alarm, its fall may be chance
    """
    found = {}
    usage, disc, val, per, rec = (
        [row[name] for row in rows if row.get(name) is not None]
        for name in ("usage", "loss_disc", "val_loss", "loss_per", "loss_rec"))
    enough = all(row["usage_tokens"] >= PER_CODE * codebook_size for row in rows if "usage_tokens" in row)
    if enough and usage and usage[-1] < 0.8 * max(usage):
        entropy = f"raise {stage}.gamma or " if any("loss_entropy" in row for row in rows) else ""
        found["usage"] = (f"codebook usage fell from {max(usage):.0%} to {usage[-1]:.0%}: codes die; "
                          f"{entropy}lower {stage}.lr with --set")
    if len(disc) >= 5 and max(disc[-5:]) < 0.1:
        found["disc"] = (f"the discriminator wins, its loss stays below 0.1 and teaches nothing; raise "
                         f"{stage}.r1_gamma or {stage}.adv_start (begin later) with --set")
    if len(val) > 1 and val[-1] > 1.02 * min(val):
        found["val"] = (f"the validation loss rose from {min(val):.4g} to {val[-1]:.4g}: overfitting; fewer "
                        "--steps, --set prior.dropout=0.1, or more code_variants")
    if rec and per and c["per_weight"] and c["per_weight"] * per[-1] < 1e-3 * rec[-1]:
        found["per"] = (f"the perceptual term is near zero beside the L1 term: are the weights of --vgg "
                        f"trained ones, and is {stage}.per_weight large enough?")
    return found


ROWS = 10  # of a sheet of samples
PER_CODE = 10  # tokens for each code that a usage must be counted on before its fall means anything
