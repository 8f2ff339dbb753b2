"""Samples of both priors, and reconstructions.

    python sample.py --ckpt runs/demo/ar.pt                              # a sheet, one column per class
    python sample.py --ckpt runs/demo/nar.pt --classes star,ring --num 16 --format files --out stars
    python sample.py --ckpt runs/demo/phase2.pt --reconstruct --num 16   # inputs above reconstructions

What is measured of them, and what redraws a part of an image, is in studies/: `python -m studies`.
Image i is a function of (seed, i) and its class only: it does not depend on how many are drawn or on the
number of processes. How a prior draws tokens is in `generate` of prior_ar.py and prior_nar.py; how they
become images, in plumbing/slices.py.
"""

if __name__ == "__main__":
    from recipes.options import begin

    ARGUMENTS = begin("sample")  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import json
import math
import os

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo

from plumbing.data import images_of
from plumbing.errors import UserError
from plumbing.files import save_atomic, save_text, sweep, writable
from plumbing.hashes import latent_hash, weights_hash
from plumbing.images import make_sheet
from plumbing.models import load_model, load_tokenizer_of
from plumbing.processes import on_rank0, one_line_errors, print0, setup_device
from plumbing.slices import gather_images, image_chunks, reconstructions
from recipes.flags import OFFERED, SAMPLER, flag


def sample_settings(args, config, prior):
    """What a prior reads of the preset's sampler (Table 10), with the flags written over it.

    raises: UserError for a flag that this prior does not read
    """
    given = {key: value for key, value in vars(args).items()
             if key in (*SAMPLER, "confidence_space") and value is not None}
    strange = [key for key in given if key not in prior.SAMPLER]
    if strange:
        raise UserError(f"{flag(strange[0])} does nothing for {type(prior).__name__}, which reads "
                        f"{', '.join(map(flag, prior.SAMPLER))}{OFFERED.get(strange[0], '')}")
    return {key: given.get(key, config["sample"].get(key, own)) for key, own in prior.SAMPLER.items()}


def choose_classes(text, names):
    """'star,3' to class indices; None to all of them; None for an unconditional prior. A name goes before a
    number, and where all names are numbers only names count.

    raises: UserError for another word, and for a class that is named twice
    """
    if not names:
        if text:
            raise UserError("--classes, but this prior is unconditional")
        return None
    chosen, numbers = [], all(name.lstrip("+-").replace(".", "", 1).isdecimal() for name in names)
    rest = ", which are the names of the classes" if numbers else f" or 0..{len(names) - 1}"
    for word in map(str.strip, text.split(",")) if text else names:
        if word not in names and (numbers or not (word.isdecimal() and int(word) < len(names))):
            raise UserError(f"--classes {word}: not one of {', '.join(names[:20])}{rest}")
        chosen.append(names.index(word) if word in names else int(word))
        if chosen.count(chosen[-1]) > 1:
            raise UserError(f"--classes {text}: class {names[chosen[-1]]} is named twice")
    return chosen


def sample(args, device):
    """Samples of an ar.pt or nar.pt, decoded by the tokenizer beside it.

    returns: chunks(done) of (start, images), what identifies them, a name for the file, the layout of a sheet
    """
    prior, ckpt = load_model(args.ckpt, ("ar", "nar"), device)
    tokenizer, decoder_ckpt = load_tokenizer_of(args.ckpt, ckpt, args.tokenizer, device)
    args.num = args.num or 80
    settings = sample_settings(args, ckpt["config"], prior)
    classes = choose_classes(args.classes, ckpt["class_names"] if prior.config.num_classes else [])
    labels = classes and [classes[i % len(classes)] for i in range(args.num)]
    info = dict(
        made_from="samples", prior=weights_hash(prior), tokenizer=ckpt["tokenizer_hash"],
        decoder=weights_hash(tokenizer), seed=args.seed, classes=classes, batch=args.batch,
        precision=args.precision, note=ckpt["note"] or decoder_ckpt["note"], **settings)
    if args.precision == "bf16":  # the weights themselves: autocast would convert them again for each token
        for parameter in (*prior.parameters(), *tokenizer.decoder.parameters()):  # not buffers
            parameter.data = parameter.data.bfloat16()
    if settings.get("nar_steps", 0) > prior.config.num_tokens:
        print0(f"note: {prior.config.num_tokens} tokens take {prior.config.num_tokens} steps at most")

    def chunks(done=None):
        return image_chunks(prior, tokenizer, args.num, labels, args.seed, settings, args.batch, True, done)

    columns = len(classes) if classes and 1 < len(classes) <= 16 else 8  # one a class, where there are few
    names = [ckpt["class_names"][label] for label in labels or ()]
    return chunks, info, f"samples_{ckpt['stage']}", dict(columns=min(args.num, columns), names=names)


def reconstruct(args, device):
    """Reconstructions of the first validation images by a phase1.pt or phase2.pt; returns as `sample`."""
    tokenizer, ckpt = load_model(args.ckpt, ("phase1", "phase2"), device)
    data = images_of(args.ckpt, ckpt["config"], args.data)[1]
    args.num = args.num or min(80, len(data))
    if args.num > len(data):
        raise UserError(f"--num {args.num}, but there are only {len(data)} images")

    def chunks(done=None):
        for start, x, x_hat, _ in reconstructions(tokenizer, data, args.num, args.batch, device, done):
            yield start, torch.stack([x, x_hat], 1) if args.format == "sheet" else x_hat

    info = dict(made_from="reconstructions", tokenizer=latent_hash(tokenizer), batch=args.batch,
                decoder=weights_hash(tokenizer), data=data.fingerprint, note=ckpt["note"])
    columns = min(8, args.num)
    sides = ["input", "reconstruction"] * math.ceil(args.num / columns)
    return chunks, info, f"reconstructions_{ckpt['stage']}", dict(columns=columns, sides=sides)


def same_folder(folder, info):
    """raises: UserError for a folder of images that holds other files, or those of another `info`"""
    note, info = folder / "info.json", json.loads(json.dumps(info))
    old = json.loads(note.read_bytes()) if note.exists() else info
    other = [key for key in info if old.get(key) != info[key]]
    if other:
        raise UserError(f"{note} tells of other weights or settings ({other[0]} differs); pass another --out")
    if folder.exists() and not note.exists() and any(p.name[0] != "." for p in folder.iterdir()):
        raise UserError(f"{folder} holds other files; pass another --out")


def write_files(chunks, info, folder, num):
    """One PNG an image. A folder that was begun with the same settings is completed; another is refused."""

    def place(i):
        return folder / f"{i:06d}.png"

    def begin():
        same_folder(folder, info)
        sweep(folder)
        save_text(json.dumps(info, indent=1) + "\n", folder / "info.json")

    on_rank0(begin)
    for start, images in chunks(done=lambda indices: all(place(i).exists() for i in indices)):
        for i, image in enumerate(images, start):
            save_atomic(lambda p, x=image: make_sheet(x[None], 1, zoom=1).save(p, "PNG"), place(i))


def write_one(chunks, info, path, layout, format):
    """All images in one sheet or npz; the PNG or the npz also holds `info` as JSON.

    layout: arguments of `make_sheet`
    """
    images, info_text, columns = gather_images(chunks()), json.dumps(info), layout["columns"]
    if images.dim() == 5:  # a row of inputs above a row of reconstructions; white fills the last rows
        filler = torch.full_like(images[:1], 255).expand(-len(images) % columns, -1, -1, -1, -1)
        images = torch.cat([images, filler])
        images = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in images.split(columns)])

    def write(temporary):
        if format == "npz":
            with open(temporary, "wb") as file:
                np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), info=info_text)
        else:
            text = PngInfo()
            text.add_text("info", info_text)
            make_sheet(images, note=info["note"], **layout).save(temporary, "PNG", pnginfo=text)

    on_rank0(lambda: save_atomic(write, path))


def main(args):
    with one_line_errors():
        device = setup_device(args.device)
        chunks, info, name, layout = (reconstruct if args.reconstruct else sample)(args, device)
        suffix = {"sheet": ".png", "npz": ".npz", "files": ""}[args.format]
        out = args.out or args.ckpt.with_name(name + suffix)
        if os.path.exists(out) and out.is_dir() != (args.format == "files"):
            raise UserError(f"--out {out} is a {'folder' if out.is_dir() else 'file'}, which --format "
                            f"{args.format} does not write")
        on_rank0(lambda: writable(out if suffix else out / "info.json", suffix=suffix or None))
        if args.format == "files":
            write_files(chunks, info, out, args.num)
        else:
            write_one(chunks, info, out, layout | dict(zoom=args.scale), args.format)
        print0(f"wrote {out}" + (f" ({info['note']})" if info["note"] else ""))


if __name__ == "__main__":
    main(ARGUMENTS)
