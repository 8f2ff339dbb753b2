"""FQGAN's two pictures: what each sub-codebook holds, and a map of its codes."""

import torch

from forks.fqgan.losses import mean_cosine
from plumbing.drawing import draw_grid, new_figure
from plumbing.errors import UserError
from plumbing.images import psnr, to_float
from plumbing.models import load_model
from plumbing.slices import decode
from visualize import load_images


def load_factorized(args, device):
    """(tokenizer, checkpoint, ImageData, x, tokens (num, N, k)) of --ckpt"""
    if len(args.ckpt) > 1 or args.tokenizer:
        raise UserError(f"{args.figure} is of one --ckpt, phase1.pt or phase2.pt, and reads no --tokenizer")
    tokenizer, ckpt = load_model(args.ckpt[0], ("phase1", "phase2"), device)
    if len(tokenizer.token_shape) < 2:
        raise UserError(f"{args.ckpt[0]} has one codebook; {args.figure} is for FQGAN's tokenizers")
    images, x = load_images(ckpt["config"], args.num, args.data, args.ckpt[0])
    x = to_float(x, device)
    return tokenizer, ckpt, images, x, torch.cat([tokenizer.encode(part) for part in x.split(50)])


def figure_alone(args, device):
    """FQGAN's picture of what each sub-codebook holds: the codes of all others are zeros."""
    tokenizer, ckpt, _, x, tokens = load_factorized(args, device)
    columns = {"reconstruction": decode(tokenizer, tokens)}
    columns |= {f"sub-codebook {i} alone": tokenizer.decode_alone(tokens, i) for i in range(tokens.shape[2])}
    numbers = dict(ckpt=str(args.ckpt[0]), num_images=len(x), note=ckpt["note"],
                   psnr={name: psnr(x, images).mean().item() for name, images in columns.items()},
                   cos_between_codebooks=mean_cosine(tokenizer.code_maps(tokens)).mean().item())
    rows = [[("input", x[i], ""), *((name, images[i], "") for name, images in columns.items())]
            for i in range(min(len(x), 6))]
    return draw_grid(rows, note=ckpt["note"]), numbers


def figure_map(args, device, classes=4):
    """FQGAN's map of codes: for each image of a few classes the mean of its codes, in the two widest
    directions of each sub-codebook (PCA; the article uses t-SNE), and the variance of the class means as a
    share of that of the points: the more, the more codes tell of the class (a few images give some by
    chance)."""
    tokenizer, ckpt, images, x, tokens = load_factorized(args, device)
    if not images.class_names:
        raise UserError("fq_map needs images with classes")
    if len(x) < 2:
        raise UserError("fq_map needs at least two images: --num 2")
    labels = torch.tensor([images.label(i) for i in range(len(x))])
    found, where = labels.unique(return_inverse=True)
    fig, numbers = new_figure(3.2 * tokens.shape[2], 3.2), []
    axes = fig.subplots(1, tokens.shape[2], squeeze=False)[0]
    for i, codes in enumerate(tokenizer.code_maps(tokens)):
        points = codes.mean((2, 3)).cpu()  # (num, n_z): single codes would lie on top of each other
        points = points - points.mean(0)
        directions = torch.linalg.svd(points, full_matrices=False)[2][:2]
        means = torch.stack([points[labels == c].mean(0) for c in found])[where]  # of each point's class
        share = (means.square().sum(1).mean() / points.square().sum(1).mean()).item()
        numbers.append(dict(sub_codebook=i, num_images=len(x), ckpt=str(args.ckpt[0]), note=ckpt["note"],
                            class_share=share))
        for j, c in enumerate(found[:classes].tolist()):
            axes[i].scatter(*(points[labels == c] @ directions.T).T.numpy(), s=8, marker="osD^"[j % 4],
                            color=f"C{j}", label=images.class_names[c])
        axes[i].set(xticks=[], yticks=[])
        axes[i].set_title(f"sub-codebook {i}", fontsize=8)
    axes[0].legend(fontsize=6)
    return fig, numbers
