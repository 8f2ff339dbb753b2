"""The experiment on the paper's claims."""

import json
import math
from pathlib import Path

import torch

from perceptual import NAMES, perceptual_terms
from plumbing.data import images_of
from plumbing.drawing import new_figure, save_figure
from plumbing.errors import UserError
from plumbing.files import header, read_checkpoint, read_metrics, save_text
from plumbing.images import to_float
from plumbing.models import load_model
from plumbing.processes import print0, setup_device
from plumbing.slices import decode
from recipes.ablations import CLAIMS, Row
from recipes.options import visualize_args
from studies.distances import plain_names
from studies.metrics import HOW, read_result
from studies.tables import Table, finished, print_table, refuse_unlike, row_seconds, table
from studies.verdicts import Spread, judge_claims
from visualize import draw, stability

ENDS = ("alpha=0", "alpha=1")
ORDER = (ENDS, ("alpha=0.4",), ("literal", "longer", "no-attention", "fewer-codes"),
         ("alpha=0.2", "alpha=0.6", "alpha=0.8"), ("D", "E"), ("five-pools,alpha=0", "five-pools,alpha=1"))
ROWS = [Row(f"{name}, seed {seed}", f"{name}|{seed}", {}, ())  # the protocol's order, all seeds of a group
        for names in ORDER for seed in range(3) for name in names if seed < CLAIMS[name].seeds]


class Claims(Table):
    """The experiment on the paper's claims: arms of CLAIMS, several seeds, equal budgets, two scorers. See
    assets/claims_protocol.md for what is measured and what counts as holding."""

    KIND = "claims"
    SHORT = ["phase1.steps=250", "phase2.steps=50", "ar.steps=250", "nar.steps=300", "ar.lr_start=100",
             "nar.lr_start=120", "ar.warmup=50", "nar.warmup=50", "code_variants=1"]  # for `demo`: one seed

    def __init__(self, args):
        if args.preset == "demo":
            args.set = self.SHORT + args.set
        super().__init__(args)
        self.table = dict(rows=[row for row in ROWS if args.preset != "demo" or row.name.endswith("|0")])
        self.second = str(self.root / "second" / "vgg.pt")

    def judge(self, arm):
        return self.root / ",".join(["judge", *([arm.judge] if arm.judge else [])])

    def shared(self):
        """The judges, one for each setting, and two scorers, as wide as each other, that no tokenizer is
        trained with: a ResNet, whose numbers are judged, and a VGG of another seed and all five pools."""
        judges = {self.judge(arm): ["--set", arm.judge] if arm.judge else [] for arm in CLAIMS.values()}
        found = [self.train("vgg", folder, *words) for folder, words in judges.items()]
        second = self.train("vgg", Path(self.second).parent, "--seed", "2", *self.wide(), "--set",
                            "judge.skip_pools=0")
        return [*found, *self.scorer(), second]

    def row(self, name, decoder):
        """All commands of an arm and seed, and its result files."""
        name, seed = name.split("|")
        arm, result = CLAIMS[name], {}
        folder = self.root / f"{name},seed={seed}"
        words = arm.words(self.config) if callable(arm.words) else arm.words
        words = [*words, "--seed", seed, "--vgg", str(self.judge(arm) / "vgg.pt")]
        if arm.strength != 1:
            weight = arm.strength * self.config["phase1"]["per_weight"]
            words += ["--set", f"phase1.per_weight={weight:.4g}"]
        if arm.fork:
            words += ["--preset", f"{arm.fork}.{self.args.preset}"]
        priors = ("ar", "nar") if arm.draws else ()
        stages = arm.phases if arm.priors else (*arm.phases, *priors)
        commands = [self.train(stage, folder, *words) for stage in stages]
        drawer = self.root / f"{arm.priors},seed={seed}" if arm.priors else folder

        def measure(key, checkpoint, *more):
            path = result[key] = folder / f"metrics_{key}.json"
            result[f"{key}_2"] = folder / f"metrics_{key}_2.json"
            commands.append((path, [
                "sample.py", "--ckpt", str(checkpoint), "--metrics", "--extractor", self.extractor,
                "--second", self.second, "--references", str(self.root / "references"), "--precision", "bf16",
                *self.device, *more, "--out", str(path)]))

        for phase in arm.phases:
            measure(f"rec_{phase}", folder / f"{phase}.pt", "--lpips", "none")
            for stage in priors:
                measure(f"{stage}_{phase}", drawer / f"{stage}.pt", "--tokenizer",
                        str(folder / f"{phase}.pt"), "--num", str(self.samples))
        if arm.draws and not arm.priors:
            measure("view", folder / "ar.pt", "--predict", "--tokenizer", str(folder / "phase1.pt"))
        return commands, result

    def done(self, name):
        """The finished commands of an arm and seed, and {name: result file} of them."""
        commands, files = self.row(name, "phase1")
        commands = [(path, words) for path, words in commands if finished(path, words)]
        made = [path for path, _ in commands]
        return commands, {key: path for key, path in files.items() if files[key.removesuffix("_2")] in made}

    def measured(self, name):
        """One line of the results: an arm's and seed's numbers so far, None before its reconstructions'."""
        commands, files = self.done(name)
        if "rec_phase1" not in files:
            return None
        name, seed = name.split("|")
        folder, results = files["rec_phase1"].parent, {key: read_result(path) for key, path in files.items()}
        trained = {path.stem: path for path, _ in commands if path.suffix == ".pt"}
        settings = read_checkpoint(trained["phase1"], ["phase1"])["config"]["phase1"]
        row = dict(arm=name, seed=int(seed), alpha=settings["alpha"], layers=settings["layers"],
                   per_weight=settings["per_weight"], odd=CLAIMS[name].odd)
        for key, result in results.items():
            tail = "_2" if key.endswith("_2") else ""
            row |= {f"{key.removesuffix(tail)}_{metric}{tail}": value
                    for metric, value in plain_names(result["results"]).items() if isinstance(value, float)}
        logged = read_metrics(folder / "metrics.jsonl")
        for stage, key in (("phase1", "val_l1"), ("ar", "val_loss"), ("nar", "val_loss")):
            seen = [r for r in logged if r["stage"] == stage and key in r]
            if stage not in trained:  # not yet, or the priors are another arm's
                continue
            last = seen[-1]  # is the curve flat? The validations are a fifth of the run apart
            row[f"{stage}_last_fifth"] = last[key] - seen[-2][key] if len(seen) > 1 else None
            if stage != "phase1":
                row |= {f"{stage}_nats": last["val_loss"], f"{stage}_top1": last["val_top1"],
                        f"{stage}_relative": last["val_loss"] / last["unigram_entropy"],
                        "unigram_entropy": last["unigram_entropy"]}
        row |= self.further(folder, results["rec_phase1"])
        return row | dict(
            steps={stage: header(path)["step"] for stage, path in trained.items()},
            seconds=round(sum(row_seconds(path) for path, _ in commands)),
            commands=[self.shown(words) for _, words in commands])

    @torch.no_grad()
    def further(self, folder, result):
        """Of 500 validation images: the share of tokens that change under each of `disturbed`, and the terms
        of Eq. 4 between images and reconstructions in the judge's layers. Kept in a file."""
        file, of = folder / "further.json", dict(tokenizer=result["tokenizer"], decoder=result["decoder"])
        numbers = json.loads(file.read_text()) if file.exists() else {}
        if not of.items() <= numbers.items():
            tokenizer, ckpt = load_model(folder / "phase1.pt", ("phase1",))
            judge, _ = load_model(self.root / "judge" / "vgg.pt", ("vgg",))
            images = images_of(folder / "phase1.pt", ckpt["config"])[1]
            x = torch.stack([images.view(i) for i in range(min(500, len(images)))])
            x = to_float(x, "cpu")
            terms = perceptual_terms(judge, x, decode(tokenizer, tokenizer.encode(x)), NAMES)
            numbers = of | {f"changed_by_{name}": share for name, share in stability(tokenizer, x).items()}
            numbers |= {f"judge_{name}": term.item() for name, term in terms.items()}
            save_text(json.dumps(numbers), file)
        return {name: value for name, value in numbers.items() if name not in of}

    def show(self):
        """Prints the table and the verdicts; writes claims.jsonl, claims.json, claims.md and Fig. 5b, 10 and
        11 (the latter two of the first seeds at alpha = 0 and 1)."""
        rows = {row.name: self.measured(row.name) for row in self.table["rows"]}
        found = [row for row in rows.values() if row]
        files = {name: self.done(name)[1] for name, row in rows.items() if row}
        measures = {}  # {what is measured: {run: result}}
        for name, paths in files.items():
            for key, path in paths.items():
                measures.setdefault(key, {})[name] = read_result(path)
        for results in measures.values():
            refuse_unlike(results)
        refuse_unequal(found, self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in found)
        save_text(lines, self.root / "claims.jsonl")
        for label, commands in self.missing():
            print0(f"missing for {label}: {len(commands)} commands, the first {self.shown(commands[0][1])}")
        if not found:
            return
        spread = Spread(found)
        names = {"rec_phase1_rfd": "rFD", "rec_phase1_rfd_2": "rFD, 2nd scorer",
                 "rec_phase2_rfd": "rFD, 1+2", "ar_phase1_fd": "AR FD", "ar_phase1_fd_2": "AR FD, 2nd",
                 "ar_phase2_fd": "AR FD, 1+2", "nar_phase1_fd": "NAR FD",
                 "nar_phase1_fd_2": "NAR FD, 2nd", "nar_phase2_fd": "NAR FD, 1+2",
                 "view_view_fd": "view FD", "ar_nats": "AR nats", "ar_relative": "AR nats / unigram",
                 "nar_relative": "NAR nats / unigram", "ar_top1": "AR top-1",
                 "ar_phase1_class_accuracy": "AR class", "nar_phase1_class_accuracy": "NAR class",
                 "ar_phase1_precision": "AR precision", "ar_phase1_recall": "AR recall",
                 "rec_phase1_psnr": "PSNR", "rec_phase1_usage": "usage", "changed_by_noise": "noise",
                 "judge_relu5_3": "judge relu5_3", "judge_logit": "judge logit"}
        table = [["arm (seeds)", *names.values()]]
        for arm in dict.fromkeys(row["arm"] for row in found):
            seeds = sum(row["arm"] == arm for row in found)
            table.append([f"{arm} ({seeds})", *(spread.told(arm, key) for key in names)])
        text = [f"runs: {len(found)}, preset {self.args.preset}; mean over seeds, then the half width of its "
                f"95 % interval from the spread of seeds pooled over arms", "", print_table(table), ""]
        verdicts = list(judge_claims(spread))
        for claim, verdict, parts in verdicts:
            text += [f"{claim}: **{verdict}**", *(f"  - {part}" for part in parts)]
        print0("\n".join(text[3:]))
        accuracy = {stage: [row["val_accuracy"] for row in read_metrics(self.root / stage / "metrics.jsonl")
                            if "val_accuracy" in row][-1:] for stage in ("judge", "scorer", "second")}
        about = dict(preset=self.args.preset, set=self.args.set, runs=len(found), torch=torch.__version__,
                     seconds=sum(row["seconds"] for row in found), val_accuracy=accuracy,
                     how={key: {k: next(iter(r.values()))[k] for k in HOW} for key, r in measures.items()},
                     verdicts=[dict(claim=c, verdict=v, parts=p) for c, v, p in verdicts])
        for suffix, content in (("json", json.dumps(about, indent=1)), ("md", "\n".join(text))):
            save_text(content + "\n", self.root / f"claims.{suffix}")
        draw_claims(spread, self.root / "claims_fig5b.png")
        ends = [self.root / f"{arm},seed=0" for arm in ENDS if "nar_phase1" in files.get(f"{arm}|0", ())]
        if ends:
            ar, nar, first = ([end / f"{stage}.pt" for end in ends] for stage in ("ar", "nar", "phase1"))
            for figure, words in dict(fig10=[*ar, *nar], fig11=[*ar, "--tokenizer", *first]).items():
                args = visualize_args([figure, "--ckpt", *map(str, words)])
                fig, numbers = draw(args, setup_device(self.args.device))
                save_figure(fig, self.root / f"claims_{figure}.png", numbers)
        print0(f"wrote {self.root / 'claims'}.jsonl, .json, .md and the figures claims_*.png")


def refuse_unequal(rows, root):
    """raises: UserError if the runs of a stage have not all the same number of steps, but for odd arms"""
    for stage in ("phase1", "phase2", "ar", "nar"):
        steps = sorted({row["steps"][stage] for row in rows if stage in row["steps"] and not row["odd"]})
        if len(steps) > 1:
            raise UserError(f"{root} has runs of {stage} with {steps[0]} and with {steps[-1]} steps, and "
                            "arms are compared at equal budgets; move the odd ones away and --run again")


def draw_claims(spread, path):
    """Fig. 5b with intervals: rFD, and FD of both priors' samples, over alpha."""
    fig = new_figure(8, 3)
    axes = fig.subplots(1, 3)
    level = {arm: float(arm.removeprefix("alpha=")) for arm in CLAIMS if arm.startswith("alpha=")}
    numbers = []
    titles = {"rec_{}_rfd": "rFD", "ar_{}_fd": "AR samples, FD", "nar_{}_fd": "NAR samples, FD"}
    for axis, (form, name) in zip(axes, titles.items(), strict=True):
        for phase, style, label in (("phase1", "ko-", "phase 1"), ("phase2", "C0s--", "phase 1 + 2")):
            key = form.format(phase)
            deviation, t = spread.pooled(key)
            alphas = sorted(alpha for arm, alpha in level.items() if spread.values(arm, key))
            if not alphas:
                continue
            values = [spread.values(f"alpha={alpha:g}", key) for alpha in alphas]
            means = [sum(v) / len(v) for v in values]
            half = [t * deviation / math.sqrt(len(v)) for v in values]
            bars = None if math.isnan(deviation) else half
            axis.errorbar(alphas, means, bars, fmt=style, capsize=3, markersize=4, label=label)
            numbers.append(dict(metric=key, alpha=alphas, values=values, half_width=bars))
        axis.set(xlabel="α", title=name)
    axes[0].legend(fontsize=7)
    save_figure(fig, path, numbers)


def claims(args):
    """`visualize.py claims`"""
    table(args, Claims)
