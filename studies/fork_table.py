"""`visualize.py forks`: the plain tokenizer and the forks of docs/forking.md at one budget.

Which of the cheap numbers orders them as the distance of samples does?
"""

import json
import statistics

import torch

from plumbing.files import header, save_text
from plumbing.processes import print0
from recipes.ablations import Row
from recipes.options import visualize_args
from studies.distances import plain_names
from studies.metrics import read_result
from studies.probe import compare
from studies.tables import Table, finished, number, print_table, refuse_unlike, row_seconds, table

NAMES = ("lfq", "fsq", "simvq", "rotation", "ibq", "perturb", "crt", "align", "frozen", "phase3")
ROWS = [Row("plain", "plain|0", {}, ()), Row("plain, phase 1 + 2", "plain|0", {}, (), "phase2"),
        *(Row(name, f"{name}|0", {}, (), "phase2" if name == "phase3" else "phase1") for name in NAMES)]
SEEDS = (1, 2)  # besides 0, of the two that disagree most
CHEAP = dict(rfd="rFD", pfd="p-FD", relative="probe, bits over unigram")
COSTLY = dict(ar_fd="AR FD", nar_fd="NAR FD")


class ForkTable(Table):
    """Every row trains its own tokenizer and both priors with the preset's steps and one judge. All but two
    are measured after phase 1; `phase3` is a phase 2, and beside it stands the plain phase 2."""

    KIND = "forks"

    def __init__(self, args):
        super().__init__(args)
        self.table = dict(rows=ROWS)

    def run(self):
        """What is missing, then what is missing of the further seeds."""
        failed = super().run()
        more = self.seeded(self.all_measured(ROWS))
        self.table["rows"] = ROWS + more
        return super().run() if more and not failed else failed

    def all_measured(self, rows):
        return [found for found in map(self.measured, rows) if found]

    def seeded(self, rows):
        """Rows of two more seeds for the two forks that disagree most; none before all rows are measured."""
        again = disagreeing(rows) if len(rows) == len(ROWS) else []
        return [Row(f"{fork}, seed {seed}", f"{fork}|{seed}", {}, ()) for fork in again for seed in SEEDS]

    def row(self, name, decoder):
        fork, seed = name.split("|")
        folder, result = self.root / (fork if seed == "0" else f"{fork},seed={seed}"), {}
        words = ["--seed", seed, "--vgg", str(self.root / "judge" / "vgg.pt")]
        if fork != "plain":
            words += ["--preset", f"{fork}.{self.args.preset}"]
        stages = ("phase1", "ar", "phase2", "nar") if decoder == "phase2" else ("phase1", "ar", "nar")
        commands = [self.train(stage, folder, *words) for stage in stages]
        tokenizer = folder / f"{decoder}.pt"

        def measure(key, checkpoint, *more):
            result[key] = folder / f"metrics_{key}_{decoder}.json"
            commands.append((result[key], [
                "sample.py", "--ckpt", str(checkpoint), "--metrics", "--extractor", self.extractor,
                "--references", str(self.root / "references"), *self.device, *more, "--out",
                str(result[key])]))

        measure("rfid", tokenizer, "--lpips", "none")
        measure("pfid", tokenizer, "--lpips", "none", "--perturb")
        for stage in ("ar", "nar"):
            measure(stage, folder / f"{stage}.pt", "--tokenizer", str(tokenizer), "--num", str(self.samples),
                    "--precision", "bf16")
        return commands, result

    def measured(self, row):
        """The numbers of a row, or None while something is missing."""
        commands, files = self.row(row.name, row.decoder)
        if not all(finished(path, words) for path, words in commands):
            return None
        results = {key: plain_names(read_result(path)["results"]) for key, path in files.items()}
        numbers = {k: results["rfid"].get(k) for k in ("rfd", "psnr", "usage", "class_accuracy")}
        numbers |= dict(pfd=results["pfid"]["pfd"], **self.probe(files["rfid"].parent))
        for stage in ("ar", "nar"):
            numbers |= {f"{stage}_{k}": results[stage][k] for k in ("fd", "precision", "recall")}
            numbers[f"{stage}_class"] = results[stage].get("class_accuracy")
        made = [path for path, _ in commands if path.suffix == ".pt"]
        return dict(label=row.label, fork=row.name.split("|")[0], seed=int(row.name.split("|")[1]),
                    decoder=row.decoder, steps={path.stem: header(path)["step"] for path in made}, **numbers,
                    seconds=round(sum(row_seconds(path) for path, _ in commands)),
                    commands=[self.shown(words) for _, words in commands])

    def probe(self, folder):
        """`visualize.py compare` of its phase1.pt, kept in a file."""
        out, ckpt = folder / "compare.json", folder / "phase1.pt"
        known = json.loads(out.read_text()) if out.exists() else [{}]
        if out.exists() and out.stat().st_mtime < ckpt.stat().st_mtime or not known[0]:
            compare(visualize_args(["compare", str(ckpt), "--out", str(out), "--device", self.args.device]))
            known = json.loads(out.read_text())
        return {key: known[0][key] for key in ("relative", "bits_per_image", "unigram_bits_per_image")}

    def show(self):
        """Prints the table and the rank correlations; writes forks.json and forks.md."""
        rows = self.all_measured(ROWS)
        more = self.seeded(rows)
        self.table["rows"], more = ROWS + more, self.all_measured(more)
        names = CHEAP | dict(usage="usage", psnr="PSNR") | COSTLY
        names |= dict(ar_class="AR class", seconds="seconds")
        for key in ("rfid", "pfid", "ar", "nar"):
            files = {row.label: self.row(row.name, row.decoder)[1][key] for row in self.table["rows"]}
            results = {label: read_result(path) for label, path in files.items() if path.exists()}
            if results:
                refuse_unlike(results)
        lines = [["", *names.values()]]
        lines += [[row["label"], *(number(row[key]) for key in names)] for row in rows]
        lines += [[f"{fork}, {len(same)} seeds", *(spread(row[key] for row in same) for key in names)]
                  for fork, same in by_fork(rows + more).items()]
        text = [f"preset {self.args.preset}, one seed each unless told", "", print_table(lines), "",
                *orders(rows)]
        print0("\n".join(text[3:]))
        about = dict(preset=self.args.preset, set=self.args.set, torch=torch.__version__, rows=rows + more,
                     correlations=correlations(rows))
        self.root.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("json", json.dumps(about, indent=1)), ("md", "\n".join(text))):
            save_text(content + "\n", self.root / f"forks.{suffix}")
        for label, commands in self.missing():
            print0(f"missing for {label}: {len(commands)} commands, the first {self.shown(commands[0][1])}")
        print0(f"wrote {self.root / 'forks'}.json and .md")


def by_fork(rows):
    """{fork: its rows after phase 1} for the forks that have several seeds"""
    found = {fork: [row for row in rows if (row["fork"], row["decoder"]) == (fork, "phase1")]
             for fork in dict.fromkeys(row["fork"] for row in rows)}
    return {fork: same for fork, same in found.items() if len(same) > 1}


def spread(values):
    """mean ± standard deviation of numbers, "-" where one was not measured"""
    values = list(values)
    if None in values:
        return "-"
    return f"{number(statistics.mean(values))} ± {statistics.stdev(values):.2g}"


def after_phase_1(rows):
    """({number's name: its values}, forks) of the rows whose tokenizer is that of phase 1"""
    rows = [plain_names(row) for row in rows if row["decoder"] == "phase1"]
    return {name: [row[name] for row in rows] for name in (*CHEAP, *COSTLY)}, [row["fork"] for row in rows]


def correlations(rows):
    """Spearman's rank correlation of each cheap number with each distance of samples, over the rows that are
    measured after phase 1: {"cheap, costly": (rho, number of rows)}; nan for fewer than three rows."""
    from scipy.stats import spearmanr

    columns, names = after_phase_1(rows)
    if len(names) < 3:
        return {}
    return {f"{cheap}, {costly}": (float(spearmanr(columns[cheap], columns[costly]).statistic), len(names))
            for cheap in CHEAP for costly in COSTLY}


def disagreeing(rows, count=2):
    """The forks whose mean rank by the cheap numbers is furthest from that by the distances of samples."""
    from scipy.stats import rankdata

    columns, names = after_phase_1(rows)
    ranks = {name: rankdata(values) for name, values in columns.items()}
    gap = sum(ranks[name] for name in CHEAP) / len(CHEAP) - sum(ranks[name] for name in COSTLY) / len(COSTLY)
    return [names[i] for i in sorted(range(len(names)), key=lambda i: -abs(gap[i]))[:count]]


def orders(rows):
    """What the correlations say, a line for each cheap number."""
    found = correlations(rows)
    for cheap, name in CHEAP.items() if found else ():
        both = {title: found[f"{cheap}, {costly}"] for costly, title in COSTLY.items()}
        told = ", ".join(f"{rho:+.2f} with {title}" for title, (rho, _) in both.items())
        yield f"rank correlation of {name}: {told} ({max(n for _, n in both.values())} rows)"


def fork_table(args):
    """`visualize.py forks`"""
    table(args, ForkTable)
