"""p-FD and iFD: how far reconstructions move when tokens change, as a prior's slips would change them.

p-FD swaps tokens for near codes; iFD mixes the tokens of an image with those of its nearest neighbour.
"""

import math

import torch

from plumbing.codes import nearest_others
from plumbing.fast import in_slices
from plumbing.images import to_float, to_uint8
from plumbing.processes import mix, seeded_rand
from plumbing.slices import decode, reconstructions

SHARE, NEAR = 0.5, 1 / 16  # of the tokens; of the codebook


@torch.no_grad()
def near_codes(tokenizer, count):
    """The `count` nearest other codes of each code, by the codes that the decoder sees: (k, K, count) int64,
    k = 1 but for a codebook in k parts."""
    K, found = tokenizer.codebook_size, []
    device = next(tokenizer.parameters()).device
    for part in getattr(tokenizer.quantizer, "parts", [tokenizer.quantizer]):
        codes = part.lookup(torch.arange(K, device=device).view(1, K, 1))[0, :, :, 0].T.float()  # (K, n_z)
        found.append(nearest_others(codes, count))
    return torch.stack(found)


def perturb(tokens, near, start):
    """Tokens (B, N) or (B, N, k), of which a share is swapped for one of the near codes. Image start + i has
    its own random numbers, whatever B is."""
    k, _, count = near.shape
    flat = tokens.reshape(*tokens.shape[:2], k)
    draws = [seeded_rand(2, *flat.shape[1:], seed=mix("perturb", start + i)) for i in range(len(flat))]
    hit, pick = torch.stack(draws, 1).to(tokens.device)
    picked = (pick * count).long().clamp(max=count - 1)
    swapped = torch.stack([near[j][flat[..., j], picked[..., j]] for j in range(k)], -1)
    return torch.where(hit < SHARE, swapped, flat).view(tokens.shape)


def perturbed_reconstructions(tokenizer, data, num, batch, device, done=None):
    """As `reconstructions`, with the images of perturbed tokens.

    deviation: the article (arXiv 2503.08354) averages over shares of 0.5 to 0.9 and 200 to 360 near codes of
               4096, those nearest to the latent, the own code among them; here it is one share, the same part
               of every codebook, and other codes, nearest to the own code: that needs no latents (ours).
    """
    near = near_codes(tokenizer, max(1, round(NEAR * tokenizer.codebook_size)))
    for start, x, _, tokens in reconstructions(tokenizer, data, num, batch, device, done):
        yield start, x, to_uint8(decode(tokenizer, perturb(tokens, near, start))), tokens


@torch.no_grad()
def nearest_images(tokenizer, tokens):
    """For each image the other one whose codes are nearest: tokens (n, N) or (n, N, k) -> (n,) int64.

    Near is the Euclidean distance of the codes that the decoder sees, over all positions.
    """
    side, device = math.isqrt(tokens.shape[1]), next(tokenizer.parameters()).device
    codes = [tokenizer.quantizer.lookup(part.to(device).unflatten(1, (side, side))).flatten(1).float()
             for part in tokens.split(500)]
    return nearest_others(torch.cat(codes), 1)[:, 0].cpu()


def interpolate(tokens, others, start):
    """Tokens (B, N) or (B, N, k) with half of the positions from `others`, of the same shape. Image start + i
    has its own positions, whatever B is; N // 2 of them, with all that they hold."""
    count = tokens.shape[1]
    draws = [seeded_rand(count, seed=mix("interpolate", start + i)) for i in range(len(tokens))]
    order = torch.stack(draws).argsort(1)[:, : count // 2]
    hit = torch.zeros(len(tokens), count, dtype=torch.bool).scatter_(1, order, True).to(tokens.device)
    return torch.where(hit.view(*hit.shape, *[1] * (tokens.dim() - 2)), others, tokens)


def interpolated_reconstructions(tokenizer, data, num, batch, device, done=None):
    """As `reconstructions`, with the images of tokens mixed with those of the nearest of all `num` images.
    Each process encodes them all first, to find the neighbours.

    deviation: the article (arXiv 2603.05630) interpolates the continuous latents of a VAE linearly, between
               an image and its nearest neighbour in latent space. Nothing lies between two codes, so here
               half of the positions are exchanged (ours).
    """
    tokens = []
    for start in range(0, num, batch):
        x = torch.stack([data.view(i) for i in range(start, min(start + batch, num))])
        tokens.append(in_slices(tokenizer.encode, to_float(x, device)).cpu())
    tokens = torch.cat(tokens)
    nearest = nearest_images(tokenizer, tokens)
    for start, x, _, own in reconstructions(tokenizer, data, num, batch, device, done):
        others = tokens[nearest[start : start + len(x)]].to(device)
        yield start, x, to_uint8(decode(tokenizer, interpolate(own, others, start))), own
