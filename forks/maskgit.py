"""Opens MaskGIT's tokenizer (arXiv 2202.04200) as open-muse published it; modules have its names."""

import torch.nn.functional as F
from torch import nn

from forks.vqgan import sizes_of
from plumbing.models import as_checkpoint
from tokenizer import VQTokenizer, attention_units

FAMILY = "open-muse's MaskGIT tokenizer"


class Block(nn.Module):
    """No biases. Where the width changes, the shortcut comes from the block's own output, as published."""

    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, a, eps=1e-6), nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(32, b, eps=1e-6), nn.Conv2d(b, b, 3, padding=1, bias=False)
        if a != b:
            self.nin_shortcut = nn.Conv2d(b, b, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class Stage(nn.Module):
    def __init__(self, a, b, num, up=False):
        super().__init__()
        self.block = nn.Sequential(*[Block(a if i == 0 else b, b) for i in range(num)])
        if up:
            self.upsample_conv = nn.Conv2d(b, b, 3, padding=1)


class MaskGITEncoder(nn.Module):
    """The published network sees images in [0, 1]."""

    def __init__(self, config):
        super().__init__()
        widths, base, n = config.widths, config.base_width, config.num_res_blocks
        self.conv_in = nn.Conv2d(3, base, 3, padding=1, bias=False)
        self.down = nn.Sequential(*[Stage(a, b, n) for a, b in zip([base, *widths], widths, strict=False)])
        self.mid = nn.Sequential(*[Block(widths[-1], widths[-1]) for _ in range(n)])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.codebook_dim, 1)

    def forward(self, x):  # (B, 3, H, W) in [-1, 1] -> (B, n_z, H/f, W/f)
        h = self.conv_in((x + 1) / 2)
        for i, stage in enumerate(self.down):
            h = stage.block(h if i == 0 else F.avg_pool2d(h, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class MaskGITDecoder(nn.Module):
    """`stages` may get SeQ-GAN's attention of phase 2, each before it doubles the side."""

    def __init__(self, config):
        super().__init__()
        widths, base, n = config.widths, config.base_width, config.num_res_blocks
        above = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.codebook_dim, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(*[Block(widths[-1], widths[-1]) for _ in range(n)])
        self.up = nn.Sequential(*[Stage(a, b, n, i > 0) for i, (a, b) in enumerate(
            zip(above, widths, strict=True))])  # from the finest
        self.norm_out = nn.GroupNorm(32, base, eps=1e-6)
        self.conv_out = nn.Conv2d(base, 3, 3, padding=1)
        for i, stage in enumerate(self.stages):
            side = config.image_size // config.downsample * 2**i
            stage.attention = attention_units(widths[-1 - i], side, config.num_attention)

    @property
    def stages(self):
        return [*reversed(self.up)]  # from the coarsest

    def forward(self, z_q):  # (B, n_z, h, w) -> (B, 3, f*h, f*w), about [-1, 1]
        h = self.mid(self.conv_in(z_q))
        for stage in self.stages:
            h = stage.attention(stage.block(h))
            if hasattr(stage, "upsample_conv"):
                h = stage.upsample_conv(F.interpolate(h, scale_factor=2.0))
        return 2 * self.conv_out(F.silu(self.norm_out(h))) - 1


class MaskGITTokenizer(VQTokenizer):
    Encoder, Decoder = MaskGITEncoder, MaskGITDecoder
    UNREAD = ("num_mid_blocks", "decoder_extra_blocks", "bias", "latent_kernel")


def opened(state):
    """Our checkpoint of a published state dict, or None if it is none of this family."""
    if "encoder.mid.0.conv1.weight" not in state or "encoder.conv_in.bias" in state:
        return None
    sizes = dict(sizes_of(state, "encoder.down.{}.block.{}"), codebook="plain")
    sizes.pop("z_channels")
    weights = dict(state)
    weights["quantizer.codebook.weight"] = weights.pop("quantize.embedding.weight")  # sizes_of saw it
    return as_checkpoint("maskgit", sizes, weights, FAMILY)


def parts():
    return dict(tokenizer=MaskGITTokenizer)


PRESETS = {}
