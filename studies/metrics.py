"""Metrics of checkpoints: `python -m studies metrics`.

A number is told together with everything that decides it: HOW it was measured, and the weights, sampler and
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
from plumbing.data import images_of
from plumbing.errors import UserError, warn
from plumbing.files import read_checkpoint, save_text, writable
from plumbing.hashes import latent_hash, weights_hash
from plumbing.images import psnr, to_float, to_uint8
from plumbing.models import load_model, load_tokenizer_of
from plumbing.processes import mix, on_rank0, print0, setup_device, world
from plumbing.slices import collect, decode, reconstructions
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
    "view-val": "teacher-forced predictions of all validation images against these images",
}
UNREAD = {  # flags that decide nothing in a protocol
    **dict.fromkeys(("rfid-val", "pfid-val", "ifid-val"), SAMPLING.replace(".sample", "")),
    "view-val": SAMPLING.replace(".sample", "").removeprefix("tokenizer") + " lpips", "gfid-train": "lpips"}
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
    """`python -m studies metrics --ckpt FILE`"""
    evaluate(args, setup_device(args.device))


def evaluate(args, device):
    """Measures a checkpoint by its protocol and writes one JSON. An interrupted call goes on.

    returns: the result
    """
    ckpt = read_checkpoint(args.ckpt, ("phase1", "phase2", "ar", "nar"))
    config = ckpt["config"]
    protocol = "rfid-val" if ckpt["stage"] in ("phase1", "phase2") else "gfid-train"
    if args.predict:
        if ckpt["stage"] != "ar":
            raise UserError(f"--predict needs an ar.pt: a {ckpt['stage']} prior would see what it predicts")
        protocol = "view-val"
    for flag in ("perturb", "interpolate"):
        if getattr(args, flag):
            if protocol != "rfid-val":
                raise UserError(f"--{flag} needs a phase1.pt or phase2.pt, whose reconstructions it measures")
            protocol = f"{flag[0]}fid-val"
    if found := unread(args, UNREAD[protocol] + " data" * bool(args.reference and protocol == "gfid-train")):
        raise UserError(f"{found} changes nothing in {protocol}: {PROTOCOLS[protocol]}; leave it out")
    out = args.out or args.ckpt.with_name(f"metrics_{args.ckpt.stem}{'_view' * args.predict}"
                                          f"{'_perturbed' * args.perturb}{'_mixed' * args.interpolate}.json")
    on_rank0(lambda: read_result(out) if os.path.exists(out) else writable(out, suffix=".json"))
    extractor = Extractor(args.extractor, config["image_size"], device)
    if protocol != "gfid-train":
        val = images_of(args.ckpt, config, args.data)[1]
        if args.num not in (None, len(val)):
            raise UserError(f"this takes all {len(val)} validation images; leave --num out")
        args.num, names = len(val), val.class_names
        measure = measure_view if args.predict else measure_reconstructions
        measured, info = measure(args, extractor, val, device)
    else:
        args.num = args.num or 50_000
        measured, info = measure_samples(args, extractor, device)
        names = ckpt["class_names"] if info["classes"] else []
    extractor.check_number(args.num, "images")
    reference = load_reference(args, extractor, config, protocol.split("-")[1])
    mine = dict(
        protocol=plain(protocol, extractor.info["feature_layer"]), num_images=args.num,
        image_size=config["image_size"], **extractor.info, classes=None) | info
    if reference:  # in the first process
        mine |= {key: reference[key] for key in HOW if key.startswith("reference")}

    def known():
        """Whether this result is there already, and the name of the folder for its parts."""
        old = read_result(out) if out.exists() else {}
        there = old and all(old.get(key) == value for key, value in mine.items() if key != "extractor")
        if there:
            os.utime(out)  # newer than its checkpoint, also where both were copied
        elif old:
            print0(f"note: {out} holds another result, which this one replaces")
        keys = sorted((key, str(value)) for key, value in mine.items())
        return there, f".{out.stem}.{mix(*keys):016x}"

    there, parts = on_rank0(known)
    if there:
        print0(f"{out} is there already")
    else:
        rows = collect(measured, out.with_name(parts), mine["protocol"], args.num)

        def finish():
            seconds = rows["seconds"].sum().item()
            about = dict(
                checkpoint=str(args.ckpt), images_hash=joint_hash(rows["digests"]),
                results=results_of(protocol, rows, reference, info, extractor, names),
                seconds=round(seconds, 1), processes=world(), device=str(device),
                threads=torch.get_num_threads(), torch=torch.__version__,
                torch_fidelity=importlib.metadata.version("torch-fidelity"),
                command=shlex.join(["python", "-m", "studies", *sys.argv[1:]]))
            save_text(json.dumps(mine | about, indent=1) + "\n", out)
            print0(f"{args.num:,} images in {seconds:.0f} s, {args.num / seconds:.1f} images/s -> {out}")
            shutil.rmtree(out.with_name(parts))

        on_rank0(finish)
    result = on_rank0(lambda: read_result(out))
    print0(f"{result['protocol']}: {PROTOCOLS[protocol]}; {args.num:,} images, features of {args.extractor}")
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
    if protocol in ("rfid-val", "pfid-val", "ifid-val"):
        usage, perplexity = codebook_usage(count_codes(rows["tokens"], info["K"]))
        numbers = {f"{protocol[0]}{name}": numbers[name] for name in ("fid", "kid") if name in numbers}
        numbers |= dict(usage=usage, perplexity=perplexity)
        numbers |= {name: rows[name].double().mean().item()
                    for name in ("psnr", "ssim", "l1", "lpips") if name in rows}
    if protocol == "view-val":
        numbers = {f"view_{name}": numbers[name] for name in ("fid", "kid") if name in numbers}
        numbers |= {name: rows[name].double().mean().item() for name in ("top1", "nats_per_token")}
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
    tokenizer, ckpt = load_model(args.ckpt, ("phase1", "phase2"), device)
    lpips = load_lpips(args.lpips, device)
    shown = interpolated_reconstructions if args.interpolate else reconstructions
    shown = perturbed_reconstructions if args.perturb else shown

    def measured(done):
        for start, x, x_hat, tokens in shown(tokenizer, data, args.num, args.batch, device, done):
            a, b, indices = to_float(x, device), to_float(x_hat, device), range(start, start + len(x))
            rows = extractor(x_hat) | dict(
                tokens=tokens.int().cpu(), psnr=psnr(a, b), ssim=ssim(x, x_hat),
                l1=(a - b).abs().mean((1, 2, 3)).cpu(), labels=torch.tensor([data.label(i) for i in indices]))
            if lpips:
                rows["lpips"] = lpips(a, b).flatten().cpu()
            yield start, rows

    if args.lpips == "random":
        warn("--lpips random: that number means nothing")

    info = dict(tokenizer=latent_hash(tokenizer), decoder=weights_hash(tokenizer), batch=args.batch,
                K=tokenizer.codebook_size, lpips=weights_hash(lpips) if lpips else None, note=ckpt["note"])
    return measured, info


def measure_view(args, extractor, data, device):
    """(chunks for `collect`, what identifies the predictions): top-1 given the true tokens, decoded."""
    prior, ckpt = load_model(args.ckpt, ("ar",), device)
    tokenizer, decoder_ckpt = load_tokenizer_of(args.ckpt, ckpt, args.tokenizer, device)
    if prior.config.num_classes and data.class_names != ckpt["class_names"]:
        raise UserError(f"the classes of the images are not those that {args.ckpt} was trained on")

    def measured(done):
        for start, _, _, tokens in reconstructions(tokenizer, data, args.num, args.batch, device, done):
            labels = torch.tensor([data.label(i) for i in range(start, start + len(tokens))])
            known = labels.to(device) if prior.config.num_classes else None
            predicted, nats, hits = prior.predict(tokens, known)
            yield start, extractor(to_uint8(decode(tokenizer, predicted))) | dict(
                labels=labels, top1=hits.mean(1).cpu(), nats_per_token=nats.mean(1).cpu())

    return measured, dict(prior=weights_hash(prior), tokenizer=ckpt["tokenizer_hash"], batch=args.batch,
                          decoder=weights_hash(tokenizer), note=ckpt["note"] or decoder_ckpt["note"])
