"""`python tests/benchmarks compile`: what --compile costs at the first step and gives at the next ones,
on a CPU.

Every case runs in a process of its own with an empty cache of the compiler; one JSON line each.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from plumbing.compiling import compile_network, compile_sampling
from plumbing.fast import keep_freed_memory, pack_linears
from prior_ar import ARPrior, PriorConfig
from tokenizer import TokenizerConfig, VQTokenizer

CASES = {
    "AR training step, 24 x 768, 2 x 256 tokens, bf16, dropout 0": ("plain", "blocks", "whole"),
    "phase 2's autoencoder, training step, 1 x 256^2, bf16": ("plain", "compiled"),
    "AR sampling of 256 tokens, 24 x 768, batch 1, float32": ("plain", "compiled"),
    "AR sampling of 256 tokens, 24 x 768, batch 1, bf16 weights": ("plain", "packed", "compiled"),
}


def function_of(case, how):
    """What is timed: a call without arguments."""
    if case.startswith("phase 2"):
        tokenizer, x = VQTokenizer(TokenizerConfig()).train(), torch.rand(1, 3, 256, 256) * 2 - 1
        tokenizer.add_attention()
        tokenizer.freeze_latent_space()
        if how == "compiled":
            compile_network(tokenizer)

        def autoencode():
            with torch.autocast("cpu", torch.bfloat16):
                x_hat = tokenizer(x)[0]
            (x_hat.float() - x).abs().mean().backward()
            tokenizer.zero_grad()

        return autoencode
    sampling, labels = "sampling" in case, torch.zeros(1, dtype=torch.int64)
    prior = ARPrior(PriorConfig(num_classes=1000, dropout=0.0)).train(not sampling)
    if not sampling:
        if how == "blocks":
            compile_network(prior)
        elif how == "whole":
            prior.compile()
        tokens, labels = torch.randint(1024, (2, 256)), labels.expand(2)

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                logits = prior(tokens, labels)
            prior.loss(logits, tokens)[0].backward()
            prior.zero_grad()

        return step
    if "bf16" in case:
        prior.bfloat16()
    if how == "packed":
        pack_linears(prior, 1)
    if how == "compiled":
        compile_sampling(prior)
    noise = torch.rand(1, 256)
    return lambda: prior.generate(labels, noise, top_p=0.92)


def point(case, how, repeats):
    keep_freed_memory()
    times, function = [], function_of(case, how)
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    rest = times[2:]  # the second may still compile
    print(json.dumps(dict(compile=case, how=how, first=times[0], seconds=statistics.median(rest),
                          fastest=min(rest), slowest=max(rest), threads=torch.get_num_threads(),
                          torch=torch.__version__, time=time.strftime("%F %T"))))


def compiling(args):
    for case, ways in CASES.items():
        for how in ways if args.case in case else ():
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    [sys.executable, __file__, case, how, str(args.repeats), str(args.threads)],
                    env=dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache), capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            line = done.stdout.strip().splitlines()[-1]
            print(line, flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    point(sys.argv[1], sys.argv[2], int(sys.argv[3]))
