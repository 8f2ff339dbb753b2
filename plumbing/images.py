"""Single images: from any file to pixels, from pixels to floats and back, and sheets of them."""

import math
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps


class BadImage(Exception):
    """A file that is no usable image; says why."""


def load_rgb(path, min_side=1, alpha=False):
    """Any image file as an RGB PIL image: rotated as its EXIF says, alpha over white, 16 bit scaled to 8.

    path:   of a file, or a file in memory
    alpha:  keep an alpha channel: RGBA where the file has one
    raises: BadImage if the file cannot be read, is of float type, has more pixels than Pillow's limit
            (89 million) or a side below `min_side`
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, at every visit and without the file's name
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "PNG":
                    image.verify()  # the checksums, which decoding leaves out
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise BadImage("float pixels of unknown range")
            if min(image.size) < min_side:
                raise BadImage(f"{image.width}x{image.height} pixels are too few")
            if image.mode.startswith("I"):
                pixels = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                if alpha:
                    return image
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:  # decoders raise errors of many kinds on damaged files
        reason = f"{type(error).__name__}: {error}".replace(f" {path!r}", "")  # its name or place in memory
        reason = getattr(error, "strerror", None) or reason  # of a file that is not there
        raise BadImage(reason.splitlines()[0]) from None


def to_square(image, S):
    """A PIL image, its short side scaled to S: (3, h, w) uint8."""
    scale = S / min(image.size)
    if scale != 1:
        size = [max(S, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(pixels, device):
    """(B, 3, S, S) uint8 -> float32 in [-1, 1] on the device."""
    return pixels.to(device, non_blocking=True).float().div(127.5).sub(1)


def to_uint8(x):
    """Images in [-1, 1] (values outside are clamped) to uint8 on the CPU; the inverse of `to_float`."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()


def psnr(x, x_hat):
    """Peak signal-to-noise ratio in dB of each image, (B,), rounded to 8 bits: 10 log10(255^2 / mse)."""
    error = (to_uint8(x).double() - to_uint8(x_hat).double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1e-10))


def make_sheet(images, columns, note="", zoom=None, names=(), sides=()):
    """(n, 3, S, S) uint8 to one PIL image, rows of `columns`.

    note:  a line below the pictures;  zoom: pixels are enlarged so many times (default: to 64 at least)
    names: one for each image, above it; written where a row's names are not those of the row above
    sides: one for each row, at its left
    """
    n, _, h, w = images.shape
    zoom, gap, rows = zoom or max(1, 64 // h), 2, math.ceil(n / columns)
    h, w = h * zoom, w * zoom
    font = ImageFont.load_default(max(11, w // 12))
    line, left = int(font.size) + 4, max([0, *(int(font.getlength(side)) + 6 for side in sides)])
    titles = [[*names[row * columns : (row + 1) * columns]] for row in range(rows)]
    titled = [row for row, title in enumerate(titles)
              if names and (row == 0 or title != titles[row - 1][: len(title)])]
    height = rows * (h + gap) - gap + line * (len(titled) + bool(note))
    sheet = Image.new("RGB", (left + columns * (w + gap) - gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = left + column * (w + gap), row * (h + gap) + line * sum(above <= row for above in titled)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w, h), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        if row in titled:
            fits = next(name for end in range(len(names[i]), -1, -1)
                        if font.getlength(name := names[i][:end]) <= w)
            draw.text((x + w / 2, y - line // 5), fits, fill="black", font=font, anchor="ms")
        if sides and column == 0:
            draw.text((0, y + h / 2), sides[row], fill="black", font=font, anchor="lm")
    draw.text((2, height - line // 5), note, fill="black", font=font, anchor="ls")
    return sheet
