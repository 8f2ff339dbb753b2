"""Benchmarks, run by hand and never by pytest: the table of docs/speed.md.

    PYTHONPATH=. python tests/benchmarks speed --out speed.jsonl    # every case beside its floor
    PYTHONPATH=. python tests/benchmarks speed --only quantizer
    PYTHONPATH=OTHER python tests/benchmarks speed    # the code of another clone
    PYTHONPATH=. python tests/benchmarks gpu --out gpu.jsonl    # gpu.py: on a GPU, --compile too

`speed` measures the ceilings of this machine (matrix products and 3x3 convolutions in bf16, reading memory)
and our own work in turns, so that a noisy moment hits both. Each case is told as a share of its floor: its
FLOPs (torch.utils.flop_counter) over the ceiling of its kind, for token-by-token sampling the bytes of the
weights over the bandwidth, for the quantizer the product of vectors and codes alone. Medians over --repeats,
and the most memory that the tensors of one call hold; one JSON line a case.
"""

import argparse
import itertools
import json
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from perceptual import StyleDiscriminator, VGGTaps, adv_loss, disc_loss, layer_weights, perceptual_loss
from plumbing.fast import keep_freed_memory
from plumbing.weights import build_vgg16
from prior_ar import ARPrior, PriorConfig
from prior_nar import NARPrior
from tokenizer import TokenizerConfig, VectorQuantizer, VQTokenizer


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
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    x, w = torch.randn(4, 256, 64, 64).bfloat16(), torch.randn(256, 256, 3, 3).bfloat16()
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    block = torch.randn(2**27)
    found = dict(gemm=(lambda: a @ b, 2 * 2048**3), read=(block.sum, block.numel() * 4),
                 conv=(lambda: F.conv2d(x, w, padding=1), 2 * 4 * 64 * 64 * 256 * 256 * 9))
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

        def both(quantizer=quantizer, z=z):
            sum(quantizer(z)[2].values()).backward()

        flops = 2 * 16 * 256 * 256 * K  # the products alone
        yield f"quantizer K={K} forward+backward", both, f"product K={K}", flops


def decoder_cases(side=256, batch=2):
    tokenizer = VQTokenizer(TokenizerConfig(image_size=side)).to(memory_format=torch.channels_last).eval()
    tokenizer.decoder.bfloat16()  # as sample.py --precision bf16
    tokens = torch.randint(1024, (batch, *tokenizer.token_shape))
    decode = torch.no_grad()(tokenizer.decode)
    yield f"decode {batch}x{side}^2 bf16", partial(decode, tokens), "conv", None


def phase_cases(side=256, batch=2):
    """A whole step of both phases as in train.py."""
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

        def step(tokenizer=tokenizer, weights=weights, opt_g=opt_g, opt_d=opt_d):
            disc.requires_grad_(False)
            opt_g.zero_grad(set_to_none=True)
            with bf16():
                x_hat, _, losses = tokenizer(x)
                loss = F.l1_loss(x_hat.float(), x) + perceptual_loss(vgg, x, x_hat, weights)
                loss = loss + adv_loss(disc(x_hat)) + sum(losses.values())
            loss.backward()
            opt_g.step()
            disc.requires_grad_(True)
            opt_d.zero_grad(set_to_none=True)
            with bf16():
                loss = disc_loss(disc(x), disc(x_hat.detach()))
            loss.backward()
            opt_d.step()

        yield f"phase {phase} step {batch}x{side}^2 bf16", step, "conv", None


def prior_sizes():
    return PriorConfig(1024, 256, 1000, n_layer=24, n_head=16, n_embd=768, dropout=0.1)


def prior_cases(batch=4):
    for name, kind in (("AR", ARPrior), ("NAR", NARPrior)):
        prior = kind(prior_sizes()).train()
        optimizer = torch.optim.AdamW(prior.parameters(), fused=True)
        tokens, labels = torch.randint(0, 1024, (batch, 256)), torch.zeros(batch, dtype=torch.int64)

        def step(prior=prior, optimizer=optimizer, tokens=tokens, labels=labels):
            optimizer.zero_grad(set_to_none=True)
            inputs, mask = prior.inputs(tokens, torch.rand(len(tokens), 257))
            with bf16():
                logits = prior(inputs, labels)
            prior.loss(logits, tokens, mask)[0].backward()
            optimizer.step()

        yield f"{name} training step {batch}x256 bf16", step, "gemm", None


def sampling_cases():
    for batch in (1, 8, 32):
        prior = ARPrior(prior_sizes()).eval().bfloat16()
        size = 2 * sum(p.numel() for p in ARPrior(prior_sizes()).transformer.blocks.parameters())
        noise, labels = torch.rand(batch, 256), torch.zeros(batch, dtype=torch.int64)

        def draw(prior=prior, noise=noise, labels=labels):
            prior.generate(labels, noise, top_p=0.92)

        kind, amount = ("read", 256 * size) if batch == 1 else ("gemm", 256 * batch * size)
        yield f"ar_sample batch {batch}, 256 tokens, bf16 weights", draw, kind, amount
    for batch in (1, 8):
        noise, labels = torch.rand(batch, 12, 2, 256), torch.zeros(batch, dtype=torch.int64)
        draw = partial(NARPrior(prior_sizes()).eval().bfloat16().generate, labels, noise)
        yield f"nar_sample batch {batch}, 12 steps, bf16 weights", draw, "gemm", None


GROUPS = dict(quantizer=quantizer_cases, decoder=decoder_cases, phase=phase_cases, prior=prior_cases,
              sample=sampling_cases)


def speed(args):
    keep_freed_memory()
    tops = ceilings()
    chosen = [args.only] if args.only else GROUPS
    for case, function, kind, amount in itertools.chain.from_iterable(GROUPS[name]() for name in chosen):
        function()
        if not isinstance(amount, int):
            amount = (amount or partial(count_flops, function))()
        times, top = [], []
        for _ in range(args.repeats):  # the ceiling of this very moment, then the case
            top.append(rate(*tops[kind]))
            times.append(timed(function))
        shares = [amount / ceiling / t for ceiling, t in zip(top, times, strict=True)]
        line = dict(case=case, seconds=statistics.median(times), fastest=min(times), slowest=max(times),
                    kind=kind, amount=amount, ceiling=statistics.median(top),
                    share=statistics.median(shares), peak_mb=round(tensor_peak_mb(function)),
                    threads=args.threads, repeats=args.repeats, torch=torch.__version__)
        print(f"{case:48s} {line['seconds'] * 1e3:10.1f} ms  {line['share']:6.1%} of {kind} "
              f"({line['ceiling'] / 1e9:.0f} G/s), {line['peak_mb']} MiB", flush=True)
        write(args.out, line)


def write(path, line):
    """Appends a line of JSON, with the time, to --out if there is one."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(line | dict(time=time.strftime("%F %T"))) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "gpu"])
    parser.add_argument("--device", default="cuda", help="of gpu: cpu only shows that it runs")
    parser.add_argument("--preset", default="imagenet", help="of gpu")
    parser.add_argument("--steps", type=int, default=40, help="of gpu: a training case's steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="of speed")
    parser.add_argument("--only", choices=GROUPS, help="of speed")
    parser.add_argument("--case", default="", help="of gpu: only cases with this in their names")
    parser.add_argument("--out", help="file to append JSON lines to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "gpu":
        from gpu import gpu

        gpu(arguments)
    else:
        speed(arguments)
