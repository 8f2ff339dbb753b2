"""Images in tar archives, read where they lie: `--data 'DIR/*.tar'` (docs/data.md).

At its start a run looks through the archives once. From then on an image is one read at its place: order,
crops and fingerprint are those of the same images in a folder.
"""

import collections
import glob
import io
import os
import re
import tarfile

from plumbing.errors import UserError
from plumbing.images import BadImage
from plumbing.paths import expanded
from plumbing.processes import on_rank0

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def is_archive(source):
    """Whether `--data` names archives: FILE.tar or a pattern of such."""
    return isinstance(source, str | os.PathLike) and str(source).lower().endswith(".tar")


def matches(pattern):
    """{name or pattern of an archive: the paths that there are}"""
    names = numbered(expanded(str(pattern)))
    return {name: [name] if os.path.exists(name) else glob.glob(name) for name in names}


def numbered(pattern):
    """WebDataset's spelling of many archives: "x-{00..02}.tar" -> x-00.tar, x-01.tar, x-02.tar"""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    return [pattern[: found.start()] + number + pattern[found.end() :] for number in numbers]


def look_through(path):
    """[(class or None, name, path, offset, size)] of the images of one archive.

    The class is the folder that holds the image, or what `key.cls` says beside `key.jpg` (WebDataset). What
    is hidden is left out, as in a folder. Of members of one name the last counts, as for `tar x`.
    raises: UserError for a file that is no archive, compressed, damaged or cut off, for links in the place of
            images, and where not each image has a .cls of its own though some have
    """
    images, labels = {}, {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep a million of them
                *above, name = [part for part in member.name.split("/") if part not in ("", ".")] or [""]
                hidden = name.startswith(".") or any(part.startswith((".", "__")) for part in above)
                folder, (key, suffix) = "/".join(above), os.path.splitext(name)
                if hidden or member.isdir() or suffix.lower() not in (*EXTENSIONS, ".cls"):
                    continue
                if not member.isfile():
                    raise UserError(f"{path}: {member.name} is a link; pack the images themselves, with tar "
                                    "--dereference --hard-dereference")
                if suffix.lower() == ".cls":
                    labels[folder, key] = class_in(archive.extractfile(member).read(), path, member.name)
                else:
                    images[folder, name] = member.offset_data, member.size
            end = archive.offset
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} is no plain tar archive, or damaged ({error}); unpack a compressed one"
                        ) from None
    with open(path, "rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        rest = file.read(2**20)
    if len(rest) < 512 or rest.strip(b"\0"):
        raise UserError(f"{path} is cut off or damaged after {len(images):,} images: no zeros at its end")
    if not labels:
        return [(folder.rpartition("/")[2] or None, name, path, *place)
                for (folder, name), place in images.items()]
    keys = {(folder, name): (folder, os.path.splitext(name)[0]) for folder, name in images}
    used = collections.Counter(keys.values())
    for image, key in keys.items():
        if key not in labels or used[key] > 1:
            raise UserError(f"{path}: {'/'.join(filter(None, image))}: it is not clear which image has which "
                            "label; each image takes one .cls of its name (1.png and 1.cls)")
    return [(labels[keys[image]], image[1], path, *place) for image, place in images.items()]


def class_in(content, path, name):
    """The class that the bytes of a .cls say.  raises: UserError unless they are one line of text"""
    text = content.decode("utf-8-sig", errors="surrogateescape").strip()
    if not text or "\0" in text or len(text.splitlines()) > 1:
        raise UserError(f"{path}: {name} names no class: one line of text is wanted there, in UTF-8")
    return text.replace("/", "_")


def scan_archives(pattern, flag="--data"):
    """(files, class names) as `scan_folder`'s; a file is a string of ARCHIVE, OFFSET, SIZE, /CLASS/NAME.

    raises: UserError for what cannot be read, and where only some images have a class
    """
    found = matches(pattern)
    for name, there in found.items():
        if not there:
            raise UserError(f"{flag} {pattern}: there is no {name} (quote a pattern for the shell)")
    paths = sorted({os.path.abspath(path) for paths in found.values() for path in paths})
    rows = on_rank0(lambda: [row for path in paths for row in look_through(path)])
    names = {row[0] for row in rows}
    if not rows:
        raise UserError(f"no images in {flag} {pattern} (looked for {' '.join(EXTENSIONS)})")
    if None in names and len(names) > 1:
        raise UserError(f"{flag} {pattern} holds images with and without a class")
    rows.sort(key=lambda row: (row[0] or "", *row[1:]))
    files = ["\0".join((path, str(offset), str(size), f"/{kind or ''}/{name}"))
             for kind, name, path, offset, size in rows]  # no path holds a \0
    return files, sorted(names - {None})


def parts_of(file):
    """(archive, offset, size, /CLASS/NAME) of one `scan_archives` file"""
    archive, offset, size, inside = file.split("\0")
    return archive, int(offset), int(size), inside


def read(file):
    """One `scan_archives` file as a file in memory.  raises: BadImage if its archive cannot be read"""
    path, offset, size, _ = parts_of(file)
    try:
        with open(path, "rb", buffering=0) as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size))
    except OSError as error:
        raise BadImage(str(error)) from None
