"""Phase 2 without its attention: the decoder of phase 1, fine-tuned. What is left of phase 2's gain?"""

from recipes.small import of_fork
from tokenizer import VQTokenizer


class PlainDecoderTokenizer(VQTokenizer):
    def add_attention(self, num=1):
        """Phase 2 (Sec. 3.4) gives the decoder `num` units of attention a stage; this one gets none."""


def parts():
    return dict(tokenizer=PlainDecoderTokenizer)


PRESETS = of_fork("noattention")
