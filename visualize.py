"""The paper's tool: what does a prior predict, seen as pictures (Sec. 3.2, Fig. 3)?

    python visualize.py view --ckpt runs/demo/ar.pt                       # one prior with its tokenizer
    python visualize.py view --ckpt runs/a/ar.pt runs/b/ar.pt --num 6     # several, on the same images
    python visualize.py table1 --preset demo --run                        # train and measure every row
    python visualize.py metrics runs/*/metrics_ar.json                    # results side by side

The teacher-forced view decodes the prior's top-1 prediction of every token, given the true tokens before
it, and shows it beside the reconstruction. A tokenizer whose tokens are predictable gives two alike pictures.
"""

import argparse
from pathlib import Path

# Rows: label, --ablation of train.py, decoder of which phase, the paper's numbers in the order of columns.
TABLES = {
    "table1": dict(
        title="Table 1: decoders of more capacity (one phase, alpha = 0)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("Baseline", "baseline", "phase1", (3.45, 16.97, 13.26)),
              ("+Conv x2", "+conv2", "phase1", (3.22, 17.19, 13.51)),
              ("+Attention x2", "+attention2", "phase1", (2.90, 17.42, 14.02)),
              ("+2x training", "+2x", "phase1", (3.28, 16.19, 13.26))]),
    "table5": dict(
        title="Table 5: codebooks (one phase, alpha = 0)",
        columns=("usage", "rfid", "ar_fid", "nar_fid"),
        rows=[("VQGAN", "vqgan", "phase1", (0.435, 4.07, 17.19, 14.58)),
              ("+ F&N", "fn", "phase1", (0.997, 2.93, 24.91, None)),
              ("+ K-means", "kmeans", "phase1", (1.0, 3.54, 16.84, 15.02)),
              ("+ entropy", "entropy", "phase1", (1.0, 3.45, 16.97, 13.26))]),
    "table6": dict(
        title="Table 6: layers of the perceptual loss (one phase)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("low", "low", "phase1", (3.45, 16.97, 13.26)),
              ("A: low + logit", "A", "phase1", (3.01, 15.19, 11.78)),
              ("B: 2_2 3_3 4_3 5_3 logit", "B", "phase1", (2.93, 14.47, 11.58)),
              ("C: 3_3 4_3 5_3 logit", "C", "phase1", (2.81, 14.08, 10.52)),
              ("D: 4_3 5_3 logit", "D", "phase1", (2.62, 13.34, 9.56)),
              ("sem: 5_3 logit", "sem", "phase1", (2.77, 12.07, 8.84)),
              ("E: logit", "E", "phase1", (4.65, 17.88, 14.00))]),
    "fig5b": dict(
        title="Fig. 5b: the semantic ratio alpha (one phase; the paper's ends are those of Table 6)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("alpha = 0", "alpha=0", "phase1", (3.45, 16.97, 13.26)),
              *[(f"alpha = {a}", f"alpha={a}", "phase1", (None, None, None)) for a in (0.2, 0.4, 0.6, 0.8)],
              ("alpha = 1", "alpha=1", "phase1", (2.77, 12.07, 8.84))]),
    "fig7b": dict(
        title="Fig. 7b: the same tokens decoded after phase 1 and after phase 2 (alpha = 1)",
        columns=("rfid", "ar_fid", "nar_fid"),
        rows=[("phase 1", "sem", "phase1", (None, 7.83, 5.31)),
              ("phase 1 + 2", "sem", "phase2", (1.99, 7.55, 4.99))]),
}
PAPER_SCALE = dict.fromkeys(TABLES, "ImageNet 256x256, batch 64, 500,000 steps each, Inception FID, 50,000")
PAPER_SCALE["fig7b"] = "ImageNet 256x256, Tables 9 and 10 in full, Inception FID, 50,000"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("figure", choices=["view", "metrics", *TABLES], help="view: input, reconstruction, top-1 prediction "
        "and hit map (Fig. 3); metrics: results of sample.py --metrics side by side; else that table")
    add("files", type=Path, nargs="*", help="of metrics: the JSON files")
    add("--ckpt", type=Path, nargs="+", help="of view: one or several ar.pt")
    add("--tokenizer", type=Path, nargs="+", default=[], help="one per CKPT (default: found beside each)")
    add("--data", help="folder of images (default: the validation images of the first run)")
    add("--num", type=int, default=64, help="images for the numbers; the first 8 are drawn (default 64)")
    add("--preset", default="demo", help="of tables: the preset that all rows vary (default demo)")
    add("--run", action="store_true", help="of tables: train and measure what is missing, row by row")
    add("--stages", default="phase1,ar,nar", help="of tables: what --run makes (default phase1,ar,nar)")
    add("--samples", type=int, help="of tables: images a prior draws (default 2,000; cifar10 10,000; 50,000)")
    add("--extractor", help="of tables: see sample.py (default: a scorer that --run trains; else inception)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of tables: for train.py")
    add("--out", type=Path, help="view: PNG to write, numbers go beside it (default: view.png beside CKPT); "
        "tables: folder of all rows (default: runs/PRESET-tables)")
    add("--device", default="auto", help="cuda, cpu or auto")
    args = parser.parse_args(argv)
    if args.figure == "view" and not args.ckpt:
        parser.error("view needs --ckpt FILE, one or several ar.pt")
    if args.figure == "metrics" and not args.files:
        parser.error("metrics needs files: the JSON files of sample.py --metrics")
    if args.files and args.figure != "metrics":
        parser.error(f"{args.figure} takes no files, got {args.files[0]}")
    if not args.stages or not set(args.stages.split(",")) <= {"phase1", "ar", "nar"}:
        parser.error(f"--stages takes phase1, ar, nar, separated by commas, got {args.stages!r}")
    if args.samples is not None and args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    if args.num < 1 or (args.tokenizer and len(args.tokenizer) != len(args.ckpt)):
        parser.error("--num must be at least 1, and --tokenizer needs one file per --ckpt")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_args()  # before torch is imported: --help and a wrong flag answer at once

# ruff: noqa: E402
import contextlib
import json
import math
import resource
import shlex
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from perceptual import (
    LOGIT, PatchDiscriminator, StyleDiscriminator, build_vgg16, lpips_like, normalize_images,
)
from prior_ar import ARPrior, PriorConfig
from prior_nar import mask_tokens
from sample import (
    HOW, UserError, generate_images, latent_hash, load_data, load_model, load_tokenizer_of, mix,
    one_line_errors, print0, psnr, rank, save_atomic, seeded_rand, setup_device, to_float, to_uint8, world,
)
from tokenizer import TokenizerConfig, VQTokenizer, all_reduce_mean, codebook_usage


@torch.no_grad()
def teacher_forced_view(tokenizer, prior, x, labels=None):
    """s = tokens of x; s' = argmax of one forward pass on [c, s_1..s_{N-1}]; both decoded (Sec. 3.2, Fig. 3).

    tokenizer: anything with encode, decode;  prior: ARPrior (a masked prior would see its target)
    x:         (B, 3, H, W) in [-1, 1];  labels: (B,) int64 or None
    returns:   dict of tokens s and tokens_pred s' (B, N) int64, nats (B, N), hits (B, N) bool,
               reconstruction Dec(s) and prediction Dec(s') (B, 3, H, W)
    """
    tokens = tokenizer.encode(x)
    logits = prior(tokens, labels).float()  # (B, N, K)
    tokens_pred = logits.argmax(2)
    return dict(
        tokens=tokens, tokens_pred=tokens_pred, hits=tokens == tokens_pred,
        nats=F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none"),
        reconstruction=tokenizer.decode(tokens), prediction=tokenizer.decode(tokens_pred),
    )


def view_numbers(x, view):
    """The discrepancy of a view in numbers: means over images; PSNR in dB after rounding to 8 bits."""
    return dict(
        top1=view["hits"].float().mean().item(),
        nats_per_token=view["nats"].mean().item(),
        psnr_reconstruction=psnr(x, view["reconstruction"]).mean().item(),
        psnr_prediction=psnr(x, view["prediction"]).mean().item(),
        psnr_prediction_to_reconstruction=psnr(view["reconstruction"], view["prediction"]).mean().item(),
    )


def draw_view(x, views, names, path, note=""):
    """One row per image: input, then reconstruction, top-1 prediction and hit map of each prior."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = len(x), 1 + 3 * len(views)
    fig, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.25 * rows + 0.75), squeeze=False)
    for i in range(rows):
        panels = [("input", to_uint8(x[i]).permute(1, 2, 0).numpy(), None)]
        for name, view in zip(names, views, strict=True):
            side = math.isqrt(view["hits"].shape[1])
            hits = view["hits"][i].view(side, side).cpu().numpy()
            for key, title in (("reconstruction", "reconstruction"), ("prediction", "top-1 prediction")):
                panels.append((f"{name}\n{title}", to_uint8(view[key][i]).permute(1, 2, 0).numpy(), None))
            panels.append((f"{name}\nhit map", hits, f"{hits.mean():.0%}"))
        for axis, (title, picture, text) in zip(axes[i], panels, strict=True):
            if picture.ndim == 2:
                axis.imshow(picture, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
            else:
                axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_title(title, fontsize=7)
            if text:
                axis.set_xlabel(text, fontsize=6, labelpad=1)
    fig.text(0.5, 0.005, "hit map: yellow where the prediction is the true token  " + note,
             ha="center", fontsize=6)
    fig.tight_layout(rect=(0, 0.02, 1, 1), pad=0.3)
    save_atomic(lambda p: fig.savefig(p, format="png", dpi=200), path)
    plt.close(fig)


def write_view(ckpts, num, device, out, tokenizers=(), data=None):
    """Draws the view of one or several (tokenizer, AR prior) pairs on the same validation images.

    ckpts: paths of ar.pt files;  out: the PNG, numbers go to the JSON beside it;  returns: the numbers
    """
    views, numbers, images = [], [], None
    for i, path in enumerate(ckpts):
        prior, ckpt = load_model(path, ("ar",), device)
        given = tokenizers[i] if tokenizers else None
        tokenizer, tokenizer_ckpt = load_tokenizer_of(path, ckpt, given, device)
        if images is None:
            config = dict(ckpt["config"], **({"data": data, "val": data} if data else {}))
            images = load_data(config)[1]
            if num > len(images):
                raise UserError(f"--num {num}, but there are only {len(images)} images")
        if images.image_size != ckpt["config"]["image_size"]:
            size = ckpt["config"]["image_size"]
            raise UserError(f"{path} is for {size}-pixel images, {ckpts[0]} for others")
        x = to_float(torch.stack([images.view(j) for j in range(num)]), device)
        labels = None
        if prior.config.num_classes:
            if images.class_names != ckpt["class_names"]:
                raise UserError(f"the classes of the images are not those that {path} was trained on")
            labels = torch.tensor([images.label(j) for j in range(num)], device=device)
        views.append(teacher_forced_view(tokenizer, prior, x, labels))
        numbers.append(dict(
            ckpt=str(path), tokenizer_hash=ckpt["tokenizer_hash"], tokenizer_stage=tokenizer_ckpt["stage"],
            num_images=num, alpha=ckpt["config"]["phase1"]["alpha"],
            note=ckpt["note"] or tokenizer_ckpt["note"],
            **view_numbers(x, views[-1]),
        ))
    names = [f"{Path(path).parent.name} (α = {n['alpha']:g})" for path, n in zip(ckpts, numbers, strict=True)]
    rows, note = min(num, 8), next((n["note"] for n in numbers if n["note"]), "")
    if rank() == 0:
        draw_view(x[:rows], [{k: v[:rows] for k, v in view.items()} for view in views], names, out, note)
        text = json.dumps(numbers, indent=1) + "\n"
        save_atomic(lambda p: p.write_text(text), Path(out).with_suffix(".json"))
    return numbers


# ----------------------------------------------------------------------------------------------------------
# Results side by side: the paper's Tables 1, 5, 6 and Fig. 5b, 7b, each row a run of its own
# ----------------------------------------------------------------------------------------------------------


def read_result(path):
    """One JSON of sample.py --metrics; raises UserError if it is none."""
    try:
        result = json.loads(Path(path).read_text())
        assert {*HOW, "results"} <= result.keys()
        return result
    except (ValueError, AssertionError, AttributeError, UnicodeDecodeError):
        raise UserError(f"{path} is no result of sample.py --metrics") from None


def refuse_unlike(results):
    """Numbers that were measured in different ways do not belong into one column.

    results: {name: result};  raises: UserError that names the first difference
    """
    first, *others = results
    for other in others:
        for key in HOW:
            a, b = results[first][key], results[other][key]
            if a != b:
                raise UserError(f"{first} and {other} cannot share a column: {key} is {a} in the one and {b} "
                                "in the other; measure both alike")


def print_metrics(paths):
    """A table of results, one line each."""
    results = {str(path): read_result(path) for path in paths}
    refuse_unlike(results)
    names = [n for n, v in next(iter(results.values()))["results"].items() if isinstance(v, float)]
    how = next(iter(results.values()))
    print0(f"{how['protocol']}, {how['num_images']:,} images, {how['image_size']} pixels, features of "
           f"{how['extractor']} ({how['extractor_hash']}), reference {how['reference_hash']}\n")
    lines = [["", *names]]
    lines += [[path, *(number(r["results"].get(name)) for name in names)] for path, r in results.items()]
    print_table(lines)


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

    Rows that are one and the same training share a folder; all share judge, scorer and reference statistics.
    """

    SAME = {"low": "baseline", "alpha=0": "baseline", "sem": "alpha=1"}

    def __init__(self, args):
        self.args, self.name, self.table = args, args.figure, TABLES[args.figure]
        self.root = args.out or Path("runs") / f"{args.preset}-tables"
        self.small = args.preset in ("demo", "cifar10")  # these train a judge and a scorer of their own
        self.samples = args.samples or {"demo": 2000, "cifar10": 10_000}.get(args.preset, 50_000)
        self.stages = args.stages.split(",")
        scorer = str(self.root / "scorer" / "resnet.pt") if self.small else "inception"
        self.extractor = args.extractor or scorer

    def train(self, stage, folder, *words):
        """(file that it makes, command)"""
        data = ["--data", self.args.data] if self.args.data else []
        sets = [word for item in self.args.set for word in ("--set", item)]
        command = ["train.py", "--stage", stage, "--preset", self.args.preset, *data, *sets, *words]
        return folder / f"{stage}.pt", [*command, "--out", str(folder)]

    def shared(self):
        """What all rows need: the judge and the scorer."""
        if not self.small:
            return []
        found = [self.train("vgg", self.root / "judge")]
        if not self.args.extractor:
            _, command = self.train("vgg", self.root / "scorer", "--arch", "resnet", "--seed", "1")
            found.append((self.root / "scorer" / "resnet.pt", command))
        return found

    def row(self, ablation, decoder):
        """The commands of a row, [(file that it makes, command)]; and {column prefix: result file}."""
        run = self.SAME.get(ablation, ablation)
        if run == "entropy" and not self.small:  # no warm start at full scale, so this is the baseline too
            run = "baseline"
        folder, result = self.root / run, {}
        words = ["--ablation", run, *(["--vgg", str(self.root / "judge" / "vgg.pt")] * self.small)]
        commands = [self.train("phase1", folder, *words)]
        if decoder == "phase2":
            commands.append(self.train("phase2", folder, *words))
        for stage in ("ar", "nar"):
            if stage in self.stages:
                commands.append(self.train(stage, folder, *words))
        for stage in self.stages:
            checkpoint = folder / f"{decoder if stage == 'phase1' else stage}.pt"
            result[stage] = folder / f"metrics_{checkpoint.stem}_{decoder}.json"
            command = ["sample.py", "--ckpt", str(checkpoint), "--metrics", "--extractor", self.extractor,
                       "--references", str(self.root / "references"), "--out", str(result[stage])]
            if stage == "phase1":
                command += ["--lpips", "none"] * self.small
            else:
                command += ["--tokenizer", str(folder / f"{decoder}.pt"), "--num", str(self.samples)]
            commands.append((result[stage], command))
        return commands, result

    def missing(self):
        """[(label, commands still to be run)] of all rows; the shared ones come first."""
        rows, seen = [("judge and scorer", self.shared())], set()
        rows += [(label, self.row(name, decoder)[0]) for label, name, decoder, _ in self.table["rows"]]
        for label, commands in rows:
            left = [(path, w) for path, w in commands if path not in seen and not finished(path, w)]
            seen.update(path for path, _ in left)
            if left:
                yield label, left

    def run(self):
        """Runs what is missing, one command after the other; a row that fails is left, the others go on."""
        rows, spent, failed, begin = list(self.missing()), {}, [], time.time()
        for i, (label, commands) in enumerate(rows):
            for j, (path, words) in enumerate(commands):
                print0(f"\n{label}: python {shlex.join(words)}")
                path.parent.mkdir(parents=True, exist_ok=True)
                start, script = time.time(), str(Path(__file__).with_name(words[0]))
                with open(path.parent / "log.txt", "a") as log:
                    done = subprocess.run([sys.executable, script, *words[1:]], stdout=log, text=True,
                                          stderr=subprocess.PIPE)
                    log.write(done.stderr)
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    failed.append(f"{label}: {words[0]} ended with {done.returncode}: {reason}")
                    print0(f"failed ({reason}); the next row goes on")
                    break
                spent.setdefault(kind(words), []).append(time.time() - start)
                later = commands[j + 1 :] + [c for _, others in rows[i + 1 :] for c in others]
                left = [kind(words) for _, words in later]
                known = [sum(spent[k]) / len(spent[k]) for k in left if k in spent]
                unknown = len(left) - len(known)
                print0(f"{time.time() - start:.0f} s; {len(left)} commands left, about {sum(known) / 60:.0f} "
                       f"minutes" + f" and {unknown} of kinds not yet timed" * bool(unknown))
        print0(f"\n{time.time() - begin:.0f} s" + "".join(f"\nfailed: {line}" for line in failed))
        return failed

    def show(self):
        """Prints the table, the paper's numbers beside ours; writes it as text and JSON."""
        columns, rows, how = self.table["columns"], [], {}
        for label, ablation, decoder, paper in self.table["rows"]:
            commands, files = self.row(ablation, decoder)
            results = {stage: read_result(path) for stage, path in files.items() if path.exists()}
            ours = {}
            for stage, result in results.items():
                prefix = "" if stage == "phase1" else f"{stage}_"
                ours |= {prefix + k: v for k, v in result["results"].items() if isinstance(v, float)}
                how.setdefault(stage, {})[f"{label} ({stage})"] = result
            seconds = [row_seconds(path) for path, _ in commands if path.exists()]
            made = [path for path, _ in commands if path.suffix == ".pt" and path.exists()]
            steps = {path.stem: torch.load(path, weights_only=True, mmap=True)["step"] for path in made}
            rows.append(dict(
                label=label, ablation=ablation, steps=steps, ours=ours,
                paper=dict(zip(columns, paper, strict=True)), seconds=round(sum(seconds)),
                files={stage: str(path) for stage, path in files.items()},
                commands=["python " + shlex.join(words) for _, words in commands]))
        for results in how.values():
            refuse_unlike(results)
        first = {stage: next(iter(results.values())) for stage, results in how.items()}
        extra = {"table5": ["perplexity"]}.get(self.name, []) + ["ar_class_accuracy", "nar_class_accuracy"]
        extra = [name for name in extra if any(name in row["ours"] for row in rows)]
        steps = ", ".join(f"{stage} {step:,}" for stage, step in rows[0]["steps"].items())
        print0(f"\n{self.table['title']}\npaper: {PAPER_SCALE[self.name]}\nours: preset {self.args.preset}, "
               f"steps {steps or 'none yet'}, features of {self.extractor}, {self.samples:,} samples\n")
        lines = [["", *(f"paper: {c}" for c in columns), *(f"ours: {c}" for c in (*columns, *extra))]]
        for row in rows:
            lines.append([row["label"], *(number(row["paper"][c]) for c in columns),
                          *(number(row["ours"].get(c)) for c in (*columns, *extra))])
        text = print_table(lines)
        sets = "".join(f" --set {item}" for item in self.args.set)
        about = dict(
            title=self.table["title"], preset=self.args.preset, paper_scale=PAPER_SCALE[self.name],
            command=f"python visualize.py {self.name} --preset {self.args.preset}{sets} --run",
            how={stage: {key: result[key] for key in ("extractor", *HOW)} for stage, result in first.items()},
            threads=torch.get_num_threads(), torch=torch.__version__, rows=rows)
        self.root.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("json", json.dumps(about, indent=1)), ("md", text)):
            save_atomic(lambda p, c=content: p.write_text(c + "\n"), self.root / f"{self.name}.{suffix}")
        if self.name == "fig5b" and all("rfid" in row["ours"] for row in rows):
            draw_alpha(rows, self.extractor, self.root / "fig5b.png")
        for label, commands in self.missing():
            print0(f"\nmissing for {label}:")
            for _, words in commands:
                print0(f"  python {shlex.join(words)}")
        print0(f"\nwrote {self.root / self.name}.json and .md")


def kind(words):
    """What commands take about the same time."""
    return (words[0], words[2]) if words[0] == "train.py" else (words[0], Path(words[2]).stem)


def finished(path, words):
    """Whether a command need not be run again."""
    if not path.exists():
        return False
    if path.suffix == ".pt":
        ckpt = torch.load(path, weights_only=True, mmap=True)
        section = "judge" if ckpt["stage"] in ("vgg", "resnet") else ckpt["stage"]
        steps = [item for before, item in zip(words, words[1:], strict=False)
                 if before == "--set" and item.startswith(f"{section}.steps=") and "+2x" not in words]
        return ckpt["step"] >= int(steps[-1].partition("=")[2] if steps else ckpt["config"][section]["steps"])
    num = int(words[words.index("--num") + 1]) if "--num" in words else None
    sources = [Path(words[i + 1]) for i, word in enumerate(words) if word in ("--ckpt", "--tokenizer")]
    fresh = all(p.exists() and p.stat().st_mtime < path.stat().st_mtime for p in sources)
    return fresh and num in (None, read_result(path)["num_images"])


def row_seconds(path):
    return load_seconds(path) if path.suffix == ".pt" else read_result(path)["seconds"]


def draw_alpha(rows, extractor, path):
    """Fig. 5b: rFID, and FID of both priors' samples, over alpha; ours alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    alphas = [float(row["ablation"].removeprefix("alpha=")) for row in rows]
    fig, left = plt.subplots(figsize=(5, 3.4), layout="constrained")
    right = left.twinx()
    left.plot(alphas, [row["ours"]["rfid"] for row in rows], "ko-", label="reconstructions (rFID)")
    for key, style, label in (("ar_fid", "C0s--", "AR samples"), ("nar_fid", "C1^:", "NAR samples")):
        right.plot(alphas, [row["ours"].get(key, math.nan) for row in rows], style, label=label)
    left.set(xlabel="α", ylabel="Fréchet distance, reconstructions")
    right.set_ylabel("Fréchet distance, samples")
    lines = left.get_lines() + right.get_lines()
    left.legend(lines, [line.get_label() for line in lines], fontsize=7)
    fig.suptitle(f"features of {extractor}", fontsize=7)
    save_atomic(lambda p: fig.savefig(p, format="png", dpi=200), path)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------
# Validation during training; each process takes a part of the images
# ----------------------------------------------------------------------------------------------------------


def val_batches(run, limit, batch=50):
    """(indices, images) of this process's share of the first `limit` validation images."""
    mine = list(range(rank(), min(limit, len(run.val)), world()))
    for i in range(0, len(mine), batch):
        indices = mine[i : i + batch]
        yield indices, to_float(torch.stack([run.val.view(j) for j in indices]), run.device)


def ratio(run, sums):
    """The first entries of a vector of sums over the last one, a count; summed over processes."""
    sums = all_reduce_mean(torch.tensor(sums, dtype=torch.float64).to(run.device))
    return (sums[:-1] / sums[-1].clamp(min=1)).tolist()


@torch.no_grad()
def evaluate_judge(run, stage, step, judge, limit=5000):
    """Share of validation images that the judge or scorer in training classifies rightly."""
    judge.eval()
    right = total = 0
    for indices, x in val_batches(run, limit):
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        with run.autocast:
            right += (judge(normalize_images(x)).argmax(1) == labels).sum().item()
        total += len(labels)
    run.log(stage, step, val_accuracy=ratio(run, [right, total])[0])


@torch.no_grad()
def evaluate_tokenizer(run, stage, step, tokenizer, limit=1000):
    """PSNR, L1 and hard codebook usage on validation images; a sheet of inputs above reconstructions."""
    tokenizer.eval()
    sums, counts = [0.0, 0.0, 0], torch.zeros(tokenizer.codebook_size, device=run.device)
    for _, x in val_batches(run, limit):
        with run.autocast:
            tokens = tokenizer.encode(x)
            x_hat = tokenizer.decode(tokens).float()
        counts += tokens.flatten().bincount(minlength=tokenizer.codebook_size)
        values = psnr(x, x_hat).sum().item(), (x - x_hat).abs().mean((1, 2, 3)).sum().item(), len(x)
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    val_psnr, val_l1 = ratio(run, sums)
    usage, perplexity = codebook_usage(all_reduce_mean(counts))
    run.log(stage, step, val_psnr=val_psnr, val_l1=val_l1, usage=usage, perplexity=perplexity)
    x = torch.stack([run.val.view(i) for i in range(min(10, len(run.val)))])
    with run.autocast:
        x_hat = to_uint8(tokenizer.decode(tokenizer.encode(to_float(x, run.device))))
    run.sheet(f"reconstructions_{stage}", torch.cat([x, x_hat]), len(x))


@torch.no_grad()
def evaluate_prior(run, stage, step, prior, tokenizer, codes, unigram, limit=1000, batch=100):
    """Nats per token and top-1 accuracy on validation codes, beside ln K and the unigram entropy; samples.

    NAR is measured at mask ratios that the seed fixes, the same at every call.
    """
    prior.eval()
    classes, sums = prior.config.num_classes, [0.0, 0.0, 0]
    for start in range(rank() * batch, min(limit, len(codes["val"])), world() * batch):
        tokens = codes["val"][start : start + batch].long().to(run.device)
        labels = codes["val_labels"][start : start + batch].to(run.device) if classes else None
        inputs, mask = tokens, torch.ones_like(tokens, dtype=torch.bool)
        if stage == "nar":
            noise = seeded_rand(len(tokens), tokens.shape[1] + 1, seed=mix("val", start)).to(run.device)
            inputs, mask = mask_tokens(tokens, prior.mask_id, noise)
        with run.autocast:
            logits = prior(inputs, labels)
        loss, accuracy = prior.loss(logits, tokens, *([mask] if stage == "nar" else []))
        count = mask.sum().item()
        values = loss.item() * count, accuracy.item() * count, count
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    loss, accuracy = ratio(run, sums)
    K = prior.config.codebook_size
    run.log(stage, step, val_loss=loss, val_top1=accuracy, ln_K=math.log(K), unigram_entropy=unigram)
    columns = min(10, classes or 8)
    labels = [i % columns for i in range(columns * 10)] if classes else None
    with run.autocast:
        images = generate_images(
            prior, tokenizer, columns * 10, labels, run.config["seed"], run.config["sample"], batch=50)
    run.sheet(f"samples_{stage}", images, columns)


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; one that a kill tore in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def early_warnings(rows, stage, c):
    """Signs of a run that goes wrong, with cause and remedy: {name: message}.

    rows: the lines of metrics.jsonl of this stage so far, oldest first;  c: its section of the preset
    """
    found, last = {}, {}
    for name in ("usage", "loss_disc", "val_loss", "loss_per", "loss_rec", "adaptive_weight"):
        last[name] = [row[name] for row in rows if row.get(name) is not None]
    usage, disc, val, per, rec, adaptive = last.values()
    if usage and usage[-1] < 0.8 * max(usage):
        found["usage"] = (f"codebook usage fell from {max(usage):.0%} to {usage[-1]:.0%}: codes die; raise "
                          f"{stage}.gamma or lower {stage}.lr with --set")
    if len(disc) >= 5 and max(disc[-5:]) < 0.1:
        found["disc"] = (f"the discriminator wins, its loss stays below 0.1 and teaches nothing; raise "
                         f"{stage}.r1_gamma or {stage}.adv_start (begin later) with --set")
    if adaptive and adaptive[-1] >= 9999:
        found["adaptive"] = (f"the adaptive weight is at its clamp, the adversarial gradient near zero; "
                             f"--set {stage}.adaptive=false")
    if len(val) > 1 and val[-1] > 1.02 * min(val):
        found["val"] = (f"the validation loss rose from {min(val):.4g} to {val[-1]:.4g}: overfitting; fewer "
                        "--steps, --set prior.dropout=0.1, or more code_variants")
    if rec and per and c["per_weight"] and c["per_weight"] * per[-1] < 1e-3 * rec[-1]:
        found["per"] = (f"the perceptual term is near zero beside the L1 term: are the weights of --vgg "
                        f"trained ones, and is {stage}.per_weight large enough?")
    return found


# ----------------------------------------------------------------------------------------------------------
# The summary of a run (train.py --stage all)
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_summary(run, first, second):
    """Both phases on all validation images: usage, distances, and whether phase 2 moved a token."""
    sums, counts, changed, total = {}, torch.zeros(first.codebook_size), 0, len(run.val)
    for start in tqdm(range(0, total, 50), "reconstructing", disable=None if rank() == 0 else True):
        indices = range(start, min(start + 50, total))
        x = to_float(torch.stack([run.val.view(i) for i in indices]), run.device)
        labels = torch.tensor([run.val.label(i) for i in indices], device=run.device)
        tokens = first.encode(x)
        changed += (tokens != second.encode(x)).sum().item()
        counts += tokens.cpu().flatten().bincount(minlength=first.codebook_size)
        values = {"judge_accuracy": hits(run, x, labels)}
        for name, tokenizer in (("phase1", first), ("phase2", second)):
            x_hat = tokenizer.decode(tokens)
            values[f"psnr_{name}"] = psnr(x, x_hat)
            values[f"lpips_like_{name}"] = lpips_like(run.judge, x, x_hat)
            values[f"recon_class_accuracy_{name}"] = hits(run, x_hat, labels)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
    usage, perplexity = codebook_usage(counts)
    means = {name: value / total for name, value in sums.items()}
    return dict(usage=usage, perplexity=perplexity, phase2_tokens_changed=changed, **means)


def hits(run, x, labels):
    """1 where the run's judge recognises the class, else 0, (B,); nan where the judge has other classes."""
    logits = run.judge(x.clamp(-1, 1), [LOGIT])[LOGIT]
    right = (logits.argmax(1) == labels).float()
    return right if logits.shape[1] == run.train.num_classes else right * math.nan


def sample_summary(run, stage, tokenizer, num):
    """Class accuracy of `num` samples as the judge sees them, nats per token, and a sheet."""
    prior, _ = load_model(run.out / f"{stage}.pt", (stage,), run.device)
    classes = prior.config.num_classes
    labels = [i % classes for i in range(num)] if classes else None
    images = generate_images(
        prior, tokenizer, num, labels, run.config["seed"], run.config["sample"], 50, True)
    run.sheet(f"samples_{stage}", images[: 10 * min(classes or 10, 10)], min(classes or 10, 10))
    rows = read_metrics(run.out / "metrics.jsonl")
    result = {}
    for last in [row for row in rows if row["stage"] == stage and "val_loss" in row][-1:]:
        result = {f"{stage}_nats_per_token": last["val_loss"], f"{stage}_top1": last["val_top1"],
                  "unigram_entropy": last["unigram_entropy"], "ln_K": last["ln_K"]}
    if classes:
        parts = zip(images.split(50), torch.tensor(labels, device=run.device).split(50), strict=True)
        found = [hits(run, to_float(x, run.device), wanted) for x, wanted in parts]
        result[f"{stage}_class_accuracy"] = torch.cat(found).mean().item()
    return result


@torch.no_grad()
def summarize(run, num=1000):
    """The table that ends `--stage all`, printed and written to summary.json, with the run's pictures."""
    first, _ = load_model(run.out / "phase1.pt", ("phase1",), run.device)
    second, _ = load_model(run.out / "phase2.pt", ("phase2",), run.device)
    summary = dict(
        preset=run.args.preset, data=str(run.config["data"]), num_samples=num, num_val=len(run.val))
    summary |= tokenizer_summary(run, first, second)
    summary["recon_class_accuracy"] = summary["recon_class_accuracy_phase2"]
    for stage in ("ar", "nar"):
        summary |= sample_summary(run, stage, second, num)
    x = torch.stack([run.val.view(i) for i in range(10)])
    tokens = first.encode(to_float(x, run.device))
    run.sheet("phases", torch.cat([x, *(to_uint8(t.decode(tokens)) for t in (first, second))]), 10)
    view = write_view([run.out / "ar.pt"], min(64, len(run.val)), run.device, run.out / "view.png")
    summary["view"] = view[0]
    files = [run.out / f"{stage}.pt" for stage in ("vgg", "phase1", "phase2", "ar", "nar")]
    seconds = {path.stem: round(load_seconds(path)) for path in files if path.exists()}
    summary |= dict(
        latent_hash=latent_hash(second), alpha=run.config["phase1"]["alpha"], note=run.note,
        seconds_by_stage=seconds, seconds=sum(seconds.values()),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        threads=torch.get_num_threads(), torch=torch.__version__, command=" ".join(["python", *sys.argv]),
    )
    summary = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in summary.items()}
    if rank() == 0:
        save_atomic(lambda p: p.write_text(json.dumps(summary, indent=1) + "\n"), run.out / "summary.json")
    for name, value in summary.items():
        print0(f"  {name:28s} {value:.4g}" if isinstance(value, float) else f"  {name:28s} {value}")
    print0(f"pictures: {run.out}/phases.png, samples_ar.png, samples_nar.png, view.png")


def load_seconds(path):
    return torch.load(path, weights_only=True, mmap=True)["seconds"]


# ----------------------------------------------------------------------------------------------------------
# train.py --explain
# ----------------------------------------------------------------------------------------------------------


def explain(config, processes=8):
    """Prints modules, sizes and recipe of a preset; all networks are on the meta device, nothing runs."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    def row(name, module, state, c):
        recipe = f"lr {c['lr']:g} {c['schedule']}"
        if c["schedule"] != "constant":
            recipe += f" to {c['lr_end']:g}" + f" from step {c['lr_start']}" * bool(c["lr_start"])
        print(f"  {name:30s} {count(module):>13,}  {state:9s}  {recipe if state == 'trainable' else ''}")

    def stage(name, c):
        share = c["batch"] / processes
        print(f"{name}: {c['steps']:,} steps of {c['batch']} images = {processes} processes x {share:g}, "
              f"or fewer with --micro-batch; {'AdamW' if c['weight_decay'] else 'Adam'} {tuple(c['betas'])}, "
              f"weight decay {c['weight_decay']:g}, {config['precision']}")

    sizes = dict(image_size=config["image_size"], **config["tokenizer"])
    disc = dict(config["discriminator"])
    kind = disc.pop("kind")
    with torch.device("meta"):
        judge = config["judge"]
        own = (judge["width"], 10, judge["hidden"], True) if config["vgg"] == "judge" else ()
        vgg = build_vgg16(*own)
        first = VQTokenizer(TokenizerConfig(**sizes))
        second = VQTokenizer(TokenizerConfig(**dict(sizes, num_attention=1)))
        double = VQTokenizer(TokenizerConfig(**dict(sizes, num_attention=2)))
        deeper = VQTokenizer(TokenizerConfig(**dict(sizes, decoder_extra_blocks=2)))
        disc = PatchDiscriminator() if kind == "patch" else StyleDiscriminator(config["image_size"], **disc)
        K, N = first.codebook_size, first.grid_size**2
        prior = {n: ARPrior(PriorConfig(K, N, n, **config["prior"])) for n in (0, 1000)}
    if config["vgg"] == "judge":
        stage("vgg (10 classes assumed)", judge)
        row("judge, a narrow VGG-16", vgg, "trainable", judge)
    for name, tokenizer in (("phase1", first), ("phase2", second)):
        c, frozen = config[name], "frozen" if name == "phase2" else "trainable"
        loss = f"layers {c['layers']} of Table 6" if c["layers"] else f"alpha {c['alpha']:g}"
        stage(f"{name}, {loss}", c)
        row("encoder", tokenizer.encoder, frozen, c)
        row("codebook", tokenizer.quantizer, frozen, c)
        row("decoder", tokenizer.decoder, "trainable", c)
        print(f"  {'tokenizer':30s} {count(tokenizer):>13,}")
        row("discriminator", disc, "trainable", c)
        row("VGG-16", vgg, "frozen", c)
    print(f"Table 1: +Attention x2 {count(double):,} (--set tokenizer.num_attention=2), "
          f"+Conv x2 {count(deeper):,} (--set tokenizer.decoder_extra_blocks=2)")
    for name in ("ar", "nar"):
        stage(f"{name}, {first.grid_size}^2 tokens of {first.codebook_size} codes", config[name])
        row("prior, unconditional", prior[0], "trainable", config[name])
        row("prior, 1000 classes", prior[1000], "trainable", config[name])


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def main(args):
    with one_line_errors():
        if args.figure == "metrics":
            return print_metrics(args.files)
        if args.figure in TABLES:
            table = Table(args)
            failed = table.run() if args.run else []
            table.show()
            if failed:
                raise UserError(f"{len(failed)} rows failed, see above and log.txt in their folders", code=1)
            return
        out = args.out or args.ckpt[0].parent / "view.png"
        numbers = write_view(args.ckpt, args.num, setup_device(args.device), out, args.tokenizer, args.data)
        print0(json.dumps(numbers, indent=1))
        print0(f"wrote {out}")


if __name__ == "__main__":
    main(ARGUMENTS)
