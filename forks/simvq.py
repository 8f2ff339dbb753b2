"""SimVQ (arXiv 2411.02038): the codes are a frozen random table times one learned matrix."""

from torch import nn

from plumbing.processes import full_float32
from recipes.small import of_fork
from tokenizer import VectorQuantizer, VQTokenizer


class LinearlyMovedQuantizer(VectorQuantizer):
    """A step that changes the matrix W moves every code, also those that nothing fell on. The authors' layer
    has a bias besides; ours is the product that the article writes."""

    def __init__(self, config):
        super().__init__(config)
        nn.init.normal_(self.codebook.weight, std=config.codebook_dim**-0.5)
        self.codebook.requires_grad_(False)
        self.basis = nn.Linear(config.codebook_dim, config.codebook_dim, bias=False)

    @property
    def codes(self):  # (K, n_z) float32
        with full_float32(self.codebook.weight):
            return self.normalize(self.basis(self.codebook.weight.float()))


class SimVQTokenizer(VQTokenizer):
    Quantizer = LinearlyMovedQuantizer


def parts():
    return dict(tokenizer=SimVQTokenizer)


PRESETS = of_fork("simvq", tokenizer=dict(codebook="plain", warm_start=0))  # no entropy term
