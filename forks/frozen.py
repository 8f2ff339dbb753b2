"""Tokens of a frozen classifier: relu5_3 of the judge is quantized as it is, and only a decoder is trained.

The end of the scale of alpha: no pixel has a say in the tokens. Ours.
"""

from torch import nn

from perceptual import normalize_images
from plumbing.errors import UserError
from plumbing.weights import build_vgg16
from recipes.small import of_fork
from tokenizer import VQTokenizer


def left_out(channel_mult):
    """Pools that the judge does without, so that relu5_3, after four of them, lies on the token grid."""
    return 5 - len(channel_mult)


class JudgeEncoder(nn.Module):
    """The judge up to relu5_3, not trained: (B, 3, H, W) -> (B, n_z, h, w), n_z = 8 times its width."""

    def __init__(self, config):
        super().__init__()
        vgg = build_vgg16(config.codebook_dim // 8, hidden=1, skip_pools=left_out(config.channel_mult))
        self.features = vgg.features[:30].requires_grad_(False)

    def forward(self, x):
        return self.features(normalize_images(x))


class FrozenTokenizer(VQTokenizer):
    Encoder = JudgeEncoder

    def prepare(self, run):
        """The weights come from the judge of the run, and are in the checkpoint from then on."""
        if not self.frozen:
            ours, theirs = self.encoder.features, run.judge.vgg.features[:30]
            if list(map(type, ours)) != list(map(type, theirs)):  # a file of --vgg
                raise UserError("this judge's relu5_3 is not on the token grid: it has other pools")
            ours.load_state_dict(theirs.state_dict())

    @staticmethod
    def check(config):
        tokenizer, judge = config["tokenizer"], config["judge"]
        if (config["vgg"], tokenizer["codebook_dim"]) != ("judge", 8 * judge["width"]):
            raise ValueError("frozen quantizes a judge of one's own: vgg=judge, codebook_dim 8 * judge.width")
        if judge["skip_pools"] != left_out(tokenizer["channel_mult"]):
            raise ValueError("relu5_3 lies on the token grid with judge.skip_pools="
                             f"{left_out(tokenizer['channel_mult'])}")


def parts():
    return dict(tokenizer=FrozenTokenizer)


PRESETS = of_fork("frozen")
for preset in PRESETS.values():
    preset["tokenizer"] |= dict(codebook_dim=8 * preset["judge"]["width"])
    preset["judge"] |= dict(skip_pools=left_out(preset["tokenizer"]["channel_mult"]))
