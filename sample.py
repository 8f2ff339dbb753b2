"""Images in and images out: data sets, checkpoints, samples of both priors, reconstructions.

    python sample.py --ckpt runs/demo/ar.pt                              # a sheet, one column per class
    python sample.py --ckpt runs/demo/nar.pt --classes star,ring --num 16 --format files --out stars
    python sample.py --ckpt runs/demo/phase2.pt --reconstruct --num 16   # inputs above reconstructions

Image i is a function of (seed, i) and its class only: it does not depend on how many are drawn or on the
number of processes. train.py and visualize.py import the data sets and the loading code from here.
"""

import argparse
import contextlib
import hashlib
import math
import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from perceptual import VGGTaps, fold_batch_norm, vgg_from_state_dict
from prior_ar import ARPrior, PriorConfig
from prior_nar import NARPrior
from tokenizer import TokenizerConfig, VQTokenizer


class UserError(Exception):
    """Bad input: one line that names cause and remedy, exit code 2, no traceback."""


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


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def one_line_errors():
    """Around each command: bad input ends with one line and exit code 2, and all processes leave together."""
    try:
        yield
        barrier()
    except UserError as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def setup_device(name):
    """Opens the process group under torchrun (NCCL on GPUs, gloo on CPUs) and returns the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device must be cuda, cpu or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu or --device auto")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"more processes than the {torch.cuda.device_count()} visible GPUs; lower --nproc_per_node"
        )
    device = torch.device(name, local_rank) if name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


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


def load_rgb(path):
    """Any image file as an RGB PIL image: rotated as its EXIF says, alpha over white, 16 bit scaled to 8."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class ImageData(Dataset):
    """Images of one split with their labels. Sub-classes give `__len__`, `labels` and `render`.

    class_names: [] where the images carry no labels.
    """

    def __init__(self, image_size, seed, class_names):
        self.image_size, self.seed, self.class_names = image_size, seed, class_names
        self.epoch, self.order, self.cache = None, None, {}

    @property
    def num_classes(self):
        return len(self.class_names)

    def pixels(self, index):
        """(3, h, w) uint8 with short side `image_size`; small sets stay in memory after their first use."""
        if index not in self.cache:
            pixels = self.render(index)
            if len(self) * pixels.numel() > 2**30:
                return pixels
            self.cache[index] = pixels
        return self.cache[index]

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
        return self.view(index, seed, flip=seed % 2 == 1), self.labels[index]


class FolderData(ImageData):
    """A folder of images: sub-folders are classes; without sub-folders there are no labels."""

    def __init__(self, files, class_names, image_size, seed):
        super().__init__(image_size, seed, class_names)
        self.files = files
        number = {name: label for label, name in enumerate(class_names)}
        self.labels = [number[path.parent.name] if class_names else 0 for path in files]

    def __len__(self):
        return len(self.files)

    def render(self, index):
        image = load_rgb(self.files[index])
        scale = self.image_size / min(image.size)
        if scale != 1:
            size = [max(self.image_size, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Cifar10(ImageData):
    """CIFAR-10 through torchvision, downloaded to ~/.cache where there is a network."""

    def __init__(self, train, image_size, seed):
        from torchvision.datasets import CIFAR10 as TorchvisionCifar10

        try:
            data = TorchvisionCifar10(Path.home() / ".cache" / "cifar10", train=train, download=True)
        except Exception as error:  # torchvision raises what the network raises
            raise UserError(
                f"CIFAR-10 could not be downloaded ({type(error).__name__}); unpack it to a folder per class "
                "and pass --data FOLDER"
            ) from None
        super().__init__(image_size, seed, data.classes)
        self.images, self.labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets

    def __len__(self):
        return len(self.images)

    def render(self, index):
        if self.image_size == 32:
            return self.images[index]
        image = self.images[index][None].float()
        image = F.interpolate(image, size=self.image_size, mode="bicubic", antialias=True)
        return image[0].round().clamp(0, 255).byte()


class Shapes(ImageData):
    """Procedural images, a function of (seed, split, index): ten classes of structure under free detail.

    Structure is what, where, how large and which orientation; detail is colours, fine texture and lighting.
    Both come from generators of their own, so that one can be redrawn while the other stays
    (`detail_seed`). Any resolution; values and factors are the same at each.
    """

    NAMES = ["disk", "ring", "square", "triangle", "cross", "star", "bar", "crescent", "pair", "hourglass"]

    def __init__(self, split, size, image_size, seed=0, detail_seed=0):
        super().__init__(image_size, seed, self.NAMES)
        self.split, self.size, self.detail_seed = split, size, detail_seed
        self.labels = [index % 10 for index in range(size)]

    def __len__(self):
        return self.size

    def factors(self, index):
        """All factors of one image: floats and tuples. Lengths in half image sides, angles in radians."""
        key = (self.seed, self.split, index)
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
        )  # fmt: skip

    def mask(self, index):
        """Coverage of each pixel by the shape: (S, S) float32 in [0, 1]."""
        f, (x, y) = self.factors(index), self._grid()
        x, y = (x - f["x"]) / f["radius"], (y - f["y"]) / f["radius"]
        c, s = math.cos(f["angle"]), math.sin(f["angle"])
        distance = shape_distance(f["label"], c * x + s * y, c * y - s * x) * f["radius"]
        return (0.5 - distance * self.image_size / 2 / 1.5).clamp(0, 1)  # an edge 1.5 pixels wide

    def render(self, index):
        f, (x, y) = self.factors(index), self._grid()
        foreground, background = (
            torch.tensor(f[name])[:, None, None] for name in ("foreground", "background")
        )
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
    files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in EXTENSIONS and p.is_file()]
    return [p for p in files if not p.name.startswith(".")]


def scan_folder(folder):
    """(files, class names) of a folder of images, sorted; hidden files and folders are left out."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(
            f"--data {folder} does not exist. Try --data shapes (built in), or a folder of images"
        )
    if not folder.is_dir():
        raise UserError(f"--data {folder} is a file; unpack it first and pass the folder")
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    classes = [p for p in inside if images_in(p)]
    files = [p for place in (classes or [folder]) for p in images_in(place)]
    if not files:
        raise UserError(
            f"no images under {folder} (looked for {' '.join(EXTENSIONS)}, in it and one level below)"
        )
    return files, [p.name for p in classes]


def load_data(config):
    """(train, val) ImageData of a run's configuration: 'shapes', 'cifar10' or a folder of images."""
    source, S, seed, limit = config["data"], config["image_size"], config["seed"], config["limit"]
    if source == "shapes":
        return Shapes("train", limit or 20_000, S), Shapes("val", 1_000, S)
    if source is None:
        raise UserError("this preset needs --data FOLDER. Without data: --preset demo")
    if source == "cifar10":
        return Cifar10(True, S, seed), Cifar10(False, S, seed)
    folder, val = Path(source).expanduser(), config["val"]
    if val is None and (folder / "train").is_dir() and (folder / "val").is_dir():
        folder, val = folder / "train", folder / "val"
    files, names = scan_folder(folder)
    if val is not None:
        val_files, val_names = scan_folder(val)
        strangers = sorted(set(val_names) - set(names))
        if strangers or bool(val_names) != bool(names):
            raise UserError(f"--val {val} has classes that {folder} lacks: {', '.join(strangers[:3])}")
    else:
        held_out = set(random.Random(mix(seed, "split")).sample(range(len(files)), max(1, len(files) // 20)))
        val_files = [path for i, path in enumerate(files) if i in held_out]
        files = [path for i, path in enumerate(files) if i not in held_out] or files
    random.Random(mix(seed, "val")).shuffle(val_files)  # so that the first ones are of all classes
    if limit and limit < len(files):
        files = random.Random(mix(seed, "limit")).sample(files, limit)
    return FolderData(files, names, S, seed), FolderData(val_files, names, S, seed)


def to_float(pixels, device):
    """(B, 3, S, S) uint8 -> float32 in [-1, 1] on the device."""
    return pixels.to(device, non_blocking=True).float().div(127.5).sub(1)


def batches(data, batch, start, workers):
    """Endless (images uint8, labels) of this process's share of each global batch, from step `start` on."""

    def positions():
        for step in range(start, 2**62):
            rows = my_rows(batch)
            yield list(range(step * batch + rows.start, step * batch + rows.stop))

    class Steps:
        def __iter__(self):
            return positions()

        def __len__(self):
            return 2**62

    loader = DataLoader(
        data, batch_sampler=Steps(), num_workers=workers, pin_memory=torch.cuda.is_available()
    )
    return iter(loader)


# ----------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------

FORMAT = 1  # of the checkpoint files; train.py writes them


def read_checkpoint(path, stages):
    """The checkpoint dict in `path`, which must be of one of `stages`. Pickled code is never executed.

    Keys: format, stage, step, config (the run's preset), model_config, model (weights), ema (weights or
    None), class_names, tokenizer_hash, note, train (optimizers, for resuming).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}" + ("; it is a folder, name a file in it" * path.is_dir()))
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}); name another one"
        ) from None
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (format {FORMAT})")
    if ckpt["stage"] not in stages:
        raise UserError(
            f"{path} is a checkpoint of stage {ckpt['stage']!r}; this needs {' or '.join(stages)}"
        )
    return ckpt


def load_model(path, stages, device="cpu"):
    """(model in eval mode, checkpoint) of any stage; averaged weights where the run kept them."""
    ckpt = read_checkpoint(path, stages)
    weights, sizes = ckpt["ema"] or ckpt["model"], ckpt["model_config"]
    if ckpt["stage"] == "vgg":
        model = VGGTaps(fold_batch_norm(vgg_from_state_dict(weights, str(path), **sizes)))
    else:
        if ckpt["stage"] in ("phase1", "phase2"):
            model = VQTokenizer(TokenizerConfig(**sizes))
        else:
            model = (ARPrior if ckpt["stage"] == "ar" else NARPrior)(PriorConfig(**sizes))
        model.load_state_dict(weights, strict=True)
    return model.to(device).eval(), ckpt


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
    folder = Path(prior_path).parent
    path = given or next(
        (folder / f"{s}.pt" for s in ("phase2", "phase1") if (folder / f"{s}.pt").exists()), None
    )
    if path is None:
        raise UserError(f"no phase2.pt or phase1.pt beside {prior_path}; pass --tokenizer FILE")
    tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
    if latent_hash(tokenizer) != prior_ckpt["tokenizer_hash"]:
        raise UserError(
            f"{path} (hash {latent_hash(tokenizer)}) is not the tokenizer that {prior_path} was trained on "
            f"(hash {prior_ckpt['tokenizer_hash']}); pass the right one with --tokenizer"
        )
    return tokenizer, ckpt


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


def generate_tokens(prior, labels, seed, indices, settings):
    """Tokens (B, N) of the images `indices`, whose random numbers depend on (seed, index) only.

    labels: (B,) int64 or None;  settings: the `sample` section of a preset
    """
    N, steps, device = prior.config.num_tokens, settings["nar_steps"], next(prior.parameters()).device
    if isinstance(prior, ARPrior):
        noise = torch.stack([seeded_rand(N, seed=mix(seed, "sample", i)) for i in indices])
        return prior.generate(labels, noise.to(device), settings["temperature"], top_p=settings["top_p"])
    noise = torch.stack([seeded_rand(steps, 2, N, seed=mix(seed, "sample", i)) for i in indices])
    return prior.generate(
        labels, noise.to(device), steps, settings["token_temperature"], settings["choice_temperature"],
        settings["confidence_space"],
    )  # fmt: skip


def generate_images(prior, tokenizer, num, labels, seed, settings, batch=32, progress=False):
    """Images 0..num-1 of a seed: (num, 3, S, S) uint8 on the CPU, the same in every process.

    labels: list of `num` class indices, or None for an unconditional prior
    Work is split over processes in aligned chunks of `batch`, and a last chunk is filled up and cut again,
    so that image i is bit-equal for any `num` and any number of processes. Another `batch` changes the
    rounding of matrix products and nothing else.
    """
    device, chunks = next(prior.parameters()).device, math.ceil(num / batch)
    mine = {}
    for chunk in tqdm(range(rank(), chunks, world()), "sampling", disable=None if progress else True):
        indices = range(chunk * batch, (chunk + 1) * batch)
        chunk_labels = None
        if labels is not None:
            chunk_labels = torch.tensor([labels[i % num] for i in indices], device=device)
        tokens = generate_tokens(prior, chunk_labels, seed, indices, settings)
        mine[chunk] = to_uint8(decode(tokenizer, tokens))
    parts = gather_dicts(mine)
    return torch.cat([parts[chunk] for chunk in range(chunks)])[:num]


@torch.no_grad()
def decode(tokenizer, tokens):
    return tokenizer.decode(tokens)


def gather_dicts(mine):
    """The union of one dict per process, in every process."""
    if world() == 1:
        return mine
    parts = [None] * world()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def to_uint8(x):
    """Images in [-1, 1] (values outside are clamped) to uint8 on the CPU; the inverse of `to_float`."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()


def psnr(x, x_hat):
    """Peak signal-to-noise ratio in dB of each image, (B,), rounded to 8 bits: 10 log10(255^2 / mse)."""
    error = (to_uint8(x).double() - to_uint8(x_hat).double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1e-10))


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


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


def save_atomic(write, path):
    """Calls write(temporary path) and renames the result to `path`: a stop in between loses nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="ar.pt or nar.pt; with --reconstruct phase1.pt or phase2.pt")
    add("--tokenizer", type=Path, help="tokenizer that decodes (default: phase2.pt or phase1.pt beside CKPT)")
    add("--count", "--num", dest="num", type=int, default=80, help="number of images (default 80)")
    add("--classes", help="names or numbers, separated by commas (default: all, in turn)")
    add("--reconstruct", action="store_true", help="reconstruct validation images instead of sampling")
    add("--data", help="with --reconstruct: images to use (default: the validation images of the run)")
    add("--format", choices=("sheet", "files", "npz"), default="sheet", help="one picture, PNG files, or npz")
    add("--out", type=Path, help="file or, for --format files, folder to write (default: beside CKPT)")
    add("--seed", type=int, default=0, help="seed of the samples (default 0)")
    add("--temperature", type=float, help="AR: softmax temperature, 0 takes the argmax")
    add("--top-p", type=float, help="AR: nucleus (Table 10)")
    add("--steps", type=int, dest="nar_steps", help="NAR: decoding steps (Table 10)")
    add("--token-temperature", type=float, help="NAR: softmax temperature of the candidates")
    add("--choice-temperature", type=float, help="NAR: noise of the choice (Table 10; decision I18)")
    add("--confidence-space", choices=("prob", "log"), help="NAR: score is the probability or its logarithm")
    add("--batch", type=int, default=32, help="images per forward pass (default 32)")
    add("--device", default="auto", help="cuda, cpu or auto")
    return parser.parse_args(argv)


def sample_settings(args, config):
    """The preset's sampler with the flags written over it, checked."""
    settings = dict(config["sample"])
    settings.update({key: getattr(args, key) for key in settings if getattr(args, key, None) is not None})
    if not 0 < settings["top_p"] <= 1:
        raise UserError(f"--top-p must lie in (0, 1], got {settings['top_p']}")
    for key in ("temperature", "token_temperature", "choice_temperature"):
        if not 0 <= settings[key] < math.inf:
            raise UserError(f"--{key.replace('_', '-')} must be a number >= 0, got {settings[key]}")
    if settings["nar_steps"] < 1:
        raise UserError(f"--steps must be at least 1, got {settings['nar_steps']}")
    return settings


def choose_classes(text, names):
    """'star,3' to class indices; None to all of them; None for an unconditional prior."""
    if not names:
        if text:
            raise UserError("--classes, but this prior is unconditional")
        return None
    chosen = []
    for word in text.split(",") if text else names:
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            raise UserError(f"--classes {word}: not one of {', '.join(names[:20])} or 0..{len(names) - 1}")
        chosen.append(names.index(word) if word in names else int(word))
    return chosen


def write_images(images, args, default, columns, note):
    """Images as one sheet, single files or npz; returns the path written."""
    out = args.out or args.ckpt.parent / (
        default + {"sheet": ".png", "npz": ".npz", "files": ""}[args.format]
    )
    if args.format == "files":
        out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            save_atomic(
                lambda p, x=image: make_sheet(x[None], 1, zoom=1).save(p, "PNG"), out / f"{i:06d}.png"
            )
    elif args.format == "npz":
        arrays = images.permute(0, 2, 3, 1).numpy()
        save_atomic(lambda p: np.savez(open(p, "wb"), arr_0=arrays), out)
    else:
        save_atomic(lambda p: make_sheet(images, columns, note).save(p, "PNG"), out)
    return out


def sample(args, device):
    prior, ckpt = load_model(args.ckpt, ("ar", "nar"), device)
    tokenizer, _ = load_tokenizer_of(args.ckpt, ckpt, args.tokenizer, device)
    settings = sample_settings(args, ckpt["config"])
    classes = choose_classes(args.classes, ckpt["class_names"])
    labels = classes and [classes[i % len(classes)] for i in range(args.num)]
    images = generate_images(
        prior, tokenizer, args.num, labels, args.seed, settings, args.batch, progress=True
    )
    return images, f"samples_{ckpt['stage']}", min(args.num, len(classes or "12345678")), ckpt["note"]


def reconstruct(args, device):
    tokenizer, ckpt = load_model(args.ckpt, ("phase1", "phase2"), device)
    config = dict(ckpt["config"], **({"data": args.data, "val": args.data} if args.data else {}))
    data = load_data(config)[1]
    if args.num > len(data):
        raise UserError(f"--num {args.num}, but there are only {len(data)} images")
    rows = []
    for start in range(0, args.num, args.batch):
        x = torch.stack([data.view(i) for i in range(start, min(start + args.batch, args.num))])
        x_hat = to_uint8(decode(tokenizer, tokenizer.encode(to_float(x, device))))
        rows.append(torch.stack([x, x_hat], 1) if args.format == "sheet" else x_hat)
    images = torch.cat(rows)
    columns = min(8, args.num)
    if args.format == "sheet":  # a row of inputs above a row of reconstructions; white fills the last rows
        filler = torch.full_like(images[:1], 255).expand(-args.num % columns, -1, -1, -1, -1)
        images = torch.cat([images, filler])
        images = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in images.split(columns)])
    return images, f"reconstructions_{ckpt['stage']}", columns, ckpt["note"]


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors():
        if args.num < 1 or args.batch < 1:
            raise UserError("--num and --batch must be at least 1")
        device = setup_device(args.device)
        images, default, columns, note = (reconstruct if args.reconstruct else sample)(args, device)
        if rank() == 0:
            path = write_images(images, args, default, columns, note)
            print(f"wrote {path}" + f" ({note})" * bool(note))


if __name__ == "__main__":
    main()
