"""The numbers and pictures of docs/bugs.md:

    PYTHONPATH=. python tests/bugs/measure.py [NAME ...] [--pictures assets/bugs]

Copies the tree, measures in the copy, first as it is, then with the patch of each bug NAME (all: twenty
CPU-minutes). Prints a line for each number of the code as it is, and for each that a bug changes. The models
are those of the box, assets/models/demo, or stages of `demo` that are trained here, at few steps (SHORT).
"""

import argparse
import contextlib
import io
import os
import re
import runpy
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo
import torchvision.models.vgg  # noqa: F401  (slow to import: here once, not in every child)
from PIL import Image
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from test_bugs import CATCHES, copy_tree, patch
else:  # in a child and the copy
    import perceptual as P
    import train
    from helpers import rows
    from plumbing.dataset import batches
    from plumbing.images import make_sheet, psnr, to_float, to_uint8
    from plumbing.models import load_model
    from plumbing.parallel import begin_step
    from plumbing.shapes import Shapes
    from plumbing.slices import decode, generate_images, generate_tokens
    from plumbing.weights import build_vgg16, vgg_from_state_dict
    from prior_ar import sample_logits, top_p_filter
    from prior_nar import decode_counts, mask_tokens
    from recipes.options import train_args
    from studies.distances import ssim
    from test_tokenizer import images, tiny_tokenizer
    from tokenizer import TokenizerConfig, VectorQuantizer, VQTokenizer

BOX = Path("assets/models/demo")
TOY = dict(image_size=16, base_width=8, channel_mult=(1, 2, 2), codebook_size=64, codebook_dim=8)
SHORT = dict(  # what a training of `demo` here changes
    phase1=f"--vgg {BOX / 'vgg'} --tokenizer {BOX / 'phase1'} --set tokenizer.warm_start=5"
           " --set phase1.batch=16 --set phase1.steps=45 --set phase1.ema=0.8",
    ar=f"--tokenizer {BOX / 'phase2'} --limit 4000 --set ar.steps=200 --set ar.warmup=20"
       " --set ar.lr_start=80 --set ar.ema=0.95",
    nar=f"--tokenizer {BOX / 'phase2'} --limit 4000 --set nar.steps=300 --set nar.warmup=30"
        " --set nar.lr_start=100 --set nar.ema=0.95")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shapes():
    """256 images, (256, 3, 16, 16) in [-1, 1]; the seed is 0 after that."""
    data = Shapes("train", 256, 16)
    x = to_float(torch.stack([data.view(i) for i in range(256)]), "cpu")
    torch.manual_seed(0)
    return x


def written(file, pattern, **values):
    """The value of an expression as the copy writes it, for what stands in the middle of a function."""
    return eval(re.search(pattern, Path(file).read_text())[1], values)


def fit(optimizer, steps, loss_of):
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


def as_seen(x, x_hat, labels):
    """What is measured of images, and a sheet of them."""
    logits = load_model(BOX / "vgg", ("vgg",))[0](x_hat.clamp(-1, 1), [P.LOGIT])[P.LOGIT]
    sheet = to_uint8(x_hat)[:15] if x is None else torch.cat([to_uint8(x)[:5], to_uint8(x_hat)[:5]])
    found = {"share whose class VGG sees": logits.argmax(1) == labels, "sheet": make_sheet(sheet, 5, zoom=2)}
    return found if x is None else found | {
        "PSNR": psnr(x, x_hat), "SSIM": ssim(to_uint8(x), to_uint8(x_hat)), "L1": (x_hat - x).abs().mean()}


@torch.no_grad()
def reconstructions(path=BOX / "phase1"):
    """Of the first 200 validation images, by the decoder in the box or another one."""
    data, tokenizer = Shapes("val", 1000, 32), load_model(path, ("phase1",))[0]
    x = to_float(torch.stack([data.view(i) for i in range(200)]), "cpu")
    tokens = tokenizer.encode(x)
    share = tokens.flatten().bincount(minlength=64).double() / tokens.numel()
    near = x + 0.002 * torch.randn(x.shape, generator=seeded(0))
    x_hat, levels = decode(tokenizer, tokens), torch.arange(256)
    inside = x_hat.abs() <= 1
    return as_seen(x, x_hat, torch.tensor([data.label(i) for i in range(200)])) | {
        "codes used": (share > 0).sum(), "perplexity": torch.special.entr(share).sum().exp(),
        "share of values outside": ~inside, "PSNR of a near copy": psnr(x, near),
        "error in levels": (to_uint8(x_hat) - (x_hat + 1) * 127.5)[inside],
        "share of levels that survive": to_uint8(levels / 127.5 - 1) == levels}


@torch.no_grad()
def samples(stage, dropout="0", path=None):
    """500 images by the prior in the box, or another one; as the preset samples."""
    prior, ckpt = load_model(path or BOX / stage, (stage,))
    for module in prior.modules():
        module.p = module.dropout = float(dropout)
    torch.manual_seed(0)
    labels, rounds, table = torch.arange(500) % 10, [], prior.transformer.token_table
    again = [prior.train(), labels, 0, range(500), ckpt["config"]["sample"]]
    tokens = generate_tokens(*again)
    table.register_forward_pre_hook(lambda _, seen: rounds.append(seen[0].clone()))
    second = generate_tokens(*again)
    found = {"tokens an image that differ in a second call": (tokens != second).sum() / 500}
    if stage == "nar":
        changed = [((old != prior.mask_id) & (old != new)).sum()
                   for old, new in zip(rounds, [*rounds[1:], second], strict=True)]
        found |= {"fixed tokens an image that change": sum(changed) / 500,
                  "share of images with [MASK]": (tokens == prior.mask_id).any(1)}
    try:
        return found | as_seen(None, decode(load_model(BOX / "phase2", ("phase2",))[0], tokens), labels)
    except IndexError as error:
        return found | {"the decoder ends": str(error)}


def trained(stage):
    """What a short training of `demo` ends with, and its samples or reconstructions."""
    with tempfile.TemporaryDirectory() as out:
        words = ["--stage", stage, "--preset", "demo", "--out", out, *SHORT[stage].split()]
        train.main(*train_args([*words, "--log-every", "5", "--eval-every", "9999"]))
        found, path = rows(Path(out), stage), Path(out, f"{stage}.pt")
        tail = [row for row in found if "lr" in row][-4:]
        numbers = {name: sum(row[name] for row in tail) / len(tail) for name in tail[-1] if "loss" in name}
        seen = reconstructions(path) if stage == "phase1" else samples(stage, path=path)
        return numbers | seen | {"validation": found[-1].get("val_loss", found[-1].get("val_l1"))}


def quantizer():
    found = {}
    for kind, shape, sizes in [("plain", (4, 8, 16, 16), dict(codebook="plain")),
                               ("fn", (4, 8, 16, 16), dict(codebook="fn")),
                               ("bf16", (8, 32, 16, 16), dict(codebook_size=1024, codebook_dim=32))]:
        torch.manual_seed(0)
        model = VectorQuantizer(TokenizerConfig(**TOY | sizes))
        torch.nn.init.normal_(model.codebook.weight)
        z_hat = torch.randn(shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            z_st, indices, latent = model(z_hat)
        found |= {f"{kind}, {name}": value for name, value in latent.items()} | {
            f"{kind}, squared distance": F.mse_loss(z_st, z_hat), f"{kind}, codes": len(indices.unique()),
            f"{kind}, share of other tokens than encode's": indices != model.quantize(z_hat)}
    x = shapes()[:16]
    model = VQTokenizer(TokenizerConfig(**TOY))
    torch.nn.init.normal_(model.quantizer.codebook.weight, std=0.3)
    gradients = []
    for size in (16, 1):
        run = SimpleNamespace(micro=lambda x, size=size: x.split(size), autocast=contextlib.nullcontext())
        micro = begin_step(run, model, None, x, 0)
        model.zero_grad()
        loss = sum(model(part)[2]["loss_entropy"] for part in micro) / len(micro)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return found | {"16 parts, loss_entropy": loss, "16 parts, error of its gradient": error}


def losses():
    pictures = shapes()
    sizes = dict(width=8, num_classes=10, hidden=16)
    vgg, x = build_vgg16(**sizes), F.interpolate(pictures[:16], scale_factor=2)
    x_hat, taps = F.avg_pool2d(x, 3, 1, 1), P.VGGTaps(vgg)
    found = {f"term of {name}": v for name, v in P.perceptual_terms(taps, x, x_hat, [*P.LAYERS]).items()}
    state = vgg.state_dict()
    state["features.28.kernel"] = state.pop("features.28.weight")
    with contextlib.suppress(ValueError):  # the code as it is refuses the file
        loaded = P.VGGTaps(vgg_from_state_dict(state, **sizes))
        found["term of relu5_3, misnamed"] = P.perceptual_terms(loaded, x, x_hat, ["relu5_3"])["relu5_3"]
    torch.manual_seed(0)
    model = P.StyleDiscriminator(16, max_width=64)
    with torch.autocast("cpu", torch.bfloat16):
        r1 = P.r1_penalty(model, pictures[:32])
    r1.backward()
    gradients = model.blocks[0].conv1.weight.grad.flatten()[:4]
    return found | {f"R1's gradient {i}": gradient for i, gradient in enumerate(gradients)} | {
        "R1 in bf16": r1, "deviation of VGG's input": P.normalize_images(x).std(),
        "negative share of relu5_3": taps(x, ["relu5_3"])["relu5_3"] < 0}


def discriminator():
    pictures = shapes()
    model, zeros = P.StyleDiscriminator(16, max_width=16), torch.zeros(2, 4, requires_grad=True)
    printed = []

    def loss_of(step):
        x = pictures[torch.randint(256, (16,), generator=seeded(step))]
        printed.append(P.disc_loss(model(x), model(F.avg_pool2d(x, 3, 1, 1))))
        return printed[-1] if step % 16 else written(
            "train.py", r"loss = (loss \+ .*r1_penalty.*)", loss=printed[-1], r1_penalty=P.r1_penalty, x=x,
            disc_net=model, c=dict(r1_every=16, r1_gamma=1.0))

    fit(torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.99)), 80, loss_of)
    real, fake = model(pictures[:128]), model(F.avg_pool2d(pictures[:128], 3, 1, 1))
    P.disc_loss(*zeros).backward()
    return {"loss": printed[-1], "logit of images": real.mean(), "logit of blurred ones": fake.mean(),
            "share of pairs in order": real[:, None] > fake[None],
            "R1": P.r1_penalty(model, pictures[:64], 2.0), "gradient of real logits": zeros.grad[0].sum(),
            "gradient of fake logits": zeros.grad[1].sum()}


def training():
    model = tiny_tokenizer().freeze_latent_space().train()
    tokens, mode = model.encode(images(8)), model.encoder.training
    c = dict(lr=3e-4, lr_end=0.0, lr_start=0, steps=60000, warmup=0, schedule="cosine")
    rate = written("train.py", r"= next\(stream\), (lr_at\(.*?\)),", lr_at=train.lr_at, step=45000,
                   start=30000, c=c)
    data, seen, get = Shapes("train", 200, 8), set(), Shapes.__getitem__
    places = [[data.shuffled(200 * epoch + i) for i in range(200)] for epoch in range(2)]
    Shapes.__getitem__ = lambda self, place: seen.add(self.shuffled(place)) or get(self, place)
    for start, count in ((0, 13), (13, 12)):
        stream = batches(data, 8, start, 0)
        for _ in range(count):
            next(stream)
        stream.close()
    return {"frozen encoder in training mode": mode, "images seen of 200": len(seen), "rate": rate,
            "tokens that change": (tokens != model.eval().encode(images(8))).sum(),
            "share of images in their old place": sum(map(int.__eq__, *places)) / 200}


def sampling():
    found, noise = {}, torch.rand(2000, 257, generator=seeded(0))
    noise[0, 0] = 0
    masked = mask_tokens(torch.zeros(2000, 256, dtype=torch.int64), 1, noise)[1].float().mean(1)
    sure = torch.tensor([[0.95, 0.03, 0.02]])
    for name, probs in [("4", torch.tensor([[0.5, 0.3, 0.15, 0.05]])), ("a sure one", sure), (
            "1,024", torch.randn(500, 1024, generator=seeded(0)).mul(2).softmax(1).sort(1)[0].flip(1))]:
        kept = top_p_filter(probs, 0.92) > 0
        found |= {f"codes of {name}": kept.sum(1), f"mass of {name}": (kept * probs).sum(1)}
    try:
        sample_logits(sure.log(), torch.tensor([0.5]), top_p=0.92)
    except RuntimeError as error:
        found["the draw ends"] = str(error)
    gumbel = written("prior_nar.py", r"gumbel = (.*)", torch=torch, t=0,
                     noise=torch.rand(1, 1, 1, 10**6, generator=seeded(0)))
    ar, tokenizer = (load_model(BOX / name, (name,))[0] for name in ("ar", "phase2"))
    whole, *parts = [generate_tokens(ar, None, 0, i, ar.SAMPLER)
                     for i in (range(64), *(range(start, start + 16) for start in (0, 16, 32, 48)))]
    return found | {
        "masked at r = 0": masked[0], "masked on average": masked, "mean of the Gumbel noise": gumbel,
        "holes after 12 rounds": decode_counts(256, 12)[-1],
        "share of equal images": (whole == torch.cat(parts)).all(1),
        "images of 50": len(generate_images(ar, tokenizer, 50, None, 0, ar.SAMPLER, batch=16))}


MEASURES = {
    "quantizer": "codes_not_normalised flattened_without_permute entropy_of_each_part distances_in_bf16",
    "losses": "images_not_normalised taps_before_the_relu weights_not_loaded r1_under_autocast",
    "discriminator": "logits_as_labels fakes_called_real lazy_r1_without_its_factor",
    "training": "frozen_encoder_in_training_mode rate_restarts_on_resume images_repeat_after_resume"
                " every_epoch_in_one_order",
    "sampling": "masked_share_inverted top_p_drops_the_crossing_code top_p_keeps_none"
                " gumbel_sign holes_are_left one_seed_a_batch last_batch_dropped",
    "reconstructions": "pixels_wrap_around pixels_truncated psnr_of_unrounded_images ssim_of_the_wrong_range",
    "samples ar": "cache_without_positions top_p_drops_the_crossing_code",
    "samples nar": "gumbel_sign fixed_tokens_change holes_are_left",
    "samples nar 0.1": "dropout_of_attention_in_eval sampling_in_training_mode",
    "trained ar": "target_in_the_input no_causal_mask averaged_weights_unused",
    "trained nar": "mask_is_a_code head_predicts_mask loss_on_visible_tokens masked_share_inverted"
                   " averaged_weights_unused",
    "trained phase1": "beta_on_the_codebook codebook_term_after_straight_through both_terms_detached_alike"
                      " straight_through_reaches_codes flattened_without_permute entropy_sign"
                      " mean_of_entropies logits_as_labels fakes_called_real discriminator_gradients_pile_up"
                      " fakes_not_detached"}


def child(measure, copy):
    """A measure in the copy, whose modules are imported nowhere else.  returns: its sheet, {number: mean}"""
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    name, *words = measure.split()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = runpy.run_path("tests/bugs/measure.py")[name](*words)
    except IndexError as error:  # [MASK] has no code: a training ends so at its first samples
        found = {"it ends": str(error)}
    sheet = found.pop("sheet", None)
    return sheet, {name: value if isinstance(value, str) else f"{torch.as_tensor(value).double().mean():.5g}"
                   for name, value in found.items()}


def run(*arguments):
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(child, *arguments).result()


def side_by_side(right, wrong, path):
    both = Image.new("RGB", (2 * right.width + 24, right.height), "white")
    both.paste(right)
    both.paste(wrong, (right.width + 24, 0))
    both.quantize(96).save(path, optimize=True)


def main(names, pictures):
    with tempfile.TemporaryDirectory() as work:
        copy = copy_tree(Path(work, "copy"))
        for measure, caught in MEASURES.items():
            bugs = [bug for bug in caught.split() if bug in names or not names]
            right, clean = run(measure, copy) if bugs else (None, {})
            for number, value in clean.items():
                print(f"as it is, {measure}: {number} {value}", flush=True)
            for bug in bugs:
                patch(copy, bug).check_returncode()
                wrong, found = run(measure, copy)
                for number in [name for name, value in found.items() if value != clean.get(name)]:
                    old, new = clean.get(number, "none"), found[number]
                    print(f"{bug}, {measure}: {number} {new} instead of {old}", flush=True)
                if pictures and right and wrong:
                    side_by_side(right, wrong, pictures / f"{bug}.png")
                patch(copy, bug, "--reverse").check_returncode()


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="The numbers and pictures of docs/bugs.md")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of bugs; all, if none")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="right | wrong, of samples and images")
    ARGUMENTS = parser.parse_args()
    if UNKNOWN := {*ARGUMENTS.names} - {*CATCHES}:
        parser.error(f"docs/bugs.md has no {', '.join(sorted(UNKNOWN))}")
    main(**vars(ARGUMENTS))
