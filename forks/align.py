"""Latents aligned with a frozen network by their cosine, after VA-VAE (arXiv 2501.01423)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.stages import vgg_sizes
from recipes.small import of_fork
from tokenizer import TokenizerConfig, VQTokenizer


@dataclass
class AlignConfig(TokenizerConfig):
    feature_width: int = 512  # of relu5_3


class AlignedTokenizer(VQTokenizer):
    """Each latent, before it is quantized, learns to point where relu5_3 of the VGG points at its place.
    The article has a VAE, DINOv2 or MAE, margins, a weight set by gradients; VGG and weight are ours."""

    Config, WEIGHTS = AlignConfig, {"loss_align": 0.5}
    TRAINING_ONLY = "to_features."

    def __init__(self, config):
        super().__init__(config)
        self.to_features = nn.Conv2d(config.codebook_dim, config.feature_width, 1)
        self.vggs = []  # a plain list: neither saved nor hashed

    def prepare(self, run):
        self.vggs = [] if self.frozen else [run.vgg]

    def forward(self, x):
        if self.frozen:
            return super().forward(x)
        z_hat = self.encoder(x)
        z_st, indices, losses = self.quantizer(z_hat)
        for vgg in self.vggs:
            with torch.no_grad():
                target = F.adaptive_avg_pool2d(vgg(x, ["relu5_3"])["relu5_3"], z_hat.shape[2:])
            found = self.to_features(z_hat).float()  # a cosine in bf16 has three digits
            losses["loss_align"] = 1 - F.cosine_similarity(found, target.float()).mean()
        return self.decoder(z_st), indices.flatten(1, 2), losses

    @staticmethod
    def check(config):
        width = 8 * vgg_sizes(config)["width"]
        if config["tokenizer"].get("feature_width", 512) != width:
            raise ValueError(f"relu5_3 has {width} channels: set tokenizer.feature_width={width}")


def parts():
    return dict(tokenizer=AlignedTokenizer)


PRESETS = of_fork("align")
for preset in PRESETS.values():
    preset["tokenizer"]["feature_width"] = 8 * preset["classifier"]["width"]
