"""Trains every part of SeQ-GAN (Sec. 3.4 and 6.1): a VGG, the tokenizer's two phases and both priors.

    python train.py --stage all --preset demo                   # the whole method on a CPU, no download
    python train.py --stage all --preset cifar10 --data DIR     # real images on a CPU
    torchrun --nproc_per_node=8 train.py --stage phase1 --preset imagenet --data DIR    # Table 9
    python train.py --stage phase1 --preset demo --ablation +attention2 --out runs/att  # a row of Table 1

Stages: vgg (a VGG of one's own; with --arch resnet a FID classifier), phase1, phase2, ar, nar, or all. Each
leaves one checkpoint in runs/<preset>/, which later stages find there. The same command again continues an
interrupted run. The recipes are in recipes/paper.py (Tables 9 and 10) and recipes/small.py.

Nothing about random numbers or data order is stored: every draw is a function of (seed, step, position in
the global batch), so a resumed run equals an unbroken one. Dropout and the draws of forks depend on the
number of processes and on --micro-batch, too.
"""

if __name__ == "__main__":
    from recipes.options import begin

    ARGUMENTS = begin("train")  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perceptual import (
    LAYER_SETS, NAMES, VGGTaps, adv_loss, disc_loss, layer_weights, normalize_images, perceptual_loss,
    r1_penalty,
)
from plumbing.classifiers import accuracy, random_shift, tap_scales
from plumbing.codes import batch_usage, cached_codes, code_batch
from plumbing.errors import as_user_error
from plumbing.hashes import latent_hash
from plumbing.images import to_float
from plumbing.models import (
    check_losses, classes_of, earlier_tokenizer, load_model, new_discriminator, new_prior,
)
from plumbing.parallel import accumulate, begin_step
from plumbing.preflight import build_on_meta, check_stages, given_tokenizer, stages_of, with_vgg
from plumbing.processes import all_reduce_mean, mix, on_rank0, one_line_errors, seeded_rows, to_device
from plumbing.run import Run
from plumbing.validation import evaluate_prior, evaluate_tokenizer
from plumbing.weights import ResNet, build_vgg16, fold_batch_norm

# ----------------------------------------------------------------------------------------------------------
# Schedules and optimizers (Tables 9 and 10)
# ----------------------------------------------------------------------------------------------------------


def lr_at(step, c):
    """Learning rate after `step` updates (Tables 9 and 10; a linear warm-up comes on top).

    cosine:      lr until lr_start, then half a cosine to lr_end at `steps`
    exponential: lr until lr_start, then geometrically to lr_end at `steps`
    linear:      lr until lr_start, then in a straight line to lr_end ("start_iter" begins the decay, I17)
    constant:    lr
    """
    lr, end, T = c["lr"] * min(1.0, (step + 1) / max(1, c["warmup"])), c["lr_end"], c["steps"]
    t = min(max(0.0, (step - c["lr_start"]) / max(1, T - c["lr_start"])), 1.0)
    if c["schedule"] == "cosine":
        return end + (lr - end) / 2 * (1 + math.cos(math.pi * t))
    if c["schedule"] == "exponential":
        return lr * (end / lr) ** t
    if c["schedule"] == "linear":
        return lr + (end - lr) * t
    return lr


def adv_ramp(step, c):
    """lambda_adv at a step: 0 before `adv_start`, then a ramp up to `adv_weight` (shares of the run; I9)."""
    begin, length = c["adv_start"] * c["steps"], max(1, c["adv_ramp"] * c["steps"])
    return c["adv_weight"] * min(1.0, (step - begin + 1) / length) if step >= begin else 0.0


def build_optimizer(model, c):
    """Adam, or AdamW where there is weight decay: on matrices of linear layers and convolutions only."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not c["weight_decay"]:
        return torch.optim.Adam(params, lr=c["lr"], betas=c["betas"], fused=True)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    decay = {id(m.weight) for m in layers}
    groups = [[p for p in params if (id(p) in decay) == wanted] for wanted in (True, False)]
    return torch.optim.AdamW(
        [dict(params=groups[0], weight_decay=c["weight_decay"]), dict(params=groups[1], weight_decay=0.0)],
        lr=c["lr"], betas=c["betas"], fused=True,
    )


def set_lr(lr, *optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def build_ema(model, decay):
    """Exponential moving average of the weights, or None for decay 0 (the paper states none). Integers, as
    the levels of `fsq`, are copied: their average would be cut off to the next lower one."""
    average = get_ema_multi_avg_fn(decay)

    def update(kept, new, steps):
        average(kept, new, steps) if kept[0].is_floating_point() else torch._foreach_copy_(kept, new)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True) if decay else None


# ----------------------------------------------------------------------------------------------------------
# Stages phase1 and phase2: the tokenizer (Sec. 3.4, Table 9)
# ----------------------------------------------------------------------------------------------------------


def build_tokenizer(run, stage):
    """Phase 1: new, or the weights of --tokenizer. Phase 2: phase 1 with attention, latent space frozen.

    returns: the tokenizer, and the discriminator's weights after phase 1 ({} in phase 1)
    """
    if stage == "phase1":
        Tokenizer = classes_of(run.config)["tokenizer"]
        torch.manual_seed(mix(run.config["seed"], "phase1"))
        with as_user_error():
            sizes = dict(run.config["tokenizer"], image_size=run.config["image_size"])
            tokenizer = Tokenizer(Tokenizer.Config(**sizes))
            if run.args.tokenizer:
                tokenizer.load_state_dict(load_model(run.args.tokenizer, ("phase1",))[0].state_dict())
        if hasattr(tokenizer.quantizer, "fit"):  # K-means has a schedule
            tokenizer.quantizer.fit(run.steps(stage))
        return tokenizer.to(run.device), {}
    tokenizer, ckpt = earlier_tokenizer(run, ("phase1",), "discriminator")
    torch.manual_seed(mix(run.config["seed"], "phase2"))
    with as_user_error():
        tokenizer.add_attention()
    # not channels_last: its GroupNorm makes training ten times slower on a CPU, a third slower on an H100
    tokenizer = tokenizer.freeze_latent_space().to(memory_format=torch.contiguous_format)
    return tokenizer, ckpt["train"].get("disc", {})


def build_discriminator(run, weights):
    """Style-based (Sec. 6.1), or PatchGAN. Phase 2 goes on with the weights of phase 1 (I21)."""
    torch.manual_seed(mix(run.config["seed"], "discriminator"))
    with as_user_error():
        disc = new_discriminator(run.config)
        if weights:
            disc.load_state_dict(weights)
    return disc.to(run.device)


def build_perceptual(run, c):
    """A function of x and x_hat: the perceptual loss of Eq. 4, or of a row of Table 6; or LPIPS (I15)."""
    if c["layers"] == "lpips":
        return lambda x, x_hat: run.lpips(x_hat, x).float().mean()
    vgg, weights = run.vgg, LAYER_SETS[c["layers"]] if c["layers"] else layer_weights(c["alpha"])
    return lambda x, x_hat: perceptual_loss(vgg, x, x_hat, weights)


LATENT = ("loss_codebook", "loss_commit", "loss_entropy")  # the terms of Eq. 2 and Sec. 3.4 in the latents


def fork_loss(latent, tokenizer, c):
    """The losses of a fork, weighted by its WEIGHTS: a number, or the name of a value of `c`; else 0.

    latent: {name: scalar} that the tokenizer returned.  raises: UserError of `check_losses`
    """
    check_losses(tokenizer, latent, LATENT)
    own = {name: w for name, w in tokenizer.WEIGHTS.items() if name in latent}
    return sum((c[w] if isinstance(w, str) else w) * latent[name] for name, w in own.items())


def train_tokenizer(run, stage):
    """Phase 1 trains everything at alpha = 1, phase 2 the attention-enhanced decoder at alpha = 0."""
    c = run.config[stage]
    tokenizer, disc_weights = build_tokenizer(run, stage)
    disc, perceptual = build_discriminator(run, disc_weights), build_perceptual(run, c)
    tokenizer.prepare(run)
    rec_loss = {"l1": F.l1_loss, "l2": F.mse_loss}[c["rec"]]
    opt_g, opt_d = build_optimizer(tokenizer, c), build_optimizer(disc, c)
    ema = build_ema(tokenizer, c["ema"])
    frozen = latent_hash(tokenizer) if stage == "phase2" else None
    net, disc_net = run.wrap(tokenizer, run.example()), run.wrap(disc, run.example())
    start = run.start(stage, frozen, model=tokenizer, disc=disc, opt_g=opt_g, opt_d=opt_d, ema=ema)
    stream = run.images(c["batch"], start)
    tokenizer.train()
    for step in run.loop(stage, start):
        batch, lr, adv_weight = next(stream), lr_at(step, c), adv_ramp(step, c)
        set_lr(lr, opt_g, opt_d)
        micro, fakes, seen = begin_step(run, tokenizer, opt_g, batch, step), [], []

        # E, Z, G (Eq. 2, Eq. 4, Sec. 3.4)
        disc.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        for x in accumulate(net, micro):
            with run.autocast:
                x_hat, tokens, latent = net(x)
                loss_rec = rec_loss(x_hat.float(), x)
                loss_per = perceptual(x, x_hat)
                loss_adv = adv_loss(disc(x_hat), c["gan"]) if adv_weight else torch.zeros_like(loss_rec)
            loss_codebook, loss_commit, loss_entropy = (latent.get(name, 0.0) for name in LATENT)
            loss = (loss_rec + (loss_codebook + c["beta"] * loss_commit + c["gamma"] * loss_entropy)
                    + c["per_weight"] * loss_per + adv_weight * loss_adv + fork_loss(latent, tokenizer, c))
            run.backward(loss, len(x) / len(batch), loss_rec=loss_rec, loss_per=loss_per, **latent,
                         loss_adv=loss_adv if adv_weight else None)
            fakes.append(x_hat.detach())
            seen.append(tokens)
        run.update(opt_g, "tokenizer", c["clip"])

        # D
        if adv_weight:
            disc.requires_grad_(True)
            opt_d.zero_grad(set_to_none=True)
            for x, x_hat in accumulate(disc_net, zip(micro, fakes, strict=True)):
                with run.autocast:
                    loss = loss_disc = disc_loss(disc_net(x), disc_net(x_hat), c["gan"])
                if c["r1_gamma"] and step % c["r1_every"] == 0:  # lazy regularisation
                    loss = loss + c["r1_every"] * r1_penalty(disc_net, x, c["r1_gamma"])
                run.backward(loss, len(x) / len(batch), loss_disc=loss_disc)
            run.update(opt_d, "discriminator", c["clip"])

        if ema:
            ema.update_parameters(tokenizer)
        if run.due("log", stage, step):
            usage = batch_usage(seen, tokenizer)
            run.log(stage, step, lr=lr, **run.means, adv_weight=adv_weight, batch_usage=usage)
        if run.due("eval", stage, step):
            evaluate_tokenizer(run, stage, step, ema.module if ema else tokenizer)
            tokenizer.train()
        if run.due("save", stage, step):
            run.save(stage, step, tokenizer, ema, latent_hash(ema.module if ema else tokenizer), disc=disc,
                     opt_g=opt_g, opt_d=opt_d)


# ----------------------------------------------------------------------------------------------------------
# Stages ar and nar: the priors (Sec. 3.1.2 and 6.1, Table 10)
# ----------------------------------------------------------------------------------------------------------


def build_prior(run, stage, tokenizer):
    """A new prior over the tokens of `tokenizer`, with as many classes as the data has (Table 8)."""
    names = run.train.class_names if run.config["conditional"] else []
    torch.manual_seed(mix(run.config["seed"], stage))
    with as_user_error():
        return new_prior(run.config, stage, tokenizer, len(names)).to(run.device)


def train_prior(run, stage):
    """Eq. 3. AR: cross-entropy of a token given those before. NAR: of masked tokens given the others."""
    c, seed = run.config[stage], run.config["seed"]
    tokenizer, _ = earlier_tokenizer(run, ("phase1", "phase2"))
    tokens_of, prior = latent_hash(tokenizer), build_prior(run, stage, tokenizer)
    classes, N = prior.config.num_classes, prior.config.num_tokens
    optimizer, ema = build_optimizer(prior, c), build_ema(prior, c["ema"])
    example = torch.zeros(2, *tokenizer.token_shape, dtype=torch.int64, device=run.device)
    inputs, _ = prior.inputs(example, torch.zeros(2, N + 1, device=run.device))
    net = run.wrap(prior, inputs, example.flatten(1)[:, 0] if classes else None)
    start = run.start(stage, tokens_of, model=prior, optimizer=optimizer, ema=ema)
    codes = cached_codes(run, tokenizer)
    prior.train()
    for step in run.loop(stage, start):
        set_lr(lr_at(step, c), optimizer)
        tokens, labels = code_batch(run, codes, step, c["batch"])  # (B, N), (B,)
        noise = to_device(seeded_rows(c["batch"], N + 1, seed=mix(seed, "mask", step)), run.device)
        inputs, loss_mask = prior.inputs(tokens, noise)
        total = all_reduce_mean(loss_mask.sum().float())  # of the terms of the global batch's loss
        optimizer.zero_grad(set_to_none=True)
        micro = zip(*map(run.micro, (inputs, tokens, loss_mask, labels)), strict=True)
        for inputs, tokens, loss_mask, labels in accumulate(net, micro):
            with run.autocast:
                logits = net(inputs, labels if classes else None)
            loss, top1 = prior.loss(logits, tokens, loss_mask, c["label_smoothing"])
            run.backward(loss, loss_mask.sum() / total, loss=loss, top1=top1)
        run.update(optimizer, "prior", c["clip"])
        if ema:
            ema.update_parameters(prior)
        if run.due("log", stage, step):
            run.log(stage, step, lr=lr_at(step, c), **run.means)
        if run.due("eval", stage, step):
            evaluate_prior(run, stage, step, ema.module if ema else prior, tokenizer, codes)
            prior.train()
        if run.due("save", stage, step):
            run.save(stage, step, prior, ema, tokens_of, optimizer=optimizer)


# ----------------------------------------------------------------------------------------------------------
# Stages vgg and resnet: a VGG for the perceptual loss, a FID classifier for metrics (not in the paper)
# ----------------------------------------------------------------------------------------------------------


def build_classifier(run, stage):
    """A narrow VGG-16 with batch norm, which is folded away when it is loaded; or a small ResNet."""
    c = run.config["classifier"]
    sizes = dict(width=c["width"], num_classes=run.train.num_classes)
    if stage == "vgg":
        sizes |= dict(hidden=c["hidden"], skip_pools=c["skip_pools"], batch_norm=True)
    torch.manual_seed(mix(run.config["seed"], stage))
    model = (build_vgg16 if stage == "vgg" else ResNet)(**sizes)
    model.sizes = sizes  # which a checkpoint keeps
    return model.to(run.device, memory_format=torch.channels_last)


def train_classifier(run, stage):
    """Classification of the training images by their labels, each image shifted at random."""
    c, seed = run.config["classifier"], run.config["seed"]
    model = build_classifier(run, stage)
    optimizer, ema = build_optimizer(model, c), build_ema(model, c["ema"])
    net, kept = run.wrap(model, run.example()), ema.module if ema else model
    start = run.start(stage, model=model, optimizer=optimizer, ema=ema)
    stream = run.stream(c["batch"], start)
    for step in run.loop(stage, start):
        set_lr(lr_at(step, c), optimizer)
        pixels, labels = next(stream)
        x, labels = to_float(pixels, run.device), to_device(labels, run.device)
        x = random_shift(x, seed, step, c["batch"])
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with run.autocast:
            logits = net(normalize_images(x))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=c["label_smoothing"])
        run.backward(loss, 1, loss=loss)
        run.update(optimizer, "vgg", c["clip"])
        if ema:
            ema.update_parameters(model)
        if run.due("log", stage, step):
            run.log(stage, step, lr=lr_at(step, c), **run.means)
        if run.due("eval", stage, step):
            kept.eval()
            run.log(stage, step, val_accuracy=accuracy(run, lambda x: kept(normalize_images(x))))
        if run.due("save", stage, step):
            if stage == "vgg" and c["scale_taps"]:
                taps = VGGTaps(fold_batch_norm(kept))
                model.sizes["scale"] = on_rank0(partial(tap_scales, run, taps, NAMES))
            run.save(stage, step, model, ema, optimizer=optimizer)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def train_stage(run, stage):
    """Trains one stage to its last step; its stream of images is closed in whatever way it ends."""
    try:
        if stage in ("vgg", "resnet"):
            train_classifier(run, stage)
        elif stage in ("phase1", "phase2"):
            train_tokenizer(run, stage)
        else:
            train_prior(run, stage)
    finally:
        run.close_stream()


def main(args, config):
    with one_line_errors():
        stages = stages_of(args, config)
        given, config = given_tokenizer(args, config)
        networks = build_on_meta(config, stages, given)  # what does not fit is refused here
        if args.explain:
            from studies.cost import explain

            return explain(config, networks, args.memory)
        run = Run(args, config)
        stages = with_vgg(run, stages)
        check_stages(run, stages, networks)
        with run.session(stages):
            for stage in stages:
                train_stage(run, stage)
            if args.stage == "all":
                from studies.summary import summarize

                summarize(run)


if __name__ == "__main__":
    record(main)(*ARGUMENTS)  # torchrun then names the process that failed first, and why
