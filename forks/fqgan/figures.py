"""FQGAN's picture of what each sub-codebook holds."""

import torch

from forks.fqgan.losses import mean_cosine
from plumbing.drawing import draw_grid
from plumbing.errors import UserError
from plumbing.fast import in_slices
from plumbing.images import psnr, to_float
from plumbing.models import load_model
from plumbing.slices import decode
from visualize import load_images


def figure_alone(args, device):
    """Images from all codes, and from each sub-codebook with zeros for the codes of the others."""
    path = args.ckpt[0]
    if len(args.ckpt) > 1 or args.tokenizer:
        raise UserError("fq_alone is of one --ckpt, phase1.pt or phase2.pt, and reads no --tokenizer")
    tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
    if tokenizer.token_shape[1:] in ((), (1,)):
        raise UserError(f"{path} has one codebook; fq_alone is for FQGAN's tokenizers")
    x = to_float(load_images(ckpt["config"], args.num, args.data, path)[1], device)
    tokens = in_slices(tokenizer.encode, x)
    maps = tokenizer.code_maps(tokens)
    columns = {"reconstruction": decode(tokenizer, tokens)}
    for i in range(len(maps)):
        alone = [codes if j == i else torch.zeros_like(codes) for j, codes in enumerate(maps)]
        columns[f"sub-codebook {i} alone"] = in_slices(tokenizer.decoder, torch.cat(alone, 1))
    numbers = dict(ckpt=str(path), num_images=len(x), note=ckpt["note"],
                   psnr={name: psnr(x, images).mean().item() for name, images in columns.items()},
                   cos_between_codebooks=mean_cosine(maps).mean().item())
    rows = [[("input", x[i], ""), *((name, images[i], "") for name, images in columns.items())]
            for i in range(min(len(x), 6))]
    return draw_grid(rows, note=ckpt["note"], wide=args.wide), numbers
