"""Opens the VQGAN checkpoints of taming-transformers (arXiv 2012.09841): `model.ckpt` of ImageNet, f = 16."""

from torch import nn

from forks.vqgan import VQGANTokenizer, converted, sizes_of
from plumbing.models import as_checkpoint

ENCODER = ("encoder.down.{}.block.{}", "encoder.down.{}.attn.{}", "encoder.down.{}.downsample",
           ["encoder.mid.block_1", "encoder.mid.attn_1", "encoder.mid.block_2"])
DECODER = ("decoder.up.{}.block.{}", "decoder.up.{}.attn.{}", "decoder.up.{}.upsample",
           ["decoder.mid.block_1", "decoder.mid.attn_1", "decoder.mid.block_2"])
FAMILY = "taming-transformers"
NAMES = ENCODER, DECODER, lambda i, L: L - 1 - i  # the decoder's stages are counted from the finest


class TamingTokenizer(VQGANTokenizer):
    """Plain nearest codes; every GroupNorm has 32 groups, however narrow."""

    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = 32


def opened(state):
    """Our checkpoint of a published state dict, or None if it is none of this family."""
    if "encoder.mid.block_1.norm1.weight" not in state:
        return None
    sizes = sizes_of(state, ENCODER[0])
    weights = converted(state, sizes, NAMES, FAMILY, ("loss.", "model_ema."))
    return as_checkpoint("taming", dict(sizes, codebook="plain"), weights, FAMILY)


def parts():
    return dict(tokenizer=TamingTokenizer)


PRESETS = {}
