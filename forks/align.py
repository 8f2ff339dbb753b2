"""Latents aligned with a frozen network by their cosine, after VA-VAE (arXiv 2501.01423)."""

import torch
import torch.nn.functional as F
from torch import nn

from recipes.small import DEMO, variant
from tokenizer import VQTokenizer


class AlignedTokenizer(VQTokenizer):
    """Each latent, before it is quantized, learns to point where relu5_3 of the judge points at its place.

    The article does this for a VAE with DINOv2 or MAE, with margins and a weight set by gradients. The VGG
    and the fixed weight are ours.
    """

    WEIGHTS = VQTokenizer.WEIGHTS | {"loss_align": 0.5}
    TRAINING_ONLY = "to_features."
    WIDTH = 128  # of relu5_3: 8 times that of the judge

    def __init__(self, config):
        super().__init__(config)
        self.to_features = nn.Conv2d(config.codebook_dim, self.WIDTH, 1)
        self.judges = []  # a plain list: neither saved nor hashed

    def prepare(self, run):
        self.judges = [] if self.frozen else [run.judge]

    def forward(self, x, global_probs=None):
        if self.frozen:
            return super().forward(x)
        self._check(x)
        z_hat = self.encoder(x)
        z_st, indices, losses = self.quantizer(z_hat, global_probs)
        for judge in self.judges:
            with torch.no_grad():
                target = judge(x, ["relu5_3"])["relu5_3"]
                target = F.adaptive_avg_pool2d(target, z_hat.shape[2:])
            cosine = F.cosine_similarity(self.to_features(z_hat).float(), target.float())
            losses["loss_align"] = (1 - cosine).mean()
        return self.decoder(z_st), indices.flatten(1, 2), losses

    @staticmethod
    def check(config):
        if config["vgg"] == "judge" and 8 * config["judge"]["width"] != AlignedTokenizer.WIDTH:
            raise ValueError(f"align maps to {AlignedTokenizer.WIDTH} features, so judge.width must be 16")


def parts():
    return dict(tokenizer=AlignedTokenizer)


PRESETS = dict(demo=variant(DEMO, fork="align", judge=dict(skip_pools=1)))  # relu5_3 on the grid
