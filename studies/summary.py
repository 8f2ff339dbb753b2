"""The table that ends train.py --stage all."""

import json
import math
import shlex
import shutil
import subprocess
import sys

import torch
from tqdm import tqdm

from perceptual import LOGIT, lpips_like
from plumbing.codes import codebook_usage, count_codes
from plumbing.drawing import save_figure
from plumbing.errors import ROOT
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
    columns = min(classes or 10, 10)
    names = [run.train.class_names[label] for label in labels[: 10 * columns]] if classes else ()
    run.sheet(f"samples_{stage}", images[: 10 * columns], columns, names=names)
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

    Each prior draws 1,000 samples, 200 with --quick, or ten for each validation image where there are few.
    """
    num = min(200 if run.args.quick else 1000, 10 * len(run.val))
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
    run.sheet("phases", torch.cat([x, *(to_uint8(t.decode(tokens)) for t in phases.values())]), len(x),
              sides=("input", "phase 1", "phase 1 + 2")[: 1 + len(phases)])
    pairs, x = load_pairs([run.out / "ar.pt"], min(64, len(run.val)), run.device)
    summary["view"] = pairs[0]["numbers"]
    save_figure(views_grid("view", pairs, x), run.out / "view.png", [summary["view"]])
    files = [run.out / f"{stage}.pt" for stage in ("vgg", "phase1", "phase2", "ar", "nar")]
    seconds = {path.stem: round(header(path)["seconds"]) for path in files if path.exists()}
    summary |= dict(
        latent_hash=latent_hash(second), **alpha_of(run.config), note=run.note,
        seconds_by_stage=seconds, seconds=sum(seconds.values()),
        peak_rss_mb=round(peak_memory()),
        threads=torch.get_num_threads(), torch=torch.__version__, commit=commit(),
        command=shlex.join(["python", *sys.argv]),
    )
    summary = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in summary.items()}
    if rank() == 0:
        save_text(json.dumps(summary, indent=1) + "\n", run.out / "summary.json")
    print0(ending(summary, run.out))


def ending(summary, folder):
    """What `--stage all` prints at its end: the numbers that say how the run went, and what to do next."""
    last = "phase2" if "psnr_phase2" in summary else "phase1"
    lines = [f"  {what:<21s}{value:<17s}{words}" for what, value, words in headline(summary)]
    lines = ["", *lines, "", f"all numbers: {folder}/summary.json; pictures: phases.png, samples_ar.png, "
             "samples_nar.png, view.png", "next:"]
    folder = shlex.quote(str(folder))
    if summary["note"]:
        lines.insert(1, f"  {summary['note']}")
    columns = ", one column per class" * ("ar_class_accuracy" in summary)
    commands = {
        f"sample.py --ckpt {folder}/ar.pt": f"a sheet{columns}",
        f"sample.py --ckpt {folder}/{last}.pt --reconstruct --num 16": "inputs, reconstructions",
        f"visualize.py view --ckpt {folder}/ar.pt": "input, reconstruction, AR prediction"}
    width = max(map(len, commands))
    lines += [f"  python {command:<{width}s}  # {words}" for command, words in commands.items()]
    return "\n".join(lines)


def headline(summary):
    """[(what, value with its unit, what that is)] of the numbers that say how a run went. What the summary
    has not, as class accuracy without classes, is left out."""
    phases = [phase for phase in ("phase1", "phase2") if f"psnr_{phase}" in summary]
    token = "sub-token" if "usage_of_each" in summary else "token"  # of several codebooks
    after = "after phase 1, 2" if len(phases) == 2 else "after phase 1"

    def of(*names, scale=1, form=".1f"):
        values = [summary.get(name) for name in names]
        return None if None in values else ", ".join(f"{scale * value:{form}}" for value in values)

    def of_phases(name, **how):
        return of(*(f"{name}_{phase}" for phase in phases), **how)

    lines = [
        ("codebook usage", of("usage", scale=100), "%",
         f"of the codes, chosen for {summary['num_val']:,} held-out images"),
        ("tokens changed", of("phase2_tokens_changed", form=","), "", "by phase 2, which trains the decoder"),
        ("PSNR", of_phases("psnr", form=".2f"), "dB", f"of reconstructions {after}; higher is better"),
        ("LPIPS-like distance", of_phases("lpips_like", form=".3f"), "",
         "of reconstructions, features of the VGG; lower is better"),
        ("class kept", of_phases("recon_class_accuracy", scale=100), "%",
         "of reconstructions, as the VGG sees them"),
        *((f"class accuracy, {stage}", of(f"{stage.lower()}_class_accuracy", scale=100), "%",
           f"of {summary['num_samples']:,} samples the VGG sees the class asked for")
          for stage in ("AR", "NAR")),
        ("AR loss", of("ar_nats_per_token", form=".3f"), "nats",
         f"a {token}; unigram entropy {of('unigram_entropy', form='.3f')}, ln K {of('ln_K', form='.3f')}"),
        ("NAR loss", of("nar_nats_per_token", form=".3f"), "nats", f"a masked {token}")]
    return [(what, f"{value} {unit}".rstrip(), words) for what, value, unit, words in lines if value]


def commit():
    """The commit of the code, with a + where files differ from it; None without git or outside of a clone."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    if not shutil.which("git"):
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)) or None
