"""The table that ends train.py --stage all."""

import json
import math
import sys

import torch
from tqdm import tqdm

from perceptual import LOGIT, lpips_like
from plumbing.codes import codebook_usage, count_codes
from plumbing.drawing import save_figure
from plumbing.files import header, read_metrics, save_text
from plumbing.hashes import latent_hash
from plumbing.images import psnr, to_float, to_uint8
from plumbing.models import load_model
from plumbing.processes import peak_memory, print0, rank
from plumbing.slices import generate_images
from recipes.options import STAGES
from visualize import alpha_of, load_pairs, views_grid


@torch.no_grad()
def tokenizer_summary(run, phases):
    """The phases {name: tokenizer} on all validation images: usage, distances, and whether phase 2, if there
    is one, moved a token."""
    first, sums, counts, changed, total = phases["phase1"], {}, 0, 0, len(run.val)
    for start in tqdm(range(0, total, 50), "reconstructing", disable=None if rank() == 0 else True):
        indices = range(start, min(start + 50, total))
        x = to_float(torch.stack([run.val.view(i) for i in indices]), run.device)
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        tokens = first.encode(x)
        if "phase2" in phases:
            changed += (tokens != phases["phase2"].encode(x)).sum().item()
        counts = counts + count_codes(tokens.cpu(), first.codebook_size)
        values = {"vgg_accuracy": hits(run, x, labels)}
        if hasattr(first, "numbers"):  # a fork's own
            values |= first.numbers(tokens)
        for name, tokenizer in phases.items():
            x_hat = tokenizer.decode(tokens)
            values[f"psnr_{name}"] = psnr(x, x_hat)
            values[f"lpips_like_{name}"] = lpips_like(run.vgg, x, x_hat)
            values[f"recon_class_accuracy_{name}"] = hits(run, x_hat, labels)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
    usage, perplexity = codebook_usage(counts)
    means = {name: value / total for name, value in sums.items()}
    if counts.ndim > 1:
        means["usage_of_each"] = [codebook_usage(part)[0] for part in counts]
    if "phase2" in phases:
        means = dict(phase2_tokens_changed=changed, **means)
    return dict(usage=usage, usage_tokens=total * first.token_shape[0], perplexity=perplexity, **means)


def hits(run, x, labels):
    """1 where the run's VGG recognises the class, else 0, (B,); nan where the VGG has other classes."""
    logits = run.vgg(x.clamp(-1, 1), [LOGIT])[LOGIT]
    right = (logits.argmax(1) == labels).float()
    return right if logits.shape[1] == run.train.num_classes else right * math.nan


def sample_summary(run, stage, tokenizer, num):
    """Class accuracy of `num` samples as the VGG sees them, nats per token, and a sheet."""
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
def summarize(run):
    """The table that ends `--stage all`, printed and written to summary.json, with the run's pictures.

    Each prior draws 1,000 samples, or ten for each validation image where there are few.
    """
    num = min(1000, 10 * len(run.val))
    names = [name for name in ("phase1", "phase2") if name in run.config.get("stages", STAGES)]
    phases = {name: load_model(run.out / f"{name}.pt", (name,), run.device)[0] for name in names}
    second = phases[names[-1]]
    summary = dict(
        preset=run.args.preset, data=str(run.config["data"]), num_samples=num, num_val=len(run.val))
    summary |= tokenizer_summary(run, phases)
    summary["recon_class_accuracy"] = summary[f"recon_class_accuracy_{names[-1]}"]
    for stage in ("ar", "nar"):
        summary |= sample_summary(run, stage, second, num)
    x = torch.stack([run.val.view(i) for i in range(min(10, len(run.val)))])
    tokens = phases["phase1"].encode(to_float(x, run.device))
    run.sheet("phases", torch.cat([x, *(to_uint8(t.decode(tokens)) for t in phases.values())]), len(x))
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
        save_text(json.dumps(summary, indent=1) + "\n", run.out / "summary.json")
    for name, words in summary_lines(summary):
        print0(f"  {name:28s} {words}")
    print0(f"pictures: {run.out}/phases.png, samples_ar.png, samples_nar.png, view.png")


def summary_lines(numbers, prefix=""):
    """(name, value in a few words) of the summary: floats with four digits, a dict's entries one by one.
    Maps, as the view's nats by position, are in summary.json alone."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from summary_lines(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(part, list) for part in value)):
            parts = value if isinstance(value, list) else [value]
            words = (f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts)
            yield prefix + name, ", ".join(words)
