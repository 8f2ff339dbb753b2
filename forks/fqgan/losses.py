"""FQGAN's two further losses (arXiv 2411.16681): both unweighted float32 scalars."""

import itertools

import torch
import torch.nn.functional as F

from plumbing.processes import full_float32


def disentanglement(codes):
    """How alike the codes of different sub-codebooks are: mean over pairs, images and positions of
    (q_a . q_b)^2 with q of unit length (Eq. 7 of FQGAN), in [0, 1]; 0 for orthogonal codes, and for k = 1.

    codes: list of k straight-through maps (B, n_z, h, w): the gradient reaches the encoder's branches and not
           the codebooks
    """
    with torch.autocast(codes[0].device.type, enabled=False):
        units = [F.normalize(q.float(), dim=1) for q in codes]
        pairs = [(a * b).sum(1).square().mean() for a, b in itertools.combinations(units, 2)]
    return sum(pairs) / len(pairs) if pairs else units[0].new_zeros(())


def representation_loss(features, targets):
    """One-directional InfoNCE over the local batch (I22): student i should be most like teacher i. The other
    images of a micro-batch are the negatives, so --micro-batch and the number of processes change it.

    features: (B, W) of the student; targets: (B, W) of the frozen teacher; no temperature
    returns:  float32 scalar: ln B for equal similarities, 0 for B = 1
    """
    with full_float32(features):  # similarities near 1 need it
        a, b = F.normalize(features.float(), dim=1), F.normalize(targets.detach().float(), dim=1)
        return F.cross_entropy(a @ b.T, torch.arange(len(a), device=a.device))


def mean_cosine(maps):
    """|cos| between the codes of two sub-codebooks at one position, (B,): means over pairs and positions."""
    pairs = [F.cosine_similarity(a, b, dim=1).abs() for a, b in itertools.combinations(maps, 2)]
    return torch.stack(pairs).mean((0, 2, 3))
