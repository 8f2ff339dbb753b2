"""Trains every part of SeQ-GAN (Sec. 3 and 4): a judge, the tokenizer's two phases and both priors.

    python train.py --stage all --preset demo                   # the whole method on a CPU, no download
    python train.py --stage all --preset cifar10 --data DIR     # real images on a CPU
    torchrun --nproc_per_node=8 train.py --stage phase1 --preset imagenet --data DIR    # Table 9

Stages: vgg (a judge of one's own), phase1, phase2, ar, nar, or all. Each leaves one checkpoint in
runs/<preset>/, which later stages find there. The same command again continues an interrupted run.

Nothing about random numbers or data order is stored: every draw is a function of (seed, step, position in
the global batch), so a resumed run equals an unbroken one.
"""

import argparse
import difflib
import json
from pathlib import Path

STAGES = ("vgg", "phase1", "phase2", "ar", "nar")

# ----------------------------------------------------------------------------------------------------------
# Presets (Tables 9 and 10). `--set section.key=value` changes any single value.
# ----------------------------------------------------------------------------------------------------------

LOSS = dict(beta=0.25, gamma=0.01, per_weight=1.0, adv_weight=0.1, adv_start=0.05, adv_ramp=0.05,
            gan="logistic", adaptive=False, r1_gamma=10.0, r1_every=16)  # fmt: skip
IMAGENET = dict(
    data=None, val=None, limit=None, image_size=256, conditional=True, vgg="imagenet", code_variants=10,
    seed=0, precision="bf16",
    tokenizer=dict(),
    discriminator=dict(kind="style", channel_multiplier=1, max_width=512),
    judge=dict(width=64, hidden=4096, batch=256, steps=450_000, lr=1e-3, schedule="cosine", lr_end=0.0,
               lr_start=0, warmup=0, betas=[0.9, 0.99], weight_decay=0.05, ema=0.0, label_smoothing=0.1),
    phase1=dict(LOSS, alpha=1.0, batch=256, steps=500_000, lr=1e-4, schedule="cosine", lr_end=5e-5,
                lr_start=0, warmup=0, betas=[0.9, 0.99], weight_decay=0.0, ema=0.0, init=None),
    phase2=dict(LOSS, alpha=0.0, batch=128, steps=200_000, lr=5e-5, schedule="constant", lr_end=5e-5,
                lr_start=0, warmup=0, betas=[0.5, 0.9], weight_decay=0.0, ema=0.0),
    prior=dict(n_layer=24, n_head=16, n_embd=768, dropout=0.1),
    ar=dict(batch=256, steps=1_500_000, lr=1e-4, schedule="exponential", lr_end=5e-6, lr_start=80_000,
            warmup=0, betas=[0.9, 0.96], weight_decay=1e-2, ema=0.0),
    nar=dict(batch=256, steps=1_500_000, lr=1e-4, schedule="linear", lr_end=0.0, lr_start=50_000,
             warmup=0, betas=[0.9, 0.96], weight_decay=1e-2, ema=0.0, label_smoothing=0.0),
    sample=dict(top_p=0.92, temperature=1.0, nar_steps=12, token_temperature=1.0, choice_temperature=0.45,
                confidence_space="prob"),
)  # fmt: skip


def variant(base, **changes):
    """A copy of a preset with nested changes: variant(P, ar=dict(batch=64)) keeps P's other `ar` values."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged[key], dict)
        merged[key] = {**merged[key], **value} if nested else value
    return merged


FFHQ = variant(
    IMAGENET, conditional=False,
    phase1=dict(batch=64, steps=300_000), phase2=dict(batch=32),
    ar=dict(batch=32, steps=500_000), nar=dict(batch=32, steps=500_000),
    sample=dict(top_p=0.98, choice_temperature=0.65),
)  # fmt: skip
LSUN = variant(
    FFHQ,
    phase1=dict(lr=5e-5, schedule="constant", init="required"), phase2=dict(batch=64),
    ar=dict(batch=256), nar=dict(batch=256),
)  # fmt: skip
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
)  # fmt: skip
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
    sample=dict(top_p=0.8, token_temperature=0.7),
)  # fmt: skip
PRESETS = {
    "imagenet": IMAGENET,
    "ffhq": FFHQ,
    "lsun-cat": variant(LSUN, phase1=dict(steps=26_000)),
    "lsun-bedroom": variant(LSUN, phase1=dict(steps=48_000)),
    "lsun-church": variant(
        LSUN, phase1=dict(batch=32, steps=4_000), phase2=dict(batch=32), ar=dict(batch=64), nar=dict(batch=64)
    ),
    "cifar10": CIFAR10,
    "demo": DEMO,
}


def parse_args(argv=None):
    """Command line to (args, config): config is the preset with every flag and --set applied."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", choices=(*STAGES, "all"), help="what to train")
    add("--preset", default="demo", choices=PRESETS, help="recipe (default: demo)")
    add("--data", help="folder of images (class sub-folders or none), 'cifar10' or 'shapes'")
    add("--val", help="folder of validation images (default: DATA/val beside DATA/train, else a 5 %% split)")
    add("--out", type=Path, help="run folder (default: runs/<preset>)")
    add("--tokenizer", type=Path, help="tokenizer checkpoint for phase2, ar, nar; initial weights of phase1")
    add("--vgg", help="perceptual network: 'imagenet', a torchvision .pth, a vgg.pt of ours, or 'random'")
    add("--steps", type=int, help="optimizer steps of this stage")
    add("--batch", type=int, help="global batch of this stage, over all processes")
    add("--micro-batch", type=int, help="largest batch per process and forward pass; the rest is accumulated")
    add("--alpha", type=float, help="semantic ratio of Eq. 4 in phase1")
    add("--seed", type=int, help="seed of everything (default 0)")
    add("--limit", type=int, help="use only LIMIT training images, drawn by the seed")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one preset value")
    add("--workers", type=int, default=0, help="data loading processes per rank (0: in the training process)")
    add("--device", default="auto", help="cuda, cpu or auto")
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
    try:
        return args, build_config(args)
    except ValueError as error:
        parser.error(str(error))


def kind_of(value):
    kinds = {bool: "true or false", int: "number", float: "number", str: "word", list: "list", dict: "part"}
    return kinds.get(type(value), "value")


def build_config(args):
    """The preset of the command line with `--data`, `--steps`, ... and every `--set` written into it."""
    config = variant(PRESETS[args.preset])
    for key in ("data", "val", "vgg", "seed", "limit", "precision"):
        if getattr(args, key) is not None:
            config[key] = getattr(args, key)
    for key in ("steps", "batch"):
        if getattr(args, key) is not None:
            if getattr(args, key) < (key == "batch"):
                raise ValueError(f"--{key} must be positive, got {getattr(args, key)}")
            if args.stage in (None, "all"):
                raise ValueError(f"--{key} belongs to one stage; use --set phase1.{key}=... with --stage all")
            config["judge" if args.stage == "vgg" else args.stage][key] = getattr(args, key)
    if args.alpha is not None:
        config["phase1"]["alpha"] = args.alpha
    for item in args.set:
        path, _, text = item.partition("=")
        *section, key = path.split(".")
        target = config[section[0]] if section and isinstance(config.get(section[0]), dict) else config
        known = key in target or section == ["tokenizer"]
        if not text or len(section) > 1 or (section and target is config) or not known:
            raise ValueError(f"--set {item}: expected SECTION.KEY=VALUE with a key of the preset")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        old = target.get(key)
        if old is not None and kind_of(value) != kind_of(old):
            raise ValueError(f"--set {item}: expected a {kind_of(old)}")
        if section and key in ("batch", "steps") and (not isinstance(value, int) or value < (key == "batch")):
            raise ValueError(f"--set {item}: expected a whole number, positive for a batch")
        target[key] = value
    for phase in ("phase1", "phase2"):
        if not 0 <= config[phase]["alpha"] <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {config[phase]['alpha']}")
    for flag, value in (("--limit", config["limit"]), ("--micro-batch", args.micro_batch)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be positive, got {value}")
    if config["seed"] < 0 or config["seed"] >= 2**63:
        raise ValueError(f"--seed must lie in [0, 2^63), got {config['seed']}")
    return config


if __name__ == "__main__":
    ARGUMENTS = parse_args()  # before torch is imported: --help and a wrong flag answer at once

# isort: off
# ruff: noqa: E402
# fmt: off
import contextlib
import math
import resource
import time
from dataclasses import asdict
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from perceptual import (
    PatchDiscriminator, StyleDiscriminator, VGGTaps, adaptive_weight, adv_loss, build_vgg16, disc_loss,
    layer_weights, load_vgg16, normalize_images, perceptual_loss, r1_penalty,
)
from prior_ar import ARPrior, PriorConfig
from prior_nar import NARPrior, mask_tokens
from sample import (
    FORMAT, UserError, barrier, batches, latent_hash, load_data, load_model, make_sheet, mix,
    my_rows, one_line_errors, print0, rank, read_checkpoint, save_atomic, seeded_rand, setup_device,
    to_float, weights_hash, world,
)
from tokenizer import TokenizerConfig, VQTokenizer, all_reduce_mean, codebook_usage
from visualize import evaluate_judge, evaluate_prior, evaluate_tokenizer, explain, summarize
# isort: on
# fmt: on

# ----------------------------------------------------------------------------------------------------------
# What all stages share
# ----------------------------------------------------------------------------------------------------------


def lr_at(step, c):
    """Learning rate after `step` updates (Tables 9 and 10; spec of the schedules in the README).

    cosine:      from lr at 0 to lr_end at `steps`
    exponential: lr until lr_start, then geometrically to lr_end at `steps`
    linear:      lr until lr_start, then in a straight line to lr_end ("start_iter" begins the decay, I17)
    """
    lr, end, T = c["lr"] * min(1.0, (step + 1) / max(1, c["warmup"])), c["lr_end"], c["steps"]
    t = min(max(0.0, (step - c["lr_start"]) / max(1, T - c["lr_start"])), 1.0)
    if c["schedule"] == "cosine":
        return end + (lr - end) / 2 * (1 + math.cos(math.pi * t))
    if c["schedule"] == "exponential":
        return lr * (end / lr) ** t
    if c["schedule"] == "linear":
        return lr + (end - lr) * t
    if c["schedule"] == "constant":
        return lr
    raise UserError(f"schedule must be cosine, exponential, linear or constant, got {c['schedule']!r}")


def build_optimizer(model, c):
    """Adam, or AdamW where there is weight decay: on matrices of linear layers and convolutions only."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not c["weight_decay"]:
        return torch.optim.Adam(params, lr=c["lr"], betas=c["betas"])
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    decay = {id(m.weight) for m in layers}
    groups = [[p for p in params if (id(p) in decay) == wanted] for wanted in (True, False)]
    return torch.optim.AdamW(
        [dict(params=groups[0], weight_decay=c["weight_decay"]), dict(params=groups[1], weight_decay=0.0)],
        lr=c["lr"], betas=c["betas"],
    )  # fmt: skip


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_ema(model, decay):
    """Exponential moving average of the weights, or None for decay 0 (the paper states none)."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


def accumulate(net, parts):
    """Yields the micro-batches of a step; DDP synchronises gradients in the last backward only."""
    parts = list(parts)
    for i, part in enumerate(parts):
        with net.no_sync() if isinstance(net, DDP) and i + 1 < len(parts) else contextlib.nullcontext():
            yield part


class Run:
    """The run folder, the device, the data and the log: what every stage needs besides its own networks."""

    def __init__(self, args, config):
        self.args, self.config = args, config
        self.out = args.out or Path("runs") / args.preset
        self.device = setup_device(args.device)
        if config["image_size"] < 32:
            raise UserError(f"image_size {config['image_size']}: VGG-16's five halvings need at least 32")
        self.train, self.val = load_data(config)
        # channels_last suits a GPU's convolutions; on a CPU it makes GroupNorm ten times slower
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        if self.device.type == "cpu" and config["image_size"] <= 64:
            # a CPU heeds this switch too, and flash attention's backward is ten times slower there
            torch.backends.cuda.enable_flash_sdp(False)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=config["precision"] == "bf16"
        )
        self.note = "random VGG weights: a test run" if config["vgg"] == "random" else ""
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def judge(self):
        """The frozen VGG of the perceptual loss: ImageNet's, a file, random, or this run's own vgg.pt."""
        source = self.config["vgg"]
        own = self.out / "vgg.pt" if source == "judge" else Path(source)
        if source == "judge" and not (
            own.exists() and read_checkpoint(own, ["vgg"])["step"] >= self.steps("vgg")
        ):
            print0(f"note: the perceptual loss needs a judge and {own} is not finished: training it first")
            train_judge(self)
        if own.suffix == ".pt":
            return load_model(own, ("vgg",), self.device)[0].to(memory_format=torch.channels_last)
        if rank() != 0:
            barrier()  # the first process downloads
        try:
            vgg = load_vgg16({"imagenet": None}.get(source, source))
        except (RuntimeError, ValueError) as error:
            raise UserError(str(error)) from None
        if rank() == 0:
            barrier()
        return VGGTaps(vgg).to(self.device, memory_format=torch.channels_last)

    def steps(self, stage):
        return self.config[SECTION[stage]]["steps"]

    def wrap(self, model):
        """DDP over all processes, compiled on demand; the module itself in a run of one process."""
        if self.args.compile:
            model.compile()
        if world() == 1:
            return model
        return DDP(
            model, [self.device.index] if self.device.index is not None else None, broadcast_buffers=False
        )

    def micro(self, x):
        """This process's part of a batch, cut into micro-batches."""
        return x.split(self.args.micro_batch or len(x))

    def start(self, stage, made_from=None, **state):
        """Loads <stage>.pt where it exists, cuts the log to fit and returns the steps done.

        made_from: hash of the tokenizer that this stage builds on; a checkpoint of another one is refused.
        """
        path, c = self.out / f"{stage}.pt", self.config[SECTION[stage]]
        if world() > 1 and c["batch"] % world():
            raise UserError(
                f"batch {c['batch']} cannot be split over {world()} processes; use a multiple of it"
            )
        step, seconds = 0, 0.0
        if path.exists():
            ckpt = read_checkpoint(path, [stage])
            refuse_other_config(path, DEPENDS[stage], ckpt["config"], self.config)
            if made_from not in (None, ckpt["tokenizer_hash"]):
                raise UserError(f"{path} was made with tokenizer {ckpt['tokenizer_hash']}, not with "
                                f"{made_from} as here; move it away or use another --out")  # fmt: skip
            for name, thing in state.items():
                if thing is not None:
                    thing.load_state_dict(ckpt["model"] if name == "model" else ckpt["train"][name])
            step, seconds = ckpt["step"], ckpt["seconds"]
        share = f"{c['batch']} images" + (f" = {world()} processes x {c['batch'] // world()}" * (world() > 1))
        print0(f"\n{stage}: step {step} of {c['steps']}, {share} a step, lr {c['lr']}, "
               f"{self.config['precision']} -> {path}")  # fmt: skip
        self.clock = time.time() - seconds
        if rank() == 0 and (self.out / "metrics.jsonl").exists():
            rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
            kept = [json.dumps(r) + "\n" for r in rows if r["stage"] != stage or r["step"] <= step]
            save_atomic(lambda p: p.write_text("".join(kept)), self.out / "metrics.jsonl")
        return step

    def loop(self, stage, start):
        """Step numbers with a progress bar; seeds every random draw of the step."""
        bar = tqdm(range(start, self.steps(stage)), stage, initial=start, total=self.steps(stage),
                   disable=None if rank() == 0 else True, dynamic_ncols=True)  # fmt: skip
        for step in bar:
            torch.manual_seed(mix(self.config["seed"], stage, step, rank()))
            yield step

    def due(self, what, stage, step):
        """Is it time, after `step` + 1 updates, to "log", "eval" or "save"? Always after the last one, but
        --eval-every 0 never evaluates."""
        steps = self.steps(stage)
        default = {"eval": max(1, steps // 5), "save": min(2000, max(1, steps // 10))}
        every = getattr(self.args, f"{what}_every")
        if what == "eval" and every == 0:
            return False
        every = every or default[what]
        return (step + 1) % every == 0 or step + 1 == steps

    def log(self, stage, step, **values):
        """One line of metrics.jsonl, means over processes; tensors are read here and nowhere else."""
        names = [name for name, value in values.items() if torch.is_tensor(value)]
        if names:
            means = all_reduce_mean(torch.stack([values[n].detach().float() for n in names])).tolist()
            values.update(zip(names, means, strict=True))
        values = {name: float(f"{value:.6g}") for name, value in values.items()}
        row = dict(stage=stage, step=step + 1, **values, seconds=round(time.time() - self.clock, 1))
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print0(f"{stage} {step + 1:>6}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def save(self, stage, step, model, ema=None, tokenizer_hash=None, **train):
        """Writes <stage>.pt after `step` + 1 updates, once all processes are found to hold equal weights."""
        if world() > 1:
            hashes = [None] * world()
            modules = [thing for thing in (model, ema, *train.values()) if isinstance(thing, torch.nn.Module)]
            dist.all_gather_object(hashes, weights_hash(*modules))
            if len(set(hashes)) > 1:
                raise RuntimeError(f"weights differ between processes after step {step + 1}: {hashes}")
        if rank() == 0:
            config = asdict(model.config) if hasattr(model, "config") else model.sizes
            config = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
            ckpt = dict(
                format=FORMAT, stage=stage, step=step + 1, config=self.config, model_config=config,
                model=model.state_dict(), ema=ema and ema.module.state_dict(),
                class_names=self.train.class_names, tokenizer_hash=tokenizer_hash, note=self.note,
                seconds=time.time() - self.clock,
                train={name: thing.state_dict() for name, thing in dict(train, ema=ema).items() if thing},
            )  # fmt: skip
            save_atomic(lambda path: torch.save(ckpt, path), self.out / f"{stage}.pt")
        barrier()

    def sheet(self, name, images, columns):
        if rank() == 0:
            save_atomic(
                lambda p: make_sheet(images, columns, self.note).save(p, "PNG"), self.out / f"{name}.png"
            )


SECTION = dict(vgg="judge", phase1="phase1", phase2="phase2", ar="ar", nar="nar")  # stage -> preset section
DEPENDS = dict(  # what a checkpoint of a stage was made with; a run with other values must not continue it
    vgg=["judge"], phase1=["tokenizer", "discriminator", "vgg", "phase1"],
    phase2=["discriminator", "vgg", "phase2"], ar=["prior", "ar", "conditional", "code_variants"],
    nar=["prior", "nar", "conditional", "code_variants"],
)  # fmt: skip


def refuse_other_config(path, keys, old, new):
    """A checkpoint is continued only by the configuration that began it; the number of steps may change."""
    for key in ["data", "val", "limit", "image_size", "seed", "precision", *keys]:
        a, b = old[key], new[key]
        pairs = [(key, a, b)]
        if isinstance(a, dict):
            pairs = [(f"{key}.{k}", a.get(k), b.get(k)) for k in sorted({*a, *b})]
        for name, was, now in pairs:
            if was != now and not name.endswith(".steps"):
                raise UserError(f"{path} was made with {name} = {was}, not {now} as here; use another --out")


# ----------------------------------------------------------------------------------------------------------
# Stage vgg: a judge of one's own, a narrow VGG-16 trained on the labels of the data at hand
# ----------------------------------------------------------------------------------------------------------


def train_judge(run):
    """Classification with batch norm, which is folded away when the judge is loaded. Not in the paper."""
    c, device = run.config["judge"], run.device
    if not run.train.class_names:
        raise UserError(
            "--stage vgg needs labels: one sub-folder per class. Or pass --vgg FILE for other weights"
        )
    sizes = dict(width=c["width"], num_classes=run.train.num_classes, hidden=c["hidden"], batch_norm=True)
    torch.manual_seed(mix(run.config["seed"], "vgg"))
    vgg = build_vgg16(**sizes).to(device, memory_format=torch.channels_last)
    vgg.sizes = sizes
    optimizer, ema = build_optimizer(vgg, c), build_ema(vgg, c["ema"])
    start = run.start("vgg", model=vgg, optimizer=optimizer, ema=ema)
    net, stream = run.wrap(vgg), batches(run.train, c["batch"], start, run.args.workers)
    for step in run.loop("vgg", start):
        set_lr(optimizer, lr_at(step, c))
        pixels, labels = next(stream)
        x, labels = to_float(pixels, device), labels.to(device)
        x = random_shift(x, run.config["seed"], step, c["batch"])
        vgg.train()
        optimizer.zero_grad(set_to_none=True)
        with run.autocast:
            logits = net(normalize_images(x))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=c["label_smoothing"])
        loss.backward()
        optimizer.step()
        if ema:
            ema.update_parameters(vgg)
        if run.due("log", "vgg", step):
            run.log("vgg", step, lr=lr_at(step, c), loss=loss)
        if run.due("eval", "vgg", step):
            evaluate_judge(run, step, ema.module if ema else vgg)
        if run.due("save", "vgg", step):
            run.save("vgg", step, vgg, ema, optimizer=optimizer)


def random_shift(x, seed, step, batch):
    """Shifts each image by up to an eighth of its side (edges reflected); a function of (seed, step, row)."""
    reach = x.shape[-1] // 8
    rows = seeded_rand(batch, 2, seed=mix(seed, "shift", step))[my_rows(batch)]
    offsets = (rows * (2 * reach + 1)).long().tolist()
    padded, S = F.pad(x, (reach,) * 4, mode="reflect"), x.shape[-1]
    return torch.stack(
        [image[:, t : t + S, left : left + S] for image, (t, left) in zip(padded, offsets, strict=True)]
    )


# ----------------------------------------------------------------------------------------------------------
# Stages phase1 and phase2: the tokenizer (Sec. 3.3, 3.4, Table 9)
# ----------------------------------------------------------------------------------------------------------


def build_tokenizer(run, stage):
    """Phase 1: new, or the weights of --tokenizer. Phase 2: phase 1 with attention, latent space frozen."""
    first, given = run.out / "phase1.pt", run.args.tokenizer
    if stage == "phase1":
        if run.config["phase1"]["init"] == "required" and not given and not first.exists():
            raise UserError(
                "this preset starts from an ImageNet phase-1 checkpoint (Table 9): --tokenizer FILE"
            )
        torch.manual_seed(mix(run.config["seed"], "phase1"))
        try:
            tokenizer = VQTokenizer(
                TokenizerConfig(image_size=run.config["image_size"], **run.config["tokenizer"])
            )
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        if given:
            tokenizer.load_state_dict(load_model(given, ("phase1",))[0].state_dict())
        return tokenizer.to(run.device, memory_format=run.layout), {}
    tokenizer, ckpt = earlier_tokenizer(run, ("phase1",))
    torch.manual_seed(mix(run.config["seed"], "phase2"))
    tokenizer.add_attention()
    return tokenizer.freeze_latent_space().to(memory_format=run.layout), ckpt["train"].get("disc", {})


def earlier_tokenizer(run, stages):
    """(tokenizer, checkpoint): --tokenizer FILE, else the last of `stages` in the run folder."""
    given, found = run.args.tokenizer, [run.out / f"{s}.pt" for s in stages if (run.out / f"{s}.pt").exists()]
    if not given and not found:
        raise UserError(f"no {run.out / 'phase1.pt'}: run --stage phase1 first, or pass --tokenizer FILE")
    tokenizer, ckpt = load_model(given or found[-1], stages, run.device)
    if not given:
        refuse_other_config(found[-1], ["tokenizer"], ckpt["config"], run.config)
    if tokenizer.config.image_size != run.config["image_size"]:
        raise UserError(f"{given} is for {tokenizer.config.image_size}-pixel images, this preset for others")
    return tokenizer, ckpt


@contextlib.contextmanager
def as_user_error():
    """Settings of the preset that a network refuses are bad input, not a bug."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


def build_discriminator(run):
    c = dict(run.config["discriminator"])
    torch.manual_seed(mix(run.config["seed"], "discriminator"))
    kind = c.pop("kind")
    with as_user_error():
        disc = PatchDiscriminator() if kind == "patch" else StyleDiscriminator(run.config["image_size"], **c)
    return disc.to(run.device, memory_format=run.layout)


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
    return all_reduce_mean(
        sum(p * len(part) for p, part in zip(probs, parts, strict=True)) / sum(map(len, parts))
    )


def train_tokenizer(run, stage):
    """Phase 1 trains everything at alpha = 1, phase 2 the attention-enhanced decoder at alpha = 0."""
    c, device = run.config[stage], run.device
    tokenizer, disc_weights = build_tokenizer(run, stage)
    disc, judge, weights = build_discriminator(run), run.judge, layer_weights(c["alpha"])
    with as_user_error():
        adv_loss(torch.zeros(1), c["gan"])
    if disc_weights:  # I21: phase 2 continues the discriminator with a fresh optimizer
        disc.load_state_dict(disc_weights)
    opt_g, opt_d, ema = (
        build_optimizer(tokenizer, c),
        build_optimizer(disc, c),
        build_ema(tokenizer, c["ema"]),
    )
    frozen = latent_hash(tokenizer) if stage == "phase2" else None
    start = run.start(stage, frozen, model=tokenizer, disc=disc, opt_g=opt_g, opt_d=opt_d, ema=ema)
    g, d = run.wrap(tokenizer), run.wrap(disc)
    stream = batches(run.train, c["batch"], start, run.args.workers)
    tokenizer.train()
    for step in run.loop(stage, start):
        set_lr(opt_g, lr_at(step, c))
        set_lr(opt_d, lr_at(step, c))
        for parameter in tokenizer.start_step(step):
            opt_g.state.pop(parameter, None)
        x = to_float(next(stream)[0], device)
        parts, adv = run.micro(x), adv_ramp(step, c)
        with run.autocast:
            global_probs, fakes, logs = mean_probs(tokenizer, parts), [], {}

        disc.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        for part in accumulate(g, parts):
            with run.autocast:
                x_hat, tokens, latent = g(part, global_probs)
                loss_rec = F.l1_loss(x_hat.float(), part)
                loss_per = perceptual_loss(judge, part, x_hat, weights)
                loss_adv = adv_loss(disc(x_hat), c["gan"]) if adv else x_hat.new_zeros(())
            scale = adv
            if adv and c["adaptive"]:
                scale = adv * adaptive_weight(
                    loss_rec + c["per_weight"] * loss_per, loss_adv, tokenizer.decoder.conv_out.weight
                )
            loss = (
                loss_rec + loss_vq(latent, c) + c["per_weight"] * loss_per + scale * loss_adv
            )  # Eq. 2, Eq. 4
            (loss * (len(part) / len(x))).backward()
            fakes.append(x_hat.detach())
            terms = dict(loss_rec=loss_rec, loss_per=loss_per, **latent)
            terms |= dict(loss_adv=loss_adv) if adv else {}
            add_means(logs, terms, len(part) / len(x))
        opt_g.step()

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
            opt_d.step()
        if ema:
            ema.update_parameters(tokenizer)

        if run.due("log", stage, step):
            usage = codebook_usage(tokens.flatten().bincount(minlength=tokenizer.codebook_size))[0]
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
    weights = {"loss_codebook": 1.0, "loss_commit": c["beta"], "loss_entropy": c["gamma"]}
    return sum(weights[name] * value for name, value in latent.items())


# ----------------------------------------------------------------------------------------------------------
# Stages ar and nar: the priors (Sec. 4.2, Table 10)
# ----------------------------------------------------------------------------------------------------------


def cached_codes(run, tokenizer):
    """Tokens of every training image, in `code_variants` crops and flips, and of the validation images.

    returns: dict(train (V, n, N) int16 or int32, val (m, N)); kept in codes.pt under the tokenizer's hash.
    Odd variants are flipped, variants 0 and 1 are central crops, later ones random crops.
    """
    path, V, data = run.out / "codes.pt", run.config["code_variants"], run.train
    key = [
        latent_hash(tokenizer),
        V,
        len(data),
        *(str(run.config[k]) for k in ("data", "val", "limit", "image_size", "seed", "precision")),
    ]
    if not (path.exists() and torch.load(path, weights_only=True, mmap=True).get("key") == key):
        print0(f"\nencoding {len(data)} training images in {V} variants and {len(run.val)} validation images")
        views = [(data, i, mix(run.config["seed"], "variant", v, i) if v > 1 else None, v % 2 == 1)
                 for v in range(V) for i in range(len(data))]  # fmt: skip
        train = encode_all(run, tokenizer, views).view(V, len(data), -1)
        val = encode_all(run, tokenizer, [(run.val, i, None, False) for i in range(len(run.val))])
        if rank() == 0:
            save_atomic(lambda p: torch.save(dict(key=key, train=train, val=val), p), path)
        barrier()
    return torch.load(path, weights_only=True, mmap=True)


def encode_all(run, tokenizer, views, batch=128):
    """Tokens (len(views), N) of (data, index, crop seed, flip) views; processes share the work."""
    dtype = torch.int16 if tokenizer.codebook_size <= 2**15 else torch.int32
    tokens = torch.zeros(len(views), tokenizer.grid_size**2, dtype=dtype)
    starts = range(rank() * batch, len(views), world() * batch)
    for start in tqdm(starts, "encoding", disable=None if rank() == 0 else True):
        x = torch.stack([data.view(*view) for data, *view in views[start : start + batch]])
        with run.autocast:
            tokens[start : start + batch] = tokenizer.encode(to_float(x, run.device)).to(dtype)
    if world() > 1:  # rows of other processes are zero here
        tokens = tokens.to(run.device)
        dist.all_reduce(tokens)
    return tokens.cpu()


def train_prior(run, stage):
    """AR: cross-entropy of each token given the ones before. NAR: of masked tokens given the others."""
    c, device, seed, names = run.config[stage], run.device, run.config["seed"], run.train.class_names
    if run.config["conditional"] and not names:
        raise UserError("this preset's priors are class-conditional and the data has no class sub-folders; "
                        "sort the images into folders or pass --set conditional=false")  # fmt: skip
    tokenizer, _ = earlier_tokenizer(run, ("phase1", "phase2"))
    tokens_of = latent_hash(tokenizer)
    codes = cached_codes(run, tokenizer)
    K, N = tokenizer.codebook_size, tokenizer.grid_size**2
    sizes = PriorConfig(K, N, len(names) if run.config["conditional"] else 0, **run.config["prior"])
    torch.manual_seed(mix(seed, stage))
    with as_user_error():
        prior = (ARPrior if stage == "ar" else NARPrior)(sizes).to(device)
    optimizer, ema = build_optimizer(prior, c), build_ema(prior, c["ema"])
    start = run.start(stage, tokens_of, model=prior, optimizer=optimizer, ema=ema)
    p = codes["train"][0, :2000].long().flatten().bincount(minlength=K).double()
    unigram = torch.special.entr(p / p.sum()).sum().item()
    print0(f"ln K = {math.log(K):.4f} nats; unigram entropy of the codes = {unigram:.4f} nats")
    net = run.wrap(prior)
    prior.train()
    for step in run.loop(stage, start):
        set_lr(optimizer, lr_at(step, c))
        tokens, labels = code_batch(run, codes["train"], step, c["batch"])
        noise = seeded_rand(c["batch"], N + 1, seed=mix(seed, "mask", step))[my_rows(c["batch"])].to(device)
        inputs, mask = (
            mask_tokens(tokens, K, noise) if stage == "nar" else (tokens, torch.ones_like(tokens).bool())
        )
        masked = all_reduce_mean(mask.sum().float())
        optimizer.zero_grad(set_to_none=True)
        means = torch.zeros(2, device=device)
        for part in accumulate(net, zip(*map(run.micro, (inputs, tokens, mask, labels)), strict=True)):
            part_inputs, part_tokens, part_mask, part_labels = part
            with run.autocast:
                logits = net(part_inputs, part_labels if sizes.num_classes else None)
            if stage == "ar":
                loss, accuracy = prior.loss(logits, part_tokens)
            else:
                loss, accuracy = prior.loss(logits, part_tokens, part_mask, c["label_smoothing"])
            share = part_mask.sum() / masked  # of the global batch's loss terms
            (loss * share).backward()
            means += torch.stack([loss.detach(), accuracy]) * share
        optimizer.step()
        if ema:
            ema.update_parameters(prior)
        if run.due("log", stage, step):
            run.log(stage, step, lr=lr_at(step, c), loss=means[0], top1=means[1])
        if run.due("eval", stage, step):
            evaluate_prior(run, stage, step, ema.module if ema else prior, tokenizer, codes["val"], unigram)
            prior.train()
        if run.due("save", stage, step):
            run.save(stage, step, prior, ema, tokens_of, optimizer=optimizer)


def code_batch(run, codes, step, batch):
    """(tokens (B, N), labels (B,)) of this process's rows of the global batch at `step`."""
    rows = my_rows(batch)
    positions = range(step * batch + rows.start, step * batch + rows.stop)
    index = [run.train.shuffled(p) for p in positions]
    variants = [mix(run.config["seed"], "variant", p) % len(codes) for p in positions]
    labels = torch.tensor([run.train.labels[i] for i in index])
    return codes[variants, index].long().to(run.device), labels.to(run.device)


# ----------------------------------------------------------------------------------------------------------
# All stages, --explain, and the command
# ----------------------------------------------------------------------------------------------------------


def train_stage(run, stage):
    if stage == "vgg":
        train_judge(run)
    elif stage in ("phase1", "phase2"):
        train_tokenizer(run, stage)
    else:
        train_prior(run, stage)


def main(args, config):
    with one_line_errors():
        if args.explain:
            return explain(config)
        run = Run(args, config)
        begin = time.time()
        for stage in STAGES if args.stage == "all" else [args.stage]:
            if stage == "vgg" and args.stage == "all" and config["vgg"] != "judge":
                continue
            train_stage(run, stage)
        if args.stage == "all":
            summarize(run)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print0(f"\ndone in {time.time() - begin:.0f} s, {memory:.0f} MB peak memory; see {run.out}/")


if __name__ == "__main__":
    main(*ARGUMENTS)
