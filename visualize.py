"""The paper's tool: what does a prior predict, seen as pictures (Sec. 3.2, Fig. 3)?

    python visualize.py view --ckpt runs/demo/ar.pt                       # one prior with its tokenizer
    python visualize.py view --ckpt runs/a/ar.pt runs/b/ar.pt --num 6     # several, on the same images

The paper's tables, and what else one asks of a run, are in studies/: `python -m studies`.

The teacher-forced view decodes the prior's top-1 prediction of every token, given the true tokens before
it, and shows it beside the reconstruction. A tokenizer whose tokens are predictable gives two alike pictures.
"""

if __name__ == "__main__":
    from recipes.options import begin

    ARGUMENTS = begin("visualize")  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import io
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import forks
from perceptual import LOGIT, lpips_like
from plumbing.data import images_of
from plumbing.drawing import MARKERS, draw_grid, new_figure, save_figure, show, writable_picture
from plumbing.errors import UserError
from plumbing.files import read_checkpoint, read_metrics
from plumbing.hashes import latent_hash
from plumbing.images import psnr, to_float, to_uint8
from plumbing.models import find_vgg, load_model, load_tokenizer_of
from plumbing.processes import one_line_errors, print0, setup_device
from plumbing.slices import decode, generate_tokens


@torch.no_grad()
def teacher_forced_view(tokenizer, prior, x, labels=None):
    """s = tokens of x; s' = argmax of one forward pass on [c, s_1..s_{N-1}]; both decoded (Sec. 3.2, Fig. 3).

    tokenizer: anything with encode, decode;  prior: ARPrior (a masked prior would see its target)
    x:         (B, 3, H, W) in [-1, 1];  labels: (B,) int64 or None
    returns:   dict of tokens s and tokens_pred s' (B, N) int64, nats (B, N), hits (B, N) float 0 or 1,
               reconstruction Dec(s) and prediction Dec(s') (B, 3, H, W)
    """
    tokens = tokenizer.encode(x)
    tokens_pred, nats, hits = prior.predict(tokens, labels)
    return dict(
        tokens=tokens, tokens_pred=tokens_pred, nats=nats, hits=hits,
        reconstruction=tokenizer.decode(tokens), prediction=tokenizer.decode(tokens_pred),
    )


@torch.no_grad()
def view_numbers(x, view, vgg=None):
    """The discrepancy of a view in numbers: means over images; PSNR in dB after rounding to 8 bits.

    vgg: VGGTaps or None; with one, the LPIPS-like distances, and the share of images that keep the class
           which the VGG sees in the input
    """
    reconstruction, prediction = view["reconstruction"], view["prediction"]
    side = math.isqrt(view["nats"].shape[1])
    numbers = dict(
        top1=view["hits"].float().mean().item(),
        nats_per_token=view["nats"].mean().item(),
        psnr_reconstruction=psnr(x, reconstruction).mean().item(),
        psnr_prediction=psnr(x, prediction).mean().item(),
        psnr_prediction_to_reconstruction=psnr(reconstruction, prediction).mean().item(),
        nats_by_position=[[round(v, 4) for v in row] for row in view["nats"].mean(0).view(side, -1).tolist()],
    )
    if vgg:
        classes = [vgg(image.clamp(-1, 1), [LOGIT])[LOGIT].argmax(1)
                   for image in (x, reconstruction, prediction)]
        numbers |= dict(
            lpips_like_reconstruction=lpips_like(vgg, x, reconstruction).mean().item(),
            lpips_like_prediction_to_reconstruction=(
                lpips_like(vgg, reconstruction, prediction).mean().item()),
            class_kept_by_reconstruction=(classes[1] == classes[0]).float().mean().item(),
            class_kept_by_prediction=(classes[2] == classes[0]).float().mean().item())
    return numbers


# ----------------------------------------------------------------------------------------------------------
# Figures of the paper. Each takes checkpoints and writes a PNG, and a JSON with every number in it
# ----------------------------------------------------------------------------------------------------------

VIEWS = dict(  # what each figure shows of every pair of tokenizer and prior, beside the input
    view=("reconstruction", "prediction", "hits"), fig1b=("prediction",), fig5a=("prediction",),
    fig4=("reconstruction", "prediction"), fig11=("reconstruction", "prediction"))
LABELS = dict(reconstruction="reconstruction", prediction="AR prediction", hits="hits", input="input")


def alpha_of(config):
    """alpha of the tokenizer; None, and the name of its layers, where another loss took its place"""
    c = config["phase1"]
    return dict(alpha=None, layers=c["layers"]) if c["layers"] else dict(alpha=c["alpha"])


def loss_in_words(c):
    """The perceptual loss of a phase's section of the preset, in words"""
    return f"layers {c['layers']}" if c["layers"] else f"α = {c['alpha']:g}"


def same_size(path, ckpt, config, other):
    if ckpt["config"]["image_size"] != config["image_size"]:
        raise UserError(f"{path} is for {ckpt['config']['image_size']}-pixel images, {other} for others")


def load_images(config, num, data, ckpt):
    """The first `num` validation images of the run that wrote `ckpt`, or images of the folder `data`:
    (ImageData, x (num, 3, S, S))."""
    images = images_of(ckpt, config, data)[1]
    num = num or min(64, len(images))
    if num > len(images):
        raise UserError(f"--num {num}, but there are only {len(images)} images")
    return images, torch.stack([images.view(i) for i in range(num)])


def load_pairs(ckpts, num, device, tokenizers=(), data=None):
    """What several AR priors make of the same images.

    returns: [dict(name, view, numbers, classes)], and the images x (num, 3, S, S) in [-1, 1]
    raises:  UserError for a prior that is not autoregressive (a masked one would see what it predicts), for
             images of different sizes, and for fewer images than `num`
    """
    pairs, first = [], None
    for i, path in enumerate(ckpts):
        prior, ckpt = load_model(path, ("ar",), device)
        given = tokenizers[i] if tokenizers else None
        tokenizer, tokenizer_ckpt = load_tokenizer_of(path, ckpt, given, device)
        config, names = ckpt["config"], ckpt["class_names"] if prior.config.num_classes else None
        if first is None:
            first = config
            images, x = load_images(config, num, data, path)
            x = to_float(x, device)
        same_size(path, ckpt, first, ckpts[0])
        if names and not (images.class_names and {*images.class_names} <= {*names}):
            raise UserError(f"{path} knows other classes than these images have: sort them into folders with "
                            f"names out of {', '.join(names[:20])}")
        labels = names and torch.tensor(
            [names.index(images.class_names[images.label(j)]) for j in range(len(x))], device=device)
        view = teacher_forced_view(tokenizer, prior, x, labels)
        numbers = dict(
            ckpt=str(path), tokenizer_hash=ckpt["tokenizer_hash"], tokenizer_stage=tokenizer_ckpt["stage"],
            num_images=len(x), **alpha_of(config), note=ckpt["note"] or tokenizer_ckpt["note"],
            **view_numbers(x, view, find_vgg(path, ckpt, device)))
        name = f"{Path(path).absolute().parent.name}\n{loss_in_words(config['phase1'])}"
        classes = [names[label] for label in labels] if names else []
        pairs.append(dict(name=name, view=view, numbers=numbers, classes=classes))
    return pairs, x


def figure_views(figure, args, device):
    """Input beside reconstruction and AR prediction of each pair (Fig. 1b, 4, 5a, 11, and `view`)."""
    pairs, x = load_pairs(args.ckpt, args.num, device, args.tokenizer, args.data)
    return views_grid(figure, pairs, x, args.wide), [pair["numbers"] for pair in pairs]


def views_grid(figure, pairs, x, wide=False):
    """The grid of a figure out of VIEWS, from the pairs of `load_pairs` and the images x (num, 3, S, S)."""
    keys, side = VIEWS[figure], math.isqrt(pairs[0]["view"]["hits"].shape[1])
    if figure == "fig5a":
        pairs = sorted(pairs, key=lambda pair: pair["numbers"]["alpha"] or 0)

    def panels(pair, i, above):
        for key in keys:
            picture, caption = pair["view"][key][i], ""
            if key == "hits":
                picture, caption = picture.view(side, side), f"{picture.float().mean():.0%}"
            yield f"{above}{LABELS[key]}", picture, caption

    if figure == "fig4":  # a row for each pair, all images side by side
        rows = [sum(([("input", x[i], ""), *panels(pair, i, "")] for i in range(min(len(x), 3))), [])
                for pair in pairs]
        names = [pair["name"] for pair in pairs]
    else:
        rows = [[("input", x[i], ""), *(p for pair in pairs for p in panels(pair, i, f"{pair['name']}\n"))]
                for i in range(min(len(x), 8 if figure == "view" else 6))]
        names = pairs[0]["classes"][: len(rows)]
    notes = {pair["numbers"]["note"] for pair in pairs} - {""}
    note = "hits: yellow where the prediction is the true token" if "hits" in keys else ""
    return draw_grid(rows, names, "; ".join(filter(None, [note, *notes])), wide=wide)


def figure_example(args, device):
    """Fig. 3, one image in five steps: tokens, the shifted input, one pass, its prediction, both decoded."""
    pairs, x = load_pairs(args.ckpt[:1], args.num, device, args.tokenizer, args.data)
    (pair,), side = pairs, math.isqrt(pairs[0]["view"]["hits"].shape[1])
    view, condition = pair["view"], f"class {pair['classes'][0]}" if pair["classes"] else "no classes"
    tokens, predicted = (["/".join(map(str, token.view(-1).tolist())) for token in view[key][0]]
                         for key in ("tokens", "tokens_pred"))
    hits, nats = (view[key][0].view(side, side) for key in ("hits", "nats"))
    fig = new_figure(9, 4.4)
    grid = fig.subplots(2, 4)

    def table(axis, values, title, missed):
        show(axis, missed, title, cmap="Wistia", vmax=2)
        for i, value in enumerate(values if side <= 16 else ()):
            axis.text(i % side, i // side, value, ha="center", va="center", fontsize=max(2.5, 32 / side))

    show(grid[0, 0], x[0], "input x")
    table(grid[0, 1], tokens, "1. tokens s = encode(x)", torch.zeros(side, side))
    table(grid[0, 2], ["c", *tokens[:-1]], "2. input of the prior:\nc, then s without its last",
          torch.zeros(side, side))
    drawn = show(grid[0, 3], nats, "3. one pass: nats of each token of s", vmax=nats.max().item())
    fig.colorbar(drawn, ax=grid[0, 3], shrink=0.8, label="nats (more: a surprise)")
    text = [pair["name"], f"condition c: {condition}",
            f"top-1: {hits.float().mean():.0%} of {side**2} tokens", f"{nats.mean():.2f} nats a token"]
    show(grid[1, 0], None)
    grid[1, 0].text(0, 0.5, "\n".join(text), fontsize=8, va="center", transform=grid[1, 0].transAxes)
    table(grid[1, 1], predicted, "4. prediction s′ = argmax of the pass\n(orange: not the token of s)",
          1.0 - hits.float())
    show(grid[1, 2], view["reconstruction"][0], "5. reconstruction decode(s)")
    show(grid[1, 3], view["prediction"][0], "5. AR prediction decode(s′)")
    return fig, dict(pair["numbers"], tokens=tokens, prediction=predicted, image=0)


def framed(image, place, width):
    """(3, S, S) in [-1, 1] with a white frame around a square part, `place` in rows and columns."""
    frame = torch.zeros_like(image, dtype=torch.bool)
    inside = slice(place.start + width, place.stop - width)
    frame[:, place, place] = True
    frame[:, inside, inside] = False
    return torch.where(frame, 1.0, image)


def figure_phases(figure, args, device):
    """Fig. 7a and 9: the same sampled tokens decoded by the decoders of phase 1 and of phase 2.

    Fig. 7a: one prior (of --ckpt), the difference beside; Fig. 9: every prior given, the middle enlarged.
    """
    rows, numbers, names = [], [], []
    for path in args.ckpt:
        prior, ckpt = load_model(path, ("ar", "nar"), device)
        beside = [Path(path).with_name(phase + Path(path).suffix) for phase in ("phase1", "phase2")]
        files = args.tokenizer or beside
        if len(files) != 2:
            raise UserError("--tokenizer takes two files here, of phase 1 and of phase 2")
        decoders = [load_tokenizer_of(path, ckpt, file, device) for file in files]
        stages = [about["stage"] for _, about in decoders]
        if stages != ["phase1", "phase2"]:
            raise UserError(f"--tokenizer takes phase 1 first, then phase 2; {files[0]} is {stages[0]}")
        num = args.num or 64
        classes = prior.config.num_classes
        labels = torch.arange(num, device=device) % classes if classes else None
        tokens = generate_tokens(prior, labels, ckpt["config"]["seed"], range(num), ckpt["config"]["sample"])
        one, two = (decode(tokenizer, tokens) for tokenizer, _ in decoders)
        change, size = (one - two).abs(), one.shape[2]
        numbers.append(dict(
            ckpt=str(path), stage=ckpt["stage"], num_images=num, tokens=tokens.tolist(), note=ckpt["note"],
            mean_difference=change.mean().item(), largest_difference=change.max().item(),
            psnr_between=psnr(one, two).mean().item()))
        for i in range(min(num, 6 if figure == "fig7a" else 3)):
            both = {"phase 1": one[i], "phase 1 + 2": two[i]}
            if figure == "fig7a":
                row = [*both.items(), ("difference", (change[i].mean(0) * 2).clamp(0, 1))]
            else:
                middle, line = slice(size // 4, 3 * size // 4), max(1, size // 64)
                row = [(f"whole\n{title}", framed(image, middle, line)) for title, image in both.items()]
                row += [(f"enlarged\n{title}", image[:, middle, middle]) for title, image in both.items()]
            rows.append([(title, image, "") for title, image in row])
            name = f"{ckpt['class_names'][labels[i]]}\n" if classes else ""
            names.append(f"{name}{ckpt['stage'].upper()} sample {i}")
    note = "difference, mean of the colours: blue 0, yellow 64 of 255 levels or more"
    return draw_grid(rows, names, note if figure == "fig7a" else "white frame: what is enlarged",
                     wide=args.wide), numbers


def disturbed(x, seed=0):
    """{name: images} three harmless changes of x (B, 3, S, S) in [-1, 1]: Gaussian noise of deviation 0.01 on
    the scale of [0, 1] (Fig. 8; clipped, I25), a shift by one pixel to the right, JPEG of quality 95."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    shifted = F.pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1]
    jpeg = []
    for image in to_uint8(x):
        data = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "JPEG", quality=95)
        jpeg.append(torch.from_numpy(np.array(Image.open(data))).permute(2, 0, 1))
    jpeg = to_float(torch.stack(jpeg), x.device)
    return dict(noise=(x + 0.02 * noise).clamp(-1, 1), shift=shifted, jpeg=jpeg)


def stability(tokenizer, x, batch=50):
    """Fig. 8 as a metric: the share of tokens that change under each of `disturbed`, {name: share}."""
    parts = {name: images.split(batch) for name, images in dict(disturbed(x), none=x).items()}
    tokens = {name: torch.cat([tokenizer.encode(part) for part in split]) for name, split in parts.items()}
    before = tokens.pop("none")
    return {name: (after != before).float().mean().item() for name, after in tokens.items()}


def figure_stability(args, device):
    """Fig. 8: token maps of an image with and without noise that nobody sees, for every tokenizer."""
    rows, numbers, names, x = [], [], [], None
    for path in args.ckpt:
        tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
        if x is None:
            config = ckpt["config"]
            x = to_float(load_images(config, args.num, args.data, path)[1], device)
        same_size(path, ckpt, config, args.ckpt[0])
        noisy, side = disturbed(x)["noise"], math.isqrt(tokenizer.token_shape[0])
        for i in range(min(len(x), 2)):
            before, after = (tokenizer.encode(image[i : i + 1]).view(side, side, -1) for image in (x, noisy))
            changed = (before != after).any(2)
            highest = tokenizer.codebook_size - 1  # one scale: equal tokens have equal colours
            before, after = before[..., 0] / highest, after[..., 0] / highest  # the first of several
            rows.append([("x", x[i], ""), ("x + noise", noisy[i], ""), ("tokens of x", before, ""),
                         ("tokens of x + noise", after, ""),
                         ("changed", changed, f"{changed.float().mean():.0%} of tokens")])
            names.append(f"{Path(path).absolute().parent.name}\n{loss_in_words(ckpt['config']['phase1'])}")
        numbers.append(dict(ckpt=str(path), tokenizer_hash=latent_hash(tokenizer), num_images=len(x),
                            **alpha_of(ckpt["config"]), note=ckpt["note"], changed=stability(tokenizer, x)))
    note = "tokens: from blue, 0, to yellow, K - 1; changed: yellow; noise of deviation 0.01 on [0, 1]"
    return draw_grid(rows, names, note, wide=args.wide), numbers


def figure_losses(args, device):
    """Fig. 10: validation loss of priors over training steps, one curve a run; at the right relative to the
    unigram entropy of the tokens, since lower entropy alone is not better modelling."""
    fig, numbers = new_figure(7.5, 3), []
    axes = fig.subplots(1, 2)
    for i, path in enumerate(args.ckpt):
        ckpt = read_checkpoint(path, ("ar", "nar"))
        rows = [row for row in read_metrics(Path(path).with_name("metrics.jsonl"))
                if row["stage"] == ckpt["stage"] and row.get("val_loss") is not None]
        if not rows:
            raise UserError(f"no validation losses of {path} in {Path(path).with_name('metrics.jsonl')}")
        entropy, name = rows[-1]["unigram_entropy"], Path(path).absolute().parent.name
        steps, losses = [row["step"] for row in rows], [row["val_loss"] for row in rows]
        relative = [loss / (entropy or math.nan) for loss in losses]  # one code has no entropy
        for axis, values in zip(axes, (losses, relative), strict=True):
            axis.plot(steps, values, MARKERS[i % 7] + "-", markersize=3,
                      label=f"{ckpt['stage'].upper()} {name} ({loss_in_words(ckpt['config']['phase1'])})")
        numbers.append(dict(ckpt=str(path), stage=ckpt["stage"], **alpha_of(ckpt["config"]), steps=steps,
                            val_loss=losses, last_val_loss=losses[-1], unigram_entropy=entropy))
    for axis, label in zip(axes, ("nats per token", "relative to the unigram entropy"), strict=True):
        axis.set(xlabel="training step", ylabel=label)
    fig.suptitle("validation loss")
    axes[0].legend()
    return fig, numbers


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def draw(args, device):
    """(figure, numbers) of a figure of the paper, or of a fork"""
    if args.fork:
        return forks.load(args.fork).draw(args, device)
    if args.figure in VIEWS:
        return figure_views(args.figure, args, device)
    if args.figure in ("fig7a", "fig9"):
        return figure_phases(args.figure, args, device)
    figures = dict(fig3=figure_example, fig8=figure_stability, fig10=figure_losses)
    return figures[args.figure](args, device)


def in_words(row):
    """The single numbers of a figure's row, and those one level below, in lines that fit a screen."""
    below = [(f"{name} {key}", v) for name, value in row.items() if isinstance(value, dict)
             for key, v in value.items()]
    words = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in [*row.items(), *below]
             if isinstance(value, float)]
    return textwrap.fill(f"{row['ckpt']}: {', '.join(words)}", 100, subsequent_indent="  ")


def main(args):
    with one_line_errors():
        default = args.ckpt[0].parent / f"{args.figure}.png"
        out = writable_picture(args.out, default, ".json", *[".pdf"] * args.pdf)
        fig, numbers = draw(args, setup_device(args.device))
        save_figure(fig, out, numbers, args.pdf)
        for row in numbers if isinstance(numbers, list) else [numbers]:
            print0(in_words(row))
        print0(f"wrote {out} and the numbers in {out.with_suffix('.json').name}")


if __name__ == "__main__":
    main(ARGUMENTS)
