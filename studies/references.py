"""What samples are compared with: features of real images, measured once for each extractor and kept."""

import hashlib
import pickle
import shutil
import time
import zipfile

import numpy as np
import torch

from plumbing.data import FolderData, images_of
from plumbing.errors import InUse, UserError
from plumbing.files import claim, intact, load_torch, save_torch
from plumbing.processes import mix, on_rank0, print0
from plumbing.slices import collect, my_chunks
from studies.distances import reference_statistics


def joint_hash(digests):
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]


def load_reference(args, extractor, config, split):
    """What all images of a split give, made once for each extractor; see `reference_statistics`.

    The cache goes by names, sizes and times of the files; the `reference_hash` of a result is that of all
    pixels. A --reference in ADM's form, an npz with mu and sigma, names neither its images nor its features:
    these are the caller's word. returns: the dict in the first process, None in others
    """
    if args.reference and args.reference.suffix == ".npz":
        return on_rank0(lambda: adm_reference(args.reference, extractor.num_features))
    data = None if args.reference else images_of(args.ckpt, config, args.data)[split == "val"]
    wanted = dict(reference=split, image_size=config["image_size"], **extractor.info)
    wanted = {k: v for k, v in wanted.items() if k not in ("extractor", "extractor_note")}

    def name():
        times = data.times() if isinstance(data, FolderData) else []
        return args.references / f"{split}_{mix(data.fingerprint, times, sorted(wanted.items())):016x}.pt"

    def chunks(done):
        for indices in my_chunks(len(data), args.batch, done):
            rows = extractor(torch.stack([data.view(i) for i in indices]))
            rows["labels"] = torch.tensor([data.label(i) for i in indices])
            if extractor.class_names != data.class_names:
                del rows["logits"]  # nothing to tell, and large
            yield indices[0], rows

    path, locks, printed = args.reference or on_rank0(name), [], ""

    def look():
        """made, ours to make, or the reason to wait for another process"""
        try:
            if not intact(path):
                locks.append(claim(args.references))
            return "made" if intact(path) else "ours"
        except InUse as error:
            return str(error)

    while (state := "made" if args.reference else on_rank0(look)) not in ("made", "ours"):
        if state != printed:
            printed = state
            print0(f"waiting: {state}")
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
            found.append(load_torch(path) if intact(path) else {})
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


def adm_reference(path, width):
    """mu (F,) and sigma (F, F) of an npz, as ADM publishes them (VIRTUAL_imagenet256_labeled.npz).

    raises: UserError for another file, or of other features than `width`
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(f"--reference {path} is missing or no npz with mu and sigma") from None
    if mu.shape != (width,) or sigma.shape != (width, width) or not sigma.isfinite().all():
        raise UserError(f"--reference {path} has mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, this "
                        f"extractor {width} features")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return dict(mu=mu.float(), sigma=sigma, reference=f"npz {path.name}", reference_images=None,
                reference_hash=digest, reference_accuracy=None)


def class_accuracy(extractor, class_names, rows):
    """Shares of images that the extractor puts into the class they should be of; {} for other classes."""
    if not class_names or extractor.class_names != class_names:
        return {}
    hits = (rows["logits"].argmax(1) == rows["labels"]).double()
    by_class = {name: hits[rows["labels"] == i].mean().item() for i, name in enumerate(class_names)
                if (rows["labels"] == i).any()}
    return {"all": hits.mean().item(), **by_class}
