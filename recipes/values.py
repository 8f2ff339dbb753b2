"""Which values a flag or a key of a preset may have, wherever its name occurs."""

import difflib

from recipes.ablations import LAYERS

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list"}
CHOICES = dict(
    precision=("bf16", "fp32"), kind=("style", "patch"), gan=("logistic", "hinge"),
    schedule=("cosine", "exponential", "linear", "constant"), confidence_space=("prob", "log"),
    layers=(*LAYERS, "lpips"), init=("required",), rec=("l1", "l2"))
ANY, COUNT, SHARE = (0, 1e9), (1, 1e9), (0, 1)
BOUNDS = dict(  # of flags and of values of a preset, wherever a name occurs; VGG-16 needs 32 pixels
    steps=(0, 1e12), batch=COUNT, micro_batch=COUNT, workers=(0, 1e4), timeout=(0.1, 1e9), num=COUNT,
    log_every=(1, 1e12), eval_every=(0, 1e12), save_every=(1, 1e12), seed=(0, 2**63 - 1), limit=(1, 1e12),
    samples=COUNT, nproc=COUNT, every=(1e-3, 86400), image_size=(32, 1e5), codebook_size=(2, 1e8),
    codebook_dim=(1, 1e5), kmeans_every=COUNT, width=(1, 1e5), hidden=(1, 1e6), skip_pools=(0, 5),
    max_width=(1, 1e5), channel_multiplier=(1, 1e4), n_layer=(1, 1e4), n_head=(1, 1e4), n_embd=(1, 1e6),
    head_layers=(1, 1e4), dropout=SHARE, class_dropout=SHARE, label_smoothing=SHARE, code_variants=(1, 1e4),
    alpha=SHARE, beta=ANY, gamma=(-1e9, 1e9), per_weight=ANY, adv_weight=ANY, adv_start=ANY, adv_ramp=ANY,
    r1_gamma=ANY, r1_every=COUNT, disentangle=ANY, represent=ANY, clip=ANY, lr=(1e-12, 1e3), lr_end=(0, 1e3),
    lr_start=(0, 1e12), warmup=(0, 1e12), ema=(0, 0.999999), weight_decay=(0, 1e3), top_p=(1e-9, 1),
    temperature=ANY, token_temperature=ANY, choice_temperature=ANY, nar_steps=(1, 1e6), guidance=(0, 1e3),
    top_k=ANY, memory=(0.1, 1e6), scale=(1, 64))


def check_values(values, name):
    """raises: ValueError for a value outside its BOUNDS or CHOICES, nan too; name: how messages call a key"""
    if values.get("schedule") == "exponential" and not values["lr_end"]:
        raise ValueError(f"{name('lr_end')} must be above 0 with {name('schedule')}=exponential, which would "
                         "otherwise be 0 from its first step on")
    for key, value in values.items():
        if value is not None and key in BOUNDS:
            low, high = BOUNDS[key]
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name(key)} must be a number between {low:g} and {high:g}, got {value}")
        if value is not None and value not in CHOICES.get(key, [value]):
            raise ValueError(f"{name(key)} must be one of {', '.join(CHOICES[key])}, got {value}")
        if key == "limit" and isinstance(value, float):
            raise ValueError(f"{name(key)} must be a whole number, got {value}")
        if key == "betas" and not (len(value) == 2 and all(
                isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)):
            raise ValueError(f"{name(key)} must be two numbers from 0 to below 1, got {value}")


def hint(word, words, otherwise=""):
    """What to write in the place of a word that is none of `words`."""
    close = difflib.get_close_matches(word, words, 1)
    return f"did you mean {close[0]}?" if close else otherwise or f"there are {', '.join(words)}"
