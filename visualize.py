"""The paper's tool: what does a prior predict, seen as pictures (Sec. 3.2, Fig. 3)?

    python visualize.py view --ckpt runs/demo/ar.pt                       # one prior with its tokenizer
    python visualize.py view --ckpt runs/a/ar.pt runs/b/ar.pt --num 6     # several, on the same images

The teacher-forced view decodes the prior's top-1 prediction of every token, given the true tokens before
it, and shows it beside the reconstruction. A tokenizer whose tokens are predictable gives two alike pictures.
"""

import argparse
import json
import math
import resource
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from perceptual import LOGIT, lpips_like
from sample import (
    UserError,
    decode,
    generate_images,
    latent_hash,
    load_data,
    load_model,
    load_tokenizer_of,
    print0,
    psnr,
    rank,
    save_atomic,
    setup_device,
    to_float,
    to_uint8,
)  # fmt: skip
from tokenizer import codebook_usage


@torch.no_grad()
def teacher_forced_view(tokenizer, prior, x, labels=None):
    """s = tokens of x; one forward pass on [c, s_1..s_{N-1}]; s' = its argmax; both decoded (Sec. 3.2, Fig. 3).

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
    )  # fmt: skip


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
            panels += [
                (
                    f"{name}\nreconstruction",
                    to_uint8(view["reconstruction"][i]).permute(1, 2, 0).numpy(),
                    None,
                ),
                (f"{name}\ntop-1 prediction", to_uint8(view["prediction"][i]).permute(1, 2, 0).numpy(), None),
                (f"{name}\nhit map", hits, f"{hits.mean():.0%}"),
            ]
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
    fig.text(
        0.5, 0.005, "hit map: yellow where the prediction is the true token  " + note, ha="center", fontsize=6
    )
    fig.tight_layout(rect=(0, 0.02, 1, 1), pad=0.3)
    save_atomic(lambda p: fig.savefig(p, format="png", dpi=200), path)
    plt.close(fig)


def write_view(ckpts, num, device, out, tokenizers=(), data=None):
    """Draws the view of one or several (tokenizer, AR prior) pairs on the same validation images.

    ckpts: paths of ar.pt files;  out: the PNG, numbers go to the JSON beside it;  returns: the numbers
    """
    views, numbers, images, note = [], [], None, ""
    for i, path in enumerate(ckpts):
        prior, ckpt = load_model(path, ("ar",), device)
        tokenizer, tokenizer_ckpt = load_tokenizer_of(
            path, ckpt, tokenizers[i] if tokenizers else None, device
        )
        if images is None:
            config, note = dict(ckpt["config"], **({"data": data, "val": None} if data else {})), ckpt["note"]
            images = load_data(config)[1]
            if num > len(images):
                raise UserError(f"--num {num}, but there are only {len(images)} images")
        if images.image_size != ckpt["config"]["image_size"]:
            raise UserError(
                f"{path} is for {ckpt['config']['image_size']}-pixel images, {ckpts[0]} for others"
            )
        x = to_float(torch.stack([images.view(j) for j in range(num)]), device)
        labels = None
        if prior.config.num_classes:
            if images.class_names != ckpt["class_names"]:
                raise UserError(f"the classes of the images are not those that {path} was trained on")
            labels = torch.tensor([images.labels[j] for j in range(num)], device=device)
        views.append(teacher_forced_view(tokenizer, prior, x, labels))
        numbers.append(dict(
            ckpt=str(path), tokenizer_hash=ckpt["tokenizer_hash"], tokenizer_stage=tokenizer_ckpt["stage"],
            num_images=num, alpha=ckpt["config"]["phase1"]["alpha"], note=ckpt["note"], **view_numbers(x, views[-1]),
        ))  # fmt: skip
    names = [f"{Path(path).parent.name} (α = {n['alpha']:g})" for path, n in zip(ckpts, numbers, strict=True)]
    rows = min(num, 8)
    if rank() == 0:
        draw_view(x[:rows], [{k: v[:rows] for k, v in view.items()} for view in views], names, out, note)
        save_atomic(
            lambda p: p.write_text(json.dumps(numbers, indent=1) + "\n"), Path(out).with_suffix(".json")
        )
    return numbers


# ----------------------------------------------------------------------------------------------------------
# The summary of a run (train.py --stage all)
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_summary(run, first, second, judge):
    """Both phases on all validation images: usage, distances, and whether phase 2 moved a token."""
    sums, counts, changed, total = {}, torch.zeros(first.codebook_size), 0, len(run.val)
    for start in tqdm(range(0, total, 50), "reconstructing", disable=None if rank() == 0 else True):
        indices = range(start, min(start + 50, total))
        x = to_float(torch.stack([run.val.view(i) for i in indices]), run.device)
        labels = torch.tensor([run.val.labels[i] for i in indices], device=run.device)
        tokens = first.encode(x)
        changed += (tokens != second.encode(x)).sum().item()
        counts += tokens.cpu().flatten().bincount(minlength=first.codebook_size)
        values = {"judge_accuracy": hits(judge, x, labels)}
        for name, tokenizer in (("phase1", first), ("phase2", second)):
            x_hat = tokenizer.decode(tokens)
            values[f"psnr_{name}"] = psnr(x, x_hat)
            values[f"lpips_like_{name}"] = lpips_like(judge, x, x_hat)
            values[f"recon_class_accuracy_{name}"] = hits(judge, x_hat, labels)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
    usage, perplexity = codebook_usage(counts)
    means = {name: value / total for name, value in sums.items()}
    return dict(usage=usage, perplexity=perplexity, phase2_tokens_changed=changed, **means)


def hits(judge, x, labels):
    """1 where the judge recognises the class, else 0, (B,); nan where the judge has other classes."""
    logits = judge(x.clamp(-1, 1), [LOGIT])[LOGIT]
    return (logits.argmax(1) == labels).float()


def sample_summary(run, stage, tokenizer, judge, num):
    """Class accuracy of `num` samples as the judge sees them, nats per token, and a sheet of the first 100."""
    path = run.out / f"{stage}.pt"
    prior, ckpt = load_model(path, (stage,), run.device)
    classes = prior.config.num_classes
    labels = [i % classes for i in range(num)] if classes else None
    images = generate_images(
        prior, tokenizer, num, labels, run.config["seed"], run.config["sample"], 50, True
    )
    run.sheet(f"samples_{stage}", images[: 10 * min(classes or 10, 10)], min(classes or 10, 10))
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["stage"] == stage and "val_loss" in row][-1]
    result = {f"{stage}_nats_per_token": last["val_loss"], f"{stage}_top1": last["val_top1"],
              "unigram_entropy": last["unigram_entropy"], "ln_K": last["ln_K"]}  # fmt: skip
    if classes:
        with torch.no_grad():
            found = [hits(judge, to_float(part, run.device), torch.tensor(labels[i * 50 :][: len(part)], device=run.device))
                     for i, part in enumerate(images.split(50))]  # fmt: skip
        result[f"{stage}_class_accuracy"] = torch.cat(found).mean().item()
    return result


def summarize(run, num=1000):
    """The table that ends `--stage all`, printed and written to summary.json, with the run's pictures."""
    first, ckpt1 = load_model(run.out / "phase1.pt", ("phase1",), run.device)
    second, ckpt2 = load_model(run.out / "phase2.pt", ("phase2",), run.device)
    judge = run.judge
    summary = dict(
        preset=run.args.preset, data=str(run.config["data"]), num_samples=num, num_val=len(run.val)
    )
    summary |= tokenizer_summary(run, first, second, judge)
    summary["recon_class_accuracy"] = summary["recon_class_accuracy_phase2"]
    for stage in ("ar", "nar"):
        summary |= sample_summary(run, stage, second, judge, num)
    x = torch.stack([run.val.view(i) for i in range(10)])
    tokens = first.encode(to_float(x, run.device))
    run.sheet("phases", torch.cat([x, *(to_uint8(decode(t, tokens)) for t in (first, second))]), 10)
    view = write_view([run.out / "ar.pt"], min(64, len(run.val)), run.device, run.out / "view.png")
    summary["view"] = view[0]
    stages = [
        stage for stage in ("vgg", "phase1", "phase2", "ar", "nar") if (run.out / f"{stage}.pt").exists()
    ]
    seconds = {stage: round(load_seconds(run.out / f"{stage}.pt")) for stage in stages}
    summary |= dict(
        latent_hash=latent_hash(second), alpha=run.config["phase1"]["alpha"], note=run.note,
        seconds_by_stage=seconds, seconds=sum(seconds.values()),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        threads=torch.get_num_threads(), torch=torch.__version__, command=" ".join(["python", *sys.argv]),
    )  # fmt: skip
    if rank() == 0:
        save_atomic(lambda p: p.write_text(json.dumps(summary, indent=1) + "\n"), run.out / "summary.json")
    for name, value in summary.items():
        print0(f"  {name:28s} {value:.4g}" if isinstance(value, float) else f"  {name:28s} {value}")
    print0(f"pictures: {run.out}/phases.png, samples_ar.png, samples_nar.png, view.png")


def load_seconds(path):
    return torch.load(path, weights_only=True, mmap=True)["seconds"]


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("figure", choices=["view"], help="view: input, reconstruction, top-1 prediction and hit map (Fig. 3)")
    add("--ckpt", type=Path, nargs="+", required=True, help="one or several ar.pt")
    add("--tokenizer", type=Path, nargs="+", default=[], help="one per CKPT (default: found beside each)")
    add("--data", help="folder of images (default: the validation images of the first run)")
    add("--num", type=int, default=64, help="images for the numbers; the first 8 are drawn (default 64)")
    add("--out", type=Path, help="PNG to write, numbers go beside it as JSON (default: view.png beside CKPT)")
    add("--device", default="auto", help="cuda, cpu or auto")
    args = parser.parse_args(argv)
    try:
        if args.num < 1 or (args.tokenizer and len(args.tokenizer) != len(args.ckpt)):
            raise UserError("--num must be at least 1, and --tokenizer needs one file per --ckpt")
        out = args.out or args.ckpt[0].parent / "view.png"
        numbers = write_view(args.ckpt, args.num, setup_device(args.device), out, args.tokenizer, args.data)
        print(json.dumps(numbers, indent=1))
        print(f"wrote {out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
