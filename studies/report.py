"""The report of a run: one HTML file that needs nothing else."""

import base64
import html
import io
import math
import time

import torch

from plumbing.codes import codebook_usage, count_codes, kept_codes
from plumbing.data import images_of, with_data
from plumbing.drawing import literal, new_figure
from plumbing.errors import UserError
from plumbing.files import header, read_metrics, save_text, writable
from plumbing.hashes import latent_hash
from plumbing.images import make_sheet, to_float, to_uint8
from plumbing.models import load_model, load_tokenizer_of
from plumbing.processes import print0, setup_device
from plumbing.slices import decode, generate_images, generate_tokens
from plumbing.stages import DEPENDS
from studies.metrics import HOW, read_result
from visualize import load_images, load_pairs

AGAIN = '\n<meta http-equiv="refresh" content="10">'  # the browser reads it again, as somebody watches
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">%(again)s
<title>%(title)s</title><style>
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem; }
img { max-width: 100%%; } img.pixels { image-rendering: pixelated; width: 100%%; display: block; }
img.plot { background: white; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td.best { font-weight: bold; }
td, th { border: 1px solid var(--line); padding: .2rem .5rem; text-align: left; vertical-align: top; }
.row { display: grid; grid-template-columns: repeat(%(shown)d, 1fr); gap: 3px; }
.stack { position: relative; } .stack img + img { position: absolute; inset: 0; }
input[type=range] { width: 100%%; }
</style></head><body><h1>%(title)s</h1>
%(body)s
<script>
function slide(input) {
  for (const top of input.closest("section").querySelectorAll(".stack img + img"))
    top.style.clipPath = `inset(0 0 0 ${input.value}%%)`;
}
document.querySelectorAll("input[type=range]").forEach(slide);
</script></body></html>
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
    source = data_uri(lambda f: literal(fig).savefig(f, format="png", dpi=110))
    return f'<img class="plot" src="{source}" alt="{html.escape(alt)}">'


def stacks(images):
    """A row of pictures; those of a second name lie over the first, with a slider that uncovers these.

    images: {name: (n, 3, S, S)}, one or two
    """
    lists = [[picture(x[None], 1, f"{name} {i}") for i, x in enumerate(part)]
             for name, part in images.items()]
    row = "".join(f'<div class="stack">{"".join(stack)}</div>' for stack in zip(*lists, strict=True))
    first, second = [*images, ""][:2]
    slider = (f"<label>Slide from {second} (left) to {first} (right): "
              '<input type="range" min="0" max="100" value="50" oninput="slide(this)"></label>')
    return f'<div class="row">{row}</div>' + slider * bool(second)


def html_table(lines, best=()):
    """best: places (row, column) of the cells that are marked"""
    rows = []
    for i, line in enumerate(lines):
        tags = ["th" if i == 0 else 'td class="best"' if (i, j) in best else "td" for j in range(len(line))]
        cells = [f"<{tag}>{html.escape(str(word))}</{tag[:2]}>" for tag, word in zip(tags, line, strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def configuration(config, stages):
    """{section: values} as each stage was made with them; of stages that are not there nothing.

    config: of the run, for what belongs to no stage;  stages: {stage: configuration in its checkpoint}
    """
    keys = {stage: [*DEPENDS[stage], *["sample"] * (stage in ("ar", "nar"))] for stage in DEPENDS}
    shown = {key: value for key, value in config.items() if key not in sum(keys.values(), [])}
    for stage, own in stages.items():
        for key in keys[stage]:
            same = shown.get(key, own.get(key)) == own.get(key)
            shown[key if same else f"{key} of {stage}"] = own.get(key)
    return shown


LOW = ("fid", "kid", "fd", "kd", "l1", "lpips", "nats")  # what is better when it is lower; of usage none is


def metric_tables(results):
    """A table for each way of measuring: a row for each result, a column for each number, the best marked.

    results: {name: result of `metrics`}
    """
    groups = {}
    for name, result in results.items():
        groups.setdefault(tuple(str(result[key]) for key in HOW), {})[name] = result
    for group in groups.values():
        first = next(iter(group.values()))
        names = [name for name, value in first["results"].items() if isinstance(value, float)]
        columns = [[result["results"].get(key, math.nan) for result in group.values()] for key in names]
        cells = [["-" if math.isnan(value) else f"{value:.4g}" for value in column] for column in columns]
        lines, best = [["", *names], *zip(group, *cells, strict=True)], set()
        for j, (key, column) in enumerate(zip(names, columns, strict=True), 1):
            if len(set(column)) > 1 and not any(map(math.isnan, column)):
                top = min(column) if any(part in key for part in LOW) else max(column)
                best |= {(i, j) for i, value in enumerate(column, 1) if value == top}
        yield (f"<p>{html.escape(first['protocol'])}: {first['num_images']:,} images, features of "
               f"{html.escape(first['extractor'])}.</p>" + html_table(lines, best))


CURVES = ("loss", "loss_rec", "loss_per", "loss_disc", "val_loss")


def draw_curves(rows):
    """Loss curves of all stages that logged one of CURVES in training; validation losses as dots."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    fig = new_figure(9, 2.1 * math.ceil(len(stages) / 2))
    for i, stage in enumerate(stages):
        axis = fig.add_subplot(math.ceil(len(stages) / 2), 2, i + 1)
        mine = [row for row in rows if row["stage"] == stage]
        for j, name in enumerate(CURVES):
            points = [(row["step"], row[name]) for row in mine if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), ("-", "--", ":", "-.", "o-")[j], label=name,
                          linewidth=1, markersize=3)
        axis.set_title(stage, fontsize=9)
        axis.set_xlabel("step", fontsize=7)
        axis.set_ylabel("loss (log scale)", fontsize=7)
        axis.set_yscale("log")
        axis.legend(fontsize=6)
    return fig


def report(args):
    """`python -m studies report RUN`; with --watch again whenever the run has new files, until stopped."""
    run, seen = args.run, None
    args.out = args.out or run / "report.html"
    writable(args.out, suffix=".html")
    if not args.watch:
        return write_report(args)
    print0(f"watching {run}; Ctrl-C ends it")
    try:
        while True:
            try:
                if (now := news(run)) != seen:
                    seen = now
                    write_report(args)
            except (UserError, OSError) as error:  # the run renames files meanwhile
                print0(f"waiting: {error}")
            time.sleep(2)
    except KeyboardInterrupt:
        if args.out.exists():
            save_text(args.out.read_text("utf-8").replace(AGAIN, "", 1), args.out)


def news(run):
    """What tells that a run went on: the times of its checkpoints and results."""
    files = [path for pattern in ("*.pt", "metrics*.json*") for path in sorted(run.glob(pattern))]
    return {path.name: path.stat().st_mtime_ns for path in files if path.is_file()}


@torch.no_grad()
def write_report(args):
    """One self-contained HTML page of a run folder: no network, images inside."""
    run, sections, device = args.run, [], setup_device(args.device)
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

    metrics = {}
    for path in sorted(run.glob("metrics_*.json")):
        try:
            metrics |= {path.stem: read_result(path)}
        except UserError as error:
            print0(f"note: {error}; it is left out")
    if metrics:
        section("Metrics", *metric_tables(metrics), '<p>Tables do not compare with each other. '
                "The best value of a column is bold.</p>")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if any(row.get(c) is not None for c in CURVES)]
    if rows:
        section("Loss curves", plot(draw_curves(rows), "loss curves of all stages"))

    count = min(args.num or 64, 200, len(images_of(found[first], config, args.data)[1]))
    x = to_float(load_images(config, count, args.data, found[first])[1], device)
    config, shown = with_data(config, args.data), min(8, len(x))
    tokens = torch.cat([last.encode(part) for part in x.split(50)])
    codes = kept_codes(run, latent_hash(last))
    counted = codes["val"].long() if codes else tokens.cpu()
    counts = count_codes(counted, last.codebook_size)
    usage, perplexity = codebook_usage(counts)
    counts, fig = counts.flatten(), new_figure(9, 2)  # k sub-codebooks in one row
    fig.subplots().bar(range(len(counts)), counts.sort(descending=True).values.numpy(), width=1)
    fig.axes[0].set(xlabel="codes, the most frequent first", ylabel="times chosen")
    section("Codebook", f"<p>{usage:.1%} of {len(counts)} codes are chosen for {len(counted):,} validation "
            f"images; perplexity {perplexity:.1f}.</p>", plot(fig, "histogram of the codes"))

    decoded = {s: decode(t, tokens[:shown]) for s, t in tokenizers.items()}
    section("Reconstructions", "<p>Inputs:</p>", picture(x[:shown], shown, "inputs"),
            "<p>Decoded from the same tokens:</p>", stacks(decoded))

    if "ar" in found:
        pairs, _ = load_pairs([found["ar"]], len(x), device, (), args.data)
        view, numbers = pairs[0]["view"], pairs[0]["numbers"]
        section("Teacher-forced view", "<p>Reconstruction, and over it what the AR prior predicts for every "
                f"token given the true ones before: {numbers['top1']:.1%} of tokens are right, "
                f"{numbers['nats_per_token']:.3f} nats a token. Inputs, then the two:</p>",
                picture(x[:shown], shown, "inputs"),
                stacks({key: view[key][:shown] for key in ("reconstruction", "prediction")}))
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
    values = configuration(config, {stage: ckpt["config"] for stage, ckpt in ckpts.items()})
    section("Configuration", html_table([["section", "values"], *(
        [key, ", ".join(f"{k} = {v}" for k, v in value.items()) if isinstance(value, dict) else value]
        for key, value in values.items())]))
    title = f"SeQ-GAN run: {run.absolute().name}" + f" ({note})" * bool(note)
    page = PAGE % dict(title=html.escape(title), shown=shown, body="\n".join(sections),
                       again=AGAIN * bool(args.watch))
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
