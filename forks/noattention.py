"""Phase 2 without its attention: the decoder of phase 1, fine-tuned. What is left of phase 2's gain?"""

from recipes import small
from tokenizer import VQTokenizer


class PlainDecoderTokenizer(VQTokenizer):
    def add_attention(self, num=1):
        """Phase 2 (Sec. 3.4) gives the decoder `num` units of attention a stage; this one gets none."""


def parts():
    return dict(tokenizer=PlainDecoderTokenizer)


PRESETS = {name: small.variant(preset, fork="noattention") for name, preset in small.PRESETS.items()}
