"""`python tests/benchmarks gpu`: training steps and sampling on a GPU, and what --compile changes.

Training steps are those of train.py itself, each timed between two synchronisations; the images are one batch
that lies in memory, so no loader is measured. FLOPs are those of --explain. A share is of the data sheet's
dense bf16 peak of an H100 (`studies.cost.PEAK`), and beside it stands the fastest large product that this
very device did. Sampling at batch 1 is told as bytes of weights a second over the speed of copying.
"""

import contextlib
import io
import itertools
import json
import re
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import plumbing.run
import recipes.options
import train
from plumbing.data import load_data
from plumbing.files import read_metrics
from plumbing.models import load_model
from plumbing.slices import decode
from prior_ar import Block, PriorConfig
from prior_nar import NARPrior
from recipes.options import find_preset
from studies.cost import PEAK

SKIPPED = 8  # first steps of a run: allocations, the compiler, the first R1
CASES = dict(  # stage, images a step, further words
    phase1=("phase1", 32), phase1_compiled=("phase1", 32, "--compile"), phase2=("phase2", 16),
    ar=("ar", 32), ar_64=("ar", 64), ar_128=("ar", 128), ar_compiled=("ar", 32, "--compile"),
    nar=("nar", 32), nar_compiled=("nar", 32, "--compile"), phase2_compiled=("phase2", 16, "--compile"))
NEEDED = "phase1", "ar", "nar"  # by other cases, so they always run


def seconds(function, device, repeats):
    """Times of some calls, after one that is not counted."""
    times = []
    for i in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        times += [time.perf_counter() - begin] if i else []
    return times


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def tops(device):
    """Measured: bf16 FLOP/s of a large product, bytes/s of a large copy (read and written)."""
    small = device.type == "cpu"
    side, length = (512, 2**22) if small else (8192, 2**30)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    x = torch.empty(length, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    return (2 * side**3 / min(seconds(lambda: a @ a, device, 10)),
            2 * length / min(seconds(lambda: y.copy_(x), device, 10)))


def flops(preset):
    """{stage: FLOPs of an image in training} as --explain prints them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        train.main(*recipes.options.train_args(["--preset", preset, "--explain"]))
    found = re.findall(r"cost of (\w+): ([\d,.]+) GFLOP", text.getvalue())
    return {stage: float(number.replace(",", "")) * 1e9 for stage, number in found}


def training(args, device, folder, name, stage, batch, *more):
    """Runs some steps of a stage; returns (times of single steps, which of them had R1, all losses)."""
    words = ["--preset", args.preset, "--stage", stage, "--data", "shapes", "--limit", str(max(64, batch)),
             "--batch", str(batch), "--steps", str(args.steps), "--device", args.device, "--eval-every", "0",
             "--log-every", "1", "--save-every", "1000000000", "--set", "code_variants=1",
             "--set", "tokenizer.warm_start=0", "--set", f"{stage}.ema=0.0", "--out", str(folder / name),
             *more]
    words += ["--vgg", "random", "--set", f"{stage}.adv_start=0.0"] if stage.startswith("phase") else []
    words += ["--tokenizer", str(folder / "phase1" / "phase1.pt")] if stage != "phase1" else []
    run, times = plumbing.run.Run(*recipes.options.train_args(words)), []
    loader = torch.utils.data.DataLoader(load_data(run.config)[0], batch)
    run.stream = lambda *_: itertools.repeat(next(iter(loader)))
    real = run.loop

    def loop(stage, start):
        for step in real(stage, start):
            synchronize(device)
            begin = time.perf_counter()
            yield step
            synchronize(device)
            times.append(time.perf_counter() - begin)

    run.loop = loop
    with contextlib.redirect_stdout(io.StringIO()), run.session():
        train.train_stage(run, stage)
    every = run.config[stage].get("r1_every", 0)
    with_r1 = [bool(every) and i % every == 0 for i in range(len(times))]
    rows = [row for row in read_metrics(folder / name / "metrics.jsonl") if row["stage"] == stage]
    return times, with_r1, [row["loss" if "loss" in row else "loss_rec"] for row in rows if "lr" in row]


def train_cases(args, device, write):
    cost, first = flops(args.preset), {}
    with tempfile.TemporaryDirectory() as root:
        for name, (stage, batch, *more) in CASES.items():
            if args.case not in name and name not in NEEDED:
                continue
            batch = batch if device.type == "cuda" else 2
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            times, with_r1, losses = training(args, device, Path(root), name, stage, batch, *more)
            spent = time.perf_counter() - begin
            plain = [t for t, r1 in zip(times[SKIPPED:], with_r1[SKIPPED:], strict=True) if not r1]
            slow = [t for t, r1 in zip(times[SKIPPED:], with_r1[SKIPPED:], strict=True) if r1]
            step = statistics.median(plain)
            line = dict(case=f"{name}, {batch} images a step", seconds=step, all_in_all=spent,
                        share=cost[stage] * batch / step / PEAK)
            if slow:
                every = find_preset(args.preset)[stage]["r1_every"]
                line |= dict(r1_seconds=statistics.median(slow),
                             amortised=step + (statistics.median(slow) - step) / every)
            if device.type == "cuda":
                line["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            expected = first.setdefault((stage, batch), losses)  # what --compile changes, at worst
            line["off"] = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
            write(line)
        sample_cases(device, write, Path(root), args.case)


@torch.no_grad()
def compiled_dropout(device):
    """The share of zeros and the scale of what is left, after a compiled block's dropout behind its attention
    (a fault of the compiler once spoilt its masks)."""
    block = Block(PriorConfig(n_head=12, n_embd=768, dropout=0.1), causal=True).to(device).train()
    block.attn.dropout, x = 0.0, torch.randn(8, 257, 768, device=device)
    block.mlp.proj.weight.zero_(), block.mlp.proj.bias.zero_()  # x + dropout(attention) is all that is left
    dropped, whole = torch.compile(block)(x) - x, block.eval()(x) - x
    kept = (dropped != 0) & (whole.abs() > 1e-3)
    return dict(zeros=(dropped == 0).float().mean().item(),
                scale=(dropped[kept] / whole[kept]).median().item())


@torch.no_grad()
def sample_cases(device, write, root, wanted):
    tokenizer = load_model(root / "phase1" / "phase1.pt", ("phase1",), device)[0]
    tokenizer.decoder.bfloat16()
    _, copied = tops(device)
    for name, batches in (("ar", (1, 64, 256)), ("nar", (1, 64))):
        prior = load_model(root / name / f"{name}.pt", (name,), device)[0].bfloat16()
        sampler = {"nar_steps": 12} if isinstance(prior, NARPrior) else {"top_p": 0.92}
        shape, classes = prior.noise_shape(prior.SAMPLER | sampler), prior.config.num_classes
        weights = 2 * sum(p.numel() for p in prior.transformer.blocks.parameters())
        for batch in batches if device.type == "cuda" else batches[:1]:
            case = f"{name} sampling, batch {batch}"
            if wanted not in case:
                continue
            noise = torch.rand(batch, *shape, device=device)
            labels = torch.zeros(batch, dtype=torch.int64, device=device) if classes else None
            draw = partial(prior.generate, labels, noise, **sampler)
            decoded = statistics.median(seconds(partial(decode, tokenizer, draw()), device, 3))
            drawn = statistics.median(seconds(draw, device, 3))
            passes = shape[0]  # tokens, or rounds
            work = 2 * batch * (weights / 2) * (passes if name == "ar" else passes * shape[2])
            write(dict(case=case, seconds=drawn, decoding=decoded,
                       milliseconds=drawn / passes * 1e3, images_per_s=batch / (drawn + decoded),
                       share=work / drawn / PEAK, of_bandwidth=weights * passes / drawn / copied,
                       minutes_of_50000=50_000 / batch * (drawn + decoded) / 60))


def gpu(args):
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, only to see that it runs"
    top, copied = tops(device)
    about = dict(device=name, torch=torch.__version__, preset=args.preset, steps=args.steps)

    def write(line):
        line = {key: round(v, 5) if isinstance(v, float) else v for key, v in (line | about).items()}
        print(", ".join(f"{key} {value}" for key, value in line.items() if key not in about), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line | dict(time=time.strftime("%F %T"))) + "\n")

    write(dict(case="ceilings", product=top / 1e12, copied=copied / 1e9, peak=PEAK / 1e12))
    write(dict(case="dropout 0.1, compiled", **compiled_dropout(device)))
    train_cases(args, device, write)
