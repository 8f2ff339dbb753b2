"""The probe: is a tokenizer good for generation? Minutes instead of a large prior; not in the paper."""

import json
import math
import random
import time

import torch
from tqdm import tqdm

import forks
from plumbing.codes import count_codes
from plumbing.data import images_of, load_data
from plumbing.files import read_checkpoint, save_text, writable
from plumbing.hashes import latent_hash
from plumbing.images import psnr, to_float
from plumbing.models import classes_of, load_model
from plumbing.processes import mix, print0, rank, setup_device
from plumbing.slices import decode
from prior_ar import ARPrior
from studies.tables import number, print_table
from visualize import alpha_of, same_size, stability

NUMBERS = "bits_per_image", "relative", "psnr"  # that `compare` decides by


def probe(train, val, codebook_size, device="cpu", steps=400, batch=64, seed=0, Prior=ARPrior, **more):
    """Trains the same small AR prior, without classes, for the same number of steps on any codes.

    train, val: (n, N) int64 tokens in [0, codebook_size), or (n, N, k): then with a `Prior` of a fork, whose
                further sizes are `more`
    returns:    dict: nats per token of `val` (or sub-token), and of each of its images (n,); bits per image;
                the unigram bits per image (every token by its frequency in `train`, one added), and the ratio
                of the two. N may differ between tokenizers, so bits per image are what compares.
    """
    N, k = train.shape[1], train[0, 0].numel()
    torch.manual_seed(mix(seed, "probe"))
    more = dict(n_layer=4, n_head=4, n_embd=128, dropout=0.0) | more
    prior = Prior(Prior.Config(codebook_size, *train.shape[1:], **more)).to(device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-3, betas=(0.9, 0.96), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / (steps / 10)) * (1 + math.cos(math.pi * t / steps)) / 2)
    draw = torch.Generator().manual_seed(mix(seed, "probe order"))
    prior.train()
    for _ in tqdm(range(steps), "probe", disable=None if rank() == 0 else True):
        tokens = train[torch.randint(len(train), (batch,), generator=draw)].to(device)
        loss, _ = prior.loss(prior(tokens), tokens)  # in float32 everywhere, so that machines agree
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    prior.eval()
    with torch.no_grad():
        nats_of_images = torch.cat([prior.predict(part.to(device))[1].mean(1) for part in val.split(100)])
    nats = nats_of_images.cpu().double().mean().item()
    frequency = count_codes(train, codebook_size).double().view(k, -1) + 1
    surprise = -(frequency / frequency.sum(1, keepdim=True)).log()  # (k, K)
    unigram = sum(surprise[i][part].mean().item() for i, part in enumerate(val.reshape(-1, k).unbind(1))) / k
    bits = N * k / math.log(2)
    return dict(nats_per_token=nats, bits_per_image=nats * bits, unigram_bits_per_image=unigram * bits,
                relative=nats / unigram, num_tokens=N, codebook_size=codebook_size, steps=steps,
                nats_of_images=nats_of_images.tolist())


def probe_of(ckpt):
    """The AR prior of a checkpoint's fork, as small as ours."""
    fork = ckpt["config"].get("fork")
    more = getattr(forks.load(fork), "PROBE", {}) if fork else {}
    return dict(Prior=classes_of(ckpt["config"])["ar"]) | more


def compare(args):
    """`compare A.pt B.pt`: the probe, PSNR and code stability of tokenizers on the same images; rFD is for
    `metrics`. A folder of --data is split into training and validation images as train.py does. For a
    tokenizer of another kind call `probe` with its tokens."""
    out, device = args.out or args.files[0].with_name("compare.json"), setup_device(args.device)
    writable(out, suffix=".json")
    ckpts = [read_checkpoint(path, ("phase1", "phase2")) for path in args.files]
    config, images, rows, samples = ckpts[0]["config"], [], [], []
    for path, ckpt in zip(args.files, ckpts, strict=True):
        same_size(path, ckpt, config, args.files[0])
    splits = images_of(args.files[0], config) if not args.data else (
        load_data(dict(config, data=args.data, val=None), labels=False))
    for split, limit in zip(splits, (args.samples or 5000, 1000), strict=True):
        drawn = random.Random(mix(0, "compare")).sample(range(len(split)), min(limit, len(split)))
        images.append(torch.stack([split.view(i) for i in drawn]))  # training images lie class by class
    for path in args.files:
        begin = time.time()
        tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
        tokens = [torch.cat([tokenizer.encode(to_float(part, device)).cpu() for part in split.split(100)])
                  for split in images]
        x = to_float(images[1][:200], device)
        decibels = psnr(x, decode(tokenizer, tokens[1][:200].to(device)))
        row = dict(
            ckpt=str(path), tokenizer_hash=latent_hash(tokenizer), **alpha_of(ckpt["config"]),
            train_images=len(images[0]), val_images=len(images[1]), psnr_images=len(x),
            psnr=decibels.mean().item(), changed=stability(tokenizer, x),
            **probe(*tokens, tokenizer.codebook_size, device, args.steps or 400, **probe_of(ckpt)))
        row["seconds"] = round(time.time() - begin, 1)
        share = torch.tensor(row.pop("nats_of_images")) / row["nats_per_token"]  # of the mean
        samples.append(dict(psnr=decibels.cpu(), **{name: share * row[name] for name in NUMBERS[:2]}))
        rows.append(row)
    names = *NUMBERS, "unigram_bits_per_image"
    print_table([["", *names], *([row["ckpt"], *(number(row[name]) for name in names)] for row in rows)])
    for name in NUMBERS:
        print0(best(name, rows, samples))
    save_text(json.dumps(rows, indent=1) + "\n", out)
    print0(f"wrote {out}")


def best(name, rows, samples):
    """A line that names the best tokenizer in a number, and those that are no worse beyond the noise: twice
    the standard error of the difference, over the same validation images."""
    better = "higher" if name == "psnr" else "lower"
    first = (max if name == "psnr" else min)(range(len(rows)), key=lambda i: rows[i][name])
    alike = []
    for i, own in enumerate(samples):
        gaps = own[name] - samples[first][name]
        noise = 2 * gaps.std() / len(gaps) ** 0.5 if len(gaps) > 1 else math.inf  # not known
        if i != first and gaps.mean().abs() <= noise:
            alike.append(rows[i]["ckpt"])
    within = f"; within the noise of it: {', '.join(alike)}" if alike else ""
    return f"{name}: {better} is better, and best is {rows[first]['ckpt']}{within}"
