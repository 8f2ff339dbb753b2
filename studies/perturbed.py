"""p-FD: how far reconstructions move when tokens are swapped for near ones, as a prior's slips would do."""

import torch

from plumbing.codes import nearest_others
from plumbing.images import to_uint8
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
