"""The autoregressive prior over token sequences, and the Transformer both priors share (Sec. 3.2, Table 10).

Read from top to bottom: configuration, attention with its cache, the block, the Transformer, how one token
is drawn from logits, the prior. `prior_nar.py` reuses everything but the last class.
Sections and tables are those of arXiv 2212.03185.

A fork for other tokens replaces the two ends of the Transformer, as `FactorizedTransformer` does for FQGAN's
(arXiv 2411.16681), where a position holds k sub-tokens: `embed`, `logits` and `draw`.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class PriorConfig:
    """Sizes of a prior; the defaults are Table 8's "base" (172M with 1,000 classes). Large is n_embd=1024.

    num_classes = 0 means unconditional: the only condition is the null one, a learned start vector.
    """

    codebook_size: int = 1024  # K
    num_tokens: int = 256  # N = h*w, raster order
    num_classes: int = 0
    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 768
    mlp_ratio: int = 4
    dropout: float = 0.1
    class_dropout: float = 0.0  # share of labels hidden in training, for classifier-free guidance
    num_codebooks: int = 1  # k; above 1 tokens are (B, N, k), which needs one of FQGAN's heads:
    head: str = "tied"  # or "ar", "linear", "mlp" (Table 4 of FQGAN)
    head_layers: int = 3  # of the "ar" head: 3 for Base, 4 for Large
    block: str = "gpt"  # or "llama": RMSNorm, SwiGLU, no biases

    def __post_init__(self):
        for name, allowed in (("head", ("tied", "ar", "linear", "mlp")), ("block", ("gpt", "llama"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.num_codebooks > 1 and self.head == "tied":
            raise ValueError(f"{self.num_codebooks} sub-codebooks need prior.head ar, linear or mlp")
        if self.head != "tied" and self.n_embd // self.n_head % 4:
            raise ValueError("2-D rotary positions need heads of 4, 8, ... channels, got "
                             f"n_embd {self.n_embd} in {self.n_head} heads")

    @property
    def token_shape(self):
        """What tokens have after the batch: (N,) or (N, k)."""
        return (self.num_tokens, self.num_codebooks)[: 1 + (self.num_codebooks > 1)]


class KVCache:
    """Keys and values of one layer for the positions seen so far (ours: only the speed of sampling changes).

    The full (B, n_head, N, head_dim) buffers are allocated once, at the first append, in the dtype the keys
    arrive in (bfloat16 under autocast). `append` returns the filled prefix only, so no mask is needed.
    """

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens
        self.length = 0
        self.keys = self.values = None

    def append(self, k, v):
        """k, v: (B, n_head, 1, head_dim) of the next position -> both for all positions up to it."""
        batch, heads, length, head_dim = k.shape
        if length != 1 or self.length == self.num_tokens:
            full = f"{self.length} of {self.num_tokens} positions"
            raise ValueError(f"KVCache takes one position at a time: it holds {full}, got {length} more")
        if self.keys is None:
            self.keys = k.new_empty(batch, heads, self.num_tokens, head_dim)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, self.length] = k[:, :, 0]
        self.values[:, :, self.length] = v[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


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


class Attention(nn.Module):
    """Multi-head self-attention; `causal` is the one difference between the two priors (Sec. 4.2)."""

    def __init__(self, config, causal):
        super().__init__()
        self.n_head = config.n_head
        self.causal = causal
        self.dropout = config.dropout if config.block == "gpt" else 0.0
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.block == "gpt")
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.block == "gpt")

    def forward(self, x, cache=None, angles=None):
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, n_head, T, head_dim)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.append(k, v)
        # With a cache there is one query, the newest position, which may see every cached key.
        if cache is not None and x.device.type == "cpu":  # plain products: four times as fast for one query
            scores = q.float() @ k.float().transpose(2, 3) / q.shape[3] ** 0.5  # (B, n_head, 1, T)
            out = (scores.softmax(dim=3) @ v.float()).to(x.dtype)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=self.dropout if self.training else 0.0,
                is_causal=self.causal and cache is None)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))  # (B, T, d)


class MLP(nn.Module):
    """Two linear layers with a GELU between them; hidden width mlp_ratio * d (3072 or 4096 in Table 10)."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


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


def make_norm(config):
    return nn.LayerNorm(config.n_embd) if config.block == "gpt" else nn.RMSNorm(config.n_embd, eps=1e-5)


def make_mlp(config):
    return (MLP if config.block == "gpt" else SwiGLU)(config)


class Block(nn.Module):
    """Pre-norm Transformer block with 12 d^2 + 13 d parameters; dropout after both branches (Table 10).

    block="llama" (FQGAN): 4 d^2 + 3 d h + 2 d parameters, h the hidden width of `SwiGLU`.
    """

    def __init__(self, config, causal):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, causal)
        self.norm2 = make_norm(config)
        self.mlp = make_mlp(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, angles=None):
        x = x + self.drop(self.attn(self.norm1(x), cache, angles))
        return x + self.drop(self.mlp(self.norm2(x)))  # (B, T, d)


class Transformer(nn.Module):
    """Logits over the codebook for [condition, tokens], causal (AR) or not (NAR) (Sec. 4.2, Table 10).

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
        """labels: (B,) int64 in [0, num_classes), or None for the null condition -> (B, 1, d).

        In training a share `class_dropout` of the labels becomes the null condition.
        """
        null, device = self.config.num_classes, self.condition_table.weight.device
        if labels is None:
            labels = torch.full((batch_size,), null, dtype=torch.int64, device=device)
        elif self.training and self.config.class_dropout:
            hidden = torch.rand(labels.shape, device=device) < self.config.class_dropout
            labels = labels.masked_fill(hidden, null)
        return self.condition_table(labels)[:, None]  # (B, 1, d)

    def embed(self, tokens):
        """tokens: (B, T) int64 -> (B, T, d)."""
        return self.token_table(tokens)

    def run(self, x, start=0, caches=None):
        """x: (B, T, d) embeddings of the positions start..start+T-1 -> (B, T, d), for `logits` or `draw`."""
        positions = self.position_table.weight[start : start + x.shape[1]]  # (T, d)
        x = self.drop(x + positions)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return x

    def logits(self, x, targets=None):
        """x: (B, T, d) of `run` -> (B, T, K). targets: unused here (see `FactorizedTransformer`)."""
        codes = self.token_table.weight[: self.config.codebook_size]  # (K, d), without [MASK]
        return F.linear(self.norm(x), codes, self.head_bias)

    def draw(self, x, pick):
        """x: (M, d) of `run`; pick(0, logits (M, K)) -> (M,) draws a token -> tokens (M,)."""
        return pick(0, self.logits(x))

    def forward(self, tokens, labels=None, targets=None, skip=0):
        """tokens: (B, T) int64, T <= N; labels: (B,) int64 or None -> logits (B, T + 1 - skip, K).

        targets: what the outputs after the first `skip` ones predict, for heads that see some of it.
        """
        condition = self.embed_condition(labels, tokens.shape[0])
        x = self.run(torch.cat([condition, self.embed(tokens)], dim=1))
        return self.logits(x[:, skip:], targets)


class FactorizedTransformer(Transformer):
    """The same for k sub-tokens a position: their embeddings are concatenated and mapped kd -> d, and the
    head predicts them one after the other (FQGAN, arXiv 2411.16681). 417,104,896 parameters for k = 2 at
    24 + 3 layers of width 1024 and K = 16,384; 901,195,520 at 36 + 4 layers of width 1280.

    The "ar" head: for each position the short sequence [x, e_1(s^1), ..., e_{k-1}(s^{k-1})] through causal
    blocks; slot i predicts sub-token i + 1. "linear" and "mlp" predict all sub-tokens from x alone.
    deviation: positions are rotary over rows and columns, none for the condition; the released code zeroes
               its queries and keys there. The head's slots are rotated by their number. The article prints
               415M and 898M, which leave the fusion layer out. The null row of the condition table and, in
               a masked prior, the [MASK] rows are part of our counts.
    """

    def __init__(self, config, causal):
        nn.Module.__init__(self)
        self.config, (K, d, k) = config, (config.codebook_size, config.n_embd, config.num_codebooks)
        self.token_tables = nn.ModuleList(nn.Embedding(K + (not causal), d) for _ in range(k))
        self.fuse = nn.Linear(k * d, d)
        self.condition_table = nn.Embedding(config.num_classes + 1, d)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, causal) for _ in range(config.n_layer))
        head_layers = config.head_layers if config.head == "ar" else 0
        self.head_blocks = nn.ModuleList(Block(config, True) for _ in range(head_layers))
        self.head_mlps = nn.ModuleList(make_mlp(config) for _ in range(k if config.head == "mlp" else 0))
        self.norm = make_norm(config)
        self.classifiers = nn.ModuleList(nn.Linear(d, K, bias=False) for _ in range(k))
        side, slots = math.isqrt(config.num_tokens), torch.arange(k)[:, None]
        rows, columns = torch.meshgrid(torch.arange(1, side + 1), torch.arange(1, side + 1), indexing="ij")
        places = torch.cat([torch.zeros(1, 2), torch.stack([rows, columns], 2).view(-1, 2)])
        head_dim = d // config.n_head
        self.register_buffer("angles", rotary_angles(places, head_dim), persistent=False)
        self.register_buffer("head_angles", rotary_angles(slots, head_dim), persistent=False)
        self.apply(self._init_weights)
        for classifier in self.classifiers:
            nn.init.zeros_(classifier.weight)

    def embed(self, tokens):
        """tokens: (B, T, k) int64 -> (B, T, d)."""
        tokens = tokens if tokens.ndim == 3 else tokens[..., None]
        parts = zip(self.token_tables, tokens.unbind(2), strict=True)
        fused = self.fuse(torch.cat([table(part) for table, part in parts], dim=2))
        return fused.to(self.fuse.weight.dtype)  # float32 under autocast, as the condition is

    def run(self, x, start=0, caches=None):
        x, angles = self.drop(x), self.angles[start : start + x.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], angles)
        return x

    def classify(self, i, x):
        """Logits of sub-token i."""
        x = self.head_mlps[i](x) if self.head_mlps else x
        return self.classifiers[i](self.norm(x))

    def logits(self, x, targets=None):
        """x: (B, T, d) of `run`; targets: (B, T, k), the true sub-tokens -> (B, T, k, K), without k if 1.

        Slot i of the "ar" head sees the sub-tokens before i of its own position; other heads see none.
        """
        k = len(self.classifiers)
        if targets is None and self.config.head == "ar" and k > 1:
            raise ValueError('head="ar" needs the true tokens: pass targets')
        slots = [x] * k
        if self.config.head == "ar":
            tables = zip(self.token_tables[: k - 1], range(k - 1), strict=True)
            h = torch.stack([x] + [table(targets[..., i]) for table, i in tables], dim=2).flatten(0, 1)
            for block in self.head_blocks:  # (B * T, k, d)
                h = block(h, None, self.head_angles)
            slots = h.unflatten(0, x.shape[:2]).unbind(2)
        found = [self.classify(i, slot) for i, slot in enumerate(slots)]
        return torch.stack(found, dim=2) if k > 1 else found[0]

    def draw(self, x, pick):
        """x: (M, d); pick(i, logits (M, K)) -> (M,) draws sub-token i -> tokens (M, k), or (M,) if k = 1."""
        caches, tokens, h = [KVCache(len(self.classifiers)) for _ in self.head_blocks], [], x[:, None]
        for i in range(len(self.classifiers)):
            if self.config.head == "ar":
                h = x[:, None] if i == 0 else self.token_tables[i - 1](tokens[-1])[:, None]  # (M, 1, d)
                for block, cache in zip(self.head_blocks, caches, strict=True):
                    h = block(h, cache, self.head_angles[i : i + 1])
            tokens.append(pick(i, self.classify(i, h)[:, 0]))
        return torch.stack(tokens, dim=1) if len(tokens) > 1 else tokens[0]


def build_transformer(config, causal):
    return (Transformer if config.head == "tied" else FactorizedTransformer)(config, causal)


def check_labels(labels, batch_size, num_classes, values=False):
    """ValueError unless labels is None or (B,) int64; with `values`, also unless all lie in [0, num_classes).

    Reading values waits for the device, so training skips it and `generate` asks for it.
    """
    if labels is None:
        return
    if num_classes == 0:
        raise ValueError("this prior is unconditional (num_classes=0): labels must be None")
    if labels.shape != (batch_size,) or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected ({batch_size},) int64, got {tuple(labels.shape)} {labels.dtype}")
    if values and not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(f"labels: expected values in [0, {num_classes}), got {labels.tolist()}")


def check_tokens(tokens, shape):
    """ValueError unless tokens is (B, *shape) int64. Values are not read (see `check_labels`)."""
    if tokens.ndim < 2 or tokens.shape[1:] != shape or tokens.dtype != torch.int64:
        got, wanted = f"{tuple(tokens.shape)} {tokens.dtype}", ", ".join(map(str, shape))
        raise ValueError(f"tokens: expected (B, {wanted}) int64, got {got}")


def check_noise(noise, shape):
    """ValueError unless noise is (B, *shape) and lies in [0, 1)."""
    if noise.ndim == 0 or noise.shape[1:] != shape:
        raise ValueError(f"noise: expected (B, *{shape}), got {tuple(noise.shape)}")
    if not bool(((noise >= 0) & (noise < 1)).all()):
        raise ValueError("noise: expected uniforms in [0, 1)")


@contextlib.contextmanager
def eval_mode(module):
    """Dropout off inside the `with`, the old mode restored after it, so sampling may interrupt training."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


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


def guided_condition(model, labels, batch_size, scale):
    """(B, 1, d), the condition; unless the scale is 1, (2B, 1, d) with the null condition below it."""
    condition = model.embed_condition(labels, batch_size)
    return condition if scale == 1 else torch.cat([condition, model.embed_condition(None, batch_size)])


def guide(logits, scale):
    """Classifier-free guidance u + s (c - u): s = 1 conditional, s = 0 unconditional, linear in s.

    logits: (2B, K), conditional above unconditional -> (B, K); with s = 1 (B, K) as they are
    """
    if scale == 1:
        return logits
    conditional, null = logits.float().chunk(2)
    return null + scale * (conditional - null)


class ARPrior(nn.Module):
    """p(s | c) = prod_i p(s_i | c, s_1..s_{i-1}) over tokens in raster order (Sec. 3.2, 4.2).

    In training write `logits = ddp(tokens, labels)`, then `loss, accuracy = prior.loss(logits, tokens)`:
    DistributedDataParallel wraps `forward` alone.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = build_transformer(config, causal=True)

    def forward(self, tokens, labels=None):
        """Teacher-forced logits: output i sees c, s_1..s_i and predicts s_{i+1} (Fig. 3: s to s').

        tokens:  (B, N) int64 in [0, K); the last one is a target only. Out-of-range values are not checked.
                 With k > 1 sub-codebooks (B, N, k), and logits are (B, N, k, K).
        labels:  (B,) int64 in [0, num_classes), or None for the null condition.
        returns: logits (B, N, K); argmax over K gives s'.
        raises:  ValueError for a wrong shape or dtype, or labels given to an unconditional prior.
        """
        check_tokens(tokens, self.config.token_shape)
        check_labels(labels, tokens.shape[0], self.config.num_classes)
        return self.transformer(tokens[:, :-1], labels, tokens)  # [c, s_1..s_{N-1}] -> (B, N, K)

    def loss(self, logits, tokens):
        """Mean cross-entropy in nats over all N positions, and top-1 accuracy (Sec. 3.2, Fig. 10).

        logits:  (B, N, K) of `forward`, any float dtype; tokens: (B, N) int64 in [0, K). Or (B, N, k, K) and
                 (B, N, k): then the mean over sub-tokens too.
        returns: (loss, accuracy), 0-dim float32 tensors; an untrained prior starts near ln K.
        """
        check_tokens(tokens, logits.shape[1:-1])
        loss = F.cross_entropy(logits.float().flatten(0, -2), tokens.flatten())
        return loss, (logits.detach().argmax(dim=-1) == tokens).float().mean()

    @torch.no_grad()
    def generate(self, labels, noise, temperature=1.0, top_k=0, top_p=1.0, use_cache=True, guidance=1.0):
        """Sample N tokens one after the other (Sec. 4.2; the top-p of each data set is in Table 10).

        labels:    (B,) int64 in [0, num_classes), or None.
        noise:     (B, N) uniforms in [0, 1), or (B, N, k); noise[b, i] alone draws token i of image b, so an
                   image does not depend on its batch (up to rounding of the matrix products).
        use_cache: False runs the whole sequence again for every token: the same tokens, slower.
        guidance:  scale s of classifier-free guidance, see `guide`; any value but 1 doubles the batch. An
                   unconditional prior has nothing to guide.
        returns:   (B, N) int64 in [0, K), or (B, N, k).
        raises:    ValueError for wrong shapes, labels out of range or noise outside [0, 1).
        """
        num_tokens, model = self.config.num_tokens, self.transformer
        check_noise(noise, self.config.token_shape)
        check_labels(labels, noise.shape[0], self.config.num_classes, values=True)
        guidance = guidance if self.config.num_classes else 1
        batch_size, copies = noise.shape[0], 1 if guidance == 1 else 2
        shape = (copies * batch_size, *self.config.token_shape)
        tokens = torch.zeros(shape, dtype=torch.int64, device=noise.device)
        caches = [KVCache(num_tokens) for _ in model.blocks] if use_cache else None
        noise = noise.view(batch_size, num_tokens, -1)  # (B, N, k)
        with eval_mode(self):
            condition = guided_condition(model, labels, batch_size, guidance)  # (B, 1, d) or (2B, 1, d)
            for i in range(num_tokens):
                if not use_cache:
                    x = model.run(torch.cat([condition, model.embed(tokens[:, :i])], dim=1))[:, i]
                else:
                    x = condition if i == 0 else model.embed(tokens[:, i - 1 : i])
                    x = model.run(x, start=i, caches=caches)[:, 0]  # (B, d)

                def pick(j, logits, i=i):  # sub-token j, the same for both halves
                    logits = guide(logits, guidance)
                    return sample_logits(logits, noise[:, i, j], temperature, top_k, top_p).repeat(copies)

                tokens[:, i] = model.draw(x, pick)
        return tokens[:batch_size]
