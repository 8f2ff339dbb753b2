"""Images in tar archives, read where they lie: `--data 'DIR/*.tar'` (docs/data.md).

An archive is looked through once; where each image begins and how long it is goes into an index beside the
run. From then on an image is one read at a place (`pread`): order, crops and fingerprint are those of the
same images in a folder.
"""

import collections
import glob
import hashlib
import io
import json
import os
import re
import tarfile

from plumbing.errors import UserError, warn
from plumbing.files import save_atomic
from plumbing.images import BadImage
from plumbing.paths import expanded, split_of
from plumbing.processes import on_rank0, print0

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
OPEN = 64  # archives that a process holds open at a time


def is_archive(source):
    """Whether `--data` names archives: FILE.tar or a pattern of such."""
    return isinstance(source, str | os.PathLike) and str(source).lower().endswith((".tar", *PACKED))


def archives_of(pattern, flag):
    """Paths of the archives, sorted.  raises: UserError for none, and for packed ones"""
    text = expanded(str(pattern))
    found = sorted(glob.glob(text)) or ([text] if os.path.exists(text) else [])
    if not found:
        raise UserError(f"{flag} {pattern}: there is no such archive (quote a pattern, so that the shell "
                        "leaves it alone)")
    for path in found:
        with open_archive(path) as file:
            start = file.read(6)
        if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0" or (
                path.lower().endswith(PACKED)):
            raise UserError(f"{path} is compressed, and in such an archive no place can be read by itself; "
                            "unpack it to a plain .tar (images gain nothing from it)")
    return found


def open_archive(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def look_through(path):
    """([(image name, its class or None, offset, size)], names of folders above the classes) of one archive.

    The class is the folder that holds the image, or what `key.cls` says beside `key.jpg` (WebDataset), there
    an int if it is a number, with "_" for "/". What is hidden is left out, as in a folder.
    raises: UserError for a file that is no archive, damaged, cut off, or with links for images
    """
    images, classes, inner, size = [], {}, None, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                *above, name = [part for part in member.name.split("/") if part not in ("", ".")] or [""]
                folder, lower = "/".join(above), name.lower()
                if name.startswith(".") or any(part.startswith((".", "__")) for part in above):
                    continue
                if (member.islnk() or member.issym()) and lower.endswith(EXTENSIONS):
                    raise UserError(f"{path}: {member.name} is a link; pack the images themselves, with "
                                    "tar --dereference --hard-dereference")
                if not member.isfile() or member.sparse:
                    continue
                if member.offset_data + member.size > size:
                    raise UserError(f"{path} is cut off: {member.name} ends beyond its last byte")
                key = folder, name.split(".")[0]
                if lower.endswith(EXTENSIONS):
                    images.append((folder, name, key, member.offset_data, member.size))
                elif lower.endswith(".cls"):
                    text = archive.extractfile(member).read(100).decode(errors="replace").strip()
                    classes[key] = int(text) if text.isdecimal() else re.sub(r"[/\0]", "_", text)
                elif lower.endswith((".tar", *PACKED)):
                    inner = inner or member.name
                archive.members = []  # tarfile would keep a million of them
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged or no tar archive ({error})") from None
    if end > size or not ends(path, end):  # tarfile takes a damaged header for the end
        raise UserError(f"{path} is cut off or damaged after {len(images):,} images, or another archive was "
                        "appended to it: at its end are no zeros")
    if inner and not images:
        raise UserError(f"{path} holds archives ({inner}) and no images; unpack it, and pass those inside")
    folders = sorted({part for one in {image[0] for image in images} for part in one.split("/")[:-1]})
    return [(name, classes.get(key, folder.rpartition("/")[2] or None), offset, length)
            for folder, name, key, offset, length in images], folders


def ends(path, place):
    """Whether an archive ends at a place: with a block of zeros, and nothing but zeros after it."""
    with open(path, "rb") as file:
        file.seek(place)
        blocks = iter(lambda: file.read(2**20), b"")
        first = next(blocks, b"")
        return len(first) >= 512 and not first.strip(b"\0") and not any(b.strip(b"\0") for b in blocks)


def index_of(paths, keep):
    """{path: [[size, time], *look_through(path)]}; kept in the folder `keep`, used while these two stay."""
    place = None
    if keep is not None:
        digest = hashlib.sha256("\n".join(map(os.path.abspath, paths)).encode()).hexdigest()[:16]
        place = keep / f"archives-{digest}.json"
    known = {}
    if place is not None and place.exists():
        try:
            known = json.loads(place.read_text())
        except (OSError, ValueError):
            warn(f"{place} is damaged and made anew")
    found, changed = {}, False
    for path in paths:
        state = os.stat(path)
        about = [state.st_size, state.st_mtime_ns]
        entry = known.get(os.path.abspath(path))
        if not entry or entry[0] != about:
            if not changed and len(paths) > 20:
                print0(f"looking through {len(paths)} archives, once")
            entry, changed = [about, *look_through(path)], True
        found[os.path.abspath(path)] = entry
    if changed and place is not None:
        text = json.dumps(found)
        try:
            keep.mkdir(parents=True, exist_ok=True)
            save_atomic(lambda p: p.write_text(text), place)
        except (OSError, UserError) as error:  # a folder that may only be read
            warn(f"the index of the archives is not kept, and made again each time: {error}")
    return found


def scan_archives(pattern, flag="--data", keep=None):
    """(files, class names) as `scan_folder`'s; a file is a string of ARCHIVE, OFFSET, SIZE, /CLASS/NAME.

    Numbers of .cls files are classes in the order of the numbers, folders in that of their names, as ever.
    raises: UserError for what cannot be read, and where only some images have a class
    """
    paths = archives_of(pattern, flag)
    found = on_rank0(lambda: index_of(paths, keep))
    refuse_splits(flag, found)
    rows = [(kind, name, path, offset, size) for path, (_, images, _) in found.items()
            for name, kind, offset, size in images]
    if not rows:
        raise UserError(f"no images in {flag} {pattern} (looked for {' '.join(EXTENSIONS)})")
    kinds = {row[0] for row in rows}
    if None in kinds and len(kinds) > 1:
        name = next(row for row in rows if row[0] is None)
        raise UserError(f"{name[2]} holds images with and without a class, {name[1]} for instance")
    names = sorted(kinds - {None}, key=lambda kind: (isinstance(kind, str), kind))
    order = {kind: i for i, kind in enumerate(names)}
    rows.sort(key=lambda row: (order.get(row[0], 0), row[1], row[2]))
    files = ["\0".join((path, str(offset), str(size), f"/{'' if kind is None else kind}/{name}"))
             for kind, name, path, offset, size in rows]  # no path holds a \0
    return files, list(map(str, names))


def refuse_splits(flag, found):
    """raises: UserError for archives, or folders in them, that are several splits of a data set"""
    names = {os.path.basename(path).removesuffix(".tar") for path in found}
    names |= {name for _, _, folders in found.values() for name in folders}
    kinds = {str(image[1]) for _, images, _ in found.values() for image in images}
    names |= kinds if all(map(split_of, kinds)) else set()
    splits = sorted({split_of(name) for name in names} - {None})
    if len(splits) > 1:
        raise UserError(f"{flag} names archives with several splits of a data set ({', '.join(splits)}), "
                        "which would become one; pass those of one split, the others with --val")


def parts_of(file):
    """(archive, offset, size, /CLASS/NAME) of one `scan_archives` file"""
    archive, offset, size, inside = file.split("\0")
    return archive, int(offset), int(size), inside


class Reader:
    """Bytes at places of archives; each process opens its own, at most `OPEN` at a time."""

    def __init__(self):
        self.files, self.process = collections.OrderedDict(), os.getpid()

    def read(self, path, offset, size):
        if self.process != os.getpid():  # a worker: what the parent opened is left alone
            self.__init__()
        if path not in self.files:
            self.files[path] = open(path, "rb", buffering=0)
            while len(self.files) > OPEN:
                self.files.popitem(last=False)[1].close()
        self.files.move_to_end(path)
        return os.pread(self.files[path].fileno(), size, offset)


READER = Reader()


def read(file):
    """One `scan_archives` file as a file in memory.  raises: BadImage if its archive cannot be read"""
    try:
        return io.BytesIO(READER.read(*parts_of(file)[:3]))
    except OSError as error:
        raise BadImage(str(error)) from None
