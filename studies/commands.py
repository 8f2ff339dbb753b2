"""The studies and what each reads: `python -m studies` lists them. Without torch: --help answers at once.

A study is a line here: what answers it (module.function, which takes the namespace), the keys of
recipes/flags.py that it reads, and what it is.
"""

import importlib
import sys

import forks
from recipes.ablations import TABLES
from recipes.flags import SAMPLER, new_parser, read, unread
from recipes.options import NAR, SAMPLING, find_preset
from recipes.values import check_values, hint

USAGE = "python -m studies NAME [...]; its flags: python -m studies NAME --help"
FEATURES = "extractor references reference"
STUDIES = dict(
    metrics=("metrics.metrics", "results ckpt.metrics perturb interpolate num images "
             f"{FEATURES} lpips {SAMPLING} batch.sample out device",
             "Distances of samples or reconstructions from real images; or results side by side."),
    sweep=("sweep.sweep", f"sweep ckpt num images {FEATURES} {SAMPLING} batch.sample out device",
           "Metrics of samples for each value of a setting of the sampler, a CSV and a plot."),
    edit=("edit.edit", f"image ckpt box mask onto num classes tokenizer format.edit out seed.sample {NAR} "
          "batch.sample device", "Redraws a part of an image with a nar.pt (in-, outpainting, class)."),
    tokens=("tokens.tokens", "ckpt.tokens images decode batch.sample out device",
            "Tokens of all validation images as a safetensors file, or the images of such a file."),
    compare=("probe.compare", "tokenizers images steps.probe samples.probe out device",
             "A probe of tokenizers on the same images: bits per image of a small prior, PSNR, stability."),
    balance=("balance.balance", "ckpt.balance images vgg.balance num out device",
             "Sizes and gradients of the perceptual loss's layers beside L1's."),
    arena=("arena.arena", "run pilot rows seeds data workers.rows samples out.rows device",
           "The paper's claims and the field's cheap numbers, decided on the same rows."),
    report=("report.report", "folder num images out device", "One HTML page of the folder of a run."),
    export=("export.export", "folder out.export half",
            "Hands a run on: config.json, model.safetensors and a card."),
    watch=("watch.watch", "folder to every once", "Shows a run in TensorBoard or Weights & Biases."))
TABLE = "preset data run stages samples nproc workers extractor.table set out.rows device"


def studies():
    """{name: (module.function, keys, line, fork or None)} of all studies, tables and tables of forks."""
    found = {name: (*study, None) for name, study in STUDIES.items()}
    found |= {name: ("tables.table", TABLE, table["title"] + ".", None) for name, table in TABLES.items()}
    for fork in forks.names():
        for name in forks.shown(fork, ["TABLES"]):
            title = forks.load(fork).TABLES[name]["title"]
            found.setdefault(name, ("tables.table", TABLE, f"{title}.", fork))
    return found


def study_args(words=None):
    """The namespace of a command line: the study's flags, its name as `figure`, its `answer` and `fork`."""
    words, found = sys.argv[1:] if words is None else [*map(str, words)], studies()
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n")
        print("\n".join(f"  {name:10s} {line}" for name, (_, _, line, _) in found.items()))
        sys.exit(0)
    name, *words = words
    if name not in found:
        new_parser("", "").error(f"no study {name!r}; {hint(name, found)}")
    answer, keys, line, fork = found[name]
    parser = new_parser(line, keys, f"python -m studies {name}")
    args = read(parser, words)
    args.figure, args.answer, args.fork = name, answer, fork
    try:
        check(name, args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(name, args):
    """What the words of a study must be beside each other.  raises: ValueError"""
    if name == "metrics":
        if not args.files and not args.ckpt:
            raise ValueError("metrics needs --ckpt FILE, what is measured, or results to print side by side")
        if args.files and (found := unread(args, " ".join({*vars(args)} - {"files"}))):
            raise ValueError(f"{found} does nothing beside results, which are only printed; leave it out")
        args.answer = "tables.compare_metrics" if args.files else args.answer
    if name == "sweep":
        args.values = swept(args)
    if name in ("metrics", "sweep"):
        for key in ("perturb", "interpolate"):
            setattr(args, key, getattr(args, key, False))
        if args.perturb and args.interpolate:
            raise ValueError("--perturb and --interpolate are two measures; pass one")
        if args.reference and (found := unread(args, "references")):
            raise ValueError(f"{found} is not read beside --reference; leave it out")
    if name == "edit" and not (args.box or args.mask or args.onto):
        raise ValueError("edit needs --box, --mask or --onto")
    if name == "tokens" and args.decode and args.data:
        raise ValueError("--data is not read beside --decode, which takes the tokens of its file")
    if name == "arena" and (found := unread(args, "rows seeds" if args.pilot else "" if args.run else
                                            "rows seeds data workers samples out")):
        raise ValueError(f"{found} is of --run, which trains rows" + " and not of --pilot" * args.pilot)
    if name == "compare" and args.steps == 0:
        raise ValueError("--steps must be at least 1")
    if args.answer == "tables.table":
        if not args.stages or not set(args.stages.split(",")) <= {"phase1", "ar", "nar"}:
            raise ValueError(f"--stages takes phase1, ar, nar, separated by commas, got {args.stages!r}")
        if find_preset(args.preset)["fork"] != args.fork and args.fork:
            raise ValueError(f"{name} needs a preset of the fork {args.fork}, for instance --preset "
                             f"{list(forks.load(args.fork).PRESETS)[-1]}")


def swept(args):
    """NAME=V1,V2,... as [(name, value)].  raises: ValueError for another setting, and for no numbers"""
    name, _, values = args.sweep.partition("=")
    name = name.replace("-", "_").removeprefix("nar_").replace("steps", "nar_steps")
    if name not in SAMPLER:
        raise ValueError(f"{args.sweep}: {name} is no setting of a sampler; {hint(name, SAMPLER)}")
    if found := unread(args, name):
        raise ValueError(f"{found} is what is swept; leave it out")
    try:
        values = [(name, SAMPLER[name](value)) for value in values.split(",")]
    except ValueError:
        raise ValueError(f"{args.sweep}: expected NAME=NUMBER,NUMBER,...") from None
    for _, value in values:
        check_values({name: value}, lambda key: f"{args.sweep}: {key}")
    return values


def main(args):
    from plumbing.processes import one_line_errors

    with one_line_errors():
        module, function = args.answer.split(".")
        getattr(importlib.import_module(f"studies.{module}"), function)(args)
