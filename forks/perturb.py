"""Latent perturbation (arXiv 2503.08354): while the decoder trains, tokens are swapped for near ones."""

from dataclasses import dataclass

import torch

from plumbing.codes import nearest_others
from recipes.small import of_fork
from tokenizer import KMeansQuantizer, TokenizerConfig, VQTokenizer


@dataclass
class PerturbConfig(TokenizerConfig):
    """The article's alpha, beta and delta, of which it anneals alpha; here all stay as they are (ours)."""

    perturb_rate: float = 0.5  # alpha: share of an image's tokens
    perturb_images: float = 0.1  # beta: share of the images of a batch
    perturb_near: int = 8  # delta: how many nearest codes, the code itself not among them

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.perturb_rate <= 1 and 0 <= self.perturb_images <= 1 and self.perturb_near >= 1):
            raise ValueError("perturb_rate, perturb_images are shares from 0 to 1, perturb_near at least 1")


def swap(indices, codes, rate, images, count):
    """(B, h, w) int64 -> the same with a share of the tokens replaced by one of the `count` nearest codes."""
    where = torch.rand(len(indices), 1, 1, device=indices.device) < images
    where = where & (torch.rand(indices.shape, device=indices.device) < rate)
    near = nearest_others(codes, count)
    pick = torch.randint(near.shape[1], indices.shape, device=indices.device)
    return torch.where(where, near[indices, pick], indices)


class PerturbedQuantizer(KMeansQuantizer):
    """In phase 1 the decoder sees swapped codes; the tokens and the latent losses are those of the image."""

    def forward(self, z_hat, global_probs=None):
        z_st, indices, losses = super().forward(z_hat, global_probs)
        if self.training and not self.bypass:
            c = self.config
            swapped = swap(indices, self.codes, c.perturb_rate, c.perturb_images, c.perturb_near)
            z_st = z_st + (self.lookup(swapped) - self.lookup(indices)).detach()
        return z_st, indices, losses


class PerturbTokenizer(VQTokenizer):
    Config, Quantizer = PerturbConfig, PerturbedQuantizer


def parts():
    return dict(tokenizer=PerturbTokenizer)


PRESETS = of_fork("perturb")
