"""The rotation trick (arXiv 2410.06424): the gradient passes the quantizer as a rotation."""

import torch
import torch.nn.functional as F

from recipes.small import of_fork
from tokenizer import KMeansQuantizer, VQTokenizer


def rotate(z, z_q):
    """z_q (M, n_z), written as lambda R z with a constant scale lambda and rotation R that takes z to it.

    The gradient is lambda R^T g: the angle between it and z is that between g and z_q. R = I - 2 r r^T +
    2 q e^T with e, q the directions of z and z_q and r that of e + q. Undefined where q = -e.
    """
    e, q = F.normalize(z.detach(), dim=-1), F.normalize(z_q.detach(), dim=-1)
    r = F.normalize(e + q, dim=-1)
    scale = z_q.detach().norm(dim=-1, keepdim=True) / z.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)

    def along(v):
        return (z * v).sum(-1, keepdim=True)

    return scale * (z - 2 * r * along(r) + 2 * q * along(e))


class RotationQuantizer(KMeansQuantizer):  # the warm start is the preset's
    """Nearest codes, as ever; only the way back differs."""

    def forward(self, z_hat):
        z_q, indices, losses = super().forward(z_hat)
        with torch.autocast(z_hat.device.type, enabled=False):
            z = self.flatten(z_hat).view(*indices.shape, -1).permute(0, 3, 1, 2)
            turned = rotate(z.movedim(1, -1), z_q.movedim(1, -1)).movedim(-1, 1)
        return turned + (z_q - turned).detach(), indices, losses  # the code itself, to the last bit


class RotationTokenizer(VQTokenizer):
    Quantizer = RotationQuantizer


def parts():
    return dict(tokenizer=RotationTokenizer)


PRESETS = of_fork("rotation")
