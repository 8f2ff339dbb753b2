"""Post-training (arXiv 2509.12474): phase 2's decoder learns from tokens that the AR prior drew, too."""

from dataclasses import dataclass

import torch

from plumbing.errors import UserError
from plumbing.hashes import latent_hash
from plumbing.models import load_model
from prior_ar import sample_logits
from recipes.small import of_fork
from tokenizer import TokenizerConfig, VQTokenizer


@dataclass
class PostTrainConfig(TokenizerConfig):
    keep: float = 0.5  # share of the true tokens that stay


class PostTrainedTokenizer(VQTokenizer):
    Config = PostTrainConfig

    def __init__(self, config):
        super().__init__(config)
        self.helpers = []  # a plain list: neither saved nor hashed

    def prepare(self, run):
        if self.frozen:
            path = run.out / "ar.pt"
            if not path.exists():
                raise UserError(f"phase 2 of this fork draws from {path}; train --stage ar first, or all")
            prior, ckpt = load_model(path, ("ar",), run.device)
            if ckpt["tokenizer_hash"] != latent_hash(self):
                raise UserError(f"{path} draws tokens of another tokenizer; train --stage ar on this one")
            if prior.config.num_classes not in (0, run.vgg.vgg.classifier[-1].out_features):
                raise UserError(f"the VGG (--vgg) has other classes than {path}")
            self.helpers = [(prior, run.vgg)]

    @torch.no_grad()
    def draw(self, x, tokens):
        """(B, N) tokens, 1 - keep of them drawn given the true ones before; the VGG names the class."""
        for prior, vgg in self.helpers:
            labels = vgg(x, ["logit"])["logit"].argmax(1) if prior.config.num_classes else None
            logits = prior(tokens, labels).float().flatten(0, 1)
            drawn = sample_logits(logits, torch.rand(len(logits), device=x.device)).view(tokens.shape)
            tokens = torch.where(torch.rand(tokens.shape, device=x.device) < self.config.keep, tokens, drawn)
        return tokens

    def forward(self, x):
        if self.frozen and self.training:
            tokens = self.encode(x)
            return self.decode(self.draw(x, tokens)), tokens, {}
        return super().forward(x)


def parts():
    return dict(tokenizer=PostTrainedTokenizer)


PRESETS = of_fork("phase3", stages=["vgg", "phase1", "ar", "phase2", "nar"])
