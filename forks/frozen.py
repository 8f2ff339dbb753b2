"""Tokens of a frozen classifier: relu5_3 of the judge is quantized as it is, and only a decoder is trained.

The end of the scale of alpha: no pixel has a say in the tokens. Ours, after tokenizers that quantize features
of a foundation model.
"""

from torch import nn

from perceptual import normalize_images
from plumbing.weights import build_vgg16
from recipes.small import of_fork
from tokenizer import VQTokenizer


class JudgeEncoder(nn.Module):
    """The judge up to relu5_3, not trained: (B, 3, H, W) -> (B, n_z, h, w), n_z = 8 times its width."""

    def __init__(self, config):
        super().__init__()
        pools = config.downsample.bit_length() - 1  # of the four before relu5_3
        vgg = build_vgg16(config.codebook_dim // 8, hidden=1, skip_pools=4 - pools)
        self.features = vgg.features[:30].requires_grad_(False)

    def forward(self, x):
        return self.features(normalize_images(x))


class FrozenTokenizer(VQTokenizer):
    Encoder = JudgeEncoder

    def prepare(self, run):
        """The weights come from the judge of the run, and are in the checkpoint from then on."""
        if not self.frozen:
            self.encoder.features.load_state_dict(run.judge.vgg.features.state_dict())

    @staticmethod
    def check(config):
        tokenizer, judge = config["tokenizer"], config["judge"]
        if (config["vgg"], tokenizer["codebook_dim"]) != ("judge", 8 * judge["width"]):
            raise ValueError("frozen quantizes a judge of one's own: vgg=judge, codebook_dim 8 * judge.width")
        if judge["skip_pools"] != 5 - len(tokenizer["channel_mult"]):
            raise ValueError("relu5_3 lies on the token grid with one pool for each halving: "
                             f"judge.skip_pools={5 - len(tokenizer['channel_mult'])}")


def parts():
    return dict(tokenizer=FrozenTokenizer)


PRESETS = of_fork("frozen")
for preset in PRESETS.values():
    preset["tokenizer"] |= dict(codebook_dim=8 * preset["judge"]["width"])
    preset["judge"] |= dict(skip_pools=5 - len(preset["tokenizer"]["channel_mult"]))
