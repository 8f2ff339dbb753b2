"""Figures: matplotlib without a screen, one style, a grid of pictures, and the numbers beside."""

import json
import os
import textwrap
from pathlib import Path

import torch

from plumbing.errors import UserError, one_line
from plumbing.files import save_atomic, save_text, writable
from plumbing.images import to_uint8
from plumbing.processes import rank

STYLE = {
    "font.size": 7, "axes.titlesize": 8, "axes.labelsize": 7, "legend.fontsize": 7, "figure.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42,
    "text.parse_math": False}  # "$" in a name begins no formula
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")  # of Okabe and Ito:
MARKERS = "osD^vPX"  # everybody tells them apart, and each has a marker of its own


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
    matplotlib.rcParams |= STYLE | {"axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def writable_picture(given, default, *beside):
    """The place of a PNG, `given` by --out or the default, after `writable` for it.

    raises: UserError also if a file of its name with a suffix of `beside` is there without the PNG of --out:
            it belongs to something else, as summary.json
    """
    path = given or default
    writable(path, suffix=".png")
    for other in map(path.with_suffix, beside):
        if given and other.exists() and not path.exists():
            raise UserError(f"--out {path} would overwrite {other}, which is of something else; pass another "
                            "name")
    return path


def save_figure(fig, path, numbers, pdf=False):
    """PNG (300 dpi), PDF on request, and the numbers as JSON beside it."""
    path = Path(path)
    if rank() == 0:
        save_atomic(lambda p: fig.savefig(p, format="png", dpi=300), path)
        if pdf:
            save_atomic(lambda p: fig.savefig(p, format="pdf", metadata={"CreationDate": None}),
                        path.with_suffix(".pdf"))
        text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
        save_text(text, path.with_suffix(".json"))


def show(axis, picture, title="", caption="", **how):
    """One panel without ticks.

    picture: (3, S, S) in [-1, 1] or uint8; a map (h, w), drawn in cividis from 0 to 1, or as `how` has it;
             None for an empty place
    returns: what a colour bar is made of
    """
    axis.set(xticks=[], yticks=[], title=title, xlabel=caption)
    axis.spines[:].set_visible(False)
    if picture is None:
        return axis.axis("off")
    if picture.ndim == 2:
        how = dict(cmap="cividis", vmin=0, vmax=1) | how
        return axis.imshow(picture.cpu().float().numpy(), interpolation="nearest", **how)
    picture = picture if picture.dtype == torch.uint8 else to_uint8(picture)
    return axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")


def draw_grid(rows, names=(), note="", cell=1.15, wide=False):
    """A figure of rows of panels (title, picture, caption), as `show` takes them, `names` at the left.

    A title is written where it differs from the one above; all but its last line once for columns that share
    it. wide: rows become columns, and titles the names of rows
    """
    if wide:
        above, names = names or [""] * len(rows), [title for title, _, _ in rows[0]]
        rows = [[(title, *panel[1:]) for title, panel in zip(above, column, strict=True)]
                for column in zip(*rows, strict=True)]
    columns = max(map(len, rows))
    gap = 0.12 if any(caption for row in rows for _, _, caption in row) else 0.02
    fig = new_figure(cell * columns + 0.2 * bool(names), (cell + gap) * len(rows) + 0.35)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    above = [""] * columns
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            title, picture, caption = row[j] if j < len(row) else ("", None, "")
            show(axis, picture, title if title != above[j] else "", caption)
            above[j] = title
            if names and j == 0:
                axis.set_ylabel(names[i])
        if i == 0:
            share_titles(axes[0])
    if note:
        fig.supxlabel(textwrap.fill(note, 20 * columns), fontsize=7)
    return fig


def share_titles(axes):
    """Of neighbouring panels whose titles begin with the same lines, the first keeps these, over all."""
    parts = [axis.get_title().rpartition("\n") for axis in axes]
    for j, (shared, _, last) in enumerate(parts):
        if shared and (j == 0 or parts[j - 1][0] != shared):
            end = next((k for k in range(j, len(parts)) if parts[k][0] != shared), len(parts))
            text = axes[j].annotate(shared, ((end - j) / 2, 1), xycoords="axes fraction", ha="center",
                                    xytext=(0, 16), textcoords="offset points", fontsize=8)
            text.set_in_layout(False)
        if shared:
            axes[j].set_title("\n" * (shared.count("\n") + 1) + last)
