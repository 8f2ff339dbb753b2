"""Data sets: a folder of images, CIFAR-10, or procedural shapes."""

import contextlib
import functools
import hashlib
import os
import random
import re
from pathlib import Path

from PIL import Image

from plumbing.archives import EXTENSIONS, is_archive, matches, parts_of, read, scan_archives
from plumbing.dataset import ImageData
from plumbing.errors import UserError, warn
from plumbing.images import load_rgb, to_square
from plumbing.paths import as_path, shown
from plumbing.processes import mix, on_rank0, print0, rank
from plumbing.shapes import Shapes


class FolderData(ImageData):
    """A folder of images: sub-folders are classes; without sub-folders there are no labels."""

    def __init__(self, files, class_names, image_size, seed):
        super().__init__(image_size, seed, class_names)
        self.files = files
        number = {name: label for label, name in enumerate(class_names)}
        self.labels = [number[path.rsplit(os.sep, 2)[-2]] if class_names else 0 for path in files]

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return shown(self.files[index])

    def render(self, index):  # far too small images would be blown up to a blur
        return to_square(load_rgb(self.source(index), min_side=self.image_size / 4), self.image_size)

    def source(self, index):
        """What `load_rgb` opens."""
        return self.files[index]

    def size(self, index):
        return os.stat(self.files[index]).st_size

    def times(self):
        """When each file was written last, in ns."""
        return [os.stat(path).st_mtime_ns for path in self.files]

    @functools.cached_property
    def fingerprint(self):
        """Changes when a file is added, removed, renamed or of another size, and not when the whole folder is
        moved, renamed or copied. [number of images, hash]"""
        digest = hashlib.sha256()
        for index, path in enumerate(self.files):
            with contextlib.suppress(OSError):  # a dangling link has no size
                name = os.sep.join(path.rsplit(os.sep, 2)[-2 if self.class_names else -1 :])
                digest.update(f"{name} {self.size(index)}\n".encode(errors="surrogateescape"))
        return [len(self), digest.hexdigest()[:16]]


class ArchiveData(FolderData):
    """The same images inside tar archives: a file is what `scan_archives` says."""

    def name(self, index):
        archive, _, _, inside = parts_of(self.files[index])
        return shown(archive + inside)

    def source(self, index):
        return read(self.files[index])

    def size(self, index):
        return parts_of(self.files[index])[2]

    def times(self):
        return [os.stat(path).st_mtime_ns for path in sorted({parts_of(file)[0] for file in self.files})]


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
        self.images, self.labels, self.fingerprint = data.data, data.targets, [len(data), "cifar10"]
        if limit and limit < len(data):
            chosen = random.Random(mix(seed, "limit")).sample(range(len(data)), limit)
            self.images, self.labels = self.images[chosen], [self.labels[i] for i in chosen]
            self.fingerprint = [limit, f"cifar10, seed {seed}"]

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"cifar10 image {index}"

    def render(self, index):
        return to_square(Image.fromarray(self.images[index]), self.image_size)


def images_in(folder):
    """Paths of the images in a folder, sorted: strings, as a million Path objects take ten times as long."""
    with os.scandir(folder) as entries:  # isfile: links in a circle are none
        return sorted(e.path for e in entries if e.name.lower().endswith(EXTENSIONS) and e.name[0] != "."
                      and (e.is_file(follow_symlinks=False) or os.path.isfile(e.path)))


def scan_folder(folder, flag="--data"):
    """(paths, class names) of a folder of images, sorted; hidden files and folders are left out."""
    folder = as_path(folder)
    if not folder.exists():
        raise UserError(f"{flag} {folder} does not exist. Try --data shapes (built in) or another folder")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file; unpack it first and pass the folder")
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
        classes = {p.name: found for p in inside if (found := images_in(p))}
        loose = images_in(folder)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error}") from None
    if not classes and not loose:
        raise UserError(f"no images under {folder} (looked for {' '.join(EXTENSIONS)}, in it and one below; "
                        "where the classes are in DIR/train, pass that)")
    if classes and loose and rank() == 0:
        warn(f"{len(loose)} images beside the class folders of {folder} are left out")
    return [path for found in classes.values() for path in found] or loose, list(classes)


def with_data(config, data):
    """A run's configuration with `--data` in place of its images: the train and val images of DATA where it
    has both, else all of its images as training and as validation images. None changes nothing."""
    if data is None:
        return config
    own = not is_folder(data) or all((as_path(data) / split).is_dir() for split in ("train", "val"))
    return dict(config, data=data, val=None if own else data)


def load_data(config, labels=True):
    """(train, val) ImageData of a run's configuration: 'shapes', 'cifar10', a folder of images or archives.

    labels: False where nobody needs the classes: they are left out, and need not be alike
    """
    source, S, seed, limit = config["data"], config["image_size"], config["seed"], config["limit"]
    if source in ("shapes", "cifar10") and config["val"] is not None:
        raise UserError(f"{source} has validation images of its own: leave --val out")
    if source == "shapes":
        return Shapes("train", limit or 20_000, S, seed), Shapes("val", 1_000, S, seed)
    if source is None:
        raise UserError("this preset needs --data FOLDER. Without data: --preset demo")
    if source == "cifar10":
        return Cifar10(True, S, seed, limit), Cifar10(False, S, seed)
    folder, val = as_path(source), config["val"]
    flag = "--data" if val in (None, source) else "--val"  # the one that named the validation images
    if val is None and (folder / "train").is_dir() and (folder / "val").is_dir():
        folder, val = folder / "train", folder / "val"
    files, names = scan(folder, "--data")
    if val is not None:
        val_files, val_names = scan(val, flag)
        if labels and bool(names) != bool(val_names):
            raise UserError(f"only one of {folder} and {val} has class sub-folders; sort the images of the "
                            f"other into such, or pass --data {folder} alone")
        if labels and (strangers := sorted(set(val_names) - set(names))):
            raise UserError(f"{val} has classes that {folder} lacks: {', '.join(strangers[:3])}")
    else:
        held_out = set(random.Random(mix(0, "split")).sample(range(len(files)), max(1, len(files) // 20)))
        val_files = [path for i, path in enumerate(files) if i in held_out]
        files = [path for i, path in enumerate(files) if i not in held_out] or files  # of a single image
    random.Random(mix(0, "val")).shuffle(val_files)  # so that the first ones are of all classes
    if labels and not names:
        print0(f"note: {folder} has no class sub-folders, so its images carry no labels")
    if limit and limit < len(files):
        files = random.Random(mix(seed, "limit")).sample(files, limit)
    names = names if labels else []
    ours, theirs = (ArchiveData if is_archive(place) else FolderData for place in (folder, val or folder))
    return ours(files, names, S, seed), theirs(val_files, names, S, seed)


SPLIT = r"(images?[\W_]*)?(train|val|valid|dev|eval|test)(ing|idation|uation)?[\W_]*\d*"


def scan(place, flag):
    """(files, class names) of a folder or of archives.  raises: UserError if splits would become classes"""
    files, names = scan_archives(place, flag) if is_archive(place) else scan_folder(place, flag)
    if names and all(re.fullmatch(SPLIT, name, re.I) for name in names):
        raise UserError(f"{', '.join(names)} in {flag} {place} are splits of a data set and no classes; pass "
                        "one of them with --data and another with --val")
    return files, names


def is_folder(source):
    """Whether `data` or `val` of a configuration names a folder, here or elsewhere."""
    return source not in (None, "shapes", "cifar10")


def images_of(path, config, data=None):
    """(train, val) of `--data`, or without it of the run that wrote the checkpoint `path`.

    raises: UserError that names the checkpoint if the folders or archives of its run are not there, or if it
            names none
    """
    if data is None and config["data"] is None:
        raise UserError(f"{path} tells of no images; pass --data PATH")
    for source in (config["data"], config["val"]) if data is None else ():
        if is_folder(source) and not all(matches(source).values()):
            raise UserError(f"the run of {path} had its images in {source}, and from {Path.cwd()} there is "
                            "no such place; pass --data PATH")
    return load_data(with_data(config, data))
