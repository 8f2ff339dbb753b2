"""Recipes of ours for a CPU: small networks, a VGG of one's own, short schedules."""

from recipes.paper import IMAGENET, variant

CIFAR10 = variant(
    IMAGENET, data="cifar10", image_size=32, vgg="own", code_variants=1,
    tokenizer=dict(base_width=16, channel_mult=[1, 2, 4], codebook_size=256, codebook_dim=64, warm_start=200),
    discriminator=dict(max_width=16),
    classifier=dict(width=8, hidden=256, batch=128, steps=2500, lr=2e-3, skip_pools=2, scale_taps=True),
    phase1=dict(
        batch=64, steps=2000, lr=6e-4, lr_end=3e-5, gamma=0.1, per_weight=0.1, r1_gamma=0.1, ema=0.995),
    phase2=dict(batch=64, steps=600, lr=2e-4, per_weight=0.1, r1_gamma=0.1, ema=0.99),
    prior=dict(n_layer=4, n_head=4, n_embd=112, dropout=0.0),
    ar=dict(batch=64, steps=2500, lr=1e-3, lr_start=800, lr_end=3e-5, warmup=150, ema=0.995),
    nar=dict(batch=64, steps=3500, lr=1e-3, lr_start=1200, warmup=200, ema=0.995),
    sample=dict(top_p=0.8, token_temperature=0.7),
)
CLAIMS = variant(  # for the experiment on the paper's claims: a run in half an hour of one core
    CIFAR10, classifier=dict(steps=3000), phase1=dict(steps=1000), phase2=dict(steps=400),
    prior=dict(n_embd=128),
    ar=dict(steps=800, lr_start=300, warmup=100), nar=dict(steps=1200, lr_start=500, warmup=150),
    sample=dict(top_p=0.92, token_temperature=1.0))  # the paper's sampler: cifar10's was chosen at alpha = 1
DEMO = variant(  # minutes on a CPU
    CIFAR10, data="shapes", code_variants=2,
    tokenizer=dict(
        base_width=16, channel_mult=[1, 2, 4, 4], codebook_size=64, codebook_dim=32, warm_start=100),
    discriminator=dict(max_width=16),
    classifier=dict(hidden=128, batch=64, steps=300, skip_pools=1),
    phase1=dict(batch=32, steps=500, lr=1e-3, lr_end=5e-5, per_weight=0.03, ema=0.99),
    phase2=dict(batch=32, steps=80, lr=1e-4, schedule="cosine", lr_end=1e-5, per_weight=0.03, adv_weight=0.02,
                r1_gamma=10.0, ema=0.95),
    prior=dict(n_layer=4, n_head=4, n_embd=128),
    ar=dict(batch=128, steps=850, lr=2e-3, lr_start=300, lr_end=1e-4, warmup=90, ema=0.99),
    nar=dict(batch=128, steps=1800, lr=2e-3, lr_start=600, warmup=120, ema=0.99),
)
MILLISECONDS = dict(  # of a step on an EPYC: their ratio tells the time left of all stages
    demo=dict(vgg=57, phase1=122, phase2=262, ar=60, nar=43),  # 2 cores with bf16
    cifar10=dict(vgg=1300, phase1=1750, phase2=2100, ar=610, nar=590))  # 1 core in float32
PRESETS = {"cifar10": CIFAR10, "demo": DEMO, "claims": CLAIMS}


def quick(preset, steps=400, images=2000):
    """The same recipe in a minute or two, to see that everything runs: all stages together have `steps`, and
    what is counted in steps is scaled with them: warm-ups, starts of decays, averages, the warm start."""
    sections = ("classifier", "phase1", "phase2", "ar", "nar")
    share = min(1, steps / sum(preset[name]["steps"] for name in sections))

    def scaled(c):
        counts = {key: max(min(2, c[key]), round(share * c[key])) for key in ("steps", "warmup", "lr_start")}
        return counts | dict(ema=c["ema"] and max(0.0, 1 - (1 - c["ema"]) / share))

    changes = {name: scaled(preset[name]) for name in sections}
    if "warm_start" in preset["tokenizer"]:
        changes["tokenizer"] = dict(warm_start=round(share * preset["tokenizer"]["warm_start"]))
    return variant(preset, limit=preset["limit"] or images, **changes)


def of_fork(fork, **changes):
    """All of these presets with the same changes: the PRESETS of a fork."""
    return {name: variant(preset, fork=fork, **changes) for name, preset in PRESETS.items()}
