"""Means, intervals and verdicts of the claims."""

import math

from recipes.ablations import CLAIMS


class Spread:
    """Means over seeds and their 95 % intervals: the variance between seeds is pooled over all arms that have
    several (Student's t with the degrees of freedom of the pool), so that arms of one seed have one too."""

    def __init__(self, rows):
        self.rows = rows

    def values(self, arm, key):
        return [row[key] for row in self.rows if row["arm"] == arm and key in row]

    def pooled(self, key):
        """(standard deviation between seeds, t), nan and nan while no arm has two seeds."""
        return within([self.values(arm, key) for arm in {row["arm"] for row in self.rows}])

    def difference(self, a, b, key):
        """(mean of arm a minus mean of arm b, half width of its interval), or None while one is missing."""
        first, second = self.values(a, key), self.values(b, key)
        if not first or not second:
            return None
        deviation, t = self.pooled(key)
        half = t * deviation * math.sqrt(1 / len(first) + 1 / len(second))
        return sum(first) / len(first) - sum(second) / len(second), half

    def paired(self, arms, a, b, pool):
        """(mean of key a minus key b within the runs of `arms`, half width), or None; the variance of these
        differences is pooled within the arms `pool`."""
        gaps = {arm: [row[a] - row[b] for row in self.rows if row["arm"] == arm and a in row and b in row]
                for arm in {*arms, *pool}}
        found = [gap for arm in arms for gap in gaps[arm]]
        if not found:
            return None
        deviation, t = within([gaps[arm] for arm in pool])
        return sum(found) / len(found), t * deviation / math.sqrt(len(found))

    def by_seed(self, a, b, key):
        """As `difference`, from the differences between runs of one seed, which see the same batches and
        begin with (almost) the same weights. The interval is of these few differences and pools nothing."""
        other = {row["seed"]: row[key] for row in self.rows if row["arm"] == b and key in row}
        gaps = [row[key] - other[row["seed"]] for row in self.rows
                if row["arm"] == a and key in row and row["seed"] in other]
        deviation, t = within([gaps])
        return (sum(gaps) / len(gaps), t * deviation / math.sqrt(len(gaps))) if gaps else None

    def told(self, arm, key):
        values = self.values(arm, key)
        if not values:
            return "-"
        deviation, t = self.pooled(key)
        half = t * deviation / math.sqrt(len(values))
        return f"{sum(values) / len(values):.4g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")


def within(groups):
    """(standard deviation within groups of numbers, Student's t at 97.5 %), nan if none has two numbers"""
    from scipy.stats import t

    free = sum(len(group) - 1 for group in groups if group)
    if not free:
        return math.nan, math.nan
    squares = sum((v - sum(group) / len(group)) ** 2 for group in groups for v in group)
    return math.sqrt(squares / free), t.ppf(0.975, free).item()


def judge_claims(spread):
    """[(claim, verdict, parts)] of the paper's five statements; the rules are those of the protocol.

    A part is a difference that the paper says is negative ("falls"), or is not ("no fall"). A claim holds if
    all parts do, each with its whole 95 % interval; it does not hold if one interval lies on the other side.
    Usage in (e) is judged by limits instead. Parts that begin with "beside" are told and not judged.
    """

    def part(text, found, margin=None):
        """(True, False or None, text). With a margin, 0 or more: no fall, so none beyond the margin."""
        if found is None:
            return None, f"{text}: not measured"
        mean, half = found
        if math.isnan(half):
            return None, f"{text}: {mean:+.3g} (one seed: no interval)"
        if half == 0:
            return None, f"{text}: {mean:+.3g} (no spread between seeds: no interval)"
        told = f"{text}: {mean:+.3g} ± {half:.2g}"
        if margin is not None:
            return (False if mean + half < 0 else True if mean - half > -margin else None), told
        return (True if mean + half < 0 else False if mean - half > 0 else None), told

    def best_between(end):
        """rFD at 0.5 is below that of an end; refuted only if it is above at each alpha between."""
        found = [part(f"rFD at {arm} minus {end}", d(arm, end, "rec_phase1_rfid"))
                 for arm in ("alpha=0.5", "alpha=0.25", "alpha=0.75")]
        refuted = all(fine is False for fine, _ in found)
        return True if found[0][0] else False if refuted else None, "; ".join(text for _, text in found)

    ends, d = ("alpha=1", "alpha=0"), spread.difference
    middle = [best_between(end) for end in ends]
    alphas = [arm for arm in CLAIMS if arm.startswith("alpha=")]
    both, f4 = ("ar", "nar"), ("f4,alpha=1", "f4,alpha=0")
    gain = d("attention2", "alpha=0", "rec_phase1_rfid")
    margin = max(0.0, -gain[0] / 2) if gain else 0.0
    limit = f" (no fall beyond {margin:.2g})" if gain else ""
    three = (("rFD", "rec_phase1_rfid"), ("AR FD", "ar_phase1_fid"), ("NAR FD", "nar_phase1_fid"))

    def beside(text, *found):
        return f"beside, {text}: " + "; ".join(part(name, value)[1] for name, value in found)

    def compared(text, a, b, names, gap=d):
        return beside(text, *[(name, gap(a, b, key)) for name, key in names])

    def by_seed(text, a, b, names):
        return compared(f"{text}, paired by seed", a, b, names, spread.by_seed)

    second = [(f"{s.upper()} FD, phase 1 + 2", f"{s}_phase2_fid") for s in both]
    nats = [(s.upper(), f"{s}_nats") for s in both]
    relative = [(s.upper(), f"{s}_relative") for s in both]
    told = {
        "(a)": [compared("alpha = 1 minus 0", *ends, [*second, ("view FD", "view_view_fid")]),
                compared("terms of the loss at alpha = 1, alpha = 1 minus 0", *ends,
                         [("relu5_3", "judge_relu5_3"), ("logit", "judge_logit")]),
                compared("f = 4, alpha = 1 minus 0", *f4, three),
                by_seed("alpha = 0.5 minus 0", "alpha=0.5", "alpha=0", three),
                by_seed("alpha = 1 minus 0", *ends, three)],
        "(b)": [compared("nats, alpha = 1 minus 0", *ends, nats),
                compared("over unigram, f = 4, alpha = 1 minus 0", *f4, relative),
                by_seed("over unigram, alpha = 1 minus 0", *ends, relative)],
        "(c)": [by_seed("attention x2 minus baseline", "attention2", "alpha=0", three)],
        "(d)": [beside("phase 1 + 2 minus phase 1, all alphas", *[
            (s.upper(), spread.paired(alphas, f"{s}_phase2_fid", f"{s}_phase1_fid", alphas)) for s in both])],
        "(e)": [compared("both from a K-means start, entropy minus plain", "alpha=0", "plain",
                         [("usage", "rec_phase1_usage"), *three])],
    }
    usage = [row["rec_phase1_usage"] for row in spread.rows if row["arm"] == "alpha=0"]
    full = (min(usage) > 0.99, f"lowest usage of the arm alpha=0: {min(usage):.1%}") if usage else (
        None, "usage of the arm alpha=0: not measured")
    gap = d("entropy", "vqgan", "rec_phase1_usage")  # near 100 % seeds hardly differ: a margin instead
    more = (None, "usage, entropy minus plain: not measured") if gap is None else (
        None if abs(gap[0]) <= 0.05 or math.isnan(gap[1]) else gap[0] > 0,
        f"usage, entropy minus plain: {100 * gap[0]:+.1f} points (counts beyond 5)")
    claims = [
        ("(a) the FD of samples falls with alpha, and rFD is best between 0 and 1",
         [part(f"{s.upper()} FD, alpha = 1 minus 0", d(*ends, f"{s}_phase1_fid")) for s in both] + middle),
        ("(b) the loss of the priors falls with alpha (nats over unigram entropy)",
         [part(f"{name}, alpha = 1 minus 0", d(*ends, key)) for name, key in relative]),
        ("(c) the attention decoder improves rFD and does not improve samples",
         [part("rFD, attention x2 minus baseline", d("attention2", "alpha=0", "rec_phase1_rfid"))]
         + [part(f"{s.upper()} FD, attention x2 minus baseline{limit}",
                 d("attention2", "alpha=0", f"{s}_phase1_fid"), margin) for s in both]),
        ("(d) phase 2 improves samples at unchanged tokens",
         [part(f"{s.upper()} FD, phase 1 + 2 minus phase 1, alpha = 1",
               spread.paired(["alpha=1"], f"{s}_phase2_fid", f"{s}_phase1_fid", alphas)) for s in both]),
        ("(e) the entropy term brings usage to about 100 % and improves both",
         [full, more]
         + [part(f"{name}, entropy minus plain", d("entropy", "vqgan", key)) for name, key in three]),
    ]
    for claim, parts in claims:
        found = [fine for fine, _ in parts]
        verdict = "does not hold" if False in found else "not decided" if None in found else "holds"
        yield claim, verdict, [text for _, text in parts] + told.get(claim[:3], [])
