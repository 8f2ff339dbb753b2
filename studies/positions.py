"""`visualize.py positions`: which positions of an image are hard to predict?"""

import torch

from plumbing.codes import count_codes
from plumbing.data import images_of
from plumbing.drawing import new_figure, save_figure
from plumbing.errors import UserError
from plumbing.files import writable
from plumbing.models import load_model, load_tokenizer_of
from plumbing.processes import print0, setup_device
from plumbing.slices import reconstructions
from visualize import alpha_of


def nats_by_position(path, args, device):
    """Of one ar.pt on validation images: mean nats of the true token given those before it, at each position,
    and the entropy of the tokens at that position, which is what a prior without a context could reach."""
    prior, ckpt = load_model(path, ("ar",), device)
    tokenizer, _ = load_tokenizer_of(path, ckpt, None, device)
    data = images_of(path, ckpt["config"], args.data)[1]
    num, classes, nats, seen = min(args.num or 1000, len(data)), prior.config.num_classes, [], []
    if classes and data.class_names != ckpt["class_names"]:
        raise UserError(f"the classes of the images are not those that {path} was trained on")
    for start, _, _, tokens in reconstructions(tokenizer, data, num, 50, device):
        labels = torch.tensor([data.label(i) for i in range(start, start + len(tokens))], device=device)
        found = prior.predict(tokens, labels if classes else None)[1]
        nats.append(found.view(*tokens.shape[:2], -1).cpu())
        seen.append(tokens.view(*tokens.shape[:2], -1).cpu())
    nats, seen = torch.cat(nats), torch.cat(seen)  # (num, N, k)
    nats, parts = nats.sum(2).mean(0), []
    for codes in seen.unbind(1):
        frequency = count_codes(codes, tokenizer.codebook_size).double().view(seen.shape[2], -1)
        p = frequency / frequency.sum(1, keepdim=True)
        parts.append(-(p * p.clamp(min=1e-30).log()).sum().item())
    return dict(ckpt=str(path), num_images=num, **alpha_of(ckpt["config"]), nats=nats.tolist(), entropy=parts,
                mean=nats.mean().item(), first=nats[0].item(), last=nats[-1].item())


def positions(args):
    """Draws the curves of all --ckpt into one picture."""
    out = args.out or args.ckpt[0].with_name("positions.png")
    for suffix in (".png", ".json"):
        writable(out.with_suffix(suffix))
    device = setup_device(args.device)
    rows = [nats_by_position(path, args, device) for path in args.ckpt]
    fig = new_figure(6, 3.2)
    axis = fig.subplots()
    for i, (path, row) in enumerate(zip(args.ckpt, rows, strict=True)):
        name = path.absolute().parent.name
        axis.plot(row["nats"], f"C{i % 10}-", label=f"{name}: {row['mean']:.3f} nats on average")
        axis.plot(row["entropy"], f"C{i % 10}:", label="entropy of the tokens there")
    axis.set(xlabel="position in raster order", ylabel="nats a token", ylim=(0, None))
    axis.legend(fontsize=6)
    save_figure(fig, out, rows, args.pdf)
    print0(f"wrote {out} and the numbers in {out.with_suffix('.json').name}")
