"""Opens the tokenizers of LlamaGen (arXiv 2406.06525): `vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`.

Codes and latents are compared at unit length (`codebook_l2_norm`, as published). A file does not say so: one
that was trained without opens too, and wrongly.
"""

from forks.taming import TamingTokenizer
from forks.vqgan import converted, sizes_of
from plumbing.models import as_checkpoint

NAMES = dict(down="encoder.conv_blocks.{}", up="decoder.conv_blocks.{}", finest_first=False, block="res",
             middle=("mid.0", "mid.1", "mid.2"))


def opened(state):
    """Our checkpoint of a published state dict, or None if it is none of this family."""
    if "encoder.conv_blocks.0.res.0.norm1.weight" not in state:
        return None
    sizes = sizes_of(state, "encoder.conv_blocks.{}.res.{}")
    weights = converted(state, sizes, NAMES, "LlamaGen", ("quantize.codebook_used",))
    return as_checkpoint("llamagen", dict(sizes, codebook="fn"), weights, "LlamaGen")  # of unit length


def parts():
    return dict(tokenizer=TamingTokenizer)


PRESETS = {}
