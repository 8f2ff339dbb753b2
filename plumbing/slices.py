"""Sampling and decoding in slices of fixed size, shared out to processes: no image depends on the others."""

import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.errors import UserError
from plumbing.fast import in_slices
from plumbing.files import claim, intact, load_torch, save_torch
from plumbing.images import to_float, to_uint8
from plumbing.processes import barrier, mix, on_rank0, print0, rank, seeded_rand, world


def generate_tokens(prior, labels, seed, indices, settings, **more):
    """Tokens (B, N) of the images `indices`, whose random numbers depend on (seed, index) only.

    labels:   (B,) int64 or None;  more: further arguments of the prior's `generate`
    settings: the `sample` section of a preset, of which the prior reads what its SAMPLER names
    """
    sampler = prior.SAMPLER | {name: settings[name] for name in prior.SAMPLER if name in settings}
    shape, device = prior.noise_shape(sampler), next(prior.parameters()).device
    noise = torch.stack([seeded_rand(*shape, seed=mix(seed, "sample", i)) for i in indices])
    return prior.generate(labels, noise.to(device), **more, **sampler)


def image_chunks(prior, tokenizer, num, labels, seed, settings, batch=32, progress=False, done=None):
    """Yields (index of the first, images (n, 3, S, S) uint8) for this process's chunks of 0..num-1.

    labels: list of `num` class indices, or None for an unconditional prior;  done(indices): skip them?
    The work is split over processes in aligned chunks of `batch`, and a last chunk is filled up and cut
    again, so that image i is bit-equal for any `num` and any number of processes. Another `batch` changes
    the rounding of the prior's matrix products; that rarely turns a token, and else nothing.
    """
    device = next(prior.parameters()).device
    chunks, hidden = [*my_chunks(num, batch, done)], None if progress and rank() == 0 else True
    for indices in tqdm(chunks, "sampling", disable=hidden, unit="images", unit_scale=batch * world()):
        filled = range(indices.start, indices.start + batch)
        chunk_labels = None
        if labels is not None:
            chunk_labels = torch.tensor([labels[i % num] for i in filled], device=device)
        tokens = generate_tokens(prior, chunk_labels, seed, filled, settings)
        yield indices.start, to_uint8(decode(tokenizer, tokens[: len(indices)]))


def generate_images(*args, **kwargs):
    """All images of `image_chunks` (same arguments): (num, 3, S, S) uint8 on the CPU, in every process."""
    return gather_images(image_chunks(*args, **kwargs))


def decode(tokenizer, tokens):
    """Tokens (B, N) to images (B, 3, S, S), about [-1, 1]; raises UserError if a pixel is not finite."""
    x = in_slices(tokenizer.decode, tokens)
    if not x.isfinite().all():
        raise UserError("the decoder's images hold values that are not finite; is the tokenizer damaged, or "
                        "was it trained with too high a rate?")
    return x


def gather_images(chunks):
    """One tensor, in every process, of the (start, images) that each process yields."""
    parts = [list(chunks)]
    if world() > 1:
        parts *= world()
        dist.all_gather_object(parts, parts[0])
    return torch.cat([images for _, images in sorted(sum(parts, []), key=lambda part: part[0])])


def my_chunks(num, batch, done=None):
    """This process's ranges of `batch` images of 0..num-1, but those of which done(indices) is true."""
    for start in range(rank() * batch, num, world() * batch):
        indices = range(start, min(start + batch, num))
        if not (done and done(indices)):
            yield indices


def collect(chunks, parts, what, num):
    """All rows of chunks (start, dict of tensors (n, ...)), in order, in the first process; None in others.

    Each chunk becomes a file in the folder `parts` at once, and one that is there is not made again: so an
    interrupted call goes on, and so processes hand over their shares. `seconds` are those of all calls.
    """

    def place(start):
        return parts / f"{start:09d}.pt"

    def begin():
        locks.append(claim(parts))
        return sum(intact(path) or bool(path.unlink()) for path in parts.glob("*.pt"))

    locks, count = [], 0
    found, begun, printed, last = on_rank0(begin), time.time(), time.time(), time.time()
    if found:
        print0(f"{what}: going on, {found} parts are there already")
    for start, rows in chunks(lambda indices: place(indices[0]).exists()):
        count += len(next(iter(rows.values())))
        save_torch(rows | dict(seconds=torch.tensor([(time.time() - last) / world()])), place(start))
        last = time.time()
        if last > printed + 30:
            printed, rate = last, count * world() / (last - begun)
            print0(f"{what}: {start:,} of {num:,}, {rate:.1f} images/s, {(num - start) / rate:.0f} s left")
    barrier()
    if rank() > 0:
        return None
    saved = [load_torch(path) for path in sorted(parts.glob("*.pt"))]
    rows = {name: torch.cat([part[name] for part in saved]) for name in saved[0]}
    total = len(next(iter(rows.values())))
    if total != num:
        raise UserError(f"{parts} holds {total} images and not {num}; delete it")
    return rows


def reconstructions(tokenizer, data, num, batch, device, done=None):
    """Yields (start, images, reconstructions, tokens) of this process's chunks; images are uint8."""
    for indices in my_chunks(num, batch, done):
        x = torch.stack([data.view(i) for i in indices])
        tokens = in_slices(tokenizer.encode, to_float(x, device))
        yield indices[0], x, to_uint8(decode(tokenizer, tokens)), tokens
