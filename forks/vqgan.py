"""VQGAN's own tokenizer, with attention at the lowest resolution (arXiv 2012.09841): a fork, the trunk of
FQGAN's, and what opens the published checkpoints of its family (taming.py, llamagen.py)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.errors import UserError
from recipes.small import of_fork
from tokenizer import DecoderStage, Downsample, TokenizerConfig, Upsample, VQTokenizer, group_norm


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


@dataclass
class VQGANConfig(TokenizerConfig):
    z_channels: int = 256  # before and after the 1x1 convolutions to and from the codes


class VQGANLatentEncoder(VQGANEncoder):
    """Down to the codes' channels: GN, SiLU, 3x3 to `z_channels`, 1x1 to n_z."""

    def __init__(self, config):
        super().__init__(config)
        self.norm_out = group_norm(config.widths[-1])
        self.conv_out = nn.Conv2d(config.widths[-1], config.z_channels, 3, padding=1)
        self.latent = nn.Conv2d(config.z_channels, config.codebook_dim, 1)

    def forward(self, x):  # (B, 3, H, W) -> (B, n_z, H/f, W/f)
        return self.latent(self.conv_out(F.silu(self.norm_out(super().forward(x)))))


class VQGANLatentDecoder(VQGANDecoder):
    def __init__(self, config):
        super().__init__(config, config.codebook_dim, config.z_channels)


class VQGANTokenizer(VQTokenizer):
    Config, Encoder, Decoder = VQGANConfig, VQGANLatentEncoder, VQGANLatentDecoder
    UNREAD = ("num_mid_blocks", "decoder_extra_blocks", "bias", "latent_kernel")  # SeQ-GAN's own blocks do


def parts():
    return dict(tokenizer=VQGANTokenizer)


PRESETS = of_fork("vqgan", tokenizer=dict(z_channels=64))


# ----------------------------------------------------------------------------------------------------------
# Published checkpoints: their names, in the order of our modules
# ----------------------------------------------------------------------------------------------------------


class Weights:
    """A state dict that is taken apart, tensor by tensor; a UserError names a key that is not there."""

    def __init__(self, state, of):
        self.left, self.of = dict(state), of

    def take(self, key):
        if key not in self.left:
            raise UserError(f"these are no weights of {self.of}: there is no {key}")
        return self.left.pop(key)

    def layer(self, name, theirs):
        """{our name: tensor} of a layer with weight and bias"""
        return {f"{name}.{part}": self.take(f"{theirs}.{part}") for part in ("weight", "bias")}

    def module(self, name, module, theirs):
        """{our name: tensor} of one of the modules above, whatever the family calls it"""
        if isinstance(module, MapAttention):
            found = self.layer(f"{name}.norm", f"{theirs}.norm")
            found |= self.layer(f"{name}.out", f"{theirs}.proj_out")
            qkv = [self.layer("", f"{theirs}.{one}") for one in "qkv"]
            return found | {f"{name}.qkv{part}": torch.cat([one[part] for one in qkv]) for part in qkv[0]}
        if isinstance(module, WideBlock):
            found = {}
            for part in ("norm1", "conv1", "norm2", "conv2"):
                found |= self.layer(f"{name}.{part}", f"{theirs}.{part}")
            wider = isinstance(module.shortcut, nn.Conv2d)
            return found | (self.layer(f"{name}.shortcut", f"{theirs}.nin_shortcut") if wider else {})
        inner = ".conv" if isinstance(module, Downsample | Upsample) else ""
        return self.layer(name + inner, theirs + inner)


def sizes_of(state, block):
    """VQGANConfig's sizes from the shapes of a published state dict; block: the form of the name of an
    encoder's block, of stage and number"""
    widths, stage = [], 0
    while f"{block.format(stage, 0)}.conv1.weight" in state:
        widths.append(state[f"{block.format(stage, 0)}.conv1.weight"].shape[0])
        stage += 1
    if not widths:
        raise UserError(f"these are no weights of VQGAN: there is no {block.format(0, 0)}.conv1.weight")
    weights = Weights(state, "VQGAN")
    base, latent = (weights.take(f"encoder.{name}.weight").shape[0] for name in ("conv_in", "conv_out"))
    K, n_z = weights.take("quantize.embedding.weight").shape
    number = sum(f"{block.format(0, j)}.conv1.weight" in state for j in range(99))
    return dict(base_width=base, channel_mult=[width // base for width in widths], num_res_blocks=number,
                codebook_size=K, codebook_dim=n_z, z_channels=latent)


def converted(state, sizes, names, family, left_out):
    """Our state dict of a VQGANTokenizer of `sizes` from a published one.

    names:    dict of `down` and `up`, the forms of the stages' names, `block`, a block's word in them, and
              `middle`, three names; `finest_first`: whether the decoder's stages are counted from the finest
    left_out: beginnings of keys that generation does not need, as losses and the discriminator
    raises:   UserError for a key that is missing, and for one that nothing here reads
    """
    with torch.device("meta"):
        model = VQGANTokenizer(VQGANConfig(image_size=256, **sizes))
    weights, found, last = Weights(state, family), {}, len(sizes["channel_mult"]) - 1
    layers = iter(model.encoder.layers.named_children())

    def blocks(stage, number, attended):
        kinds = [names["block"], "attn"] if attended else [names["block"]]
        return [f"{stage}.{kind}.{j}" for j in range(number) for kind in kinds]

    def take(prefix, pairs, theirs):
        for name in theirs:
            own, module = next(pairs)
            found.update(weights.module(f"{prefix}.{own}", module, name))

    take("encoder.layers", layers, ["encoder.conv_in"])
    for i in range(last + 1):
        stage = names["down"].format(i)
        take("encoder.layers", layers, blocks(stage, sizes["num_res_blocks"], i == last))
        take("encoder.layers", layers, [f"{stage}.downsample"] if i < last else [])
    take("encoder.layers", layers, [f"encoder.{name}" for name in names["middle"]])
    take("decoder.middle", iter(model.decoder.middle.named_children()),
         [f"decoder.{name}" for name in names["middle"]])
    for i, ours in enumerate(model.decoder.stages):
        stage = names["up"].format(last - i if names["finest_first"] else i)
        take(f"decoder.stages.{i}.blocks", iter(ours.blocks.named_children()),
             blocks(stage, sizes["num_res_blocks"] + 1, i == 0))
        if i < last:
            found |= weights.module(f"decoder.stages.{i}.up", ours.up, f"{stage}.upsample")
    for name in ("encoder.norm_out", "encoder.conv_out", "decoder.conv_in", "decoder.norm_out",
                 "decoder.conv_out"):
        found |= weights.layer(name, name)
    found |= weights.layer("encoder.latent", "quant_conv")
    found |= weights.layer("decoder.latent", "post_quant_conv")
    found["quantizer.codebook.weight"] = weights.take("quantize.embedding.weight")
    strange = [key for key in weights.left if not key.startswith(tuple(left_out))]
    if strange:
        raise UserError(f"these are no weights of {family}: it has no {strange[0]}")
    return found
