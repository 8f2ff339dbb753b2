"""Hands a run on: `python -m studies export runs/demo --out DIR` (docs/handing-on.md).

    DIR/README.md                              a card: what it is, the numbers of the run, the licence
    DIR/phase2, DIR/ar, DIR/nar, DIR/vgg       config.json and model.safetensors (the averaged weights) each
    DIR/phase1                                 beside a phase 2 with the same encoder, of its decoder only

Every command takes such a folder as a checkpoint: `sample.py --ckpt DIR/ar`. In the place of a run one
checkpoint may stand, of a VGG or FID classifier too: `runs/demo/vgg.pt --out DIR --half` makes DIR what
`train.py --vgg DIR` reads.
"""

import json
import sys

from safetensors.torch import save

from plumbing.data import is_folder
from plumbing.errors import UserError
from plumbing.files import EXPORTED, header, read_checkpoint, save_atomic, save_text, writable
from plumbing.hashes import latent_hash, not_finite, weights_hash
from plumbing.models import load_model
from plumbing.processes import print0
from studies.metrics import read_result
from studies.rounding import rounding

STAGES = ("vgg", "resnet", "phase1", "phase2", "ar", "nar")

CARD = """# {title}

After SeQ-GAN (arXiv 2212.03185), trained on the images {data}. In a clone of the code it came with:

```python
from plumbing.models import load_model
model, checkpoint = load_model("{place}", ("{stage}",))  # a tokenizer has encode(x) and decode(tokens)
```

{models}
{numbers}

## Licence

The code is under the MIT licence. The weights come with no licence of their own: whoever hands them on
chooses one, and minds those of the data and of the weights that they were made from.
"""


def write_model(checkpoint, folder, half=False, tokenizer_hash=None, latent_of=None):
    """config.json and model.safetensors of one checkpoint: the averaged weights where the run kept them.

    half:           matrices and kernels are rounded to float16; vectors (norms, biases) stay as they are;
                    the reservoir of K-means, which only training needs, is left out
    tokenizer_hash: of a prior whose tokenizer was rounded, the hash that it has now
    latent_of:      the folder beside, whose encoder and codebook this one shares: only the decoder is written
    returns:        what config.json holds; `weights_hash` is that of the weights as they are when loaded. It
                    names no folder of images: --data does
    raises:         UserError for a weight that is too large for float16
    """
    ckpt = read_checkpoint(checkpoint, STAGES)
    weights = {k: v.contiguous().clone() for k, v in (ckpt["ema"] or ckpt["model"]).items()}
    about = {key: ckpt[key] for key in EXPORTED}
    if is_folder(ckpt["config"]["data"]):  # a place on this machine
        about["config"] = dict(ckpt["config"], data=None, val=None)
    if latent_of:
        about["latent_of"] = latent_of
        weights = {k: v for k, v in weights.items() if k.startswith("decoder.")}
    if half:
        about["rounded"] = "float16"
        weights = {k: v for k, v in weights.items() if "reservoir" not in k}
    rounded = [k for k, v in weights.items() if half and v.is_floating_point() and v.dim() > 1]
    weights |= {k: weights[k].half() for k in rounded}
    if bad := not_finite(weights):
        raise UserError(f"{checkpoint}: {bad[1:]} holds values too large for float16; leave --half out")
    about["weights_hash"] = weights_hash(weights | {k: weights[k].float() for k in rounded})
    folder.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps(about, indent=1) + "\n", folder / "config.json")  # first: it marks a folder of ours
    write_bytes(save(weights), folder / "model.safetensors")
    if half and ckpt["stage"] not in ("vgg", "resnet"):
        if ckpt["stage"] in ("phase1", "phase2"):
            tokenizer_hash = latent_hash(load_model(folder, (ckpt["stage"],))[0])
        about["tokenizer_hash"] = tokenizer_hash or ckpt["tokenizer_hash"]
        save_text(json.dumps(about, indent=1) + "\n", folder / "config.json")
    return about


def write_bytes(data, path):
    """In place of safetensors' own writer, whose files only their owner may read."""
    save_atomic(lambda p: p.write_bytes(data), path)


def same_latent(*checkpoints):
    """Whether tokenizers have one encoder and one codebook: those of a phase 1, and of its phase 2."""
    found = [read_checkpoint(path, STAGES) for path in checkpoints]
    return len({weights_hash(ckpt["ema"] or ckpt["model"], skip="decoder.") for ckpt in found}) == 1


def card(run, models, out, effect):
    """README.md in Markdown: the numbers of summary.json and of every metrics_*.json.

    effect: lines about what the rounding did, of studies/rounding.py
    """
    place, first = next(iter(models.items()))
    lines = [f"- `{name or '.'}`: {about['stage']}, {about['step']:,} steps, weights {about['weights_hash']}"
             + ", matrices rounded to float16" * ("rounded" in about)
             + (f"; {about['note']}" if about["note"] else "") for name, about in models.items()]
    summary = run / "summary.json"
    found = {"summary": json.loads(summary.read_text())} if summary.exists() else {}
    found |= {path.stem: read_result(path)["results"] for path in sorted(run.glob("metrics_*.json"))}
    numbers = ["", *effect] if effect else []
    for name, values in found.items():
        numbers += ["", f"## {name}", "", "| | |", "|---|---|"]
        numbers += [f"| {key} | {value:.5g} |" for key, value in values.items() if isinstance(value, float)]
    data = first["config"]["data"] or "of a folder"
    return CARD.format(title=out.absolute().name, data=data, stage=first["stage"], place=out / place,
                       models="\n".join(lines), numbers="\n".join(numbers))


def export(args):
    """args.run: a folder, or one checkpoint, which --out itself holds then
    raises: UserError for a folder without a tokenizer, and if --out holds something else"""
    run, out = args.run, args.out
    order = ("phase2", "phase1", "ar", "nar", "vgg")
    files = {s: run / f"{s}.pt" for s in order if (run / f"{s}.pt").is_file()}
    if run.is_file():
        files = {"": run}
    elif not {"phase1", "phase2"} & {*files}:
        raise UserError(f"{run} holds no phase1.pt or phase2.pt; name the folder of a run, or one checkpoint")
    elif {"phase1", "phase2"} <= {*files} and not same_latent(files["phase1"], files["phase2"]):
        files.pop("phase1")
    first = next(iter(files))
    writable(out / "README.md")
    if out.exists() and any(out.iterdir()) and not (out / first / "config.json").is_file():
        raise UserError(f"--out {out} holds other files; name another folder")
    for name in {*STAGES, *files}:
        there, stage = out / name / "config.json", header(files[name])["stage"] if name in files else None
        if there.is_file() and f'"stage": "{stage}"' not in there.read_text():
            raise UserError(f"--out {out} holds {name or 'a model'} of another export; name another folder")
    models, hashed = {}, None
    for name, path in files.items():
        beside = "phase2" if name == "phase1" and "phase2" in models else None
        models[name] = write_model(path, out / name, args.half, hashed, beside)
        hashed = hashed or models[name]["tokenizer_hash"]
    effect = rounding(files, {name: out / name for name in files}) if args.half else []
    save_text(card(run, models, out, effect), out / "README.md")
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 2**20
    print0(f"wrote {out}: {', '.join(about['stage'] for about in models.values())}, {size:.1f} MB")


if __name__ == "__main__":
    print("error: the command is now: python -m studies export", file=sys.stderr)
    sys.exit(2)
