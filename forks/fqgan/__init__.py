"""FQGAN (arXiv 2411.16681): a codebook factorised into k sub-codebooks, with disentanglement and
representation losses, and a prior that predicts the k sub-tokens of a position one after the other (FAR).

Its tokenizers as published; its Base and Large prior, with the learning rate of the code (I23). The masked
prior, phase 2 and everything at 32x32 are ours. See docs/fqgan.md.
"""

from recipes.ablations import LOW, Row
from recipes.paper import IMAGENET, variant
from recipes.small import CIFAR10, DEMO

PRIOR = dict(dropout=0.1, class_dropout=0.1, head="ar", head_layers=3)
TRAINING = dict(lr=1e-4, schedule="constant", lr_end=1e-4, betas=[0.9, 0.95], weight_decay=0.05, clip=1.0)
DUAL = variant(
    IMAGENET, fork="fqgan",
    tokenizer=dict(codebook_size=16_384, codebook_dim=8, num_codebooks=2, adapter_layers=6,
                   teacher_widths=[0, 1024]),
    discriminator=dict(kind="patch"),
    phase1=dict(teachers=[None, "clip-vit-l-14"], rec="l2", layers="lpips", gamma=0.03, disentangle=0.1,
                represent=0.5, gan="hinge", adv_weight=0.5, adv_start=0.1, adv_ramp=0.0, r1_gamma=0.0,
                steps=200_000, lr=2e-4, schedule="constant", lr_end=2e-4, betas=[0.9, 0.95], clip=1.0),
    prior=dict(PRIOR, n_embd=1024), ar=TRAINING, nar=TRAINING, sample=dict(top_p=1.0, guidance=2.0),
)
SMALL = dict(  # without warm_start: unit vectors learn much faster quantized than not
    codebook_dim=8, num_codebooks=2, adapter_layers=1, warm_start=0)
SMALL_LOSS = dict(teachers=[None, "vgg"], gamma=0.03, disentangle=0.1, represent=0.5, clip=1.0)


def small(preset, **changes):
    """A preset of recipes/small.py, taught by its own VGG's relu5_3."""
    widths = [0, 8 * preset["classifier"]["width"]]
    return variant(preset, fork="fqgan", tokenizer=dict(SMALL, teacher_widths=widths), phase1=SMALL_LOSS,
                   sample=dict(top_p=0.9, guidance=1.5), **changes)


PRESETS = {
    "fqgan-dual": DUAL,
    "fqgan-large": variant(DUAL, prior=dict(n_layer=36, n_embd=1280, n_head=20, head_layers=4)),
    "fqgan-triple": variant(
        DUAL, phase1=dict(teachers=[None, "dinov2-vit-s-14", "clip-vit-b-16"]), sample=dict(guidance=1.75),
        tokenizer=dict(num_codebooks=3, teacher_widths=[0, 384, 768])),
    "cifar10-fq": small(CIFAR10, prior=dict(PRIOR, dropout=0.0, n_layer=4, head_layers=2)),
    "demo-fq": small(DEMO, prior=dict(PRIOR, dropout=0.0, n_layer=3, head_layers=1),
                     nar=dict(steps=2200, lr_start=800)),
}


def low(changes):
    """These changes at alpha = 0; at full scale LPIPS stays in its place."""
    return lambda config: changes if config["phase1"]["layers"] == "lpips" else LOW | changes


UNTAUGHT = {"tokenizer.teacher_widths": [], "phase1.teachers": []}
SINGLE = UNTAUGHT | {"tokenizer.num_codebooks": 1, "tokenizer.adapter_layers": 0}
TOGETHER = {"phase1.disentangle": 0.0}


def twice(config):
    size = 2 * config["tokenizer"]["codebook_size"]
    return low(SINGLE | {"tokenizer.codebook_size": size})(config)


NONE = (None,) * 5
TABLES = {
    "fq-table3": dict(
        title="FQGAN, Table 3: one codebook and two, with which losses; and SeQ-GAN's ideas on top (ours)",
        columns=("rfid", "psnr", "usage", "ar_fid", "nar_fid"),
        scale="ImageNet 256x256, K = 16,384, 10 epochs, Inception FID, 50,000",
        rows=[Row("single, K codes", "fq-1x", low(SINGLE), (3.71, *NONE[1:])),
              Row("single, 2K codes", "fq-2x", twice, (3.60, None, 0.84, None, None)),
              Row("dual, neither loss", "fq-none", low(UNTAUGHT | TOGETHER), (2.00, *NONE[1:])),
              Row("dual, disentanglement", "fq-dis", low(UNTAUGHT), (1.84, *NONE[1:])),
              Row("dual, representation", "fq-rep", low(TOGETHER), (1.73, *NONE[1:])),
              Row("dual, both", "fq-both", low({}), (1.66, *NONE[1:])),
              Row("both, alpha = 1", "fq-alpha1", {"phase1.alpha": 1.0}, NONE),
              Row("both, phase 1 + 2", "fq-both", low({}), NONE, "phase2")]),
    "fq-table4": dict(
        title="FQGAN, Table 4: heads of the AR prior on the dual tokenizer", columns=("ar_fid",),
        scale="ImageNet 256x256, FAR-Large, guidance 1.75, top-k 8192, Inception FID, 50,000",
        rows=[Row("k linear heads", "head-linear", low({"prior.head": "linear"}), (6.90,)),
              Row("k MLP heads", "head-mlp", low({"prior.head": "mlp"}), (8.88,)),
              Row("AR head", "fq-both", low({}), (3.74,))]),
}
TOKENIZER_OF = {"head-linear": "fq-both", "head-mlp": "fq-both"}  # rows that only train a prior of their own
PROBE = dict(head_layers=1, class_dropout=0.0)  # sizes of the small prior of `python -m studies compare`
FIGURES = dict(
    fq_alone="reconstructions from all and from each single sub-codebook, of phase1.pt or phase2.pt")


def parts():
    from forks.fqgan.prior import FactorizedAR, FactorizedNAR
    from forks.fqgan.tokenizer import FactorizedTokenizer

    return dict(tokenizer=FactorizedTokenizer, ar=FactorizedAR, nar=FactorizedNAR)


def draw(args, device):
    """(figure, numbers) of `fq_alone`."""
    from forks.fqgan.figures import figure_alone

    return figure_alone(args, device)
