"""Post-training (arXiv 2509.12474): phase 2's decoder learns from tokens that the AR prior drew, too.

The preset's stages have the AR prior before phase 2. A share of each image's tokens is drawn by it, given the
true tokens before, so that the image is still what the decoder should show.
"""

from dataclasses import dataclass

import torch

from plumbing.errors import UserError
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
            self.helpers = [(load_model(path, ("ar",), run.device)[0], run.judge)]

    @torch.no_grad()
    def draw(self, x, tokens):
        """(B, N) tokens with 1 - keep of them drawn by the prior; the judge says which class an image shows,
        as `forward` sees images only (ours)."""
        for prior, judge in self.helpers:
            labels = judge(x, ["logit"])["logit"].argmax(1) if prior.config.num_classes else None
            logits = prior(tokens, labels).float().flatten(0, 1)
            drawn = sample_logits(logits, torch.rand(len(logits), device=x.device)).view(tokens.shape)
            kept = torch.rand(tokens.shape, device=x.device) < self.config.keep
            tokens = torch.where(kept, tokens, drawn)
        return tokens

    def forward(self, x, global_probs=None):
        if not (self.frozen and self.training):
            return super().forward(x, global_probs)
        tokens = self.encode(x)
        return self.decode(self.draw(x, tokens)), tokens, {}


def parts():
    return dict(tokenizer=PostTrainedTokenizer)


PRESETS = of_fork("phase3", stages=["vgg", "phase1", "ar", "phase2", "nar"])
