"""Results side by side: the paper's Tables 1, 5, 6 and Fig. 5b, 7b, each row a run of its own."""

import json
import math
from pathlib import Path

import torch

import forks
from plumbing.data import is_folder
from plumbing.drawing import new_figure, save_figure
from plumbing.errors import UserError
from plumbing.files import header, save_text, writable
from plumbing.paths import as_path
from plumbing.preflight import build_on_meta
from plumbing.processes import print0
from plumbing.stages import SECTION
from recipes.ablations import TABLES
from recipes.options import STAGES, find_preset, train_args
from recipes.small import MILLISECONDS
from studies.distances import plain
from studies.extractors import feature_layer
from studies.metrics import HOW, read_result
from studies.rows import measure, missing, passed, run, seconds_of, shown


def refuse_unlike(first, other):
    """Numbers that were measured in different ways do not belong into one column.

    first, other: (name, result);  raises: UserError that names the first difference
    """
    (one, a), (two, b) = first, other
    both = "lpips" in a["results"] and "lpips" in b["results"]
    for key in (*HOW, *["lpips"] * both):
        if a[key] != b[key]:
            raise UserError(f"{one} and {two} cannot share a column: {key} is {a[key]} in the one and "
                            f"{b[key]} in the other; measure both alike")


def compare_metrics(args):
    """A table of results, one line each."""
    results = [(str(path), read_result(path)) for path in args.files]
    for other in results[1:]:
        refuse_unlike(results[0], other)
    how = results[0][1]
    names = [name for name, value in how["results"].items() if isinstance(value, float)]
    print0(f"{how['protocol']}, {how['num_images']:,} images, {how['image_size']} pixels, features of "
           f"{how['extractor']} ({how['extractor_hash']}), reference {how['reference_hash']}\n")
    print_table([["", *names], *(
        [path, *(number(result["results"].get(name)) for name in names)] for path, result in results)])


def table(args):
    """`python -m studies TABLE`: makes what is missing with --run, and shows what is there."""
    made = Table(args)
    failed = made.run() if args.run else []
    made.show()
    if failed:
        raise UserError(f"{len(failed)} rows failed, see above and log.txt in their folders", code=1)


def number(value):
    return "-" if value is None else f"{value:.4g}"


def print_table(lines):
    """Rows of words as a Markdown table; returns its text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines = lines[:1] + [["-" * width for width in widths]] + lines[1:]
    padded = [[word.ljust(width) for word, width in zip(line, widths, strict=True)] for line in lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in padded)
    print0(text)
    return text


class Table:
    """The rows of one table for one preset: what is there, what is missing, and the commands that make it.

    Rows that are one and the same training share a folder; all share the VGG, the FID classifier (WIDER times
    as wide as the VGG) and reference statistics.
    """

    WIDER = 3
    SAME = {"low": "baseline", "alpha=0": "baseline", "sem": "alpha=1"}

    def __init__(self, args):
        self.args, self.name = args, args.figure
        own = forks.load(args.fork).TABLES if args.fork else {}
        self.table = own.get(self.name) or TABLES.get(self.name, {})
        self.root = args.out or Path("runs") / f"{args.preset}-tables"
        preset = find_preset(args.preset)
        self.small, self.fork = preset["vgg"] == "own", preset["fork"]  # small ones train both classifiers
        drawn = 2000 if preset["data"] == "shapes" else 10_000 if self.small else 50_000
        self.samples = args.samples or drawn
        self.stages = args.stages.split(",")
        self.sets = [word for item in args.set for word in ("--set", item)]
        self.settings = dict(preset=args.preset, data=args.data, set=args.set)
        self.config = train_args(self.train("phase1", self.root)[1][1:])[1]  # that of a row without changes
        note = self.root / "settings.json"
        writable(note)
        if note.exists() and placed(json.loads(note.read_text())) != placed(self.settings):
            raise UserError(f"{note} tells of other settings ({note.read_text()}) than "
                            f"{json.dumps(self.settings)}; use the same, or another --out")
        own = str(self.root / "classifier" / "resnet.pt") if self.small else "inception"
        self.extractor = args.extractor or own

    def train(self, stage, folder, *words):
        """(file that it makes, command)"""
        words = [*passed(self.args, "preset", "data", "workers", "device"), *self.sets, *words]
        return folder / f"{stage}.pt", ["train.py", "--stage", stage, *words, "--out", str(folder)]

    def shared(self):
        """What all rows need: the VGG, and a FID classifier that no tokenizer is trained with."""
        if not self.small:
            return []
        vgg = self.train("vgg", self.root / "vgg")
        if self.args.extractor:
            return [vgg]
        wide = f"classifier.width={self.WIDER * self.config['classifier']['width']}"
        other = ["--arch", "resnet", "--seed", "1", "--set", wide]
        path, words = self.train("vgg", self.root / "classifier", *other)
        return [vgg, (path.with_name("resnet.pt"), words)]

    def row(self, ablation, decoder):
        """The commands of a row, [(file that it makes, command)]; and {column prefix: result file}."""
        run = self.SAME.get(ablation, ablation)
        if run == "entropy" and not self.small:  # no warm start at full scale, so this is the baseline too
            run = "baseline"
        folder, result = self.root / run, {}
        words = ["--ablation", run, *(["--vgg", str(self.root / "vgg" / "vgg.pt")] * self.small)]
        commands, first = [self.train("phase1", folder, *words)], folder
        shared = getattr(forks.load(self.fork), "TOKENIZER_OF", {}).get(run) if self.fork else None
        if shared:  # the tokenizer of another row
            commands, first = self.row(shared, decoder)[0][:1], self.root / shared
            words += ["--tokenizer", str(first / f"{decoder}.pt")]
        later = ["phase2"] * (decoder == "phase2") + [s for s in ("ar", "nar") if s in self.stages]
        commands += [self.train(stage, folder, *words) for stage in later]
        for stage in self.stages:
            checkpoint = first / f"{decoder}.pt" if stage == "phase1" else folder / f"{stage}.pt"
            result[stage] = folder / f"metrics_{checkpoint.stem}_{decoder}.json"
            more = ["--lpips", "none"] * self.small
            if stage != "phase1":
                more = ["--tokenizer", first / f"{decoder}.pt", "--num", self.samples]
            commands.append(measure(checkpoint, self.extractor, self.root / "references", result[stage],
                                    *passed(self.args, "device"), *more))
        return commands, result

    def rows(self):
        """[(label, commands)] of all rows; what they share comes first."""
        rows = [(row.label, self.row(row.name, row.decoder)[0]) for row in self.table["rows"]]
        return [("VGG and FID classifier", self.shared()), *rows]

    def run(self):
        """Runs what is missing; returns what failed."""
        build_on_meta(self.config, STAGES)  # a wrong --set is refused before anything is written
        save_text(json.dumps(self.settings), self.root / "settings.json")
        return run(self.rows(), self.args.nproc)

    def measured(self, row):
        """One row for the JSON, and {stage: result}, as far as they are there."""
        commands, files = self.row(row.name, row.decoder)
        results = {stage: read_result(path) for stage, path in files.items() if path.exists()}
        ours = {}
        for stage, result in results.items():
            prefix = "" if stage == "phase1" else f"{stage}_"
            ours |= {prefix + k: v for k, v in result["results"].items() if isinstance(v, float)}
        there = [path for path, _ in commands if path.exists()]
        return dict(
            label=row.label, ablation=row.name, ours=ours,
            steps={path.stem: header(path)["step"] for path in there if path.suffix == ".pt"},
            paper=dict(zip(self.table["columns"], row.paper, strict=True)),
            seconds=round(sum(map(seconds_of, there))),
            files={stage: str(path) for stage, path in files.items()},
            commands=[shown(words, self.args.nproc) for _, words in commands]), results

    def show(self):
        """Prints the table, the paper's numbers beside ours; writes it as text and JSON."""
        columns, rows, first = self.table["columns"], [], {}
        names = {c: plain(c, feature_layer(self.extractor)) for c in columns}  # ours
        for row in self.table["rows"]:
            found, results = self.measured(row)
            rows.append(found)
            for stage, result in results.items():
                named = f"{row.label} ({stage})", result
                refuse_unlike(first.setdefault(stage, named), named)
        first = {stage: result for stage, (_, result) in first.items()}
        extra = ["perplexity"] * (self.name == "table5") + ["ar_class_accuracy", "nar_class_accuracy"]
        ours = [*names.values(), *(name for name in extra if any(name in row["ours"] for row in rows))]
        steps = ", ".join(f"{stage} {step:,}" for stage, step in rows[0]["steps"].items())
        measured = "; ".join(f"{stage}: {result['protocol']}, {result['num_images']:,} images, features of "
                             f"{result['extractor']}" for stage, result in first.items())
        print0(f"\n{self.table['title']}\npaper: {self.table['scale']}\nours: preset {self.args.preset}, "
               f"steps {steps or 'none yet'}; {measured or 'nothing measured yet'}\n")
        text = print_table([["", *(f"paper: {c}" for c in columns), *(f"ours: {c}" for c in ours)], *(
            [row["label"], *(number(row["paper"][c]) for c in columns),
             *(number(row["ours"].get(c)) for c in ours)] for row in rows)])
        words = [*self.sets, *passed(self.args, "data", "stages", "samples", "extractor"), "--run"]
        about = dict(
            title=self.table["title"], preset=self.args.preset, paper_scale=self.table["scale"],
            command=shown(["-m", "studies", self.name, "--preset", self.args.preset, *words]),
            how={stage: {key: result[key] for key in ("extractor", *HOW)} for stage, result in first.items()},
            threads=torch.get_num_threads(), torch=torch.__version__, rows=rows)
        if any(row["ours"] for row in rows):
            for suffix, content in (("json", json.dumps(about, indent=1)), ("md", text)):
                save_text(content + "\n", self.root / f"{self.name}.{suffix}")
            print0(f"\nwrote {self.root / self.name}.json and .md")
        if self.name == "fig5b" and all(names["rfid"] in row["ours"] for row in rows):
            draw_alpha(rows, first["phase1"]["extractor"], names, self.root / "fig5b_curves.png")
        self.tell_missing()

    def tell_missing(self):
        """A line for each row that lacks something, and how long --run takes, where recipes/small.py has the
        time of a step. Of other presets the commands, which whoever has several machines runs on these."""
        rows = [(label, commands) for label, commands, _ in missing(self.rows()) if commands]
        known, seconds = MILLISECONDS.get(self.args.preset), 0
        for label, commands in rows:
            names = [path.stem for path, _ in commands]
            if known:
                print0(f"  missing for {label}: {', '.join(names)}")
                steps = {name: self.config[SECTION[name]]["steps"] for name in names if name in known}
                seconds += sum(known[name] * count for name, count in steps.items()) / 1000
            else:
                print0("\n".join([f"\nmissing for {label}:", *(
                    f"  {shown(words, self.args.nproc)}" for _, words in commands)]))
        if seconds:
            print0(f"--run makes them, in about {math.ceil(seconds / 60)} minutes on an EPYC and the time of "
                   "measuring")


def draw_alpha(rows, extractor, names, path):
    """Fig. 5b: distances of reconstructions and of both priors' samples over alpha; ours alone."""
    alphas = [float(row["ablation"].removeprefix("alpha=")) for row in rows]
    fig = new_figure(6.5, 2.8)
    left, right = fig.subplots(1, 2)
    for axis, key, style in ((left, "rfid", "o-"), (right, "ar_fid", "s-"), (right, "nar_fid", "^-")):
        axis.plot(alphas, [row["ours"].get(names[key], math.nan) for row in rows], style)
    left.set(xlabel="α", ylabel="Fréchet distance", title="reconstructions")
    right.set(xlabel="α", title="samples")
    right.legend(["AR", "NAR"])
    fig.suptitle(f"lower is better; features of {Path(extractor).stem}")
    save_figure(fig, path, [dict(alpha=a, **row["ours"]) for a, row in zip(alphas, rows, strict=True)])


def placed(settings):
    """settings.json with the folder of images in one spelling"""
    data = settings.get("data")
    return dict(settings, data=str(as_path(data).resolve()) if is_folder(data) else data)
