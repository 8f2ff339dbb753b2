"""Benchmarks, run by hand and never by pytest.

    PYTHONPATH=. python tests/benchmarks safety     # what the checks of train.py add to a training step
    PYTHONPATH=. python tests/benchmarks speed --out speed.jsonl    # every case beside its floor
    PYTHONPATH=. python tests/benchmarks speed --only quantizer --case K=1024
    PYTHONPATH=OTHER python tests/benchmarks speed    # the code of another clone
    PYTHONPATH=. python tests/benchmarks gpu --out gpu.jsonl    # gpu.py: on a GPU, --compile too

`speed` measures the ceilings of this machine (matrix products and 3x3 convolutions in float32 and bf16,
reading memory) and our own work in turns, so that a noisy moment hits both. Each case is told as a share of
its floor: its FLOPs (torch.utils.flop_counter) over the ceiling of its kind, for token-by-token sampling the
bytes of the weights over the bandwidth, for the quantizer the product of vectors and codes alone. Medians
over --repeats, and the most memory that the tensors of one call hold; one JSON line a case.
"""

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import plumbing.files
import plumbing.hashes
import plumbing.processes
import plumbing.run
import recipes.options
import recipes.small
import train
from perceptual import StyleDiscriminator, VGGTaps, adv_loss, disc_loss, layer_weights, perceptual_loss
from plumbing.weights import build_vgg16
from prior_ar import ARPrior, PriorConfig
from prior_nar import NARPrior, mask_tokens
from plumbing.data import FolderData, scan_folder
from plumbing.fast import keep_freed_memory
from plumbing.files import read_checkpoint, save_checkpoint
from tokenizer import TokenizerConfig, VQTokenizer, VectorQuantizer
from plumbing.files import read_metrics


def median_time(function, repeats=30):
    """Seconds of one call, the median of `repeats`."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def tensor_peak_mb(function):
    """Most memory in MiB that tensors made by one call held at a time, from the profiler's record."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0)) / 2**20


# Ceilings -------------------------------------------------------------------------------------------------


def ceilings():
    """{kind: (function, amount)}: one large operation of each kind, and its FLOPs or bytes."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        x, w = torch.randn(4, 256, 64, 64).to(dtype), torch.randn(256, 256, 3, 3).to(dtype)
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
        found[f"gemm_{name}"] = lambda a=a, b=b: a @ b, 2 * 2048**3
        found[f"conv_{name}"] = lambda x=x, w=w: F.conv2d(x, w, padding=1), 2 * 4 * 64 * 64 * 256 * 256 * 9
    block = torch.randn(2**27)
    found["read"] = lambda: block.sum(), block.numel() * 4
    for K in SIZES:
        z, codes = torch.randn(16 * 256, 256), torch.randn(K, 256)
        found[f"product K={K}"] = lambda z=z, codes=codes: z @ codes.T, 2 * 16 * 256 * 256 * K
    return found


@torch.no_grad()
def rate(function, amount, repeats=3):
    """FLOP/s or bytes/s of the fastest of some calls."""
    return amount / min(timed(function) for _ in range(repeats))


def timed(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


SIZES = (1024, 16_384, 65_536)  # K of the quantizer's cases


# Cases: (name, function, kind of its floor, its amount, what counts that, or None: FLOPs) -------------


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def quantizer_cases():
    for K in SIZES:
        quantizer = VectorQuantizer(TokenizerConfig(codebook="plain", codebook_size=K)).train()
        z = torch.randn(16, 256, 16, 16, requires_grad=True)  # 16 x 256 vectors of width 256

        def forward(quantizer=quantizer, z=z):
            with torch.no_grad():
                quantizer.quantize(z)

        def both(quantizer=quantizer, z=z):
            sum(quantizer(z)[2].values()).backward()

        flops = 2 * 16 * 256 * 256 * K  # the products alone
        yield f"quantizer K={K} forward", forward, f"product K={K}", flops
        yield f"quantizer K={K} forward+backward", both, f"product K={K}", flops


def autoencoder_cases(side=256, batch=2):
    tokenizer = VQTokenizer(TokenizerConfig(image_size=side))
    x = torch.randn(batch, 3, side, side)
    loaded = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last).eval()  # as load_model gives it
    with torch.no_grad(), bf16():
        tokens = loaded.encode(x)

    def encode():  # as train.py encodes a data set
        with torch.no_grad(), bf16():
            loaded.encode(x)

    def decode():  # as sample.py --precision bf16
        with torch.no_grad():
            loaded.decode(tokens)

    def step():
        tokenizer.zero_grad(set_to_none=True)
        with bf16():
            x_hat, _, losses = tokenizer(x)
        (F.l1_loss(x_hat.float(), x) + sum(losses.values())).backward()

    yield f"encode {batch}x{side}^2 bf16", encode, "conv_bf16", None
    loaded.decoder.bfloat16()
    yield f"decode {batch}x{side}^2 bf16", decode, "conv_bf16", None
    yield f"autoencoder step {batch}x{side}^2 bf16", step, "conv_bf16", None


def phase_cases(side=256, batch=2):
    """A whole step of both phases as in train.py, and each part of it."""
    vgg = VGGTaps(build_vgg16()).to(memory_format=torch.channels_last)
    disc = StyleDiscriminator(side)
    x = torch.randn(batch, 3, side, side).clamp(-1, 1)
    for phase in (1, 2):
        tokenizer = VQTokenizer(TokenizerConfig(image_size=side))
        if phase == 2:
            tokenizer.add_attention()
            tokenizer.freeze_latent_space()
        params = [p for p in tokenizer.parameters() if p.requires_grad]
        opt_g, opt_d = (torch.optim.Adam(p, fused=True) for p in (params, list(disc.parameters())))
        weights = layer_weights(1.0 if phase == 1 else 0.0)

        def generator(tokenizer=tokenizer, weights=weights, opt_g=opt_g):
            disc.requires_grad_(False)
            opt_g.zero_grad(set_to_none=True)
            with bf16():
                x_hat, _, losses = tokenizer(x)
                loss = F.l1_loss(x_hat.float(), x) + perceptual_loss(vgg, x, x_hat, weights)
                loss = loss + adv_loss(disc(x_hat)) + sum(losses.values())
            loss.backward()
            opt_g.step()
            return x_hat.detach()

        def discriminator(fake=x, opt_d=opt_d):
            disc.requires_grad_(True)
            opt_d.zero_grad(set_to_none=True)
            with bf16():
                loss = disc_loss(disc(x), disc(fake))
            loss.backward()
            opt_d.step()

        def look(weights=weights):
            x_hat = x.clone().requires_grad_(True)
            with bf16():
                loss = perceptual_loss(vgg, x, x_hat, weights)
            loss.backward()

        def step(generator=generator, discriminator=discriminator):
            discriminator(generator())

        yield f"phase {phase} step {batch}x{side}^2 bf16", step, "conv_bf16", None
        yield f"phase {phase}, vgg alone", look, "conv_bf16", None
        yield f"phase {phase}, discriminator's step alone", discriminator, "conv_bf16", None


def attention_cases():
    """Forward and backward, PyTorch's and ours, at the sizes of `imagenet` and of `demo`."""
    from plumbing.fast import attention  # here, so that other cases run with older code too

    sizes = {"64 heads of 256 x 48": (4, 16, 256, 48), "512 heads of 17 x 32": (128, 4, 17, 32)}
    for name, shape in sizes.items():
        qkv = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
        kinds = ("PyTorch's", F.scaled_dot_product_attention, "is_causal"), ("ours", attention, "causal")
        for whose, function, causal in kinds:
            yield (f"attention, {name}, bf16, {whose}", lambda function=function, qkv=qkv, causal=causal:
                   function(*qkv, **{causal: True}).sum().backward(), None, 1)


def prior_sizes():
    return PriorConfig(1024, 256, 1000, n_layer=24, n_head=16, n_embd=768, dropout=0.1)


def prior_cases(batch=4):
    for name, kind in (("AR", ARPrior), ("NAR", NARPrior)):
        prior = kind(prior_sizes()).train()
        optimizer = torch.optim.AdamW(prior.parameters(), fused=True)
        tokens, labels = torch.randint(0, 1024, (batch, 256)), torch.zeros(batch, dtype=torch.int64)

        def step(prior=prior, optimizer=optimizer, tokens=tokens, labels=labels, name=name):
            optimizer.zero_grad(set_to_none=True)
            inputs, mask = tokens, None
            if name == "NAR":
                inputs, mask = mask_tokens(tokens, 1024, torch.rand(len(tokens), 257))
            with bf16():
                logits = prior(inputs, labels)
            loss, _ = prior.loss(logits, tokens, *([mask] if name == "NAR" else []))
            loss.backward()
            optimizer.step()

        yield f"{name} training step {batch}x256 bf16", step, "gemm_bf16", None


def sampling_cases():
    for batch in (1, 8, 32):
        prior = ARPrior(prior_sizes()).eval().bfloat16()
        size = 2 * sum(p.numel() for p in ARPrior(prior_sizes()).transformer.blocks.parameters())
        noise, labels = torch.rand(batch, 256), torch.zeros(batch, dtype=torch.int64)

        def draw(prior=prior, noise=noise, labels=labels):
            prior.generate(labels, noise, top_p=0.92)

        kind, amount = ("read", 256 * size) if batch == 1 else ("gemm_bf16", 256 * batch * size)
        yield f"ar_sample batch {batch}, 256 tokens, bf16 weights", draw, kind, amount
    for batch in (1, 8):
        noise, labels = torch.rand(batch, 12, 2, 256), torch.zeros(batch, dtype=torch.int64)
        draw = partial(NARPrior(prior_sizes()).eval().bfloat16().generate, labels, noise)
        yield f"nar_sample batch {batch}, 12 steps, bf16 weights", draw, "gemm_bf16", None


def loading_cases(folder, count=64):
    """500x375 JPEGs of smooth noise to 256^2 crops, in this process."""
    (folder / "a").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for i in range(count):
        noise = F.interpolate(torch.rand(1, 3, 24, 32, generator=draw), size=(375, 500), mode="bicubic")
        pixels = (noise[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().contiguous().numpy()
        Image.fromarray(pixels).save(folder / "a" / f"{i}.jpg", quality=90)
    files, names = scan_folder(folder)

    def load():
        data = FolderData(files, names, 256, 0)  # a new one, whose memory is empty
        for i in range(count):
            data[i]

    yield f"load {count} crops of 256^2 from 500-pixel JPEG", load, None, count


def startup_cases():
    for script in ("train.py --help", "sample.py --help", "-c 'import train'"):
        words = ["-c", "import train"] if script.startswith("-c") else script.split()
        yield (f"start-up: python {script}",
               lambda words=words: subprocess.run([sys.executable, *words], capture_output=True, check=True),
               None, 1)


def speed(args):
    keep_freed_memory()
    tops = ceilings()
    with tempfile.TemporaryDirectory() as name:
        groups = dict(quantizer=quantizer_cases, autoencoder=autoencoder_cases, phase=phase_cases,
                      attention=attention_cases, prior=prior_cases, sample=sampling_cases,
                      start=startup_cases, load=lambda: loading_cases(Path(name) / "jpeg"))
        for group, cases in groups.items():
            if args.only and group not in args.only.split(","):
                continue
            for case, function, kind, amount in cases():
                if args.case not in case:
                    continue
                function()
                if kind and not isinstance(amount, int):
                    amount = (amount or partial(count_flops, function))()
                times, top = [], []
                for _ in range(args.repeats):  # the ceiling of this very moment, then the case
                    top += [rate(*tops[kind])] if kind else []
                    times.append(timed(function))
                line = dict(case=case, seconds=statistics.median(times), fastest=min(times),
                            slowest=max(times), kind=kind, amount=amount, threads=args.threads,
                            repeats=args.repeats, torch=torch.__version__, time=time.strftime("%F %T"))
                told = f"{amount / line['seconds']:.1f}/s"
                if kind:
                    shares = [amount / ceiling / t for ceiling, t in zip(top, times, strict=True)]
                    line |= dict(ceiling=statistics.median(top), share=statistics.median(shares),
                                 peak_mb=round(tensor_peak_mb(function)))
                    told = f"{line['share']:6.1%} of {kind} ({line['ceiling'] / 1e9:.0f} G/s), "
                    told += f"{line['peak_mb']} MiB"
                print(f"{case:48s} {line['seconds'] * 1e3:10.1f} ms  {told}", flush=True)
                if args.out:
                    with open(args.out, "a") as file:
                        file.write(json.dumps(line) + "\n")


# What safety costs ---------------------------------------------------------------------------------------


def safety(stage, folder):
    """Times of the added work beside the time of a step, at the scale of preset cifar10.

    Added: the norm of the gradients, the agreement on signals, the seed, and, at their usual intervals, a log
    line that is synced to disk and a checkpoint that is checked for finite numbers and written twice-safe.
    """
    words = ["--preset", "cifar10", "--data", "shapes", "--out", str(folder), "--set", "classifier.steps=2",
             "--limit", "2000", "--eval-every", "0", "--log-every", "5", "--save-every", "1000",
             "--set", "tokenizer.warm_start=0", "--set", "phase1.adv_start=0.0"]
    args, config = recipes.options.train_args(["--stage", stage, "--steps", "40", *words])
    run, path = plumbing.run.Run(args, config), folder / f"{stage}.pt"
    for one in train.with_vgg(run, [stage]):
        train.train_stage(run, one)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == stage]
    step = (rows[-1]["seconds"] - rows[1]["seconds"]) / (rows[-1]["step"] - rows[1]["step"])
    ckpt = read_checkpoint(path, [stage])
    checks = median_time(lambda: run.due("save", stage, 0))
    checks += median_time(lambda: torch.manual_seed(plumbing.processes.mix(0, stage, 1, 0)))
    for weights in (ckpt["model"], ckpt["train"].get("disc", {})):
        grads = [torch.randn_like(value) for value in weights.values() if value.is_floating_point()]
        checks += median_time(lambda g=grads: torch.nn.utils.get_total_norm(g).isfinite().item())
    line = median_time(lambda: run.log(stage, 0, lr=0.1, loss_rec=1.0)) / 20
    plain = median_time(lambda: torch.save(ckpt, folder / "plain.pt"), 7)
    safe = median_time(lambda: plumbing.hashes.not_finite(ckpt) or save_checkpoint(ckpt, path), 7)
    save = (safe - plain) / min(2000, recipes.small.CIFAR10[stage]["steps"] // 10)
    print(f"{stage}: step {step * 1e3:.1f} ms; checks {checks * 1e3:.2f} ms, log {line * 1e3:.3f} ms, "
          f"checkpoint {save * 1e3:.3f} ms a step ({plain:.2f} -> {safe:.2f} s each): "
          f"{(checks + line + save) / step:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["safety", "speed", "gpu"])
    parser.add_argument("--device", default="cuda", help="of gpu: cpu only shows that it runs")
    parser.add_argument("--preset", default="imagenet", help="of gpu")
    parser.add_argument("--steps", type=int, default=40, help="of gpu: a training case's steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="of quantizer,autoencoder,phase,attention,prior,sample,start,load")
    parser.add_argument("--case", default="", help="of speed, gpu: only cases with this in "
                        "their names")
    parser.add_argument("--out", help="file to append JSON lines to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "safety":
        with tempfile.TemporaryDirectory() as name:
            safety("phase1", Path(name))
            safety("ar", Path(name))
    elif arguments.what == "gpu":
        from gpu import gpu

        gpu(arguments)
    else:
        speed(arguments)
