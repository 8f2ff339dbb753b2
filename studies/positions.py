"""`visualize.py positions`: which positions of an image are hard to predict?"""

import torch

from plumbing.codes import count_codes, kept_codes
from plumbing.drawing import new_figure, save_figure, writable_picture
from plumbing.processes import print0, setup_device
from visualize import load_pairs


def entropies(tokens):
    """The entropy in nats of the tokens at each position, which a prior without a context could reach:
    (B, N) or (B, N, k) -> N floats, of k sub-tokens the sums"""
    counts = [count_codes(part, int(tokens.max()) + 1) for part in tokens.split(1, 1)]
    return [torch.special.entr(count.double() / len(tokens)).sum().item() for count in counts]


def positions(args):
    """Draws for each ar.pt the mean nats of the true token given those before it, position by position."""
    default = args.ckpt[0].with_name("positions.png")
    out = writable_picture(args.out, default, ".json", *[".pdf"] * args.pdf)
    device, rows = setup_device(args.device), []
    fig = new_figure(6, 3.2)
    axis = fig.subplots()
    for i, pair in enumerate(load_pairs(args.ckpt, args.num, device, args.tokenizer, args.data)[0]):
        view, numbers = pair["view"], pair["numbers"]
        nats = view["nats"].view(*view["tokens"].shape[:2], -1).sum(2).mean(0).tolist()
        axis.plot(nats, f"C{i % 10}-", label=f"{sum(nats) / len(nats):.3f} nats on average: {pair['name']}")
        # of the few images of a view each has nearly its own token: the training tokens are counted
        codes = kept_codes(args.ckpt[i].parent, numbers["tokenizer_hash"])
        rows.append(numbers | dict(nats=nats, entropy=codes and entropies(codes["train"][0].long())))
        if codes:
            axis.plot(rows[-1]["entropy"], f"C{i % 10}:", label="entropy of the training tokens there")
    axis.set(xlabel="position in raster order", ylabel="nats a token", ylim=(0, None))
    axis.legend(fontsize=6)
    save_figure(fig, out, rows, args.pdf)
    print0(f"wrote {out} and the numbers in {out.with_suffix('.json').name}")
