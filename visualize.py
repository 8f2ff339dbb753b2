"""The paper's tool: what does a prior predict, seen as pictures (Sec. 3.2, Fig. 3)?

    python visualize.py view --ckpt runs/demo/ar.pt                       # one prior with its tokenizer
    python visualize.py view --ckpt runs/a/ar.pt runs/b/ar.pt --num 6     # several, on the same images

The teacher-forced view decodes the prior's top-1 prediction of every token, given the true tokens before
it, and shows it beside the reconstruction. A tokenizer whose tokens are predictable gives two alike pictures.
"""

import argparse
from pathlib import Path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("figure", choices=["view"], help="view: input, reconstruction, top-1 prediction and hit map (Fig. 3)")
    add("--ckpt", type=Path, nargs="+", required=True, help="one or several ar.pt")
    add("--tokenizer", type=Path, nargs="+", default=[], help="one per CKPT (default: found beside each)")
    add("--data", help="folder of images (default: the validation images of the first run)")
    add("--num", type=int, default=64, help="images for the numbers; the first 8 are drawn (default 64)")
    add("--out", type=Path, help="PNG to write, numbers go beside it as JSON (default: view.png beside CKPT)")
    add("--device", default="auto", help="cuda, cpu or auto")
    args = parser.parse_args(argv)
    if args.num < 1 or (args.tokenizer and len(args.tokenizer) != len(args.ckpt)):
        parser.error("--num must be at least 1, and --tokenizer needs one file per --ckpt")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_args()  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import contextlib
import json
import math
import resource
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from perceptual import (
    LOGIT, PatchDiscriminator, StyleDiscriminator, build_vgg16, lpips_like, normalize_images,
)
from prior_ar import ARPrior, PriorConfig
from prior_nar import mask_tokens
from sample import (
    UserError, generate_images, latent_hash, load_data, load_model, load_tokenizer_of, mix, one_line_errors,
    print0, psnr, rank, save_atomic, seeded_rand, setup_device, to_float, to_uint8, world,
)
from tokenizer import TokenizerConfig, VQTokenizer, all_reduce_mean, codebook_usage


@torch.no_grad()
def teacher_forced_view(tokenizer, prior, x, labels=None):
    """s = tokens of x; s' = argmax of one forward pass on [c, s_1..s_{N-1}]; both decoded (Sec. 3.2, Fig. 3).

    tokenizer: anything with encode, decode;  prior: ARPrior (a masked prior would see its target)
    x:         (B, 3, H, W) in [-1, 1];  labels: (B,) int64 or None
    returns:   dict of tokens s and tokens_pred s' (B, N) int64, nats (B, N), hits (B, N) bool,
               reconstruction Dec(s) and prediction Dec(s') (B, 3, H, W)
    """
    tokens = tokenizer.encode(x)
    logits = prior(tokens, labels).float()  # (B, N, K)
    tokens_pred = logits.argmax(2)
    return dict(
        tokens=tokens, tokens_pred=tokens_pred, hits=tokens == tokens_pred,
        nats=F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none"),
        reconstruction=tokenizer.decode(tokens), prediction=tokenizer.decode(tokens_pred),
    )


def view_numbers(x, view):
    """The discrepancy of a view in numbers: means over images; PSNR in dB after rounding to 8 bits."""
    return dict(
        top1=view["hits"].float().mean().item(),
        nats_per_token=view["nats"].mean().item(),
        psnr_reconstruction=psnr(x, view["reconstruction"]).mean().item(),
        psnr_prediction=psnr(x, view["prediction"]).mean().item(),
        psnr_prediction_to_reconstruction=psnr(view["reconstruction"], view["prediction"]).mean().item(),
    )


def draw_view(x, views, names, path, note=""):
    """One row per image: input, then reconstruction, top-1 prediction and hit map of each prior."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = len(x), 1 + 3 * len(views)
    fig, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.25 * rows + 0.75), squeeze=False)
    for i in range(rows):
        panels = [("input", to_uint8(x[i]).permute(1, 2, 0).numpy(), None)]
        for name, view in zip(names, views, strict=True):
            side = math.isqrt(view["hits"].shape[1])
            hits = view["hits"][i].view(side, side).cpu().numpy()
            for key, title in (("reconstruction", "reconstruction"), ("prediction", "top-1 prediction")):
                panels.append((f"{name}\n{title}", to_uint8(view[key][i]).permute(1, 2, 0).numpy(), None))
            panels.append((f"{name}\nhit map", hits, f"{hits.mean():.0%}"))
        for axis, (title, picture, text) in zip(axes[i], panels, strict=True):
            if picture.ndim == 2:
                axis.imshow(picture, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
            else:
                axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_title(title, fontsize=7)
            if text:
                axis.set_xlabel(text, fontsize=6, labelpad=1)
    fig.text(0.5, 0.005, "hit map: yellow where the prediction is the true token  " + note,
             ha="center", fontsize=6)
    fig.tight_layout(rect=(0, 0.02, 1, 1), pad=0.3)
    save_atomic(lambda p: fig.savefig(p, format="png", dpi=200), path)
    plt.close(fig)


def write_view(ckpts, num, device, out, tokenizers=(), data=None):
    """Draws the view of one or several (tokenizer, AR prior) pairs on the same validation images.

    ckpts: paths of ar.pt files;  out: the PNG, numbers go to the JSON beside it;  returns: the numbers
    """
    views, numbers, images = [], [], None
    for i, path in enumerate(ckpts):
        prior, ckpt = load_model(path, ("ar",), device)
        given = tokenizers[i] if tokenizers else None
        tokenizer, tokenizer_ckpt = load_tokenizer_of(path, ckpt, given, device)
        if images is None:
            config = dict(ckpt["config"], **({"data": data, "val": data} if data else {}))
            images = load_data(config)[1]
            if num > len(images):
                raise UserError(f"--num {num}, but there are only {len(images)} images")
        if images.image_size != ckpt["config"]["image_size"]:
            size = ckpt["config"]["image_size"]
            raise UserError(f"{path} is for {size}-pixel images, {ckpts[0]} for others")
        x = to_float(torch.stack([images.view(j) for j in range(num)]), device)
        labels = None
        if prior.config.num_classes:
            if images.class_names != ckpt["class_names"]:
                raise UserError(f"the classes of the images are not those that {path} was trained on")
            labels = torch.tensor([images.label(j) for j in range(num)], device=device)
        views.append(teacher_forced_view(tokenizer, prior, x, labels))
        numbers.append(dict(
            ckpt=str(path), tokenizer_hash=ckpt["tokenizer_hash"], tokenizer_stage=tokenizer_ckpt["stage"],
            num_images=num, alpha=ckpt["config"]["phase1"]["alpha"],
            note=ckpt["note"] or tokenizer_ckpt["note"],
            **view_numbers(x, views[-1]),
        ))
    names = [f"{Path(path).parent.name} (α = {n['alpha']:g})" for path, n in zip(ckpts, numbers, strict=True)]
    rows, note = min(num, 8), next((n["note"] for n in numbers if n["note"]), "")
    if rank() == 0:
        draw_view(x[:rows], [{k: v[:rows] for k, v in view.items()} for view in views], names, out, note)
        text = json.dumps(numbers, indent=1) + "\n"
        save_atomic(lambda p: p.write_text(text), Path(out).with_suffix(".json"))
    return numbers


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
def evaluate_judge(run, step, vgg, limit=5000):
    """Share of validation images that the judge in training classifies rightly."""
    vgg.eval()
    right = total = 0
    for indices, x in val_batches(run, limit):
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        with run.autocast:
            right += (vgg(normalize_images(x)).argmax(1) == labels).sum().item()
        total += len(labels)
    run.log("vgg", step, val_accuracy=ratio(run, [right, total])[0])


@torch.no_grad()
def evaluate_tokenizer(run, stage, step, tokenizer, limit=1000):
    """PSNR, L1 and hard codebook usage on validation images; a sheet of inputs above reconstructions."""
    tokenizer.eval()
    sums, counts = [0.0, 0.0, 0], torch.zeros(tokenizer.codebook_size, device=run.device)
    for _, x in val_batches(run, limit):
        with run.autocast:
            tokens = tokenizer.encode(x)
            x_hat = tokenizer.decode(tokens).float()
        counts += tokens.flatten().bincount(minlength=tokenizer.codebook_size)
        values = psnr(x, x_hat).sum().item(), (x - x_hat).abs().mean((1, 2, 3)).sum().item(), len(x)
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    val_psnr, val_l1 = ratio(run, sums)
    usage, perplexity = codebook_usage(all_reduce_mean(counts))
    run.log(stage, step, val_psnr=val_psnr, val_l1=val_l1, usage=usage, perplexity=perplexity)
    x = torch.stack([run.val.view(i) for i in range(min(10, len(run.val)))])
    with run.autocast:
        x_hat = to_uint8(tokenizer.decode(tokenizer.encode(to_float(x, run.device))))
    run.sheet(f"reconstructions_{stage}", torch.cat([x, x_hat]), len(x))


@torch.no_grad()
def evaluate_prior(run, stage, step, prior, tokenizer, codes, unigram, limit=1000, batch=100):
    """Nats per token and top-1 accuracy on validation codes, beside ln K and the unigram entropy; samples.

    NAR is measured at mask ratios that the seed fixes, the same at every call.
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
            logits = prior(inputs, labels)
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


def early_warnings(rows, stage, c):
    """Signs of a run that goes wrong, with cause and remedy: {name: message}.

    rows: the lines of metrics.jsonl of this stage so far, oldest first;  c: its section of the preset
    """
    found, last = {}, {}
    for name in ("usage", "loss_disc", "val_loss", "loss_per", "loss_rec", "adaptive_weight"):
        last[name] = [row[name] for row in rows if row.get(name) is not None]
    usage, disc, val, per, rec, adaptive = last.values()
    if usage and usage[-1] < 0.8 * max(usage):
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
    sums, counts, changed, total = {}, torch.zeros(first.codebook_size), 0, len(run.val)
    for start in tqdm(range(0, total, 50), "reconstructing", disable=None if rank() == 0 else True):
        indices = range(start, min(start + 50, total))
        x = to_float(torch.stack([run.val.view(i) for i in indices]), run.device)
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        tokens = first.encode(x)
        changed += (tokens != second.encode(x)).sum().item()
        counts += tokens.cpu().flatten().bincount(minlength=first.codebook_size)
        values = {"judge_accuracy": hits(run, x, labels)}
        for name, tokenizer in (("phase1", first), ("phase2", second)):
            x_hat = tokenizer.decode(tokens)
            values[f"psnr_{name}"] = psnr(x, x_hat)
            values[f"lpips_like_{name}"] = lpips_like(run.judge, x, x_hat)
            values[f"recon_class_accuracy_{name}"] = hits(run, x_hat, labels)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
    usage, perplexity = codebook_usage(counts)
    means = {name: value / total for name, value in sums.items()}
    return dict(usage=usage, perplexity=perplexity, phase2_tokens_changed=changed, **means)


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
    x = torch.stack([run.val.view(i) for i in range(10)])
    tokens = first.encode(to_float(x, run.device))
    run.sheet("phases", torch.cat([x, *(to_uint8(t.decode(tokens)) for t in (first, second))]), 10)
    view = write_view([run.out / "ar.pt"], min(64, len(run.val)), run.device, run.out / "view.png")
    summary["view"] = view[0]
    files = [run.out / f"{stage}.pt" for stage in ("vgg", "phase1", "phase2", "ar", "nar")]
    seconds = {path.stem: round(load_seconds(path)) for path in files if path.exists()}
    summary |= dict(
        latent_hash=latent_hash(second), alpha=run.config["phase1"]["alpha"], note=run.note,
        seconds_by_stage=seconds, seconds=sum(seconds.values()),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        threads=torch.get_num_threads(), torch=torch.__version__, command=" ".join(["python", *sys.argv]),
    )
    summary = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in summary.items()}
    if rank() == 0:
        save_atomic(lambda p: p.write_text(json.dumps(summary, indent=1) + "\n"), run.out / "summary.json")
    for name, value in summary.items():
        print0(f"  {name:28s} {value:.4g}" if isinstance(value, float) else f"  {name:28s} {value}")
    print0(f"pictures: {run.out}/phases.png, samples_ar.png, samples_nar.png, view.png")


def load_seconds(path):
    return torch.load(path, weights_only=True, mmap=True)["seconds"]


# ----------------------------------------------------------------------------------------------------------
# train.py --explain
# ----------------------------------------------------------------------------------------------------------


def explain(config, processes=8):
    """Prints modules, sizes and recipe of a preset; all networks are on the meta device, nothing runs."""

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

    sizes = dict(image_size=config["image_size"], **config["tokenizer"])
    disc = dict(config["discriminator"])
    kind = disc.pop("kind")
    with torch.device("meta"):
        judge = config["judge"]
        own = (judge["width"], 10, judge["hidden"], True) if config["vgg"] == "judge" else ()
        vgg = build_vgg16(*own)
        first = VQTokenizer(TokenizerConfig(**sizes))
        second = VQTokenizer(TokenizerConfig(**dict(sizes, num_attention=1)))
        double = VQTokenizer(TokenizerConfig(**dict(sizes, num_attention=2)))
        deeper = VQTokenizer(TokenizerConfig(**dict(sizes, decoder_extra_blocks=2)))
        disc = PatchDiscriminator() if kind == "patch" else StyleDiscriminator(config["image_size"], **disc)
        K, N = first.codebook_size, first.grid_size**2
        prior = {n: ARPrior(PriorConfig(K, N, n, **config["prior"])) for n in (0, 1000)}
    if config["vgg"] == "judge":
        stage("vgg (10 classes assumed)", judge)
        row("judge, a narrow VGG-16", vgg, "trainable", judge)
    for name, tokenizer in (("phase1", first), ("phase2", second)):
        c, frozen = config[name], "frozen" if name == "phase2" else "trainable"
        stage(f"{name}, alpha {c['alpha']:g}", c)
        row("encoder", tokenizer.encoder, frozen, c)
        row("codebook", tokenizer.quantizer, frozen, c)
        row("decoder", tokenizer.decoder, "trainable", c)
        print(f"  {'tokenizer':30s} {count(tokenizer):>13,}")
        row("discriminator", disc, "trainable", c)
        row("VGG-16", vgg, "frozen", c)
    print(f"Table 1: +Attention x2 {count(double):,} (--set tokenizer.num_attention=2), "
          f"+Conv x2 {count(deeper):,} (--set tokenizer.decoder_extra_blocks=2)")
    for name in ("ar", "nar"):
        stage(f"{name}, {first.grid_size}^2 tokens of {first.codebook_size} codes", config[name])
        row("prior, unconditional", prior[0], "trainable", config[name])
        row("prior, 1000 classes", prior[1000], "trainable", config[name])


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def main(args):
    with one_line_errors():
        out = args.out or args.ckpt[0].parent / "view.png"
        numbers = write_view(args.ckpt, args.num, setup_device(args.device), out, args.tokenizer, args.data)
        print0(json.dumps(numbers, indent=1))
        print0(f"wrote {out}")


if __name__ == "__main__":
    main(ARGUMENTS)
