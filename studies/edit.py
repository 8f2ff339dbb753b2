"""Editing an image with the masked prior: `python -m studies edit IMAGE`.

Inpainting (--box or --mask: what is redrawn), outpainting (--onto: where the image lies on the canvas), and
class editing (--classes: what the redrawn part should belong to). The NAR prior fills the redrawn positions
of the token grid; all other tokens are those of the image.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from plumbing.drawing import writable_picture
from plumbing.errors import UserError
from plumbing.files import save_atomic, save_text, writable
from plumbing.hashes import weights_hash
from plumbing.images import BadImage, load_rgb, make_sheet, to_float, to_square, to_uint8
from plumbing.models import load_model, load_tokenizer_of
from plumbing.processes import on_rank0, print0, setup_device
from plumbing.slices import decode, generate_tokens
from sample import choose_classes, same_folder, sample_settings


def centre(pixels, S):
    """(C, h, w), the short side S -> the (C, S, S) in its middle"""
    top, left = (pixels.shape[1] - S) // 2, (pixels.shape[2] - S) // 2
    return pixels[:, top : top + S, left : left + S]


def read(path, flag, alpha=False):
    try:
        return load_rgb(path, alpha=alpha)
    except BadImage as error:
        raise UserError(f"{flag} {path}: {error}") from None


def read_mask(path):
    """A PIL image, 1 where the image is redrawn: where a mask is white, or painted on a transparent layer."""
    image = read(path, "--mask", alpha=True)
    layer = image.mode == "RGBA" and image.getextrema()[3][0] < 255
    return Image.fromarray(np.array(image.getchannel("A") if layer else image.convert("L")) > 127)


def numbers(text, names, flag):
    """'1,2,3' as whole numbers.  raises: UserError that says what they are"""
    words = text.split(",")
    if len(words) != len(names) or not all(word.strip().isdecimal() for word in words):
        raise UserError(f"{flag} {text}: expected {','.join(names)}, whole numbers of pixels")
    return [int(word) for word in words]


def pixel_mask(args, size):
    """What is redrawn, in pixels of the image: (h, w) float32, 1 inside.  raises: UserError"""
    w, h = size
    mask = torch.zeros(h, w)
    if args.box:
        x, y, width, height = numbers(args.box, ("x", "y", "width", "height"), "--box")
        if width < 1 or height < 1 or x + width > w or y + height > h:
            raise UserError(f"--box {args.box} does not lie inside the image, which has {w}x{h} pixels")
        mask[y : y + height, x : x + width] = 1
    if args.mask:
        drawn = read_mask(args.mask)
        if abs(drawn.width / drawn.height / (w / h) - 1) > 0.02:
            raise UserError(f"--mask {args.mask} has {drawn.width}x{drawn.height} pixels, the image {w}x{h}: "
                            "another form; draw it over the image")
        drawn = drawn.resize(size, Image.Resampling.NEAREST)
        mask = torch.maximum(mask, torch.from_numpy(np.array(drawn)).float())
    return mask


def canvas(args, S):
    """(image (3, S, S) uint8, what is redrawn (S, S) bool), as the model sees them: the middle of the image,
    its short side scaled to S, or with --onto the image smaller and the rest of the canvas redrawn."""
    image = read(args.edit, "edit")
    mask = pixel_mask(args, image.size)
    side, x, y = S, 0, 0
    if args.onto:
        x, y, side = numbers(args.onto, ("x", "y", "side"), "--onto")
        if side < 1 or x + side > S or y + side > S:
            raise UserError(f"--onto {args.onto} does not lie on the canvas of {S}x{S} pixels")
    pixels = centre(to_square(image, side), side)
    mask = mask[None, None].contiguous()
    h, w = (max(side, round(n * side / min(image.size))) for n in mask.shape[2:])
    shrunk = F.adaptive_max_pool2d(mask, (h, w)) if h <= mask.shape[2] else F.interpolate(mask, (h, w))
    hidden = centre(shrunk[0], side)[0] > 0
    right, below = S - x - side, S - y - side
    edges = F.pad(pixels[None].float(), (x, right, y, below), mode="replicate")[0].byte()  # beyond the image
    outside = F.pad(hidden.float(), (x, right, y, below), value=1.0) > 0
    return edges, outside


def blend(x, drawn, redrawn, f):
    """`drawn` inside the redrawn cells, x beyond a border of f pixels around them, and a ramp between."""
    wide = F.max_pool2d(redrawn[None, None].float(), 2 * (f // 2) + 1, 1, f // 2)
    ramp = F.avg_pool2d(wide, 2 * (f // 2) + 1, 1, f // 2, count_include_pad=False)
    weight = torch.maximum(ramp, redrawn[None, None].float())
    return drawn * weight + x * (1 - weight)


@torch.no_grad()
def edit(args):
    """Writes one picture, rows of the input with its mask, the candidates and the composites, and a JSON; or
    with --format files all of them one by one.

    raises: UserError for another prior, an image or mask that cannot be read, a mask that hides nothing, and
            a place where the image or something else lies
    """
    device, many = setup_device(args.device), args.format == "files"
    out = args.out or args.ckpt.with_name("edit" if many else "edit.png")
    on_rank0(lambda: writable(out / "info.json") if many else writable_picture(args.out, out, ".json"))
    if any(path and path.exists() and out.exists() and path.samefile(out) for path in (args.edit, args.mask)):
        raise UserError(f"--out {out} would overwrite what is edited; pass another name")
    prior, ckpt = load_model(args.ckpt, ("nar",), device)
    tokenizer, decoder_ckpt = load_tokenizer_of(args.ckpt, ckpt, args.tokenizer, device)
    S, side, num = ckpt["config"]["image_size"], tokenizer.grid_size, args.num or 8
    f = S // side
    pixels, hidden = canvas(args, S)
    x = to_float(pixels[None], device)
    cells = F.max_pool2d(hidden[None, None].float(), f)[0, 0] > 0  # any pixel of a cell hides its token
    if not cells.any():
        raise UserError("nothing is redrawn: --box and --mask leave nothing to draw in the middle of the "
                        "image, a square of its short side, which is what counts")
    tokens = tokenizer.encode(x)  # (1, N) or (1, N, k)
    given = tokens.clone()
    given[:, cells.flatten()] = prior.mask_id
    note, names = ckpt["note"] or decoder_ckpt["note"], ckpt["class_names"]
    classes = choose_classes(args.classes, names if prior.config.num_classes else [])
    settings = sample_settings(args, ckpt["config"], prior)
    about = dict(
        image=str(args.edit), box=args.box, mask=args.mask and str(args.mask), onto=args.onto, seed=args.seed,
        classes=classes and [names[c] for c in classes], prior=weights_hash(prior), note=note,
        decoder=weights_hash(tokenizer), tokenizer=ckpt["tokenizer_hash"], **settings,
        redrawn=cells.int().tolist(), input_tokens=tokens[0].tolist())
    if many:
        on_rank0(lambda: same_folder(out, about))
    drawn, steps = [], []
    for start in range(0, num, args.batch):
        indices = range(start, min(start + args.batch, num))
        labels = classes and torch.tensor([classes[i % len(classes)] for i in indices], device=device)
        found = generate_tokens(prior, labels, args.seed, indices, settings, return_steps=True,
                                tokens=given.expand(len(indices), *given.shape[1:]))
        drawn.append(found[0])
        steps.append(found[1])
    drawn, steps = torch.cat(drawn), torch.cat(steps)
    images = to_uint8(decode(tokenizer, drawn))
    redrawn = F.interpolate(cells[None, None].float(), scale_factor=f)[0, 0] > 0
    composites = blend(pixels.float(), images.float(), redrawn, f).round().byte()
    shown = pixels.clone()
    shown[:, redrawn] = (shown[:, redrawn] // 2 + 64).byte()  # the cells that are redrawn are greyed
    info = about | dict(tokens=drawn.tolist(), steps=steps.view(num, side, side).tolist())
    words = f"redraws {int(cells.sum())} of {cells.numel()} tokens" + (f"; {note}" if note else "")
    on_rank0(lambda: write(out, many, pixels, shown, images, composites, info, words))
    print0(f"{words}: wrote {out}" + ("" if many else f" and {out.with_suffix('.json').name}"))


def write(out, many, pixels, shown, images, composites, info, words):
    text = json.dumps(info, indent=None) + "\n"
    if many:
        pictures = {"input": pixels, "masked": shown}
        pictures |= {f"candidate_{i:03d}": image for i, image in enumerate(images)}
        pictures |= {f"composite_{i:03d}": image for i, image in enumerate(composites)}
        save_text(text, out / "info.json")  # first: it is how a later call knows the folder
        for name, image in pictures.items():
            save_atomic(lambda p, x=image: make_sheet(x[None], 1, zoom=1).save(p, "PNG"), out / f"{name}.png")
        return
    rows = torch.stack([pixels, *images, shown, *composites])  # above: what is drawn; below: blended
    kinds = info["classes"] or ["drawn"]
    drawn = [f"{kinds[i % len(kinds)]} {i}" for i in range(len(images))]
    names = ["input", *drawn, "redrawn", *(f"blended {i}" for i in range(len(images)))]
    picture = make_sheet(rows, 1 + len(images), words, names=names)
    save_atomic(lambda p: picture.save(p, "PNG"), out)
    save_text(text, out.with_suffix(".json"))
