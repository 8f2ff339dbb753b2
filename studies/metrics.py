"""Metrics of checkpoints: `python -m studies metrics`.

A number is shown together with everything that decides it: HOW it was measured, and the weights, sampler and
seed of what was measured. Only numbers of equal HOW may stand in one column.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch

from plumbing.codes import codebook_usage, count_codes
from plumbing.data import FolderData, images_of
from plumbing.errors import UserError
from plumbing.files import read_checkpoint, save_text, writable
from plumbing.hashes import latent_hash, weights_hash
from plumbing.images import psnr, to_float
from plumbing.models import load_model
from plumbing.processes import mix, on_rank0, print0, setup_device, world
from plumbing.slices import collect, reconstructions
from plumbing.weights import load_lpips
from recipes.flags import unread
from recipes.options import SAMPLING
from sample import sample
from studies.distances import fidelity, plain, ssim
from studies.extractors import Extractor
from studies.perturbed import interpolated_reconstructions, perturbed_reconstructions
from studies.references import class_accuracy, joint_hash, load_reference

PROTOCOLS = {  # of other features than Inception's they are rfd-val, pfd-val, ifd-val, gfd-train
    "rfid-val": "reconstructions of all validation images against these images",
    "pfid-val": "the same with half of the tokens swapped for near codes",
    "ifid-val": "the same with half of the tokens from the nearest other image",
    "gfid-train": "samples, classes in turn, against the central crops of all training images",
}
UNREAD = {  # flags that decide nothing in a protocol
    **dict.fromkeys(("rfid-val", "pfid-val", "ifid-val"), SAMPLING.replace(".sample", "")),
    "gfid-train": "lpips"}
PHASES = "phase1", "phase2"
HOW = ("protocol", "num_images", "image_size", "classes", "extractor_hash", "resize", "feature_layer",
       "reference", "reference_images", "reference_hash")

PUBLISHED = {  # (fork, K, f) of a public tokenizer: what others measured; docs/measuring.md says who
    ("taming", 1024, 16): dict(rfid=8.31, psnr=19.52, ssim=0.49),
    ("taming", 16384, 16): dict(rfid=5.00, psnr=20.01, ssim=0.50),
    ("llamagen", 16384, 16): dict(rfid=2.19, psnr=20.79, ssim=0.56),
    ("llamagen", 16384, 8): dict(rfid=0.59),
    ("maskgit", 1024, 16): dict(rfid=2.12, psnr=18.15, ssim=0.43)}


def read_result(path):
    """One JSON of metrics, older ones with today's names; raises UserError if it is none."""
    try:
        result = json.loads(Path(path).read_text())
        if {*HOW, "results", "images_hash"} <= result.keys():
            layer = result["feature_layer"]
            numbers = {plain(name, layer): value for name, value in result["results"].items()}
            return result | dict(protocol=plain(str(result["protocol"]), layer), results=numbers)
    except (OSError, ValueError, AttributeError):  # no file, no text, no JSON, no object
        pass
    raise UserError(f"{path} is no result of python -m studies metrics")


def metrics(args):
    evaluate(args, setup_device(args.device))


def evaluate(args, device):
    """Measures a checkpoint by its protocol and writes one JSON. An interrupted call goes on.

    returns: the result
    """
    ckpt = read_checkpoint(args.ckpt, PHASES if args.perturb or args.interpolate else (*PHASES, "ar", "nar"))
    config, protocol = ckpt["config"], "rfid-val" if ckpt["stage"] in PHASES else "gfid-train"
    protocol = "pfid-val" if args.perturb else "ifid-val" if args.interpolate else protocol
    if found := unread(args, UNREAD[protocol] + " data" * bool(args.reference and protocol == "gfid-train")):
        raise UserError(f"{found} changes nothing in {protocol}: {PROTOCOLS[protocol]}; leave it out")
    out = args.out or args.ckpt.with_name(f"metrics_{args.ckpt.stem}{'_perturbed' * args.perturb}"
                                          f"{'_mixed' * args.interpolate}.json")
    result = on_rank0(lambda: read_result(out) if os.path.exists(out) else writable(out, suffix=".json"))
    extractor = Extractor(args.extractor, config["image_size"], device)
    if protocol == "gfid-train":
        args.num = args.num or 50_000
        measured, info = measure_samples(args, extractor, device)
        names = ckpt["class_names"] if info["classes"] else []
    else:
        val = images_of(args.ckpt, config, args.data)[1]
        if args.num not in (None, len(val)):
            raise UserError(f"this takes all {len(val)} validation images; leave --num out")
        args.num, names = len(val), val.class_names
        measured, info = measure_reconstructions(args, extractor, val, device)
    extractor.check_number(args.num, "images")
    reference = load_reference(args, extractor, config, protocol.split("-")[1])
    called = plain(protocol, extractor.info["feature_layer"])
    how = dict(protocol=called, num_images=args.num, image_size=config["image_size"], **extractor.info,
               classes=None) | info
    how |= {key: reference[key] for key in HOW if key.startswith("reference")}

    def finish():
        seconds = rows["seconds"].sum().item()
        about = dict(
            checkpoint=str(args.ckpt), images_hash=joint_hash(rows["digests"]),
            results=results_of(protocol, rows, reference, info, extractor, names),
            seconds=round(seconds, 1), processes=world(), device=str(device),
            threads=torch.get_num_threads(), torch=torch.__version__,
            torch_fidelity=importlib.metadata.version("torch-fidelity"),
            command=shlex.join(["python", "-m", "studies", *sys.argv[1:]]))
        save_text(json.dumps(how | about, indent=1) + "\n", out)
        print0(f"{args.num:,} images in {seconds:.0f} s, {args.num / seconds:.1f} images/s -> {out}")
        shutil.rmtree(parts)
        return read_result(out)

    if result and all(result.get(key) == value for key, value in how.items() if key != "extractor"):
        os.utime(out)  # newer than its checkpoint, also where both were copied
        print0(f"{out} is there already")
    else:
        if result:
            print0(f"note: {out} holds another result, which this one replaces")
        key = mix(*sorted((key, str(value)) for key, value in how.items()))
        parts = out.with_name(f".{out.stem}.{key:016x}")
        rows = collect(measured, parts, called, args.num)
        result = on_rank0(finish)
    print0(f"{called}: {PROTOCOLS[protocol]}; {args.num:,} images, features of {args.extractor}")
    expected = published(ckpt) if protocol == "rfid-val" else {}
    for name, value in result["results"].items():
        beside = f"  (published: {expected[name]})" if name in expected else ""
        print0(f"  {name:28s} {value:.5g}{beside}" if isinstance(value, float) else f"  {name:28s} {value}")
    if expected:
        print0("published: of ImageNet's 50,000 validation images, 256x256; traps: docs/measuring.md")
    return result


def published(ckpt):
    """What PUBLISHED has for a public tokenizer as it came, {} for any other checkpoint."""
    sizes = ckpt["model_config"]
    marks = ckpt["config"].get("fork"), sizes.get("codebook_size"), 2 ** (len(sizes["channel_mult"]) - 1)
    return PUBLISHED.get(marks, {}) if ckpt["step"] == 0 else {}


def results_of(protocol, rows, reference, info, extractor, names):
    """The numbers of one protocol from the rows of all images: {name: number}, named by `plain`"""
    numbers = fidelity(rows["features"], rows["logits"], reference)
    if protocol != "gfid-train":  # the scores of samples say nothing of reconstructions
        usage, perplexity = codebook_usage(count_codes(rows["tokens"], info["K"]))
        numbers = {f"{protocol[0]}{name}": numbers[name] for name in ("fid", "kid") if name in numbers}
        numbers |= dict(usage=usage, perplexity=perplexity)
        numbers |= {name: rows[name].double().mean().item()
                    for name in ("psnr", "ssim", "l1", "lpips") if name in rows}
    accuracy = class_accuracy(extractor, names, rows)
    if accuracy:
        numbers |= dict(class_accuracy=accuracy.pop("all"), class_accuracy_by_class=accuracy,
                        class_accuracy_of_reference=reference["reference_accuracy"])
    return {plain(name, extractor.info["feature_layer"]): value for name, value in numbers.items()}


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
    tokenizer, ckpt = load_model(args.ckpt, PHASES, device)
    lpips = load_lpips(args.lpips, device)
    place = device if device.type == "cuda" else "cpu"  # of float64, which mps lacks
    decoded = (perturbed_reconstructions if args.perturb else
               interpolated_reconstructions if args.interpolate else reconstructions)

    def measured(done):
        for start, x, x_hat, tokens in decoded(tokenizer, data, args.num, args.batch, device, done):
            a, b, indices = to_float(x, device), to_float(x_hat, device), range(start, start + len(x))
            rows = extractor(x_hat) | dict(
                tokens=tokens.int().cpu(), psnr=psnr(a, b),
                ssim=ssim(x.to(place), x_hat.to(place)).cpu(),
                l1=(a - b).abs().mean((1, 2, 3)).cpu(), labels=torch.tensor([data.label(i) for i in indices]))
            if lpips:
                rows["lpips"] = lpips(a, b).flatten().cpu()
            yield start, rows

    info = dict(tokenizer=latent_hash(tokenizer), decoder=weights_hash(tokenizer), batch=args.batch,
                K=tokenizer.codebook_size, lpips=weights_hash(lpips) if lpips else None, note=ckpt["note"])
    if args.reference:  # whose hash says nothing of these images
        times = data.times() if isinstance(data, FolderData) else []
        info["images"] = f"{mix(data.fingerprint, times):016x}"
    return measured, info
