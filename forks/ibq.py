"""Index backpropagation (IBQ, arXiv 2412.02692): every code gets a gradient, through the softmax."""

import torch
import torch.nn.functional as F

from forks.fqgan.tokenizer import SureQuantizer
from plumbing.processes import full_float32
from recipes.small import of_fork
from tokenizer import VQTokenizer


class IndexBackpropagationQuantizer(SureQuantizer):
    """Logits are the products of a latent with all codes; the token is their argmax. Codes start at N(0, 1),
    as published: a softmax over tiny products is flat and sends the encoder no gradient."""

    def __init__(self, config):
        super().__init__(config)
        torch.nn.init.normal_(self.codebook.weight)

    def distances(self, z_hat):
        return -(self.flatten(z_hat) @ self.codes.T)  # (M, K)

    def quantize(self, z_hat):
        with torch.no_grad(), full_float32(z_hat):
            return self.distances(z_hat).argmin(1).view(z_hat.shape[0], *z_hat.shape[2:])

    def forward(self, z_hat):
        B, n_z, h, w = z_hat.shape
        with full_float32(z_hat):
            z, distances = self.flatten(z_hat), self.distances(z_hat)
            probs = distances.neg().softmax(1)
            hard = F.one_hot(probs.argmax(1), probs.shape[1]).float()
            z_st = (hard + probs - probs.detach()) @ self.codes  # one-hot forwards, softmax backwards
            z_q = hard @ self.codes
            losses = dict(
                loss_double=F.mse_loss(z_st, z),  # "double quantization": latent and all codes
                loss_latent=F.mse_loss(z, z_q.detach()),  # moves the encoder only
                loss_codes=F.mse_loss(z_q, z.detach()),  # moves the codes only; beta is here, as published
                loss_entropy=self.usage_loss(distances, z, B))
        return z_st.view(B, h, w, n_z).permute(0, 3, 1, 2).contiguous(), probs.argmax(1).view(B, h, w), losses


class IBQTokenizer(VQTokenizer):
    Quantizer = IndexBackpropagationQuantizer
    WEIGHTS = {"loss_double": 1.0, "loss_latent": 1.0, "loss_codes": "beta"}


def parts():
    return dict(tokenizer=IBQTokenizer)


PRESETS = of_fork("ibq", tokenizer=dict(warm_start=0), phase1=dict(gamma=0.05))
