"""What samples are compared with: features of real images, measured once for each extractor and kept."""

import hashlib
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
    pixels. Another process that makes the same statistics is waited for. A --reference in ADM's form names
    neither its images nor its features: these are the caller's word.
    """
    if args.reference:
        return adm_reference(args.reference, extractor.num_features)
    data, locks, waiting = images_of(args.ckpt, config, args.data)[split == "val"], [], False
    about = dict(reference=split, image_size=config["image_size"], **extractor.info)
    del about["extractor"], about["extractor_note"]  # which decide nothing

    def name():
        times = data.times() if isinstance(data, FolderData) else []
        return args.references / f"{split}_{mix(data.fingerprint, times, sorted(about.items())):016x}.pt"

    def chunks(done):
        for indices in my_chunks(len(data), args.batch, done):
            rows = extractor(torch.stack([data.view(i) for i in indices]))
            rows["labels"] = torch.tensor([data.label(i) for i in indices])
            if extractor.class_names != data.class_names:
                del rows["logits"]  # nothing to tell, and large
            yield indices[0], rows

    def lock():
        """Why to wait; "" once the file is there, or ours to make"""
        try:
            if not intact(path):
                locks.append(claim(args.references))
        except InUse as error:
            return str(error)
        return ""

    def finish():
        more = dict(reference_images=len(data), reference_hash=joint_hash(rows["digests"]),
                    reference_accuracy=class_accuracy(extractor, data.class_names, rows).get("all"))
        save_torch(reference_statistics(rows["features"]) | about | more, path)
        shutil.rmtree(parts)

    path = on_rank0(name)
    while reason := on_rank0(lock):
        if not waiting:
            print0(f"waiting: {reason}")
        waiting = True
        time.sleep(2)  # not inside `on_rank0`, where the other processes would give up
    if not on_rank0(lambda: intact(path)):
        extractor.check_number(len(data), f"{split} images")
        print0(f"reference: features of {len(data):,} {split} images -> {path}")
        parts = path.with_suffix(f".parts{args.batch}")
        rows = collect(chunks, parts, "reference", len(data))
        on_rank0(finish)
    return load_torch(path)


def adm_reference(path, width):
    """mu (F,) and sigma (F, F) of an npz, as ADM publishes them (VIRTUAL_imagenet256_labeled.npz).

    raises: UserError for another file, or of other features than `width`
    """
    try:
        with np.load(path) as arrays:  # pickled code is not executed
            mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(f"--reference {path} is missing or no npz with mu and sigma") from None
    if sigma.shape != (width, width) or mu.shape != (width,):
        raise UserError(f"--reference {path} has mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, this "
                        f"extractor {width} features")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
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
