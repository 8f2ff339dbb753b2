"""The paper's recipes: Tables 9 and 10 of arXiv 2212.03185, and below them what the paper leaves open.

`--set section.key=value` changes any single value. "steps" are optimizer updates, "batch" is global.
"""

# Table 9, tokenizer. Sec. 4.1 says 5e-4 for the second phase and 500,000 steps for FFHQ: the table is taken.
ADAM1, ADAM2 = [0.9, 0.99], [0.5, 0.9]
COSINE = dict(lr=1e-4, schedule="cosine", lr_end=5e-5, betas=ADAM1)
FINETUNE = dict(lr=5e-5, schedule="constant", betas=ADAM1, init="required")  # starts from ImageNet's phase 1
PHASE1 = dict(
    imagenet=dict(batch=256, steps=500_000, **COSINE), ffhq=dict(batch=64, steps=300_000, **COSINE),
    lsun_cat=dict(batch=64, steps=26_000, **FINETUNE), lsun_bedroom=dict(batch=64, steps=48_000, **FINETUNE),
    lsun_church=dict(batch=32, steps=4_000, **FINETUNE))
PHASE2 = {
    name: dict(batch=batch, steps=200_000, lr=5e-5, schedule="constant", betas=ADAM2)
    for name, batch in dict(imagenet=128, ffhq=32, lsun_cat=64, lsun_bedroom=64, lsun_church=32).items()}

# Table 10, priors. Sec. 4.2 says Adam: the table's AdamW is taken. "start_iter" begins the decay (I17).
ADAMW = dict(lr=1e-4, betas=[0.9, 0.96], weight_decay=1e-2)
AR = dict(ADAMW, schedule="exponential", lr_start=80_000, lr_end=5e-6)
NAR = dict(ADAMW, schedule="linear", lr_start=50_000, lr_end=0.0)
PRIORS = dict(
    imagenet=dict(batch=256, steps=1_500_000), ffhq=dict(batch=32, steps=500_000),
    lsun_cat=dict(batch=256, steps=500_000), lsun_bedroom=dict(batch=256, steps=500_000),
    lsun_church=dict(batch=64, steps=500_000))
BASE = dict(n_layer=24, n_head=16, n_embd=768, dropout=0.1)  # Table 8; large: n_embd=1024
CLASSES = dict(top_p=0.92, choice_temperature=0.45, nar_steps=12)  # ImageNet
NO_CLASSES = dict(top_p=0.98, choice_temperature=0.65, nar_steps=12)  # the others

# What the paper does not say, or says without a number (docs/decisions.md). The loss: Eq. 2, 4, Sec. 3.4.
SCHEDULE = dict(lr_start=0, lr_end=5e-5, warmup=0, weight_decay=0.0, ema=0.0, clip=0.0)
LOSS = dict(
    SCHEDULE, beta=0.25, gamma=0.01, rec="l1", per_weight=1.0, layers=None, adv_weight=0.1, adv_start=0.05,
    adv_ramp=0.05, gan="logistic", r1_gamma=10.0, r1_every=16)
OURS = dict(
    fork=None, data=None, val=None, limit=None, image_size=256, vgg="imagenet", code_variants=10, seed=0,
    precision="bf16", tokenizer=dict(),
    discriminator=dict(kind="style", channel_multiplier=1, max_width=512),
    classifier=dict(SCHEDULE, width=64, hidden=4096, skip_pools=0, scale_taps=True, batch=256, steps=450_000,
               lr=1e-3, schedule="cosine", lr_end=0.0, betas=ADAM1, weight_decay=0.05, label_smoothing=0.1))
SAMPLER = dict(temperature=1.0, top_k=0, token_temperature=1.0, confidence_space="prob")


def recipe(name, sampler, conditional):
    """One column of Tables 9 and 10: alpha = 1, then 0 (Sec. 3.4)."""
    return dict(
        OURS, conditional=conditional, prior=dict(BASE), sample=SAMPLER | sampler,
        phase1=dict(LOSS, alpha=1.0, init=None) | PHASE1[name], phase2=dict(LOSS, alpha=0.0) | PHASE2[name],
        ar=dict(SCHEDULE, label_smoothing=0.0) | AR | PRIORS[name],
        nar=dict(SCHEDULE, label_smoothing=0.0) | NAR | PRIORS[name])


def variant(base, **changes):
    """A copy of a preset with nested changes: variant(P, ar=dict(batch=64)) keeps P's other `ar` values."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if nested else value
    return merged


IMAGENET = recipe("imagenet", CLASSES, conditional=True)
PRESETS = {
    "imagenet": IMAGENET,
    # Tables 1, 5 and 6 and Fig. 5: one phase, batch 64, 500,000 steps of everything
    "imagenet-ablation": variant(IMAGENET, stages=["phase1", "ar", "nar"],
                                 phase1=dict(batch=64, alpha=0.0),
                                 ar=dict(batch=64, steps=500_000), nar=dict(batch=64, steps=500_000)),
    "ffhq": recipe("ffhq", NO_CLASSES, conditional=False),
    "lsun-cat": recipe("lsun_cat", NO_CLASSES, conditional=False),
    "lsun-bedroom": recipe("lsun_bedroom", NO_CLASSES, conditional=False),
    "lsun-church": recipe("lsun_church", NO_CLASSES, conditional=False),
}
