"""Opens the VQGAN checkpoints of taming-transformers (arXiv 2012.09841): `model.ckpt` of ImageNet, f = 16."""

from torch import nn

from forks.vqgan import VQGANTokenizer, converted, sizes_of
from plumbing.models import as_checkpoint

FAMILY = "taming-transformers"
NAMES = dict(down="encoder.down.{}", up="decoder.up.{}", finest_first=True, block="block",
             middle=("mid.block_1", "mid.attn_1", "mid.block_2"))


class TamingTokenizer(VQGANTokenizer):
    """Plain nearest codes; every published GroupNorm has 32 groups, however narrow."""

    def __init__(self, config):
        super().__init__(config)
        for name, module in self.named_modules():
            if isinstance(module, nn.GroupNorm) and ".attention." not in name:
                module.num_groups = 32


def opened(state):
    """Our checkpoint of a published state dict, or None if it is none of this family."""
    if "encoder.mid.block_1.norm1.weight" not in state:
        return None
    sizes = sizes_of(state, "encoder.down.{}.block.{}")
    weights = converted(state, sizes, NAMES, FAMILY, ("loss.", "model_ema."))
    return as_checkpoint("taming", dict(sizes, codebook="plain"), weights, FAMILY)


def parts():
    return dict(tokenizer=TamingTokenizer)


PRESETS = {}
