"""Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737): each channel of the latent is a bit, K = 2^n_z."""

import torch
import torch.nn.functional as F
from torch import nn

from recipes.small import of_fork
from tokenizer import VQTokenizer


class LookupFreeQuantizer(nn.Module):
    """The sign of each channel is one bit of the token; none of the 2^n_z codes is stored."""

    def __init__(self, config):
        super().__init__()
        if config.codebook_size != 2**config.codebook_dim:
            raise ValueError(f"LFQ has 2^{config.codebook_dim} codes, not {config.codebook_size}")
        self.register_buffer("powers", (2 ** torch.arange(config.codebook_dim))[:, None, None])

    def quantize(self, z_hat):  # (B, n_z, h, w) -> (B, h, w) int64
        return ((z_hat > 0) * self.powers).sum(1)

    def lookup(self, indices):  # (B, h, w) -> (B, n_z, h, w), -1 or 1
        return torch.where((indices[:, None] & self.powers) > 0, 1.0, -1.0)

    def forward(self, z_hat, global_probs=None, sharpness=4.0):
        z = z_hat.float()
        indices = self.quantize(z)
        z_q = self.lookup(indices)
        bits = torch.sigmoid(sharpness * z)  # P(bit = 1), independent given the vector
        each = self.entropy(bits).sum(1).mean()  # sure about each vector ...
        mean = self.entropy(bits.mean((0, 2, 3))).sum()  # ... and even over all of them
        losses = {"loss_commit": F.mse_loss(z, z_q), "loss_entropy": each - mean}
        return z + (z_q - z).detach(), indices, losses

    @staticmethod
    def entropy(p):
        return -(p * p.clamp(min=1e-9).log() + (1 - p) * (1 - p).clamp(min=1e-9).log())


class LFQTokenizer(VQTokenizer):
    Quantizer = LookupFreeQuantizer


def parts():
    return dict(tokenizer=LFQTokenizer)


PRESETS = of_fork("lfq")
for sizes in (preset["tokenizer"] for preset in PRESETS.values()):
    sizes["codebook_dim"] = sizes["codebook_size"].bit_length() - 1
