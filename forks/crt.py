"""Causally regularized tokens (CRT, arXiv 2412.16326): each latent is to follow from those before."""

import torch
import torch.nn.functional as F
from torch import nn

from recipes.small import of_fork
from tokenizer import KMeansQuantizer, VQTokenizer


class CausalPredictor(nn.Module):
    """The code of each position from the codes before it, by a causal transformer of two layers.

    The article adds the squared error of such a prediction. Width, heads, positions, that the first code has
    no loss, and that the gradient goes into prediction and target are ours.
    """

    def __init__(self, positions, n_z, width=128):
        super().__init__()
        self.embed, self.head = nn.Linear(n_z, width), nn.Linear(width, n_z)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)])

    def forward(self, z):  # (B, N, n_z) -> (B, N - 1, n_z), the codes 2 to N
        h = self.embed(z[:, :-1]) + self.positions[: z.shape[1] - 1]
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1], device=h.device, dtype=h.dtype)
        for block in self.blocks:
            h = block(h, mask, is_causal=True)
        return self.head(h)


class CausalQuantizer(KMeansQuantizer):  # the warm start is the preset's
    def __init__(self, config):
        super().__init__(config)
        self.predictor = CausalPredictor((config.image_size // config.downsample) ** 2, config.codebook_dim)

    def forward(self, z_hat):
        z_st, indices, losses = super().forward(z_hat)
        z = z_st.flatten(2).transpose(1, 2)
        losses["loss_causal"] = F.mse_loss(self.predictor(z).float(), z[:, 1:])
        return z_st, indices, losses


class CRTTokenizer(VQTokenizer):
    Quantizer = CausalQuantizer
    WEIGHTS = {"loss_causal": 1.0}  # the weight is ours
    TRAINING_ONLY = "quantizer.predictor."


def parts():
    return dict(tokenizer=CRTTokenizer)


PRESETS = of_fork("crt")
