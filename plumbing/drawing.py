"""Figures: matplotlib without a screen, a grid of pictures, and the numbers beside."""

import json
import os
from pathlib import Path

import torch

from plumbing.errors import UserError, one_line
from plumbing.files import save_atomic, save_text, writable
from plumbing.images import to_uint8
from plumbing.processes import rank


def new_figure(width, height):
    """A figure, sizes in inches, that is only ever written to files. MPLBACKEND, which a notebook sets for
    all that it starts, is overwritten before matplotlib reads it.

    raises: UserError if matplotlib does not load
    """
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import matplotlib.figure
    except Exception as error:  # not installed, or what its settings files make it raise
        raise UserError(f"matplotlib, which draws the figures, does not load ({one_line(error)})") from None
    matplotlib.rcParams["pdf.fonttype"] = 42
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def literal(fig):
    """Shows names as they are: "$" begins no formula, and bytes that are no UTF-8 are escaped."""
    from matplotlib.text import Text

    for text in filter(lambda text: text.get_text(), fig.findobj(Text)):  # ticks have none as yet
        text.set(text=text.get_text().encode("utf-8", "backslashreplace").decode(), parse_math=False)
    return fig


def writable_picture(given, default, *beside):
    """The place of a PNG, `given` by --out or the default, after `writable` for it and for files of its name
    with the suffixes `beside`.

    raises: UserError also if one of these is there without the PNG of --out: it belongs to something else
    """
    path = given or default
    writable(path, suffix=".png")
    for other in map(path.with_suffix, beside):
        writable(other)
        if given and other.exists() and not path.exists():
            raise UserError(f"--out {path} would overwrite {other}, which is of something else; pass another "
                            "name")
    return path


def save_figure(fig, path, numbers, pdf=False):
    """PNG (300 dpi), PDF on request, and the numbers as JSON beside it."""
    path = Path(path)
    if rank() == 0:
        literal(fig)
        save_atomic(lambda p: fig.savefig(p, format="png", dpi=300), path)
        if pdf:
            save_atomic(lambda p: fig.savefig(p, format="pdf", metadata={"CreationDate": None}),
                        path.with_suffix(".pdf"))
        text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
        save_text(text, path.with_suffix(".json"))


def draw_grid(rows, names=(), note="", cell=1.15):
    """A figure of rows of panels (title, picture, caption), `names` at the left of the rows.

    picture: (3, S, S) in [-1, 1] or uint8; a map (h, w) of bool or float in [0, 1], drawn in cividis; None
             for an empty place.
    A title is written where it differs from the one above.
    """
    columns = max(map(len, rows))
    fig = new_figure(cell * columns + 0.2 * bool(names), (cell + 0.12) * len(rows) + 0.35)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            title, picture, caption = row[j] if j < len(row) else ("", None, "")
            axis.set(xticks=[], yticks=[])
            if picture is None:
                axis.axis("off")
            elif picture.ndim == 2:
                axis.imshow(picture.cpu().float().numpy(), cmap="cividis", interpolation="nearest",
                            vmin=0, vmax=1)
            else:
                picture = picture if picture.dtype == torch.uint8 else to_uint8(picture)
                axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            if title and (i == 0 or len(rows[i - 1]) <= j or rows[i - 1][j][0] != title):
                axis.set_title(title, fontsize=6.5)
            if caption:
                axis.set_xlabel(caption, fontsize=6, labelpad=1)
            if names and j == 0:
                axis.set_ylabel(names[i], fontsize=6.5)
    if note:
        fig.supxlabel(note, fontsize=6)
    return fig
