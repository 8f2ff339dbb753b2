"""Trains every part of SeQ-GAN (Sec. 3 and 4): a judge, the tokenizer's two phases and both priors.

    python train.py --stage all --preset demo                   # the whole method on a CPU, no download
    python train.py --stage all --preset cifar10 --data DIR     # real images on a CPU
    torchrun --nproc_per_node=8 train.py --stage phase1 --preset imagenet --data DIR    # Table 9
    python train.py --stage phase1 --preset demo --ablation +attention2 --out runs/att  # a row of Table 1

Stages: vgg (a judge of one's own; with --arch resnet a scorer for metrics), phase1, phase2, ar, nar, or
all. Each leaves one checkpoint in runs/<preset>/, which later stages find there. The same command again
continues an interrupted run.

Nothing about random numbers or data order is stored: every draw is a function of (seed, step, position in
the global batch), so a resumed run equals an unbroken one.
"""

import argparse
import difflib
import json
from pathlib import Path

from plumbing.paths import as_path, expanded
from plumbing.console import steady_process

STAGES = ("vgg", "phase1", "phase2", "ar", "nar")

# ----------------------------------------------------------------------------------------------------------
# Presets (Tables 9 and 10). `--set section.key=value` changes any single value.
# ----------------------------------------------------------------------------------------------------------

LOSS = dict(beta=0.25, gamma=0.01, per_weight=1.0, adv_weight=0.1, adv_start=0.05, adv_ramp=0.05,
            gan="logistic", adaptive=False, r1_gamma=10.0, r1_every=16, layers=None, rec="l1",
            disentangle=0.0, represent=0.0, clip=0.0)
IMAGENET = dict(
    data=None, val=None, limit=None, image_size=256, conditional=True, vgg="imagenet", code_variants=10,
    seed=0, precision="bf16", teachers=[],
    tokenizer=dict(),
    discriminator=dict(kind="style", channel_multiplier=1, max_width=512),
    judge=dict(width=64, hidden=4096, batch=256, steps=450_000, lr=1e-3, schedule="cosine", lr_end=0.0,
               lr_start=0, warmup=0, betas=[0.9, 0.99], weight_decay=0.05, ema=0.0, label_smoothing=0.1),
    phase1=dict(LOSS, alpha=1.0, batch=256, steps=500_000, lr=1e-4, schedule="cosine", lr_end=5e-5,
                lr_start=0, warmup=0, betas=[0.9, 0.99], weight_decay=0.0, ema=0.0, init=None),
    phase2=dict(LOSS, alpha=0.0, batch=128, steps=200_000, lr=5e-5, schedule="constant", lr_end=5e-5,
                lr_start=0, warmup=0, betas=[0.5, 0.9], weight_decay=0.0, ema=0.0),
    prior=dict(n_layer=24, n_head=16, n_embd=768, dropout=0.1, class_dropout=0.0, head="tied", head_layers=3,
               block="gpt"),
    ar=dict(batch=256, steps=1_500_000, lr=1e-4, schedule="exponential", lr_end=5e-6, lr_start=80_000,
            warmup=0, betas=[0.9, 0.96], weight_decay=1e-2, ema=0.0, clip=0.0),
    nar=dict(batch=256, steps=1_500_000, lr=1e-4, schedule="linear", lr_end=0.0, lr_start=50_000,
             warmup=0, betas=[0.9, 0.96], weight_decay=1e-2, ema=0.0, label_smoothing=0.0, clip=0.0),
    sample=dict(top_p=0.92, temperature=1.0, nar_steps=12, token_temperature=1.0, choice_temperature=0.45,
                confidence_space="prob", guidance=1.0, top_k=0),
)


def variant(base, **changes):
    """A copy of a preset with nested changes: variant(P, ar=dict(batch=64)) keeps P's other `ar` values."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged[key], dict)
        merged[key] = {**merged[key], **value} if nested else value
    return merged


# The paper's setting for Tables 1, 5 and 6 and Fig. 5: one phase, batch 64, 500,000 steps of everything.
ABLATION = variant(IMAGENET, phase1=dict(batch=64, alpha=0.0),
                   ar=dict(batch=64, steps=500_000), nar=dict(batch=64, steps=500_000))
FFHQ = variant(
    IMAGENET, conditional=False,
    phase1=dict(batch=64, steps=300_000), phase2=dict(batch=32),
    ar=dict(batch=32, steps=500_000), nar=dict(batch=32, steps=500_000),
    sample=dict(top_p=0.98, choice_temperature=0.65),
)
LSUN = variant(
    FFHQ,
    phase1=dict(lr=5e-5, schedule="constant", init="required"), phase2=dict(batch=64),
    ar=dict(batch=256), nar=dict(batch=256),
)
CIFAR10 = variant(  # ours, for a CPU: small networks, a judge of one's own, short schedules
    IMAGENET, data="cifar10", image_size=32, vgg="judge", code_variants=2,
    tokenizer=dict(base_width=32, channel_mult=[1, 2, 4, 4], codebook_size=256, codebook_dim=64,
                   warm_start=200),
    discriminator=dict(max_width=32),
    judge=dict(width=32, hidden=256, batch=128, steps=6000, lr=2e-3),
    phase1=dict(batch=64, steps=3600, lr=6e-4, lr_end=3e-5, gamma=0.1, per_weight=0.03, ema=0.995),
    phase2=dict(batch=64, steps=600, lr=2e-4, per_weight=0.1, ema=0.99),
    prior=dict(n_layer=8, n_head=8, n_embd=256, dropout=0.0),
    ar=dict(batch=128, steps=4000, lr=1e-3, lr_start=1500, lr_end=3e-5, warmup=200, ema=0.995),
    nar=dict(batch=128, steps=7000, lr=1e-3, lr_start=3000, warmup=400, ema=0.995),
    sample=dict(top_p=0.8, token_temperature=0.7),
)
CLAIMS = variant(  # ours, for the experiment on the paper's claims: a run in half an hour of one core
    CIFAR10, tokenizer=dict(base_width=24), discriminator=dict(max_width=24),
    phase1=dict(steps=1200), phase2=dict(steps=200, per_weight=0.03),
    prior=dict(n_layer=6, n_head=6, n_embd=192),
    ar=dict(steps=1500, lr_start=600), nar=dict(steps=2000, lr_start=800),
    sample=dict(top_p=0.92, token_temperature=1.0))  # the paper's sampler: cifar10's was chosen at alpha = 1
DEMO = variant(  # ours, minutes on a CPU
    CIFAR10, data="shapes",
    tokenizer=dict(codebook_size=64, codebook_dim=32, warm_start=100),
    discriminator=dict(max_width=16),
    judge=dict(width=16, hidden=128, batch=64, steps=700),
    phase1=dict(batch=32, steps=700, lr=1e-3, lr_end=5e-5, per_weight=0.03, ema=0.99),
    phase2=dict(batch=32, steps=150, ema=0.98),
    prior=dict(n_layer=4, n_embd=160),
    ar=dict(steps=1000, lr=2e-3, lr_start=400, lr_end=1e-4, warmup=100, ema=0.99),
    nar=dict(steps=3000, lr=2e-3, lr_start=1000, warmup=200, ema=0.99),
)
# FQGAN (arXiv 2411.16681): its tokenizers as published; its Base prior, with the learning rate of the code
# (I23). NAR, phase 2 and everything at 32x32 are ours.
FQ_PRIOR = dict(dropout=0.1, class_dropout=0.1, head="ar", block="llama")
FQ_AR = dict(lr=1e-4, schedule="constant", lr_end=1e-4, betas=[0.9, 0.95], weight_decay=0.05, clip=1.0)
FQGAN_DUAL = variant(
    IMAGENET, teachers=[None, "clip-vit-l-14"],
    tokenizer=dict(trunk="vqgan", codebook="fq", codebook_size=16_384, codebook_dim=8, num_codebooks=2,
                   adapter_layers=6, teacher_widths=[0, 1024]),
    discriminator=dict(kind="patch"),
    phase1=dict(rec="l2", layers="lpips", gamma=0.03, disentangle=0.1, represent=0.5, gan="hinge",
                adv_weight=0.5, adv_start=0.1, adv_ramp=0.0, r1_gamma=0.0, steps=200_000, lr=2e-4,
                schedule="constant", lr_end=2e-4, betas=[0.9, 0.95], clip=1.0),
    prior=dict(FQ_PRIOR, n_embd=1024), ar=FQ_AR, nar=dict(FQ_AR), sample=dict(top_p=1.0, guidance=2.0),
)
FQ_SMALL = dict(  # without warm_start: unit vectors learn much faster quantized than not
    trunk="vqgan", codebook="fq", codebook_dim=8, num_codebooks=2, adapter_layers=1, warm_start=0)
CIFAR10_FQ = variant(
    CIFAR10, teachers=[None, "judge"], tokenizer=dict(FQ_SMALL, teacher_widths=[0, 256]),
    phase1=dict(gamma=0.03, disentangle=0.1, represent=0.5, clip=1.0),
    prior=dict(FQ_PRIOR, dropout=0.0, n_layer=6, head_layers=2), sample=dict(top_p=0.9, guidance=1.5))
DEMO_FQ = variant(
    DEMO, teachers=[None, "judge"], tokenizer=dict(FQ_SMALL, teacher_widths=[0, 128]),
    phase1=dict(gamma=0.03, disentangle=0.1, represent=0.5, clip=1.0), nar=dict(steps=2200, lr_start=800),
    prior=dict(FQ_PRIOR, dropout=0.0, n_layer=3, head_layers=1), sample=dict(top_p=0.9, guidance=1.5))
PRESETS = {
    "imagenet": IMAGENET,
    "imagenet-ablation": ABLATION,
    "ffhq": FFHQ,
    "lsun-cat": variant(LSUN, phase1=dict(steps=26_000)),
    "lsun-bedroom": variant(LSUN, phase1=dict(steps=48_000)),
    "lsun-church": variant(
        LSUN, phase1=dict(batch=32, steps=4_000), phase2=dict(batch=32), ar=dict(batch=64), nar=dict(batch=64)
    ),
    "cifar10": CIFAR10,
    "demo": DEMO,
    "fqgan-dual": FQGAN_DUAL,
    "fqgan-triple": variant(
        FQGAN_DUAL, teachers=[None, "dinov2-vit-s-14", "clip-vit-b-16"], sample=dict(guidance=1.75),
        tokenizer=dict(num_codebooks=3, teacher_widths=[0, 384, 768])),
    "cifar10-fq": CIFAR10_FQ,
    "demo-fq": DEMO_FQ,
    "claims": CLAIMS,
}
LAYER_NAMES = ("low", "A", "B", "C", "D", "sem", "E")  # the rows of Table 6: perceptual.LAYER_SETS
ABLATIONS = ("baseline", "+conv2", "+attention2", "+2x", "vqgan", "fn", "kmeans", "entropy", *LAYER_NAMES)
FQ_ABLATIONS = ("fq-1x", "fq-2x", "fq-none", "fq-dis", "fq-rep", "fq-both", "fq-alpha1", "head-linear",
                "head-mlp")  # rows of FQGAN's Tables 3 and 4, and SeQ-GAN's loss on FQGAN


def expand_ablation(name, config):
    """--ablation NAME as values of the preset: {"section.key": value}. All rows train one phase.

    Table 1 and Table 5 have alpha = 0. Where the paper's numbers are tied to its scale, ours scale with the
    preset: "fn" has an eighth of the width and eight times the codes, "kmeans" re-estimates from 2 % to
    6 % of the steps. The rows of Table 5 start with quantization (no `warm_start`, itself a K-means).
    raises: ValueError for another name
    """
    steps, tokenizer = config["phase1"]["steps"], config["tokenizer"]
    K, width = tokenizer.get("codebook_size", 1024), tokenizer.get("codebook_dim", 256)
    codebook = {"phase1.alpha": 0.0, "tokenizer.warm_start": 0}
    rows = {
        "baseline": {"phase1.alpha": 0.0},
        "+conv2": {"phase1.alpha": 0.0, "tokenizer.decoder_extra_blocks": 2},
        "+attention2": {"phase1.alpha": 0.0, "tokenizer.num_attention": 2},
        "+2x": {"phase1.alpha": 0.0, "phase1.steps": 2 * steps},
        "vqgan": codebook | {"tokenizer.codebook": "plain"},
        "fn": codebook | {"tokenizer.codebook": "fn", "tokenizer.codebook_dim": max(1, width // 8),
                          "tokenizer.codebook_size": 8 * K},
        "kmeans": codebook | {"tokenizer.codebook": "kmeans", "tokenizer.kmeans_warmup": steps // 50,
                              "tokenizer.kmeans_every": max(1, steps // 250),
                              "tokenizer.kmeans_last": 3 * steps // 50},
        "entropy": codebook | {"tokenizer.codebook": "entropy"},
    }
    # "low" and "sem" are alpha = 0 and 1, so they are the same runs
    rows |= {layers: {"phase1.layers": layers} for layers in LAYER_NAMES}
    rows |= {"low": {"phase1.alpha": 0.0}, "sem": {"phase1.alpha": 1.0}}
    low = {} if config["phase1"]["layers"] == "lpips" else {"phase1.alpha": 0.0}  # in the place of LPIPS
    untaught = low | {"tokenizer.teacher_widths": [], "teachers": []}
    single = untaught | {"tokenizer.num_codebooks": 1, "tokenizer.adapter_layers": 0}
    rows |= {"fq-1x": single, "fq-2x": single | {"tokenizer.codebook_size": 2 * K}, "fq-dis": untaught,
             "fq-none": untaught | {"phase1.disentangle": 0.0}, "fq-rep": low | {"phase1.disentangle": 0.0},
             "fq-both": low, "fq-alpha1": {"phase1.alpha": 1.0}}
    rows |= {f"head-{head}": low | {"prior.head": head} for head in ("linear", "mlp")}
    if name in FQ_ABLATIONS and tokenizer.get("trunk") != "vqgan":
        raise ValueError(f"--ablation {name} needs an FQGAN preset")
    if name.startswith("alpha="):
        try:
            rows[name] = {"phase1.alpha": float(name.removeprefix("alpha="))}
        except ValueError:
            raise ValueError(f"--ablation {name}: expected alpha=NUMBER") from None
    if name not in rows:
        raise ValueError(f"--ablation {name}: not one of {', '.join(rows)} or alpha=NUMBER")
    if "phase1.alpha" in rows[name] and config["phase1"]["layers"]:  # which alpha would not touch
        return rows[name] | {"phase1.layers": None}
    return rows[name]


def parse_args(argv=None):
    """Command line to (args, config): config is the preset with every flag and --set applied."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("--stage", choices=(*STAGES, "all"), help="what to train")
    add("--preset", default="demo", choices=PRESETS, help="recipe (default: demo)")
    add("--data", type=expanded, help="folder of images (class sub-folders or none), 'cifar10' or 'shapes'")
    add("--val", type=expanded, help="folder of validation images (default: DATA/val beside DATA/train, else "
        "a 5 %% split)")
    add("--out", type=as_path, help="run folder (default: runs/<preset>)")
    add("--tokenizer", type=as_path, help="tokenizer checkpoint for phase2, ar, nar; first weights of phase1")
    add("--vgg", type=expanded, help="perceptual network: 'imagenet', a torchvision .pth, a vgg.pt of ours, "
        "'judge' (this run's own) or 'random'")
    add("--steps", type=int, help="optimizer steps of this stage")
    add("--batch", type=int, help="global batch of this stage, over all processes")
    add("--micro-batch", type=int, help="largest batch per process and forward pass; the rest is accumulated")
    add("--alpha", type=float, help="semantic ratio of Eq. 4 in phase1")
    add("--ablation", help="a row of Table 1, 5 or 6 or Fig. 5b, or of FQGAN's Tables 3 and 4: "
        f"{', '.join((*ABLATIONS, *FQ_ABLATIONS))} or alpha=NUMBER")
    add("--arch", choices=("vgg", "resnet"), default="vgg", help="of --stage vgg: the judge, or a scorer")
    add("--seed", type=int, help="seed of everything (default 0)")
    add("--limit", type=int, help="use only LIMIT training images, drawn by the seed")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one preset value")
    add("--workers", type=int, default=0, help="data loading processes per rank (0: in the training process)")
    add("--device", default="auto", help="cuda, cpu or auto")
    add("--timeout", type=float, default=1800, help="seconds until processes give up a dead or hung one")
    add("--precision", choices=("bf16", "fp32"), help="autocast type (default: bf16)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--log-every", type=int, default=20, help="steps between metrics lines")
    add("--eval-every", type=int, help="steps between validations, 0: none (default: a fifth of the run)")
    add("--save-every", type=int, help="steps between checkpoints (default: a tenth, at most 2000)")
    add("--explain", action="store_true", help="print modules, sizes and recipe of the preset, then stop")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    if not (args.stage or args.explain):
        parser.error("--stage is missing. To see the whole method work: python train.py --stage all")
    if args.arch == "resnet":
        if args.stage != "vgg":
            parser.error("--arch resnet belongs to --stage vgg")
        args.stage = "resnet"
    try:
        return args, build_config(args)
    except ValueError as error:
        parser.error(str(error))


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list"}
CHOICES = dict(
    precision=("bf16", "fp32"), kind=("style", "patch"), gan=("logistic", "hinge"),
    schedule=("cosine", "exponential", "linear", "constant"), confidence_space=("prob", "log"),
    layers=(*LAYER_NAMES, "lpips"), init=("required",), rec=("l1", "l2"),
    head=("tied", "ar", "linear", "mlp"), block=("gpt", "llama"))
BOUNDS = dict(  # of flags and of values of a preset, wherever a name occurs; VGG-16 needs 32 pixels
    steps=(0, 1e12), batch=(1, 1e9), micro_batch=(1, 1e9), workers=(0, 1e4), timeout=(0.1, 1e9),
    log_every=(1, 1e12), eval_every=(0, 1e12), save_every=(1, 1e12), seed=(0, 2**63 - 1), limit=(1, 1e12),
    image_size=(32, 1e5), codebook_size=(2, 1e8), codebook_dim=(1, 1e5), width=(1, 1e5), hidden=(1, 1e6),
    n_layer=(1, 1e4), n_head=(1, 1e4), n_embd=(1, 1e6), dropout=(0, 1), code_variants=(1, 1e4),
    alpha=(0, 1), beta=(0, 1e9), gamma=(-1e9, 1e9), per_weight=(0, 1e9), adv_weight=(0, 1e9),
    adv_start=(0, 1e9), adv_ramp=(0, 1e9), r1_gamma=(0, 1e9), r1_every=(1, 1e9), label_smoothing=(0, 1),
    lr=(1e-12, 1e3), lr_end=(0, 1e3), lr_start=(0, 1e12), warmup=(0, 1e12), ema=(0, 0.999999),
    weight_decay=(0, 1e3), top_p=(1e-9, 1), temperature=(0, 1e9), token_temperature=(0, 1e9),
    choice_temperature=(0, 1e9), nar_steps=(1, 1e6), guidance=(0, 1e3), top_k=(0, 1e9), class_dropout=(0, 1),
    head_layers=(1, 1e4), max_width=(1, 1e5), channel_multiplier=(1, 1e4), clip=(0, 1e9),
    disentangle=(0, 1e9), represent=(0, 1e9))


def check_values(values, name):
    """raises: ValueError for a value outside its BOUNDS or CHOICES, nan too; name: how messages call a key"""
    for key, value in values.items():
        if value is not None and key in BOUNDS:
            low, high = BOUNDS[key]
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name(key)} must be a number between {low:g} and {high:g}, got {value}")
        if value is not None and value not in CHOICES.get(key, [value]):
            raise ValueError(f"{name(key)} must be one of {', '.join(CHOICES[key])}, got {value}")
        if key == "limit" and isinstance(value, float):
            raise ValueError(f"{name(key)} must be a whole number, got {value}")
        if key == "betas" and not (len(value) == 2 and all(
                isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)):
            raise ValueError(f"{name(key)} must be two numbers from 0 to below 1, got {value}")


def build_config(args):
    """The preset of the command line with `--data`, `--steps`, ... and every `--set` written into it."""
    check_values(vars(args), lambda key: "--" + key.replace("_", "-"))
    config = variant(PRESETS[args.preset])
    for item in args.set:
        place, _, text = item.partition("=")
        *section, key = place.split(".")
        target = config[section[0]] if section and isinstance(config.get(section[0]), dict) else config
        known = key in target or section == ["tokenizer"]
        if not text or len(section) > 1 or (section and target is config) or not known:
            raise ValueError(f"--set {item}: expected SECTION.KEY=VALUE with a key of the preset")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        old = target.get(key)
        if old is not None and type(value) is not type(old) and (type(old), type(value)) != (float, int):
            raise ValueError(f"--set {item}: expected {KINDS.get(type(old), 'one value of this section')}")
        if key in ("data", "val") and not isinstance(value, str):
            raise ValueError(f"--set {item}: expected a word")
        target[key] = expanded(value) if key in ("data", "val", "vgg", "teachers") else value
    for key in ("data", "val", "vgg", "seed", "limit", "precision"):
        if getattr(args, key) is not None:
            config[key] = getattr(args, key)
    for key in ("steps", "batch"):
        if getattr(args, key) is not None:
            if args.stage in (None, "all"):
                raise ValueError(f"--{key} belongs to one stage; use --set phase1.{key}=... with --stage all")
            config["judge" if args.stage in ("vgg", "resnet") else args.stage][key] = getattr(args, key)
    if args.alpha is not None:
        if config["phase1"]["layers"]:
            raise ValueError(f"--alpha does nothing beside phase1.layers = {config['phase1']['layers']}; "
                             "--ablation alpha=NUMBER puts it in their place")
        config["phase1"]["alpha"] = args.alpha
    if args.ablation:
        if args.alpha is not None:
            raise ValueError("--ablation sets alpha itself; leave --alpha out")
        args.expanded = expand_ablation(args.ablation, config)
        for path, value in args.expanded.items():
            *section, key = path.split(".")
            (config[section[0]] if section else config)[key] = value
    guided = config["conditional"] and config["sample"]["guidance"] != 1
    if guided and not config["prior"]["class_dropout"]:
        raise ValueError("sample.guidance needs a prior that knows the null class: --set "
                         "prior.class_dropout=0.1 too")
    check_values(config, str)
    for section, values in config.items():
        if isinstance(values, dict):
            check_values(values, lambda key, section=section: f"{section}.{key}")
    return config


if __name__ == "__main__":
    steady_process()
    ARGUMENTS = parse_args()  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import contextlib
import math
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, fields
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from perceptual import (
    LAYER_SETS, TEACHERS, JudgeTeacher, PatchDiscriminator, ResNet, StyleDiscriminator, VGGTaps,
    adaptive_weight, adv_loss, build_lpips, build_vgg16, disc_loss, disentanglement, layer_weights,
    load_teacher, load_vgg16, normalize_images, perceptual_loss, r1_penalty, representation_loss,
)
from prior_ar import ARPrior, PriorConfig
from prior_nar import NARPrior, mask_tokens
from sample import (
    FORMAT, STOPS, UserError, agreed, barrier, batches, claim, fetched, intact, is_folder, latent_hash,
    load_data, load_model, make_sheet, mix, my_rows, newest_intact, on_rank0, one_line_errors, peak_memory,
    print0, pyplot, rank, read_checkpoint, save_atomic, save_checkpoint, save_torch, seeded_rand,
    setup_device, to_device, to_float, warn, weights_hash, world,
)
from tokenizer import TokenizerConfig, VQTokenizer, all_reduce_mean, codebook_usage, count_codes
from visualize import (
    early_warnings, evaluate_judge, evaluate_prior, evaluate_tokenizer, explain, read_metrics, summarize,
)

# ----------------------------------------------------------------------------------------------------------
# What all stages share
# ----------------------------------------------------------------------------------------------------------


def lr_at(step, c):
    """Learning rate after `step` updates (Tables 9 and 10; a linear warm-up comes on top).

    cosine:      lr until lr_start, then half a cosine to lr_end at `steps`
    exponential: lr until lr_start, then geometrically to lr_end at `steps`
    linear:      lr until lr_start, then in a straight line to lr_end ("start_iter" begins the decay, I17)
    constant:    lr
    """
    lr, end, T = c["lr"] * min(1.0, (step + 1) / max(1, c["warmup"])), c["lr_end"], c["steps"]
    t = min(max(0.0, (step - c["lr_start"]) / max(1, T - c["lr_start"])), 1.0)
    if c["schedule"] == "cosine":
        return end + (lr - end) / 2 * (1 + math.cos(math.pi * t))
    if c["schedule"] == "exponential":
        return lr * (end / lr) ** t
    if c["schedule"] == "linear":
        return lr + (end - lr) * t
    return lr


def build_optimizer(model, c):
    """Adam, or AdamW where there is weight decay: on matrices of linear layers and convolutions only."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not c["weight_decay"]:
        return torch.optim.Adam(params, lr=c["lr"], betas=c["betas"], fused=True)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    decay = {id(m.weight) for m in layers}
    groups = [[p for p in params if (id(p) in decay) == wanted] for wanted in (True, False)]
    return torch.optim.AdamW(
        [dict(params=groups[0], weight_decay=c["weight_decay"]), dict(params=groups[1], weight_decay=0.0)],
        lr=c["lr"], betas=c["betas"], fused=True,
    )


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_ema(model, decay):
    """Exponential moving average of the weights, or None for decay 0 (the paper states none)."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


def slow_average(stage, c, most=0.15):
    """What to say of averaged weights that are slower than the run, or "".

    After n updates the first weights still make up decay^n of the average; told is a share above `most`.
    """
    share = c["ema"] ** c["steps"]
    if not c["ema"] or share <= most:
        return ""
    name, fits = f"{SECTION[stage]}.ema", f"{max(0.0, 1 - 5 / max(1, c['steps'])):.6g}"
    return (f"{name}={c['ema']:g} is slow for {c['steps']} steps: {share:.0%} of the averaged weights, which "
            f"are measured and used, are those of the start; --set {name}={fits} fits, 0 is none")


def check_compiler(device):
    """Compiles a tiny function, as --compile will compile the networks in their first step.

    raises: UserError if that fails, mostly for want of a compiler: C++ on a CPU, C on a GPU (for Triton)
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, with dozens of lines
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0]).strip()
        wanted = "C++ compiler (g++, or what CXX names)"
        if device.type == "cuda":
            wanted = "C compiler (gcc, or what CC names)"
        raise UserError(f"--compile does not work here: {reason}. Install a {wanted}, or leave --compile "
                        "out") from None


def accumulate(net, parts):
    """Yields the micro-batches of a step; DDP synchronises gradients in the last backward only."""
    parts = list(parts)
    for i, part in enumerate(parts):
        with net.no_sync() if isinstance(net, DDP) and i + 1 < len(parts) else contextlib.nullcontext():
            yield part


class Run:
    """The run folder, the device, the data and the log: what every stage needs besides its own networks.

    A stage calls `wrap` for each network that it trains, `start` (which goes on from <stage>.pt), `loop` for
    its steps, `update` for each optimizer, and at the end of a step `due` with `log`, `save` and so on.
    """

    def __init__(self, args, config):
        self.args, self.config = args, config
        self.out = args.out or Path("runs") / args.preset
        there = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK) or self.out.absolute() == Path("/"):
            raise UserError(f"--out {self.out}: {there} is no folder that can be written to")
        self.device, self.parent = setup_device(args.device, args.timeout), os.getppid()
        if args.compile:
            check_compiler(self.device)
        if self.device.type == "cpu":
            print0("note: on a CPU freed memory is kept for the next step (README, Speed)")
        if args.workers > 4 * os.cpu_count() and rank() == 0:
            warn(f"--workers {args.workers} on {os.cpu_count()} cores")
        self.train, self.val = load_data(config)
        self.fingerprint = on_rank0(lambda: [self.train.fingerprint, self.val.fingerprint])
        self.train.bad_list = self.val.bad_list = self.out / "bad_files.txt"
        if self.device.type == "cpu" and config["image_size"] <= 64:
            # a CPU heeds this switch too, and flash attention's backward is ten times slower there
            torch.backends.cuda.enable_flash_sdp(False)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=config["precision"] == "bf16")
        self.note = "random VGG weights: a test run" if config["vgg"] == "random" else ""
        self.lock, self.request, self.agreed, self.in_loop, self.place = None, 0, 0, False, "start"
        self.opened = None

    @cached_property
    def judge(self):
        """The frozen VGG of the perceptual loss: ImageNet's, a file, random, or this run's own vgg.pt."""
        source = self.config["vgg"]
        own = self.out / "vgg.pt" if source == "judge" else Path(source)
        if needs_judge(self):
            print0(f"note: the perceptual loss needs a judge and {own} is not finished: training it first")
            train_stage(self, "vgg")
        if own.suffix == ".pt":
            judge, ckpt = load_model(own, ("vgg",), self.device)
            if source == "judge":
                refuse_other_config(own, DEPENDS["vgg"], ckpt["config"], self.config)
                refuse_other_images(own, ckpt, self)
            return judge.to(memory_format=torch.channels_last)

        def load():
            with as_user_error():
                return load_vgg16({"imagenet": None}.get(source, source))

        return VGGTaps(fetched(load)).to(self.device, memory_format=torch.channels_last)

    @cached_property
    def teachers(self):
        """FQGAN: the frozen networks `image -> (B, W)` of the sub-codebooks that have one, in their order."""
        widths = [width for width in self.config["tokenizer"].get("teacher_widths", []) if width]
        names = [name for name in self.config["teachers"] if name]

        def load():
            with as_user_error():
                return [JudgeTeacher(self.judge) if name == "judge" else load_teacher(name) for name in names]

        found = load() if set(names) == {"judge"} else fetched(load)
        for name, teacher, width in zip(names, found, widths, strict=True):
            if teacher.width != width:
                raise UserError(f"teacher {name} gives {teacher.width} features, not the {width} of "
                                "tokenizer.teacher_widths")
        return [teacher.to(self.device) for teacher in found]

    @cached_property
    def lpips(self):
        """LPIPS as a loss, which FQGAN uses: the VGG-16 of the judge under the package's linear layers."""

        def load():
            with as_user_error():
                return build_lpips(load_vgg16({"imagenet": None}.get(self.config["vgg"], self.config["vgg"])))

        return fetched(load).to(self.device, memory_format=torch.channels_last)

    def steps(self, stage):
        return self.config[SECTION[stage]]["steps"]

    def wrap(self, model, *example):
        """DDP over all processes, compiled on demand; the module itself in a run of one process.

        example: arguments of one forward pass. DDP lays out its gradient buckets anew after the first step
        of a process, and three or more processes then add in another order. Two passes without effect
        bring this forward, so that a resumed run adds as an unbroken one does.
        """
        net = model
        if world() > 1:
            device_ids = [self.device.index] if self.device.index is not None else None
            with warnings.catch_warnings():  # torch 2.14 gives broadcast_buffers a new name
                warnings.simplefilter("ignore", FutureWarning)
                net, mode = DDP(model, device_ids, broadcast_buffers=False), model.training
            model.eval()
            for _ in range(WARM_UP):
                with self.autocast:
                    output = net(*example)
                total(output).backward()
            model.zero_grad(set_to_none=True)
            model.train(mode)
        if self.args.compile:
            model.compile()
        return net

    def example(self):
        """Images of the size of a run, for `wrap`."""
        S = self.config["image_size"]
        return torch.zeros(min(self.args.micro_batch or 4, 4), 3, S, S, device=self.device)

    def micro(self, x):
        """This process's part of a batch, cut into micro-batches."""
        return x.split(self.args.micro_batch or len(x))

    def stream(self, batch, start):
        """`batches` of the training images; `train_stage` closes it, in whatever way the stage ends."""
        self.opened = batches(self.train, batch, start, self.args.workers, self.args.timeout)
        return self.opened

    def claim(self):
        """Makes the run folder and locks it, once."""
        self.lock = self.lock or claim(self.out)

    def start(self, stage, made_from=None, **state):
        """Goes on from <stage>.pt where there is one: loads it, cuts the log to fit, returns the steps done.

        made_from: hash of the tokenizer that this stage builds on; a checkpoint of another one is refused.
        """
        path, c = self.out / f"{stage}.pt", self.config[SECTION[stage]]
        on_rank0(self.claim)
        step, seconds, self.skips, self.skips_told = 0, 0.0, {}, {}
        file = on_rank0(lambda: newest_intact(path))
        if file:
            ckpt = read_checkpoint(file, [stage])
            refuse_other_config(file, DEPENDS[stage], ckpt["config"], self.config)
            if made_from not in (None, ckpt["tokenizer_hash"]):
                raise UserError(f"{file} was made with tokenizer {ckpt['tokenizer_hash']}, not with "
                                f"{made_from} as here; move it away or use another --out")
            refuse_other_images(file, ckpt, self)
            if ckpt["world"] != world():
                print0(f"note: {ckpt['world']} processes wrote {file} and {world()} go on: the batches are "
                       "the same, the last bits of sums are not")
            for name, thing in state.items():
                if thing is not None:
                    thing.load_state_dict(ckpt["model"] if name == "model" else ckpt["train"][name])
            step, seconds = ckpt["step"], ckpt["seconds"]
            self.skips = {name: torch.tensor(n, device=self.device) for name, n in ckpt["skips"].items()}
            self.skips_told = {name: skipped for name, (_, skipped) in ckpt["skips"].items()}
        share = f"{c['batch']} images" + (f" = {world()} processes x {c['batch'] // world()}" * (world() > 1))
        print0(f"\n{stage}: step {step} of {c['steps']}, {share} a step, lr {c['lr']}, "
               f"{self.config['precision']} -> {path}")
        if step >= c["steps"]:
            print0(f"{file or path} has all its steps: nothing to do")
        if c["lr"] > 0.1 and rank() == 0:
            warn(f"a learning rate of {c['lr']} is far above the usual")
        told = slow_average(stage, c)
        if told and step < c["steps"] and rank() == 0:
            warn(told)
        if c["batch"] > len(self.train):
            print0(f"note: one step sees each of the {len(self.train)} images "
                   f"{c['batch'] / len(self.train):.1f} times")
        self.clock, self.warned = time.time() - seconds, set()
        self.rows = on_rank0(lambda: self.cut_log(stage, step))
        return step

    def cut_log(self, stage, step):
        """Takes what a later start repeats out of metrics.jsonl, and returns this stage's rows."""
        log = self.out / "metrics.jsonl"
        rows = [row for row in read_metrics(log) if row["stage"] != stage or row["step"] <= step]
        if log.exists():
            save_atomic(lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)), log)
        return [row for row in rows if row["stage"] == stage]

    def loop(self, stage, start):
        """Step numbers with a progress bar; seeds every random draw of the step, and ends when asked to."""
        bar = tqdm(range(start, self.steps(stage)), stage, initial=start, total=self.steps(stage),
                   disable=None if rank() == 0 else True, dynamic_ncols=True)
        self.in_loop = True
        try:
            for step in bar:
                self.place = f"{stage} step {step + 1}"
                torch.manual_seed(mix(self.config["seed"], stage, step, rank()))
                yield step
                if self.agreed > 1:
                    barrier()
                    print0(f"stopped after {self.place}; the same command goes on from there")
                    sys.exit(self.agreed)
                if self.agreed == self.request:
                    self.request = 0
        finally:
            self.in_loop = False

    @contextlib.contextmanager
    def listening(self):
        """The signals STOPS end a run after the step in progress was saved, with 128 + their number as the
        exit code; SIGUSR1 saves and goes on. A second Ctrl-C, and all signals between two stages, end it at
        once. SIGHUP stays ignored where nohup has seen to it. Only a main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            print0("note: not in the main thread, so no signal is heeded: one that ends the program loses "
                   "the steps since the last save")
            yield
            return
        pressed = []  # when Ctrl-C was; torchrun repeats it within an instant

        def save(number, frame):
            self.request = max(self.request, 1)

        def stop(number, frame):
            if number == signal.SIGINT:
                pressed.append(time.monotonic())
                if pressed[-1] > pressed[0] + 0.3:
                    os._exit(130)
            if not self.in_loop:
                sys.exit(128 + number)
            self.request = max(self.request, 128 + number)

        handlers = dict.fromkeys(STOPS, stop) | {signal.SIGUSR1: save}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            del handlers[signal.SIGHUP]
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self, what, stage, step):
        """Is it time, after `step` + 1 updates, to "log", "eval" or "save"? Always after the last one, but
        --eval-every 0 never evaluates. All processes agree that it is time to save once one was asked to,
        or once torchrun, their parent, is gone."""
        if what == "save":
            orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
            self.agreed = agreed(128 + signal.SIGTERM if orphaned else self.request)
            if self.agreed:
                return True
        steps = self.steps(stage)
        default = {"eval": max(1, steps // 5), "save": min(2000, max(1, steps // 10))}
        every = getattr(self.args, f"{what}_every")
        if what == "eval" and every == 0:
            return False
        every = every or default[what]
        return (step + 1) % every == 0 or step + 1 == steps

    def update(self, optimizer, name, clip=0.0):
        """optimizer.step(), which changes nothing if a gradient is not finite. The host does not wait to know
        that: `found_inf` is how fused optimizers are told, and `skips` counts on the device.

        clip: the gradients' norm is cut to this, 0: not. Gradients are equal in all processes, so all skip or
        none.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        bad = 1 - norm.isfinite().long()
        in_a_row, skipped = self.skips.setdefault(name, torch.zeros(2, dtype=torch.int64, device=self.device))
        self.skips[name] = torch.stack([(in_a_row + 1) * bad, skipped + bad])
        optimizer.found_inf = bad.float()
        optimizer.step()

    def count_skips(self):
        """{optimizer: updates skipped so far}, read at log lines and saves, with a warning for new ones.

        raises: UserError, code 1, if the last MAX_SKIPS or more in a row were skipped
        """
        counts = {name: pair.tolist() for name, pair in self.skips.items()}
        for name, (in_a_row, skipped) in counts.items():
            if rank() == 0 and skipped > self.skips_told.get(name, 0):
                warn(f"{self.place}: a gradient of the {name} was not finite, so the update was skipped; "
                     f"{skipped} so far")
            self.skips_told[name] = skipped
            if in_a_row >= MAX_SKIPS:
                raise UserError(f"{self.place}: the last {in_a_row} updates of the {name} were skipped, as a "
                                "gradient was not finite; the last save is intact. Try a lower lr, or "
                                "--precision fp32", code=1, shared=True)
        return {name: skipped for name, (_, skipped) in counts.items()}

    def log(self, stage, step, **values):
        """One line of metrics.jsonl, means over processes; tensors are read here and nowhere else."""
        names = [name for name, value in values.items() if torch.is_tensor(value)]
        if names:
            means = all_reduce_mean(torch.stack([values[n].detach().float() for n in names])).tolist()
            values.update(zip(names, means, strict=True))
        values = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in values.items()}
        values |= {f"skipped_{name}": skipped for name, skipped in self.count_skips().items() if skipped}
        row = dict(stage=stage, step=step + 1, **values, seconds=round(time.time() - self.clock, 1))
        losses = [r for r in self.rows if "lr" in r][-5:]  # the warnings want no older ones
        self.rows = [r for r in self.rows if "lr" not in r or r in losses] + [row]

        def append():
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

        on_rank0(append)
        if rank() == 0:
            shown = (f"{k} {v}" if v is None else f"{k} {v:.4g}" for k, v in values.items())
            print0(f"{stage} {step + 1:>6}  " + "  ".join(shown))
            K = self.config["tokenizer"].get("codebook_size", 1024)
            for name, message in early_warnings(self.rows, stage, self.config[SECTION[stage]], K).items():
                if name not in self.warned:
                    self.warned.add(name)
                    warn(f"{stage} step {step + 1}: {message}")

    def save(self, stage, step, model, ema=None, tokenizer_hash=None, **train):
        """Writes <stage>.pt after `step` + 1 updates, once all processes are found to hold equal weights."""
        self.count_skips()
        if world() > 1:
            hashes = [None] * world()
            modules = [thing for thing in (model, ema, *train.values()) if isinstance(thing, torch.nn.Module)]
            dist.all_gather_object(hashes, weights_hash(*modules))
            if len(set(hashes)) > 1:
                raise RuntimeError(f"weights differ between processes after step {step + 1}: {hashes}")
        config = asdict(model.config) if hasattr(model, "config") else model.sizes
        config = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        ckpt = dict(
            format=FORMAT, stage=stage, step=step + 1, config=self.config, model_config=config,
            model=model.state_dict(), ema=ema and ema.module.state_dict(),
            class_names=self.train.class_names, fingerprint=self.fingerprint, tokenizer_hash=tokenizer_hash,
            note=self.note, world=world(), seconds=time.time() - self.clock,
            skips={name: pair.tolist() for name, pair in self.skips.items()},
            train={name: thing.state_dict() for name, thing in dict(train, ema=ema).items() if thing})
        bad = not_finite(ckpt)
        if bad:
            raise UserError(f"{stage} step {step + 1}: {bad[1:]} is not finite, so nothing was written; the "
                            "last save is intact. Try a lower lr, or --precision fp32", code=1, shared=True)
        on_rank0(lambda: save_checkpoint(ckpt, self.out / f"{stage}.pt"))

    def sheet(self, name, images, columns):
        picture = make_sheet(images, columns, self.note)
        on_rank0(lambda: save_atomic(lambda p: picture.save(p, "PNG"), self.out / f"{name}.png"))


MAX_SKIPS = 10  # updates with a gradient that is not finite, in a row
WARM_UP = 2  # passes through a network in DDP before its state is loaded
SECTION = dict(  # stage -> preset section
    vgg="judge", resnet="judge", phase1="phase1", phase2="phase2", ar="ar", nar="nar")
DEPENDS = dict(  # what a checkpoint of a stage was made with; a run with other values must not continue it
    vgg=["judge"], resnet=["judge"], phase1=["tokenizer", "discriminator", "vgg", "phase1", "teachers"],
    phase2=["discriminator", "vgg", "phase2"], ar=["prior", "ar", "conditional", "code_variants"],
    nar=["prior", "nar", "conditional", "code_variants"],
)


def refuse_other_config(path, keys, old, new):
    """A checkpoint is continued only by the configuration that began it; the number of steps may change, and
    so may the place of a folder of images: `refuse_other_images` compares these."""
    different = []
    places = [] if is_folder(old.get("data")) and is_folder(new["data"]) else ["data", "val"]
    for key in [*places, "limit", "image_size", "seed", "precision", *keys]:
        a, b = old.get(key), new[key]
        pairs = [(key, a, b)]
        if isinstance(a, dict):
            pairs = [(f"{key}.{k}", a.get(k), b.get(k)) for k in sorted({*a, *b})]
        different += [f"{name} = {was}, not {now}" for name, was, now in pairs
                      if was != now and not name.endswith(".steps")]
    if different:
        raise UserError(f"{path} was made with {', and '.join(different)} as here; use another --out")


def refuse_other_images(path, ckpt, run):
    """A checkpoint is continued only on the images that it was made with, wherever their folder lies now."""
    if ckpt["fingerprint"] == run.fingerprint and ckpt["class_names"] == run.train.class_names:
        return
    (was, _), (now, _) = ckpt["fingerprint"][0], run.fingerprint[0]
    old, new = (f"{c['data']}" + f" and val = {c['val']}" * bool(c["val"])
                for c in (ckpt["config"], run.config))
    if old != new:
        raise UserError(f"{path} was made with data = {old}, not {new} as here, and these are other images "
                        f"(training images: {was} there, {now} here); use another --out")
    raise UserError(f"the images changed since {path} was written (training images: {was} then, {now} now); "
                    "restore them or use another --out")


def total(output):
    """The sum of everything in a network's output that carries a gradient."""
    if torch.is_tensor(output):
        return output.float().sum() if output.requires_grad else 0.0
    return sum(total(part) for part in (output.values() if isinstance(output, dict) else output))


def not_finite(thing, name=""):
    """The name of the first tensor in nested dicts and lists that holds an infinity or a nan, else ''."""
    if torch.is_tensor(thing):
        return "" if thing.isfinite().all() else name
    parts = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    return next(filter(None, (not_finite(part, f"{name}.{key}") for key, part in parts)), "")


# ----------------------------------------------------------------------------------------------------------
# Stage vgg: a judge of one's own, a narrow VGG-16 trained on the labels of the data at hand; or, with
# --arch resnet, a scorer for the metrics of sample.py
# ----------------------------------------------------------------------------------------------------------


def train_judge(run, stage):
    """Classification with batch norm, which is folded away when a VGG is loaded. Not in the paper."""
    c, device = run.config["judge"], run.device
    sizes = dict(width=c["width"], num_classes=run.train.num_classes)
    if stage == "vgg":
        sizes |= dict(hidden=c["hidden"], batch_norm=True)
    torch.manual_seed(mix(run.config["seed"], stage))
    judge = (build_vgg16 if stage == "vgg" else ResNet)(**sizes)
    judge, judge.sizes = judge.to(device, memory_format=torch.channels_last), sizes
    optimizer, ema = build_optimizer(judge, c), build_ema(judge, c["ema"])
    net = run.wrap(judge, run.example())
    start = run.start(stage, model=judge, optimizer=optimizer, ema=ema)
    stream = run.stream(c["batch"], start)
    for step in run.loop(stage, start):
        set_lr(optimizer, lr_at(step, c))
        pixels, labels = next(stream)
        x, labels = to_float(pixels, device), to_device(labels, device)
        x = random_shift(x, run.config["seed"], step, c["batch"])
        judge.train()
        optimizer.zero_grad(set_to_none=True)
        with run.autocast:
            logits = net(normalize_images(x))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=c["label_smoothing"])
        loss.backward()
        run.update(optimizer, "judge")
        if ema:
            ema.update_parameters(judge)
        if run.due("log", stage, step):
            run.log(stage, step, lr=lr_at(step, c), loss=loss)
        if run.due("eval", stage, step):
            evaluate_judge(run, stage, step, ema.module if ema else judge)
        if run.due("save", stage, step):
            run.save(stage, step, judge, ema, optimizer=optimizer)


def random_shift(x, seed, step, batch):
    """Shifts each image by up to an eighth of its side (edges reflected); a function of (seed, step, row)."""
    reach = x.shape[-1] // 8
    rows = seeded_rand(batch, 2, seed=mix(seed, "shift", step))[my_rows(batch)]
    offsets = to_device((rows * (2 * reach + 1)).long(), x.device)
    side = torch.arange(x.shape[-1], device=x.device)
    top, left = offsets[:, :1] + side, offsets[:, 1:] + side  # (B, S): the pixels of each image
    padded = F.pad(x, (reach,) * 4, mode="reflect").permute(0, 2, 3, 1)  # (B, H, W, 3)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[image, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------
# Stages phase1 and phase2: the tokenizer (Sec. 3.3, 3.4, Table 9)
# ----------------------------------------------------------------------------------------------------------


def build_tokenizer(run, stage):
    """Phase 1: new, or the weights of --tokenizer. Phase 2: phase 1 with attention, latent space frozen."""
    given = run.args.tokenizer
    if stage == "phase1":
        sizes = dict(run.config["tokenizer"], image_size=run.config["image_size"])
        with as_user_error():
            torch.manual_seed(mix(run.config["seed"], "phase1"))
            tokenizer = VQTokenizer(TokenizerConfig(**sizes))
            if given:
                tokenizer.load_state_dict(load_model(given, ("phase1",))[0].state_dict())
        return tokenizer.to(run.device), {}
    tokenizer, ckpt = earlier_tokenizer(run, ("phase1",), "discriminator")
    torch.manual_seed(mix(run.config["seed"], "phase2"))
    with as_user_error():
        tokenizer.add_attention()
    # not channels_last: its GroupNorm makes training ten times slower on a CPU, a third slower on an H100
    tokenizer = tokenizer.freeze_latent_space().to(memory_format=torch.contiguous_format)
    return tokenizer, ckpt["train"].get("disc", {})


def earlier_tokenizer(run, stages, *also):
    """(tokenizer, checkpoint): --tokenizer FILE, else the last of `stages` in the run folder.

    also: sections of the preset besides `tokenizer` that must be as they were in this folder. The run's own
    phase1 section becomes that of the tokenizer, so that later stages record with which alpha it was trained.
    """
    given, found = run.args.tokenizer, [run.out / f"{s}.pt" for s in stages if (run.out / f"{s}.pt").exists()]
    if not given and not found:
        raise UserError(f"no {run.out / 'phase1.pt'}: run --stage phase1 first, or pass --tokenizer FILE")
    tokenizer, ckpt = load_model(given or on_rank0(lambda: newest_intact(found[-1])), stages, run.device)
    run.note = run.note or ckpt["note"]
    if not given:
        refuse_other_config(found[-1], ["tokenizer", *also], ckpt["config"], run.config)
        refuse_other_images(found[-1], ckpt, run)
        if ckpt["step"] < run.steps(ckpt["stage"]) and rank() == 0:
            warn(f"stage {ckpt['stage']} ended at step {ckpt['step']} of {run.steps(ckpt['stage'])}")
    if tokenizer.config.image_size != run.config["image_size"]:
        raise UserError(f"{given} is for {tokenizer.config.image_size}-pixel images, this preset for others")
    run.config = dict(run.config, phase1=ckpt["config"]["phase1"])
    return tokenizer, ckpt


@contextlib.contextmanager
def as_user_error():
    """Settings or weights that a network refuses are bad input, not a bug."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())[:300]) from None


def new_discriminator(config):
    """The discriminator of a preset.  raises: ValueError for sides or widths that it cannot have"""
    c, S = dict(config["discriminator"]), config["image_size"]
    if c.pop("kind") == "patch":
        return PatchDiscriminator()
    if S & (S - 1):
        raise ValueError(f"image_size={S}: the style discriminator needs a power of two from 32 on; "
                         "--set discriminator.kind=patch takes other sides")
    return StyleDiscriminator(S, **c)


def build_discriminator(run):
    torch.manual_seed(mix(run.config["seed"], "discriminator"))
    with as_user_error():
        return new_discriminator(run.config).to(run.device)


def adv_ramp(step, c):
    """lambda_adv at a step: 0 before `adv_start`, then a ramp up to `adv_weight` (shares of the run)."""
    begin, length = c["adv_start"] * c["steps"], max(1, c["adv_ramp"] * c["steps"])
    return c["adv_weight"] * min(1.0, (step - begin + 1) / length) if step >= begin else 0.0


def mean_probs(tokenizer, parts):
    """D_bar of the global batch where a step has several micro-batches (see VectorQuantizer.forward)."""
    if len(parts) == 1:
        return None
    probs = [tokenizer.average_probs(part) for part in parts]
    if probs[0] is None:
        return None
    shares = [len(part) / sum(map(len, parts)) for part in parts]
    return all_reduce_mean(sum(share * p for share, p in zip(shares, probs, strict=True)))


def train_tokenizer(run, stage):
    """Phase 1 trains everything at alpha = 1, phase 2 the attention-enhanced decoder at alpha = 0."""
    c, device = run.config[stage], run.device
    tokenizer, disc_weights = build_tokenizer(run, stage)
    disc, distance = build_discriminator(run), build_distance(run, c)
    teachers = run.teachers if stage == "phase1" else []
    loss_of = {"l1": F.l1_loss, "l2": F.mse_loss}[c["rec"]]
    if disc_weights:  # I21: phase 2 continues the discriminator with a fresh optimizer
        with as_user_error():
            disc.load_state_dict(disc_weights)
    opt_g, opt_d = build_optimizer(tokenizer, c), build_optimizer(disc, c)
    ema = build_ema(tokenizer, c["ema"])
    frozen = latent_hash(tokenizer) if stage == "phase2" else None
    g, d = run.wrap(tokenizer, run.example()), run.wrap(disc, run.example())
    start = run.start(stage, frozen, model=tokenizer, disc=disc, opt_g=opt_g, opt_d=opt_d, ema=ema)
    stream = run.stream(c["batch"], start)
    tokenizer.train()
    for step in run.loop(stage, start):
        set_lr(opt_g, lr_at(step, c))
        set_lr(opt_d, lr_at(step, c))
        for parameter in tokenizer.start_step(step):
            opt_g.state.pop(parameter, None)
        x = to_float(next(stream)[0], device)
        parts, adv = run.micro(x), adv_ramp(step, c)
        with run.autocast:
            global_probs, fakes, seen, logs = mean_probs(tokenizer, parts), [], [], {}

        disc.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        for part in accumulate(g, parts):
            with run.autocast:
                x_hat, tokens, latent = g(part, global_probs)
                loss_rec = loss_of(x_hat.float(), part)
                loss_per = distance(part, x_hat)
                add_fq_losses(latent, teachers, part)
                loss_adv = adv_loss(disc(x_hat), c["gan"]) if adv else x_hat.new_zeros(())
            scale = adv
            if adv and c["adaptive"]:
                scale = adv * adaptive_weight(
                    loss_rec + c["per_weight"] * loss_per, loss_adv, tokenizer.decoder.conv_out.weight)
            loss = loss_rec + loss_vq(latent, c) + c["per_weight"] * loss_per + scale * loss_adv  # Eq. 2, 4
            (loss * (len(part) / len(x))).backward()
            fakes.append(x_hat.detach())
            seen.append(tokens)
            terms = dict(loss_rec=loss_rec, loss_per=loss_per, **latent)
            terms |= dict(loss_adv=loss_adv) if adv else {}
            terms |= dict(adaptive_weight=scale / adv) if adv and c["adaptive"] else {}
            add_means(logs, terms, len(part) / len(x))
        run.update(opt_g, "tokenizer", c["clip"])

        if adv:
            disc.requires_grad_(True)
            opt_d.zero_grad(set_to_none=True)
            for part, fake in accumulate(d, zip(parts, fakes, strict=True)):
                with run.autocast:
                    loss_disc = disc_loss(d(part), d(fake), c["gan"])
                loss = loss_disc
                if c["r1_gamma"] and step % c["r1_every"] == 0:  # lazy regularisation
                    loss = loss + c["r1_every"] * r1_penalty(d, part, c["r1_gamma"])
                (loss * (len(part) / len(x))).backward()
                add_means(logs, dict(loss_disc=loss_disc), len(part) / len(x))
            run.update(opt_d, "discriminator", c["clip"])
        if ema:
            ema.update_parameters(tokenizer)

        if run.due("log", stage, step):
            counts = all_reduce_mean(count_codes(torch.cat(seen), tokenizer.codebook_size).float())
            usage = codebook_usage(counts)[0]  # of the global batch
            run.log(stage, step, lr=lr_at(step, c), **logs, adv_weight=adv, batch_usage=usage)
        if run.due("eval", stage, step):
            evaluate_tokenizer(run, stage, step, ema.module if ema else tokenizer)
            tokenizer.train()
        if run.due("save", stage, step):
            if frozen and latent_hash(tokenizer) != frozen:
                raise RuntimeError("phase 2 changed the encoder or the codebook")
            run.save(stage, step, tokenizer, ema, latent_hash(tokenizer), disc=disc, opt_g=opt_g, opt_d=opt_d)


def add_means(sums, terms, share):
    for name, value in terms.items():
        sums[name] = sums.get(name, 0) + share * value.detach()


def loss_vq(latent, c):
    """The latent terms of Eq. 2 and Sec. 3.4, weighted; nothing in phase 2. Forks add their terms here."""
    weights = {"loss_codebook": 1.0, "loss_commit": c["beta"], "loss_entropy": c["gamma"],
               "loss_disentangle": c["disentangle"], "loss_represent": c["represent"]}
    return sum(weights[name] * value for name, value in latent.items())


def add_fq_losses(latent, teachers, x):
    """FQGAN's two further terms, from the codes and features that its quantizer leaves among the losses."""
    codes, features = latent.pop("codes", []), latent.pop("features", [])
    if len(codes) > 1:
        latent["loss_disentangle"] = disentanglement(codes)
    for teacher, feature in zip(teachers, features, strict=True):
        term = representation_loss(feature, teacher(x))
        latent["loss_represent"] = latent.get("loss_represent", 0) + term


def build_distance(run, c):
    """(x, x_hat) -> the perceptual loss of Eq. 4, or of a row of Table 6; or LPIPS, FQGAN's."""
    if c["layers"] == "lpips":
        return lambda x, x_hat: run.lpips(x_hat, x).float().mean()
    judge, weights = run.judge, LAYER_SETS[c["layers"]] if c["layers"] else layer_weights(c["alpha"])
    return lambda x, x_hat: perceptual_loss(judge, x, x_hat, weights)


# ----------------------------------------------------------------------------------------------------------
# Stages ar and nar: the priors (Sec. 4.2, Table 10)
# ----------------------------------------------------------------------------------------------------------


def cached_codes(run, tokenizer):
    """Tokens of every training image, in `code_variants` crops and flips, and of the validation images.

    returns: dict(train (V, n, N) and val (m, N) int16 or int32, labels (n,) and val_labels (m,) int64), kept
             in codes.pt under the hash of the tokenizer and the fingerprint of the data; with k > 1
             sub-codebooks k comes after N
    Odd variants are flipped, variants 0 and 1 are central crops, later ones random crops.
    """
    path, V, data = run.out / "codes.pt", run.config["code_variants"], run.train
    settings = [str(run.config[k]) for k in ("limit", "image_size", "seed", "precision")]
    key = on_rank0(lambda: [latent_hash(tokenizer), V, settings, data.fingerprint, run.val.fingerprint])

    def valid():
        if path.exists() and not intact(path):
            warn(f"{path} is damaged; its codes are made again")
        return intact(path) and torch.load(path, weights_only=True, mmap=True).get("key") == key

    if not on_rank0(valid):
        print0(f"\nencoding {len(data)} training images in {V} variants and {len(run.val)} validation images")
        views = [(data, i, mix(run.config["seed"], "variant", v, i) if v > 1 else None, v % 2 == 1)
                 for v in range(V) for i in range(len(data))]
        train, labels = encode_all(run, tokenizer, views)
        val, val_labels = encode_all(run, tokenizer, [(run.val, i, None, False) for i in range(len(run.val))])
        codes = dict(key=key, train=train.unflatten(0, (V, len(data))), labels=labels[: len(data)].clone(),
                     val=val, val_labels=val_labels)
        on_rank0(lambda: save_torch(codes, path))
    return torch.load(path, weights_only=True, mmap=True)


def encode_all(run, tokenizer, views, batch=128):
    """Tokens (len(views), *token_shape) and labels of (data, index, crop seed, flip) views; processes share
    the work."""
    dtype = torch.int16 if tokenizer.codebook_size <= 2**15 else torch.int32
    tokens = torch.zeros(len(views), *tokenizer.token_shape, dtype=dtype)
    labels = torch.zeros(len(views), dtype=torch.int64)
    starts = range(rank() * batch, len(views), world() * batch)
    for start in tqdm(starts, "encoding", disable=None if rank() == 0 else True):
        chunk = views[start : start + batch]
        x = torch.stack([data.view(*view) for data, *view in chunk])
        labels[start : start + batch] = torch.tensor([data.label(index) for data, index, *_ in chunk])
        with run.autocast:
            tokens[start : start + batch] = tokenizer.encode(to_float(x, run.device)).to(dtype)
    if world() > 1:  # rows of other processes are zero here
        dist.all_reduce(tokens.view(torch.uint8))  # gloo and NCCL have no int16
        dist.all_reduce(labels)
    return tokens, labels


def train_prior(run, stage):
    """AR: cross-entropy of each token given the ones before. NAR: of masked tokens given the others."""
    c, device, seed, names = run.config[stage], run.device, run.config["seed"], run.train.class_names
    tokenizer, _ = earlier_tokenizer(run, ("phase1", "phase2"))
    tokens_of = latent_hash(tokenizer)
    K, (N, *k) = tokenizer.codebook_size, tokenizer.token_shape
    torch.manual_seed(mix(seed, stage))
    with as_user_error():
        classes = len(names) if run.config["conditional"] else 0
        sizes = PriorConfig(K, N, classes, num_codebooks=k[0] if k else 1, **run.config["prior"])
        prior = (ARPrior if stage == "ar" else NARPrior)(sizes).to(device)
    optimizer, ema = build_optimizer(prior, c), build_ema(prior, c["ema"])
    labels = torch.zeros(2, dtype=torch.int64, device=device) if sizes.num_classes else None
    example = torch.zeros(2, *tokenizer.token_shape, dtype=torch.int64, device=device)
    net = run.wrap(prior, example, labels, *[example] * (stage == "nar"))
    start = run.start(stage, tokens_of, model=prior, optimizer=optimizer, ema=ema)
    codes = cached_codes(run, tokenizer)
    unigram = unigram_entropy(codes["train"][0], K)
    print0(f"ln K = {math.log(K):.4f} nats; unigram entropy of the codes = {unigram:.4f} nats")
    prior.train()
    for step in run.loop(stage, start):
        set_lr(optimizer, lr_at(step, c))
        tokens, labels = code_batch(run, codes, step, c["batch"])
        inputs, mask = tokens, torch.ones_like(tokens, dtype=torch.bool)
        if stage == "nar":
            noise = seeded_rand(c["batch"], N + 1, seed=mix(seed, "mask", step))[my_rows(c["batch"])]
            inputs, mask = mask_tokens(tokens, K, to_device(noise, device))
        masked = all_reduce_mean(mask.sum().float())
        optimizer.zero_grad(set_to_none=True)
        means = torch.zeros(2, device=device)
        for part in accumulate(net, zip(*map(run.micro, (inputs, tokens, mask, labels)), strict=True)):
            part_inputs, part_tokens, part_mask, part_labels = part
            with run.autocast:
                known = [part_tokens] * (stage == "nar")  # for heads that see sub-tokens of the same position
                logits = net(part_inputs, part_labels if sizes.num_classes else None, *known)
            if stage == "ar":
                loss, accuracy = prior.loss(logits, part_tokens)
            else:
                loss, accuracy = prior.loss(logits, part_tokens, part_mask, c["label_smoothing"])
            share = part_mask.sum() / masked  # of the global batch's loss terms
            (loss * share).backward()
            means += torch.stack([loss.detach(), accuracy]) * share
        run.update(optimizer, "prior", c["clip"])
        if ema:
            ema.update_parameters(prior)
        if run.due("log", stage, step):
            run.log(stage, step, lr=lr_at(step, c), loss=means[0], top1=means[1])
        if run.due("eval", stage, step):
            evaluate_prior(run, stage, step, ema.module if ema else prior, tokenizer, codes, unigram)
            prior.train()
        if run.due("save", stage, step):
            run.save(stage, step, prior, ema, tokens_of, optimizer=optimizer)


def unigram_entropy(tokens, codebook_size, num=10_000):
    """Entropy in nats of how often each code occurs; with k sub-codebooks their mean.

    tokens: (m, N) or (m, N, k), of m images in the order of their classes, so `num` of all are drawn
    """
    some = random.Random(mix(0, "unigram")).sample(range(len(tokens)), min(len(tokens), num))
    counts = count_codes(tokens[some].long(), codebook_size).double()
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1).mean().item()


def code_batch(run, codes, step, batch):
    """(tokens (B, N), labels (B,)) of this process's rows of the global batch at `step`."""
    rows = my_rows(batch)
    positions = range(step * batch + rows.start, step * batch + rows.stop)
    index = [run.train.shuffled(p) for p in positions]
    variants = [mix(run.config["seed"], "variant", p) % len(codes["train"]) for p in positions]
    tokens, labels = codes["train"][variants, index].long(), codes["labels"][index]
    return to_device(tokens, run.device), to_device(labels, run.device)


# ----------------------------------------------------------------------------------------------------------
# What the stages of a command would refuse, found before the first of them begins
# ----------------------------------------------------------------------------------------------------------


def stages_of(args, config):
    """The stages that a command trains, in their order."""
    if args.stage != "all":
        return [args.stage]
    return [stage for stage in STAGES if stage != "vgg" or config["vgg"] == "judge"]


def build_on_meta(config, stages, tokenizer=None):
    """The networks of `stages` without their weights, so that sizes which do not fit are known at once.

    tokenizer: sizes of the one that --tokenizer names, where they count and not those of the preset
    returns:   dict of what the stages build: vgg, resnet, phase1, phase2, disc, ar, nar, on the meta device
    raises:    UserError for what a network refuses
    """
    found, phases, judge = {}, {"phase1", "phase2"} & {*stages}, config["judge"]
    with as_user_error(), torch.device("meta"):
        if "vgg" in stages or phases and config["vgg"] == "judge":
            found["vgg"] = build_vgg16(judge["width"], 10, judge["hidden"], batch_norm=True)
        if "resnet" in stages:
            found["resnet"] = ResNet(judge["width"])
        if not {*stages} - {"vgg", "resnet"}:
            return found
        check_tokenizer_values(config["tokenizer"])
        sizes = tokenizer or dict(config["tokenizer"], image_size=config["image_size"])
        found["phase1"] = VQTokenizer(TokenizerConfig(**sizes))
        if "phase2" in stages:
            found["phase2"] = VQTokenizer(TokenizerConfig(**sizes))
            found["phase2"].add_attention()
        if phases:
            found["disc"] = new_discriminator(config)
            check_perception(config, phases)
        K, (N, *k) = found["phase1"].codebook_size, found["phase1"].token_shape
        for stage in {"ar", "nar"} & {*stages}:
            sizes = PriorConfig(K, N, 1000, num_codebooks=k[0] if k else 1, **config["prior"])
            found[stage] = (ARPrior if stage == "ar" else NARPrior)(sizes)
    return found


def given_sizes(args):
    """Sizes of the tokenizer of --tokenizer for stages that use it as it is, else None."""
    stages = dict(phase2=("phase1",), ar=("phase1", "phase2"), nar=("phase1", "phase2")).get(args.stage)
    return read_checkpoint(args.tokenizer, stages)["model_config"] if stages and args.tokenizer else None


def check_tokenizer_values(values):
    """raises: ValueError for a key of the preset's tokenizer section that there is not, or another type"""
    types = {field.name: field.type for field in fields(TokenizerConfig) if field.name != "image_size"}
    for key, value in values.items():
        if key not in types:
            close = difflib.get_close_matches(key, types, 1)
            raise ValueError(f"tokenizer.{key}: a tokenizer has no such value"
                             + (f"; did you mean tokenizer.{close[0]}?" if close else ""))
        numbers = value if types[key] is tuple and isinstance(value, list | tuple) else [value]
        right = isinstance(value, types[key]) or types[key] is tuple and isinstance(value, list)
        if types[key] in (int, tuple):
            right = right and all(type(n) is int and n >= 0 for n in numbers)
        if not right:
            wanted = {int: "a whole number from 0 on", tuple: "a list of whole numbers from 0 on"}
            raise ValueError(f"tokenizer.{key} must be {wanted.get(types[key]) or KINDS[types[key]]}, "
                             f"got {json.dumps(value)}")


def check_perception(config, phases):
    """raises: ValueError where the judge, the layers and the teachers of a preset do not fit together"""
    own, judge = config["vgg"] == "judge" or Path(config["vgg"]).suffix == ".pt", config["judge"]
    for phase in sorted(phases):
        if config[phase]["layers"] == "lpips" and own:
            raise ValueError(f"{phase}.layers=lpips needs torchvision's VGG-16, --vgg imagenet or a .pth "
                             f"file of it; {config['vgg']} is another")
    widths = [width for width in config["tokenizer"].get("teacher_widths", []) if width]
    names = [name for name in config["teachers"] if name]
    if "phase1" not in phases:
        return
    if len(names) != len(widths):
        raise ValueError(f"{len(names)} teachers, but tokenizer.teacher_widths names {len(widths)} widths")
    known = dict(TEACHERS)
    if config["vgg"] in ("judge", "imagenet", "random"):
        known["judge"] = 8 * (judge["width"] if config["vgg"] == "judge" else 64)
    for name, width in zip(names, widths, strict=True):
        if name != "judge" and name not in TEACHERS and not Path(str(name)).is_file():
            raise ValueError(f"teacher {name}: no such file, and not one of judge, {', '.join(TEACHERS)}")
        if known.get(name, width) != width:
            raise ValueError(f"teacher {name} gives {known[name]} features, not the {width} of "
                             "tokenizer.teacher_widths")


def check_stages(run, stages, networks):
    """What the stages need of the data, of the processes and of the run folder; nothing is written.

    networks: of `build_on_meta`
    raises:   UserError for what any of the stages would refuse, before the first of them begins
    """
    if {"phase1", "phase2"} & {*stages} and "vgg" not in stages and needs_judge(run):
        stages = ["vgg", *stages]
    for stage in stages:
        check_batch(run, stage)
        check_labels(run, stage)
    given = run.args.tokenizer
    if "phase1" in stages and given:
        with as_user_error():  # the shapes: nothing is copied
            networks["phase1"].load_state_dict(read_checkpoint(given, ("phase1",))["model"], assign=True)
    elif "phase1" in stages and run.config["phase1"]["init"] and not (run.out / "phase1.pt").exists():
        raise UserError("this preset starts from an ImageNet phase 1 (Table 9): pass --tokenizer FILE")
    on_rank0(lambda: check_folder(run, stages))


def needs_judge(run):
    """Whether a phase would train the run's judge first."""
    own = run.out / "vgg.pt"
    return run.config["vgg"] == "judge" and not (
        own.exists() and read_checkpoint(own, ["vgg"])["step"] >= run.steps("vgg"))


def check_batch(run, stage):
    """raises: UserError for a batch that the processes cannot share; a note tells of odd micro-batches"""
    c, count = run.config[SECTION[stage]], world()
    batch = c["batch"]
    if batch % count:
        nearest = " or ".join(str(n) for n in (batch // count * count, (batch // count + 1) * count) if n)
        raise UserError(f"batch {batch} cannot be split over {count} processes; use {nearest}")
    if stage in ("phase1", "phase2") and run.config["discriminator"]["kind"] == "style" and c["adv_weight"]:
        told = odd_groups(batch // count, run.args.micro_batch)
        if told:
            print0(f"note: {stage}: {told}")


def odd_groups(share, micro):
    """What to say of micro-batches that change the groups of `minibatch_stddev`, or "".

    share: images of a process in a step;  micro: --micro-batch or None
    """
    micro = min(micro or share, share)
    sizes = sorted({micro, share % micro or micro})
    groups = sorted({max(g for g in (1, 2, 3, 4) if size % g == 0) for size in sizes})
    if groups == [4]:
        return ""
    images, four = (" and ".join(map(str, numbers)) for numbers in (sizes, groups))
    return (f"in micro-batches of {images} images the style discriminator compares groups of {four} images, "
            "not of 4; batch per process and --micro-batch should be multiples of 4")


def check_labels(run, stage):
    """raises: UserError for a stage that learns from classes where the data has none"""
    if run.train.class_names:
        return
    if stage in ("vgg", "resnet"):
        raise UserError(
            "--stage vgg needs labels: one sub-folder per class. Or pass --vgg FILE for other weights")
    if stage in ("ar", "nar") and run.config["conditional"]:
        raise UserError("this preset's priors are class-conditional and the data has no class sub-folders; "
                        "sort the images into folders or pass --set conditional=false")


def check_folder(run, stages):
    """raises: UserError for a checkpoint of a later stage that this run's values or images cannot continue"""
    for stage in stages[1:]:  # the first one's is looked at, and set aside if damaged, when it starts
        path = run.out / f"{stage}.pt"
        with contextlib.suppress(RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError):
            ckpt = torch.load(path, weights_only=True, mmap=True)
            if isinstance(ckpt, dict) and {"config", "fingerprint", "class_names"} <= ckpt.keys():
                refuse_other_config(path, DEPENDS[stage], ckpt["config"], run.config)
                refuse_other_images(path, ckpt, run)


# ----------------------------------------------------------------------------------------------------------
# All stages, --explain, and the command
# ----------------------------------------------------------------------------------------------------------


def train_stage(run, stage):
    try:
        if stage in ("vgg", "resnet"):
            train_judge(run, stage)
        elif stage in ("phase1", "phase2"):
            train_tokenizer(run, stage)
        else:
            train_prior(run, stage)
    finally:
        if run.opened:
            run.opened.close()


def main(args, config):
    with one_line_errors():
        stages = STAGES if args.explain else stages_of(args, config)
        networks = build_on_meta(config, stages, None if args.explain else given_sizes(args))
        if args.explain:
            with as_user_error():
                return explain(config, networks)
        run, begin = Run(args, config), time.time()
        check_stages(run, stages, networks)
        if args.ablation:
            print0(f"ablation {args.ablation}:", *(f"--set {k}={v}" for k, v in args.expanded.items()))
        if args.stage == "all":
            pyplot()  # which the summary draws with
        with run.listening():
            try:
                for stage in stages:
                    train_stage(run, stage)
                if args.stage == "all":
                    summarize(run)
            except torch.OutOfMemoryError:
                raise UserError("out of GPU memory; pass a smaller --micro-batch (the global batch stays)",
                                code=1) from None
            except RuntimeError as error:
                if "DataLoader" in str(error):  # torch tells of a killed worker at any moment
                    raise UserError(f"{str(error).splitlines()[0]} Too little memory, or /dev/shm full? Try "
                                    "--workers 0; the same command goes on from the last checkpoint",
                                    code=1) from None
                if world() > 1 and re.search("gloo|nccl|connection|timed out", str(error), re.I):
                    warn(f"{run.place}: another process died or hangs; the same command goes on")
                raise
        if run.out.joinpath("bad_files.txt").exists():
            count = len((run.out / "bad_files.txt").read_text().splitlines())
            print0(f"note: {count} images could not be read, see {run.out / 'bad_files.txt'}")
        memory = peak_memory()
        if run.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        print0(f"\ndone in {time.time() - begin:.0f} s, {memory:.0f} MB peak memory; see {run.out}/")


if __name__ == "__main__":
    record(main)(*ARGUMENTS)  # torchrun then names the process that failed first, and why
