"""The paper's tool: what does a prior predict, seen as pictures (Sec. 3.2, Fig. 3)?

    python visualize.py view --ckpt runs/demo/ar.pt                       # one prior with its tokenizer
    python visualize.py view --ckpt runs/a/ar.pt runs/b/ar.pt --num 6     # several, on the same images
    python visualize.py table1 --preset demo --run                        # train and measure every row
    python visualize.py metrics runs/*/metrics_ar.json                    # results side by side

The teacher-forced view decodes the prior's top-1 prediction of every token, given the true tokens before
it, and shows it beside the reconstruction. A tokenizer whose tokens are predictable gives two alike pictures.
"""

import argparse
from pathlib import Path

from plumbing.paths import as_path, expanded
from plumbing.console import steady_process

# Rows: label, --ablation of train.py, decoder of which phase, the paper's numbers in the order of columns.
TABLES = {
    "table1": dict(
        title="Table 1: decoders of more capacity (one phase, alpha = 0)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("Baseline", "baseline", "phase1", (3.45, 16.97, 13.26)),
              ("+Conv x2", "+conv2", "phase1", (3.22, 17.19, 13.51)),
              ("+Attention x2", "+attention2", "phase1", (2.90, 17.42, 14.02)),
              ("+2x training", "+2x", "phase1", (3.28, 16.19, 13.26))]),
    "table5": dict(
        title="Table 5: codebooks (one phase, alpha = 0)",
        columns=("usage", "rfid", "ar_fid", "nar_fid"),
        rows=[("VQGAN", "vqgan", "phase1", (0.435, 4.07, 17.19, 14.58)),
              ("+ F&N", "fn", "phase1", (0.997, 2.93, 24.91, None)),
              ("+ K-means", "kmeans", "phase1", (1.0, 3.54, 16.84, 15.02)),
              ("+ entropy", "entropy", "phase1", (1.0, 3.45, 16.97, 13.26))]),
    "table6": dict(
        title="Table 6: layers of the perceptual loss (one phase)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("low", "low", "phase1", (3.45, 16.97, 13.26)),
              ("A: low + logit", "A", "phase1", (3.01, 15.19, 11.78)),
              ("B: 2_2 3_3 4_3 5_3 logit", "B", "phase1", (2.93, 14.47, 11.58)),
              ("C: 3_3 4_3 5_3 logit", "C", "phase1", (2.81, 14.08, 10.52)),
              ("D: 4_3 5_3 logit", "D", "phase1", (2.62, 13.34, 9.56)),
              ("sem: 5_3 logit", "sem", "phase1", (2.77, 12.07, 8.84)),
              ("E: logit", "E", "phase1", (4.65, 17.88, 14.00))]),
    "fig5b": dict(
        title="Fig. 5b: the semantic ratio alpha (one phase; the paper's ends are those of Table 6)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("alpha = 0", "alpha=0", "phase1", (3.45, 16.97, 13.26)),
              *[(f"alpha = {a}", f"alpha={a}", "phase1", (None, None, None)) for a in (0.2, 0.4, 0.6, 0.8)],
              ("alpha = 1", "alpha=1", "phase1", (2.77, 12.07, 8.84))]),
    "fig7b": dict(
        title="Fig. 7b: the same tokens decoded after phase 1 and after phase 2 (alpha = 1)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("phase 1", "sem", "phase1", (None, 7.83, 5.31)),
              ("phase 1 + 2", "sem", "phase2", (1.99, 7.55, 4.99))]),
    "fq-table3": dict(
        title="FQGAN, Table 3: one codebook and two, with which losses; and SeQ-GAN's ideas on top (ours)",
        columns=("rfid", "psnr", "usage", "ar_fid", "nar_fid"),
        rows=[("single, K codes", "fq-1x", "phase1", (3.71, None, None, None, None)),
              ("single, 2K codes", "fq-2x", "phase1", (3.60, None, 0.84, None, None)),
              ("dual, neither loss", "fq-none", "phase1", (2.00, None, None, None, None)),
              ("dual, disentanglement", "fq-dis", "phase1", (1.84, None, None, None, None)),
              ("dual, representation", "fq-rep", "phase1", (1.73, None, None, None, None)),
              ("dual, both", "fq-both", "phase1", (1.66, None, None, None, None)),
              ("both, alpha = 1", "fq-alpha1", "phase1", (None,) * 5),
              ("both, phase 1 + 2", "fq-both", "phase2", (None,) * 5)]),
    "fq-table4": dict(
        title="FQGAN, Table 4: heads of the AR prior on the dual tokenizer",
        columns=("ar_fid",),
        rows=[("k linear heads", "head-linear", "phase1", (6.90,)),
              ("k MLP heads", "head-mlp", "phase1", (8.88,)),
              ("AR head", "fq-both", "phase1", (3.74,))]),
}
CLAIMS = {  # arms of the experiment on the paper's claims: flags of train.py, seeds
    **{f"alpha={alpha}": (["--alpha", str(alpha)], seeds)
       for alpha, seeds in ((0, 3), (0.25, 1), (0.5, 3), (0.75, 1), (1, 3))},
    "attention2": (["--ablation", "+attention2"], 2),  # Table 1: alpha = 0, one phase
    "vqgan": (["--ablation", "vqgan"], 1),  # Table 5, without the K-means start that the other arms have
    "entropy": (["--ablation", "entropy"], 1),
    "plain": (["--alpha", "0", "--set", "tokenizer.codebook=plain"], 1),
    **{f"f4,alpha={alpha}": (["--alpha", str(alpha), "--set", "tokenizer.channel_mult=[1,2,4]"], 1)
       for alpha in (0, 1)},
}
TABLES["claims"] = dict(
    title="The paper's five claims, with intervals", columns=(),
    rows=[(f"{arm}, seed {seed}", f"{arm}|{seed}", "phase1", ())  # the first seeds first
          for seed in range(3) for arm, (_, seeds) in CLAIMS.items() if seed < seeds])
FIGURES = dict(
    view="input, reconstruction, prediction and hits of one or several ar.pt (Fig. 3)",
    fig1b="AR predictions of several ar.pt", fig3="one image step by step, of an ar.pt",
    fig4="reconstructions and AR predictions, a row for each ar.pt", fig5a="AR predictions, by alpha",
    fig7a="samples of a nar.pt or ar.pt decoded by phase 1 and phase 2",
    fig8="tokens with and without noise, of several phase1.pt",
    fig9="as fig7a, of several priors, enlarged", fig10="validation losses of several ar.pt or nar.pt",
    fig11="reconstructions and AR predictions of several ar.pt, image by image",
    fq_alone="FQGAN: reconstructions from all and from each single sub-codebook, of phase1.pt or phase2.pt",
    fq_map="FQGAN: codes of a few classes in two dimensions (PCA), of phase1.pt or phase2.pt",
    metrics="results of sample.py --metrics side by side",
    compare="a probe of tokenizers, phase1.pt or phase2.pt",
    report="one HTML page of a run folder")
PRESETS = ("imagenet", "imagenet-ablation", "ffhq", "lsun-cat", "lsun-bedroom", "lsun-church", "cifar10",
           "demo", "fqgan-dual", "fqgan-triple", "cifar10-fq", "demo-fq", "claims")
PAPER_SCALE = dict.fromkeys(TABLES, "ImageNet 256x256, batch 64, 500,000 steps each, Inception FID, 50,000")
PAPER_SCALE["fig7b"] = "ImageNet 256x256, Tables 9 and 10 in full, Inception FID, 50,000"
PAPER_SCALE["fq-table3"] = "ImageNet 256x256, K = 16,384, 10 epochs, Inception FID, 50,000"
PAPER_SCALE["fq-table4"] = "ImageNet 256x256, FAR-Large, guidance 1.75, top-k 8192, Inception FID, 50,000"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("figure", choices=[*FIGURES, *TABLES], metavar="FIGURE", help="; ".join(
        [f"{name}: {text}" for name, text in FIGURES.items()] + [f"{', '.join(TABLES)}: that table"]))
    add("files", type=as_path, nargs="*", help="metrics: JSON files; compare: tokenizers; report: run folder")
    add("--ckpt", type=as_path, nargs="+", default=[], help="checkpoints of the figure")
    add("--tokenizer", type=as_path, nargs="+", default=[], help="one per CKPT (default: found beside each); "
        "fig7a, fig9: that of phase 1 and that of phase 2")
    add("--data", type=expanded, help="folder of images (default: the validation images of the first run)")
    add("--num", type=int, help="images for the numbers; the first few are drawn (default: 64 at most)")
    add("--pdf", action="store_true", help="figures: write a PDF too")
    add("--steps", type=int, help="of compare: training steps of the probe (default 400)")
    add("--preset", default="demo", choices=PRESETS, help="of tables: what all rows vary (default demo)")
    add("--run", action="store_true", help="of tables: train and measure what is missing, row by row")
    add("--stages", default="phase1,ar,nar", help="of tables: what --run makes (default phase1,ar,nar)")
    add("--samples", type=int, help="of tables: images a prior draws (default: demo 2,000, cifar10 and "
        "claims 10,000, else 50,000); of compare: training images of the probe (default 5,000)")
    add("--nproc", type=int, default=1, help="of tables: processes of each command, by torchrun (default 1)")
    add("--workers", type=int, default=0, help="of tables: data loading processes, for train.py")
    add("--extractor", type=expanded, help="of tables and compare: see sample.py (tables: a scorer that "
        "--run trains)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of tables: for train.py")
    add("--out", type=as_path, help="PNG to write, numbers go beside it (default: FIGURE.png beside CKPT); "
        "tables: folder of all rows (default: runs/PRESET-tables); report: the HTML file")
    add("--device", default="auto", help="cuda, cpu or auto")
    args = parser.parse_args(argv)
    listed = args.figure in ("metrics", "compare", "report")
    if not listed and args.files:
        parser.error(f"{args.figure} takes no files, got {args.files[0]}; pass them with --ckpt")
    if listed and not args.files or not listed and args.figure in FIGURES and not args.ckpt:
        parser.error(f"{args.figure} needs {'files' if listed else '--ckpt'}: {FIGURES[args.figure]}")
    if not args.stages or not set(args.stages.split(",")) <= {"phase1", "ar", "nar"}:
        parser.error(f"--stages takes phase1, ar, nar, separated by commas, got {args.stages!r}")
    if args.figure.startswith("fq-") and not args.preset.endswith("-fq") and "fqgan" not in args.preset:
        parser.error(f"{args.figure} needs an FQGAN preset, for instance --preset demo-fq")
    if args.figure == "claims" and args.preset not in ("claims", "demo", "cifar10"):
        parser.error("claims trains its own judge: --preset claims, demo or cifar10")
    if args.out and args.figure in FIGURES and not listed and args.out.suffix != ".png":
        parser.error(f"--out {args.out}: a figure's name must end in .png (JSON and PDF go beside it)")
    unread = [name for name in ("ckpt", "tokenizer", "num", "steps") if getattr(args, name)]
    if args.figure in TABLES and unread:
        parser.error(f"--{unread[0]} is of figures; {args.figure} has --samples, and --set for training")
    for name in ("samples", "nproc", "num", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    wanted = 2 if args.figure in ("fig7a", "fig9") else len(args.ckpt)
    if args.tokenizer and len(args.tokenizer) != wanted:
        parser.error("--tokenizer needs one file per --ckpt (fig7a and fig9: two)")
    return args


if __name__ == "__main__":
    steady_process()
    ARGUMENTS = parse_args()  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import base64
import contextlib
import html
import io
import itertools
import json
import math
import pickle
import random
import shlex
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from perceptual import (
    LAYER_SETS, LOGIT, NAMES, VGGTaps, adv_loss, build_vgg16, disc_loss, layer_weights, lpips_like,
    normalize_images, perceptual_loss, perceptual_terms,
)
from prior_ar import ARPrior, PriorConfig
from prior_nar import mask_tokens
from sample import (
    HOW, Shapes, UserError, decode, evaluate, generate_images, generate_tokens, images_of, is_folder,
    latent_hash, load_data, load_model, load_tokenizer_of, make_sheet, mix, one_line_errors, peak_memory,
    predict_tokens, print0, psnr, pyplot, rank, read_checkpoint, read_result, save_atomic, seeded_rand,
    setup_device, to_float, to_uint8, with_data, world, writable,
)
from sample import parse_args as sample_args
from tokenizer import TokenizerConfig, VQTokenizer, all_reduce_mean, codebook_usage, count_codes


@torch.no_grad()
def teacher_forced_view(tokenizer, prior, x, labels=None):
    """s = tokens of x; s' = argmax of one forward pass on [c, s_1..s_{N-1}]; both decoded (Sec. 3.2, Fig. 3).

    tokenizer: anything with encode, decode;  prior: ARPrior (a masked prior would see its target)
    x:         (B, 3, H, W) in [-1, 1];  labels: (B,) int64 or None
    returns:   dict of tokens s and tokens_pred s' (B, N) int64, nats (B, N), hits (B, N) float 0 or 1,
               reconstruction Dec(s) and prediction Dec(s') (B, 3, H, W). With k > 1 sub-codebooks tokens are
               (B, N, k), and nats and hits the means over k
    """
    tokens = tokenizer.encode(x)
    tokens_pred, nats = predict_tokens(prior, tokens, labels)
    nats, hits = (t.view(*tokens.shape[:2], -1).mean(2) for t in (nats, (tokens == tokens_pred).float()))
    return dict(
        tokens=tokens, tokens_pred=tokens_pred, nats=nats, hits=hits,
        reconstruction=tokenizer.decode(tokens), prediction=tokenizer.decode(tokens_pred),
    )


@torch.no_grad()
def view_numbers(x, view, judge=None):
    """The discrepancy of a view in numbers: means over images; PSNR in dB after rounding to 8 bits.

    judge: VGGTaps or None; with one, the LPIPS-like distances, and the share of images that keep the class
           which the judge sees in the input
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
    if judge:
        classes = [judge(image.clamp(-1, 1), [LOGIT])[LOGIT].argmax(1)
                   for image in (x, reconstruction, prediction)]
        numbers |= dict(
            lpips_like_reconstruction=lpips_like(judge, x, reconstruction).mean().item(),
            lpips_like_prediction_to_reconstruction=(
                lpips_like(judge, reconstruction, prediction).mean().item()),
            class_kept_by_reconstruction=(classes[1] == classes[0]).float().mean().item(),
            class_kept_by_prediction=(classes[2] == classes[0]).float().mean().item())
    return numbers


@torch.no_grad()
def survival(shapes, indices, x_hat):
    """How much of what `Shapes` drew is left in x_hat (B, 3, S, S): the paper's two objectives as numbers.

    structure:      intersection over union of the true shape (what and where) and one of the two colours of
                    x_hat, whichever fits better; which colours they are does not matter
    detail:         the mean of the next two; one image has no R^2, and images without texture no correlation
    detail_colour:  R^2 over the images of the mean colours inside and outside the true shape
    detail_texture: correlation of what a 5x5 blur removes, away from edges, over images with a texture
    """
    x = to_float(torch.stack([shapes.view(i) for i in indices]), x_hat.device)
    mask = torch.stack([shapes.mask(i) for i in indices]).to(x)[:, None]  # (B, 1, S, S)
    places = []
    for image, true in zip(x_hat.flatten(2), mask.flatten(1) > 0.5, strict=True):
        centred = image - image.mean(1, keepdim=True)
        axis = torch.linalg.svd(centred, full_matrices=False)[0][:, 0]
        values = axis @ centred
        light = values > (values.min() + values.max()) / 2
        for _ in range(10):  # two means along the axis
            means = values[light].mean(), values[~light].mean()
            light = (values - means[0]).abs() < (values - means[1]).abs()
        fits = [(part & true).sum() / (part | true).sum() for part in (light, ~light)]
        places.append(max(fits).nan_to_num())
    inside, outside = (mask > 0.99).float(), (mask < 0.01).float()
    colours = [torch.stack([(image * part).sum((2, 3)) / part.sum((2, 3)).clamp(min=1)
                            for part in (inside, outside)], 1) for image in (x, x_hat)]  # (B, 2, 3)
    error = (colours[1] - colours[0]).square().sum()
    spread = (colours[0] - colours[0].mean(0)).square().sum()

    def fine(image):
        return image - F.avg_pool2d(F.pad(image, (2,) * 4, mode="replicate"), 5, 1)

    flat = 1 - F.max_pool2d(((mask > 0.01) & (mask < 0.99)).float(), 5, 1, 2)
    a, b = (fine(image) * flat for image in (x, x_hat))
    both = F.cosine_similarity(a.flatten(1), b.flatten(1))
    textured = torch.tensor([shapes.factors(i)["texture"] != "plain" for i in indices], device=x.device)
    parts = dict(detail_colour=(1 - error / spread).item(), detail_texture=both[textured].mean().item())
    parts = {name: value for name, value in parts.items() if math.isfinite(value)}
    detail = dict(detail=sum(parts.values()) / len(parts)) if parts else {}
    return dict(structure=torch.stack(places).mean().item()) | detail | parts


# ----------------------------------------------------------------------------------------------------------
# Figures of the paper. Each takes checkpoints and writes a PNG, and a JSON with every number in it
# ----------------------------------------------------------------------------------------------------------

VIEWS = dict(  # what each figure shows of every pair of tokenizer and prior, beside the input
    view=("reconstruction", "prediction", "hits"), fig1b=("prediction",), fig5a=("prediction",),
    fig4=("reconstruction", "prediction"), fig11=("reconstruction", "prediction"))
LABELS = dict(reconstruction="reconstruction", prediction="AR prediction", hits="hits", input="input")


def find_judge(path, ckpt, device):
    """The judge of the run that a checkpoint belongs to, or None."""
    places = [Path(path).with_name("vgg.pt"), Path(ckpt["config"]["vgg"])]
    found = next((p for p in places if p.suffix == ".pt" and p.is_file()), None)
    return load_model(found, ("vgg",), device)[0] if found else None


def alpha_of(config):
    """alpha of the tokenizer; None, and the name of its layers, where another loss took its place"""
    c = config["phase1"]
    return dict(alpha=None, layers=c["layers"]) if c["layers"] else dict(alpha=c["alpha"])


def told_loss(c):
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

    returns: [dict(name, view, numbers, ...)], and the images x (num, 3, S, S) in [-1, 1]
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
        if names and images.class_names != names:
            raise UserError(f"the classes of the images are not those that {path} was trained on")
        labels = torch.tensor([images.label(j) for j in range(len(x))], device=device) if names else None
        view = teacher_forced_view(tokenizer, prior, x, labels)
        numbers = dict(
            ckpt=str(path), tokenizer_hash=ckpt["tokenizer_hash"], tokenizer_stage=tokenizer_ckpt["stage"],
            num_images=len(x), **alpha_of(config), note=ckpt["note"] or tokenizer_ckpt["note"],
            **view_numbers(x, view, find_judge(path, ckpt, device)))
        if isinstance(images, Shapes):
            numbers["survival"] = {
                key: survival(images, range(len(x)), view[key]) for key in list(LABELS)[:2]}
        name = f"{Path(path).absolute().parent.name}\n{told_loss(config['phase1'])}"
        pairs.append(dict(name=name, view=view, numbers=numbers, labels=labels))
    return pairs, x


def new_figure(width, height, **more):
    plt = pyplot()
    plt.rcParams["pdf.fonttype"] = 42
    return plt.figure(figsize=(width, height), layout="constrained", **more)


def save_figure(fig, path, numbers, pdf=False):
    """PNG (300 dpi), PDF on request, and the numbers as JSON beside it."""
    path = Path(path)
    if rank() == 0:
        save_atomic(lambda p: fig.savefig(p, format="png", dpi=300), path)
        if pdf:
            save_atomic(lambda p: fig.savefig(p, format="pdf", metadata={"CreationDate": None}),
                        path.with_suffix(".pdf"))
        text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
        save_atomic(lambda p: p.write_text(text), path.with_suffix(".json"))
    pyplot().close(fig)


def draw_grid(rows, names=(), note="", cell=1.15):
    """A figure of rows of panels (title, picture, caption), `names` at the left of the rows.

    picture: (3, S, S) in [-1, 1] or uint8; a map (h, w) of tokens, or of bool or float in [0, 1], drawn in
             cividis; None for an empty place.
    A title is written where it differs from the one above.
    """
    columns = max(map(len, rows))
    fig = new_figure(cell * columns + 0.2 * bool(names), (cell + 0.12) * len(rows) + 0.35)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            title, picture, caption = row[j] if j < len(row) else ("", None, "")
            axis.set(xticks=[], yticks=[])
            if picture is None:
                axis.axis("off")
            elif picture.ndim == 2:
                axis.imshow(picture.cpu().float().numpy(), cmap="cividis", interpolation="nearest",
                            **({} if picture.dtype == torch.int64 else dict(vmin=0, vmax=1)))
            else:
                picture = picture if picture.dtype == torch.uint8 else to_uint8(picture)
                axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            if title and (i == 0 or len(rows[i - 1]) <= j or rows[i - 1][j][0] != title):
                axis.set_title(title, fontsize=6.5)
            if caption:
                axis.set_xlabel(caption, fontsize=6, labelpad=1)
            if names and j == 0:
                axis.set_ylabel(names[i], fontsize=6.5)
    if note:
        fig.supxlabel(note, fontsize=6)
    return fig


def figure_views(figure, args, device):
    """Input beside reconstruction and AR prediction of each pair (Fig. 1b, 4, 5a, 11, and `view`)."""
    pairs, x = load_pairs(args.ckpt, args.num, device, args.tokenizer, args.data)
    return views_grid(figure, pairs, x), [pair["numbers"] for pair in pairs]


def views_grid(figure, pairs, x):
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
        names = [f"({letter})" for letter in "abcdef"[: len(rows)]] if figure == "fig11" else ()
    notes = {pair["numbers"]["note"] for pair in pairs} - {""}
    note = "hits: yellow where the prediction is the true token" if "hits" in keys else ""
    return draw_grid(rows, names, "  ".join([note, *notes]).strip())


def figure_example(args, device):
    """Fig. 3, one image step by step: tokens, the shifted input, the prediction, and both decoded."""
    pairs, x = load_pairs(args.ckpt[:1], args.num, device, args.tokenizer, args.data)
    (pair,), side = pairs, math.isqrt(pairs[0]["view"]["hits"].shape[1])
    view, label = pair["view"], pair["labels"]
    tokens, predicted = (["/".join(map(str, token.view(-1).tolist())) for token in view[key][0]]
                         for key in ("tokens", "tokens_pred"))
    shifted = ["c", *tokens[:-1]]
    fig = new_figure(9, 4.4)
    grid = fig.subplots(2, 4)

    def show(axis, image, title):
        axis.imshow(to_uint8(image).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=8)

    def table(axis, values, title, right=None):
        wrong = torch.zeros(side, side) if right is None else 1.0 - right.view(side, side).cpu().float()
        axis.imshow(wrong.numpy(), cmap="Wistia", vmin=0, vmax=2, interpolation="nearest")
        for i, value in enumerate(values):
            if side <= 16:
                axis.text(i % side, i // side, value, ha="center", va="center", fontsize=max(2.5, 32 / side))
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=8)

    show(grid[0, 0], x[0], "input x")
    table(grid[0, 1], tokens, "1. tokens s = encode(x)\n")
    table(grid[0, 2], shifted, "2. input of the prior:\nc, then s without its last")
    title = "3. prediction s′ = argmax, one pass\n(dark where it is not s)"
    table(grid[0, 3], predicted, title, view["hits"][0])
    grid[1, 0].axis("off")
    text = [pair["name"], "no classes" if label is None else f"condition c: class {label[0].item()}",
            f"top-1: {view['hits'][0].float().mean():.0%} of {side * side} tokens",
            f"{view['nats'][0].mean():.2f} nats a token"]
    grid[1, 0].text(0, 0.5, "\n".join(text), fontsize=8, va="center", transform=grid[1, 0].transAxes)
    show(grid[1, 1], view["reconstruction"][0], "4. reconstruction decode(s)")
    grid[1, 2].imshow(view["nats"][0].view(side, side).cpu().numpy(), cmap="cividis", interpolation="nearest")
    grid[1, 2].set(xticks=[], yticks=[])
    grid[1, 2].set_title("nats of each token (yellow: surprising)", fontsize=8)
    show(grid[1, 3], view["prediction"][0], "4. AR prediction decode(s′)")
    return fig, dict(pair["numbers"], tokens=tokens, prediction=predicted, image=0)


def figure_phases(figure, args, device):
    """Fig. 7a and 9: the same sampled tokens decoded by the decoders of phase 1 and of phase 2.

    Fig. 7a: one prior (of --ckpt), the difference beside; Fig. 9: every prior given, with crops enlarged.
    """
    rows, numbers, names = [], [], []
    for path in args.ckpt:
        prior, ckpt = load_model(path, ("ar", "nar"), device)
        files = args.tokenizer or [Path(path).with_name(f"{phase}.pt") for phase in ("phase1", "phase2")]
        if len(files) != 2:
            raise UserError("--tokenizer takes two files here, of phase 1 and of phase 2")
        first, second = (load_tokenizer_of(path, ckpt, file, device)[0] for file in files)
        num = min(args.num or 64, 6 if figure == "fig7a" else 3)
        classes = prior.config.num_classes
        labels = torch.arange(num, device=device) % classes if classes else None
        tokens = generate_tokens(prior, labels, ckpt["config"]["seed"], range(num), ckpt["config"]["sample"])
        one, two = decode(first, tokens), decode(second, tokens)
        change = (one - two).abs()
        numbers.append(dict(
            ckpt=str(path), stage=ckpt["stage"], tokens=tokens.tolist(), note=ckpt["note"],
            mean_difference=change.mean().item(), largest_difference=change.max().item(),
            psnr_between=psnr(one, two).mean().item()))
        for i in range(num):
            row = [("phase 1", one[i], ""), ("phase 1 + 2", two[i], "")]
            if figure == "fig7a":
                row.append(("difference × 4", (change[i].mean(0) * 2).clamp(0, 1), ""))
            else:
                quarter = slice(one.shape[2] // 4, 3 * one.shape[2] // 4)
                row += [(f"{title}, enlarged", image[:, quarter, quarter], "")
                        for title, image in (("phase 1", one[i]), ("phase 1 + 2", two[i]))]
            rows.append(row)
            names.append(f"{ckpt['stage'].upper()} sample {i}")
    return draw_grid(rows, names), numbers


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
            before, after = before[..., 0], after[..., 0]  # of k sub-codebooks the first is drawn
            rows.append([("x", x[i], ""), ("x + noise", noisy[i], ""), ("tokens of x", before, ""),
                         ("tokens of x + noise", after, ""),
                         ("changed", changed, f"{changed.float().mean():.0%} of tokens")])
            names.append(f"{Path(path).absolute().parent.name}\n{told_loss(ckpt['config']['phase1'])}")
        numbers.append(dict(ckpt=str(path), tokenizer_hash=latent_hash(tokenizer), num_images=len(x),
                            **alpha_of(ckpt["config"]), note=ckpt["note"], changed=stability(tokenizer, x)))
    return draw_grid(rows, names, "changed: yellow; noise of deviation 0.01 on [0, 1]"), numbers


def figure_losses(args, device):
    """Fig. 10: validation loss of priors over training steps, one curve a run; at the right relative to the
    unigram entropy of the tokens, since lower entropy alone is not better modelling."""
    fig, numbers = new_figure(7.5, 3), []
    axes = fig.subplots(1, 2)
    for i, path in enumerate(args.ckpt):
        ckpt = read_checkpoint(path, ("ar", "nar"))
        rows = [row for row in read_metrics(Path(path).with_name("metrics.jsonl"))
                if row["stage"] == ckpt["stage"] and "val_loss" in row]
        if not rows:
            raise UserError(f"no validation losses of {path} in {Path(path).with_name('metrics.jsonl')}")
        entropy, name = rows[-1]["unigram_entropy"], Path(path).absolute().parent.name
        steps, losses = [row["step"] for row in rows], [row["val_loss"] for row in rows]
        for axis, values in zip(axes, (losses, [loss / entropy for loss in losses]), strict=True):
            axis.plot(steps, values, "osD^vPX"[i % 7] + "-", markersize=3, color=f"C{i}",
                      label=f"{name} {ckpt['stage'].upper()} ({told_loss(ckpt['config']['phase1'])})")
        numbers.append(dict(ckpt=str(path), stage=ckpt["stage"], **alpha_of(ckpt["config"]), steps=steps,
                            val_loss=losses, unigram_entropy=entropy))
    for axis, label in zip(axes, ("nats per token", "relative to the unigram entropy"), strict=True):
        axis.set(xlabel="training step", ylabel=label)
    fig.suptitle("validation loss", fontsize=9)
    axes[0].legend(fontsize=6)
    return fig, numbers


def load_factorized(args, device):
    """(tokenizer, checkpoint, ImageData, x, tokens (num, N, k)) of the first of --ckpt"""
    tokenizer, ckpt = load_model(args.ckpt[0], ("phase1", "phase2"), device)
    if len(tokenizer.token_shape) < 2:
        raise UserError(f"{args.ckpt[0]} has one codebook; {args.figure} is for FQGAN's tokenizers")
    images, x = load_images(ckpt["config"], args.num, args.data, args.ckpt[0])
    x = to_float(x, device)
    return tokenizer, ckpt, images, x, torch.cat([tokenizer.encode(part) for part in x.split(50)])


def figure_alone(args, device):
    """FQGAN's picture of what each sub-codebook holds: the codes of all others are zeros."""
    tokenizer, ckpt, _, x, tokens = load_factorized(args, device)
    columns = {"reconstruction": decode(tokenizer, tokens)}
    columns |= {f"sub-codebook {i} alone": tokenizer.decode_alone(tokens, i) for i in range(tokens.shape[2])}
    numbers = dict(ckpt=str(args.ckpt[0]), num_images=len(x), note=ckpt["note"],
                   psnr={name: psnr(x, images).mean().item() for name, images in columns.items()},
                   cos_between_codebooks=mean_cosine(tokenizer.code_maps(tokens)).mean().item())
    rows = [[("input", x[i], ""), *((name, images[i], "") for name, images in columns.items())]
            for i in range(min(len(x), 6))]
    return draw_grid(rows, note=ckpt["note"]), numbers


def figure_map(args, device, classes=4):
    """FQGAN's map of codes: for each image of a few classes the mean of its codes, in the two widest
    directions of each sub-codebook (PCA; the article uses t-SNE), and the variance of the class means as a
    share of that of the points: the more, the more codes tell of the class (a few images give some by
    chance)."""
    tokenizer, ckpt, images, x, tokens = load_factorized(args, device)
    if not images.class_names:
        raise UserError("fq_map needs images with classes")
    labels = torch.tensor([images.label(i) for i in range(len(x))])
    fig, numbers = new_figure(3.2 * tokens.shape[2], 3.2), []
    axes = fig.subplots(1, tokens.shape[2], squeeze=False)[0]
    for i, codes in enumerate(tokenizer.code_maps(tokens)):
        points = codes.mean((2, 3)).cpu()  # (num, n_z): single codes would lie on top of each other
        points = points - points.mean(0)
        directions = torch.linalg.svd(points, full_matrices=False)[2][:2]
        means = torch.stack([points[labels == c].mean(0) for c in labels.unique()])
        share = (means.square().sum(1).mean() / points.square().sum(1).mean()).item()
        numbers.append(dict(sub_codebook=i, num_images=len(x), ckpt=str(args.ckpt[0]), note=ckpt["note"],
                            class_share=share))
        for j, c in enumerate(labels.unique()[:classes].tolist()):
            axes[i].scatter(*(points[labels == c] @ directions.T).T.numpy(), s=8, marker="osD^"[j % 4],
                            color=f"C{j}", label=images.class_names[c])
        axes[i].set(xticks=[], yticks=[])
        axes[i].set_title(f"sub-codebook {i}", fontsize=8)
    axes[0].legend(fontsize=6)
    return fig, numbers


# ----------------------------------------------------------------------------------------------------------
# The probe: is a tokenizer good for generation? Minutes instead of a large prior; not in the paper
# ----------------------------------------------------------------------------------------------------------


def probe(train, val, codebook_size, device="cpu", steps=400, batch=64, seed=0):
    """Trains the same small AR prior, without classes, for the same number of steps on any codes.

    train, val: (n, N) int64 tokens in [0, codebook_size), or (n, N, k): then with FQGAN's AR head
    returns:    dict: nats per token of `val`, bits per image; the unigram bits per image (every token
                by its frequency in `train`, one added), and the ratio of the two. N may differ between
                tokenizers, so bits per image are what compares.
    """
    N, k = train.shape[1], train[0, 0].numel()
    torch.manual_seed(mix(seed, "probe"))
    head = dict(num_codebooks=k, head="ar", head_layers=1) if k > 1 else {}
    sizes = PriorConfig(codebook_size, N, n_layer=4, n_head=4, n_embd=128, dropout=0.0, **head)
    prior = ARPrior(sizes).to(device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-3, betas=(0.9, 0.96), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / (steps / 10)) * (1 + math.cos(math.pi * t / steps)) / 2)
    draw = torch.Generator().manual_seed(mix(seed, "probe order"))
    prior.train()
    for _ in tqdm(range(steps), "probe", disable=None if rank() == 0 else True):
        tokens = train[torch.randint(len(train), (batch,), generator=draw)].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = prior(tokens)
        loss, _ = prior.loss(logits, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    prior.eval()
    with torch.no_grad():
        parts = [part.to(device) for part in val.split(100)]
        nats = sum(prior.loss(prior(part), part)[0].item() * len(part) for part in parts) / len(val)
    frequency = count_codes(train, codebook_size).double().view(k, -1) + 1
    surprise = -(frequency / frequency.sum(1, keepdim=True)).log()  # (k, K)
    unigram = sum(surprise[i][part].mean().item() for i, part in enumerate(val.view(-1, k).unbind(1))) / k
    bits = N * k / math.log(2)
    return dict(nats_per_token=nats, bits_per_image=nats * bits, unigram_bits_per_image=unigram * bits,
                relative=nats / unigram, num_tokens=N, codebook_size=codebook_size, steps=steps)


def compare(args, device):
    """`compare A.pt B.pt`: the probe, PSNR and code stability of tokenizers on the same images; with
    --extractor rFID too, by its own protocol. A folder of --data is split into training and validation
    images as train.py does. For a tokenizer of another kind call `probe` with its tokens."""
    rows, measured, ckpts = [], {}, [read_checkpoint(path, ("phase1", "phase2")) for path in args.files]
    for path, ckpt in zip(args.files, ckpts, strict=True):
        same_size(path, ckpt, ckpts[0]["config"], args.files[0])
    config, images = ckpts[0]["config"], []
    splits = images_of(args.files[0], config) if not args.data else (
        load_data(dict(config, data=args.data, val=None)))
    for split, limit in zip(splits, (args.samples or 5000, 1000), strict=True):
        drawn = random.Random(mix(0, "compare")).sample(range(len(split)), min(limit, len(split)))
        images.append(torch.stack([split.view(i) for i in drawn]))  # training images lie class by class
    for path in args.files:
        tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
        tokens = [torch.cat([tokenizer.encode(to_float(part, device)).cpu() for part in split.split(100)])
                  for split in images]
        x = to_float(images[1][:200], device)
        x_hat = decode(tokenizer, tokens[1][:200].to(device))
        row = dict(
            ckpt=str(path), tokenizer_hash=latent_hash(tokenizer), **alpha_of(ckpt["config"]),
            train_images=len(images[0]), val_images=len(images[1]), psnr_images=len(x),
            psnr=psnr(x, x_hat).mean().item(),
            changed=stability(tokenizer, x),
            **probe(*tokens, tokenizer.codebook_size, device, args.steps or 400))
        if args.extractor:
            out = Path(path).with_name(f"metrics_{Path(path).stem}_compare.json")
            words = ["--ckpt", path, "--metrics", "--lpips", "none", "--out", out]
            words += ["--extractor", args.extractor, *(["--data", args.data] if args.data else [])]
            measured[str(path)] = evaluate(sample_args([*map(str, words)]), device)
            row["rfid"] = measured[str(path)]["results"]["rfid"]
        rows.append(row)
    if measured:
        refuse_unlike(measured)
    names = ["bits_per_image", "unigram_bits_per_image", "relative", "psnr", *["rfid"] * bool(args.extractor)]
    print_table([["", *names], *([row["ckpt"], *(number(row[name]) for name in names)] for row in rows)])
    return rows


# ----------------------------------------------------------------------------------------------------------
# The report of a run: one HTML file that needs nothing else
# ----------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title><style>
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem; }
img { max-width: 100%%; } img.pixels { image-rendering: pixelated; width: 100%%; display: block; }
img.plot { background: white; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td:last-child { min-width: 12rem; }
td, th { border: 1px solid var(--line); padding: .2rem .5rem; text-align: left; vertical-align: top; }
[hidden] { display: none !important; }
.row { display: grid; grid-template-columns: repeat(%(shown)d, 1fr); gap: 3px; }
.stack { position: relative; } .stack img + img { position: absolute; inset: 0; }
input[type=range] { width: 100%%; } button { font: inherit; padding: .3rem .8rem; }
:focus-visible { outline: 3px solid #06c; outline-offset: 2px; } p.note { font-size: .9rem; }
</style></head><body><h1>%(title)s</h1>
%(body)s
<script>
function toggle(button) {
  const top = button.closest("section").querySelector(".stack img + img");
  top.hidden = !top.hidden;
  button.textContent = "Showing " + (top.hidden ? "phase 1" : "phase 1 + 2") + ", press to switch";
}
function slide(input) {
  for (const top of input.closest("section").querySelectorAll(".stack img + img"))
    top.style.clipPath = `inset(0 0 0 ${input.value}%%)`;
}
document.querySelectorAll("input[type=range]").forEach(slide);
</script></body></html>
"""


def data_uri(write):
    """What write(file) writes, a PNG, as an address that an <img> can hold."""
    file = io.BytesIO()
    write(file)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture(images, columns, alt):
    """<img> of a sheet of images (n, 3, S, S), uint8 or in [-1, 1]; the browser enlarges its pixels."""
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    sheet = make_sheet(images.cpu(), columns, zoom=1)
    return f'<img class="pixels" src="{data_uri(lambda f: sheet.save(f, "PNG"))}" alt="{html.escape(alt)}">'


def plot(fig, alt):
    source = data_uri(lambda f: fig.savefig(f, format="png", dpi=110))
    pyplot().close(fig)
    return f'<img class="plot" src="{source}" alt="{html.escape(alt)}">'


def html_table(lines):
    rows = ["<tr>" + "".join(f"<{tag}>{html.escape(str(word))}</{tag}>" for word in line) + "</tr>"
            for tag, line in zip(["th", *["td"] * len(lines)], lines, strict=False)]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def draw_curves(rows):
    """Loss curves of all stages: what was logged in training, and validation losses as dots."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    fig = new_figure(9, 2.1 * math.ceil(len(stages) / 2))
    for i, stage in enumerate(stages):
        axis = fig.add_subplot(math.ceil(len(stages) / 2), 2, i + 1)
        mine = [row for row in rows if row["stage"] == stage]
        for j, name in enumerate(("loss", "loss_rec", "loss_per", "loss_disc", "val_loss")):
            points = [(row["step"], row[name]) for row in mine if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), ("-", "--", ":", "-.", "o-")[j], label=name,
                          linewidth=1, markersize=3)
        axis.set_title(stage, fontsize=9)
        axis.set_yscale("log")
        axis.legend(fontsize=6)
    return fig


@torch.no_grad()
def report(args, device):
    """One self-contained HTML page of a run folder: no network, images inside."""
    run, sections = args.files[0], []
    found = {s: run / f"{s}.pt" for s in ("phase1", "phase2", "ar", "nar") if (run / f"{s}.pt").is_file()}
    if "phase1" not in found and "phase2" not in found:
        raise UserError(f"{run} holds no phase1.pt or phase2.pt; name the folder of a run")
    tokenizers = {s: load_model(found[s], (s,), device)[0] for s in ("phase1", "phase2") if s in found}
    config = read_checkpoint(next(iter(found.values())), tuple(found))["config"]
    note = next((c["note"] for c in (read_checkpoint(p, (s,)) for s, p in found.items()) if c["note"]), "")
    last, out = list(tokenizers.values())[-1], args.out or run / "report.html"
    writable(out)

    def section(title, *parts):
        sections.append(f"<section><h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "</section>")

    metrics = {}
    for path in sorted(run.glob("metrics_*.json")):
        try:
            metrics |= {path.stem: read_result(path)} if ".previous" not in path.stem else {}
        except UserError as error:
            print0(f"note: {error}; it is left out")
    if metrics:
        lines = [["file", "protocol", "images", "extractor", "results"]]
        for name, result in metrics.items():
            values = "; ".join(f"{k} {v:.4g}" for k, v in result["results"].items() if isinstance(v, float))
            lines.append([name, result["protocol"], result["num_images"], result["extractor"], values])
        section("Metrics", html_table(lines), '<p class="note">Rows of different protocols or extractors do '
                "not compare.</p>")
    rows = read_metrics(run / "metrics.jsonl")
    if rows:
        section("Loss curves", plot(draw_curves(rows), "loss curves of all stages"))

    first = next(iter(found.values()))
    count = min(args.num or 64, 200, len(images_of(first, config, args.data)[1]))
    images, x = load_images(config, count, args.data, first)
    config = with_data(config, args.data)
    x, shown = to_float(x, device), min(8, len(x))
    tokens = torch.cat([last.encode(part) for part in x.split(50)])
    codes = torch.load(run / "codes.pt", weights_only=True, mmap=True) if (run / "codes.pt").is_file() else {}
    known = codes["val"].long() if codes.get("key", [""])[0] == latent_hash(last) else tokens.cpu()
    counts = count_codes(known, last.codebook_size)
    usage, perplexity = codebook_usage(counts)
    counts = counts.flatten()  # k sub-codebooks in one row
    fig = new_figure(9, 2)
    axis = fig.subplots()
    axis.bar(range(len(counts)), counts.sort(descending=True).values.numpy(), width=1)
    axis.set(xlabel="codes, the most frequent first", ylabel="times chosen")
    section("Codebook", f"<p>{usage:.1%} of {len(counts)} codes are chosen for {len(known):,} validation "
            f"images; perplexity {perplexity:.1f}.</p>", plot(fig, "histogram of the codes"))

    decoded = {s: decode(t, tokens[:shown]) for s, t in tokenizers.items()}
    button = '<p><button onclick="toggle(this)">Showing phase 1 + 2, press to switch</button></p>'
    stack = "".join(picture(image, shown, s) for s, image in decoded.items())
    section("Reconstructions", "<p>Inputs:</p>", picture(x[:shown], shown, "inputs"),
            "<p>Decoded from the same tokens:</p>", f'<div class="stack">{stack}</div>',
            button if len(decoded) > 1 else "")

    if "ar" in found:
        pairs, _ = load_pairs([found["ar"]], len(x), device, (), args.data)
        view, told = pairs[0]["view"], pairs[0]["numbers"]
        rows = [[picture(view[key][i : i + 1], 1, f"{key} {i}") for key in ("reconstruction", "prediction")]
                for i in range(shown)]
        both = "".join(f'<div class="stack">{"".join(row)}</div>' for row in rows)
        slider = ('<label>Slide from the prediction (left) to the reconstruction (right): '
                  '<input type="range" min="0" max="100" value="50" oninput="slide(this)"></label>')
        section("Teacher-forced view", "<p>Reconstruction, and over it what the AR prior predicts for every "
                f"token given the true ones before: {told['top1']:.1%} of tokens are right, "
                f"{told['nats_per_token']:.3f} nats a token. Inputs, then the two:</p>",
                picture(x[:shown], shown, "inputs"),
                f'<div class="row">{both}</div>', slider)
    for stage in ("ar", "nar"):
        if stage in found:
            prior, ckpt = load_model(found[stage], (stage,), device)
            tokenizer, _ = load_tokenizer_of(found[stage], ckpt, None, device)
            settings = ckpt["config"]["sample"]
            classes = prior.config.num_classes
            labels = [i % min(classes, 10) for i in range(4 * min(classes, 10))] if classes else None
            sheet = generate_images(prior, tokenizer, len(labels or range(32)), labels, 0, settings)
            names = f"<p>Columns: {html.escape(', '.join(ckpt['class_names'][:10]))}.</p>" if classes else ""
            section(f"Samples of the {stage.upper()} prior", names,
                    picture(sheet, min(classes or 8, 10), f"samples of {stage}"))
            if stage == "nar":
                strip = decoding_strip(prior, tokenizer, settings, classes, device)
                section("NAR decoding, step by step", *strip)
    section("Configuration", html_table([["section", "values"], *(
        [key, ", ".join(f"{k} = {v}" for k, v in value.items()) if isinstance(value, dict) else value]
        for key, value in config.items())]))
    title = f"SeQ-GAN run: {run.absolute().name}" + f" ({note})" * bool(note)
    page = PAGE % dict(title=html.escape(title), shown=shown, body="\n".join(sections))
    save_atomic(lambda p: p.write_text(page), out)
    print0(f"wrote {out} ({len(page) / 2**20:.1f} MB)")


def decoding_strip(prior, tokenizer, settings, classes, device, num=4):
    """HTML parts: samples after each step, what is not yet fixed in grey, and the step of each token."""
    N, steps = prior.config.num_tokens, settings["nar_steps"]
    shape = (steps, prior.config.num_codebooks + 1, N)
    noise = torch.stack([seeded_rand(*shape, seed=mix(0, "sample", i)) for i in range(num)]).to(device)
    labels = torch.arange(num, device=device) % classes if classes else None
    tokens, fixed_at = prior.generate(
        labels, noise, steps, settings["token_temperature"], settings["choice_temperature"],
        settings["confidence_space"], return_steps=True, guidance=settings.get("guidance", 1.0))
    images, side, rounds = decode(tokenizer, tokens), math.isqrt(N), int(fixed_at.max()) + 1
    block = images.shape[2] // side
    frames = []
    for image, fixed in zip(images, fixed_at.view(num, side, side), strict=True):
        for t in range(rounds):
            seen = (fixed <= t).repeat_interleave(block, 0).repeat_interleave(block, 1)
            frames.append(torch.where(seen, image, torch.full_like(image, 0.6)))
    maps = "".join(html_table([[f"sample {i}"], *((fixed + 1).view(side, side).tolist())])
                   for i, fixed in enumerate(fixed_at)) if side <= 8 else ""
    return (f"<p>{num} samples after each of {rounds} steps; tokens that are not fixed yet are grey.</p>",
            picture(torch.stack(frames), rounds, "decoding steps"),
            "<p>The step that fixed each token:</p>" * bool(maps),
            f'<div style="display: flex; flex-wrap: wrap; gap: 1rem">{maps}</div>' * bool(maps))


# ----------------------------------------------------------------------------------------------------------
# Results side by side: the paper's Tables 1, 5, 6 and Fig. 5b, 7b, each row a run of its own
# ----------------------------------------------------------------------------------------------------------


def refuse_unlike(results):
    """Numbers that were measured in different ways do not belong into one column.

    results: {name: result};  raises: UserError that names the first difference
    """
    first, *others = results
    for other in others:
        both = all("lpips" in results[name]["results"] for name in (first, other))
        for key in (*HOW, *["lpips"] * both):
            a, b = results[first][key], results[other][key]
            if a != b:
                raise UserError(f"{first} and {other} cannot share a column: {key} is {a} in the one and {b} "
                                "in the other; measure both alike")


def print_metrics(paths):
    """A table of results, one line each."""
    results = {str(path): read_result(path) for path in paths}
    refuse_unlike(results)
    names = [n for n, v in next(iter(results.values()))["results"].items() if isinstance(v, float)]
    how = next(iter(results.values()))
    print0(f"{how['protocol']}, {how['num_images']:,} images, {how['image_size']} pixels, features of "
           f"{how['extractor']} ({how['extractor_hash']}), reference {how['reference_hash']}\n")
    lines = [["", *names]]
    lines += [[path, *(number(r["results"].get(name)) for name in names)] for path, r in results.items()]
    print_table(lines)


def number(value):
    return "-" if value is None else f"{value:.4g}"


def print_table(lines):
    """Rows of words as a Markdown table; returns its text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines = lines[:1] + [["-" * width for width in widths]] + lines[1:]
    padded = [[word.ljust(width) for word, width in zip(line, widths, strict=True)] for line in lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in padded)
    print0(text)
    return text


class Table:
    """The rows of one table for one preset: what is there, what is missing, and the commands that make it.

    Rows that are one and the same training share a folder; all share judge, scorer and reference statistics.
    """

    SAME = {"low": "baseline", "alpha=0": "baseline", "sem": "alpha=1"}

    def __init__(self, args):
        self.args, self.name, self.table = args, args.figure, TABLES[args.figure]
        kind_of_runs = "claims" if self.name == "claims" else "tables"
        self.root = args.out or Path("runs") / f"{args.preset}-{kind_of_runs}"
        self.small = args.preset.startswith(("demo", "cifar10", "claims"))  # these train judge and scorer
        few = {"demo": 2000, "cifar10": 10_000, "claims": 10_000}.get(args.preset.removesuffix("-fq"), 50_000)
        self.samples = args.samples or few
        self.stages = args.stages.split(",")
        self.device = ["--device", args.device] if args.device != "auto" else []
        self.settings = dict(preset=args.preset, data=args.data, set=args.set)
        note = self.root / "settings.json"
        writable(note)
        if note.exists() and placed(json.loads(note.read_text())) != placed(self.settings):
            raise UserError(f"{note} tells of other settings ({note.read_text()}) than "
                            f"{json.dumps(self.settings)}; use the same, or another --out")
        scorer = str(self.root / "scorer" / "resnet.pt") if self.small else "inception"
        self.extractor = args.extractor or scorer

    def train(self, stage, folder, *words):
        """(file that it makes, command)"""
        data = ["--data", self.args.data] if self.args.data else []
        sets = [word for item in self.args.set for word in ("--set", item)]
        workers = ["--workers", str(self.args.workers)] if self.args.workers else []
        words = [*data, *workers, *self.device, *sets, *words]
        command = ["train.py", "--stage", stage, "--preset", self.args.preset, *words]
        return folder / f"{stage}.pt", [*command, "--out", str(folder)]

    def shown(self, words):
        """A command as one would type it."""
        many = f"torchrun --standalone --nproc_per_node={self.args.nproc}"
        return f"{many if self.args.nproc > 1 else 'python'} {shlex.join(words)}"

    def shared(self):
        """What all rows need: the judge and the scorer."""
        if not self.small:
            return []
        found = [self.train("vgg", self.root / "judge")]
        if not self.args.extractor:
            _, command = self.train("vgg", self.root / "scorer", "--arch", "resnet", "--seed", "1")
            found.append((self.root / "scorer" / "resnet.pt", command))
        return found

    def row(self, ablation, decoder):
        """The commands of a row, [(file that it makes, command)]; and {column prefix: result file}."""
        run = self.SAME.get(ablation, ablation)
        if run == "entropy" and not self.small:  # no warm start at full scale, so this is the baseline too
            run = "baseline"
        folder, result = self.root / run, {}
        words = ["--ablation", run, *(["--vgg", str(self.root / "judge" / "vgg.pt")] * self.small)]
        commands, first = [self.train("phase1", folder, *words)], folder
        if run.startswith("head-"):  # the tokenizer of another row
            commands, first = self.row("fq-both", decoder)[0][:1], self.root / "fq-both"
            words += ["--tokenizer", str(first / f"{decoder}.pt")]
        if decoder == "phase2":
            commands.append(self.train("phase2", folder, *words))
        for stage in ("ar", "nar"):
            if stage in self.stages:
                commands.append(self.train(stage, folder, *words))
        for stage in self.stages:
            checkpoint = first / f"{decoder}.pt" if stage == "phase1" else folder / f"{stage}.pt"
            result[stage] = folder / f"metrics_{checkpoint.stem}_{decoder}.json"
            command = ["sample.py", "--ckpt", str(checkpoint), "--metrics", "--extractor", self.extractor,
                       "--references", str(self.root / "references"), *self.device,
                       "--out", str(result[stage])]
            if stage == "phase1":
                command += ["--lpips", "none"] * self.small
            else:
                command += ["--tokenizer", str(first / f"{decoder}.pt"), "--num", str(self.samples)]
            commands.append((result[stage], command))
        return commands, result

    def missing(self):
        """[(label, commands still to be run)] of all rows; the shared ones come first."""
        rows, seen = [("judge and scorer", self.shared())], set()
        rows += [(label, self.row(name, decoder)[0]) for label, name, decoder, _ in self.table["rows"]]
        for label, commands in rows:
            left = [(path, w) for path, w in commands if path not in seen and not finished(path, w)]
            seen.update(path for path, _ in left)
            if left:
                yield label, left

    def run(self):
        """Runs what is missing, one command after the other; a row that fails is left, the others go on."""
        text = json.dumps(self.settings)
        save_atomic(lambda p: p.write_text(text), self.root / "settings.json")
        rows, spent, failed, begin = list(self.missing()), {}, [], time.time()
        for i, (label, commands) in enumerate(rows):
            for j, (path, words) in enumerate(commands):
                print0(f"\n{label}: {self.shown(words)}")
                path.parent.mkdir(parents=True, exist_ok=True)
                start, script = time.time(), str(Path(__file__).with_name(words[0]))
                launch, nproc = [sys.executable], self.args.nproc
                if nproc > 1:
                    launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
                with open(path.parent / "log.txt", "a") as log:
                    done = subprocess.run([*launch, script, *words[1:]], stdout=log, text=True,
                                          stderr=subprocess.PIPE)
                    log.write(done.stderr)
                if done.returncode:
                    lines = done.stderr.strip().splitlines() or ["no message"]
                    reason = [line for line in lines if line.startswith("error: ")][-1:] or lines[-1:]
                    reason = reason[0].removeprefix("error: ")
                    failed.append(f"{label}: {words[0]} ended with {done.returncode}: {reason}")
                    print0(f"failed ({reason}); the next row goes on")
                    break
                spent.setdefault(kind(words), []).append(time.time() - start)
                later = commands[j + 1 :] + [c for _, others in rows[i + 1 :] for c in others]
                left = [kind(words) for _, words in later]
                known = [sum(spent[k]) / len(spent[k]) for k in left if k in spent]
                unknown = len(left) - len(known)
                print0(f"{time.time() - start:.0f} s; {len(left)} commands left, about {sum(known) / 60:.0f} "
                       f"minutes" + f" and {unknown} of kinds not yet timed" * bool(unknown))
        print0(f"\n{time.time() - begin:.0f} s" + "".join(f"\nfailed: {line}" for line in failed))
        return failed

    def show(self):
        """Prints the table, the paper's numbers beside ours; writes it as text and JSON."""
        columns, rows, how = self.table["columns"], [], {}
        for label, ablation, decoder, paper in self.table["rows"]:
            commands, files = self.row(ablation, decoder)
            results = {stage: read_result(path) for stage, path in files.items() if path.exists()}
            ours = {}
            for stage, result in results.items():
                prefix = "" if stage == "phase1" else f"{stage}_"
                ours |= {prefix + k: v for k, v in result["results"].items() if isinstance(v, float)}
                how.setdefault(stage, {})[f"{label} ({stage})"] = result
            seconds = [row_seconds(path) for path, _ in commands if path.exists()]
            made = [path for path, _ in commands if path.suffix == ".pt" and path.exists()]
            steps = {path.stem: header(path)["step"] for path in made}
            rows.append(dict(
                label=label, ablation=ablation, steps=steps, ours=ours,
                paper=dict(zip(columns, paper, strict=True)), seconds=round(sum(seconds)),
                files={stage: str(path) for stage, path in files.items()},
                commands=[self.shown(words) for _, words in commands]))
        for results in how.values():
            refuse_unlike(results)
        first = {stage: next(iter(results.values())) for stage, results in how.items()}
        extra = {"table5": ["perplexity"]}.get(self.name, []) + ["ar_class_accuracy", "nar_class_accuracy"]
        extra = [name for name in extra if any(name in row["ours"] for row in rows)]
        steps = ", ".join(f"{stage} {step:,}" for stage, step in rows[0]["steps"].items())
        told = "; ".join(f"{stage}: {result['protocol']}, {result['num_images']:,} images, features of "
                         f"{result['extractor']}" for stage, result in first.items())
        print0(f"\n{self.table['title']}\npaper: {PAPER_SCALE[self.name]}\nours: preset {self.args.preset}, "
               f"steps {steps or 'none yet'}; {told or 'nothing measured yet'}\n")
        lines = [["", *(f"paper: {c}" for c in columns), *(f"ours: {c}" for c in (*columns, *extra))]]
        for row in rows:
            lines.append([row["label"], *(number(row["paper"][c]) for c in columns),
                          *(number(row["ours"].get(c)) for c in (*columns, *extra))])
        text = print_table(lines)
        sets = "".join(f" --set {item}" for item in self.args.set)
        about = dict(
            title=self.table["title"], preset=self.args.preset, paper_scale=PAPER_SCALE[self.name],
            command=f"python visualize.py {self.name} --preset {self.args.preset}{sets} --run",
            how={stage: {key: result[key] for key in ("extractor", *HOW)} for stage, result in first.items()},
            threads=torch.get_num_threads(), torch=torch.__version__, rows=rows)
        self.root.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("json", json.dumps(about, indent=1)), ("md", text)):
            save_atomic(lambda p, c=content: p.write_text(c + "\n"), self.root / f"{self.name}.{suffix}")
        if self.name == "fig5b" and all("rfid" in row["ours"] for row in rows):
            draw_alpha(rows, first["phase1"]["extractor"], self.root / "fig5b_curves.png")
        for label, commands in self.missing():
            print0(f"\nmissing for {label}:")
            for _, words in commands:
                print0(f"  {self.shown(words)}")
        print0(f"\nwrote {self.root / self.name}.json and .md")


class Claims(Table):
    """The experiment on the paper's five claims: arms of CLAIMS, several seeds, equal budgets. See
    assets/claims_protocol.md for what is measured and what counts as holding."""

    SHORT = ["phase1.steps=250", "phase2.steps=50", "ar.steps=250", "nar.steps=300", "ar.lr_start=100",
             "nar.lr_start=120", "ar.warmup=50", "nar.warmup=50", "code_variants=1"]  # for `demo`: one seed

    def __init__(self, args):
        if args.preset == "demo":
            args.set = self.SHORT + args.set
        super().__init__(args)
        if args.preset == "demo":
            rows = [row for row in self.table["rows"] if row[1].endswith("|0")]
            self.table = dict(self.table, rows=rows)

    def row(self, name, decoder):
        """All commands of an arm and seed, and its result files."""
        arm, seed = name.split("|")
        folder, result = self.root / f"{arm},seed={seed}", {}
        words = [*CLAIMS[arm][0], "--seed", seed, "--vgg", str(self.root / "judge" / "vgg.pt")]
        phases = ("phase1",) if arm == "attention2" else ("phase1", "phase2")
        commands = [self.train(stage, folder, *words) for stage in (*phases, "ar", "nar")]

        def measure(key, checkpoint, *more):
            result[key] = folder / f"metrics_{key}.json"
            commands.append((result[key], [
                "sample.py", "--ckpt", str(folder / f"{checkpoint}.pt"), "--metrics", "--extractor",
                self.extractor, "--references", str(self.root / "references"), "--precision", "bf16",
                *self.device, *more, "--out", str(result[key])]))

        for phase in phases:
            measure(f"rec_{phase}", phase, "--lpips", "none")
            for stage in ("ar", "nar"):
                measure(f"{stage}_{phase}", stage, "--tokenizer", str(folder / f"{phase}.pt"), "--num",
                        str(self.samples))
        measure("view", "ar", "--predict", "--tokenizer", str(folder / "phase1.pt"))
        return commands, result

    def measured(self, name):
        """One line of the results: all numbers of an arm and seed, or None while something is missing."""
        commands, files = self.row(name, "phase1")
        if not all(finished(path, words) for path, words in commands):
            return None
        arm, seed = name.split("|")
        folder, results = commands[0][0].parent, {key: read_result(path) for key, path in files.items()}
        row = dict(arm=arm, seed=int(seed), alpha=read_checkpoint(folder / "phase1.pt", ["phase1"])[
            "config"]["phase1"]["alpha"])
        for key, result in results.items():
            row |= {f"{key}_{name}": value for name, value in result["results"].items()
                    if isinstance(value, float)}
        logged = read_metrics(folder / "metrics.jsonl")
        for stage, key in (("phase1", "val_l1"), ("ar", "val_loss"), ("nar", "val_loss")):
            seen = [r for r in logged if r["stage"] == stage and key in r]
            last = seen[-1]  # is the curve flat? The validations are a fifth of the run apart
            row[f"{stage}_last_fifth"] = last[key] - seen[-2][key] if len(seen) > 1 else None
            if stage != "phase1":
                row |= {f"{stage}_nats": last["val_loss"], f"{stage}_top1": last["val_top1"],
                        f"{stage}_relative": last["val_loss"] / last["unigram_entropy"],
                        "unigram_entropy": last["unigram_entropy"]}
        row |= self.further(folder, results["rec_phase1"])
        trained = [path for path, _ in commands if path.suffix == ".pt"]
        return row | dict(
            steps={path.stem: header(path)["step"] for path in trained},
            seconds=round(sum(row_seconds(path) for path, _ in commands)),
            commands=[self.shown(words) for _, words in commands])

    @torch.no_grad()
    def further(self, folder, result):
        """Of 500 validation images: the share of tokens that change under each of `disturbed`, and the terms
        of Eq. 4 between images and reconstructions in the judge's layers. Kept in a file."""
        file, of = folder / "further.json", dict(tokenizer=result["tokenizer"], decoder=result["decoder"])
        numbers = json.loads(file.read_text()) if file.exists() else {}
        if not of.items() <= numbers.items():
            tokenizer, ckpt = load_model(folder / "phase1.pt", ("phase1",))
            judge, _ = load_model(self.root / "judge" / "vgg.pt", ("vgg",))
            images = load_data(ckpt["config"])[1]
            x = torch.stack([images.view(i) for i in range(min(500, len(images)))])
            x = to_float(x, "cpu")
            terms = perceptual_terms(judge, x, decode(tokenizer, tokenizer.encode(x)), NAMES)
            numbers = of | {f"changed_by_{name}": share for name, share in stability(tokenizer, x).items()}
            numbers |= {f"judge_{name}": term.item() for name, term in terms.items()}
            save_atomic(lambda p: p.write_text(json.dumps(numbers)), file)
        return {name: value for name, value in numbers.items() if name not in of}

    def show(self):
        """Prints the table and the verdicts; writes claims.jsonl, claims.json, claims.md and Fig. 5b, 10 and
        11 (the latter two of the first seeds at alpha = 0 and 1)."""
        names = [name for _, name, *_ in self.table["rows"]]
        found = [row for row in map(self.measured, names) if row]
        done = [name for name in names if (name.split("|")[0], int(name.split("|")[1])) in
                [(row["arm"], row["seed"]) for row in found]]
        for key in self.row(names[0], "phase1")[1] if done else ():
            files = {name: self.row(name, "phase1")[1].get(key) for name in done}
            refuse_unlike({name: read_result(path) for name, path in files.items() if path})
        refuse_unequal(found, self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in found)
        save_atomic(lambda p: p.write_text(lines), self.root / "claims.jsonl")
        for label, commands in self.missing():
            print0(f"missing for {label}: {len(commands)} commands, the first {self.shown(commands[0][1])}")
        if not found:
            return
        spread = Spread(found)
        names = {"rec_phase1_rfid": "rFD", "rec_phase2_rfid": "rFD, 1+2", "ar_phase1_fid": "AR FD",
                 "ar_phase2_fid": "AR FD, 1+2", "nar_phase1_fid": "NAR FD", "nar_phase2_fid": "NAR FD, 1+2",
                 "view_view_fid": "view FD", "ar_nats": "AR nats", "ar_relative": "AR nats / unigram",
                 "nar_relative": "NAR nats / unigram", "ar_top1": "AR top-1",
                 "ar_phase1_class_accuracy": "AR class", "nar_phase1_class_accuracy": "NAR class",
                 "ar_phase1_precision": "AR precision", "ar_phase1_recall": "AR recall",
                 "rec_phase1_psnr": "PSNR", "rec_phase1_usage": "usage", "changed_by_noise": "noise",
                 "judge_relu5_3": "judge relu5_3", "judge_logit": "judge logit"}
        table = [["arm (seeds)", *names.values()]]
        for arm in dict.fromkeys(row["arm"] for row in found):
            seeds = sum(row["arm"] == arm for row in found)
            table.append([f"{arm} ({seeds})", *(spread.told(arm, key) for key in names)])
        text = [f"runs: {len(found)}, preset {self.args.preset}; mean over seeds, then the half width of its "
                f"95 % interval from the spread of seeds pooled over arms", "", print_table(table), ""]
        verdicts = list(judge_claims(spread))
        for claim, verdict, parts in verdicts:
            text += [f"{claim}: **{verdict}**", *(f"  - {part}" for part in parts)]
        print0("\n".join(text[3:]))
        accuracy = {stage: [row["val_accuracy"] for row in read_metrics(self.root / stage / "metrics.jsonl")
                            if "val_accuracy" in row][-1:] for stage in ("judge", "scorer")}
        measures = {key: read_result(path) for key, path in self.row(done[0], "phase1")[1].items()}
        about = dict(preset=self.args.preset, set=self.args.set, runs=len(found), torch=torch.__version__,
                     seconds=sum(row["seconds"] for row in found), val_accuracy=accuracy,
                     how={key: {k: result[k] for k in HOW} for key, result in measures.items()},
                     verdicts=[dict(claim=c, verdict=v, parts=p) for c, v, p in verdicts])
        for suffix, content in (("json", json.dumps(about, indent=1)), ("md", "\n".join(text))):
            save_atomic(lambda p, c=content: p.write_text(c + "\n"), self.root / f"claims.{suffix}")
        draw_claims(spread, self.root / "claims_fig5b.png")
        ends = [self.root / f"alpha={alpha},seed=0" for alpha in (0, 1) if f"alpha={alpha}|0" in done]
        if ends:
            ar, nar, first = ([end / f"{stage}.pt" for end in ends] for stage in ("ar", "nar", "phase1"))
            for figure, words in dict(fig10=[*ar, *nar], fig11=[*ar, "--tokenizer", *first]).items():
                args = parse_args([figure, "--ckpt", *map(str, words)])
                fig, numbers = draw(args, setup_device(self.args.device))
                save_figure(fig, self.root / f"claims_{figure}.png", numbers)
        print0(f"wrote {self.root / 'claims'}.jsonl, .json, .md and the figures claims_*.png")


def refuse_unequal(rows, root):
    """raises: UserError if the runs of a stage have not all the same number of steps"""
    for stage in ("phase1", "phase2", "ar", "nar"):
        steps = sorted({row["steps"][stage] for row in rows if stage in row["steps"]})
        if len(steps) > 1:
            raise UserError(f"{root} has runs of {stage} with {steps[0]} and with {steps[-1]} steps, and "
                            "arms are compared at equal budgets; move the odd ones away and --run again")


class Spread:
    """Means over seeds and their 95 % intervals: the variance between seeds is pooled over all arms that have
    several (Student's t with the degrees of freedom of the pool), so that arms of one seed have one too."""

    def __init__(self, rows):
        self.rows = rows

    def values(self, arm, key):
        return [row[key] for row in self.rows if row["arm"] == arm and key in row]

    def pooled(self, key):
        """(standard deviation between seeds, t), nan and nan while no arm has two seeds."""
        return within([self.values(arm, key) for arm in {row["arm"] for row in self.rows}])

    def difference(self, a, b, key):
        """(mean of arm a minus mean of arm b, half width of its interval), or None while one is missing."""
        first, second = self.values(a, key), self.values(b, key)
        if not first or not second:
            return None
        deviation, t = self.pooled(key)
        half = t * deviation * math.sqrt(1 / len(first) + 1 / len(second))
        return sum(first) / len(first) - sum(second) / len(second), half

    def paired(self, arms, a, b, pool):
        """(mean of key a minus key b within the runs of `arms`, half width), or None; the variance of these
        differences is pooled within the arms `pool`."""
        gaps = {arm: [row[a] - row[b] for row in self.rows if row["arm"] == arm and a in row and b in row]
                for arm in {*arms, *pool}}
        found = [gap for arm in arms for gap in gaps[arm]]
        if not found:
            return None
        deviation, t = within([gaps[arm] for arm in pool])
        return sum(found) / len(found), t * deviation / math.sqrt(len(found))

    def by_seed(self, a, b, key):
        """As `difference`, from the differences between runs of one seed, which see the same batches and
        begin with (almost) the same weights. The interval is of these few differences and pools nothing."""
        other = {row["seed"]: row[key] for row in self.rows if row["arm"] == b and key in row}
        gaps = [row[key] - other[row["seed"]] for row in self.rows
                if row["arm"] == a and key in row and row["seed"] in other]
        deviation, t = within([gaps])
        return (sum(gaps) / len(gaps), t * deviation / math.sqrt(len(gaps))) if gaps else None

    def told(self, arm, key):
        values = self.values(arm, key)
        if not values:
            return "-"
        deviation, t = self.pooled(key)
        half = t * deviation / math.sqrt(len(values))
        return f"{sum(values) / len(values):.4g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")


def within(groups):
    """(standard deviation within groups of numbers, Student's t at 97.5 %), nan if none has two numbers"""
    from scipy.stats import t

    free = sum(len(group) - 1 for group in groups if group)
    if not free:
        return math.nan, math.nan
    squares = sum((v - sum(group) / len(group)) ** 2 for group in groups for v in group)
    return math.sqrt(squares / free), t.ppf(0.975, free).item()


def judge_claims(spread):
    """[(claim, verdict, parts)] of the paper's five statements; the rules are those of the protocol.

    A part is a difference that the paper says is negative ("falls"), or is not ("no fall"). A claim holds if
    all parts do, each with its whole 95 % interval; it does not hold if one interval lies on the other side.
    Usage in (e) is judged by limits instead. Parts that begin with "beside" are told and not judged.
    """

    def part(text, found, margin=None):
        """(True, False or None, text). With a margin, 0 or more: no fall, so none beyond the margin."""
        if found is None:
            return None, f"{text}: not measured"
        mean, half = found
        if math.isnan(half):
            return None, f"{text}: {mean:+.3g} (one seed: no interval)"
        if half == 0:
            return None, f"{text}: {mean:+.3g} (no spread between seeds: no interval)"
        told = f"{text}: {mean:+.3g} ± {half:.2g}"
        if margin is not None:
            return (False if mean + half < 0 else True if mean - half > -margin else None), told
        return (True if mean + half < 0 else False if mean - half > 0 else None), told

    def best_between(end):
        """rFD at 0.5 is below that of an end; refuted only if it is above at each alpha between."""
        found = [part(f"rFD at {arm} minus {end}", d(arm, end, "rec_phase1_rfid"))
                 for arm in ("alpha=0.5", "alpha=0.25", "alpha=0.75")]
        refuted = all(fine is False for fine, _ in found)
        return True if found[0][0] else False if refuted else None, "; ".join(text for _, text in found)

    ends, d = ("alpha=1", "alpha=0"), spread.difference
    middle = [best_between(end) for end in ends]
    alphas = [arm for arm in CLAIMS if arm.startswith("alpha=")]
    both, f4 = ("ar", "nar"), ("f4,alpha=1", "f4,alpha=0")
    gain = d("attention2", "alpha=0", "rec_phase1_rfid")
    margin = max(0.0, -gain[0] / 2) if gain else 0.0
    limit = f" (no fall beyond {margin:.2g})" if gain else ""
    three = (("rFD", "rec_phase1_rfid"), ("AR FD", "ar_phase1_fid"), ("NAR FD", "nar_phase1_fid"))

    def beside(text, *found):
        return f"beside, {text}: " + "; ".join(part(name, value)[1] for name, value in found)

    def compared(text, a, b, names, gap=d):
        return beside(text, *[(name, gap(a, b, key)) for name, key in names])

    def by_seed(text, a, b, names):
        return compared(f"{text}, paired by seed", a, b, names, spread.by_seed)

    second = [(f"{s.upper()} FD, phase 1 + 2", f"{s}_phase2_fid") for s in both]
    nats = [(s.upper(), f"{s}_nats") for s in both]
    relative = [(s.upper(), f"{s}_relative") for s in both]
    told = {
        "(a)": [compared("alpha = 1 minus 0", *ends, [*second, ("view FD", "view_view_fid")]),
                compared("terms of the loss at alpha = 1, alpha = 1 minus 0", *ends,
                         [("relu5_3", "judge_relu5_3"), ("logit", "judge_logit")]),
                compared("f = 4, alpha = 1 minus 0", *f4, three),
                by_seed("alpha = 0.5 minus 0", "alpha=0.5", "alpha=0", three),
                by_seed("alpha = 1 minus 0", *ends, three)],
        "(b)": [compared("nats, alpha = 1 minus 0", *ends, nats),
                compared("over unigram, f = 4, alpha = 1 minus 0", *f4, relative),
                by_seed("over unigram, alpha = 1 minus 0", *ends, relative)],
        "(c)": [by_seed("attention x2 minus baseline", "attention2", "alpha=0", three)],
        "(d)": [beside("phase 1 + 2 minus phase 1, all alphas", *[
            (s.upper(), spread.paired(alphas, f"{s}_phase2_fid", f"{s}_phase1_fid", alphas)) for s in both])],
        "(e)": [compared("both from a K-means start, entropy minus plain", "alpha=0", "plain",
                         [("usage", "rec_phase1_usage"), *three])],
    }
    usage = [row["rec_phase1_usage"] for row in spread.rows if row["arm"] == "alpha=0"]
    full = (min(usage) > 0.99, f"lowest usage of the arm alpha=0: {min(usage):.1%}") if usage else (
        None, "usage of the arm alpha=0: not measured")
    gap = d("entropy", "vqgan", "rec_phase1_usage")  # near 100 % seeds hardly differ: a margin instead
    more = (None, "usage, entropy minus plain: not measured") if gap is None else (
        None if abs(gap[0]) <= 0.05 or math.isnan(gap[1]) else gap[0] > 0,
        f"usage, entropy minus plain: {100 * gap[0]:+.1f} points (counts beyond 5)")
    claims = [
        ("(a) the FD of samples falls with alpha, and rFD is best between 0 and 1",
         [part(f"{s.upper()} FD, alpha = 1 minus 0", d(*ends, f"{s}_phase1_fid")) for s in both] + middle),
        ("(b) the loss of the priors falls with alpha (nats over unigram entropy)",
         [part(f"{name}, alpha = 1 minus 0", d(*ends, key)) for name, key in relative]),
        ("(c) the attention decoder improves rFD and does not improve samples",
         [part("rFD, attention x2 minus baseline", d("attention2", "alpha=0", "rec_phase1_rfid"))]
         + [part(f"{s.upper()} FD, attention x2 minus baseline{limit}",
                 d("attention2", "alpha=0", f"{s}_phase1_fid"), margin) for s in both]),
        ("(d) phase 2 improves samples at unchanged tokens",
         [part(f"{s.upper()} FD, phase 1 + 2 minus phase 1, alpha = 1",
               spread.paired(["alpha=1"], f"{s}_phase2_fid", f"{s}_phase1_fid", alphas)) for s in both]),
        ("(e) the entropy term brings usage to about 100 % and improves both",
         [full, more]
         + [part(f"{name}, entropy minus plain", d("entropy", "vqgan", key)) for name, key in three]),
    ]
    for claim, parts in claims:
        found = [fine for fine, _ in parts]
        verdict = "does not hold" if False in found else "not decided" if None in found else "holds"
        yield claim, verdict, [text for _, text in parts] + told.get(claim[:3], [])


def draw_claims(spread, path):
    """Fig. 5b with intervals: rFD, and FD of both priors' samples, over alpha."""
    fig = new_figure(8, 3)
    axes = fig.subplots(1, 3)
    arms = [arm for arm in CLAIMS if arm.startswith("alpha=") and spread.values(arm, "rec_phase1_rfid")]
    alphas, numbers = [float(arm.removeprefix("alpha=")) for arm in arms], []
    titles = {"rec_{}_rfid": "rFD", "ar_{}_fid": "AR samples, FD", "nar_{}_fid": "NAR samples, FD"}
    for axis, (form, name) in zip(axes, titles.items(), strict=True):
        for phase, style, label in (("phase1", "ko-", "phase 1"), ("phase2", "C0s--", "phase 1 + 2")):
            key = form.format(phase)
            deviation, t = spread.pooled(key)
            values = [spread.values(arm, key) for arm in arms]
            means = [sum(v) / len(v) if v else math.nan for v in values]
            half = [t * deviation / math.sqrt(len(v)) if v else math.nan for v in values]
            bars = None if math.isnan(deviation) else half
            axis.errorbar(alphas, means, bars, fmt=style, capsize=3, markersize=4, label=label)
            numbers.append(dict(metric=key, alpha=alphas, values=values, half_width=bars))
        axis.set(xlabel="α", title=name)
    axes[0].legend(fontsize=7)
    save_figure(fig, path, numbers)


def placed(settings):
    """settings.json with the folder of images in one spelling"""
    data = settings.get("data")
    return dict(settings, data=str(as_path(data).resolve()) if is_folder(data) else data)


def kind(words):
    """What commands take about the same time."""
    return (words[0], words[2]) if words[0] == "train.py" else (words[0], Path(words[2]).stem)


def header(path):
    """A checkpoint whose tensors stay on disk; its checksum is not looked at. raises: UserError if damaged"""
    try:
        return torch.load(path, weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{path} is damaged; delete it and --run again") from None


def finished(path, words):
    """Whether a command need not be run again: its checkpoint has all its steps, or its result is newer than
    what was measured and of the same extractor and number. Settings are those of settings.json."""
    if not path.exists():
        return False
    if path.suffix == ".pt":
        try:
            ckpt = header(path)
        except UserError:  # train.py sets it aside and takes the one before
            return False
        section = "judge" if ckpt["stage"] in ("vgg", "resnet") else ckpt["stage"]
        return ckpt["step"] >= ckpt["config"][section]["steps"]
    num = int(words[words.index("--num") + 1]) if "--num" in words else None
    sources = [Path(words[i + 1]) for i, word in enumerate(words) if word in ("--ckpt", "--tokenizer")]
    fresh = all(p.exists() and p.stat().st_mtime < path.stat().st_mtime for p in sources)
    result = read_result(path)
    alike = result["extractor"] == words[words.index("--extractor") + 1]
    return fresh and alike and num in (None, result["num_images"])


def row_seconds(path):
    return header(path)["seconds"] if path.suffix == ".pt" else read_result(path)["seconds"]


def draw_alpha(rows, extractor, path):
    """Fig. 5b: rFID, and FID of both priors' samples, over alpha; ours alone."""
    alphas = [float(row["ablation"].removeprefix("alpha=")) for row in rows]
    fig = new_figure(5, 3.4)
    left = fig.subplots()
    right = left.twinx()
    left.plot(alphas, [row["ours"]["rfid"] for row in rows], "ko-", label="reconstructions (rFID)")
    for key, style, label in (("ar_fid", "C0s--", "AR samples"), ("nar_fid", "C1^:", "NAR samples")):
        right.plot(alphas, [row["ours"].get(key, math.nan) for row in rows], style, label=label)
    left.set(xlabel="α", ylabel="Fréchet distance, reconstructions")
    right.set_ylabel("Fréchet distance, samples")
    lines = left.get_lines() + right.get_lines()
    left.legend(lines, [line.get_label() for line in lines], fontsize=7)
    fig.suptitle(f"features of {extractor}", fontsize=7)
    numbers = [dict(alpha=a, **row["ours"]) for a, row in zip(alphas, rows, strict=True)]
    save_figure(fig, path, numbers)


# ----------------------------------------------------------------------------------------------------------
# Validation during training; each process takes a part of the images
# ----------------------------------------------------------------------------------------------------------


def val_batches(run, limit, batch=50):
    """(indices, images) of this process's share of the first `limit` validation images."""
    mine = list(range(rank(), min(limit, len(run.val)), world()))
    for i in range(0, len(mine), batch):
        indices = mine[i : i + batch]
        yield indices, to_float(torch.stack([run.val.view(j) for j in indices]), run.device)


def ratio(run, sums):
    """The first entries of a vector of sums over the last one, a count; summed over processes."""
    sums = all_reduce_mean(torch.tensor(sums, dtype=torch.float64).to(run.device))
    return (sums[:-1] / sums[-1].clamp(min=1)).tolist()


@torch.no_grad()
def evaluate_judge(run, stage, step, judge, limit=5000):
    """Share of validation images that the judge or scorer in training classifies rightly."""
    judge.eval()
    right = total = 0
    for indices, x in val_batches(run, limit):
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        with run.autocast:
            right += (judge(normalize_images(x)).argmax(1) == labels).sum().item()
        total += len(labels)
    run.log(stage, step, val_accuracy=ratio(run, [right, total])[0])


PER_CODE = 10  # tokens for each code that a usage must be counted on before its fall means anything


def told_usage(counted, codebook_size):
    """On how many tokens a codebook's usage was counted where these are few, and what that does to it."""
    most = min(1.0, counted / codebook_size)
    bound = f" and cannot exceed {most:.0%}" if most < 1 else ""
    return (f"usage is counted on {counted} validation tokens for {codebook_size} codes{bound}; below "
            f"{PER_CODE} for each code it says little, and no alarm is raised")


@torch.no_grad()
def evaluate_tokenizer(run, stage, step, tokenizer, limit=1000):
    """PSNR, L1 and hard codebook usage on validation images; a sheet of inputs above reconstructions."""
    tokenizer.eval()
    sums, counts = [0.0, 0.0, 0], 0
    for _, x in val_batches(run, limit):
        with run.autocast:
            tokens = tokenizer.encode(x)
            x_hat = tokenizer.decode(tokens).float()
        counts = counts + count_codes(tokens, tokenizer.codebook_size).float()
        values = psnr(x, x_hat).sum().item(), (x - x_hat).abs().mean((1, 2, 3)).sum().item(), len(x)
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    val_psnr, val_l1 = ratio(run, sums)
    usage, perplexity = codebook_usage(all_reduce_mean(counts))
    counted = min(limit, len(run.val)) * tokenizer.token_shape[0]
    run.log(stage, step, val_psnr=val_psnr, val_l1=val_l1, usage=usage, perplexity=perplexity,
            usage_tokens=counted)
    if counted < PER_CODE * tokenizer.codebook_size and "few_tokens" not in run.warned:
        run.warned.add("few_tokens")
        print0(f"note: {told_usage(counted, tokenizer.codebook_size)}")
    x = torch.stack([run.val.view(i) for i in range(min(10, len(run.val)))])
    with run.autocast:
        x_hat = to_uint8(tokenizer.decode(tokenizer.encode(to_float(x, run.device))))
    run.sheet(f"reconstructions_{stage}", torch.cat([x, x_hat]), len(x))


@torch.no_grad()
def evaluate_prior(run, stage, step, prior, tokenizer, codes, unigram, limit=5000, batch=100):
    """Nats per token and top-1 accuracy on validation codes, beside ln K and the unigram entropy; samples.

    NAR is measured at fixed mask ratios, the same at every call and in every run.
    """
    prior.eval()
    classes, sums = prior.config.num_classes, [0.0, 0.0, 0]
    for start in range(rank() * batch, min(limit, len(codes["val"])), world() * batch):
        tokens = codes["val"][start : start + batch].long().to(run.device)
        labels = codes["val_labels"][start : start + batch].to(run.device) if classes else None
        inputs, mask = tokens, torch.ones_like(tokens, dtype=torch.bool)
        if stage == "nar":
            noise = seeded_rand(len(tokens), tokens.shape[1] + 1, seed=mix("val", start)).to(run.device)
            inputs, mask = mask_tokens(tokens, prior.mask_id, noise)
        with run.autocast:
            logits = prior(inputs, labels, *[tokens] * (stage == "nar"))
        loss, accuracy = prior.loss(logits, tokens, *([mask] if stage == "nar" else []))
        count = mask.sum().item()
        values = loss.item() * count, accuracy.item() * count, count
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    loss, accuracy = ratio(run, sums)
    K = prior.config.codebook_size
    run.log(stage, step, val_loss=loss, val_top1=accuracy, ln_K=math.log(K), unigram_entropy=unigram)
    columns = min(10, classes or 8)
    labels = [i % columns for i in range(columns * 10)] if classes else None
    with run.autocast:
        images = generate_images(
            prior, tokenizer, columns * 10, labels, run.config["seed"], run.config["sample"], batch=50)
    run.sheet(f"samples_{stage}", images, columns)


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; one that a kill tore in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def early_warnings(rows, stage, c, codebook_size=0):
    """Signs of a run that goes wrong, with cause and remedy: {name: message}.

    rows: the lines of metrics.jsonl of this stage so far, oldest first;  c: its section of the preset
    codebook_size: K; a usage counted on less than PER_CODE * K tokens raises no alarm, its fall may be chance
    """
    found, last = {}, {}
    for name in ("usage", "loss_disc", "val_loss", "loss_per", "loss_rec", "adaptive_weight"):
        last[name] = [row[name] for row in rows if row.get(name) is not None]
    usage, disc, val, per, rec, adaptive = last.values()
    enough = all(row["usage_tokens"] >= PER_CODE * codebook_size for row in rows if "usage_tokens" in row)
    if enough and usage and usage[-1] < 0.8 * max(usage):
        found["usage"] = (f"codebook usage fell from {max(usage):.0%} to {usage[-1]:.0%}: codes die; raise "
                          f"{stage}.gamma or lower {stage}.lr with --set")
    if len(disc) >= 5 and max(disc[-5:]) < 0.1:
        found["disc"] = (f"the discriminator wins, its loss stays below 0.1 and teaches nothing; raise "
                         f"{stage}.r1_gamma or {stage}.adv_start (begin later) with --set")
    if adaptive and adaptive[-1] >= 9999:
        found["adaptive"] = (f"the adaptive weight is at its clamp, the adversarial gradient near zero; "
                             f"--set {stage}.adaptive=false")
    if len(val) > 1 and val[-1] > 1.02 * min(val):
        found["val"] = (f"the validation loss rose from {min(val):.4g} to {val[-1]:.4g}: overfitting; fewer "
                        "--steps, --set prior.dropout=0.1, or more code_variants")
    if rec and per and c["per_weight"] and c["per_weight"] * per[-1] < 1e-3 * rec[-1]:
        found["per"] = (f"the perceptual term is near zero beside the L1 term: are the weights of --vgg "
                        f"trained ones, and is {stage}.per_weight large enough?")
    return found


# ----------------------------------------------------------------------------------------------------------
# The summary of a run (train.py --stage all)
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_summary(run, first, second):
    """Both phases on all validation images: usage, distances, and whether phase 2 moved a token."""
    sums, counts, changed, total = {}, 0, 0, len(run.val)
    for start in tqdm(range(0, total, 50), "reconstructing", disable=None if rank() == 0 else True):
        indices = range(start, min(start + 50, total))
        x = to_float(torch.stack([run.val.view(i) for i in indices]), run.device)
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        tokens = first.encode(x)
        changed += (tokens != second.encode(x)).sum().item()
        counts = counts + count_codes(tokens.cpu(), first.codebook_size)
        values = {"judge_accuracy": hits(run, x, labels)}
        if tokens.ndim > 2:
            values["cos_between_codebooks"] = mean_cosine(first.code_maps(tokens))
        for name, tokenizer in (("phase1", first), ("phase2", second)):
            x_hat = tokenizer.decode(tokens)
            values[f"psnr_{name}"] = psnr(x, x_hat)
            values[f"lpips_like_{name}"] = lpips_like(run.judge, x, x_hat)
            values[f"recon_class_accuracy_{name}"] = hits(run, x_hat, labels)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
    usage, perplexity = codebook_usage(counts)
    means = {name: value / total for name, value in sums.items()}
    if counts.ndim > 1:
        means["usage_of_each"] = [codebook_usage(part)[0] for part in counts]
    return dict(usage=usage, usage_tokens=total * first.token_shape[0], perplexity=perplexity,
                phase2_tokens_changed=changed, **means)


def mean_cosine(maps):
    """|cos| between the codes of two sub-codebooks at one position, (B,): means over pairs and positions."""
    pairs = [F.cosine_similarity(a, b, dim=1).abs() for a, b in itertools.combinations(maps, 2)]
    return torch.stack(pairs).mean((0, 2, 3))


def hits(run, x, labels):
    """1 where the run's judge recognises the class, else 0, (B,); nan where the judge has other classes."""
    logits = run.judge(x.clamp(-1, 1), [LOGIT])[LOGIT]
    right = (logits.argmax(1) == labels).float()
    return right if logits.shape[1] == run.train.num_classes else right * math.nan


def sample_summary(run, stage, tokenizer, num):
    """Class accuracy of `num` samples as the judge sees them, nats per token, and a sheet."""
    prior, _ = load_model(run.out / f"{stage}.pt", (stage,), run.device)
    classes = prior.config.num_classes
    labels = [i % classes for i in range(num)] if classes else None
    images = generate_images(
        prior, tokenizer, num, labels, run.config["seed"], run.config["sample"], 50, True)
    run.sheet(f"samples_{stage}", images[: 10 * min(classes or 10, 10)], min(classes or 10, 10))
    rows = read_metrics(run.out / "metrics.jsonl")
    result = {}
    for last in [row for row in rows if row["stage"] == stage and "val_loss" in row][-1:]:
        result = {f"{stage}_nats_per_token": last["val_loss"], f"{stage}_top1": last["val_top1"],
                  "unigram_entropy": last["unigram_entropy"], "ln_K": last["ln_K"]}
    if classes:
        parts = zip(images.split(50), torch.tensor(labels, device=run.device).split(50), strict=True)
        found = [hits(run, to_float(x, run.device), wanted) for x, wanted in parts]
        result[f"{stage}_class_accuracy"] = torch.cat(found).mean().item()
    return result


def summary_lines(numbers, prefix=""):
    """(name, value in a few words) of the summary: floats with four digits, a dict's entries one by one.
    Maps, as the view's nats by position, are in summary.json alone."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from summary_lines(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(part, list) for part in value)):
            parts = value if isinstance(value, list) else [value]
            told = (f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts)
            yield prefix + name, ", ".join(told)


@torch.no_grad()
def summarize(run, num=1000):
    """The table that ends `--stage all`, printed and written to summary.json, with the run's pictures."""
    first, _ = load_model(run.out / "phase1.pt", ("phase1",), run.device)
    second, _ = load_model(run.out / "phase2.pt", ("phase2",), run.device)
    summary = dict(
        preset=run.args.preset, data=str(run.config["data"]), num_samples=num, num_val=len(run.val))
    summary |= tokenizer_summary(run, first, second)
    summary["recon_class_accuracy"] = summary["recon_class_accuracy_phase2"]
    for stage in ("ar", "nar"):
        summary |= sample_summary(run, stage, second, num)
    x = torch.stack([run.val.view(i) for i in range(min(10, len(run.val)))])
    tokens = first.encode(to_float(x, run.device))
    run.sheet("phases", torch.cat([x, *(to_uint8(t.decode(tokens)) for t in (first, second))]), len(x))
    pairs, x = load_pairs([run.out / "ar.pt"], min(64, len(run.val)), run.device)
    summary["view"] = pairs[0]["numbers"]
    save_figure(views_grid("view", pairs, x), run.out / "view.png", [summary["view"]])
    files = [run.out / f"{stage}.pt" for stage in ("vgg", "phase1", "phase2", "ar", "nar")]
    seconds = {path.stem: round(header(path)["seconds"]) for path in files if path.exists()}
    summary |= dict(
        latent_hash=latent_hash(second), **alpha_of(run.config), note=run.note,
        seconds_by_stage=seconds, seconds=sum(seconds.values()),
        peak_rss_mb=round(peak_memory()),
        threads=torch.get_num_threads(), torch=torch.__version__, command=" ".join(["python", *sys.argv]),
    )
    summary = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in summary.items()}
    if rank() == 0:
        save_atomic(lambda p: p.write_text(json.dumps(summary, indent=1) + "\n"), run.out / "summary.json")
    for name, told in summary_lines(summary):
        print0(f"  {name:28s} {told}")
    print0(f"pictures: {run.out}/phases.png, samples_ar.png, samples_nar.png, view.png")


# ----------------------------------------------------------------------------------------------------------
# train.py --explain
# ----------------------------------------------------------------------------------------------------------


PEAK = 989e12  # dense bf16 FLOP/s of an H100, by its data sheet
REACHED = dict(phase1=0.13, phase2=0.08, ar=0.2, nar=0.17)  # of it by preset imagenet (README, On a GPU)


def cost(steps, *networks):
    """What one image costs in training, counted on fake tensors; nothing is computed.

    steps:    functions that run one after the other, each with its own backward pass
    networks: whose weights the passes save; they are not activations
    returns:  FLOPs, a multiply-add being two; bytes that autograd keeps, at 2 bytes a number (bf16), in the
              step that keeps most
    """
    weights = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    flops, most = 0, 0
    for step in steps:
        kept = {}  # by storage; holding the tensors keeps their addresses apart

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                step()
        flops += counter.get_total_flops()
        most = max(most, 2 * sum(t.numel() for address, t in kept.items() if address not in weights))
    return flops, most


def to_fake(network):
    """Replaces all weights and buffers by fake ones, inside a FakeTensorMode."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def print_cost(name, c, flops, kept, trainable, frozen=0, processes=8):
    """FLOPs of a stage, memory and time on GPUs. Weights, gradients and Adam's moments are float32."""
    per_gpu = max(1, c["batch"] // processes)
    memory = (16 * trainable + 4 * frozen + per_gpu * kept) / 2**30
    run = flops * c["batch"] * c["steps"]
    share = REACHED.get(name, REACHED["phase1"])  # a judge was not measured
    print(f"  cost of {name}: {flops / 1e9:,.1f} GFLOP an image, {run:.2e} FLOP in all; estimated: "
          f"{memory:.1f} GiB a GPU at {per_gpu} images, {run / PEAK / share / 3600:.3g} H100-hours at "
          f"{share:.0%} of the peak")


def explain(config, networks, processes=8):
    """Prints modules, sizes, recipe and cost of a preset; all tensors are fake, nothing is computed.

    networks: of all stages, as a run builds them on the meta device first
    """

    def count(module):
        return sum(p.numel() for p in module.parameters())

    def row(name, module, state, c):
        recipe = f"lr {c['lr']:g} {c['schedule']}"
        if c["schedule"] != "constant":
            recipe += f" to {c['lr_end']:g}" + f" from step {c['lr_start']}" * bool(c["lr_start"])
        print(f"  {name:30s} {count(module):>13,}  {state:9s}  {recipe if state == 'trainable' else ''}")

    def stage(name, c):
        share = c["batch"] / processes
        print(f"{name}: {c['steps']:,} steps of {c['batch']} images = {processes} processes x {share:g}, "
              f"or fewer with --micro-batch; {'AdamW' if c['weight_decay'] else 'Adam'} {tuple(c['betas'])}, "
              f"weight decay {c['weight_decay']:g}, {config['precision']}")

    first, second, disc, judge = networks["phase1"], networks["phase2"], networks["disc"], config["judge"]
    N, *k = first.token_shape
    sizes = dict(config["tokenizer"], image_size=config["image_size"])
    own = (judge["width"], 10, judge["hidden"]) if config["vgg"] == "judge" else ()
    with torch.device("meta"):
        table1 = {}
        if first.config.trunk == "seqgan":
            table1 = {name: VQTokenizer(TokenizerConfig(**dict(sizes, **{name: 2})))
                      for name in ("num_attention", "decoder_extra_blocks")}
        prior = {n: ARPrior(replace(networks["ar"].config, num_classes=n)) for n in (0, 1000)}
        taps = VGGTaps(build_vgg16(*own))
    vgg = networks.get("vgg", taps)
    with FakeTensorMode():  # as "meta", but autocast and attention believe to be on a CPU
        for network in (vgg, taps, first, second, disc, *prior.values()):
            to_fake(network)
        x, tokens = torch.zeros(1, 3, *[config["image_size"]] * 2), torch.zeros(1, N, *k, dtype=torch.int64)
        label = torch.zeros(1, dtype=torch.int64)
        if config["vgg"] == "judge":
            stage("vgg (10 classes assumed)", judge)
            row("judge, a narrow VGG-16", vgg, "trainable", judge)
            print_cost("vgg", judge, *cost([lambda: vgg(x).sum().backward()], vgg), count(vgg), 0, processes)
        for name, tokenizer in (("phase1", first), ("phase2", second)):
            c, frozen = config[name], "frozen" if name == "phase2" else "trainable"
            stage(f"{name}, {told_loss(c)}", c)
            row("encoder", tokenizer.encoder, frozen, c)
            row("codebook", tokenizer.quantizer, frozen, c)
            row("decoder", tokenizer.decoder, "trainable", c)
            print(f"  {'tokenizer':30s} {count(tokenizer):>13,}")
            row("discriminator", disc, "trainable", c)
            row("VGG-16", taps, "frozen", c)
            weights = LAYER_SETS[{"lpips": "low"}.get(c["layers"], c["layers"])] if c["layers"] else (
                layer_weights(c["alpha"]))
            if name == "phase2":
                tokenizer.freeze_latent_space()

            def autoencode(tokenizer=tokenizer, weights=weights):
                x_hat, _, losses = tokenizer(x)
                disc.requires_grad_(False)
                loss = F.l1_loss(x_hat, x) + perceptual_loss(taps, x, x_hat, weights) + adv_loss(disc(x_hat))
                losses.pop("codes", None)  # FQGAN's; its students' features stand in for its further losses
                students = [feature.sum() for feature in losses.pop("features", [])]
                sum([*losses.values(), *students], loss).backward()

            def discriminate():
                disc.requires_grad_(True)
                disc_loss(disc(x), disc(x)).backward()

            trainable = count(disc) + (count(tokenizer.decoder) if name == "phase2" else count(tokenizer))
            flops, kept = cost([autoencode, discriminate], tokenizer, disc, taps)
            if c["r1_gamma"]:
                # R1 differentiates twice, which costs about as much as the discriminator's whole step
                flops += cost([discriminate], disc)[0] // c["r1_every"]
            frozen = count(taps) + count(disc) + count(tokenizer) - trainable
            print_cost(name, c, flops, kept, trainable, frozen, processes)
        if first.config.trunk == "seqgan":
            names = {"+Attention x2": "num_attention", "+Conv x2": "decoder_extra_blocks"}
            print("Table 1: " + ", ".join(f"{label} {count(table1[name]):,} (--set tokenizer.{name}=2)"
                                          for label, name in names.items()))
        for name in ("ar", "nar"):
            stage(f"{name}, {first.grid_size}^2 tokens of {first.codebook_size} codes", config[name])
            row("prior, unconditional", prior[0], "trainable", config[name])
            row("prior, 1000 classes", prior[1000], "trainable", config[name])  # one network, so one cost
            flops, kept = cost([lambda: prior[1000](tokens, label).sum().backward()], prior[1000])
            print_cost(name, config[name], flops, kept, count(prior[1000]), 0, processes)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def main(args):
    with one_line_errors():
        if args.figure == "metrics":
            return print_metrics(args.files)
        if args.figure in TABLES:
            table = (Claims if args.figure == "claims" else Table)(args)
            failed = table.run() if args.run else []
            table.show()
            if failed:
                raise UserError(f"{len(failed)} rows failed, see above and log.txt in their folders", code=1)
            return
        device = setup_device(args.device)
        if args.figure == "report":
            report(args, device)
        elif args.figure == "compare":
            out = args.out or args.files[0].with_name("compare.json")
            writable(out)
            text = json.dumps(compare(args, device), indent=1) + "\n"
            save_atomic(lambda p: p.write_text(text), out)
            print0(f"wrote {out}")
        else:
            out = args.out or args.ckpt[0].parent / f"{args.figure}.png"
            for suffix in (".png", ".json", *[".pdf"] * args.pdf):
                writable(out.with_suffix(suffix))
            fig, numbers = draw(args, device)
            save_figure(fig, out, numbers, args.pdf)
            print0(f"wrote {out} and the numbers in {out.with_suffix('.json').name}")


def draw(args, device):
    """(figure, numbers) of a figure of the paper"""
    if args.figure in VIEWS:
        return figure_views(args.figure, args, device)
    if args.figure in ("fig7a", "fig9"):
        return figure_phases(args.figure, args, device)
    figures = {"fig3": figure_example, "fig8": figure_stability, "fig10": figure_losses,
               "fq_alone": figure_alone, "fq_map": figure_map}
    return figures[args.figure](args, device)


if __name__ == "__main__":
    main(ARGUMENTS)
