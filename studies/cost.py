"""Modules, sizes, recipe and cost of a preset (train.py --explain)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from perceptual import LAYER_SETS, VGGTaps, adv_loss, disc_loss, layer_weights, perceptual_loss
from plumbing.shapes import Shapes
from plumbing.weights import build_vgg16
from visualize import loss_in_words

PEAK = 989e12  # dense bf16 FLOP/s of an H100, by its data sheet
# of it by preset imagenet (docs/full-scale.md); a VGG was not measured
REACHED = dict(vgg=0.13, phase1=0.13, phase2=0.08, ar=0.2, nar=0.17)
ATTENTION = {  # which FlopCounterMode does not know on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *rest, **more: sdpa_backward_flop_count(grad, q, k, v)}
SMALLER = dict(vgg="classifier.width", phase1="tokenizer.base_width", phase2="tokenizer.base_width",
               ar="prior.n_layer", nar="prior.n_layer")  # where one image does not fit


def cost(steps, *networks):
    """What one image costs in training, counted on fake tensors; nothing is computed.

    steps:    functions that run one after the other, each with its own backward pass
    networks: whose weights the passes save; they are not activations
    returns:  FLOPs, a multiply-add being two; bytes that autograd keeps, at 2 bytes a number (bf16), in the
              step that keeps most. Attention with dropout is not fused here, so a prior keeps more than on a
              GPU (docs/full-scale.md)
    """
    weights = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    flops, most = 0, 0
    for step in steps:
        kept = {}  # by storage, which views share; holding the tensors keeps their addresses apart

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                step()
        flops += counter.get_total_flops()
        most = max(most, 2 * sum(t.untyped_storage().nbytes() // t.element_size()
                                 for address, t in kept.items() if address not in weights))
    return flops, most


def hours(name, flops, c):
    """H100-hours of a stage in words, at the share of the peak that one H100 reached."""
    found = flops * c["batch"] * c["steps"] / PEAK / REACHED[name] / 3600
    return f"{found:.0f}" if found >= 1 else f"{found:.1g}"


def largest(memory, kept, weights):
    """Images of one forward pass that fit into `memory` GiB, of which a tenth stays free."""
    return max(0, int((0.9 * memory * 2**30 - weights) / kept))


def print_cost(name, c, flops, kept, trainable, frozen, processes, memory=None):
    """FLOPs of a stage, and memory and time on GPUs if there are any. Weights, gradients and Adam's moments
    are float32. memory: GiB of a GPU, for which the largest --micro-batch is printed"""
    per_gpu, weights = max(1, c["batch"] // processes), 16 * trainable + 4 * frozen
    text = f"{flops / 1e9:,.1f} GFLOP an image, {flops * c['batch'] * c['steps']:.2e} FLOP in all"
    time = f"{hours(name, flops, c)} H100-hours at {REACHED[name]:.0%} of the peak"
    if memory and (most := min(largest(memory, kept, weights), c["batch"])):
        flag = "batch" if name == "vgg" else "micro-batch"
        text += f"; computed: {memory:g} GB hold --{flag} {most} of {c['batch']}, {time}"
    elif memory:
        text += (f"; computed: does not fit into {memory:g} GB, one image takes "
                 f"{(weights + kept) / 0.9 / 2**30:.1f}; lower {SMALLER[name]} with --set")
    elif processes > 1:
        text += f"; estimated: {(weights + per_gpu * kept) / 2**30:.1f} GiB a GPU at {per_gpu} images, {time}"
    print(f"  cost of {name}: {text}")


def count(*modules, trainable=False):
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad or not trainable)


def row(name, module):
    """A line of one network: its parameters, and how many of them are trained."""
    total, trained = count(module), count(module, trainable=True)
    state = "trainable" if trained == total else f"{trained:,} trainable" if trained else "frozen"
    print(f"  {name:30s} {total:>13,}  {state if total else ''}")


def explain(config, networks, memory=None):
    """Prints modules, sizes, recipe and cost of a preset; all tensors are fake, nothing is computed.

    networks: of its stages, as a run builds them on the meta device first. Costs are of eight GPUs; up to 64
              pixels, which a CPU trains, in FLOPs alone.
    """
    small = config["image_size"] <= 64
    processes, known = 1 if small else 8, dict(shapes=len(Shapes.NAMES), cifar10=10).get(config["data"])
    classes = known or (10 if small else 1000)
    called = f"{classes} classes" + " assumed" * (not known)  # of a folder they are counted when it is read
    first, disc, recipe = networks["phase1"], networks["disc"], config["classifier"]
    own = {key: recipe[key] for key in ("width", "hidden", "skip_pools")} | dict(num_classes=classes)

    def stage(name, c):
        share = f" = {processes} processes x {c['batch'] / processes:g}, or fewer with --micro-batch"
        rate = f"{c['lr']:g} {c['schedule']}"
        if c["schedule"] != "constant":
            rate += f" to {c['lr_end']:g}" + f" from step {c['lr_start']}" * bool(c["lr_start"])
        print(f"{name}: {c['steps']:,} steps of {c['batch']} images{share * (processes > 1)}; "
              f"{'AdamW' if c['weight_decay'] else 'Adam'} {tuple(c['betas'])}, learning rate {rate}, "
              f"weight decay {c['weight_decay']:g}, {config['precision']}")

    with torch.device("meta"):
        vgg = build_vgg16(**own, batch_norm=True)
        taps = VGGTaps(build_vgg16(**own if config["vgg"] == "own" else {}))
        prior = {(name, n): type(networks[name])(replace(networks[name].config, num_classes=n))
                 for name in ("ar", "nar") for n in (0, classes)}
    with FakeTensorMode(allow_non_fake_inputs=True):  # as "meta", but autocast believes to be on a CPU
        for network in (vgg, taps, disc, *prior.values()):
            network.to_empty(device="cpu")
        x = torch.zeros(1, 3, *[config["image_size"]] * 2)
        tokens = torch.zeros(1, *first.token_shape, dtype=torch.int64)
        label, noise = torch.zeros(1, dtype=torch.int64), torch.zeros(1, tokens.shape[1] + 1)
        if config["vgg"] == "own":
            stage(f"vgg, {called}", recipe)
            row("vgg, a narrow VGG-16", vgg)
            flops, kept = cost([lambda: vgg(x).sum().backward()], vgg)
            print_cost("vgg", recipe, flops, kept, count(vgg), 0, processes, memory)
        for name in ("phase1", "phase2"):
            if name not in networks:
                continue
            c, tokenizer = config[name], networks[name].to_empty(device="cpu")
            stage(f"{name}, {loss_in_words(c)}", c)
            if name == "phase2":
                tokenizer.freeze_latent_space()
            row("encoder", tokenizer.encoder)
            row("codebook", tokenizer.quantizer)
            row("decoder", tokenizer.decoder)
            print(f"  {'tokenizer':30s} {count(tokenizer):>13,}")
            if extra := getattr(tokenizer, "TRAINING_ONLY", None):
                needed = [p.numel() for n, p in tokenizer.named_parameters() if not n.startswith(extra)]
                print(f"  {'without what only training needs':30s} {sum(needed):>13,}")
            disc.requires_grad_(True)
            row("discriminator", disc)
            row("VGG-16", taps)
            weights = LAYER_SETS[{"lpips": "low"}.get(c["layers"], c["layers"])] if c["layers"] else (
                layer_weights(c["alpha"]))

            def autoencode(tokenizer=tokenizer, weights=weights):
                x_hat, _, losses = tokenizer(x)
                disc.requires_grad_(False)
                loss = F.l1_loss(x_hat, x) + perceptual_loss(taps, x, x_hat, weights) + adv_loss(disc(x_hat))
                sum(losses.values(), loss).backward()

            def discriminate():
                disc.requires_grad_(True)
                disc_loss(disc(x), disc(x)).backward()

            trainable = count(disc, tokenizer, trainable=True)
            flops, kept = cost([autoencode, discriminate], tokenizer, disc, taps)
            if c["r1_gamma"]:
                # R1 differentiates twice, which costs about as much as the discriminator's whole step
                flops += cost([discriminate], disc)[0] // c["r1_every"]
            frozen = count(taps, disc, tokenizer) - trainable
            print_cost(name, c, flops, kept, trainable, frozen, processes, memory)
        for name in ("ar", "nar"):
            stage(f"{name}, {first.grid_size}^2 tokens of {first.codebook_size} codes", config[name])
            own = prior[name, classes]
            row("prior, unconditional", prior[name, 0])
            row(f"prior, {called}", own)
            inputs = own.inputs(tokens, noise)[0]
            flops, kept = cost([lambda own=own, inputs=inputs: own(inputs, label).sum().backward()], own)
            print_cost(name, config[name], flops, kept, count(own), 0, processes, memory)
