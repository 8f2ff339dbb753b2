"""Files: what is written appears complete or not at all, and what is read was checked."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from plumbing.errors import InUse, UserError, one_line, warn
from plumbing.hashes import weights_hash

FORMAT = 5  # of the checkpoint files; train.py writes them
EXPORTED = ("format", "stage", "step", "config", "model_config", "class_names", "tokenizer_hash",
            "fingerprint", "note", "world", "seconds", "skips")  # of a checkpoint, beside its weights
NO_LOCKS = (  # how a file system says that it has none
    errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FOREIGN = []  # what opens files of other projects, (content, path) -> checkpoint or None: plumbing.models'


def claim(folder):
    """Makes a folder and locks it. The kernel frees the lock when the returned file is closed or this process
    ends, in any way. Where the file system has no locks, a warning takes the place of the lock.

    raises: InUse, a UserError that names the process which holds it
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sweep(folder)
    except BlockingIOError:
        lock.seek(0)
        raise InUse(f"{folder} is in use by process {lock.read()}; wait for it, or pass another "
                    "--out") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{folder} cannot be written to: {error}") from None
        warn(f"the file system of {folder} has no locks, so nothing keeps two runs in this folder apart")
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


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
        folder = os.open(path.parent, os.O_RDONLY)  # the new name goes to the disk, too
        with contextlib.suppress(OSError):  # CIFS and some of FUSE cannot
            os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}); all that was saved before is intact",
                        code=1) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_text(text, path):
    """Writes text as UTF-8 in every locale. A name that is no UTF-8, as file systems allow, is escaped."""
    save_atomic(lambda p: p.write_text(text, "utf-8", "backslashreplace"), path)


def sweep(folder):
    """Deletes what `save_atomic` left in a folder where a process was killed."""
    for path in folder.glob(".tmp[0-9]*"):
        path.unlink()


def save_torch(thing, path):
    """torch.save in an atomic way; its zip file carries a checksum of every part."""

    def write(temporary):
        try:
            torch.save(thing, temporary)
        except RuntimeError as error:  # what torch's writer makes of a full disk
            raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from None

    save_atomic(write, path)


def load_torch(path, mmap=False):
    """What torch.save wrote, on the CPU whatever device it was on. Pickled code is never executed.

    mmap: tensors are read when they are used, but those of a file of the form before torch 1.6 at once
    """
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and begins(path) == b"PK")


def check_digest(path):
    """raises: ValueError if a file's name ends in a dash and eight or more hex digits, as published ones do,
    and its sha256 does not begin with these"""
    digits = re.search("-([0-9a-f]{8,64})$", Path(path).stem)
    if digits:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(digits[1]):
            raise ValueError(f"{path} is damaged (its sha256 begins with {digest[:8]}); fetch it again")


def begins(path, length=2):
    with open(path, "rb") as file:
        return file.read(length)


def reason(path, error):
    """Why `load_torch` refused a file, in words; "wrong checksum" only where one is wrong."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of mmap, where a file was cut off
        return one_line(error)
    if begins(path) == b"PK" and not intact(path):
        return "wrong checksum"
    if begins(path, 9)[8:] == b"{":
        return "a safetensors file; torch.save what safetensors.torch.load_file gives"
    if begins(path) != b"PK" or isinstance(error, pickle.UnpicklingError):
        return "code, or no file of torch.save; torch.save its state dict alone from where you trust it"
    return one_line(error)


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
    """Whether every checksum in a file of torch.save is right; torch.load checks none."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except PermissionError:  # which is no damage
        raise
    except Exception:  # zipfile fails in many ways
        return False


def newest_intact(path):
    """The checkpoint from which a stage goes on, or None: X.next.pt, X.pt or X.previous.pt, the newest intact
    one. It is X.pt from then on; newer ones that are damaged are set aside, with a warning.

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
    elif good == names[2]:  # the next command looks for X.pt
        os.replace(good, path)
    return path if good else None


def is_checkpoint(source):
    """Whether a word names a checkpoint of ours, X.pt or an exported folder, and not weights of others."""
    return Path(source).suffix == ".pt" or (Path(source) / "config.json").is_file()


def read_checkpoint(path, stages):
    """The checkpoint dict in `path`, which must be of one of `stages`. Pickled code is never executed.

    Keys: format, stage, step, config (the run's preset), model_config, model (weights), ema (weights or
    None), class_names, tokenizer_hash, fingerprint (of the data), vgg_hash (of the one in a phase's loss),
    note; to go on with: train (optimizers), world (processes), seconds, skips (updates left out).
    """
    path = Path(path)
    ckpt = read_export(path) if (path / "config.json").is_file() else read_file(path)
    if not isinstance(ckpt, dict) or not {"format", "stage", "model"} <= ckpt.keys():
        ckpt = next(filter(None, (opened(ckpt, path) for opened in FOREIGN)), ckpt)
    if not isinstance(ckpt, dict) or not {"format", "stage", "model"} <= ckpt.keys():
        held = ", ".join(map(str, list(ckpt)[:4])) if isinstance(ckpt, dict) else type(ckpt).__name__
        raise UserError(f"{path} is not a checkpoint of this project (it holds {held})")
    if ckpt["format"] != FORMAT:
        raise UserError(f"{path} has format {ckpt['format']}, this code reads {FORMAT}; use the code of then")
    if ckpt["stage"] not in stages:
        raise UserError(f"{path} is of stage {ckpt['stage']!r}; this needs {' or '.join(stages)}")
    return ckpt


def read_file(path):
    """What a file of torch.save holds.  raises: UserError for one that is missing, damaged or another file"""
    if not path.is_file():
        near = path.with_suffix("")  # X.pt of a run is X of an export
        there = f"; {near} is one" * is_checkpoint(near)
        there = "; it is a folder, name a stage in it" if path.is_dir() else there
        raise UserError(f"no checkpoint {path}{there}")
    try:
        if begins(path) == b"PK" and not intact(path):  # an old form has no checksums
            raise ValueError
        return load_torch(path)
    except Exception as error:  # torch.load fails in many ways
        why = reason(path, error)
        raise UserError(f"{path} is damaged or no checkpoint ({why}); name another one") from None


def read_export(folder):
    """The checkpoint dict of a folder that `python -m studies export` wrote; its weights are float32, also
    where the file holds them in half precision."""
    try:
        about = json.loads((folder / "config.json").read_text())
        weights = {name: tensor.float() if tensor.dtype == torch.float16 else tensor
                   for name, tensor in load_file(folder / "model.safetensors").items()}
        about |= dict(model=weights, ema=None, train={})
        if not {*EXPORTED} <= about.keys() or weights_hash(about["model"]) != about["weights_hash"]:
            raise ValueError
        if about.get("latent_of"):  # of phase 1 the decoder only
            latent = read_export(folder.with_name(about["latent_of"]))["model"]
            about["model"] = {k: v for k, v in latent.items() if not k.startswith("decoder.")} | weights
    except Exception:  # safetensors has errors of its own
        raise UserError(f"{folder} is damaged or no exported model: config.json, model.safetensors"
                        ) from None
    return about


def header(path):
    """A checkpoint without what holds tensors; its checksum is not looked at.

    raises: UserError for a file that cannot be read or is no checkpoint
    """
    try:
        ckpt = load_torch(path, mmap=True)
        return {key: value for key, value in ckpt.items() if key not in ("model", "ema", "train")}
    except Exception as error:
        raise UserError(f"{path} is damaged or no checkpoint ({reason(path, error)}); move it away") from None


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; one that a kill tore in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def writable(path, flag="--out", suffix=None):
    """Tries whether a file can be made at `path`, so that a bad place is known before the work.

    raises: UserError if it cannot be, if a folder is there, or if `path` does not end in `suffix`
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        there = next(p for p in path.absolute().parents if p.exists())
        probe = there / f".tmp{os.getpid()}.{path.name}"
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror or error}; pass another place"
                        ) from None
    if suffix not in (None, path.suffix.lower()):
        raise UserError(f"{flag} {path} must end in {suffix}, the kind of file that is written")
