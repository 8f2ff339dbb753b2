"""VQGAN's own encoder and decoder, with attention at the lowest resolution (arXiv 2012.09841)."""

import torch.nn.functional as F
from torch import nn

from plumbing.fast import group_norm
from tokenizer import DecoderStage, Downsample, Upsample


class WideBlock(nn.Module):
    """Residual block a -> b with biases, and a 1x1 convolution as shortcut where the width changes."""

    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = group_norm(a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = group_norm(b), nn.Conv2d(b, b, 3, padding=1)
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):  # (B, a, H, W) -> (B, b, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


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
        layers.append(WideBlock(a if i == 0 else b, b))
        layers += [MapAttention(b)] if attention else []
    return layers


def vqgan_middle(width):
    return [WideBlock(width, width), MapAttention(width), WideBlock(width, width)]


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
