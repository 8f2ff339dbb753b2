"""The arena's rules, as its protocol wrote them down before the first row; its tables and its figure."""

import math
from dataclasses import dataclass

import numpy as np

from plumbing.drawing import new_figure, save_figure
from plumbing.processes import print0
from recipes.arena import CONFIGURATIONS, FIRST, FORKS, ORDER
from studies.tables import number, print_table

HALF_THE_PAPER = -0.145  # alpha = 1 lowers the paper's AR FID by 29 % (Table 6: 16.97 to 12.07)
FEW = "an interval takes two seeds"
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
    values = {name: {row["seed"]: row[key] for row in rows
                     if row["configuration"] == name and row.get(key) is not None} for name in (a, b)}
    seeds = sorted(values[a].keys() & values[b].keys())
    if len(seeds) < 2:
        return None
    mean, half = mean_and_half([values[a][seed] - values[b][seed] for seed in seeds])
    base = float(np.mean([values[b][seed] for seed in seeds]))
    return Gap(mean, mean - half, mean + half, len(seeds), base)


def mean_and_half(values):
    """Mean of numbers, at least two, and half the width of its 95 % interval by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


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
        parts = [f"by B: {by_b or FEW}", f"by A: {by_a or FEW}"]
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
         [f"over unigram: {nats[0] or FEW}", f"raw: {nats[1] or FEW}"]),
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


COLUMNS = dict(fd_b="AR FD (B)", fd_a="AR FD (A)", rfd_b="rFD (B)", rfd_a="rFD (A)", nats="nats",
               relative="over unigram", bits_per_image="bits", probe="probe", pfd_b="p-FD (B)",
               ifd_b="iFD (B)", class_accuracy="class (A)", precision="precision", recall="recall",
               psnr="PSNR", usage="usage", perplexity="perplexity", phase1_last_fifth="L1, last fifth",
               ar_last_fifth="nats, last fifth", seconds="seconds")


def by_configuration(rows):
    found = {name: [row for row in rows if row["configuration"] == name] for name in CONFIGURATIONS}
    return {name: same for name, same in found.items() if same}


def show(rows, path):
    """Prints the tables, the verdicts and the rank correlations, and draws the figure to `path`."""
    lines = [["", "seeds", *COLUMNS.values()]]
    for name, same in by_configuration(rows).items():
        values = [[row[key] for row in same if row.get(key) is not None] for key in COLUMNS]
        lines.append([name, str(len(same)), *(
            "{:.4g} ± {:.2g}".format(*mean_and_half(some)) if len(some) > 1 else number(*some or [None])
            for some in values)])
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
    """rFD against AR FD, both by B: a point for each row, joined to the mean over its seeds."""
    fig = new_figure(6.5, 5)
    axis, numbers, means = fig.subplots(), {}, {}
    for i, (name, same) in enumerate(by_configuration(rows).items()):
        points = sorted((row["rfd_b"], row["fd_b"]) for row in same
                        if None not in (row.get("rfd_b"), row.get("fd_b")))
        if not points:
            continue
        numbers[name], mean = points, np.mean(points, axis=0)
        style = dict(color=f"C{i % 10}", marker="o" if name in FORKS else "s" if name in FIRST else "^")
        for point in points:
            axis.plot(*zip(mean, point, strict=True), markersize=2.5, linewidth=0.6, alpha=0.6, **style)
        means[name], = axis.plot(*mean, markersize=7, zorder=3, **style)
    title = "" if found is None else (
        f"rank correlation {interval(found['rho'], found['low'], found['high'])} over {found['n']} "
        "configurations")
    axis.set(xlabel="rFD: reconstructions", ylabel="AR FD: samples", title=title)
    label(axis, means)
    save_figure(fig, path, dict(points=numbers, correlation=found))


def label(axis, marks):
    """Writes each name beside its mark (name: Line2D), on the side where it covers fewest marks and names."""
    axis.figure.draw_without_rendering()  # it places the axes
    taken = [mark.get_window_extent() for mark in marks.values()]

    def covered(text, side):
        text.set(position=side, ha="left" if side[0] > 0 else "right")
        return text.get_window_extent().count_overlaps(taken)

    for name, mark in marks.items():
        text = axis.annotate(name, mark.get_xydata()[0], (0, 0), textcoords="offset points", fontsize=8,
                             va="center", color=mark.get_color())
        sides = [(x, y) for y in (0, 8, -8) for x in (7, -7)]
        covered(text, min(sides, key=lambda side, text=text: covered(text, side)))
        taken.append(text.get_window_extent())
