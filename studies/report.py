"""The report of a run: one HTML file that needs nothing else."""

import base64
import html
import io
import json
import math
from pathlib import Path

import torch

from plumbing.codes import codebook_usage, count_codes, kept_codes
from plumbing.data import images_of, is_folder, with_data
from plumbing.drawing import new_figure
from plumbing.errors import ROOT, UserError
from plumbing.files import header, read_metrics, save_text, writable
from plumbing.hashes import latent_hash
from plumbing.images import make_sheet, to_float, to_uint8
from plumbing.models import load_model, load_tokenizer_of
from plumbing.processes import print0, setup_device
from plumbing.slices import decode, generate_images, generate_tokens
from plumbing.stages import DEPENDS
from recipes.options import STAGES
from studies.metrics import HOW, read_result
from studies.summary import headline
from visualize import load_images, load_pairs

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title><style>
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
  overflow-wrap: anywhere; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem; }
img { max-width: 100%%; } img.pixels { image-rendering: pixelated; width: 100%%; display: block; }
img.plot { background: white; width: 100%%; max-width: 36rem; }
.scroll { overflow-x: auto; margin: .5rem 0; } table { border-collapse: collapse; font-size: .85rem; }
td, th { border: 1px solid var(--line); padding: .2rem .5rem; text-align: left; vertical-align: top;
  overflow-wrap: normal; min-width: 4rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .5rem; }
</style></head><body><h1>%(title)s</h1>
%(body)s
</body></html>
"""


def data_uri(write):
    """What write(file) writes, a PNG, as an address that an <img> can hold."""
    file = io.BytesIO()
    write(file)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture(images, columns, alt):
    """<img> of a sheet of images (n, 3, S, S), uint8 or in [-1, 1]; the browser enlarges its pixels."""
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    sheet = make_sheet(images.cpu(), columns, zoom=1)
    return f'<img class="pixels" src="{data_uri(lambda f: sheet.save(f, "PNG"))}" alt="{html.escape(alt)}">'


def plot(fig, alt):
    source = data_uri(lambda f: fig.savefig(f, format="png", dpi=110))
    return f'<img class="plot" src="{source}" alt="{html.escape(alt)}">'


def labelled(images):
    """Rows of pictures, {label: (n, 3, S, S)}, each under its label."""
    return "".join(f"<p>{label}</p>{picture(part, len(part), label)}" for label, part in images.items())


def html_table(lines):
    """The first line is the head."""
    rows = []
    for i, line in enumerate(lines):
        tag = "td" if i else "th"
        cells = (f"<{tag}>{html.escape(str(word))}</{tag}>" for word in line)
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def flat(config, sections):
    """{"section.key": value} of a configuration: values that stand in no section, and those of `sections`."""
    values = {key: value for key, value in config.items() if not isinstance(value, dict)}
    for section in [key for key in sections if isinstance(config.get(key), dict)]:
        values |= {f"{section}.{key}": value for key, value in config[section].items()}
    return values


def metric_tables(results):
    """A table for each way of measuring: a row for each result, a column for each number.

    results: {name: result of `metrics`}
    """
    groups = {}
    for name, result in results.items():
        groups.setdefault(tuple(str(result[key]) for key in HOW), {})[name] = result
    for group in groups.values():
        first = next(iter(group.values()))
        names = [name for name, value in first["results"].items() if isinstance(value, float)]
        lines = [[name, *(f"{result['results'].get(key, math.nan):.4g}" for key in names)]
                 for name, result in group.items()]
        yield (f"<p>{html.escape(first['protocol'])}: {first['num_images']:,} images, features of "
               f"{html.escape(first['extractor'])}.</p>" + html_table([["", *names], *lines]))


CURVES_OF = Path(ROOT) / "assets" / "curves"
CURVES = dict(  # in words, with the unit
    loss="training loss", loss_rec="L1 of reconstructions", loss_per="perceptual loss",
    loss_disc="loss of the discriminator", val_loss="validation loss (nats)", val_top1="validation top-1",
    val_psnr="validation PSNR (dB)", usage="codebook usage", val_accuracy="validation accuracy")


def curve(rows, name):
    """(steps, values) of what a stage logged under a name; a value that is not finite was logged as None"""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return tuple(zip(*points, strict=True)) or ((), ())


def reference_runs():
    """[(configuration, rows of the log)] of the runs in assets/curves, see tests/benchmarks/curves.py."""
    for path in sorted(CURVES_OF.glob("*.jsonl")):
        head, *rows = map(json.loads, path.read_text("utf-8").splitlines())
        yield head["config"], rows


def like(stage, config):
    """(rows of the reference runs whose stage, and what it builds on, was made as this one but for the seed
    and the precision, their images; or, where there is none, in words what differs)"""
    sections = {section for name in ("vgg", "phase1", stage) for section in DEPENDS[name]}
    ours, found, others, images = flat(config, sections), [], [], ""
    for other, rows in reference_runs():
        theirs = flat(other, sections)
        places = ["cifar10" if is_folder(c["data"]) else c["data"] for c in (config, other)]  # it may be
        if places[0] != places[1] or config["image_size"] != other["image_size"]:
            continue
        unlike = [f"{key} is {theirs.get(key)}, not {value}" for key, value in ours.items()
                  if value != theirs.get(key) and key not in ("seed", "precision", "data", "val")]
        if unlike:
            others.append(unlike)
        else:
            found.append([row for row in rows if row["stage"] == stage])
            images = other["data"]
    if found or not others:
        return found, images
    closest = min(others, key=len)
    more = f", and {len(closest) - 4} more values" if len(closest) > 4 else ""
    return [], f"{stage} has no band: of the reference runs {', '.join(closest[:4])}{more}"


def band(runs, name):
    """{step: (lowest, highest)} of several runs, at the steps that all of them logged"""
    values = [dict(zip(*curve(rows, name), strict=True)) for rows in runs]
    steps = sorted(set.intersection(*map(set, values))) if values else []
    return {step: (min(of[step] for of in values), max(of[step] for of in values)) for step in steps}


def draw_curve(rows, name, title, behind):
    """One panel: a line, with points where there are few; behind it the band {step: (low, high)}."""
    fig = new_figure(3.4, 2.3)
    axis, (steps, values) = fig.subplots(), curve(rows, name)
    if behind:
        axis.fill_between([*behind], *zip(*behind.values(), strict=True), color="#e69f00", alpha=0.5)
    axis.plot(steps, values, "o-" if len(steps) < 20 else "-", markersize=3)
    axis.set(xlabel="step", title=title)
    return fig


def curves(rows, ckpts):
    """HTML parts: a panel for each of CURVES that a stage logged, with the band of the reference runs, and in
    words where a curve ends beside it by more than its width, and why a stage has none."""
    panels, words, banded = [], [], []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        runs, what = like(stage, ckpts[stage]["config"]) if stage in ckpts else ([], "")
        words += [what] * bool(what and not runs)
        for name in [name for name in CURVES if curve(mine, name)[0]]:
            title, behind = f"{stage}: {CURVES[name]}", band(runs, name)
            panels.append(plot(draw_curve(mine, name, title, behind), title))
            last, value = curve(mine, name)[0][-1], curve(mine, name)[1][-1]
            low, high = behind.get(last, (value, value))
            if len(runs) > 1 and not 2 * low - high <= value <= 2 * high - low:
                words.append(f"{title} ends at {value:.4g}; the {len(runs)} reference runs end between "
                             f"{low:.4g} and {high:.4g}")
        if runs:
            banded, images = [*banded, stage], what
    if banded:
        words.insert(0, f"The band ({', '.join(banded)}) is of runs on {images} with the same values, in "
                        "assets/curves")
    return f'<div class="curves">{"".join(panels)}</div>', *(f"<p>{html.escape(text)}.</p>" for text in words)


def stage_line(stage, ckpt, rows):
    """What a stage took and reached; folded away, the values that its own checkpoint was made with."""
    mine = [row for row in rows if row["stage"] == stage]
    reached = [f"{CURVES[name]} {curve(mine, name)[1][-1]:.4g}" for name in CURVES
               if name.startswith(("val", "usage")) and curve(mine, name)[0]]
    words = ", ".join([f"{ckpt['step']:,} steps", f"{ckpt['seconds']:,.0f} s", *reached])
    values = flat(ckpt["config"], [*DEPENDS[stage], *["sample"] * (stage in ("ar", "nar"))])
    return (f"<details><summary>{stage}: {words}</summary>"
            + html_table([["value", "of this stage"], *values.items()]) + "</details>")


@torch.no_grad()
def report(args):
    """`python -m studies report RUN`: one self-contained HTML page of a run folder, images inside."""
    run, sections, device = args.run, [], setup_device(args.device)
    args.out = args.out or run / "report.html"
    writable(args.out, suffix=".html")
    places = {s: run / f"{s}.pt" for s in ("phase1", "phase2", "ar", "nar", "vgg")}
    found = {s: path for s, path in places.items() if path.is_file()}
    tokenizers = {s: load_model(found[s], (s,), device)[0] for s in ("phase1", "phase2") if s in found}
    if not tokenizers:
        raise UserError(f"{run} holds no phase1.pt or phase2.pt; name the folder of a run")
    ckpts, first = {s: header(path) for s, path in found.items()}, next(iter(found))
    note, config = next(filter(None, (c["note"] for c in ckpts.values())), ""), ckpts[first]["config"]
    last = list(tokenizers.values())[-1]

    def section(title, *parts):
        sections.append(f"<section><h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "</section>")

    rows, metrics = read_metrics(run / "metrics.jsonl"), {}
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text("utf-8"))
        about = [(key, summary[key]) for key in ("command", "commit", "torch", "threads") if summary.get(key)]
        section("At a glance", html_table([["", "", "what it is"], *headline(summary)]), html_table(
            [["how", ""], ["time", f"{summary['seconds']:,} s of training"], *about]))
    section("Stages, and the values that each was made with", *(
        stage_line(stage, ckpts[stage], rows) for stage in STAGES if stage in ckpts))
    for path in sorted(run.glob("metrics_*.json")):
        try:
            metrics |= {path.stem: read_result(path)}
        except UserError as error:
            print0(f"note: {error}; it is left out")
    if metrics:
        section("Metrics", *metric_tables(metrics), "<p>Tables do not compare with each other.</p>")
    if rows:
        section("Curves", *curves(rows, ckpts))

    count = min(args.num or 64, 200, len(images_of(found[first], config, args.data)[1]))
    x = to_float(load_images(config, count, args.data, found[first])[1], device)
    config, shown = with_data(config, args.data), min(8, len(x))
    tokens = torch.cat([last.encode(part) for part in x.split(50)])
    codes = None if args.data else kept_codes(run, latent_hash(last))
    counted = codes["val"].long() if codes else tokens.cpu()
    counts = count_codes(counted, last.codebook_size)
    usage, perplexity = codebook_usage(counts)
    counts, fig = counts.flatten(), new_figure(5, 2)  # k sub-codebooks in one row
    fig.subplots().bar(range(len(counts)), counts.sort(descending=True).values.numpy(), width=1)
    fig.axes[0].set(xlabel="codes, the most frequent first", ylabel="times chosen")
    section("Codebook", f"<p>{usage:.1%} of {len(counts)} codes are chosen for {len(counted):,} validation "
            f"images; perplexity {perplexity:.1f}.</p>", plot(fig, "histogram of the codes"))

    decoded = {s: decode(t, tokens[:shown]) for s, t in tokenizers.items()}
    section("Reconstructions", labelled(dict(input=x[:shown]) | decoded))

    if "ar" in found:
        pairs, _ = load_pairs([found["ar"]], len(x), device, (), args.data)
        view, numbers = pairs[0]["view"], pairs[0]["numbers"]
        token = "sub-token" if tokens.dim() > 2 else "token"
        section("Teacher-forced view", f"<p>The prediction decodes what the AR prior takes for each {token}, "
                f"given the true ones before: {numbers['top1']:.1%} of them are right, "
                f"{numbers['nats_per_token']:.3f} nats a {token}.</p>", labelled(dict(input=x[:shown]) | {
                    key: view[key][:shown] for key in ("reconstruction", "prediction")}))
    for stage in [s for s in ("ar", "nar") if s in found]:
        prior, ckpt = load_model(found[stage], (stage,), device)
        tokenizer, _ = load_tokenizer_of(found[stage], ckpt, None, device)
        settings, classes = ckpt["config"]["sample"], prior.config.num_classes
        columns = min(classes or 8, 10)
        labels = [i % columns for i in range(4 * columns)] if classes else None
        sheet = generate_images(prior, tokenizer, 4 * columns, labels, 0, settings)
        names = f"<p>Columns: {html.escape(', '.join(ckpt['class_names'][:10]))}.</p>" if classes else ""
        samples = picture(sheet, columns, f"samples of {stage}")
        section(f"Samples of the {stage.upper()} prior", names, samples)
        if stage == "nar":
            strip = decoding_strip(prior, tokenizer, settings, classes, device)
            section("NAR decoding, step by step", *strip)
    title = f"SeQ-GAN run: {run.absolute().name}" + f" ({note})" * bool(note)
    page = PAGE % dict(title=html.escape(title), body="\n".join(sections))
    save_text(page, args.out)
    print0(f"wrote {args.out} ({len(page) / 2**20:.1f} MB)")


def decoding_strip(prior, tokenizer, settings, classes, device, num=4):
    """HTML parts: samples after each step, what is not yet fixed in grey."""
    N = prior.config.num_tokens
    labels = torch.arange(num, device=device) % classes if classes else None
    tokens, fixed_at = generate_tokens(prior, labels, 0, range(num), settings, return_steps=True)
    images, side, rounds = decode(tokenizer, tokens), math.isqrt(N), int(fixed_at.max()) + 1
    block = images.shape[2] // side
    frames = []
    for image, fixed in zip(images, fixed_at.view(num, side, side), strict=True):
        for t in range(rounds):
            seen = (fixed <= t).repeat_interleave(block, 0).repeat_interleave(block, 1)
            frames.append(torch.where(seen, image, torch.full_like(image, 0.6)))
    return (f"<p>{num} samples after each of {rounds} steps; tokens that are not fixed yet are grey.</p>",
            picture(torch.stack(frames), rounds, "decoding steps"))
