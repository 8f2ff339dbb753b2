"""The SeQ-GAN tokenizer: image -> grid of codebook indices -> image (Sec. 3, Table 7 of arXiv 2212.03185).

Reading order: the convolutional blocks, the attention unit of the second phase, encoder and decoder,
the quantizer (Eq. 1, Eq. 2 and the entropy term of Sec. 3.4), and `VQTokenizer`, which joins them.

The seam for forks: priors, sampling and the view use only `encode(x) -> tokens`, `decode(tokens) -> x_hat`,
`codebook_size` and `token_shape`. No other file knows what the quantizer does.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

CODEBOOKS = ("plain", "entropy", "fn", "kmeans", "fq")  # the four rows of Table 5, and FQGAN's


@dataclass
class TokenizerConfig:
    """Everything that fixes the shape of a tokenizer. The defaults are the paper's first phase (54.5M)."""

    image_size: int = 256
    base_width: int = 128
    channel_mult: tuple = (1, 1, 2, 2, 4)  # widths of the stages f1..f5; f = 2^(stages - 1)
    num_res_blocks: int = 2  # per stage; the lowest stage has `num_mid_blocks` more, VQGAN's middle blocks
    num_mid_blocks: int = 2
    decoder_extra_blocks: int = 0  # 2 is "+Conv x2" of Table 1
    num_attention: int = 0  # B&D units per decoder stage: 1 in the second phase, 2 is "+Attention x2"
    attention: str = "interleaved"  # or "parallel", HiT's split heads (decision I5)
    codebook: str = "entropy"  # one of CODEBOOKS
    codebook_size: int = 1024  # K
    codebook_dim: int = 256  # n_z
    distance: str = "squared"  # inside the softmax of the entropy term; or "l2" (decision I11)
    entropy_set: str = "batch"  # average over the global batch, or "image", the literal reading (I12)
    kmeans_warmup: int = 10_000  # codebook="kmeans": iterations without quantization (I20), then
    kmeans_every: int = 2_000  # a re-estimation every so many iterations
    kmeans_last: int = 30_000  # until this one
    warm_start: int = 0  # other codebooks: so many iterations without quantization, then one K-means (ours,
    # for runs of minutes; the paper's 500,000 iterations start with quantization)
    trunk: str = "seqgan"  # or "vqgan": VQGAN's own encoder and decoder, with attention, which FQGAN uses
    num_codebooks: int = 1  # k sub-codebooks of FQGAN (arXiv 2411.16681); above 1 tokens are (B, N, k)
    adapter_layers: int = 0  # Transformer blocks before each sub-codebook (FQGAN: 6)
    teacher_widths: tuple = ()  # of FQGAN's representation loss, one for each sub-codebook; 0: no teacher
    bias: bool = False  # biases in the block convs and q/k/v as well (I4): 54,547,203 parameters
    latent_kernel: int = 1  # 3 for 3x3 convs into and out of the latent (I2)

    def __post_init__(self):
        self.channel_mult, self.teacher_widths = tuple(self.channel_mult), tuple(self.teacher_widths)
        if min(self.widths, default=0) < 1:
            raise ValueError(f"base_width {self.base_width} and channel_mult {self.channel_mult} give no "
                             "widths of at least one channel")
        for name in ("codebook_size", "codebook_dim", "num_codebooks", "kmeans_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.latent_kernel not in (1, 3):
            raise ValueError(f"latent_kernel must be 1 or 3, got {self.latent_kernel}")
        if len(self.teacher_widths) not in (0, self.num_codebooks):
            raise ValueError(f"{self.num_codebooks} codebooks need as many teacher_widths (0: no teacher), "
                             f"got {len(self.teacher_widths)}")
        extras = self.num_codebooks > 1 or self.adapter_layers > 0 or any(self.teacher_widths)
        if extras and self.trunk != "vqgan":
            raise ValueError('several codebooks, adapters and teachers need trunk="vqgan"')
        odd = [w for w in (*self.teacher_widths, self.widths[-1] * bool(self.adapter_layers)) if w % 8]
        if odd:
            raise ValueError(f"adapters and students have 8 heads, so a width of {odd[0]} must be a multiple")
        others = dict(decoder_extra_blocks=0, num_mid_blocks=2, bias=False, latent_kernel=1)
        ignored = [name for name, default in others.items() if getattr(self, name) != default]
        if ignored and self.trunk == "vqgan":
            raise ValueError(f'{ignored[0]} is of SeQ-GAN\'s trunk; trunk="vqgan" has none')
        for name, allowed in (("codebook", CODEBOOKS), ("attention", ("interleaved", "parallel")),
                              ("distance", ("squared", "l2")), ("entropy_set", ("batch", "image")),
                              ("trunk", ("seqgan", "vqgan"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.image_size % self.downsample:
            below = self.image_size // self.downsample * self.downsample
            raise ValueError(
                f"image side {self.image_size} is not divisible by the downsampling factor f = "
                f"{self.downsample}; the nearest sides are {below} and {below + self.downsample}"
            )

    @property
    def widths(self):
        return [self.base_width * m for m in self.channel_mult]

    @property
    def downsample(self):
        """f, the factor between image side and grid side."""
        return 2 ** (len(self.channel_mult) - 1)


# ----------------------------------------------------------------------------------------------------------
# Convolutional blocks (Table 7)
# ----------------------------------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """GroupNorm that reads and writes the type of its input; its statistics are float32 either way.

    PyTorch's does so under autocast on a CPU, but not on a GPU, where float32 maps took 18 % more time and
    48 % more memory (phase 1 of `imagenet` on an H100).
    """

    def forward(self, x):
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def group_norm(channels):
    """GroupNorm of 32 groups, fewer where a group would have less than 4 channels (as at width 128).

    With one channel a group, as 32 groups give at width 32, every map loses its mean: colour is gone.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and (channels >= 4 * g or g == 1))
    return GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block, 18 c^2 + 4 c parameters at constant width c (I3: SeQ-GAN changes channels in Down/Up
    only). VQGAN's trunk, which FQGAN uses, has a -> b with biases, and then a 1x1 convolution as shortcut."""

    def __init__(self, a, b=None, bias=False):
        super().__init__()
        b = b or a
        self.norm1, self.conv1 = group_norm(a), nn.Conv2d(a, b, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = group_norm(b), nn.Conv2d(b, b, 3, padding=1, bias=bias)
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):  # (B, a, H, W) -> (B, b, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Downsample(nn.Module):
    """Halves the side: one zero row and column at the bottom and right, then a 3x3 conv of stride 2."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2)

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side: nearest neighbour, then a 3x3 conv."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# ----------------------------------------------------------------------------------------------------------
# Block-regional and dilated attention (Sec. 3.3, second phase; the idea is HiT's)
# ----------------------------------------------------------------------------------------------------------


def to_windows(x, block, kind):
    """Cuts a map into attention windows: "regional" b x b blocks, or "dilated" grids of stride b.

    x:       (B, heads, d, H, W), H and W divisible by b = `block`
    returns: (B * windows, heads, positions, d), positions = b^2 (regional) or HW / b^2 (dilated)
    """
    B, heads, d, H, W = x.shape
    if H % block or W % block:
        raise ValueError(f"attention on a {H}x{W} map needs sides divisible by its block side {block}")
    x = x.reshape(B, heads, d, H // block, block, W // block, block)  # rows (Y, y), columns (X, x)
    if kind == "regional":
        x = x.permute(0, 3, 5, 1, 4, 6, 2)  # (B, Y, X, heads, y, x, d)
    else:
        x = x.permute(0, 4, 6, 1, 3, 5, 2)  # (B, y, x, heads, Y, X, d)
    return x.reshape(-1, heads, x.shape[4] * x.shape[5], d)


def from_windows(x, block, kind, H, W):
    """Inverse of `to_windows`: (B * windows, heads, positions, d) -> (B, heads, d, H, W)."""
    heads, d = x.shape[1], x.shape[3]
    if kind == "regional":
        x = x.view(-1, H // block, W // block, heads, block, block, d).permute(0, 3, 6, 1, 4, 2, 5)
    else:
        x = x.view(-1, block, block, heads, H // block, W // block, d).permute(0, 3, 6, 4, 1, 5, 2)
    return x.reshape(-1, heads, d, H, W)


def windowed_attention(q, k, v, block, kind):
    """Softmax attention inside each window; the scores of a 256x256 map are never materialised.

    q, k, v: (B, heads, d, H, W);  returns the same shape
    kind:    "regional", "dilated", or "parallel" (first half of the heads regional, second half dilated)
    """
    if kind == "parallel":
        halves = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), ("regional", "dilated"), strict=True)
        return torch.cat([windowed_attention(*half[:3], block, half[3]) for half in halves], 1)
    H, W = q.shape[-2:]
    q, k, v = (to_windows(t, block, kind) for t in (q, k, v))
    return from_windows(F.scaled_dot_product_attention(q, k, v), block, kind, H, W)


class BlockAttention(nn.Module):
    """One attention layer x + Out(Attn(GN(x))), regional, dilated or parallel (4 c^2 + 3 c parameters).

    The output projection starts at zero, so a layer added to a trained decoder changes nothing at step 0
    (I7). No MLP, no position term: the printed counts rule both out (I5). Heads and block sides: I6.
    """

    def __init__(self, channels, side, kind, bias=False):
        super().__init__()
        self.heads = 8 if channels >= 512 else 4
        if channels % self.heads:
            raise ValueError(f"{channels} channels cannot be split into {self.heads} attention heads")
        self.block = 2 ** math.ceil(math.log2(side) / 2)  # about the square root of the side
        if side % self.block:
            raise ValueError(f"attention on a {side}x{side} map needs sides divisible by its block side "
                             f"{self.block}; image sides that are powers of two always fit")
        self.kind = kind
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):  # (B, c, H, W) -> (B, c, H, W)
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H, W)
        q, k, v = qkv.unbind(1)
        h = windowed_attention(q, k, v, self.block, self.kind)  # (B, heads, c / heads, H, W)
        return x + self.out(h.reshape(B, C, H, W))


class ConvMLP(nn.Module):
    """x + MLP(GN(x)) with ratio 2: the second half of HiT's parallel unit, 4 c^2 + 5 c parameters."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.up = nn.Conv2d(channels, 2 * channels, 1)
        self.down = nn.Conv2d(2 * channels, channels, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def attention_units(channels, side, config, num):
    """`num` B&D units in a row, 8 c^2 + 6 c parameters each (8 c^2 + 8 c for the parallel form)."""
    layers = []
    for _ in range(num):
        if config.attention == "interleaved":
            layers += [BlockAttention(channels, side, kind, config.bias) for kind in ("regional", "dilated")]
        else:
            layers += [BlockAttention(channels, side, "parallel", config.bias), ConvMLP(channels)]
    return nn.Sequential(*layers)


# ----------------------------------------------------------------------------------------------------------
# Encoder and decoder (Table 7)
# ----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """E of Eq. 1: images to z_hat. 27,135,872 parameters by default."""

    def __init__(self, config):
        super().__init__()
        widths, stages = config.widths, []
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            num_blocks = config.num_res_blocks + (config.num_mid_blocks if last else 0)
            stage = [ResBlock(width, bias=config.bias) for _ in range(num_blocks)]
            stages.append(nn.Sequential(*stage, *([] if last else [Downsample(width, widths[i + 1])])))
        k = config.latent_kernel
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.Sequential(*stages)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.codebook_dim, k, padding=k // 2)

    def forward(self, x):  # (B, 3, H, W) in [-1, 1] -> (B, n_z, H/f, W/f)
        h = self.stages(self.conv_in(x))
        return self.conv_out(F.silu(self.norm_out(h)))


class DecoderStage(nn.Module):
    """Residual blocks, then `num_attention` B&D units, then the upsampling (absent in the last stage)."""

    def __init__(self, width, width_next, side, num_blocks, config):
        super().__init__()
        self.blocks = nn.Sequential(*[ResBlock(width, bias=config.bias) for _ in range(num_blocks)])
        self.attention = attention_units(width, side, config, config.num_attention)
        self.up = Upsample(width, width_next) if width_next else nn.Identity()

    def forward(self, x):
        return self.up(self.attention(self.blocks(x)))


class Decoder(nn.Module):
    """G of Eq. 1: codes to images, linear output. 27,134,851 parameters, 30,550,403 in the second phase.

    The width at the second-finest stage is the encoder's (I1): Table 7 prints 256 there, no count allows it.
    """

    def __init__(self, config):
        super().__init__()
        widths, k, stages = config.widths[::-1], config.latent_kernel, []
        for i, width in enumerate(widths):
            num_blocks = config.num_res_blocks + config.decoder_extra_blocks
            num_blocks += config.num_mid_blocks if i == 0 else 0
            side = config.image_size // config.downsample * 2**i
            width_next = widths[i + 1] if i + 1 < len(widths) else None
            stages.append(DecoderStage(width, width_next, side, num_blocks, config))
        self.conv_in = nn.Conv2d(config.codebook_dim, widths[0], k, padding=k // 2)
        self.stages = nn.Sequential(*stages)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z_q):  # (B, n_z, h, w) -> (B, 3, f*h, f*w)
        h = self.stages(self.conv_in(z_q))
        return self.conv_out(F.silu(self.norm_out(h)))


# ----------------------------------------------------------------------------------------------------------
# Quantizer (Eq. 1, Eq. 2, Sec. 3.4, Table 5)
# ----------------------------------------------------------------------------------------------------------


def code_distances(z, codes, kind="squared"):
    """Distances D_ik of Sec. 3.4 between vectors and codes, float32.

    z:       (M, n_z), M = B*h*w;  codes: (K, n_z)
    returns: (M, K). "squared" leaves out |z_i|^2, which is constant in k: neither the argmin nor
             softmax_k(-D) sees it, and the rest is one addmm. "l2" is the plain Euclidean distance (I11).
    """
    distances = torch.addmm(codes.square().sum(1), z, codes.T, alpha=-2)
    if kind == "squared":
        return distances
    if kind == "l2":
        return (distances + z.square().sum(1, keepdim=True)).clamp(min=0).add(1e-12).sqrt()
    raise ValueError(f"distance must be 'squared' or 'l2', got {kind!r}")


def average_probs(distances):
    """D_bar of Sec. 3.4: (..., M, K) distances -> (..., K), the mean over M of softmax_k(-D)."""
    return F.softmax(-distances, -1).mean(-2)


def entropy_loss(avg_probs):
    """ln K - H(D_bar) = KL(D_bar || uniform): how unevenly the codebook is used (Sec. 3.4).

    avg_probs: (..., K), D_bar;  returns: scalar in nats, from 0 (even use) to ln K (one code)
    deviation: the paper prints L_vq + gamma H(D_bar) yet asks for a smoother D_bar, i.e. a larger H. The
               sign that does what the text says is -gamma H (I10); the constant ln K makes the term >= 0.
    """
    entropy = -(avg_probs * avg_probs.clamp(min=1e-30).log()).sum(-1)
    return (math.log(avg_probs.shape[-1]) - entropy).mean()


FQ_TEMPERATURE = 0.01  # of FQGAN's softmax over codes


def vector_entropy(distances):
    """The mean over vectors of H(softmax_k(-D)): (M, K) -> scalar in nats. With `entropy_loss` it is the term
    of MaskGIT, LlamaGen and FQGAN, mean H(P_i) - H(mean P_i), up to the constant ln K."""
    log_probs = F.log_softmax(-distances, -1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


def all_reduce_mean(x):
    """Mean of `x` over the processes of a distributed run, `x` itself otherwise. No gradient."""
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class VectorQuantizer(nn.Module):
    """Nearest-code lookup with straight-through gradient (Eq. 1) and the latent terms of Eq. 2.

    All arithmetic is float32, also under autocast. `config.codebook` picks the row of Table 5:
    "plain" VQGAN; "entropy" adds the term of Sec. 3.4; "fn" normalises vectors and codes (the paper uses
    n_z = 32, K = 8192 with it); "kmeans" re-estimates the codebook offline (see `start_step`). "fq" is
    FQGAN's: normalised, with another entropy term.
    """

    RESERVOIR = 16_384  # vectors kept for the K-means re-estimation
    MOST_DISTANCES = 2**26  # that `quantize` holds at a time, 256 MiB

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        if config.codebook == "fn":
            nn.init.normal_(self.codebook.weight)
        else:
            nn.init.uniform_(self.codebook.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        if config.codebook == "fq":
            self.codebook.weight.data = F.normalize(self.codebook.weight.data, dim=1)
        self.bypass = False  # warm-up: the decoder gets z_hat itself, normalised where codes are
        self.collecting = False  # while encoder outputs go to the K-means reservoir
        self.reestimations = range(config.warm_start, config.warm_start + bool(config.warm_start))
        if config.codebook == "kmeans":
            self.reestimations = range(config.kmeans_warmup, config.kmeans_last + 1, config.kmeans_every)
        if self.reestimations and config.codebook_size > self.RESERVOIR:
            raise ValueError(f"K-means takes its centres from {self.RESERVOIR:,} vectors, so not "
                             f"{config.codebook_size:,} of them; set warm_start=0 or fewer codes")
        if self.reestimations:
            self.register_buffer("reservoir", torch.zeros(self.RESERVOIR, config.codebook_dim))
            self.register_buffer("reservoir_keys", torch.full((self.RESERVOIR,), -1.0))
        self.key_seed = 0  # of the next random keys: a function of the step and the micro-batch

    def normalize(self, x):
        return F.normalize(x, dim=-1) if self.config.codebook in ("fn", "fq") else x

    @property
    def codes(self):
        """(K, n_z) float32, the codes as they are compared and looked up."""
        return self.normalize(self.codebook.weight.float())

    def flatten(self, z_hat):
        """(B, n_z, h, w) in any float type -> (M, n_z) float32."""
        return self.normalize(z_hat.float().permute(0, 2, 3, 1).reshape(-1, z_hat.shape[1]))

    def quantize(self, z_hat):
        """Indices of the nearest codes: (B, n_z, h, w) -> (B, h, w) int64. No gradient."""
        with torch.no_grad(), torch.autocast(z_hat.device.type, enabled=False):
            codes, z = self.codes, self.flatten(z_hat)
            parts = z.split(max(1, self.MOST_DISTANCES // len(codes)))
            indices = torch.cat([code_distances(part, codes).argmin(1) for part in parts])
        return indices.view(z_hat.shape[0], *z_hat.shape[2:])

    def lookup(self, indices):
        """(B, h, w) int64 in [0, K) -> z_q (B, n_z, h, w) float32."""
        return F.embedding(indices, self.codes).permute(0, 3, 1, 2).contiguous()

    @torch.compiler.disable  # --compile: random keys, collectives and branches on the step stay outside
    def forward(self, z_hat, global_probs=None):
        """Quantizes and returns the unweighted latent terms of Eq. 2.

        z_hat:        (B, n_z, h, w)
        global_probs: (K,), D_bar of the whole global batch where the caller accumulates gradients over
                      micro-batches; None takes the mean over processes
        returns:      z_st (B, n_z, h, w) float32, the codes with the gradient of z_hat;
                      indices (B, h, w) int64; dict of float32 scalars: `loss_codebook` moves the codes
                      only, `loss_commit` the encoder only (Eq. 2 puts beta here), `loss_entropy` both
        """
        c, (B, n_z, h, w) = self.config, z_hat.shape
        with torch.autocast(z_hat.device.type, enabled=False):
            z, codes = self.flatten(z_hat), self.codes  # (M, n_z), (K, n_z)
            with torch.set_grad_enabled(torch.is_grad_enabled() and c.codebook in ("entropy", "fq")):
                distances = code_distances(z, codes, c.distance)  # (M, K)
            squared = distances if c.distance == "squared" else code_distances(z, codes)  # a root makes ties
            indices = squared.argmin(1)  # (M,), as in `quantize`
            if self.training and self.collecting:
                self._fill_reservoir(z.detach())
            if self.bypass and self.training:
                z_st, nothing = z, 0 * codes.sum()  # the codebook stays in the graph, as DDP wants
                losses = {"loss_codebook": nothing, "loss_commit": nothing}
            else:
                z_q = F.embedding(indices, codes)
                z_st = z_q.detach() + (z - z.detach())  # exactly z_q forwards, the identity backwards
                losses = {
                    "loss_codebook": F.mse_loss(z_q, z.detach()),
                    "loss_commit": F.mse_loss(z, z_q.detach()),
                }
            if c.codebook == "entropy" and not self.bypass:
                losses["loss_entropy"] = self._entropy_loss(distances, B, global_probs)
            if c.codebook == "fq" and not self.bypass:  # sure about each vector, even over all of them
                losses["loss_entropy"] = self._entropy_loss(distances / FQ_TEMPERATURE, B, global_probs)
                losses["loss_entropy"] += vector_entropy(distances / FQ_TEMPERATURE)
        return z_st.view(B, h, w, n_z).permute(0, 3, 1, 2).contiguous(), indices.view(B, h, w), losses

    def _entropy_loss(self, distances, batch, global_probs):
        """H is not linear in D_bar, so a mean of local entropies would be wrong: the value is taken at the
        global mean, with the local gradient. After the usual averaging it equals one large batch (I12)."""
        if self.config.entropy_set == "image":
            return entropy_loss(average_probs(distances.view(batch, -1, distances.shape[1])))
        probs = average_probs(distances)
        if global_probs is None:
            global_probs = all_reduce_mean(probs.detach())
        return entropy_loss(probs + (global_probs - probs).detach())

    @torch.no_grad()
    def probs(self, z_hat):
        """D_bar over the vectors of one micro-batch: (B, n_z, h, w) -> (K,) float32. No gradient."""
        with torch.autocast(z_hat.device.type, enabled=False):
            distances = code_distances(self.flatten(z_hat), self.codes, self.config.distance)
            return average_probs(distances / (FQ_TEMPERATURE if self.config.codebook == "fq" else 1))

    # K-means re-estimation (Table 5): offline clustering of a uniform sample of encoder outputs -------------

    def start_step(self, step):
        """Called once before each training step (0-based). True if the codebook was just overwritten, so
        that the caller resets its optimizer moments. Without K-means nothing happens."""
        self.bypass = bool(self.reestimations) and step < self.reestimations[0]
        self.collecting = bool(self.reestimations) and step < self.reestimations[-1]
        self.key_seed = step << 20
        return step in self.reestimations and self.reestimate(seed=step)

    @torch.no_grad()
    def _fill_reservoir(self, z):
        """Keeps the vectors with the largest random keys, a uniform sample of all seen since the last
        re-estimation. The keys depend on the step alone, so all processes agree."""
        if dist.is_available() and dist.is_initialized():
            parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, z.contiguous())
            z = torch.cat(parts)
        keys = torch.rand(len(z), generator=torch.Generator().manual_seed(self.key_seed)).to(z.device)
        fine = z.isfinite().all(1)  # one bad step must not end up in the codebook
        z, keys = z.where(fine[:, None], 0), keys.where(fine, -1)
        keys, keep = torch.cat([self.reservoir_keys, keys]).topk(self.RESERVOIR)
        self.reservoir.copy_(torch.cat([self.reservoir, z])[keep])
        self.reservoir_keys.copy_(keys)
        self.key_seed += 1

    @torch.no_grad()
    def reestimate(self, seed):
        """Overwrites the codebook by the K-means centres of the reservoir and empties it.

        returns False, and changes nothing, while the reservoir holds fewer than K vectors."""
        vectors = self.reservoir[self.reservoir_keys >= 0]
        if len(vectors) < self.config.codebook_size:
            return False
        self.codebook.weight.copy_(kmeans(vectors, self.config.codebook_size, seed))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.codebook.weight.data, 0)
        self.reservoir_keys.fill_(-1)
        return True


@torch.no_grad()
def kmeans(x, num_centres, seed, iterations=10):
    """Lloyd's algorithm from a k-means++ start: (M, n) float32 -> (num_centres, n)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.empty(num_centres, x.shape[1], device=x.device)
    gap = torch.full((len(x),), 1.0, device=x.device)  # squared distance to the nearest centre so far
    for i in range(num_centres):
        weights = (gap if gap.sum() > 0 else torch.ones_like(gap)).cpu()
        centres[i] = x[torch.multinomial(weights, 1, generator=generator).item()]
        to_new = (x - centres[i]).square().sum(1)
        gap = to_new if i == 0 else torch.minimum(gap, to_new)
    for _ in range(iterations):
        nearest = code_distances(x, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=num_centres).unsqueeze(1)
        means = torch.zeros_like(centres).index_add_(0, nearest, x) / counts.clamp(min=1)
        centres = torch.where(counts > 0, means, centres)  # an empty cluster keeps its centre
    return centres


def count_codes(tokens, codebook_size):
    """Histogram of code indices: tokens (B, N) -> (K,), or (B, N, k) -> (k, K), one for each sub-codebook."""
    if tokens.dim() == 2:
        return tokens.flatten().bincount(minlength=codebook_size)
    return torch.stack([count_codes(part, codebook_size) for part in tokens.unbind(2)])


def codebook_usage(counts):
    """Hard usage and perplexity of a histogram of code indices (Tables 2 and 5).

    counts:  (K,), how often each code was chosen over a whole set of images; or (k, K)
    returns: share of codes chosen at least once in [1/K, 1]; exp of the entropy of the histogram in [1, K].
             Of several sub-codebooks the means
    """
    p = counts.double() / counts.sum(-1, keepdim=True)
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum(-1).exp().mean().item()


# ----------------------------------------------------------------------------------------------------------
# FQGAN (arXiv 2411.16681): the fork that shows how forking is done. VQGAN's trunk, and k sub-codebooks, each
# behind a branch of its own. Everything else in this file serves both
# ----------------------------------------------------------------------------------------------------------


class MapAttention(nn.Module):
    """VQGAN's attention over all positions, one head: x + Out(Attn(GN(x))), 4 c^2 + 6 c parameters."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):  # (B, c, H, W) -> (B, c, H, W)
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (B, 1, HW, c)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


def vqgan_stage(a, b, num_blocks, attention):
    """`num_blocks` residual blocks, the first one changing the width, attention after each on demand."""
    layers = []
    for i in range(num_blocks):
        layers.append(ResBlock(a if i == 0 else b, b, bias=True))
        layers += [MapAttention(b)] if attention else []
    return layers


def vqgan_middle(width):
    return [ResBlock(width, bias=True), MapAttention(width), ResBlock(width, bias=True)]


class VQGANEncoder(nn.Module):
    """Images to a map of the widest stage, no latent projection: 28,117,248 parameters at the defaults."""

    def __init__(self, config):
        super().__init__()
        widths, layers = config.widths, [nn.Conv2d(3, config.base_width, 3, padding=1)]
        for i, (a, b) in enumerate(zip([config.base_width, *widths], widths, strict=False)):
            last = i == len(widths) - 1
            layers += vqgan_stage(a, b, config.num_res_blocks, last)
            layers += vqgan_middle(b) if last else [Downsample(b, b)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):  # (B, 3, H, W) -> (B, c, H/f, W/f)
        return self.layers(x)


class VQGANDecoder(nn.Module):
    """Codes (B, n, h, w) to images: a 1x1 convolution from n to `latent` channels, then VQGAN's decoder
    (42,449,795 parameters at the reference widths). `stages` may get SeQ-GAN's attention of phase 2."""

    def __init__(self, config, channels, latent=256):
        super().__init__()
        widths, stages = config.widths[::-1], []
        for i, (a, b) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            side = config.image_size // config.downsample * 2**i
            stage = DecoderStage(b, None, side, 0, config)
            stage.blocks = nn.Sequential(*vqgan_stage(a, b, config.num_res_blocks + 1, i == 0))
            stage.up = Upsample(b, b) if i + 1 < len(widths) else nn.Identity()
            stages.append(stage)
        self.latent = nn.Conv2d(channels, latent, 1)
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.middle = nn.Sequential(*vqgan_middle(widths[0]))
        self.stages, self.norm_out = nn.Sequential(*stages), group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z_q):  # (B, k * n_z, h, w) -> (B, 3, f*h, f*w)
        h = self.stages(self.middle(self.conv_in(self.latent(z_q))))
        return self.conv_out(F.silu(self.norm_out(h)))


class PositionTransformer(nn.Module):
    """Learned positions, LayerNorm, pre-norm blocks of 8 heads, LayerNorm: adapters and feature heads."""

    def __init__(self, positions, width, num_layers):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(positions, width) * width**-0.5)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(num_layers)])

    def forward(self, x):  # (B, positions, width) -> the same
        return self.norm_out(self.blocks(self.norm_in(x + self.positions)))


class Branch(nn.Module):
    """From the trunk to the latent of one sub-codebook: adapter on demand, GN, SiLU, 3x3 and 1x1 conv."""

    def __init__(self, config, latent=256):
        super().__init__()
        width, side = config.widths[-1], config.image_size // config.downsample
        self.adapter = None
        if config.adapter_layers:
            self.adapter = PositionTransformer(side**2, width, config.adapter_layers)
        self.norm, self.conv1 = group_norm(width), nn.Conv2d(width, latent, 3, padding=1)
        self.conv2 = nn.Conv2d(latent, config.codebook_dim, 1)

    def forward(self, h):  # (B, c, h, w) -> (B, n_z, h, w)
        if self.adapter is not None:
            h = self.adapter(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        return self.conv2(self.conv1(F.silu(self.norm(h))))


class FeatureHead(nn.Module):
    """The student of the representation loss: codes of one branch to a vector of the teacher's width."""

    def __init__(self, config, width):
        super().__init__()
        positions = (config.image_size // config.downsample) ** 2
        self.mlp = nn.Sequential(nn.Linear(config.codebook_dim, width), nn.ReLU(), nn.Linear(width, width))
        self.class_vector = nn.Parameter(torch.randn(width) * width**-0.5)
        self.transformer = PositionTransformer(positions + 1, width, 3)

    def forward(self, codes):  # (B, n_z, h, w) -> (B, width), the output at the class position
        h = self.mlp(codes.flatten(2).transpose(1, 2))
        h = torch.cat([self.class_vector.expand(len(h), 1, -1), h], 1)
        return self.transformer(h)[:, 0]


class BranchedEncoder(nn.Module):
    """The trunk, then k branches whose latents are concatenated in index order: (B, k * n_z, h, w)."""

    def __init__(self, config):
        super().__init__()
        self.trunk = VQGANEncoder(config)
        self.branches = nn.ModuleList(Branch(config) for _ in range(config.num_codebooks))

    def forward(self, x):
        h = self.trunk(x)
        return torch.cat([branch(h) for branch in self.branches], 1)


class FactorizedQuantizer(nn.Module):
    """k independent quantizers on k parts of the channels; tokens get a last axis of size k.

    `forward` returns the sums of the losses over the codebooks, and the lists `codes` (straight-through, a
    map for each branch) and `features` (of the branches with a teacher) for FQGAN's two extra losses. Tokens
    of a single codebook are (B, h, w), as VectorQuantizer's.
    """

    def __init__(self, config):
        super().__init__()
        self.parts = nn.ModuleList(VectorQuantizer(config) for _ in range(config.num_codebooks))
        widths = config.teacher_widths or (0,) * config.num_codebooks
        self.heads = nn.ModuleList(FeatureHead(config, width) if width else nn.Identity() for width in widths)

    def quantize(self, z_hat):  # (B, k * n_z, h, w) -> (B, h, w, k) int64
        parts = zip(self.parts, z_hat.chunk(len(self.parts), 1), strict=True)
        return self.join([part.quantize(z) for part, z in parts])

    def join(self, indices):
        return torch.stack(indices, -1) if len(indices) > 1 else indices[0]

    def lookup(self, indices):  # (B, h, w, k) -> (B, k * n_z, h, w)
        indices = indices.unbind(-1) if len(self.parts) > 1 else [indices]
        parts = zip(self.parts, indices, strict=True)
        return torch.cat([part.lookup(index) for part, index in parts], 1)

    def forward(self, z_hat, global_probs=None):
        global_probs = [None] * len(self.parts) if global_probs is None else global_probs
        z_parts = z_hat.chunk(len(self.parts), 1)
        found = [part(z, probs) for part, z, probs in zip(self.parts, z_parts, global_probs, strict=True)]
        codes, indices, losses = zip(*found, strict=True)
        sums = {name: sum(loss[name] for loss in losses) for name in losses[0]}
        heads = zip(self.heads, codes, strict=True)
        sums["codes"] = list(codes)
        sums["features"] = [head(c) for head, c in heads if isinstance(head, FeatureHead)]
        return torch.cat(codes, 1), self.join(list(indices)), sums

    def probs(self, z_hat):
        z_parts = z_hat.chunk(len(self.parts), 1)
        return torch.stack([part.probs(z) for part, z in zip(self.parts, z_parts, strict=True)])

    def start_step(self, step):
        return any([part.start_step(step) for part in self.parts])


# ----------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------


class VQTokenizer(nn.Module):
    """Encoder, quantizer and decoder (Eq. 1); 54,532,867 parameters in phase 1, 57,948,419 in phase 2."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.trunk == "vqgan":
            self.encoder, self.quantizer = BranchedEncoder(config), FactorizedQuantizer(config)
            self.decoder = VQGANDecoder(config, config.num_codebooks * config.codebook_dim)
        else:
            self.encoder, self.quantizer = Encoder(config), VectorQuantizer(config)
            self.decoder = Decoder(config)
        self.frozen = False

    @property
    def codebook_size(self):
        return self.config.codebook_size

    @property
    def grid_size(self):
        """Side of the token grid at the configured image size; the priors model grid_size^2 positions."""
        return self.config.image_size // self.config.downsample

    @property
    def token_shape(self):
        """What tokens of an image have: (N,), or (N, k) with k > 1 sub-codebooks."""
        return (self.grid_size**2, self.config.num_codebooks)[: 1 + (self.config.num_codebooks > 1)]

    def encode(self, x):
        """Images to tokens: (B, 3, H, W) in [-1, 1] -> (B, N) int64 in [0, K), raster order. No gradient.

        With k > 1 sub-codebooks (B, N, k).  raises: ValueError unless H and W are divisible by f.
        """
        self._check(x)
        with torch.no_grad():
            return self.quantizer.quantize(self.encoder(x)).flatten(1, 2)

    def decode(self, tokens):
        """Tokens to images: (B, N) or (B, N, k) int64 in [0, K) -> (B, 3, H, W), about [-1, 1], not clamped.

        raises: ValueError unless N is a square number (grids of other forms: use `decoder`).
        """
        k, N = self.config.num_codebooks, tokens.shape[1] if tokens.dim() > 1 else 0
        side = math.isqrt(N)
        if tokens.shape[2:] != ((k,) if k > 1 else ()) or side * side != N or not N:
            form = f"(B, N, {k})" if k > 1 else "(B, N)"
            raise ValueError(f"tokens must be {form} with a square N, got {tuple(tokens.shape)}")
        z_q = self.quantizer.lookup(tokens.unflatten(1, (side, side)))
        return self.decoder(z_q.to(self.decoder.conv_out.weight.dtype))  # which may be bf16 for sampling

    @torch.no_grad()
    def code_maps(self, tokens):
        """FQGAN: tokens (B, N, k) -> the codes of each sub-codebook, k maps (B, n_z, h, w)."""
        side = math.isqrt(tokens.shape[1])
        return self.quantizer.lookup(tokens.unflatten(1, (side, side))).chunk(self.config.num_codebooks, 1)

    @torch.no_grad()
    def decode_alone(self, tokens, i):
        """FQGAN: images from sub-codebook i alone; the codes of the others are zeros."""
        maps = enumerate(self.code_maps(tokens))
        maps = [codes if j == i else torch.zeros_like(codes) for j, codes in maps]
        return self.decoder(torch.cat(maps, 1))

    def forward(self, x, global_probs=None):
        """Reconstruction for training: x_hat (B, 3, H, W), tokens (B, N) or (B, N, k), and a dict of latent
        losses (Eq. 2), in which FQGAN's quantizer leaves its lists `codes` and `features` too.

        After `freeze_latent_space` the dict is empty: phase 2 trains the decoder on fixed tokens.
        """
        self._check(x)
        if self.frozen:
            with torch.no_grad():
                indices = self.quantizer.quantize(self.encoder(x))
            return self.decoder(self.quantizer.lookup(indices)), indices.flatten(1, 2), {}
        z_st, indices, losses = self.quantizer(self.encoder(x), global_probs)
        return self.decoder(z_st), indices.flatten(1, 2), losses

    def _check(self, x):
        f = self.config.downsample
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"images must be (B, 3, H, W) with sides divisible by {f}, got {tuple(x.shape)}")

    def freeze_latent_space(self):
        """Second phase (Sec. 3.3): encoder and codebook get no gradients and stay in eval mode."""
        self.frozen = True
        self.encoder.requires_grad_(False)
        self.quantizer.requires_grad_(False)
        return self.train(self.training)

    def add_attention(self, num=1):
        """Second phase: `num` more B&D units per decoder stage, which change nothing at step 0."""
        self.config.num_attention += num
        for i, stage in enumerate(self.decoder.stages):
            width = self.config.widths[-1 - i]
            units = attention_units(width, self.grid_size * 2**i, self.config, num)
            stage.attention.extend(units.to(self.decoder.conv_out.weight.device))

    def start_step(self, step):
        """Called before each training step: the parameters that were just overwritten, usually none."""
        if self.frozen or not self.quantizer.start_step(step):
            return []
        return [module.codebook.weight for module in self.modules() if isinstance(module, VectorQuantizer)]

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            self.quantizer.eval()
        return self

    @torch.no_grad()
    def average_probs(self, x):
        """D_bar of one micro-batch, (K,) or with trunk="vqgan" (k, K), for `global_probs` of `forward`; None
        without the entropy term."""
        used = self.config.codebook in ("entropy", "fq") and self.config.entropy_set == "batch"
        if self.frozen or not used:
            return None
        return self.quantizer.probs(self.encoder(x))
