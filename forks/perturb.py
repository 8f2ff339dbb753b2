"""Latent perturbation (arXiv 2503.08354): while the decoder trains, tokens are swapped for near ones."""

from dataclasses import dataclass

import torch

from plumbing.processes import full_float32
from recipes.small import of_fork
from tokenizer import KMeansQuantizer, TokenizerConfig, VQTokenizer, code_distances


@dataclass
class PerturbConfig(TokenizerConfig):
    perturb_rate: float = 0.5  # alpha, annealed there, not here (ours): share of tokens that are drawn anew
    perturb_images: float = 0.1  # beta: int(beta B) images of a batch of B, but at least one (ours)
    perturb_near: int = 8  # delta, annealed there, not here (ours): of how many codes nearest to the latent


class PerturbedQuantizer(KMeansQuantizer):
    """In training the decoder sees swapped codes; tokens and latent losses are those of the image."""

    def swap(self, z_hat, indices):
        """(B, n_z, h, w) latents and their tokens (B, h, w) -> the tokens that the decoder sees."""
        c, (B, *grid) = self.config, indices.shape
        some = torch.randperm(B, device=z_hat.device)[: max(int(c.perturb_images * B), c.perturb_images > 0)]
        with full_float32(z_hat):
            far = code_distances(self.flatten(z_hat[some]), self.codes)  # (M, K)
        near = far.topk(min(c.perturb_near, far.shape[1]), largest=False).indices
        drawn = near.gather(1, torch.randint(near.shape[1], (len(near), 1), device=near.device))
        hit = torch.rand(len(some), *grid, device=near.device) < c.perturb_rate
        return indices.index_copy(0, some, drawn.view(hit.shape).where(hit, indices[some]))

    def forward(self, z_hat):
        z_st, indices, losses = super().forward(z_hat)
        if self.training and not self.bypass:
            z_st = z_st + (self.lookup(self.swap(z_hat, indices)) - self.lookup(indices)).detach()
        return z_st, indices, losses


class PerturbTokenizer(VQTokenizer):
    Config, Quantizer = PerturbConfig, PerturbedQuantizer

    def forward(self, x):
        if not (self.frozen and self.training):
            return super().forward(x)
        z_hat, q = self.encoder(x), self.quantizer
        indices = q.quantize(z_hat)
        return self.decoder(q.lookup(q.swap(z_hat, indices))), indices.flatten(1, 2), {}


def parts():
    return dict(tokenizer=PerturbTokenizer)


PRESETS = of_fork("perturb")
