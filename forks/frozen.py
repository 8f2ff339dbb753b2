"""Tokens of a frozen classifier: relu5_3 of the VGG is quantized as it is. The codebook is trained in
phase 1, the decoder in both phases.

The end of the scale of alpha: no pixel has a say in the latents. Ours.
"""

from torch import nn

from perceptual import normalize_images
from plumbing.stages import vgg_sizes
from plumbing.weights import build_vgg16
from recipes.small import of_fork
from tokenizer import VQTokenizer


def left_out(channel_mult):
    """Pools that the VGG does without, so that relu5_3, after four of them, lies on the token grid."""
    return 5 - len(channel_mult)


class VGGEncoder(nn.Module):
    """The VGG up to relu5_3, not trained: (B, 3, H, W) -> (B, n_z, h, w), n_z = 8 times its width."""

    def __init__(self, config):
        super().__init__()
        vgg = build_vgg16(config.codebook_dim // 8, hidden=1, skip_pools=left_out(config.channel_mult))
        self.features = vgg.features[:30].requires_grad_(False)

    def forward(self, x):
        return self.features(normalize_images(x))


class FrozenTokenizer(VQTokenizer):
    Encoder = VGGEncoder

    def prepare(self, run):
        """The weights come from the VGG of the run, and are in the checkpoint from then on."""
        if not self.frozen:
            self.encoder.features.load_state_dict(run.vgg.vgg.features[:30].state_dict())

    @staticmethod
    def check(config):
        tokenizer, vgg = config["tokenizer"], vgg_sizes(config)
        wanted = dict(width=tokenizer["codebook_dim"] / 8, skip_pools=left_out(tokenizer["channel_mult"]))
        for key, value in wanted.items():
            if vgg.get(key, 0) != value:
                raise ValueError(f"this latent is relu5_3 of a VGG with classifier.{key}={value:g}")


def parts():
    return dict(tokenizer=FrozenTokenizer)


PRESETS = of_fork("frozen")
for preset in PRESETS.values():
    preset["tokenizer"] |= dict(codebook_dim=8 * preset["classifier"]["width"])
