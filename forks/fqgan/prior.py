"""FAR, FQGAN's prior (arXiv 2411.16681): Llama's blocks with rotary positions, and a head that predicts the k
sub-tokens of a position one after the other; and the same without the causal mask (ours).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from forks.guidance import ClassDropout, Guidance, Guided, guide
from plumbing.checks import check, check_labels
from prior_ar import GREEDY, ARPrior, Attention, Transformer, sample_logits
from prior_nar import NARPrior, mask_tokens


@dataclass
class FactorizedConfig:
    """raises: ValueError for another head, and for widths that do not fit"""

    codebook_size: int
    num_tokens: int
    num_codebooks: int = 1  # k; tokens are (B, N, k)
    num_classes: int = 0
    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 1024
    dropout: float = 0.1
    class_dropout: float = 0.1  # share of labels hidden in training, for guidance
    head: str = "ar"  # or "linear", "mlp" (Table 4)
    head_layers: int = 3  # of the "ar" head: 3 for Base, 4 for Large

    def __post_init__(self):
        if self.head not in ("ar", "linear", "mlp"):
            raise ValueError(f"prior.head must be ar, linear or mlp, got {self.head!r}")
        if self.n_embd % (4 * self.n_head):
            raise ValueError("2-D rotary positions need heads of 4, 8, ... channels, got "
                             f"n_embd {self.n_embd} in {self.n_head} heads")


def rotary_angles(places, head_dim, base=10_000):
    """Angles of rotary positions: the pairs of channels are shared out evenly to the axes of `places`.

    places:  (T, axes), a row of coordinates for each position; all zeros is no rotation
    returns: (T, head_dim / 2) float32
    """
    pairs = head_dim // 2 // places.shape[1]
    return (places[:, :, None] * base ** -(torch.arange(pairs) / pairs)).flatten(1)


def rotate(x, angles):
    """Turns channel pairs (j, j + d/2) of x (B, n_head, T, d) by angles (T, d/2), in float32."""
    a, b = x.float().chunk(2, dim=3)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3).to(x.dtype)


class RotaryAttention(Attention):
    """Without biases and without dropout of the scores; q and k are rotated by their positions."""

    def __init__(self, config, causal):
        super().__init__(config, causal, bias=False)
        self.dropout = 0.0

    def forward(self, x, cache=None, angles=None):
        q, k, v = self.split(x)
        return self.attend(rotate(q, angles), rotate(k, angles), v, cache)


class SwiGLU(nn.Module):
    """Llama's MLP without biases; hidden width 8 d / 3 rounded up to a multiple of 256 (2816, 3584)."""

    def __init__(self, config):
        super().__init__()
        hidden = math.ceil(8 * config.n_embd // 3 / 256) * 256
        self.gate = nn.Linear(config.n_embd, hidden, bias=False)
        self.up = nn.Linear(config.n_embd, hidden, bias=False)
        self.down = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """Pre-norm block of 4 d^2 + 3 d h + 2 d parameters, h the hidden width of `SwiGLU`."""

    def __init__(self, config, causal):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(config.n_embd, eps=1e-5), RotaryAttention(config, causal)
        self.norm2, self.mlp = nn.RMSNorm(config.n_embd, eps=1e-5), SwiGLU(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, angles=None):
        x = x + self.drop(self.attn(self.norm1(x), cache, angles))
        return x + self.drop(self.mlp(self.norm2(x)))  # (B, T, d)


class FactorizedTransformer(ClassDropout, Transformer):
    """For k sub-tokens a position: their embeddings are concatenated and mapped kd -> d, and the head
    predicts them one after the other. 417,104,896 parameters for k = 2 at 24 + 3 layers of width 1024 and
    K = 16,384; 901,195,520 at 36 + 4 layers of width 1280.

    The "ar" head: for each position the short sequence [x, e_1(s^1), ..., e_{k-1}(s^{k-1})] through causal
    blocks; slot i predicts sub-token i + 1. "linear" and "mlp" predict all sub-tokens from x alone.
    deviation: docs/fqgan.md, rotary positions and the size of the prior
    """

    def __init__(self, config, causal):
        nn.Module.__init__(self)
        self.config, (K, d, k) = config, (config.codebook_size, config.n_embd, config.num_codebooks)
        self.token_tables = nn.ModuleList(nn.Embedding(K + (not causal), d) for _ in range(k))
        self.fuse = nn.Linear(k * d, d)
        self.condition_table = nn.Embedding(config.num_classes + 1, d)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(LlamaBlock(config, causal) for _ in range(config.n_layer))
        head_layers = config.head_layers if config.head == "ar" else 0
        self.head_blocks = nn.ModuleList(LlamaBlock(config, True) for _ in range(head_layers))
        self.head_mlps = nn.ModuleList(SwiGLU(config) for _ in range(k if config.head == "mlp" else 0))
        self.norm = nn.RMSNorm(d, eps=1e-5)
        self.classifiers = nn.ModuleList(nn.Linear(d, K, bias=False) for _ in range(k))
        side, slots = math.isqrt(config.num_tokens), torch.arange(k)[:, None]
        places = torch.cartesian_prod(torch.arange(1, side + 1), torch.arange(1, side + 1))
        places = torch.cat([torch.zeros(1, 2), places])  # none for the condition
        head_dim = d // config.n_head
        self.register_buffer("angles", rotary_angles(places, head_dim), persistent=False)
        self.register_buffer("head_angles", rotary_angles(slots, head_dim), persistent=False)
        self.apply(self._init_weights)
        for classifier in self.classifiers:
            nn.init.zeros_(classifier.weight)

    def embed(self, tokens):
        """tokens: (B, T, k) int64 -> (B, T, d)."""
        parts = zip(self.token_tables, tokens.unbind(2), strict=True)
        fused = self.fuse(torch.cat([table(part) for table, part in parts], dim=2))
        return fused.to(self.fuse.weight.dtype)  # float32 under autocast, as the condition is

    def hidden(self, x, start=0, caches=None):
        x, angles = self.drop(x), self.angles[start + torch.arange(x.shape[1], device=x.device)]
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], angles)
        return x

    def classify(self, i, x):
        """Logits of sub-token i: (..., d) -> (..., K)."""
        x = self.head_mlps[i](x) if self.head_mlps else x
        return self.classifiers[i](self.norm(x))

    def slots(self, x, tokens):
        """x: (M, d) of `hidden`; tokens: the first T - 1 sub-tokens of each position, (M,) each
        -> (M, T, d), of which slot i has seen x and the tokens before i, with another head x alone."""
        if self.config.head != "ar":
            return x[:, None].expand(-1, len(tokens) + 1, -1)
        before = zip(self.token_tables, tokens, strict=False)
        h = torch.stack([x, *(table(part) for table, part in before)], dim=1)
        for block in self.head_blocks:
            h = block(h, None, self.head_angles[: h.shape[1]])
        return h

    def logits(self, x, targets):
        """x: (B, T, d) of `hidden`; targets: (B, T, k), the true sub-tokens -> (B, T, k, K)."""
        slots = self.slots(x.flatten(0, 1), targets.flatten(0, 1).unbind(1)[:-1]).unbind(1)
        found = torch.stack([self.classify(i, slot) for i, slot in enumerate(slots)], dim=1)
        return found.unflatten(0, x.shape[:2])

    def draw(self, x, pick):
        """x: (M, d); pick(i, logits) draws the sub-token i of each row -> tokens (M, k)."""
        drawn = []
        for i in range(self.config.num_codebooks):
            drawn.append(pick(i, self.classify(i, self.slots(x, drawn)[:, -1])))
        return torch.stack(drawn, dim=1)


class GuidedFactorized(Guided):
    """Both halves of the batch go on from the sub-token that was drawn from the guided logits."""

    def draw(self, x, pick):
        def both(i, logits):
            return torch.cat([pick(i, guide(logits, self.scale))] * 2)

        return self.inner.draw(x, both)[: len(x) // 2]


class Factorized(Guidance):
    """What both priors have of k sub-tokens."""

    Config, Transformer, Wrapped = FactorizedConfig, FactorizedTransformer, GuidedFactorized

    def __init__(self, config):
        super().__init__(config)
        self.token_shape = (config.num_tokens, config.num_codebooks)  # (N, k)


class FactorizedAR(Factorized, ARPrior):
    SAMPLER = ARPrior.SAMPLER | {"guidance": 1.0}

    def forward(self, tokens, labels=None):
        """(B, N, k) int64 -> (B, N, k, K)."""
        check("tokens", tokens, self.token_shape, torch.int64)
        check_labels(labels, len(tokens), self.config.num_classes)
        return self.transformer.logits(self.transformer(tokens[:, :-1], labels), tokens)

    @torch.no_grad()
    def predict(self, tokens, labels=None):
        """As ARPrior's: s' (B, N, k), and the means over k of nats and hits, (B, N)."""
        logits = self(tokens, labels).float()
        tokens_pred = logits.argmax(-1)
        nats = F.cross_entropy(logits.flatten(0, 2), tokens.flatten(), reduction="none").view_as(tokens)
        return tokens_pred, nats.mean(2), (tokens_pred == tokens).float().mean(2)

    def draw(self, x, noise, sampler):  # (B, d), (B, k) -> (B, k)
        settings = [sampler[name] for name in ARPrior.SAMPLER]
        return self.transformer.draw(x, lambda i, logits: sample_logits(logits, noise[:, i], *settings))


class FactorizedNAR(Factorized, NARPrior):
    """The k sub-tokens of a position are hidden and fixed together, by the geometric mean of their
    probabilities. All of it is ours."""

    SAMPLER = NARPrior.SAMPLER | {"guidance": 1.0}

    def inputs(self, tokens, noise):
        """(B, N, k) -> the hidden and, for the head, the true tokens (B, N, 2k); loss_mask (B, N, k)."""
        _, mask = mask_tokens(tokens[..., 0], self.mask_id, noise)
        mask = mask[..., None].expand_as(tokens)
        return torch.cat([tokens.masked_fill(mask, self.mask_id), tokens], dim=2), mask

    def forward(self, inputs, labels=None):
        """inputs: (B, N, 2k) of `inputs` -> logits (B, N, k, K)."""
        N, k = self.token_shape
        check("inputs", inputs, (N, 2 * k), torch.int64)
        check_labels(labels, len(inputs), self.config.num_classes)
        hidden, targets = inputs.chunk(2, dim=2)
        return self.transformer.logits(self.transformer(hidden, labels)[:, 1:], targets)

    def noise_shape(self, sampler):
        steps, _, num_tokens = super().noise_shape(sampler)
        return steps, self.config.num_codebooks + 1, num_tokens

    def draw(self, x, noise, sampler):  # (M, d), (M, k) -> candidates (M, k), log-probabilities (M,)
        temperature, log_probs = sampler["token_temperature"], []

        def pick(i, logits):
            logits = logits.float()
            drawn = sample_logits(logits, noise[:, i], temperature)
            log_prob = F.log_softmax(logits / (temperature if temperature >= GREEDY else 1.0), dim=1)
            log_probs.append(log_prob.gather(1, drawn[:, None])[:, 0])
            return drawn

        return self.transformer.draw(x, pick), sum(log_probs) / self.config.num_codebooks

    def holes(self, tokens):  # (B, N, k) -> (B, N)
        return super().holes(tokens).any(dim=2)
