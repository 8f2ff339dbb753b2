"""`python -m studies sweep NAME=V1,V2,...`: measures over a setting of the sampler."""

import argparse
from pathlib import Path

from plumbing.drawing import MARKERS, new_figure
from plumbing.files import read_checkpoint, save_atomic, save_text, writable
from plumbing.processes import on_rank0, print0, setup_device
from studies.metrics import evaluate


def sweep(args):
    """One result for each value, a CSV of all and a plot. Values that are measured are not again."""
    device = setup_device(args.device)
    read_checkpoint(args.ckpt, ("ar", "nar"))  # a tokenizer has no sampler
    new_figure(1, 1)  # without matplotlib this ends before the first value is measured
    name, rows = args.values[0][0], []
    stem = args.out or args.ckpt.with_name(f"sweep_{args.ckpt.stem}_{name}")
    csv, png = (stem.with_name(stem.name + suffix) for suffix in (".csv", ".png"))
    on_rank0(lambda: [writable(place) for place in (stem / "1.json", csv, png)])
    for _, value in args.values:
        print0(f"\n{name} = {value}")
        out = stem / f"{value}.json"
        result = evaluate(argparse.Namespace(**{**vars(args), name: value, "out": out}), device)
        numbers = {k: v for k, v in result["results"].items() if isinstance(v, float)}
        rows.append({name: value, **numbers, "num_images": result["num_images"]})

    def write():
        text = "\n".join(",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)])
        save_text(text + "\n", csv)
        draw_sweep(rows, name, result, png)

    on_rank0(write)
    print0(f"wrote {csv} and {png}")


def draw_sweep(rows, name, result, path):
    """Fréchet distance, and beside it precision, recall and class accuracy, over a sampler setting."""
    fig = new_figure(7, 2.8)
    left, right = fig.subplots(1, 2)
    x, axis = [row[name] for row in rows], name.replace("_", " ").replace("nar steps", "decoding steps")
    left.plot(x, [row["fid" if "fid" in row else "fd"] for row in rows], "o-")
    left.set(xlabel=axis, ylabel="Fréchet distance (lower is better)")
    for key, marker in zip(("precision", "recall", "class_accuracy"), MARKERS, strict=False):
        if key in rows[0]:
            right.plot(x, [row[key] for row in rows], f"{marker}-", label=key.replace("_", " "))
    right.set(xlabel=axis, ylabel="share of images (higher is better)")
    right.legend()
    fig.suptitle(f"{result['num_images']:,} samples, features of {Path(result['extractor']).stem}")
    save_atomic(lambda p: fig.savefig(p, format="png", dpi=200), path)
