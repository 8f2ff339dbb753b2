"""Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737): each channel of the latent is a bit, K = 2^n_z."""

import torch
import torch.nn.functional as F
from torch import nn

from forks.fqgan.tokenizer import SureQuantizer
from plumbing.processes import full_float32
from recipes.small import of_fork
from tokenizer import VQTokenizer


class LookupFreeQuantizer(SureQuantizer):
    """The sign of each channel is one bit of the token, that of channel i, from 0 on, the bit 2^i. No code is
    stored. The entropy is over all 2^n_z; the article's groups of bits, for K = 2^18, are left out.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        if config.codebook_size != 2**config.codebook_dim:
            raise ValueError(f"LFQ has 2^{config.codebook_dim} codes, not {config.codebook_size}")
        self.register_buffer("powers", (2 ** torch.arange(config.codebook_dim))[:, None, None])

    def quantize(self, z_hat):  # (B, n_z, h, w) -> (B, h, w) int64
        return ((z_hat > 0) * self.powers).sum(1)

    def lookup(self, indices):  # (B, h, w) -> (B, n_z, h, w), -1 or 1
        return torch.where((indices[:, None] & self.powers) > 0, 1.0, -1.0)

    def distances(self, z_hat):  # (B, n_z, h, w) -> (M, K), ||z - code||^2 but for what all codes share
        codes = self.lookup(torch.arange(2 ** len(self.powers), device=z_hat.device).view(1, 1, -1))
        return -2 * z_hat.float().movedim(1, -1).flatten(0, 2) @ codes[0, :, 0]

    def forward(self, z_hat):
        with full_float32(z_hat):
            z, indices = z_hat.float(), self.quantize(z_hat)
            z_q, distances = self.lookup(indices), self.distances(z_hat)
            losses = dict(loss_commit=F.mse_loss(z, z_q),
                          loss_entropy=self.usage_loss(distances, None, len(z)))
        return z + (z_q - z).detach(), indices, losses


class LFQTokenizer(VQTokenizer):
    Quantizer = LookupFreeQuantizer


def parts():
    return dict(tokenizer=LFQTokenizer)


PRESETS = of_fork("lfq", tokenizer=dict(warm_start=0))
for sizes in (preset["tokenizer"] for preset in PRESETS.values()):
    sizes["codebook_dim"] = sizes["codebook_size"].bit_length() - 1
