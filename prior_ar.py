"""The autoregressive prior over token sequences, and the Transformer both priors share (Sec. 3.1.2 and 6.1).

Read from top to bottom: configuration, attention (its cache: plumbing/fast.py), the block, the Transformer,
how one token is drawn from logits, the prior. `prior_nar.py` reuses everything but the last class.
Sections and tables are those of arXiv 2212.03185.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.checks import check, check_labels, eval_mode, with_defaults
from plumbing.fast import KVCache, attention


@dataclass
class PriorConfig:
    """Sizes of a prior; the defaults are Table 8's "base" (172M with 1,000 classes). Large is n_embd=1024.

    num_classes = 0 means unconditional: the only condition is the null one, a learned start vector.
    raises: ValueError if n_head does not divide n_embd
    """

    codebook_size: int = 1024  # K
    num_tokens: int = 256  # N = h*w, raster order
    num_classes: int = 0
    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 768
    mlp_ratio: int = 4
    dropout: float = 0.1

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


class Attention(nn.Module):
    """Multi-head self-attention; `causal` is the one difference between the two priors (Sec. 6.1)."""

    def __init__(self, config, causal, bias=True):
        super().__init__()
        self.n_head, self.causal, self.dropout = config.n_head, causal, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)

    def forward(self, x, cache=None):  # (B, T, d) -> (B, T, d)
        return self.attend(*self.split(x), cache)

    def split(self, x):
        """(B, T, d) -> q, k, v, each (B, n_head, T, head_dim)."""
        return self.qkv(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q, k, v, cache=None):
        """softmax(q k^T / sqrt(head_dim)) v, then the projection; if causal, position i sees 0 to i only.

        PyTorch's fused attention, or what is faster (plumbing/fast.py). With a cache there is one query, the
        newest position, which may see every cached key.
        """
        if cache is not None:
            out = cache.attend(q, k, v)
        else:
            out = attention(q, k, v, self.dropout if self.training else 0.0, self.causal)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, T, d)


class MLP(nn.Module):
    """Two linear layers with a GELU between them; hidden width mlp_ratio * d (3072 or 4096 in Table 8)."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    """Pre-norm Transformer block with 12 d^2 + 13 d parameters; dropout after both branches (Table 8)."""

    def __init__(self, config, causal):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.n_embd), Attention(config, causal)
        self.norm2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        x = x + self.drop(self.attn(self.norm1(x), cache))
        return x + self.drop(self.mlp(self.norm2(x)))  # (B, T, d)


class Transformer(nn.Module):
    """What both priors are made of: [condition, tokens] in, causal (AR) or not (NAR) (Sec. 6.1, Table 8).

    Position 0 holds the condition, position i the token s_i. Row K of the token table is [MASK] and the last
    row of the condition table is the null condition. Neither can be predicted: the head has K outputs only.

    deviation: the paper prints sizes and leaves embeddings and head open. Ours: a head tied to the first K
               token rows, with a bias per code, and learned positions. The totals then round to the printed
               171M (Table 3), 172M and 305M (Table 8). Initialisation normal(0.02), zero biases (ours).
    """

    def __init__(self, config, causal):
        super().__init__()
        self.config = config
        self.token_table = nn.Embedding(config.codebook_size + 1, config.n_embd)
        self.condition_table = nn.Embedding(config.num_classes + 1, config.n_embd)
        self.position_table = nn.Embedding(config.num_tokens + 1, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, causal) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head_bias = nn.Parameter(torch.zeros(config.codebook_size))
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed_condition(self, labels, batch_size):
        """labels: (B,) int64 in [0, num_classes), or None for the null condition -> (B, 1, d)."""
        if labels is None:
            null, device = self.config.num_classes, self.condition_table.weight.device
            labels = torch.full((batch_size,), null, dtype=torch.int64, device=device)
        return self.condition_table(labels)[:, None]  # (B, 1, d)

    def embed(self, tokens):
        """tokens: (B, T) int64 -> (B, T, d)."""
        return self.token_table(tokens)

    def hidden(self, x, start=0, caches=None):
        """x: (B, T, d) embeddings of the positions start..start+T-1 -> (B, T, d), for `logits`."""
        positions = self.position_table(start + torch.arange(x.shape[1], device=x.device))  # (T, d)
        x = self.drop(x + positions)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return x

    def forward(self, tokens, labels=None):
        """tokens: (B, T) int64, T <= N; labels: (B,) int64 or None -> (B, T + 1, d), for `logits`."""
        condition = self.embed_condition(labels, tokens.shape[0])
        return self.hidden(torch.cat([condition, self.embed(tokens)], dim=1))

    def logits(self, x):
        """(..., d) of `hidden` or `forward` -> (..., K)."""
        codes = self.token_table.weight[: self.config.codebook_size]  # (K, d), without [MASK]
        return F.linear(self.norm(x), codes, self.head_bias)


def top_p_filter(probs, p):
    """Nucleus filter: the fewest likeliest codes whose mass reaches p (top-p of Table 10: 0.92 or 0.98).

    probs:   (B, K) float32, each row in DESCENDING order and of sum 1.
    p:       in [0, 1]; 1 keeps every code, 0 only the first.
    returns: (B, K) float32: zero where dropped, the rest renormalised to sum 1. Code j is kept while the mass
             before j is below p, so the code that crosses p is kept, and always at least one.
    raises:  ValueError if p is outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"top_p: expected a number in [0, 1], got {p}")
    if p == 1.0:  # the cumulative sum may round up to 1 before the last code
        return probs
    keep = probs.cumsum(dim=1).roll(1, dims=1) < p  # mass before j, except in column 0
    keep[:, 0] = True
    probs = probs * keep
    return probs / probs.sum(dim=1, keepdim=True)


GREEDY = 1e-30  # temperatures below it take the argmax: logits divided by them could overflow


def sample_logits(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one code per row: temperature, then top-k, then top-p, then the inverse CDF at u (Table 10).

    logits:    (B, K), any float dtype; the arithmetic is float32.
    u:         (B,) uniforms in [0, 1). The draw is a function of (logits, u) alone: the caller owns the
               randomness, so an image can depend on its own seed and not on its batch.
    temperature, top_k: temperature 0, or below GREEDY, is argmax (u unused); top_k 0 is off.
    returns:   (B,) int64 in [0, K).
    raises:    ValueError for shapes that differ, a negative temperature or top_k, or top_p outside [0, 1].
    deviation: the paper names top-p only; temperature and top-k are ours and off by default.
    """
    if logits.ndim != 2 or u.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (B, K) and u (B,), got {tuple(logits.shape)} and {tuple(u.shape)}")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature {temperature} and top_k {top_k} must not be negative")
    if temperature < GREEDY:
        return logits.argmax(dim=1)
    values, codes = logits.float().sort(dim=1, descending=True, stable=True)
    if top_k:
        values, codes = values[:, :top_k], codes[:, :top_k]
    probs = top_p_filter(F.softmax(values / temperature, dim=1), top_p)  # (B, K), descending
    cdf = probs.cumsum(dim=1)
    drawn = torch.searchsorted(cdf, u.float()[:, None] * cdf[:, -1:], right=True)  # first j with cdf > u
    last = (probs > 0).sum(dim=1, keepdim=True) - 1  # rounding must never reach a dropped code
    return codes.gather(1, torch.minimum(drawn, last))[:, 0]  # (B,)


class ARPrior(nn.Module):
    """p(s | c) = prod_i p(s_i | c, s_1..s_{i-1}) over tokens in raster order (Sec. 3.1.2).

    A training step: `inputs, loss_mask = prior.inputs(tokens, noise)`, then `logits = net(inputs, labels)`,
    then `loss, accuracy = prior.loss(logits, tokens, loss_mask)`. So is a masked prior trained.
    """

    Config, Transformer = PriorConfig, Transformer
    SAMPLER = dict(temperature=1.0, top_k=0, top_p=1.0)  # what `generate` reads, see `sample_logits`

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_shape = (config.num_tokens,)  # of the tokens of one image
        self.transformer = self.Transformer(config, causal=True)

    def inputs(self, tokens, noise):
        """What a training step shows, and which positions its loss counts: all (noise is not read)."""
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def forward(self, tokens, labels=None):
        """Teacher-forced logits: output i sees c, s_1..s_i and predicts s_{i+1} (Fig. 3: s to s').

        tokens:  (B, N) int64 in [0, K); the last one is a target only. Out-of-range values are not checked.
        labels:  (B,) int64 in [0, num_classes), or None for the null condition.
        returns: logits (B, N, K); argmax over K gives s'.
        raises:  ValueError for a wrong shape or dtype, or labels given to an unconditional prior.
        """
        check("tokens", tokens, self.token_shape, torch.int64)
        check_labels(labels, len(tokens), self.config.num_classes)
        return self.transformer.logits(self.transformer(tokens[:, :-1], labels))  # [c, s_1..s_{N-1}]

    def loss(self, logits, tokens, loss_mask=None, label_smoothing=0.0):
        """Eq. 3 for AR: mean cross-entropy in nats over all N positions (Fig. 10 plots it); top-1 accuracy.

        logits:  (B, N, K) of `forward`, any float dtype; tokens: (B, N) int64 in [0, K).
        not read: loss_mask, every position counts.  label_smoothing: ours, off by default.
        returns: (loss, accuracy), 0-dim float32 tensors; an untrained prior starts near ln K.
        """
        check("tokens", tokens, logits.shape[1:-1], torch.int64)
        logits = logits.float().flatten(0, -2)
        loss = F.cross_entropy(logits, tokens.flatten(), label_smoothing=label_smoothing)
        return loss, (logits.detach().argmax(dim=-1) == tokens.flatten()).float().mean()

    @torch.no_grad()
    def predict(self, tokens, labels=None):
        """The teacher-forced view in tokens (Sec. 3.2): s' from one forward pass on the true tokens s.

        returns: tokens_pred s' (B, N) int64; nats of the true tokens and hits (s' = s), both (B, N) float32
        """
        logits = self(tokens, labels).float()  # (B, N, K)
        tokens_pred = logits.argmax(-1)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        return tokens_pred, nats, (tokens_pred == tokens).float()

    def noise_shape(self, sampler):
        """Of the uniforms in [0, 1) that `generate` wants for one image."""
        return self.token_shape

    def draw(self, x, noise, sampler):
        """Tokens (B,) of one position from x (B, d) of the Transformer and uniforms (B,)."""
        settings = sampler["temperature"], sampler["top_k"], sampler["top_p"]
        return sample_logits(self.transformer.logits(x), noise, *settings)

    def step(self, x, i, noise, caches, sampler):
        """Draw s_{i+1} ~ p(s | c, s_1..s_i).

        x: (B, 1, d), embedding of s_i, or of c for i = 0; what came before it is in the caches
        i: number of tokens there are;  noise: (B, ...), the uniforms of this position
        returns: s_{i+1} (B, ...) and its embedding (B, 1, d), the next x
        """
        x = self.transformer.hidden(x, start=i, caches=caches)[:, 0]  # (B, d)
        tokens = self.draw(x, noise, sampler)
        return tokens, self.transformer.embed(tokens[:, None])

    @torch.no_grad()
    def generate(self, labels, noise, **sampler):
        """Sample N tokens one after the other (Sec. 6.1; the top-p of each data set is in Table 10).

        labels:  (B,) int64 in [0, num_classes), or None.
        noise:   (B, *noise_shape) uniforms in [0, 1); noise[b, i] alone draws token i of image b, so an image
                 does not depend on its batch (up to rounding of the matrix products).
        sampler: settings out of `SAMPLER`.
        returns: (B, N) int64 in [0, K).
        raises:  ValueError for wrong shapes, labels out of range or noise outside [0, 1), TypeError for an
                 unknown setting.
        """
        model, sampler = self.transformer, with_defaults(self.SAMPLER, sampler)
        check("noise", noise, self.noise_shape(sampler), below=1)
        check_labels(labels, len(noise), self.config.num_classes, values=True)
        tokens = torch.zeros(len(noise), *self.token_shape, dtype=torch.int64, device=noise.device)
        caches = [KVCache(self.config.num_tokens) for _ in model.blocks]
        with eval_mode(self):
            x = model.embed_condition(labels, len(noise))  # (B, 1, d)
            for i in range(self.config.num_tokens):
                tokens[:, i], x = self.step(x, i, noise[:, i], caches, sampler)
        return tokens
