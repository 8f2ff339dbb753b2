"""Hands a run on: `python -m studies export runs/demo --out DIR` (docs/handing-on.md).

    DIR/README.md                              a card: what it is, the numbers of the run, the licence
    DIR/phase2, DIR/ar, DIR/nar                config.json and model.safetensors (the averaged weights) each
    DIR/phase2/decoder.pt2                     the decoder as a program of torch.export, with --decoder

Every command takes such a folder as a checkpoint: `sample.py --ckpt DIR/ar`. In the place of a run one
checkpoint may stand, of a VGG or FID classifier too: `runs/demo/vgg.pt --out DIR --half` makes DIR what
`train.py --vgg DIR` reads.
"""

import io
import json

import torch
from torch import nn

from plumbing.errors import UserError
from plumbing.files import EXPORTED, read_checkpoint, safetensors, save_atomic, save_text, writable
from plumbing.hashes import not_finite, weights_hash
from plumbing.models import load_model
from plumbing.processes import print0
from studies.commands import moved
from studies.metrics import read_result

LICENCE = "The code is under the MIT licence. The weights come with no licence of their own: whoever hands "
LICENCE += "them on chooses one, and minds those of the data and of the weights that they were made from."


class DecoderProgram(nn.Module):
    """Tokens to images, and nothing else of a tokenizer."""

    def __init__(self, tokenizer):
        super().__init__()
        self.quantizer, self.decoder, self.decode = tokenizer.quantizer, tokenizer.decoder, tokenizer.decode

    def forward(self, tokens):  # (B, N) int64 -> (B, 3, S, S) float32
        return self.decode(tokens)


def write_model(checkpoint, folder, half=False, tokenizer_hash=None):
    """config.json and model.safetensors of one checkpoint: the averaged weights where the run kept them.

    half:           matrices and kernels are rounded to float16; vectors (norms, biases) stay as they are
    tokenizer_hash: of a prior whose tokenizer was rounded, the hash that it has now
    returns:        what config.json holds; `weights_hash` is that of the rounded weights in float32, as they
                    are when they are loaded
    raises:         UserError for a weight that is too large for float16
    """
    ckpt = read_checkpoint(checkpoint, ("vgg", "resnet", "phase1", "phase2", "ar", "nar"))
    weights = {k: v.contiguous().clone() for k, v in (ckpt["ema"] or ckpt["model"]).items()}
    about = {key: ckpt[key] for key in EXPORTED}
    rounded = [k for k, v in weights.items() if half and v.is_floating_point() and v.dim() > 1]
    weights |= {k: weights[k].half() for k in rounded}
    if bad := not_finite(weights):
        raise UserError(f"{checkpoint}: {bad[1:]} holds values too large for float16; leave --half out")
    loaded = weights | {k: weights[k].float() for k in rounded}
    if half:
        about |= dict(rounded="float16")
        if ckpt["stage"] in ("phase1", "phase2"):
            tokenizer_hash = weights_hash(loaded, skip="decoder.")
        about["tokenizer_hash"] = tokenizer_hash or ckpt["tokenizer_hash"]
    about |= dict(weights_hash=weights_hash(loaded))
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(safetensors().save(weights), folder / "model.safetensors")
    save_text(json.dumps(about, indent=1) + "\n", folder / "config.json")
    return about


def write_bytes(data, path):
    """In place of the writers of safetensors, whose files only the owner may read, and of torch.export: on a
    full disk one raises an error of its own and the other ends the process."""
    save_atomic(lambda p: p.write_bytes(data), path)


def write_decoder(checkpoint, path):
    """The decoder as a torch.export program for any number of images: `torch.export.load(path).module()`."""
    tokenizer, _ = load_model(checkpoint, ("phase1", "phase2"))
    tokenizer = tokenizer.to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, *tokenizer.token_shape, dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(DecoderProgram(tokenizer).eval(), (example,),
                                      dynamic_shapes=({0: torch.export.Dim("images")},))
    torch.export.save(program, data := io.BytesIO())
    write_bytes(data.getbuffer(), path)


def card(run, models):
    """README.md in Markdown: the numbers of summary.json and of every metrics_*.json."""
    first = next(iter(models.values()))
    fork = first["config"].get("fork")
    what = dict(vgg="A VGG for the perceptual loss", resnet="A FID classifier").get(
        first["stage"], "A tokenizer and its priors")
    title = run.stem if run.is_file() else run.absolute().name
    lines = [f"# {title}", "", f"{what}, after SeQ-GAN (arXiv 2212.03185)"
             + f", with the fork `{fork}`" * bool(fork) + ".", ""]
    lines += [f"- `{name or '.'}`: {about['stage']}, {about['step']:,} steps, weights {about['weights_hash']}"
              + (f"; {about['note']}" if about["note"] else "") for name, about in models.items()]
    if "rounded" in first:
        lines += ["", "Matrices and kernels are rounded to float16; vectors, and all once loaded, are "
                  "float32. Numbers of the run are of its weights before rounding."]
    summary = run / "summary.json"
    found = [("summary", json.loads(summary.read_text()))] if summary.exists() else []
    results = sorted(run.glob("metrics_*.json"))
    found += [(path.stem, read_result(path)["results"]) for path in results]
    for name, numbers in found:
        lines += ["", f"## {name}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value:.5g} |" for key, value in numbers.items() if isinstance(value, float)]
    data = first["config"].get("data")
    return "\n".join([*lines, "", "## Licence", "", LICENCE + f" Data: {data}.", ""])


def export(args):
    """args.run: a folder, or one checkpoint, which --out itself holds then
    raises: UserError for a folder without a tokenizer, and if --out holds something else"""
    run, out = args.run, args.out
    safetensors()
    files = {s: run / f"{s}.pt" for s in ("phase2", "phase1", "ar", "nar") if (run / f"{s}.pt").is_file()}
    if run.is_file():
        files = {"": run}
    elif not {"phase1", "phase2"} & {*files}:
        raise UserError(f"{run} holds no phase1.pt or phase2.pt; name the folder of a run, or one checkpoint")
    elif "phase2" in files:
        files.pop("phase1", None)
    first = next(iter(files))
    writable(out / "README.md")
    ours = (out / first / "config.json").is_file()  # an export, and what was made of it since
    if out.exists() and not ours and any(p.name not in files for p in out.iterdir()):
        raise UserError(f"--out {out} holds other files; name another folder")
    models = {}
    for name, path in files.items():
        seen = next(iter(models.values()), {}).get("tokenizer_hash")
        models[name] = write_model(path, out / name, args.half, seen)
    if args.decoder:
        write_decoder(out / first, out / first / "decoder.pt2")
    save_text(card(run, models), out / "README.md")
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 2**20
    print0(f"wrote {out}: {', '.join(about['stage'] for about in models.values())}, {size:.1f} MB")


if __name__ == "__main__":
    moved("export")
