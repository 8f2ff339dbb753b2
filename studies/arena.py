"""The arena: the paper's claims and the field's cheap numbers on the same rows (assets/arena_protocol.md).

A row is a configuration with one seed, trained and measured, and one line of assets/arena.jsonl. Tables,
verdicts, rank correlations and the figure come from these lines alone.
"""

import json
import math
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from plumbing.drawing import new_figure, save_figure
from plumbing.errors import ROOT, UserError
from plumbing.files import read_checkpoint, read_metrics, save_text, writable
from plumbing.processes import print0
from studies.distances import plain_names
from studies.metrics import read_result
from studies.rows import compare, finished, measure, run, seconds_of, shown
from studies.tables import number, print_table

PRESET, SAMPLES = "claims", 10_000
ASSETS = Path(os.path.relpath(ROOT)) / "assets"
VGG = ASSETS / "arena" / "vgg"  # of python -m studies export --half
EXTRACTORS = dict(a=ASSETS / "arena" / "resnet", b="lite0")
FIRST = ("A0", "A1", "P0", "P1", "C2")  # of one seed: made in one session on one machine, compared in pairs
FORKS = ("lfq", "fsq", "simvq", "rotation", "ibq", "perturb", "crt", "align", "frozen")


@dataclass
class Configuration:
    """Flags of train.py, stages, the configuration whose phase 1 (and AR prior) it builds on, and a fork."""

    words: str
    stages: tuple = ("phase1", "ar")
    of: str = ""
    fork: str = ""


CONFIGURATIONS = {
    "A0": Configuration("--alpha 0"),
    "A1": Configuration("--alpha 1"),
    "P0": Configuration("--alpha 0", ("phase2",), "A0"),
    "P1": Configuration("--alpha 1", ("phase2",), "A1"),
    "C2": Configuration("--alpha 1 --set phase2.alpha=1", ("phase2",), "A1", "noattention"),
    **{fork: Configuration("--alpha 1", fork=fork) for fork in FORKS},
    "L4": Configuration("--set phase1.layers=L4"),
    "A.4": Configuration("--alpha 0.4"),
    "NAR0": Configuration("--alpha 0", ("nar",), "A0"),
    "NAR1": Configuration("--alpha 1", ("nar",), "A1"),
    "E": Configuration("--ablation E"),
    "K/4": Configuration("--alpha 0 --set tokenizer.codebook_size=64"),
}


def in_turn(names, seeds):
    return [(name, seed) for seed in seeds for name in names]


ORDER = [*in_turn(FIRST, range(4)), *in_turn(FORKS, [0]), *in_turn(FIRST, range(4, 8)), *in_turn(FORKS, [1]),
         *in_turn(["L4"], range(4)), *in_turn(["A.4"], range(4)), *in_turn(["NAR0", "NAR1"], range(3)),
         *in_turn(["E"], range(2)), *in_turn(["K/4"], range(2))]

RECIPES = dict(  # of phase 2: what the pilot compares; the preset's is a constant 2e-4
    constant="", cosine="--set phase2.schedule=cosine --set phase2.lr_end=3e-5",
    low="--set phase2.lr=3e-5",
    r1="--set phase2.schedule=cosine --set phase2.lr_end=3e-5 --set phase2.r1_gamma=10",
    no_adversary="--set phase2.adv_weight=0")
CHOSEN = "cosine"  # by the pilot
PILOT_SEED = 100

# ----------------------------------------------------------------------------------------------------------
# Making rows
# ----------------------------------------------------------------------------------------------------------


class Arena:
    """The commands of rows below a folder, and the numbers that they leave there."""

    def __init__(self, args):
        self.args, self.root = args, args.out or Path("runs") / "arena"
        self.device = ["--device", args.device] if args.device != "auto" else []

    def train(self, stage, folder, words, seed, fork=""):
        """(file that it makes, command)"""
        data = ["--data", self.args.data] if self.args.data else []
        preset = f"{fork}.{PRESET}" if fork else PRESET
        return folder / f"{stage}.pt", [
            "train.py", "--stage", stage, "--preset", preset, *data, *self.device, *words.split(), "--vgg",
            str(VGG), "--seed", str(seed), "--out", str(folder)]

    def measures(self, name, folder, ckpt, *words):
        """The same measured by both classifiers."""
        more = ("--num", self.args.samples or SAMPLES) if ckpt.stem in ("ar", "nar") else ("--lpips", "none")
        return [measure(ckpt, extractor, self.root / "references", folder / f"metrics_{name}_{letter}.json",
                        *more, *self.device, *words) for letter, extractor in EXTRACTORS.items()]

    def row(self, name, seed):
        """(folder, its commands, those of the row that it builds on), a command being (file, words)."""
        c = CONFIGURATIONS[name]
        folder = self.root / f"{name.replace('/', '-')},seed={seed}"
        base, words = [], c.words
        if c.of:
            first, made, _ = self.row(c.of, seed)
            base = [command for command in made if command[0].name in ("phase1.pt", "ar.pt")]
            words += f" --tokenizer {first / 'phase1.pt'}"
        if "phase2" in c.stages:
            folder = folder.with_name(f"{folder.name},{CHOSEN}")
            words += f" {RECIPES[CHOSEN]}"
        tokenizer, prior = folder / f"{c.stages[0]}.pt", folder / f"{c.stages[-1]}.pt"
        if "phase2" in c.stages:
            prior = first / "ar.pt"
        if "nar" in c.stages:
            tokenizer, base = first / "phase1.pt", base[:1]
        commands = [self.train(stage, folder, words, seed, c.fork) for stage in c.stages]
        if not c.of:
            commands += self.measures("pfd", folder, tokenizer, "--perturb")
            commands += self.measures("ifd", folder, tokenizer, "--interpolate")
            commands.append(compare(tokenizer, folder / "compare.json", *self.device))
        if "nar" not in c.stages:
            commands += self.measures("rec", folder, tokenizer)
        commands += self.measures("samples", folder, prior, "--tokenizer", tokenizer, "--precision", "bf16")
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
            row |= {f"{key}_{letter}": numbers[key] for key in ("rfd", "pfd", "ifd", "fd") if key in numbers}
            if letter == "a":
                wanted = dict(metrics_rec_a=("psnr", "usage", "perplexity"),
                              metrics_samples_a=("precision", "recall", "class_accuracy")).get(stem, ())
                row |= {key: numbers.get(key) for key in wanted}
            row[f"extractor_{letter}"] = result["extractor_hash"]
        for path in (path for path, _ in commands if path.name == "compare.json"):
            probe = json.loads(path.read_text())[0]
            row |= dict(probe=probe["relative"], probe_bits=probe["bits_per_image"])
        return row | dict(
            vgg=next(iter(ckpts.values()))["vgg_hash"], commit=commit(), machine=machine(),
            seconds=round(sum(seconds_of(path) for path, _ in commands)),
            commands=[self.told(words) for _, words in commands])

    def told(self, words):
        """A command without this machine's folders."""
        text = shown(words).replace(str(self.root), "runs/arena")
        return text.replace(self.args.data, "DIR") if self.args.data else text


def commit():
    """The commit of the code, with a + where files differ from it."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)


def machine():
    """Processor, threads of a command, and torch."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return dict(cpu=cpu, threads=1, torch=torch.__version__)


def append(path, row):
    """One line more, unless this configuration and seed has one."""
    if (row["configuration"], row["seed"]) in {(r["configuration"], r["seed"]) for r in read_rows(path)}:
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path):
    """The lines of a file of rows.

    raises: UserError if a row is there twice, or if another VGG or FID classifier was used than in an earlier
            row: such rows do not belong into one table
    """
    rows, seen, first = read_metrics(path), set(), {}
    for row in rows:
        who = f"{row['configuration']}, seed {row['seed']}"
        if who in seen:
            raise UserError(f"{path} has two lines of {who}; delete one")
        seen.add(who)
        for key in ("vgg", "extractor_a", "extractor_b"):
            if row.get(key) is None:  # a row of a prior alone has no VGG
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
    made, rows, arena = {(r["configuration"], r["seed"]) for r in read_rows(path)}, {}, Arena(args)
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
        about = dict(seed=PILOT_SEED, best=best(ranks), ranks=ranks, commit=commit(), machine=machine(),
                     rows=found)
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


# ----------------------------------------------------------------------------------------------------------
# The rules, as written in the protocol before the first row
# ----------------------------------------------------------------------------------------------------------

HALF_THE_PAPER = -0.145  # alpha = 1 lowers the paper's AR FID by 29 % (Table 6: 16.97 to 12.07)
CHEAP = dict(rfd_b="rFD (B)", pfd_b="p-FD (B)", ifd_b="iFD (B)", probe="probe, over unigram",
             relative="AR nats, over unigram", nats="AR nats", usage="usage")
UNRANKED = ("P0", "P1", "C2", "NAR0", "NAR1")  # they share tokens with others, or have no AR samples
DRAWS = 2000  # resamplings of an interval


@dataclass
class Gap:
    """A difference paired by seed: mean, 95 % interval of Student's t, seeds, mean of what is subtracted."""

    mean: float
    low: float
    high: float
    seeds: int
    base: float

    def __str__(self):
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}], {self.seeds} seeds"


def gap(rows, a, b, key):
    """Key of configuration `a` minus that of `b` over the seeds that both have; None below two seeds."""
    from scipy.stats import t

    values = {name: {row["seed"]: row[key] for row in rows
                     if row["configuration"] == name and row.get(key) is not None} for name in (a, b)}
    seeds = sorted(values[a].keys() & values[b].keys())
    if len(seeds) < 2:
        return None
    differences = np.array([values[a][seed] - values[b][seed] for seed in seeds])
    half = t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / math.sqrt(len(seeds))
    mean, base = differences.mean(), np.mean([values[b][seed] for seed in seeds])
    return Gap(float(mean), float(mean - half), float(mean + half), len(seeds), float(base))


def of_samples(b, a):
    """"gain", "worse", "no gain of half the paper's size" or "not decided" of a difference by B and by A."""
    if b is None or a is None or b.mean * a.mean <= 0:
        return "not decided"
    if b.high < 0:
        return "gain"
    if b.low > 0:
        return "worse"
    return "no gain of half the paper's size" if b.low > HALF_THE_PAPER * b.base else "not decided"


def falls(*gaps):
    """"holds" if all differences lie below 0, "does not hold" if one lies above, else "not decided"."""
    if None in gaps:
        return "not decided"
    if any(one.low > 0 for one in gaps):
        return "does not hold"
    return "holds" if all(one.high < 0 for one in gaps) else "not decided"


def verdicts(rows):
    """[(claim, verdict, [difference in words])]"""
    def samples(a, b, rule):
        by_b, by_a = gap(rows, a, b, "fd_b"), gap(rows, a, b, "fd_a")
        parts = [f"by B: {by_b}", f"by A: {by_a}"]
        if rule is of_samples and by_b:
            parts.append(f"half the paper's gain: {HALF_THE_PAPER * by_b.base:+.3g}")
        return rule(by_b, by_a), parts

    def below(by_b, by_a):
        agree = by_b and by_a and by_b.mean * by_a.mean > 0
        return falls(by_b) if agree else "not decided"

    nats = [gap(rows, "A1", "A0", key) for key in ("relative", "nats")]
    return [
        ("(a) AR FD, alpha = 1 minus alpha = 0", *samples("A1", "A0", of_samples)),
        ("(a) with equal decoder losses, P1 minus P0", *samples("P1", "P0", of_samples)),
        ("(b) AR nats, alpha = 1 minus alpha = 0", falls(*nats),
         [f"over unigram: {nats[0]}", f"raw: {nats[1]}"]),
        ("(d) AR FD, phase 2 at the same tokens, P1 minus A1", *samples("P1", "A1", below)),
        ("(d') AR FD, phase 2 and as many steps without it, P1 minus C2", *samples("P1", "C2", below)),
    ]


def ranked(rows, key):
    """{configuration: (cheap number, AR FD by B) of each seed}, (n, 2), of those that are ranked."""
    found = {}
    for row in rows:
        if row["configuration"] not in UNRANKED and None not in (row.get(key), row.get("fd_b")):
            found.setdefault(row["configuration"], []).append((row[key], row["fd_b"]))
    return {name: np.array(pairs) for name, pairs in found.items()}


def spearman(x, y):
    """Rank correlation along the last axis: Pearson's of the ranks; nan where one side is constant."""
    x, y = (np.sign(v[..., :, None] - v[..., None, :]).sum(-1) for v in (x, y))  # 2 rank - n - 1
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def resampled(pairs):
    """Means over seeds of DRAWS resamplings of configurations, and of seeds within each: (DRAWS, n, 2)"""
    draw, pairs = np.random.default_rng(0), list(pairs.values())
    out = np.empty((DRAWS, len(pairs), 2))
    which = draw.integers(len(pairs), size=(DRAWS, len(pairs)))
    for i, lines in enumerate(pairs):
        places = which == i
        out[places] = lines[draw.integers(len(lines), size=(places.sum(), len(lines)))].mean(1)
    return out


def correlation(pairs):
    """(Spearman's rho of the means over seeds, 2.5 % and 97.5 % of the resampled ones)"""
    means = np.array([lines.mean(0) for lines in pairs.values()])
    drawn = resampled(pairs)
    low, high = np.nanpercentile(spearman(drawn[..., 0], drawn[..., 1]), [2.5, 97.5])
    return float(spearman(means[:, 0], means[:, 1])), float(low), float(high)


def orders(rows):
    """{cheap number: rho, low, high, n, whether it orders, and the intervals without each configuration}.

    A number orders tokenizers as their samples do if its interval excludes 0 with all configurations and
    without each of them. Below five configurations there is none.
    """
    found = {}
    for key in CHEAP:
        pairs = ranked(rows, key)
        if len(pairs) < 5:
            continue
        rho, low, high = correlation(pairs)
        without = {name: correlation({k: v for k, v in pairs.items() if k != name}) for name in pairs}
        sure = all(a > 0 or b < 0 for _, a, b in [(rho, low, high), *without.values()])
        found[key] = dict(rho=rho, low=low, high=high, n=len(pairs), orders=sure, without=without)
    return found


# ----------------------------------------------------------------------------------------------------------
# Tables, and the figure
# ----------------------------------------------------------------------------------------------------------

COLUMNS = dict(fd_b="AR FD (B)", fd_a="AR FD (A)", rfd_b="rFD (B)", rfd_a="rFD (A)", nats="nats",
               relative="over unigram", bits_per_image="bits", probe="probe", pfd_b="p-FD (B)",
               ifd_b="iFD (B)", class_accuracy="class (A)", precision="precision", recall="recall",
               psnr="PSNR", usage="usage", perplexity="perplexity", phase1_last_fifth="L1, last fifth",
               ar_last_fifth="nats, last fifth", seconds="seconds")


def mean_and_half(values):
    """Mean of the seeds and half the width of its 95 % interval, in words."""
    from scipy.stats import t

    values = [value for value in values if value is not None]
    if len(values) < 2:
        return number(values[0] if values else None)
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.4g} ± {half:.2g}"


def by_configuration(rows):
    found = {name: [row for row in rows if row["configuration"] == name] for name in CONFIGURATIONS}
    return {name: same for name, same in found.items() if same}


def show(rows, path):
    """Prints the tables, the verdicts and the rank correlations, and draws the figure to `path`."""
    lines = [["", "seeds", *COLUMNS.values()]]
    for name, same in by_configuration(rows).items():
        numbers = [mean_and_half(row.get(key) for row in same) for key in COLUMNS]
        lines.append([name, str(len(same)), *numbers])
    print0(f"{len(rows)} rows of {len(ORDER)}; means over seeds ± half of the 95 % interval (NAR0, NAR1: of "
           "the masked prior)\n")
    print_table(lines)
    for claim, verdict, parts in verdicts(rows):
        print0(f"\n{claim}: {verdict}\n  " + "; ".join(parts))
    found = orders(rows)
    if found:
        print0("\nrank correlation with AR FD (B) over configurations, 95 % interval\n")
        worst = {key: min(one["without"], key=lambda name, one=one: abs(one["without"][name][0]))
                 for key, one in found.items()}
        print_table([["", "all", "configurations", "weakest without one", "orders"], *(
            [CHEAP[key], interval(one["rho"], one["low"], one["high"]), str(one["n"]),
             f"{worst[key]}: {interval(*one['without'][worst[key]])}", "yes" if one["orders"] else "no"]
            for key, one in found.items())])
    draw(rows, found.get("rfd_b"), path)
    print0(f"\nwrote {path} and {path.with_suffix('.json')}")


def interval(rho, low, high):
    return f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"


def draw(rows, found, path):
    """rFD against AR FD, both by B: a point for each row, the seeds of a configuration joined."""
    fig = new_figure(6.5, 5)
    axis, numbers = fig.subplots(), {}
    for i, (name, same) in enumerate(by_configuration(rows).items()):
        points = sorted((row["rfd_b"], row["fd_b"]) for row in same
                        if None not in (row.get("rfd_b"), row.get("fd_b")))
        if not points:
            continue
        x, y = zip(*points, strict=True)
        color, marker = f"C{i % 10}", "o" if name in FORKS else "s" if name in FIRST else "^"
        axis.plot(x, y, color=color, marker=marker, markersize=4, linewidth=0.8, alpha=0.8)
        axis.annotate(name, (np.mean(x), np.mean(y)), (4, 4), textcoords="offset points", fontsize=8,
                      color=color)
        numbers[name] = points
    title = "" if found is None else (
        f"rank correlation {interval(found['rho'], found['low'], found['high'])} over {found['n']} "
        "configurations")
    axis.set(xlabel="rFD: reconstructions", ylabel="AR FD: samples", title=title)
    save_figure(fig, path, dict(points=numbers, correlation=found))


def arena(args):
    """`python -m studies arena`"""
    path = ASSETS / "arena.jsonl"
    if args.pilot:
        failed = pilot(args, ASSETS / "arena_pilot.json")
    else:
        picture = path.with_suffix(".png")
        writable(picture)
        failed = run_rows(args, path) if args.run else []
        show(read_rows(path), picture)
    if failed:
        raise UserError(f"{len(failed)} rows failed, see above and log.txt in their folders", code=1)


if __name__ == "__main__":  # until `python -m studies` is there
    import argparse

    from plumbing.paths import as_path, expanded
    from plumbing.processes import one_line_errors

    parser = argparse.ArgumentParser()
    for flag in ("run", "pilot"):
        parser.add_argument(f"--{flag}", action="store_true")
    for flag in ("workers", "samples"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--data", type=expanded)
    parser.add_argument("--out", type=as_path)
    parser.add_argument("--rows")
    parser.add_argument("--seeds")
    parser.add_argument("--device", default="cpu")
    with one_line_errors():
        arena(parser.parse_args())
