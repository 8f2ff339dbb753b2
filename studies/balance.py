"""How hard each layer of the perceptual loss pushes, beside L1: the first look when the loss misbehaves."""

import json

import torch
import torch.nn.functional as F

from perceptual import LAYER_SETS, NAMES, VGGTaps, layer_weights, perceptual_terms
from plumbing.data import images_of
from plumbing.errors import UserError
from plumbing.files import is_checkpoint, save_text, writable
from plumbing.hashes import latent_hash
from plumbing.images import to_float
from plumbing.models import find_vgg, load_model
from plumbing.processes import mix, print0, setup_device
from plumbing.weights import load_vgg16_of
from studies.tables import number, print_table
from visualize import alpha_of


def pushes(tokenizer, vgg, x):
    """The terms d_l of Eq. 4 in all layers of Table 6, between x (B, 3, S, S) and its reconstruction.

    returns: {name: (size, gradient at x_hat, gradient at the decoder's last layer)} of "L1" and of `NAMES`, a
             float and two float32 tensors. Weights are those of the checkpoint, everything is float32.
    """
    with torch.enable_grad():
        x_hat = tokenizer.decode(tokenizer.encode(x))
        terms = {"L1": F.l1_loss(x_hat, x)} | perceptual_terms(vgg, x, x_hat, NAMES)
        sources = x_hat, tokenizer.decoder.conv_out.weight
        return {name: (term.item(), *torch.autograd.grad(term, sources, retain_graph=True))
                for name, term in terms.items()}


def ratio(found, weights):
    """A weighted sum of terms as ratios to L1: its size, and the lengths of its two gradients (gradients of
    layers may point apart, so that of the sum is shorter than the sum of theirs)."""
    size, *gradients = (sum(w * found[name][i] for name, w in weights.items()) for i in range(3))
    lengths = [(g.norm() / one.norm()).item() for g, one in zip(gradients, found["L1"][1:], strict=True)]
    return dict(size=size / found["L1"][0], at_image=lengths[0], at_layer=lengths[1])


def vgg_for(path, ckpt, source, device):
    """The network of the perceptual loss: --vgg, else that of the run.  raises: UserError without one"""
    source = source or ckpt["config"]["vgg"]
    if is_checkpoint(source):
        return load_model(source, ("vgg",), device)[0]
    if source != "own":
        return VGGTaps(load_vgg16_of(source)).to(device)
    found = find_vgg(path, ckpt, device)
    if found is None:
        raise UserError(f"no vgg.pt beside {path}; pass --vgg FILE")
    return found


def balance_of(path, args, device):
    """The numbers of one tokenizer, which are printed too."""
    tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
    c, source = ckpt["config"][ckpt["stage"]], args.vgg or ckpt["config"]["vgg"]
    if c["layers"] == "lpips":
        raise UserError(f"{path} was trained with LPIPS, which has none of the layers of Table 6")
    vgg = vgg_for(path, ckpt, args.vgg, device)
    images = images_of(path, ckpt["config"], args.data)[1]
    draw = torch.Generator().manual_seed(mix(0, "balance"))
    drawn = torch.randperm(len(images), generator=draw)[: args.num or 64].tolist()
    found = pushes(tokenizer, vgg, to_float(torch.stack([images.view(i) for i in drawn]), device))
    weights = LAYER_SETS[c["layers"]] if c["layers"] else layer_weights(c["alpha"])
    total = sum(w * found[name][0] for name, w in weights.items())
    rows = {name: ratio(found, {name: 1.0}) | dict(share=weights.get(name, 0) * found[name][0] / total)
            for name in NAMES}
    loss = ratio(found, {name: w * c["per_weight"] for name, w in weights.items()})
    note = ckpt["note"] or "the perceptual network has random weights" * vgg.random_weights
    print0(f"\n{path}, {ckpt['stage']}, step {ckpt['step']}; {len(drawn)} validation images; ratios to L1"
           + f"; {note}" * bool(note))
    print_table([["", "size", "gradient at x_hat", "gradient at the last layer", "share in this run's L_per"],
                 *([name, *map(number, row.values())] for name, row in rows.items())])
    print0(f"{c['per_weight']:g} L_per of {source}: {loss['size']:.2g} times the size of L1, "
           f"{loss['at_image']:.2g} times its gradient at x_hat, {loss['at_layer']:.2g} at the last layer")
    return dict(
        ckpt=str(path), stage=ckpt["stage"], step=ckpt["step"], tokenizer_hash=latent_hash(tokenizer),
        **alpha_of(ckpt["config"]), vgg=source, per_weight=c["per_weight"], num_images=len(drawn), note=note,
        l1=found["L1"][0], terms=rows, weighted_loss=loss)


def balance(args):
    out = args.out or args.ckpt[0].with_name("balance.json")
    writable(out, suffix=".json")
    found = [balance_of(path, args, setup_device(args.device)) for path in args.ckpt]
    save_text(json.dumps(found, indent=1) + "\n", out)
    print0(f"wrote {out}")
