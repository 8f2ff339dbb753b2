"""Tokens of a data set: cached for the priors, and how evenly they use the codebook."""

import itertools
import math
import random
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.errors import warn
from plumbing.files import intact, load_torch, save_torch
from plumbing.hashes import latent_hash
from plumbing.images import to_float
from plumbing.processes import (
    agreed, all_reduce_mean, full_float32, mix, my_rows, on_rank0, print0, rank, to_device, world,
)


def cached_codes(run, tokenizer):
    """Tokens of every training image, in `code_variants` crops and flips, and of the validation images.

    returns: dict(train (V, n, N) and val (m, N) int16 or int32, labels (n,) and val_labels (m,) int64), kept
             in codes.pt under hashes of tokenizer and data; and `unigram`, the entropy of codes in nats
    Odd variants are flipped, variants 0 and 1 are central crops, later ones random crops.
    """
    path, V, data = run.out / "codes.pt", run.config["code_variants"], run.train
    settings = [str(run.config[k]) for k in ("limit", "image_size", "seed", "precision")]
    key = on_rank0(lambda: [latent_hash(tokenizer), V, settings, data.fingerprint, run.val.fingerprint])

    def valid():
        if path.exists() and not intact(path):
            warn(f"{path} is damaged; its codes are made again")
        return intact(path) and load_torch(path, mmap=True).get("key") == key

    if not on_rank0(valid):
        print0(f"\nencoding {len(data)} training images in {V} variants and {len(run.val)} validation images")
        views = [(data, i, mix(run.config["seed"], "variant", v, i) if v > 1 else None, v % 2 == 1)
                 for v in range(V) for i in range(len(data))]
        val, n = [(run.val, i, None, False) for i in range(len(run.val))], len(views)
        part = path.with_suffix(".part.pt")
        tokens, labels = encode_all(run, tokenizer, [views, val], key, part)
        codes = dict(key=key, train=tokens[:n].unflatten(0, (V, len(data))), val=tokens[n:],
                     labels=labels[: len(data)].clone(), val_labels=labels[n:].clone())
        on_rank0(lambda: save_torch(codes, path))
        on_rank0(lambda: part.unlink(missing_ok=True))
    codes, K = load_torch(path, mmap=True), tokenizer.codebook_size
    codes["unigram"] = unigram_entropy(codes["train"][0], K)
    print0(f"ln K = {math.log(K):.4f} nats; unigram entropy of the codes = {codes['unigram']:.4f} nats")
    return codes


def kept_codes(run, tokenizer_hash):
    """What `cached_codes` left in a run folder, if it is intact and of this tokenizer, else None."""
    path = run / "codes.pt"
    codes = load_torch(path, mmap=True) if intact(path) else None
    return codes if codes and codes["key"][0] == tokenizer_hash else None


def encode_all(run, tokenizer, parts, key, path, batch=128):
    """Tokens (n, *token_shape) and labels (n,) of lists of (data, index, crop seed, flip) views; processes
    share the work.

    path: where a signal that stops the run leaves what is done, under `key`; the same command goes on there
    """
    dtype = torch.int16 if tokenizer.codebook_size <= 2**15 else torch.int32
    chunks = [part[i : i + batch] for part in parts for i in range(0, len(part), batch)]
    ends = [0, *itertools.accumulate(map(len, chunks))]
    tokens = torch.zeros(ends[-1], *tokenizer.token_shape, dtype=dtype)
    labels = torch.zeros(ends[-1], dtype=torch.int64)

    def begun():  # how many chunks; of other processes all rows are zero
        kept = load_torch(path) if intact(path) else {}
        if kept.get("key") != key:
            return 0
        tokens.copy_(kept["tokens"])
        labels.copy_(kept["labels"])
        return kept["done"]

    done, stop, run.in_loop = on_rank0(begun), 0, True
    rounds = range(done, len(chunks), world())
    for start in tqdm(rounds, "encoding", disable=None if rank() == 0 else True):
        done = min(start + world(), len(chunks))
        if (mine := start + rank()) < len(chunks):
            rows, chunk = slice(ends[mine], ends[mine + 1]), chunks[mine]
            x = torch.stack([data.view(*view) for data, *view in chunk])
            labels[rows] = torch.tensor([data.label(index) for data, index, *_ in chunk])
            with run.autocast:
                found = [tokenizer.encode(part) for part in run.micro(to_float(x, run.device))]
            tokens[rows] = torch.cat(found).to(dtype)
        if (stop := agreed(run.request)) > 1:
            break
    run.in_loop = False
    if world() > 1:  # rows of other processes are zero here
        dist.all_reduce(tokens.view(torch.uint8))  # gloo and NCCL have no int16
        dist.all_reduce(labels)
    if stop > 1:
        on_rank0(lambda: save_torch(dict(key=key, done=done, tokens=tokens, labels=labels), path))
        print0(f"stopped after {ends[done]} of {ends[-1]} views; the same command goes on from there")
        sys.exit(stop)
    return tokens, labels


def code_batch(run, codes, step, batch):
    """(tokens (B, N), labels (B,)) of this process's rows of the global batch at `step`."""
    rows = my_rows(batch)
    positions = range(step * batch + rows.start, step * batch + rows.stop)
    index = [run.train.shuffled(p) for p in positions]
    variants = [mix(run.config["seed"], "variant", p) % len(codes["train"]) for p in positions]
    tokens, labels = codes["train"][variants, index].long(), codes["labels"][index]
    return to_device(tokens, run.device), to_device(labels, run.device)


def unigram_entropy(tokens, codebook_size, num=10_000):
    """Entropy in nats of how often each code occurs; the mean where a position holds several.

    tokens: (m, N) or (m, N, k), of m images in the order of their classes, so `num` of all are drawn
    """
    some = random.Random(mix(0, "unigram")).sample(range(len(tokens)), min(len(tokens), num))
    counts = count_codes(tokens[some].long(), codebook_size).double()
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1).mean().item()


def nearest_others(codes, count):
    """(K, n_z) -> (K, count) int64, the nearest other codes of each code; K - 1 of them at most."""
    found = []
    for rows in torch.arange(len(codes), device=codes.device).split(1024):
        with full_float32(codes):
            far = torch.cdist(codes[rows], codes)
        far[torch.arange(len(rows)), rows] = math.inf
        found.append(far.topk(min(count, len(codes) - 1), largest=False).indices)
    return torch.cat(found)


def count_codes(tokens, codebook_size):
    """Histogram of code indices: tokens (B, N) -> (K,), or (B, N, k) -> (k, K), one for each sub-codebook."""
    if tokens.dim() == 2:
        return tokens.flatten().bincount(minlength=codebook_size)
    return torch.stack([count_codes(part, codebook_size) for part in tokens.unbind(2)])


def batch_usage(tokens, tokenizer):
    """Usage of the global batch, from the tokens of this process's micro-batches."""
    counts = count_codes(torch.cat(tokens), tokenizer.codebook_size).float()
    return codebook_usage(all_reduce_mean(counts))[0]


def codebook_usage(counts):
    """Hard usage and perplexity of a histogram of code indices (Tables 2 and 5).

    counts:  (K,), how often each code was chosen over a whole set of images; or (k, K)
    returns: share of codes chosen at least once in [1/K, 1]; exp of the entropy of the histogram in [1, K].
             Of several sub-codebooks the means
    """
    p = counts.double() / counts.sum(-1, keepdim=True)
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum(-1).exp().mean().item()
