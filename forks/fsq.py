"""Finite scalar quantization (arXiv 2309.15505): each channel is rounded to one of a few levels."""

import math
from dataclasses import dataclass

import torch

from recipes.small import of_fork
from tokenizer import TokenizerConfig, VQTokenizer


@dataclass
class FSQConfig(TokenizerConfig):
    levels: tuple = (8, 5, 5, 5)  # of each channel; the article's for K = 2^10 (its Table 1)

    def __post_init__(self):
        super().__post_init__()
        self.levels = tuple(self.levels)
        sizes = len(self.levels), math.prod(self.levels)
        if sizes != (self.codebook_dim, self.codebook_size) or not all(2 < L <= 1000 for L in self.levels):
            raise ValueError(f"{self.levels}: codebook_dim levels, 3 to 1000, codebook_size is their product")


class FiniteScalarQuantizer(torch.nn.Module):
    """The grid of all combinations of levels, in [-1, 1]^n_z, is the codebook. No loss is needed."""

    def __init__(self, config):
        super().__init__()
        L = torch.tensor(config.levels)[:, None, None]
        self.register_buffer("levels", L)
        self.register_buffer("bases", L.cumprod(0) // L)  # index = sum of digit * base

    def bound(self, z):
        """Each channel into the span of its L levels; an even L is shifted, and so needs to be above 2."""
        half, offset = (self.levels - 1) * 1.001 / 2, 0.5 * (self.levels % 2 == 0)  # fits to L = 1000
        return (z.float() + (offset / half).atanh()).tanh() * half - offset

    def quantize(self, z_hat):  # (B, n_z, h, w) -> (B, h, w) int64
        return ((self.bound(z_hat).round() + self.levels // 2).long() * self.bases).sum(1)

    def lookup(self, indices):  # (B, h, w) -> (B, n_z, h, w)
        return (indices[:, None] // self.bases % self.levels - self.levels // 2) / (self.levels // 2)

    def forward(self, z_hat):
        z = self.bound(z_hat)
        z_st = (z + (z.round() - z).detach()) / (self.levels // 2)
        return z_st, self.quantize(z_hat), {}


class FSQTokenizer(VQTokenizer):
    Config, Quantizer = FSQConfig, FiniteScalarQuantizer


def parts():
    return dict(tokenizer=FSQTokenizer)


PRESETS = of_fork("fsq", tokenizer=dict(codebook_dim=3, warm_start=0))
for sizes in (preset["tokenizer"] for preset in PRESETS.values()):
    sizes["levels"] = {64: [4, 4, 4], 256: [8, 8, 4]}[sizes["codebook_size"]]  # ours
