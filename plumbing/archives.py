"""Images in tar archives, read where they lie: `--data 'DIR/*.tar'` (docs/data.md).

An archive is looked through once; where each image begins and how long it is goes into an index beside the
run. From then on an image is one read at a place (`pread`): order, crops and fingerprint are those of the
same images in a folder.
"""

import codecs
import collections
import contextlib
import functools
import glob
import io
import json
import os
import tarfile

from plumbing.errors import UserError, warn
from plumbing.files import begins, save_text
from plumbing.images import BadImage
from plumbing.paths import braces, expanded, split_of
from plumbing.processes import mix, on_rank0, print0

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # how gz, bz2, xz and zst begin
OPEN = 64  # archives that a process holds open at a time
RULES = 2  # of `look_through`: an index that was made by others is made anew


def is_archive(source):
    """Whether `--data` names archives: FILE.tar or a pattern of such."""
    return isinstance(source, str | os.PathLike) and (
        str(source).lower().rstrip("}").endswith((".tar", *PACKED)))


def matches(pattern):
    """{name or pattern of an archive, without braces: the paths that there are}; a file of that very name
    comes before a pattern."""
    text = expanded(str(pattern))
    names = [text] if os.path.exists(text) else braces(text)
    return {name: [name] if os.path.exists(name) else glob.glob(name) for name in names}


def archives_of(pattern, flag):
    """Paths of the archives, sorted.  raises: UserError for one that is not there"""
    found = matches(pattern)
    missing = [name for name, paths in found.items() if not paths]
    if missing:
        one = f": {missing[0]} is not there" if len(found) > 1 else ""
        raise UserError(f"{flag} {pattern}: there is no such archive{one} (quote a pattern, so that the "
                        "shell leaves it alone)")
    return sorted({path for paths in found.values() for path in paths})


def look_through(path):
    """([(image name, its class or None, offset, size)], names of folders above the classes) of one archive.

    The class is the folder that holds the image, or what `key.cls` says beside `key.jpg` (WebDataset), there
    an int if it is a number, with "_" for "/". What is hidden is left out, as in a folder. Of members of one
    name the last counts, as for `tar x`.
    raises: UserError for a file that is no archive, damaged, cut off, compressed, with links or sparse files
            for images, or with a .cls that names no class
    """
    images, labels, odd, inner, size = {}, {}, {}, None, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                *above, name = [part for part in member.name.split("/") if part not in ("", ".")] or [""]
                place, lower = ("/".join(above), name), name.lower()
                if name.startswith(".") or any(part.startswith((".", "__")) for part in above):
                    continue
                odd.pop(place, None)
                if member.islnk() or member.issym() or member.sparse:
                    if lower.endswith((*EXTENSIONS, ".cls")):
                        odd[place] = f"{path}: {member.name} is {'sparse' if member.sparse else 'a link'}"
                elif not member.isfile():
                    continue
                elif member.offset_data + member.size > size:
                    raise UserError(f"{path} is cut off: {member.name} ends beyond its last byte")
                elif lower.endswith(EXTENSIONS):
                    images[place] = member.offset_data, member.size
                elif lower.endswith(".cls"):
                    labels[place] = class_in(archive.extractfile(member).read(1000), f"{path}: {member.name}")
                elif lower.endswith((".tar", *PACKED)):
                    inner = inner or member.name
                archive.members = []  # tarfile would keep a million of them
            end = archive.offset
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except tarfile.TarError as error:
        if begins(path, 6).startswith(COMPRESSED):
            raise UserError(f"{path} is compressed, and in such an archive no place can be read by itself; "
                            "unpack it to a plain .tar (images gain nothing from it)") from None
        raise UserError(f"{path} is damaged or no tar archive ({error})") from None
    if end > size or not ends(path, end):  # tarfile takes a damaged header for the end
        raise UserError(f"{path} is cut off or damaged after {len(images):,} images, or another archive was "
                        "appended to it: at its end are no zeros")
    if inner and not images:
        raise UserError(f"{path} holds archives ({inner}) and no images; unpack it, and pass those inside")
    for what in odd.values():
        raise UserError(f"{what}; pack the images themselves, with tar --dereference --hard-dereference and "
                        "without --sparse")
    folders = sorted({part for one in {folder for folder, _ in images} for part in one.split("/")[:-1]})
    classes = classes_of(path, images, labels)
    return [(place[1], classes.get(place, place[0].rpartition("/")[2] or None), offset, length)
            for place, (offset, length) in images.items()], folders


def class_in(content, name):
    """The class that the bytes of a .cls say: an int if it is a number.  raises: UserError for no text"""
    encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = content.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape").strip()
    except UnicodeDecodeError:
        text = ""
    if not 0 < len(text) <= 200 or not set(text).isdisjoint("\0\r\n"):
        raise UserError(f"{name} names no class: one line of text is wanted there, in UTF-8")
    return int(text) if text.isdecimal() else text.replace("/", "_")


def classes_of(path, images, labels):
    """{(folder, name) of an image: its class} by the .cls files of one archive, {} if it has none.

    images, labels: dicts by (folder, name); the values of labels are classes
    A key ends at the first dot. Where that gives a key two images or two labels, it ends at the last dot, as
    in n01440764.10026.JPEG.
    raises: UserError unless each image then has one label, and no other image has it too
    """
    def first(place):
        return place[0], place[1].split(".")[0]

    def key(place):
        return (place[0], place[1].rpartition(".")[0]) if first(place) in several else first(place)

    if not labels:  # every image counts, as in a folder
        dotted = [place for place in images if place[1].count(".") > 1]
        plain = {(folder, name.rpartition(".")[0]) for folder, name in images} if dotted else ()
        if beside := next((place for place in dotted if first(place) in plain), None):
            warn(f"{path}: {beside[1]} is taken for an image, as is what is called {first(beside)[1]} alone")
        return {}
    counts = [collections.Counter(map(first, part)) for part in (images, labels)]
    several = {place for count in counts for place, number in count.items() if number > 1}
    known = {key(place): kind for place, kind in labels.items()}
    used = collections.Counter(map(key, images))
    odd = [place for place in images if used[key(place)] > 1 or key(place) not in known]
    odd += [place for place in labels if first(place) in several and key(place) not in used]
    if odd:
        raise UserError(f"{path}: {'/'.join(odd[0]).lstrip('/')}: it is not clear which image has which "
                        "label; each image takes one .cls of its name (1.png and 1.cls), each .cls one image")
    return {place: known[key(place)] for place in images}


def ends(path, place):
    """Whether an archive ends at a place: with a block of zeros, and nothing but zeros after it."""
    with open(path, "rb") as file:
        file.seek(place)
        blocks = iter(lambda: file.read(2**20), b"")
        first = next(blocks, b"")
        return len(first) >= 512 and not first.strip(b"\0") and not any(b.strip(b"\0") for b in blocks)


def index_of(paths, keep):
    """{path: [[size, time, RULES], *look_through(path)]}; kept in the folder `keep`, and used while these
    three stay."""
    paths, kept, found, place = [*map(os.path.abspath, paths)], {}, {}, None
    if keep is not None:
        place = keep / f"archives-{mix(*paths):016x}.json"
        with contextlib.suppress(OSError, ValueError):  # none is there, or a damaged one
            kept = json.loads(place.read_text(encoding="utf-8"))
    if len(paths) > 20 and not kept:
        print0(f"looking through {len(paths)} archives, once")
    for path in paths:
        about = [os.stat(path).st_size, os.stat(path).st_mtime_ns, RULES]
        found[path] = kept.get(path)
        if not found[path] or found[path][0] != about:
            found[path] = [about, *look_through(path)]
    if place and found != kept:
        try:
            save_text(json.dumps(found), place)
        except UserError as error:  # a folder that may only be read
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


@functools.lru_cache(OPEN)  # a file that falls out of it is closed
def opened(path, process):
    return open(path, "rb", buffering=0)


def read(file):
    """One `scan_archives` file as a file in memory.  raises: BadImage if its archive cannot be read"""
    path, offset, size, _ = parts_of(file)
    try:  # each process opens its own files
        return io.BytesIO(os.pread(opened(path, os.getpid()).fileno(), size, offset))
    except OSError as error:
        raise BadImage(str(error)) from None
