"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) for both priors; SeQ-GAN does without.

In training a share of the labels is hidden; in sampling the Transformer is wrapped, so that its logits are
u + s (c - u), of the conditional and the null rows of one batch of twice the size.
"""

from dataclasses import dataclass

import torch
from torch import nn

from plumbing.errors import UserError
from prior_ar import ARPrior, PriorConfig, Transformer
from prior_nar import NARPrior
from recipes.small import DEMO, variant


@dataclass
class GuidedConfig(PriorConfig):
    class_dropout: float = 0.1  # share of labels hidden in training


class ClassDropout:
    """Goes before a Transformer: in training a share of the labels becomes the null condition."""

    def embed_condition(self, labels, batch_size):
        if labels is not None and self.training and self.config.class_dropout:
            hidden = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
            labels = labels.masked_fill(hidden, self.config.num_classes)
        return super().embed_condition(labels, batch_size)


def guide(logits, scale):
    """(2B, K), conditional above unconditional -> u + s (c - u), (B, K): s = 1 conditional, s = 0 not."""
    conditional, null = logits.float().chunk(2)
    return null + scale * (conditional - null)


class Guided(nn.Module):
    """A Transformer in sampling: tokens (B, ...) in, twice as many rows inside, logits of B rows out."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale, self.blocks, self.hidden = inner, scale, inner.blocks, inner.hidden

    def embed_condition(self, labels, batch_size):
        embed = self.inner.embed_condition
        return torch.cat([embed(labels, batch_size), embed(None, batch_size)])

    def embed(self, tokens):
        return self.inner.embed(torch.cat([tokens, tokens]))

    def logits(self, x):
        return guide(self.inner.logits(x), self.scale)


class Guidance:
    """Goes before a prior: its sampler gets a scale; 1 is none, and an unconditional prior has none."""

    Wrapped = Guided

    def generate(self, labels, noise, *args, **sampler):
        scale, inner = (self.SAMPLER | sampler)["guidance"], self.transformer
        if scale == 1 or not self.config.num_classes:
            return super().generate(labels, noise, *args, **sampler)
        if not self.config.class_dropout:
            raise UserError(f"guidance {scale:g}, but the prior was trained without prior.class_dropout and "
                             "has no null class; pass --guidance 1")
        self.transformer = self.Wrapped(inner, scale)
        try:
            return super().generate(labels, noise, *args, **sampler)
        finally:
            self.transformer = inner


class GuidedTransformer(ClassDropout, Transformer):
    pass


class GuidedAR(Guidance, ARPrior):
    Config, Transformer, SAMPLER = GuidedConfig, GuidedTransformer, ARPrior.SAMPLER | {"guidance": 1.0}


class GuidedNAR(Guidance, NARPrior):
    Config, Transformer, SAMPLER = GuidedConfig, GuidedTransformer, NARPrior.SAMPLER | {"guidance": 1.0}


def parts():
    return dict(ar=GuidedAR, nar=GuidedNAR)


PRESETS = dict(
    demo=variant(DEMO, fork="guidance", prior=dict(class_dropout=0.1), sample=dict(guidance=1.5)))
