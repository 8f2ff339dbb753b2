"""FQGAN's tokenizer: VQGAN's trunk, then k branches, each with its own sub-codebook (arXiv 2411.16681)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from forks.fqgan.losses import disentanglement, mean_cosine, representation_loss
from forks.fqgan.teachers import check_teachers, load_teachers
from forks.vqgan import VQGANDecoder, VQGANEncoder, VQGANTokenizer
from plumbing.processes import full_float32
from tokenizer import (
    TokenizerConfig, VQTokenizer, VectorQuantizer, average_probs, code_distances, group_norm,
)

TEMPERATURE = 0.01  # of the softmax over codes


@dataclass
class FactorizedConfig(TokenizerConfig):
    """raises: ValueError for another number of widths than of codebooks"""

    num_codebooks: int = 1  # k sub-codebooks; tokens are (B, N, k)
    adapter_layers: int = 0  # Transformer blocks of 8 heads before each sub-codebook (FQGAN: 6)
    teacher_widths: tuple = ()  # of the representation loss, one for each sub-codebook; 0: no teacher

    def __post_init__(self):
        super().__post_init__()
        self.teacher_widths = tuple(self.teacher_widths)
        if len(self.teacher_widths) not in (0, self.num_codebooks):
            raise ValueError(f"{self.num_codebooks} codebooks need as many teacher_widths (0: no teacher), "
                             f"got {len(self.teacher_widths)}")


class PositionTransformer(nn.Module):
    """Learned positions, LayerNorm, pre-norm blocks of 8 heads, LayerNorm: adapters and feature heads."""

    def __init__(self, positions, width, num_layers):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(positions, width) * width**-0.5)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(num_layers)])

    def forward(self, x):  # (B, positions, width) -> the same
        return self.norm_out(self.blocks(self.norm_in(x + self.positions)))


class Branch(nn.Module):
    """From the trunk to the latent of one sub-codebook: adapter on demand, GN, SiLU, 3x3 and 1x1 conv."""

    def __init__(self, config, latent=256):
        super().__init__()
        width, side = config.widths[-1], config.image_size // config.downsample
        self.adapter = None
        if config.adapter_layers:
            self.adapter = PositionTransformer(side**2, width, config.adapter_layers)
        self.norm, self.conv1 = group_norm(width), nn.Conv2d(width, latent, 3, padding=1)
        self.conv2 = nn.Conv2d(latent, config.codebook_dim, 1)

    def forward(self, h):  # (B, c, h, w) -> (B, n_z, h, w)
        if self.adapter is not None:
            h = self.adapter(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        return self.conv2(self.conv1(F.silu(self.norm(h))))


class FeatureHead(nn.Module):
    """The student of the representation loss: codes of one branch to a vector of the teacher's width."""

    def __init__(self, config, width):
        super().__init__()
        positions = (config.image_size // config.downsample) ** 2
        self.mlp = nn.Sequential(nn.Linear(config.codebook_dim, width), nn.ReLU(), nn.Linear(width, width))
        self.class_vector = nn.Parameter(torch.randn(width) * width**-0.5)
        self.transformer = PositionTransformer(positions + 1, width, 3)

    def forward(self, codes):  # (B, n_z, h, w) -> (B, width), the output at the class position
        h = self.mlp(codes.flatten(2).transpose(1, 2))
        h = torch.cat([self.class_vector.expand(len(h), 1, -1), h], 1)
        return self.transformer(h)[:, 0]


class BranchedEncoder(nn.Module):
    """The trunk, then k branches whose latents are concatenated in index order: (B, k * n_z, h, w)."""

    def __init__(self, config):
        super().__init__()
        self.trunk = VQGANEncoder(config)
        self.branches = nn.ModuleList(Branch(config) for _ in range(config.num_codebooks))

    def forward(self, x):
        h = self.trunk(x)
        return torch.cat([branch(h) for branch in self.branches], 1)


class SureQuantizer(VectorQuantizer):
    """The entropy term is mean H(P_i) - H(mean P_i), up to the constant ln K: sure of each vector, even over
    all of them (as MaskGIT and LlamaGen). Also that of the forks lfq and ibq."""

    READS = ("entropy_set",)

    def distances(self, z_hat):  # (B, n_z, h, w) -> (M, K), up to a constant of each row
        return code_distances(self.flatten(z_hat), self.codes)

    def softmax_distances(self, distances, z):
        return distances / TEMPERATURE

    def usage_loss(self, distances, z, batch):
        log_probs = F.log_softmax(-self.softmax_distances(distances, z), -1)
        return super().usage_loss(distances, z, batch) - (log_probs.exp() * log_probs).sum(-1).mean()

    @torch.no_grad()
    def probs(self, z_hat):
        with full_float32(z_hat):
            return average_probs(self.softmax_distances(self.distances(z_hat), None))


class UnitQuantizer(SureQuantizer):
    """One sub-codebook: vectors and codes of unit length."""

    def __init__(self, config):
        super().__init__(config)
        self.codebook.weight.data = F.normalize(self.codebook.weight.data, dim=1)

    def normalize(self, x):
        return F.normalize(x, dim=-1)


class FactorizedQuantizer(nn.Module):
    """k independent quantizers on k parts of the channels; tokens get a last axis of size k.

    `forward` returns the sums of the losses over the codebooks, and the lists `codes` (straight-through, a
    map for each branch) and `features` (of the branches with a teacher) for the two further losses.
    """

    READS = ("entropy_set",)
    global_probs = None  # (k, K), see VectorQuantizer

    def __init__(self, config):
        super().__init__()
        self.parts = nn.ModuleList(UnitQuantizer(config) for _ in range(config.num_codebooks))
        widths = config.teacher_widths or (0,) * config.num_codebooks
        self.heads = nn.ModuleList(FeatureHead(config, width) if width else nn.Identity() for width in widths)

    def split(self, z_hat):  # (B, k * n_z, h, w) -> k pairs of a quantizer and its (B, n_z, h, w)
        return zip(self.parts, z_hat.chunk(len(self.parts), 1), strict=True)

    def quantize(self, z_hat):  # (B, k * n_z, h, w) -> (B, h, w, k) int64
        return torch.stack([part.quantize(z) for part, z in self.split(z_hat)], -1)

    def lookup(self, indices):  # (B, h, w, k) -> (B, k * n_z, h, w)
        parts = zip(self.parts, indices.unbind(-1), strict=True)
        return torch.cat([part.lookup(index) for part, index in parts], 1)

    def forward(self, z_hat):
        for i, part in enumerate(self.parts):
            part.global_probs = None if self.global_probs is None else self.global_probs[i]
        codes, indices, losses = zip(*[part(z) for part, z in self.split(z_hat)], strict=True)
        sums = {name: sum(loss[name] for loss in losses) for name in losses[0]}
        heads = zip(self.heads, codes, strict=True)
        sums |= dict(codes=codes, features=[head(c) for head, c in heads if isinstance(head, FeatureHead)])
        return torch.cat(codes, 1), torch.stack(indices, -1), sums

    def probs(self, z_hat):
        return torch.stack([part.probs(z) for part, z in self.split(z_hat)])


class FactorizedDecoder(VQGANDecoder):
    def __init__(self, config):
        super().__init__(config, config.num_codebooks * config.codebook_dim)


class FactorizedTokenizer(VQTokenizer):
    """k = 2: 111,294,355 parameters, 150,410,131 with the students' heads; 3: 131,657,883, 159,295,515."""

    Config, Encoder, Quantizer = FactorizedConfig, BranchedEncoder, FactorizedQuantizer
    Decoder, UNREAD = FactorizedDecoder, VQGANTokenizer.UNREAD
    WEIGHTS = {"loss_disentangle": "disentangle", "loss_represent": "represent"}
    check = staticmethod(check_teachers)  # of a whole preset, before anything is trained
    TRAINING_ONLY = "quantizer.heads."  # weights of the students, which no token and no image needs

    def __init__(self, config):
        super().__init__(config)
        self.teachers = []  # a plain list: neither saved nor hashed
        self.token_shape = (self.grid_size**2, config.num_codebooks)  # (N, k)

    def prepare(self, run):
        self.teachers = [] if self.frozen else load_teachers(run)

    def forward(self, x):
        """As VQTokenizer's, with `loss_disentangle` and `loss_represent`, the sum over teachers."""
        x_hat, tokens, losses = super().forward(x)
        if losses:
            features = losses.pop("features")
            losses["loss_disentangle"] = disentanglement(losses.pop("codes"))
            pairs = zip(features, self.teachers, strict=False)  # without teachers before `prepare`
            terms = [representation_loss(one, teacher(x)) for one, teacher in pairs]
            terms = terms or [0 * one.sum() for one in features]  # the students stay in the graph
            losses["loss_represent"] = sum(terms, torch.zeros((), device=x.device))
        return x_hat, tokens, losses

    @torch.no_grad()
    def code_maps(self, tokens):
        """Tokens (B, N, k) -> the codes of each sub-codebook, k maps (B, n_z, h, w)."""
        grid = tokens.unflatten(1, (self.grid_size, self.grid_size))
        return self.quantizer.lookup(grid).chunk(self.config.num_codebooks, 1)

    def numbers(self, tokens):
        """What a summary prints besides, {name: (B,)}."""
        return dict(cos_between_codebooks=mean_cosine(self.code_maps(tokens))) if tokens.shape[2] > 1 else {}
