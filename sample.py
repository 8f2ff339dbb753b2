"""Images in and images out: data sets, checkpoints, samples of both priors, reconstructions, metrics.

    python sample.py --ckpt runs/demo/ar.pt                              # a sheet, one column per class
    python sample.py --ckpt runs/demo/nar.pt --classes star,ring --num 16 --format files --out stars
    python sample.py --ckpt runs/demo/phase2.pt --reconstruct --num 16   # inputs above reconstructions
    python sample.py --ckpt runs/cifar10/nar.pt --metrics --num 10000    # FID, IS, KID, precision, recall

Image i is a function of (seed, i) and its class only: it does not depend on how many are drawn or on the
number of processes. train.py and visualize.py import the data sets and the loading code from here.
"""

import argparse
from pathlib import Path

from plumbing.paths import as_path, expanded
from plumbing.console import steady_output, steady_process


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("--ckpt", type=as_path, required=True, help="ar.pt or nar.pt; --reconstruct: phase1.pt or phase2.pt")
    add("--tokenizer", type=as_path, help="tokenizer that decodes (default: phase2 or phase1.pt beside CKPT)")
    add("--count", "--num", dest="num", type=int, help="number of images (default 80; --metrics: 50,000)")
    add("--classes", help="names or numbers, separated by commas (default: all, in turn)")
    add("--reconstruct", action="store_true", help="reconstruct validation images instead of sampling")
    add("--data", type=expanded, help="with --reconstruct, --metrics: folder of images (default: the run's)")
    add("--format", choices=("sheet", "files", "npz"), default="sheet", help="one picture, PNG files, or npz")
    add("--out", type=as_path, help="file or, for --format files, folder to write (default: beside CKPT)")
    add("--metrics", action="store_true", help="measure; of phase1.pt, phase2.pt the reconstructions (rFID)")
    add("--predict", action="store_true", help="with --metrics, of ar.pt: measure the teacher-forced view")
    add("--extractor", type=expanded, default="inception", help="features: 'inception' (downloaded), a file "
        "of its weights, or a resnet.pt or vgg.pt of --stage vgg")
    add("--lpips", type=expanded, default="imagenet", help="VGG-16 of LPIPS: 'imagenet' (downloaded), a .pth "
        "file or 'none'")
    add("--references", type=as_path, default=Path("runs/references"), help="cache of reference statistics")
    add("--reference", type=as_path, help="one file of that cache to compare with, without the data")
    add("--sweep", metavar="NAME=V1,V2,...", help="--metrics for each value of a sampler setting; CSV, plot")
    add("--seed", type=int, default=0, help="seed of the samples (default 0)")
    add("--temperature", type=float, help="AR: softmax temperature, 0 takes the argmax")
    add("--top-k", type=int, help="AR: only the K likeliest tokens, 0 for all")
    add("--top-p", type=float, help="AR: nucleus (Table 10)")
    add("--steps", type=int, dest="nar_steps", help="NAR: decoding steps (Table 10)")
    add("--token-temperature", type=float, help="NAR: softmax temperature of the candidates")
    add("--choice-temperature", type=float, help="NAR: noise of the choice (Table 10; decision I18)")
    add("--confidence-space", choices=("prob", "log"), help="NAR: score is the probability or its logarithm")
    add("--guidance", type=float, help="scale of classifier-free guidance; 1 is none (default: the preset's)")
    add("--batch", type=int, default=32, help="images per forward pass (default 32)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights that sample; bf16 is "
        "twice as fast (default: fp32)")
    add("--device", default="auto", help="cuda, cpu or auto")
    args = parser.parse_args(argv)
    args.values = []
    if args.sweep:
        name, _, values = args.sweep.partition("=")
        name = name.replace("-", "_").removeprefix("nar_").replace("steps", "nar_steps")
        try:
            args.values = [(name, (int if name in ("nar_steps", "top_k") else float)(v))
                           for v in values.split(",")]
        except ValueError:
            parser.error(f"--sweep {args.sweep}: expected NAME=NUMBER,NUMBER,...")
    bounds = dict(num=(1, 1e9), batch=(1, 1e6), seed=(0, 2**63 - 1), top_p=(1e-9, 1), nar_steps=(1, 1e6),
                  temperature=(0, 1e9), token_temperature=(0, 1e9), choice_temperature=(0, 1e9),
                  guidance=(0, 1e3), top_k=(0, 1e9))
    for name, (low, high) in bounds.items():
        value, flag = getattr(args, name), name.removeprefix("nar_").replace("_", "-")
        if value is not None and not low <= value <= high:  # nan is refused too
            parser.error(f"--{flag} must lie between {low:g} and {high:g}, got {value}")
    for name, value in args.values:
        low, high = bounds.get(name, (1, 0)) if name not in ("num", "batch", "seed") else (1, 0)
        if not low <= value <= high:
            parser.error(f"--sweep {args.sweep}: {name}={value} is no setting of a sampler, or out of bounds")
    if (args.values or args.predict) and not args.metrics:
        parser.error(f"--{'sweep' if args.values else 'predict'} measures: pass --metrics too")
    if args.values and args.predict:
        parser.error("--predict draws no samples, so there is no sampler to sweep")
    return args


if __name__ == "__main__":
    steady_process()
    ARGUMENTS = parse_args()  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import contextlib
import ctypes
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from perceptual import (
    ResNet, VGGTaps, build_lpips, fidelity, fold_batch_norm, load_vgg16, reference_statistics,
    register_scorer, ssim, vgg_from_state_dict,
)
from prior_ar import ARPrior, PriorConfig
from prior_nar import NARPrior
from tokenizer import TokenizerConfig, VQTokenizer, codebook_usage, count_codes


class UserError(Exception):
    """One line that names cause and remedy, no traceback. `code` is 2 where the input is wrong and nothing
    was begun, 1 where a run had to stop; what was saved before stays as it was in both cases.
    shared: all processes raise it, so that the first one speaks for them"""

    def __init__(self, message, code=2, shared=None):
        super().__init__(message)
        self.code, self.shared = code, code == 2 if shared is None else shared


class InUse(UserError):
    """Another process is at work there."""


# ----------------------------------------------------------------------------------------------------------
# Processes and seeds
# ----------------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words):
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def on_rank0(action):
    """What `action()` returns in the first process, in every process; so is the UserError that it raises."""
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except (UserError, OSError) as caught:
            error = (str(caught), getattr(caught, "code", 1), True)
    if world() > 1:
        outcome = [(result, error)]
        dist.broadcast_object_list(outcome)
        result, error = outcome[0]
    if error:
        raise UserError(*error)
    return result


def launched():
    """(rank, local rank, processes) as torchrun tells them; (0, 0, 1) without it.

    WORLD_SIZE decides: a RANK or LOCAL_RANK that another tool left behind means nothing without it.
    raises: UserError where the variables fit no launch
    """
    given, names = os.environ, ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    alone = "MASTER_ADDR" not in given and given.get("WORLD_SIZE", "1") == "1"
    if "WORLD_SIZE" not in given or alone:
        return 0, 0, 1
    found = {name: given.get(name, "0" if name == "LOCAL_RANK" else "") for name in names}
    wrong = [f"{name}={value}" for name, value in found.items() if not re.fullmatch("[0-9]+", value)]
    wrong += [] if given.get("MASTER_ADDR") else ["MASTER_ADDR="]
    if not wrong and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        wrong = [f"RANK={found['RANK']} of WORLD_SIZE={found['WORLD_SIZE']}"]
    if wrong:
        raise UserError(f"the environment has WORLD_SIZE={found['WORLD_SIZE']}, as torchrun sets it, but "
                        f"{', '.join(wrong)}; start with torchrun, or for one process: unset WORLD_SIZE RANK")
    return int(found["RANK"]), int(found["LOCAL_RANK"]), int(found["WORLD_SIZE"])


def speaks():
    """Whether this process prints what all would: the first one, before there is a process group too."""
    try:
        return launched()[0] == 0
    except UserError:
        return True


def pyplot():
    """matplotlib.pyplot, drawing to files. MPLBACKEND, which a notebook sets to a backend of its own for all
    that it starts, is overwritten before matplotlib reads it.

    raises: UserError if matplotlib does not load
    """
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import matplotlib

        matplotlib.use("Agg")  # where it was imported before
        from matplotlib import pyplot
    except Exception as error:  # not installed, or what its settings files make it raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"matplotlib, which draws the figures, does not load ({reason})") from None
    return pyplot


def fetched(load):
    """What `load()` gives, first in one process alone, which downloads what is missing."""
    if world() > 1:
        on_rank0(lambda: load() and None)
    return load()


def agreed(request):
    """The largest of all processes' requests, an int. One small all-reduce, on the CPU even beside NCCL."""
    if world() == 1:
        return request
    request = torch.tensor(request)
    dist.all_reduce(request, dist.ReduceOp.MAX)
    return request.item()


@contextlib.contextmanager
def one_line_errors():
    """Around each command: what is wrong ends with one line, and all processes leave together."""
    with steady_output():
        try:
            yield
            barrier()
        except torch.OutOfMemoryError:
            print("error: out of GPU memory; pass a smaller --batch (visualize.py: --num)", file=sys.stderr)
            sys.exit(1)
        except (UserError, OSError) as error:
            if speaks() or not getattr(error, "shared", False):
                print(f"error: {error}", file=sys.stderr)
            sys.exit(getattr(error, "code", 1))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def setup_device(name, timeout=1800):
    """Opens the process group under torchrun (NCCL on GPUs, gloo on CPUs) and returns the device.

    timeout: seconds after which processes that wait for a dead or hung one give up
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device must be cuda, cpu or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu or --device auto")
    _, local_rank, _ = launched()
    if {"RANK", "LOCAL_RANK"} & os.environ.keys() and "WORLD_SIZE" not in os.environ:
        warn("RANK or LOCAL_RANK is set without WORLD_SIZE, so neither is heeded: this is the only process")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"more processes than the {torch.cuda.device_count()} visible GPUs; lower --nproc_per_node")
    device = torch.device(name, local_rank) if name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.deterministic = True
    else:
        keep_freed_memory()
    if {"WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() and not dist.is_initialized():
        # After a restart (torchrun --max-restarts) the store still holds the addresses of the dead workers:
        # every attempt gets a prefix of its own (pytorch issue 135712).
        store, number, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=number,
            world_size=size, timeout=datetime.timedelta(seconds=timeout))
    return device


def peak_memory():
    """The most memory that this process held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but in bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def keep_freed_memory():
    """Tells glibc to keep freed memory for the next tensor, on a CPU. By default it returns each large one to
    the kernel, and the page faults of the next cost more than the arithmetic of an activation: a training
    step takes 1.3 times as long. The variable MALLOC_TRIM_THRESHOLD_ in the environment switches this off."""
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back nothing below 2 GiB


def mix(*parts):
    """A 63-bit seed from any numbers and strings, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_rand(*shape, seed):
    """Uniform float32 numbers in [0, 1) that depend on the seed only."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def my_rows(batch):
    """This process's contiguous rows of the global batch. Contiguous, so that groups of four images (the
    discriminator's minibatch statistics) are the same for every number of processes."""
    share = batch // world()
    return slice(rank() * share, (rank() + 1) * share)


# ----------------------------------------------------------------------------------------------------------
# Data: an item is addressed by its position in the endless stream of training images
# ----------------------------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class BadImage(Exception):
    """A file that is no usable image; says why."""


@contextlib.contextmanager
def quiet_decoders():
    """Around a decoder: no warnings and log lines, which odd metadata brings at every visit and without the
    name of the file. Errors are raised, and so is the warning of Pillow's limit on pixels."""
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        logger.setLevel(level)


def load_rgb(path, min_side=1):
    """Any image file as an RGB PIL image: rotated as its EXIF says, alpha over white, 16 bit scaled to 8.

    raises: BadImage if the file cannot be read, is of float type, has more pixels than Pillow's limit
            (89 million) or a side below `min_side`
    """
    try:
        with quiet_decoders():
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
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:  # decoders raise errors of many kinds on damaged files
        raise BadImage(f"{type(error).__name__}: {error}".splitlines()[0]) from None


class ImageData(Dataset):
    """Images of one split with their labels. Sub-classes give `__len__`, `labels`, `name` and `render`.

    class_names: [] where the images carry no labels.
    An image that cannot be read is replaced by the next one that can, wherever it is asked for: order and
    crops of all others stay as they are. `bad_list` is the file that names the bad ones, or None.
    """

    def __init__(self, image_size, seed, class_names):
        self.image_size, self.seed, self.class_names = image_size, seed, class_names
        self.epoch, self.order, self.cache, self.replaced, self.bad_list = None, None, {}, {}, None

    @property
    def num_classes(self):
        return len(self.class_names)

    def readable(self, index):
        """The index itself, or that of the image which stands in for it; known once it was rendered."""
        while index in self.replaced:
            index = self.replaced[index]
        return index

    def label(self, index):
        """The label of what `pixels(index)` and `view(index)` gave."""
        return self.labels[self.readable(index)]

    def pixels(self, index):
        """(3, h, w) uint8 with short side `image_size`; small sets stay in memory after their first use."""
        pixels = None
        while pixels is None:
            index = self.readable(index)
            if index in self.cache:
                return self.cache[index]
            try:
                pixels = self.render(index)
            except BadImage as error:
                self.replace(index, error)
        if len(self) * pixels.numel() <= 2**30:
            self.cache[index] = pixels
        return pixels

    def replace(self, index, error):
        """Notes a bad image, and puts the next one in its place unless too many are bad."""
        self.replaced[index] = (index + 1) % len(self)
        line = f"{self.name(index)}\t{error}".replace("\n", " ") + "\n"
        if self.bad_list is None or not (self.bad_list.exists() and line in self.bad_list.read_text()):
            warn(f"{self.name(index)} cannot be read ({error}); the next image takes its place")
            if self.bad_list is not None:
                with open(self.bad_list, "a") as file:
                    file.write(line)
        if len(self.replaced) > min(max(10, len(self) // 20), len(self) - 1):
            raise UserError(f"{len(self.replaced)} of {len(self)} images cannot be read, the last one "
                            f"{self.name(index)} ({error}); is the data folder still there?", code=1)

    def view(self, index, crop_seed=None, flip=False):
        """One square crop: (3, S, S) uint8, at random with a `crop_seed`, else central."""
        pixels, S = self.pixels(index), self.image_size
        h, w = pixels.shape[1:]
        top, left = (h - S) // 2, (w - S) // 2
        if crop_seed is not None and (h, w) != (S, S):
            dice = random.Random(crop_seed)
            top, left = dice.randint(0, h - S), dice.randint(0, w - S)
        crop = pixels[:, top : top + S, left : left + S]
        return crop.flip(2) if flip else crop

    def shuffled(self, position):
        """Position in the endless stream of training images -> index; every epoch has its own permutation."""
        epoch, i = divmod(position, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator)
        return int(self.order[i])

    def __getitem__(self, position):
        seed = mix(self.seed, "crop", position)
        index = self.shuffled(position)
        return self.view(index, seed, flip=seed % 2 == 1), self.label(index)


def to_square(image, S):
    """A PIL image, its short side scaled to S: (3, h, w) uint8."""
    scale = S / min(image.size)
    if scale != 1:
        size = [max(S, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class FolderData(ImageData):
    """A folder of images: sub-folders are classes; without sub-folders there are no labels."""

    def __init__(self, files, class_names, image_size, seed):
        super().__init__(image_size, seed, class_names)
        self.files = files
        number = {name: label for label, name in enumerate(class_names)}
        self.labels = [number[path.rsplit(os.sep, 2)[1]] if class_names else 0 for path in files]

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files[index]

    def render(self, index):  # far too small images would be blown up to a blur
        return to_square(load_rgb(self.files[index], min_side=self.image_size / 4), self.image_size)

    @functools.cached_property
    def fingerprint(self):
        """Changes when a file is added, removed, renamed or of another size, and not when the whole folder is
        moved, renamed or copied. [number of images, hash]"""
        digest = hashlib.sha256()
        for path in self.files:
            with contextlib.suppress(OSError):  # a dangling link has no size
                name = os.sep.join(path.rsplit(os.sep, 2)[1 if self.class_names else 2 :])
                digest.update(f"{name} {os.stat(path).st_size}\n".encode(errors="surrogateescape"))
        return [len(self), digest.hexdigest()[:16]]


class Cifar10(ImageData):
    """CIFAR-10 through torchvision, downloaded to ~/.cache where there is a network.

    limit: keep that many images, drawn by the seed; None keeps all
    """

    def __init__(self, train, image_size, seed, limit=None):
        from torchvision.datasets import CIFAR10 as TorchvisionCifar10

        def fetch():
            try:
                TorchvisionCifar10(folder, download=True)
            except Exception as error:  # torchvision raises what the network raises
                raise UserError(f"CIFAR-10 could not be downloaded ({type(error).__name__}); unpack it to a "
                                "folder per class and pass --data FOLDER") from None

        folder = Path.home() / ".cache" / "cifar10"
        on_rank0(fetch)
        data = TorchvisionCifar10(folder, train=train)
        super().__init__(image_size, seed, data.classes)
        self.images, self.labels = data.data, data.targets
        if limit and limit < len(data):
            chosen = random.Random(mix(seed, "limit")).sample(range(len(data)), limit)
            self.images, self.labels = self.images[chosen], [self.labels[i] for i in chosen]
        self.fingerprint = [len(self), "cifar10"]

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"cifar10 image {index}"

    def render(self, index):
        return to_square(Image.fromarray(self.images[index]), self.image_size)


class Shapes(ImageData):
    """Procedural images, a function of (split, index): ten classes of structure under free detail.

    Structure is what, where, how large and which orientation; detail is colours, fine texture and lighting.
    Both come from generators of their own, so that one can be redrawn while the other stays
    (`detail_seed`). Any resolution; values and factors are the same at each. `seed` orders and flips them.
    """

    NAMES = ["disk", "ring", "square", "triangle", "cross", "star", "bar", "crescent", "pair", "hourglass"]

    def __init__(self, split, size, image_size, seed=0, detail_seed=0):
        super().__init__(image_size, seed, self.NAMES)
        self.split, self.size, self.detail_seed = split, size, detail_seed
        self.labels, self.fingerprint = [i % 10 for i in range(size)], [size, f"shapes{seed or ''}"]

    def __len__(self):
        return self.size

    def name(self, index):
        return f"{self.split} shape {index}"

    def factors(self, index):
        """All factors of one image: floats and tuples. Lengths in half image sides, angles in radians."""
        key = (0, self.split, index)
        s, d = random.Random(mix("structure", *key)), random.Random(mix("detail", *key, self.detail_seed))
        radius = s.uniform(0.6, 0.85)
        dark, bright = [tuple(d.uniform(*span) for _ in range(3)) for span in ((0.0, 0.45), (0.55, 1.0))]
        swap = d.random() < 0.5
        return dict(
            label=index % 10, radius=radius, angle=s.uniform(-0.4, 0.4),
            x=s.uniform(radius - 1, 1 - radius), y=s.uniform(radius - 1, 1 - radius),
            foreground=bright if swap else dark, background=dark if swap else bright,
            texture=d.choice(("plain", "stripes", "checks")), frequency=d.uniform(4, 8),
            phase=d.uniform(0, 2 * math.pi),
            texture_angle=d.uniform(0, math.pi), texture_strength=d.uniform(0.03, 0.12),
            light_angle=d.uniform(0, 2 * math.pi), light_strength=d.uniform(0, 0.2),
        )

    def mask(self, index):
        """Coverage of each pixel by the shape: (S, S) float32 in [0, 1]."""
        f, (x, y) = self.factors(index), self._grid()
        x, y = (x - f["x"]) / f["radius"], (y - f["y"]) / f["radius"]
        c, s = math.cos(f["angle"]), math.sin(f["angle"])
        distance = shape_distance(f["label"], c * x + s * y, c * y - s * x) * f["radius"]
        return (0.5 - distance * self.image_size / 2 / 1.5).clamp(0, 1)  # an edge 1.5 pixels wide

    def render(self, index):
        f, (x, y) = self.factors(index), self._grid()
        foreground, background = (torch.tensor(f[k])[:, None, None] for k in ("foreground", "background"))
        image = background + (foreground - background) * self.mask(index)
        if f["texture"] != "plain":
            c, s = math.cos(f["texture_angle"]), math.sin(f["texture_angle"])
            wave = torch.sin(f["frequency"] * math.pi * (c * x + s * y) + f["phase"])
            if f["texture"] == "checks":
                wave = wave * torch.sin(f["frequency"] * math.pi * (c * y - s * x))
            image = image + f["texture_strength"] * wave
        light = math.cos(f["light_angle"]) * x + math.sin(f["light_angle"]) * y
        image = image * (1 + f["light_strength"] * light)
        return (image.clamp(0, 1) * 255).round().byte()

    def _grid(self):
        axis = (torch.arange(self.image_size) + 0.5) / self.image_size * 2 - 1
        return axis[None, :], axis[:, None]  # x runs to the right, y downwards


def shape_distance(label, u, v):
    """About the signed distance to shape `label` of radius 1 at the origin, negative inside."""
    a, b, r = u.abs(), v.abs(), torch.hypot(u, v)
    angle = torch.atan2(v, u)
    if label == 0:  # disk
        return r - 0.9
    if label == 1:  # ring
        return (r - 0.75).abs() - 0.2
    if label == 2:  # square
        return torch.maximum(a, b) - 0.75
    if label == 3:  # triangle
        return torch.maximum(-v - 0.5, torch.maximum(0.87 * u + 0.5 * v, -0.87 * u + 0.5 * v) - 0.5)
    if label == 4:  # cross
        arms = torch.minimum(torch.maximum(a, b - 0.7), torch.maximum(b, a - 0.7))
        return arms - 0.27
    if label == 5:  # star with five points
        wedge = (angle * 5 / (2 * math.pi) % 1 - 0.5).abs() * 2  # 1 at a point, 0 between two points
        return (r - (0.38 + 0.65 * wedge**2)) * 0.7
    if label == 6:  # bar
        return torch.maximum(a - 1, b - 0.25)
    if label == 7:  # crescent
        return torch.maximum(r - 0.95, 0.75 - torch.hypot(u - 0.5, v))
    if label == 8:  # pair of disks
        return torch.hypot(a - 0.55, v) - 0.4
    return torch.maximum(b - 0.85, a - 0.85 * b - 0.05)  # hourglass


def images_in(folder):
    """Paths of the images in a folder, sorted: strings, as a million Path objects take ten times as long."""
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries
                      if e.name.lower().endswith(EXTENSIONS) and not e.name.startswith(".") and is_file(e))


def is_file(entry):
    with contextlib.suppress(OSError):  # links in a circle
        return entry.is_file()


SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
ABOUT = "(images?|imgs?|pictures|data|set|split)?"


def split_of(name):
    """The split that a folder is named after ("test" of "Images_test2017"), or None."""
    found = re.fullmatch(rf"{ABOUT}[\W_]*({'|'.join(SPLITS)})[\W_]*{ABOUT}[\W_]*\d*", name, re.I)
    return found and found[2].lower()


def refuse_splits(folder, flag, classes):
    """A folder whose sub-folders are the splits of a data set would make each split a class.

    classes: {sub-folder: its images};  raises: UserError if all that hold images, or else hold folders of
    images while none lie beside them, are named after splits
    """
    splits = [p for p in classes if split_of(p.name) and any(p.iterdir())]
    splits.sort(key=lambda p: SPLITS.index(split_of(p.name)))
    flat = [p for p, found in classes.items() if found]
    deeper = not flat and not images_in(folder) and any(
        images_in(below) for p in splits for below in p.iterdir() if below.is_dir())
    if not splits or not (deeper or flat and all(p in splits for p in flat)):
        return
    train = [p for p in splits if split_of(p.name).startswith("train")]
    other = [p for p in splits if p not in train]
    remedy = f"--data {(train or other)[0]}"
    if flag == "--val":
        remedy = f"--val {(other or train)[0]}"
    elif train and other:
        remedy += f" --val {other[0]} (sample.py, visualize.py: --data {other[0]})"
    raise UserError(f"the sub-folders of {flag} {folder} are splits of a data set and no classes "
                    f"({', '.join(p.name for p in splits)}); pass {remedy}")


def scan_folder(folder, flag="--data"):
    """(paths, class names) of a folder of images, sorted; hidden files and folders are left out."""
    folder = as_path(folder)
    if not folder.exists():
        raise UserError(f"{flag} {folder} does not exist. Try --data shapes (built in) or another folder")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file; unpack it first and pass the folder")
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
        classes = {p: images_in(p) for p in inside}
        files = [path for found in classes.values() for path in found] or images_in(folder)
        refuse_splits(folder, flag, classes)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error}") from None
    if not files:
        raise UserError(f"no images under {folder} (looked for {' '.join(EXTENSIONS)}, in it and one below)")
    names = [p.name for p, found in classes.items() if found]
    if names and len(names) < len(classes) and rank() == 0:
        warn(f"no images in {', '.join(p.name for p, found in classes.items() if not found)} under {folder}")
    if names and rank() == 0 and (loose := images_in(folder)):
        warn(f"{len(loose)} images beside the class folders of {folder} are left out")
    return files, names


def with_data(config, data):
    """A run's configuration with `--data` in place of its images: the train and val folders of DATA where it
    has both, else all of its images as training and as validation images. None changes nothing."""
    if data is None:
        return config
    both = all((as_path(data) / split).is_dir() for split in ("train", "val"))
    return dict(config, data=data, val=None if both else data)


def refuse_other_classes(folder, names, val, val_names):
    """raises: UserError unless validation images have labels where the training images have them, and only
    of classes that these have too"""
    for one, few, two, many in ((val, val_names, folder, names), (folder, names, val, val_names)):
        if many and not few:
            raise UserError(
                f"{one} has no class sub-folders, {two} has {len(many)}; sort the images of {one} into "
                f"folders of these names, or leave {val} out: --data {folder} (sample.py, visualize.py: "
                f"--data {val})")
    strangers = sorted(set(val_names) - set(names))
    if strangers:
        raise UserError(f"--val {val} has classes that {folder} lacks: {', '.join(strangers[:3])}")


def is_folder(source):
    """Whether `data` or `val` of a configuration names a folder, here or elsewhere."""
    return source not in (None, "shapes", "cifar10")


def images_of(path, config, data=None):
    """(train, val) of `--data`, or without it of the run that wrote the checkpoint `path`.

    raises: UserError that names the checkpoint if the folders of its run are not there
    """
    for source in (config["data"], config["val"]) if data is None else ():
        if is_folder(source) and not Path(expanded(source)).is_dir():
            raise UserError(f"the run of {path} had its images in {source}, and from {Path.cwd()} there is "
                            "no such folder; pass --data PATH")
    return load_data(with_data(config, data))


def load_data(config):
    """(train, val) ImageData of a run's configuration: 'shapes', 'cifar10' or a folder of images."""
    source, S, seed, limit = config["data"], config["image_size"], config["seed"], config["limit"]
    if source == "shapes":
        return Shapes("train", limit or 20_000, S, seed), Shapes("val", 1_000, S, seed)
    if source is None:
        raise UserError("this preset needs --data FOLDER. Without data: --preset demo")
    if source == "cifar10":
        return Cifar10(True, S, seed, limit), Cifar10(False, S, seed)
    folder, val = as_path(source), config["val"]
    if val is None and (folder / "train").is_dir() and (folder / "val").is_dir():
        folder, val = folder / "train", folder / "val"
    files, names = scan_folder(folder)
    if val is not None:
        val_files, val_names = scan_folder(val, "--val")
        refuse_other_classes(folder, names, val, val_names)
    else:
        held_out = set(random.Random(mix(0, "split")).sample(range(len(files)), max(1, len(files) // 20)))
        if len(files) == 1:
            print0(f"note: the only image of {folder} is both training and validation image")
        val_files = [path for i, path in enumerate(files) if i in held_out]
        files = [path for i, path in enumerate(files) if i not in held_out] or files
    random.Random(mix(0, "val")).shuffle(val_files)  # so that the first ones are of all classes
    if not names:
        print0(f"note: {folder} has no class sub-folders, so its images carry no labels")
    if limit and limit < len(files):
        files = random.Random(mix(seed, "limit")).sample(files, limit)
    train, val = FolderData(files, names, S, seed), FolderData(val_files, names, S, seed)
    look_at_some(train)
    return train, val


def look_at_some(data, num=20):
    """Refuses a data set if more than a quarter of `num` images, drawn by the seed, cannot be read."""
    chosen, bad = random.Random(mix(data.seed, "look")).sample(range(len(data)), min(num, len(data))), []
    for index in chosen:
        try:
            data.render(index)
        except BadImage as error:
            bad.append(f"{data.name(index)} ({error})")
    if len(bad) > len(chosen) / 4:
        raise UserError(f"{len(bad)} of {len(chosen)} images looked at cannot be read, for instance {bad[0]}")


def to_device(x, device):
    """x on the device; the host goes on at once, which needs memory that is pinned."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def to_float(pixels, device):
    """(B, 3, S, S) uint8 -> float32 in [-1, 1] on the device."""
    return pixels.to(device, non_blocking=True).float().div(127.5).sub(1)


def batches(data, batch, start, workers, timeout=0):
    """Endless (images uint8, labels) of this process's share of each global batch, from step `start` on.

    timeout: seconds to wait for a worker, 0 for ever
    Closed, or left by an exception, it ends its workers. While its frame is held, by a traceback for
    instance, only `close` does that, and the interpreter would wait for them at its end.
    """

    def positions():
        for step in range(start, 2**62):
            rows = my_rows(batch)
            yield list(range(step * batch + rows.start, step * batch + rows.stop))

    loader = DataLoader(
        data, batch_sampler=positions(), num_workers=workers, pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=ignore_signals, timeout=timeout if workers else 0,
        generator=torch.Generator())  # so that it draws nothing from the global one
    before, stream, workers = multiprocessing.active_children(), None, []
    try:
        try:
            stream = iter(loader)
        finally:  # there may be some even if not all could be started
            workers = [child for child in multiprocessing.active_children() if child not in before]
        yield from stream
    except UserError as error:  # out of a worker it comes with the worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1], code=1) from None
    finally:
        end_workers(stream, workers)


def end_workers(stream, workers):
    """Asks the workers of a loader's iterator to end, and kills those that do not, as they heed no SIGTERM.

    stream: the iterator; None if it could not be made
    """
    if workers and stream is not None:
        stream._shutdown_workers()  # what its __del__ calls: then torch takes no ended worker for a fault
    for worker in workers:
        worker.kill()
        worker.join()


STOPS = (  # signals after which a run saves and ends; those of closed terminals and schedulers are among them
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2)


def ignore_signals(worker):
    """A signal to the whole process group must not take the loader from a process that still has to save."""
    for number in (*STOPS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------
# Files: what is written appears complete or not at all, and what is read was checked
# ----------------------------------------------------------------------------------------------------------

FORMAT = 3  # of the checkpoint files; train.py writes them


def claim(folder):
    """Makes a folder and locks it. The kernel frees the lock when the returned file is closed or this process
    ends, in any way. Where the file system has no locks, a warning takes the place of the lock.

    raises: InUse, a UserError that names the process which holds it
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
        locked = lock_file(lock)
    except BlockingIOError:
        lock.seek(0)
        raise InUse(f"{folder} is in use by process {lock.read()}; wait for it, or pass another "
                    "--out") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error}") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    if locked:  # else what looks left over may be what another run writes
        sweep(folder)
    elif folder not in UNLOCKED:
        UNLOCKED.add(folder)
        warn(f"the file system of {folder} has no locks, so nothing keeps two runs in this folder apart; "
             "start one at a time")
    return lock


def writable(path, flag="--out"):
    """Tries whether a file can be made at `path`, folders above it included, and leaves nothing behind: so
    that a bad place is known before the work and not after it.

    raises: UserError if it cannot be, or if a folder is there
    """
    path, made = Path(path), None
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        there = next(p for p in path.absolute().parents if p.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is no folder")
        probe = there / f".tmp{os.getpid()}.{path.name}"
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
        made = probe
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror or error}; pass another place"
                        ) from None
    finally:
        if made:
            made.unlink()


BAD_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS,
             errno.ENAMETOOLONG, errno.ELOOP)


UNLOCKED = set()  # folders that `claim` could not lock, so that it warns of each once


def lock_file(file):
    """Whether its file system has locks; locks it then. raises: BlockingIOError if another process has it"""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, *UNSUPPORTED):
            raise
        return False
    return True


def save_atomic(write, path):
    """Calls write(temporary path) and renames the result to `path`: a stop in between loses nothing.

    raises: UserError, code 1, if it cannot be written; the old file is intact then
    """
    path = Path(path)
    temporary = path.with_name(f".tmp{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)  # the new name, too
    except OSError as error:
        room = next(shutil.disk_usage(p).free for p in path.absolute().parents if p.exists())
        told = "" if error.errno in BAD_PLACE else f"{room / 1e9:.1f} GB are free there, and "
        raise UserError(f"{path} could not be written ({error}); {told}everything saved before is intact",
                        code=1) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # a file system cannot do it


def sync_folder(folder):
    """fsync of a folder, where its file system can do that: CIFS and some of FUSE cannot."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(number)


def sweep(folder):
    """Deletes what `save_atomic` left in a folder where a process was killed."""
    for path in folder.glob(".tmp[0-9]*"):
        if path.is_file():
            path.unlink()


def save_torch(thing, path):
    """torch.save in an atomic way; its zip file carries a checksum of every part."""

    def write(temporary):
        try:
            torch.save(thing, temporary)
        except RuntimeError as error:  # what torch's writer makes of a full disk
            raise OSError(str(error).splitlines()[0]) from None

    save_atomic(write, path)


def save_checkpoint(ckpt, path):
    """Writes X.pt. From the second time on, two intact checkpoints exist at every instant: X.next.pt is
    complete before X.pt becomes X.previous.pt and leaves it its name."""
    save_torch(ckpt, path.with_suffix(".next.pt"))
    promote(path)


def promote(path):
    if path.exists():
        os.replace(path, path.with_suffix(".previous.pt"))
    os.replace(path.with_suffix(".next.pt"), path)


def intact(path):
    """Whether every checksum in a file of torch.save is right (torch.load itself checks none)."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False


def newest_intact(path):
    """The checkpoint from which a stage goes on: X.next.pt, X.pt or X.previous.pt, the newest intact one.

    Damaged ones are named in a warning and set aside. None if there is no checkpoint at all.
    raises: UserError if there are checkpoints and all are damaged
    """
    names = [path.with_suffix(".next.pt"), path, path.with_suffix(".previous.pt")]
    found = [name for name in names if name.is_file()]
    good = next((name for name in found if intact(name)), None)
    if found and not good:
        raise UserError(f"{' and '.join(map(str, found))}: damaged, and no intact checkpoint is left; move "
                        "the damaged files away to start anew")
    for name in found[: found.index(good)] if good else []:
        os.replace(name, name.with_suffix(".damaged"))
        warn(f"{name} is damaged and now called {name.with_suffix('.damaged').name}; going on from {good}")
    if good == names[0]:
        promote(path)
        return path
    return good


def read_checkpoint(path, stages):
    """The checkpoint dict in `path`, which must be of one of `stages`. Pickled code is never executed.

    Keys: format, stage, step, config (the run's preset), model_config, model (weights), ema (weights or
    None), class_names, tokenizer_hash, fingerprint (of the data), note; to go on with: train (optimizers),
    world (processes), seconds, skips (updates left out).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}" + ("; it is a folder, name a file in it" * path.is_dir()))
    try:
        if not intact(path):
            raise ValueError("wrong checksum")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        reason = "wrong checksum" if str(error) == "wrong checksum" else type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); name another one") from None
    if not isinstance(ckpt, dict) or not {"format", "stage", "model"} <= ckpt.keys():
        keys = ", ".join(map(str, list(ckpt)[:4])) if isinstance(ckpt, dict) else type(ckpt).__name__
        raise UserError(f"{path} is not a checkpoint of this project (it holds {keys})")
    if ckpt["format"] != FORMAT:
        raise UserError(f"{path} has format {ckpt['format']}, this code reads {FORMAT}; use the code of then")
    if ckpt["stage"] not in stages:
        raise UserError(f"{path} is of stage {ckpt['stage']!r}; this needs {' or '.join(stages)}")
    return ckpt


def load_model(path, stages, device="cpu"):
    """(model in eval mode, checkpoint) of any stage; averaged weights where the run kept them."""
    ckpt = read_checkpoint(path, stages)
    weights, sizes = ckpt["ema"] or ckpt["model"], ckpt["model_config"]
    if ckpt["stage"] == "vgg":
        model = VGGTaps(fold_batch_norm(vgg_from_state_dict(weights, str(path), **sizes)))
    elif ckpt["stage"] == "resnet":
        model = ResNet(**sizes)
        model.load_state_dict(weights, strict=True)
    else:
        if ckpt["stage"] in ("phase1", "phase2"):
            model = VQTokenizer(TokenizerConfig(**sizes))
        else:
            model = (ARPrior if ckpt["stage"] == "ar" else NARPrior)(PriorConfig(**sizes))
        model.load_state_dict(weights, strict=True)
    # channels_last: a quarter faster on a CPU too, as long as nothing goes backward
    return model.to(device, memory_format=torch.channels_last).eval(), ckpt


def weights_hash(*modules, skip=None):
    """16 hex digits over the names and bits of all weights, but those whose name begins with `skip`."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if skip is None or not name.startswith(skip):
                digest.update(name.encode())
                bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def latent_hash(tokenizer):
    """Hash of everything that decides the tokens of an image: all weights but the decoder's."""
    return weights_hash(tokenizer, skip="decoder.")


def load_tokenizer_of(prior_path, prior_ckpt, given=None, device="cpu"):
    """The tokenizer whose tokens a prior models: `given`, else phase2.pt or phase1.pt beside the prior."""
    beside = [Path(prior_path).with_name(f"{stage}.pt") for stage in ("phase2", "phase1")]
    path = given or next((p for p in beside if p.exists()), None)
    if path is None:
        raise UserError(f"no phase2.pt or phase1.pt beside {prior_path}; pass --tokenizer FILE")
    tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
    if latent_hash(tokenizer) != prior_ckpt["tokenizer_hash"]:
        raise UserError(
            f"{path} (hash {latent_hash(tokenizer)}) is not the tokenizer that {prior_path} was trained on "
            f"(hash {prior_ckpt['tokenizer_hash']}); pass the right one with --tokenizer")
    return tokenizer, ckpt


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


class PackedLinear(torch.nn.Module):
    """A linear layer whose bf16 weights lie in memory as oneDNN wants them. A CPU would lay them out anew for
    every token otherwise; so AR sampling takes half the time at batch 1. Inference only."""

    def __init__(self, linear, batch):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, batch)
        self.bias = linear.bias.data if linear.bias is not None else None

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(module, batch):
    """Replaces the linear layers of a bf16 network on a CPU by packed ones, where torch and the CPU can."""
    ops = torch.ops.mkldnn
    can = torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")
    if can and ops._is_mkldnn_bf16_supported():
        for name, child in module.named_children():
            linear = isinstance(child, torch.nn.Linear)
            setattr(module, name, PackedLinear(child, batch) if linear else pack_linears(child, batch))
    return module


SAMPLER = dict(  # the settings that each prior reads
    ar=("temperature", "top_k", "top_p", "guidance"),
    nar=("nar_steps", "token_temperature", "choice_temperature", "confidence_space", "guidance"))


@torch.no_grad()
def predict_tokens(prior, tokens, labels):
    """Teacher-forced (Sec. 3.2): the AR prior's top-1 prediction of each token, given the true ones before
    it, and the nats of the true one; both like tokens, (B, N) or (B, N, k)."""
    logits = prior(tokens, labels).float()  # (B, N, K) or (B, N, k, K)
    nats = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
    return logits.argmax(-1), nats.view_as(tokens)


def generate_tokens(prior, labels, seed, indices, settings):
    """Tokens (B, N) of the images `indices`, whose random numbers depend on (seed, index) only.

    labels: (B,) int64 or None;  settings: the `sample` section of a preset, or its SAMPLER part
    """
    settings = dict(guidance=1.0, top_k=0) | settings
    c, device = prior.config, next(prior.parameters()).device
    if isinstance(prior, ARPrior):
        noise = torch.stack([seeded_rand(*c.token_shape, seed=mix(seed, "sample", i)) for i in indices])
        return prior.generate(labels, noise.to(device), settings["temperature"], settings["top_k"],
                              settings["top_p"], guidance=settings["guidance"])
    steps = min(settings["nar_steps"], c.num_tokens)  # more would be rounds without a hole
    shape = (steps, c.num_codebooks + 1, c.num_tokens)
    noise = torch.stack([seeded_rand(*shape, seed=mix(seed, "sample", i)) for i in indices])
    return prior.generate(
        labels, noise.to(device), steps, settings["token_temperature"], settings["choice_temperature"],
        settings["confidence_space"], guidance=settings["guidance"])


def image_chunks(prior, tokenizer, num, labels, seed, settings, batch=32, progress=False, done=None):
    """Yields (index of the first, images (n, 3, S, S) uint8) for this process's chunks of 0..num-1.

    labels: list of `num` class indices, or None for an unconditional prior;  done(indices): skip them?
    The work is split over processes in aligned chunks of `batch`, and a last chunk is filled up and cut
    again, so that image i is bit-equal for any `num` and any number of processes. Another `batch` changes
    the rounding of the prior's matrix products; that rarely turns a token, and else nothing.
    """
    device = next(prior.parameters()).device
    starts = range(rank() * batch, num, world() * batch)
    hidden = None if progress and rank() == 0 else True
    for start in tqdm(starts, "sampling", disable=hidden, unit="images", unit_scale=batch * world()):
        indices = range(start, start + batch)
        if done and done(indices[: num - start]):
            continue
        chunk_labels = None
        if labels is not None:
            chunk_labels = torch.tensor([labels[i % num] for i in indices], device=device)
        tokens = generate_tokens(prior, chunk_labels, seed, indices, settings)
        yield start, to_uint8(decode(tokenizer, tokens[: num - start]))


def generate_images(*args, **kwargs):
    """All images of `image_chunks` (same arguments): (num, 3, S, S) uint8 on the CPU, in every process."""
    return gather_images(image_chunks(*args, **kwargs))


@torch.no_grad()
def in_slices(function, x, size=8):
    """function(x) over slices of exactly `size` rows, the last one filled up: the result for a row, to the
    last bit, then does not depend on how many rows there are."""
    filled = torch.cat([x, x[:1].expand(-len(x) % size, *x.shape[1:])])
    return torch.cat([function(part) for part in filled.split(size)])[: len(x)]


def decode(tokenizer, tokens):
    """Tokens (B, N) to images (B, 3, S, S), about [-1, 1]; raises UserError if a pixel is not finite."""
    x = in_slices(tokenizer.decode, tokens)
    if not x.isfinite().all():
        raise UserError("the decoder's images hold values that are not finite; is the tokenizer damaged, or "
                        "was it trained with too high a rate?", shared=False)
    return x


def gather_images(chunks):
    """One tensor, in every process, of the (start, images) that each process yields."""
    parts = [list(chunks)]
    if world() > 1:
        parts *= world()
        dist.all_gather_object(parts, parts[0])
    return torch.cat([images for _, images in sorted(sum(parts, []), key=lambda part: part[0])])


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


# ----------------------------------------------------------------------------------------------------------
# Metrics. A number is told together with everything that decides it: HOW it was measured, and the weights,
# sampler and seed of what was measured. Only numbers of equal HOW may stand in one column.
# ----------------------------------------------------------------------------------------------------------

PROTOCOLS = {
    "rfid-val": "reconstructions of all validation images against these images",
    "gfid-train": "samples, classes in turn, against the central crops of all training images",
    "view-val": "teacher-forced predictions of all validation images against these images",
}
HOW = ("protocol", "num_images", "image_size", "classes", "extractor_hash", "resize", "feature_layer",
       "reference", "reference_images", "reference_hash")


class Extractor:
    """A network from torch-fidelity's registry, and what identifies it.

    source: 'inception', a .pth file of its weights, or a checkpoint of `train.py --stage vgg`
    raises: UserError for a missing or foreign file, or if images are not of the size it was trained on
    """

    def __init__(self, source, image_size, device):
        self.device, self.class_names, note, path = device, None, "", Path(expanded(source))
        if path.suffix == ".pt":
            network, ckpt = load_model(path, ("vgg", "resnet"), device)
            size, self.class_names, note = ckpt["config"]["image_size"], ckpt["class_names"], ckpt["note"]
            if size != image_size:
                raise UserError(f"--extractor {path} was trained on {size}-pixel images and these have "
                                f"{image_size}; train one with --set image_size={image_size}")
            self.network, layer, resize = register_scorer(getattr(network, "vgg", network)), "pool", "none"
        else:
            self.network = fetched(lambda: load_inception(source))
            layer, resize = "2048", "tf1-bilinear-299"
        self.network.to(device)
        one = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
        self.num_features = in_slices(lambda part: self.network(part)[0], one).shape[1]
        self.info = dict(extractor=str(source), extractor_hash=weights_hash(self.network), resize=resize,
                         feature_layer=layer, extractor_note=note)

    def __call__(self, images):
        """(B, 3, S, S) uint8 -> dict of features (B, F), logits (B, C), digests (B, 8) on the CPU."""
        both = in_slices(lambda part: torch.cat(self.network(part), 1), images.to(self.device))
        features, logits = both.tensor_split([self.num_features], dim=1)
        digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in images]
        digests = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
        return dict(features=features.float().cpu(), logits=logits.float().cpu(), digests=digests)

    def check_number(self, num, what):
        """raises: UserError if so few images make no Frechet distance"""
        if num <= self.num_features:
            raise UserError(f"{num} {what} are too few for a Frechet distance in {self.num_features} "
                            "features; it needs more images than features")


def load_inception(source):
    """torch-fidelity's Inception of the FID, downloaded by its own loader or read from a local file."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    path, remedy = None, f"fetch {URL_INCEPTION_V3} and pass --extractor FILE"
    try:
        if source != "inception":
            path = Path(expanded(source))
            if path.name == Path(URL_INCEPTION_V3).name:  # it ends in the first digits of its sha256
                with open(path, "rb") as file:
                    if not hashlib.file_digest(file, "sha256").hexdigest().startswith(path.stem[-8:]):
                        raise ValueError("its hash is wrong")
            torch.load(path, weights_only=True, mmap=True)  # torch-fidelity would execute pickled code
        return create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False,
                                        feature_extractor_weights_path=path, verbose=False)
    except Exception as error:  # no network, no file, or a state dict of something else
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"--extractor {source}: no Inception weights ({reason}); {remedy}, or pass a "
                        "checkpoint of train.py --stage vgg") from None


def load_lpips(source, device):
    """LPIPS on VGG-16, or None for 'none' and where the weights cannot be downloaded."""

    def load():
        try:
            return load_vgg16(None if source == "imagenet" else source)
        except RuntimeError as error:
            warn(f"LPIPS is left out: {error}".replace("--vgg", "--lpips"))
        except ValueError as error:
            raise UserError(f"--lpips: {error}") from None

    if source == "none" or not on_rank0(lambda: load() is not None):
        return None
    return build_lpips(load()).to(device)


def collect(chunks, parts, what, num):
    """All rows of chunks (start, dict of tensors (n, ...)), in order, in the first process; None in others.

    Each chunk becomes a file in the folder `parts` at once, and one that is there is not made again: so an
    interrupted evaluation goes on, and so processes hand over their shares. `seconds` are those of all calls.
    """

    def place(start):
        return parts / f"{start:09d}.pt"

    def begin():
        locks.append(claim(parts))
        return sum(intact(path) or bool(path.unlink()) for path in parts.glob("*.pt"))

    locks, count = [], 0
    found, begun, told, last = on_rank0(begin), time.time(), time.time(), time.time()
    if found:
        print0(f"{what}: going on, {found} parts are there already")
    for start, rows in chunks(lambda indices: place(indices[0]).exists()):
        save_torch(rows | dict(seconds=torch.tensor([(time.time() - last) / world()])), place(start))
        last, count = time.time(), count + len(rows["digests"])
        if time.time() > told + 30:
            told, rate = time.time(), count * world() / (time.time() - begun)
            print0(f"{what}: {start:,} of {num:,}, {rate:.1f} images/s, {(num - start) / rate:.0f} s left")
    barrier()
    if rank() > 0:
        return None
    saved = [torch.load(path, weights_only=True) for path in sorted(parts.glob("*.pt"))]
    rows = {name: torch.cat([part[name] for part in saved]) for name in saved[0]}
    if len(rows["digests"]) != num:
        raise UserError(f"{parts} holds {len(rows['digests'])} images and not {num}; delete it")
    return rows


def read_result(path):
    """One JSON of --metrics; raises UserError if it is none."""
    try:
        result = json.loads(Path(path).read_text())
        if {*HOW, "results", "images_hash"} <= result.keys():
            return result
    except (OSError, ValueError, AttributeError):  # no file, no text, no JSON, no object
        pass
    raise UserError(f"{path} is no result of sample.py --metrics")


def joint_hash(digests):
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]


def load_reference(args, extractor, config, split):
    """What all images of a split give, made once for each extractor; see `reference_statistics`.

    The cache goes by names, sizes and times of the files; the `reference_hash` of a result is that of all
    pixels. returns: the dict in the first process, None in others
    """
    data = None if args.reference else images_of(args.ckpt, config, args.data)[split == "val"]
    wanted = dict(reference=split, image_size=config["image_size"], **extractor.info)
    wanted = {k: v for k, v in wanted.items() if k not in ("extractor", "extractor_note")}

    def name():
        times = [os.stat(path).st_mtime_ns for path in getattr(data, "files", [])]
        return args.references / f"{split}_{mix(data.fingerprint, times, sorted(wanted.items())):016x}.pt"

    def chunks(done):
        for start in range(rank() * args.batch, len(data), world() * args.batch):
            indices = range(start, min(start + args.batch, len(data)))
            if not done(indices):
                rows = extractor(torch.stack([data.view(i) for i in indices]))
                rows["labels"] = torch.tensor([data.label(i) for i in indices])
                if extractor.class_names != data.class_names:
                    del rows["logits"]  # nothing to tell, and large
                yield start, rows

    path, locks, told = args.reference or on_rank0(name), [], ""

    def look():
        """made, ours to make, or the reason to wait for another process"""
        try:
            if not intact(path):
                locks.append(claim(args.references))
            return "made" if intact(path) else "ours"
        except InUse as error:
            return str(error)

    while (state := "made" if args.reference else on_rank0(look)) not in ("made", "ours"):
        if state != told:
            told = state
            print0(f"waiting: {told}")
        time.sleep(2)  # not inside `on_rank0`, where the other processes would give up
    if state == "ours":
        parts = path.with_suffix(f".parts{args.batch}")
        extractor.check_number(len(data), f"{split} images")
        print0(f"reference: features of {len(data):,} {split} images -> {path}")
        rows = collect(chunks, parts, "reference", len(data))

        def finish():
            about = dict(reference_images=len(data), reference_hash=joint_hash(rows["digests"]),
                         reference_accuracy=class_accuracy(extractor, data.class_names, rows).get("all"))
            save_torch(reference_statistics(rows["features"]) | about | wanted, path)
            shutil.rmtree(parts)

        on_rank0(finish)
    found = []

    def check():
        try:
            found.append(torch.load(path, weights_only=True) if intact(path) else {})
            if "mu" not in found[0]:
                raise ValueError
        except (RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError):
            raise UserError(f"--reference {path} is missing, damaged or no file of reference statistics"
                            ) from None
        wrong = [f"{k} {found[0].get(k)}, not {v}" for k, v in wanted.items() if found[0].get(k) != v]
        if wrong:
            raise UserError(f"--reference {path} was made with {', '.join(wrong)} as needed here")

    on_rank0(check)
    return found[0] if found else None


def class_accuracy(extractor, class_names, rows):
    """Shares of images that the extractor puts into the class they should be of; {} for other classes."""
    if not class_names or extractor.class_names != class_names:
        return {}
    hits = (rows["logits"].argmax(1) == rows["labels"]).double()
    by_class = {name: hits[rows["labels"] == i].mean().item() for i, name in enumerate(class_names)
                if (rows["labels"] == i).any()}
    return {"all": hits.mean().item(), **by_class}


def evaluate(args, device):
    """--metrics: measures a checkpoint by its protocol and writes one JSON. An interrupted call goes on."""
    ckpt = read_checkpoint(args.ckpt, ("phase1", "phase2", "ar", "nar"))
    config = ckpt["config"]
    protocol = "rfid-val" if ckpt["stage"] in ("phase1", "phase2") else "gfid-train"
    if args.predict:
        if ckpt["stage"] != "ar":
            raise UserError(f"--predict needs an ar.pt: a {ckpt['stage']} prior would see what it predicts")
        protocol = "view-val"
    out = args.out or args.ckpt.with_name(f"metrics_{args.ckpt.stem}{'_view' * args.predict}.json")
    on_rank0(lambda: read_result(out) if os.path.exists(out) else writable(out))
    extractor = Extractor(args.extractor, config["image_size"], device)
    if protocol in ("rfid-val", "view-val"):
        val = images_of(args.ckpt, config, args.data)[1]
        if args.num not in (None, len(val)):
            raise UserError(f"{protocol} takes all {len(val)} validation images; leave --num out")
        args.num, names = len(val), val.class_names
        measure = measure_view if args.predict else measure_reconstructions
        measured, info = measure(args, extractor, val, device)
    else:
        args.num = args.num or 50_000
        measured, info = measure_samples(args, extractor, device)
        names = ckpt["class_names"] if info["classes"] else []
    extractor.check_number(args.num, "images")
    reference = load_reference(args, extractor, config, protocol.split("-")[1])
    how = dict(protocol=protocol, num_images=args.num, image_size=config["image_size"], **extractor.info)
    mine = how | dict(classes=None) | info

    def known():
        """Whether `out` holds this very result, and the folder for its parts if not."""
        mine.update(reference=reference["reference"], reference_images=reference["reference_images"],
                    reference_hash=reference["reference_hash"])
        old = read_result(out) if out.exists() else {}
        if any(old.get(k) != v for k, v in mine.items() if old and k != "extractor"):
            aside = out.with_name(f"{out.stem}.previous.{old['images_hash']}.json")
            os.replace(out, aside)
            print0(f"note: {out} held another result, now {aside.name}")
        if out.exists():
            os.utime(out)  # newer than its checkpoint, also where both were copied
        return out.exists(), f".{out.stem}.{mix(sorted((k, str(v)) for k, v in mine.items())):016x}"

    there, parts = on_rank0(known)
    parts = out.with_name(parts)
    if there:
        print0(f"{out} is there already")
    else:
        rows = collect(measured, parts, protocol, args.num)

        def finish():
            numbers = fidelity(rows["features"], rows["logits"], reference)
            if protocol == "rfid-val":
                usage, perplexity = codebook_usage(count_codes(rows["tokens"], info["K"]))
                numbers = {f"r{name}": numbers[name] for name in ("fid", "kid")}
                numbers |= dict(usage=usage, perplexity=perplexity)
                numbers |= {name: rows[name].double().mean().item()
                            for name in ("psnr", "ssim", "l1", "lpips") if name in rows}
            if protocol == "view-val":
                numbers = {f"view_{name}": numbers[name] for name in ("fid", "kid")}
                numbers |= {name: rows[name].double().mean().item() for name in ("top1", "nats_per_token")}
            accuracy = class_accuracy(extractor, names, rows)
            if accuracy:
                numbers |= dict(class_accuracy=accuracy.pop("all"), class_accuracy_by_class=accuracy,
                                class_accuracy_of_reference=reference["reference_accuracy"])
            seconds = rows["seconds"].sum().item()
            about = dict(
                checkpoint=str(args.ckpt), images_hash=joint_hash(rows["digests"]), results=numbers,
                seconds=round(seconds, 1), processes=world(), device=str(device),
                threads=torch.get_num_threads(), torch=torch.__version__,
                torch_fidelity=importlib.metadata.version("torch-fidelity"),
                command=" ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))
            text = json.dumps(mine | about, indent=1) + "\n"
            save_atomic(lambda p: p.write_text(text), out)
            shutil.rmtree(parts)
            print0(f"{args.num:,} images in {seconds:.0f} s, {args.num / seconds:.1f} images/s -> {out}")

        on_rank0(finish)
    result = on_rank0(lambda: json.loads(out.read_text()))
    print0(f"{protocol}: {PROTOCOLS[protocol]}; {args.num:,} images, features of {args.extractor}")
    for name, value in result["results"].items():
        print0(f"  {name:28s} {value:.5g}" if isinstance(value, float) else f"  {name:28s} {value}")
    return result


def measure_samples(args, extractor, device):
    """(chunks for `collect`, what identifies the samples)"""
    chunks, info, *_ = sample(args, device)
    classes = info["classes"] or [0]

    def measured(done):
        for start, images in chunks(done):
            labels = torch.tensor([classes[i % len(classes)] for i in range(start, start + len(images))])
            yield start, extractor(images) | dict(labels=labels)

    return measured, info


def measure_reconstructions(args, extractor, data, device):
    """(chunks for `collect`, what identifies the reconstructions). All distances are of 8-bit images; L1 is
    on the scale of [-1, 1], as in Eq. 2."""
    tokenizer, ckpt = load_model(args.ckpt, ("phase1", "phase2"), device)
    lpips = load_lpips(args.lpips, device)

    def measured(done):
        for start, x, x_hat, tokens in reconstructions(tokenizer, data, args.num, args.batch, device, done):
            a, b, indices = to_float(x, device), to_float(x_hat, device), range(start, start + len(x))
            rows = extractor(x_hat) | dict(
                tokens=tokens.int().cpu(), psnr=psnr(a, b), ssim=ssim(x, x_hat),
                l1=(a - b).abs().mean((1, 2, 3)).cpu(), labels=torch.tensor([data.label(i) for i in indices]))
            if lpips:
                rows["lpips"] = lpips(a, b).flatten().cpu()
            yield start, rows

    if args.lpips == "random":
        warn("--lpips random: that number means nothing")

    info = dict(tokenizer=latent_hash(tokenizer), decoder=weights_hash(tokenizer), batch=args.batch,
                K=tokenizer.codebook_size, lpips=weights_hash(lpips) if lpips else None, note=ckpt["note"])
    return measured, info


def measure_view(args, extractor, data, device):
    """(chunks for `collect`, what identifies the predictions): top-1 given the true tokens, decoded."""
    prior, ckpt = load_model(args.ckpt, ("ar",), device)
    tokenizer, decoder_ckpt = load_tokenizer_of(args.ckpt, ckpt, args.tokenizer, device)
    if prior.config.num_classes and data.class_names != ckpt["class_names"]:
        raise UserError(f"the classes of the images are not those that {args.ckpt} was trained on")

    def measured(done):
        for start, _, _, tokens in reconstructions(tokenizer, data, args.num, args.batch, device, done):
            labels = torch.tensor([data.label(i) for i in range(start, start + len(tokens))])
            known = labels.to(device) if prior.config.num_classes else None
            predicted, nats = predict_tokens(prior, tokens, known)
            yield start, extractor(to_uint8(decode(tokenizer, predicted))) | dict(
                labels=labels, top1=(predicted == tokens).float().flatten(1).mean(1).cpu(),
                nats_per_token=nats.flatten(1).mean(1).cpu())

    return measured, dict(prior=weights_hash(prior), tokenizer=ckpt["tokenizer_hash"], batch=args.batch,
                          decoder=weights_hash(tokenizer), note=ckpt["note"] or decoder_ckpt["note"])


def evaluate_sweep(args, device):
    """--sweep: one result for each value, a CSV of all and a plot. Values that are measured are not again."""
    stage, name = read_checkpoint(args.ckpt, ("ar", "nar"))["stage"], args.values[0][0]
    if name not in SAMPLER[stage]:
        raise UserError(f"--sweep {name} does nothing for {stage.upper()}, which reads "
                        f"{', '.join(SAMPLER[stage])}")
    pyplot()  # known before the first value is measured
    stem, rows = args.out or args.ckpt.with_name(f"sweep_{args.ckpt.stem}_{name}"), []
    for place in (stem / "1.json", stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".png")):
        on_rank0(functools.partial(writable, place))
    for _, value in args.values:
        print0(f"\n{name} = {value}")
        out = stem / f"{value}.json"
        result = evaluate(argparse.Namespace(**{**vars(args), name: value, "out": out}), device)
        numbers = {k: v for k, v in result["results"].items() if isinstance(v, float)}
        rows.append({name: value, **numbers, "num_images": result["num_images"]})

    def write():
        text = "\n".join(",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)])
        save_atomic(lambda p: p.write_text(text + "\n"), stem.with_name(stem.name + ".csv"))
        draw_sweep(rows, name, result, stem.with_name(stem.name + ".png"))

    on_rank0(write)
    print0(f"wrote {stem}.csv and {stem}.png")


def draw_sweep(rows, name, result, path):
    """Frechet distance, and beside it precision, recall and class accuracy, over a sampler setting."""
    plt = pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    x = [row[name] for row in rows]
    left.plot(x, [row["fid"] for row in rows], "o-")
    left.set(xlabel=name, ylabel="Frechet distance")
    for key, marker in zip(("precision", "recall", "class_accuracy"), "s^D", strict=True):
        if key in rows[0]:
            right.plot(x, [row[key] for row in rows], f"{marker}-", label=key.replace("_", " "))
    right.set(xlabel=name, ylabel="share of images")
    right.legend(fontsize=7)
    fig.suptitle(f"{result['num_images']:,} samples, features of {result['extractor']}", fontsize=8)
    save_atomic(lambda p: fig.savefig(p, format="png", dpi=200), path)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def sample_settings(args, config, stage):
    """What the prior of a stage reads of the preset's sampler, with the flags written over it.

    raises: UserError for a flag that is the other prior's
    """
    settings = dict(guidance=1.0, top_k=0) | config["sample"]
    given = {key: getattr(args, key) for key in settings if getattr(args, key, None) is not None}
    strange = [key.removeprefix("nar_").replace("_", "-") for key in given if key not in SAMPLER[stage]]
    if strange:
        raise UserError(f"--{strange[0]} does nothing for {stage.upper()}")
    return {key: settings[key] for key in SAMPLER[stage]} | given


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
    for word in text.split(",") if text else names:
        if word not in names and (numbers or not (word.isdecimal() and int(word) < len(names))):
            raise UserError(f"--classes {word}: not one of {', '.join(names[:20])}{rest}")
        chosen.append(names.index(word) if word in names else int(word))
        if chosen.count(chosen[-1]) > 1:
            raise UserError(f"--classes {text}: class {names[chosen[-1]]} is named twice")
    return chosen


def sample(args, device):
    """(chunks(done) of images, what identifies them, a name, columns of a sheet)"""
    prior, ckpt = load_model(args.ckpt, ("ar", "nar"), device)
    tokenizer, decoder_ckpt = load_tokenizer_of(args.ckpt, ckpt, args.tokenizer, device)
    args.num = args.num or 80
    settings = sample_settings(args, ckpt["config"], ckpt["stage"])
    if settings["guidance"] != 1 and prior.config.num_classes and not prior.config.class_dropout:
        raise UserError(f"guidance {settings['guidance']:g}, but {args.ckpt} was trained without "
                        "prior.class_dropout and knows no null class; pass --guidance 1")
    names = ckpt["class_names"] if prior.config.num_classes else []
    classes = choose_classes(args.classes, names)
    labels = classes and [classes[i % len(classes)] for i in range(args.num)]
    info = dict(
        made_from="samples", prior=weights_hash(prior), tokenizer=ckpt["tokenizer_hash"],
        decoder=weights_hash(tokenizer), seed=args.seed, classes=classes, batch=args.batch,
        precision=args.precision, note=ckpt["note"] or decoder_ckpt["note"], **settings)
    if args.precision == "bf16":  # the weights themselves: autocast would convert them again for each token
        for parameter in (*prior.parameters(), *tokenizer.decoder.parameters()):  # not rotary angles
            parameter.data = parameter.data.bfloat16()
        if device.type == "cpu" and ckpt["stage"] == "ar":
            pack_linears(prior, args.batch)
    if ckpt["stage"] == "nar" and settings["nar_steps"] > prior.config.num_tokens:
        print0(f"note: {prior.config.num_tokens} tokens take {prior.config.num_tokens} steps at most")
    words = (prior, tokenizer, args.num, labels, args.seed, settings, args.batch, True)
    columns = min(args.num, len(classes or "12345678"))
    return lambda done=None: image_chunks(*words, done), info, f"samples_{ckpt['stage']}", columns


def reconstruct(args, device):
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
    return chunks, info, f"reconstructions_{ckpt['stage']}", min(8, args.num)


def reconstructions(tokenizer, data, num, batch, device, done=None):
    """Yields (start, images, reconstructions, tokens) of this process's chunks; images are uint8."""
    for start in range(rank() * batch, num, world() * batch):
        indices = range(start, min(start + batch, num))
        if not (done and done(indices)):
            x = torch.stack([data.view(i) for i in indices])
            tokens = in_slices(tokenizer.encode, to_float(x, device))
            yield start, x, to_uint8(decode(tokenizer, tokens)), tokens


def write_files(chunks, info, folder, num):
    """One PNG an image. A folder that was begun with the same settings is completed; another is refused."""

    def place(i):
        return folder / f"{i:06d}.png"

    def begin():
        note, text = folder / "info.json", json.dumps(info, indent=1) + "\n"
        old = json.loads(note.read_text()) if note.exists() else json.loads(text)
        if {key: old.get(key) for key in info} != json.loads(text):
            raise UserError(f"{note} tells of other weights or settings; pass another --out")
        if folder.exists() and not note.exists() and any(p.name[0] != "." for p in folder.iterdir()):
            raise UserError(f"{folder} holds other files; pass another --out")
        sweep(folder)
        save_atomic(lambda p: p.write_text(text), note)

    on_rank0(begin)
    for start, images in chunks(done=lambda indices: all(place(i).exists() for i in indices)):
        for i, image in enumerate(images, start):
            save_atomic(lambda p, x=image: make_sheet(x[None], 1, zoom=1).save(p, "PNG"), place(i))


def write_one(chunks, info, path, columns, format):
    """All images in one sheet or npz; the PNG or the npz also holds `info` as JSON."""
    images, info_text = gather_images(chunks()), json.dumps(info)
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
            make_sheet(images, columns, info["note"]).save(temporary, "PNG", pnginfo=text)

    on_rank0(lambda: save_atomic(write, path))


def main(args):
    with one_line_errors():
        device = setup_device(args.device)
        if args.metrics:
            return (evaluate_sweep if args.values else evaluate)(args, device) and None
        chunks, info, name, columns = (reconstruct if args.reconstruct else sample)(args, device)
        suffix = {"sheet": ".png", "npz": ".npz", "files": ""}[args.format]
        out = args.out or args.ckpt.with_name(name + suffix)
        if os.path.exists(out) and out.is_dir() != (args.format == "files"):
            raise UserError(f"--out {out} is a {'folder' if out.is_dir() else 'file'}, which --format "
                            f"{args.format} does not write")
        on_rank0(lambda: writable(out / "info.json" if args.format == "files" else out))
        if args.format == "files":
            write_files(chunks, info, out, args.num)
        else:
            write_one(chunks, info, out, columns, args.format)
        print0(f"wrote {out}" + f" ({info['note']})" * bool(info["note"]))


if __name__ == "__main__":
    main(ARGUMENTS)
