"""Single images: from any file to pixels, from pixels to floats and back, and sheets of them."""

import math
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps


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


def make_sheet(images, columns, note="", zoom=None):
    """(n, 3, S, S) uint8 to one PIL image, rows of `columns`; a note is printed below the pictures."""
    n, _, h, w = images.shape
    zoom, gap = zoom or max(1, 64 // h), 2
    h, w, rows = h * zoom, w * zoom, math.ceil(n / columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap + 14 * bool(note)), "white")
    for i, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w, h), Image.Resampling.NEAREST)
        sheet.paste(picture, (i % columns * (w + gap), i // columns * (h + gap)))
    if note:
        ImageDraw.Draw(sheet).text((2, sheet.height - 13), note, fill="black")
    return sheet
