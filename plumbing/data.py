"""Data sets: a folder of images, CIFAR-10, or procedural shapes."""

import contextlib
import functools
import hashlib
import os
import random
from pathlib import Path

from PIL import Image

from plumbing.archives import EXTENSIONS, is_archive, matches, parts_of, read, scan_archives
from plumbing.dataset import ImageData
from plumbing.errors import UserError, warn
from plumbing.images import BadImage, load_rgb, to_square
from plumbing.paths import SPLITS, as_path, shown, split_of
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
    """A run's configuration with `--data` in place of its images: the train and val images of DATA where it
    has both, else all of its images as training and as validation images. None changes nothing."""
    if data is None:
        return config
    own = not is_folder(data) or all((as_path(data) / split).is_dir() for split in ("train", "val"))
    return dict(config, data=data, val=None if own else data)


def load_data(config, keep=None, labels=True):
    """(train, val) ImageData of a run's configuration: 'shapes', 'cifar10', a folder of images or archives.

    keep:   a folder, that of the run, for the index of archives
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
    files, names = scan(folder, "--data", keep)
    if val is not None:
        val_files, val_names = scan(val, flag, keep)
        if labels:
            refuse_other_classes(folder, names, val, val_names)
    else:
        held_out = set(random.Random(mix(0, "split")).sample(range(len(files)), max(1, len(files) // 20)))
        if len(files) == 1:
            print0(f"note: the only image of {folder} is both training and validation image")
        val_files = [path for i, path in enumerate(files) if i in held_out]
        files = [path for i, path in enumerate(files) if i not in held_out] or files
    random.Random(mix(0, "val")).shuffle(val_files)  # so that the first ones are of all classes
    if labels and not names:
        print0(f"note: {folder} has no class sub-folders, so its images carry no labels")
    if limit and limit < len(files):
        files = random.Random(mix(seed, "limit")).sample(files, limit)
    names = names if labels else []
    ours, theirs = (ArchiveData if is_archive(place) else FolderData for place in (folder, val or folder))
    train, val = ours(files, names, S, seed), theirs(val_files, names, S, seed)
    look_at_some(train)
    return train, val


def scan(place, flag, keep):
    return scan_archives(place, flag, keep) if is_archive(place) else scan_folder(place, flag)


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
        raise UserError(f"{val} has classes that {folder} lacks: {', '.join(strangers[:3])}")


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
            kind = "archive" if is_archive(source) else "folder"
            raise UserError(f"the run of {path} had its images in {source}, and from {Path.cwd()} there is "
                            f"no such {kind}; pass --data PATH")
    return load_data(with_data(config, data), Path(path).parent)
