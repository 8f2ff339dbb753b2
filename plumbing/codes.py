"""Tokens of a data set: cached for the priors, and how evenly they use the codebook."""

import math
import random
import shutil

import torch

from plumbing.errors import warn
from plumbing.files import intact, load_torch, save_torch
from plumbing.hashes import latent_hash
from plumbing.images import to_float
from plumbing.processes import all_reduce_mean, full_float32, mix, my_rows, on_rank0, print0, to_device
from plumbing.slices import collect, my_chunks


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
        views = dict(train=[(data, i, mix(run.config["seed"], "variant", v, i) if v > 1 else None, v % 2 == 1)
                            for v in range(V) for i in range(len(data))],
                     val=[(run.val, i, None, False) for i in range(len(run.val))])
        rows = {name: encode_all(run, tokenizer, some, run.out / f".codes.{mix(key):016x}.{name}")
                for name, some in views.items()}

        def finish():
            train, val = rows["train"], rows["val"]
            save_torch(dict(key=key, train=train["tokens"].unflatten(0, (V, len(data))), val=val["tokens"],
                            labels=train["labels"][: len(data)].clone(), val_labels=val["labels"]), path)
            for parts in run.out.glob(".codes.*"):
                shutil.rmtree(parts)

        on_rank0(finish)
    codes, K = load_torch(path, mmap=True), tokenizer.codebook_size
    codes["unigram"] = unigram_entropy(codes["train"][0], K)
    print0(f"ln K = {math.log(K):.4f} nats; unigram entropy of the codes = {codes['unigram']:.4f} nats")
    return codes


def kept_codes(run, tokenizer_hash):
    """What `cached_codes` left in a run folder, if it is intact and of this tokenizer, else None."""
    path = run / "codes.pt"
    codes = load_torch(path, mmap=True) if intact(path) else None
    return codes if codes and codes["key"][0] == tokenizer_hash else None


def encode_all(run, tokenizer, views, parts, batch=128):
    """dict(tokens (n, *token_shape), labels (n,)) of (data, index, crop seed, flip) views, as `collect` gives
    them; the folder `parts` keeps what is done, so after a signal the same command goes on there."""
    dtype = torch.int16 if tokenizer.codebook_size <= 2**15 else torch.int32

    def chunks(done):
        for indices in my_chunks(len(views), batch, done):
            chunk = [views[i] for i in indices]
            x = torch.stack([data.view(*view) for data, *view in chunk])
            with run.autocast:
                found = [tokenizer.encode(part) for part in run.micro(to_float(x, run.device))]
            labels = torch.tensor([data.label(index) for data, index, *_ in chunk])
            yield indices[0], dict(tokens=torch.cat(found).cpu().to(dtype), labels=labels)

    return collect(chunks, parts, "encoding", len(views))


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
