"""The arena: the paper's claims and the field's cheap numbers on the same rows (assets/arena_protocol.md).

A row is a configuration with one seed, trained and measured, and one line of assets/arena.jsonl. Tables,
verdicts, rank correlations and the figure come from these lines alone.
"""

import json
import math
import os
import platform
import re
from pathlib import Path

import torch

from plumbing.errors import ROOT, UserError
from plumbing.files import read_checkpoint, read_metrics, save_text, writable
from plumbing.processes import print0
from recipes.arena import CHOSEN, CONFIGURATIONS, FIRST, ORDER, PILOT_SEED, PRESET, RECIPES, SAMPLES
from studies.distances import plain_names
from studies.metrics import read_result
from studies.rows import compare, finished, measure, passed, run, seconds_of, shown
from studies.summary import commit
from studies.tables import number, print_table
from studies.verdicts import show

ASSETS = Path(os.path.relpath(ROOT)) / "assets"
VGG = ASSETS / "arena" / "vgg"  # of python -m studies export --half
EXTRACTORS = dict(a=ASSETS / "arena" / "resnet", b="lite0")


class Arena:
    """The commands of rows below a folder, and the numbers that they leave there."""

    def __init__(self, args):
        self.args, self.root = args, args.out or Path("runs") / "arena"

    def train(self, stage, folder, words, seed, fork=""):
        """(file that it makes, command)"""
        preset = f"{fork}.{PRESET}" if fork else PRESET
        return folder / f"{stage}.pt", [
            "train.py", "--stage", stage, "--preset", preset, *passed(self.args, "data", "device"),
            *words.split(), "--vgg", str(VGG), "--precision", "fp32", "--seed", str(seed),
            "--out", str(folder)]

    def measures(self, name, folder, ckpt, *words, by="ab"):
        """What measures a checkpoint by both classifiers, or by one of them."""
        more = ("--num", self.args.samples or SAMPLES) if ckpt.stem in ("ar", "nar") else ("--lpips", "none")
        batch = 500 if on_gpu(self.args) else 100  # a GPU waits for the host with few
        words = [*more, "--batch", batch, *passed(self.args, "device"), *words]
        return [measure(ckpt, EXTRACTORS[letter], self.root / "references",
                        folder / f"metrics_{name}_{letter}.json", *words) for letter in by]

    def row(self, name, seed):
        """(folder, its commands, those of the row that it builds on), a command being (file, words)."""
        c = CONFIGURATIONS[name]
        folder, base, words = self.root / f"{name.replace('/', '-')},seed={seed}", [], c.words
        tokenizer, prior = folder / "phase1.pt", folder / "ar.pt"
        if c.of:
            first, made, _ = self.row(c.of, seed)
            base = [command for command in made if command[0].name in ("phase1.pt", "ar.pt")]
            words += f" --tokenizer {first / 'phase1.pt'}"
        if "phase2" in c.stages:
            folder = folder.with_name(f"{folder.name},{CHOSEN}")
            words += f" {RECIPES[CHOSEN]}"
            tokenizer, prior = folder / "phase2.pt", first / "ar.pt"
        if "nar" in c.stages:
            tokenizer, prior, base = first / "phase1.pt", folder / "nar.pt", base[:1]
        commands = [self.train(stage, folder, words, seed, c.fork) for stage in c.stages]
        if not c.of:
            commands += self.measures("pfd", folder, tokenizer, "--perturb", by="b")
            commands += self.measures("ifd", folder, tokenizer, "--interpolate", by="b")
            commands.append(compare(tokenizer, folder / "compare.json", *passed(self.args, "device")))
        if "nar" not in c.stages:
            commands += self.measures("rec", folder, tokenizer)
        commands += self.measures("samples", folder, prior, "--tokenizer", tokenizer)
        return folder, commands, base

    def measured(self, name, seed):
        """The line of a finished row."""
        folder, commands, _ = self.row(name, seed)
        row = dict(configuration=name, seed=seed)
        ckpts = {path.stem: read_checkpoint(path, (path.stem,)) for path, _ in commands
                 if path.suffix == ".pt"}
        row |= {f"steps_{stage}": ckpt["step"] for stage, ckpt in ckpts.items()}
        for stage in ckpts:
            key = "val_l1" if "phase" in stage else "val_loss"
            seen = [line for line in read_metrics(folder / "metrics.jsonl")
                    if line["stage"] == stage and key in line]
            if len(seen) > 1:  # validations are a fifth of the run apart
                row[f"{stage}_last_fifth"] = seen[-1][key] - seen[-2][key]
            if key == "val_loss":
                nats, unigram = seen[-1][key], seen[-1]["unigram_entropy"]
                row |= dict(nats=nats, relative=nats / unigram, unigram=unigram, top1=seen[-1]["val_top1"],
                            bits_per_image=nats * ckpts[stage]["model_config"]["num_tokens"] / math.log(2))
        results = {path.stem: read_result(path) for path, words in commands
                   if path.suffix == ".json" and "--extractor" in words}
        for stem, result in results.items():
            letter, numbers = stem[-1], plain_names(result["results"])
            row |= {f"{key}_{letter}": numbers[key] for key in ("fd", "rfd", "pfd", "ifd") if key in numbers}
            if letter == "a":
                wanted = dict(metrics_rec_a=("psnr", "usage", "perplexity"),
                              metrics_samples_a=("precision", "recall", "class_accuracy")).get(stem, ())
                row |= {key: numbers.get(key) for key in wanted}
            row[f"extractor_{letter}"] = result["extractor_hash"]
            if "samples" in stem:
                row |= dict(samples=result["num_images"], images=result["reference_hash"])
        for path in (path for path, _ in commands if path.name == "compare.json"):
            probe = json.loads(path.read_text())[0]
            row |= dict(probe=probe["relative"], probe_bits=probe["bits_per_image"])
        return row | dict(
            vgg=next(iter(ckpts.values()))["vgg_hash"], commit=commit(), machine=machine(self.args),
            seconds=round(sum(seconds_of(path) for path, _ in commands)),
            commands=[self.told(words) for _, words in commands])

    def told(self, words):
        """A command without this machine's folders."""
        words = ["DIR" if word == self.args.data else word for word in words]
        return shown([re.sub(f"^{re.escape(str(self.root))}(?=/|$)", "runs/arena", word) for word in words])


def on_gpu(args):
    return args.device in ("auto", "cuda") and torch.cuda.is_available()


def machine(args):
    """Processor, threads of a command, torch, and the GPU if commands run there."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    about = dict(cpu=(names or [platform.processor()])[0], threads=1, torch=torch.__version__)
    return about | (dict(gpu=torch.cuda.get_device_name()) if on_gpu(args) else {})


def append(path, row):
    """One line more, unless this configuration and seed has one."""
    rows = read_rows(path)
    if (row["configuration"], row["seed"]) in {(r["configuration"], r["seed"]) for r in rows}:
        return
    check_rows([*rows, row], path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path):
    """The lines of a file of rows, checked."""
    return check_rows(read_metrics(path), path)


def check_rows(rows, path):
    """rows.  raises: UserError if one is there twice, or if another VGG, FID classifier, number of samples or
    other training images were used than in an earlier row: such rows do not belong into one table"""
    seen, first = set(), {}
    for row in rows:
        who = f"{row['configuration']}, seed {row['seed']}"
        if who in seen:
            raise UserError(f"{path} has two lines of {who}; delete one")
        seen.add(who)
        for key in ("vgg", "extractor_a", "extractor_b", "samples", "images"):
            if row.get(key) is None:  # a row of a prior alone has no VGG, and the first ones no images
                continue
            value, other = first.setdefault(key, (row[key], who))
            if value != row[key]:
                raise UserError(f"{path}: {who} has another {key} than {other}, so they do not belong into "
                                "one table; delete what is wrong")
    return rows


def chosen(args):
    """[(configuration, seed)] of --rows and --seeds in the protocol's order.

    raises: UserError for a name that is no configuration, and for seeds that are no numbers
    """
    names = args.rows.split(",") if args.rows else CONFIGURATIONS
    for name in names:
        if name not in CONFIGURATIONS:
            raise UserError(f"--rows {args.rows}: {name} is not one of {', '.join(CONFIGURATIONS)}")
    try:
        seeds = [range(int(low), int(high or low) + 1) for low, _, high in
                 (part.partition("-") for part in (args.seeds or "0-7").split(","))]
    except ValueError:
        raise UserError(f"--seeds {args.seeds}: expected numbers and ranges, for instance 0-3,6") from None
    return [(name, seed) for name, seed in ORDER if name in names and any(seed in part for part in seeds)]


def run_rows(args, path):
    """Trains and measures what the file lacks; returns what failed.

    A decoder of a row that was made elsewhere is left out: its tokens are not here, and pairs are of one
    machine.
    """
    there, rows, arena = read_rows(path), {}, Arena(args)
    made = {(row["configuration"], row["seed"]) for row in there}
    for has in {row["samples"] for row in there} - {args.samples or SAMPLES}:
        raise UserError(f"the rows of {path} have {has} samples: pass --samples {has}, or none")
    for name, seed in chosen(args):
        of = CONFIGURATIONS[name].of
        _, commands, base = arena.row(name, seed)
        if (name, seed) in made:
            continue
        if name in FIRST and (of, seed) in made and not all(finished(*command) for command in base):
            print0(f"{name}, seed {seed} is left out: {of} of this seed was made elsewhere")
            continue
        rows[f"{name}, seed {seed}"] = (name, seed), base + commands
    print0(f"{len(rows)} rows to make, {len(made)} are in {path}")

    def after(label):
        append(path, arena.measured(*rows[label][0]))
        print0(f"{label} is in {path}")

    return run([(label, commands) for label, (_, commands) in rows.items()], workers=args.workers or 1,
               threads=1, after=after)


def pilot(args, path):
    """One phase 1 at alpha = 1 and five phase 2s; the lowest mean rank of rFD by both classifiers wins."""
    arena, root = Arena(args), (args.out or Path("runs") / "arena") / "pilot"
    first = arena.train("phase1", root, "--alpha 1", PILOT_SEED)
    rows = {"phase 1": [first, *arena.measures("rec", root, first[0])]}
    for recipe, words in RECIPES.items():
        folder = root / recipe
        second = arena.train("phase2", folder, f"--alpha 1 {words} --tokenizer {first[0]}", PILOT_SEED)
        rows[recipe] = [first, second, *arena.measures("rec", folder, second[0])]
    failed = run(list(rows.items()), workers=args.workers or 1, threads=1) if args.run else []
    found = []
    for label, commands in rows.items():
        files = [file for file, _ in commands if file.suffix == ".json"]
        if not all(file.exists() for file in files):
            print0(f"{label} is missing")
            continue
        results = [plain_names(read_result(file)["results"]) for file in files]
        found.append(dict(
            recipe=label, rfd_a=results[0]["rfd"], rfd_b=results[1]["rfd"], psnr=results[0]["psnr"],
            seconds=round(sum(seconds_of(file) for file, _ in commands if file != first[0])),
            commands=[arena.told(words) for _, words in commands]))
    tried = {row["recipe"]: (row["rfd_a"], row["rfd_b"]) for row in found if row["recipe"] in RECIPES}
    ranks = mean_ranks(tried)
    print_table([["phase 2", "rFD by A", "rFD by B", "mean rank"], *(
        [row["recipe"], number(row["rfd_a"]), number(row["rfd_b"]), number(ranks.get(row["recipe"]))]
        for row in found)])
    if len(tried) == len(RECIPES):
        about = dict(seed=PILOT_SEED, best=best(ranks), ranks=ranks, commit=commit(),
                     machine=machine(args), rows=found)
        save_text(json.dumps(about, indent=1) + "\n", path)
        print0(f"\n{best(ranks)} has the lowest mean rank; wrote {path}")
    return failed


def mean_ranks(tried):
    """{recipe: (rFD by A, by B)} -> {recipe: mean of its ranks}; equal numbers share a rank."""
    from scipy.stats import rankdata

    if not tried:
        return {}
    ranks = rankdata(list(tried.values()), axis=0).mean(1)
    return dict(zip(tried, ranks.tolist(), strict=True))


def best(ranks):
    """The recipe of the lowest mean rank; a tie goes to the cosine, else to the first."""
    low = [recipe for recipe, rank in ranks.items() if rank == min(ranks.values())]
    return "cosine" if "cosine" in low else low[0]


def arena(args):
    """`python -m studies arena`"""
    path = ASSETS / "arena.jsonl"
    if args.pilot:
        failed = pilot(args, ASSETS / "arena_pilot.json")
    else:
        picture = path.with_suffix(".png")
        writable(picture)
        failed = run_rows(args, path) if args.run else []
        if rows := read_rows(path):
            show(rows, picture)
        else:
            print0(f"{path} has no rows yet; --data DIR --run makes them")
    if failed:
        raise UserError(f"{len(failed)} rows failed, see above and log.txt in their folders", code=1)
