"""The SeQ-GAN tokenizer: image -> grid of code indices -> image (Sec. 3.1.1; Table 7 of arXiv 2212.03185).

In reading order: blocks, the attention of the second phase, encoder and decoder, the quantizer (Eq. 1, Eq. 2,
Sec. 3.4), and `VQTokenizer`, which joins them and which a fork subclasses (docs/forking.md). All else uses
only its `encode(x) -> tokens`, `decode(tokens) -> x_hat`, `codebook_size` and `token_shape`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.fast import GroupNorm, attention
from plumbing.kmeans import OfflineKMeans
from plumbing.processes import all_reduce_mean, full_float32

ALLOWED = dict(
    codebook=("plain", "entropy", "fn", "kmeans"),  # the four rows of Table 5
    distance=("squared", "l2"), entropy_set=("batch", "image"), latent_kernel=(1, 3))


@dataclass
class TokenizerConfig:
    """Everything that fixes the shape of a tokenizer. The defaults are the paper's first phase (54.5M).

    raises: ValueError for a value outside `ALLOWED`, no channel left, or a side that f does not divide
    """

    image_size: int = 256
    base_width: int = 128
    channel_mult: tuple = (1, 1, 2, 2, 4)  # widths of the stages f1..f5; f = 2^(stages - 1)
    num_res_blocks: int = 2  # per stage; the lowest stage has `num_mid_blocks` more, VQGAN's middle blocks
    num_mid_blocks: int = 2
    decoder_extra_blocks: int = 0  # 2 is "+Conv x2" of Table 1
    num_attention: int = 0  # B&D units per decoder stage: 1 in the second phase, 2 is "+Attention x2"
    codebook: str = "entropy"  # a row of Table 5
    codebook_size: int = 1024  # K
    codebook_dim: int = 256  # n_z
    distance: str = "squared"  # inside the softmax of the entropy term; or "l2" (decision I11)
    entropy_set: str = "batch"  # average over the global batch, or "image", the literal reading (I12)
    kmeans_warmup: int = 10_000  # codebook="kmeans": iterations without quantization (I20), then
    kmeans_every: int = 2_000  # a re-estimation every so many iterations
    kmeans_last: int = 30_000  # until this one
    warm_start: int = 0  # other codebooks: iterations without quantization before one K-means (ours)
    bias: bool = False  # biases in the block convs and q/k/v as well (I4): 54,547,203 parameters
    latent_kernel: int = 1  # 3 for 3x3 convs into and out of the latent (I2)

    def __post_init__(self):
        self.channel_mult = tuple(self.channel_mult)
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if min(self.widths, default=0) < 1:
            raise ValueError(f"base_width {self.base_width}, channel_mult {self.channel_mult} leave no width")
        below, f = self.image_size // self.downsample * self.downsample, self.downsample
        if below != self.image_size:
            raise ValueError(f"image side {self.image_size} is not divisible by the downsampling factor f = "
                             f"{f}; the nearest sides are {below} and {below + f}")

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


def group_norm(channels):
    """GroupNorm of 32 groups, fewer where a group would have less than 4 channels (as at width 32). With one
    channel a group every map loses its mean: colour is gone."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and (channels >= 4 * g or g == 1))
    return GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block, 18 c^2 + 4 c parameters. Channels change in Down/Up only, so there is no shortcut
    convolution (I3)."""

    def __init__(self, channels, bias=False):
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x):  # (B, c, H, W) -> (B, c, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


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
# Block-regional and dilated attention (Sec. 3.4, second phase; the idea is HiT's)
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

    q, k, v: (B, heads, d, H, W);  returns the same shape;  kind: "regional" or "dilated"
    """
    H, W = q.shape[-2:]
    q, k, v = (to_windows(t, block, kind) for t in (q, k, v))
    return from_windows(attention(q, k, v), block, kind, H, W)


class BlockAttention(nn.Module):
    """One attention layer x + Out(Attn(GN(x))), regional or dilated (Sec. 3.4); 4 c^2 + 3 c parameters.

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


def attention_units(channels, side, num, bias=False):
    """`num` B&D units in a row, each a regional and then a dilated layer: 8 c^2 + 6 c parameters (I5)."""
    kinds = ("regional", "dilated") * num
    return nn.Sequential(*[BlockAttention(channels, side, kind, bias) for kind in kinds])


# ----------------------------------------------------------------------------------------------------------
# Encoder and decoder (Table 7)
# ----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """E of Eq. 1: images to z_hat. 27,135,872 parameters by default."""

    def __init__(self, config):
        super().__init__()
        widths, k, stages = config.widths, config.latent_kernel, []
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            num_blocks = config.num_res_blocks + (config.num_mid_blocks if last else 0)
            stage = [ResBlock(width, bias=config.bias) for _ in range(num_blocks)]
            stages.append(nn.Sequential(*stage, *([] if last else [Downsample(width, widths[i + 1])])))
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
        self.attention = attention_units(width, side, config.num_attention, config.bias)
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


def code_distances(z, codes):
    """Squared distances D_ik of Sec. 3.4 between vectors z (M, n_z) and codes (K, n_z): (M, K) float32.

    |z_i|^2 is left out: it is constant in k, so neither the argmin nor softmax_k(-D) sees it.
    """
    return torch.addmm(codes.square().sum(1), z, codes.T, alpha=-2)


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


class VectorQuantizer(nn.Module):
    """Nearest-code lookup with straight-through gradient (Eq. 1) and the latent terms of Eq. 2.

    Its forward pass is full float32. `config.codebook` is a row of Table 5: "plain" VQGAN, "entropy"
    with the term of Sec. 3.4, "fn" with unit vectors (n_z = 32, K = 8192 there), "kmeans" `KMeansQuantizer`.
    """

    READS = ("codebook", "distance", "entropy_set")  # of TokenizerConfig; a subclass may read fewer
    MOST_DISTANCES = 2**26  # that `quantize` holds at a time, 256 MiB
    global_probs = None  # (K,), D_bar of a batch in several micro-batches (plumbing/parallel.py: begin_step)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        if config.codebook == "fn":
            nn.init.normal_(self.codebook.weight)
        else:
            nn.init.uniform_(self.codebook.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    def normalize(self, x):
        return F.normalize(x, dim=-1) if self.config.codebook == "fn" else x

    @property
    def codes(self):
        """(K, n_z) float32, the codes as they are compared and looked up."""
        return self.normalize(self.codebook.weight.float())

    def flatten(self, z_hat):
        """(B, n_z, h, w) in any float type -> (M, n_z) float32."""
        return self.normalize(z_hat.float().permute(0, 2, 3, 1).reshape(-1, z_hat.shape[1]))

    def quantize(self, z_hat):
        """Indices of the nearest codes (Eq. 1): (B, n_z, h, w) -> (B, h, w) int64. No gradient."""
        with torch.no_grad(), full_float32(z_hat):
            codes, z = self.codes, self.flatten(z_hat)
            chunks = z.split(max(1, self.MOST_DISTANCES // len(codes)))
            indices = torch.cat([code_distances(chunk, codes).argmin(1) for chunk in chunks])
        return indices.view(z_hat.shape[0], *z_hat.shape[2:])

    def lookup(self, indices):
        """(B, h, w) int64 in [0, K) -> z_q (B, n_z, h, w) float32."""
        return F.embedding(indices, self.codes).permute(0, 3, 1, 2).contiguous()

    def forward(self, z_hat):
        """Quantizes z_hat (B, n_z, h, w) and returns the unweighted latent terms of Eq. 2.

        returns: z_st (B, n_z, h, w) float32, the codes with the gradient of z_hat; indices (B, h, w) int64;
                 dict of float32 scalars: `loss_codebook` moves the codes only, `loss_commit` the encoder
                 only (Eq. 2 puts beta here), `loss_entropy` both
        """
        B, n_z, h, w = z_hat.shape
        with full_float32(z_hat):
            z, codes = self.flatten(z_hat), self.codes  # (M, n_z), (K, n_z)
            distances = code_distances(z, codes)  # (M, K)
            indices = distances.argmin(1)  # Eq. 1
            z_q = F.embedding(indices, codes)
            z_st = z_q.detach() + (z - z.detach())  # exactly z_q forwards, the identity backwards
            losses = dict(
                loss_codebook=F.mse_loss(z_q, z.detach()),  # |sg(z_hat) - z_q|^2 of Eq. 2
                loss_commit=F.mse_loss(z, z_q.detach()))  # |sg(z_q) - z_hat|^2
            if self.config.codebook == "entropy":
                losses["loss_entropy"] = self.usage_loss(distances, z, B)  # Sec. 3.4
        return z_st.view(B, h, w, n_z).permute(0, 3, 1, 2).contiguous(), indices.view(B, h, w), losses

    def softmax_distances(self, distances, z):
        """The distances inside the softmax of Sec. 3.4: squared, or the root of them (I11)."""
        if self.config.distance == "squared":
            return distances
        return (distances + z.square().sum(1, keepdim=True)).clamp(min=0).add(1e-12).sqrt()

    def usage_loss(self, distances, z, batch):
        """`entropy_loss` at the global D_bar, with the local gradient: (M, K) -> scalar (Sec. 3.4, I12).

        H is not linear in D_bar, so a mean of the entropies of processes or micro-batches would be wrong.
        """
        distances = self.softmax_distances(distances, z)
        if self.config.entropy_set == "image":
            return entropy_loss(average_probs(distances.view(batch, -1, distances.shape[1])))
        probs = average_probs(distances)
        mean = all_reduce_mean(probs.detach()) if self.global_probs is None else self.global_probs
        return entropy_loss(probs + (mean - probs).detach())

    @torch.no_grad()
    def probs(self, z_hat):
        """D_bar over the vectors of one micro-batch: (B, n_z, h, w) -> (K,) float32. No gradient."""
        with full_float32(z_hat):
            z = self.flatten(z_hat)
            return average_probs(self.softmax_distances(code_distances(z, self.codes), z))


class KMeansQuantizer(OfflineKMeans, VectorQuantizer):
    """Table 5, "+ K-means": the codebook is re-estimated from encoder outputs; also our warm start."""


# ----------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------


class VQTokenizer(nn.Module):
    """Encoder, quantizer and decoder (Eq. 1); 54,532,867 parameters in phase 1, 57,948,419 in phase 2.

    A subclass may name other parts, and in WEIGHTS losses of its own that `forward` returns: each weighs a
    number, or what a value of the phase is called. `train.py` weights the paper's three itself.
    """

    Config, Encoder, Quantizer, Decoder = TokenizerConfig, Encoder, VectorQuantizer, Decoder
    WEIGHTS = {}

    def __init__(self, config):
        super().__init__()
        self.config, Quantizer = config, self.Quantizer
        if Quantizer is VectorQuantizer and (config.codebook == "kmeans" or config.warm_start):
            Quantizer = KMeansQuantizer
        self.encoder, self.quantizer = self.Encoder(config), Quantizer(config)
        self.decoder, self.frozen = self.Decoder(config), False
        self.codebook_size = config.codebook_size  # K
        self.grid_size = config.image_size // config.downsample  # h = w
        self.token_shape = (self.grid_size**2,)  # of the tokens of one image: (N,)

    def prepare(self, run):
        """Called once before training. A fork fetches here what its losses need besides."""

    def encode(self, x):
        """Images to tokens: (B, 3, H, W) in [-1, 1] -> (B, N) int64 in [0, K), raster order. No gradient.

        raises: ValueError unless H and W are divisible by f.
        """
        self._check(x)
        with torch.no_grad():
            return self.quantizer.quantize(self.encoder(x)).flatten(1, 2)

    def decode(self, tokens):
        """Tokens to images: (B, N) int64 in [0, K) -> (B, 3, H, W), about [-1, 1], not clamped.

        raises: ValueError unless N is a square number (grids of other forms: use `decoder`).
        """
        side = math.isqrt(tokens.shape[1]) if tokens.dim() > 1 else 0
        if not side or tokens.shape[1:] != (side**2, *self.token_shape[1:]):
            raise ValueError(f"tokens must be (B, *{self.token_shape}), or of another square number of "
                             f"positions, got {tuple(tokens.shape)}")
        z_q = self.quantizer.lookup(tokens.unflatten(1, (side, side)))
        return self.decoder(z_q.to(self.decoder.conv_out.weight.dtype))  # which may be bf16 for sampling

    def forward(self, x):
        """For training: x (B, 3, H, W) in [-1, 1] -> x_hat of its shape, tokens (B, N), and a dict of the
        unweighted latent losses (Eq. 2). After `freeze_latent_space` it is empty: phase 2 has fixed tokens.
        """
        self._check(x)
        if self.frozen:
            with torch.no_grad():
                indices = self.quantizer.quantize(self.encoder(x))
            return self.decoder(self.quantizer.lookup(indices)), indices.flatten(1, 2), {}
        z_st, indices, losses = self.quantizer(self.encoder(x))
        return self.decoder(z_st), indices.flatten(1, 2), losses

    def _check(self, x):
        f = self.config.downsample
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"images must be (B, 3, H, W) with sides divisible by {f}, got {tuple(x.shape)}")

    def freeze_latent_space(self):
        """Second phase (Sec. 3.4): encoder and codebook get no gradients and stay in eval mode."""
        self.frozen = True
        self.encoder.requires_grad_(False)
        self.quantizer.requires_grad_(False)
        return self.train(self.training)

    def add_attention(self, num=1):
        """Second phase (Sec. 3.4): `num` more B&D units per decoder stage, which change nothing at step 0."""
        self.config.num_attention += num
        for i, stage in enumerate(self.decoder.stages):
            width = self.config.widths[-1 - i]
            units = attention_units(width, self.grid_size * 2**i, num, self.config.bias)
            stage.attention.extend(units.to(self.decoder.conv_out.weight.device))

    def start_step(self, step):
        """Called before each training step: the parameters that were just overwritten, usually none."""
        started = getattr(self.quantizer, "start_step", None)  # K-means has a schedule
        return started(step) if started and not self.frozen else []

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            self.quantizer.eval()
        return self
