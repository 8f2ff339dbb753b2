"""Means, intervals and verdicts of the experiment on the paper's claims."""

import math

from studies.distances import plain_names


class Spread:
    """Means over seeds and their 95 % intervals: the variance between seeds is pooled over all arms that have
    several (Student's t with the degrees of freedom of the pool), so that arms of one seed have one too."""

    def __init__(self, rows):
        self.rows = [plain_names(row) for row in rows]  # those of older runs too

    def values(self, arm, key):
        return [row[key] for row in self.rows if row["arm"] == arm and row.get(key) is not None]

    def pooled(self, key):
        """(standard deviation between seeds, t), nan and nan while no arm has two seeds."""
        return within([self.values(arm, key) for arm in {row["arm"] for row in self.rows}])

    def difference(self, a, b, key, of_a=None):
        """(mean of arm a minus mean of arm b, half width of its interval), or None while one is missing.

        of_a: the key of arm a, where it is another; the spread is that of `key`
        """
        first, second = self.values(a, of_a or key), self.values(b, key)
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


def interval(found):
    """A difference in words: (mean, half width) or None."""
    if found is None:
        return "not measured"
    mean, half = found
    if math.isnan(half):
        return f"{mean:+.3g} (one seed: no interval)"
    if half == 0:
        return f"{mean:+.3g} (no spread between seeds: no interval)"
    return f"{mean:+.3g} ± {half:.2g}"


def falls(found):
    """True if the whole interval lies below 0, False if it lies above, else None."""
    if found is None or not found[1] > 0:  # no interval
        return None
    mean, half = found
    return True if mean + half < 0 else False if mean - half > 0 else None


def judge_claims(spread):
    """[(claim, verdict, parts)] of the statements of assets/claims_protocol.md, by its rules.

    A part is a difference that the paper says is negative. A claim holds if all its parts fall, each with its
    whole 95 % interval; it does not hold if one interval lies above 0; else it is not decided. A distance has
    two scorers (the second's keys end in _2): where their means differ in sign, the part decides nothing.
    Parts that begin with "beside" are told and not judged.
    """

    def part(text, difference, key):
        """(True, False or None, text) of `difference(key)`, beside it the second scorer's"""
        found, fine = difference(key), falls(difference(key))
        told = f"{text}: {interval(found)}"
        second = difference(key + "_2")
        if second is not None and found is not None:
            told += f" (second scorer {interval(second)})"
            if second[0] * found[0] < 0:
                fine, told = None, f"{told}, which disagree"
        return fine, told

    def arms(a, b, gap=spread.difference):
        return lambda key: gap(a, b, key)

    def between(low, ends):
        """rFD between the ends is below theirs: judged at `low`, refuted only if above everywhere"""
        for end in ends:
            found = [part(f"rFD at {arm} minus {end}", arms(arm, end), "rec_phase1_rfd")
                     for arm in (low, *inner)]
            refuted = all(fine is False for fine, _ in found)
            yield True if found[0][0] else False if refuted else None, "; ".join(text for _, text in found)

    def beside(text, difference, names):
        return f"beside, {text}: " + "; ".join(part(name, difference, key)[1] for name, key in names)

    def both_ways(text, a, b, names):
        """A difference once more: paired by seed, which pools nothing."""
        return beside(f"{text}, paired by seed", arms(a, b, spread.by_seed), names)

    ends, inner = ("alpha=1", "alpha=0"), ("alpha=0.2", "alpha=0.6", "alpha=0.8")
    fds = [("AR FD", "ar_phase1_fd"), ("NAR FD", "nar_phase1_fd")]
    after = [(name + ", phase 1 + 2", key.replace("phase1", "phase2")) for name, key in fds]
    three = [("rFD", "rec_phase1_rfd"), *fds]
    nats = [("AR nats", "ar_nats"), ("NAR nats", "nar_nats")]
    relative = [("AR nats / unigram", "ar_relative"), ("NAR nats / unigram", "nar_relative")]
    steps = [("D minus low", "D", "alpha=0"), ("sem minus D", "alpha=1", "D"),
             ("low minus E", "alpha=0", "E")]

    def second_phase(among):
        """FD after both phases minus after phase 1, at the same tokens"""
        return lambda key: spread.paired(among, key.replace("phase1", "phase2"), key, among)

    def across(a, b):
        """FD of arm a after both phases minus FD of arm b after its only phase"""
        return lambda key: spread.difference(a, b, key, key.replace("phase1", "phase2"))

    claims = [
        ("(a) the FD of samples falls with alpha, and rFD is best between 0 and 1",
         [*(part(f"{name}, alpha = 1 minus 0", arms(*ends), key) for name, key in fds),
          *between("alpha=0.4", ends)],
         [both_ways("alpha = 1 minus 0", *ends, three),
          both_ways("alpha = 0.4 minus 0", "alpha=0.4", "alpha=0", three[:1]),
          beside("alpha = 1 minus 0", arms(*ends), [("view FD", "view_view_fd")]),
          beside("terms of the loss at alpha = 1, alpha = 1 minus 0", arms(*ends),
                 [("relu5_3", "judge_relu5_3"), ("logit", "judge_logit")]),
          beside("alpha = 1 minus 0 with the literal Eq. 4", arms("alpha=1", "literal"), three),
          beside("judge of five pools, alpha = 1 minus 0",
                 arms("five-pools,alpha=1", "five-pools,alpha=0"), three)]),
        ("(b) the loss of the priors falls with alpha (nats over unigram entropy)",
         [part(f"{name}, alpha = 1 minus 0", arms(*ends), key) for name, key in relative],
         [both_ways("alpha = 1 minus 0", *ends, relative),
          beside("alpha = 1 minus 0", arms(*ends), nats), both_ways("alpha = 1 minus 0", *ends, nats),
          beside("alpha = 1 minus a quarter of the codes at alpha = 0", arms("alpha=1", "fewer-codes"),
                 [*three, *nats, *relative]),
          beside("judge of five pools, alpha = 1 minus 0",
                 arms("five-pools,alpha=1", "five-pools,alpha=0"), relative)]),
        ("(d) phase 2 improves samples at unchanged tokens",
         [part(f"{name}, phase 1 + 2 minus phase 1, alpha = 1", second_phase(["alpha=1"]), key)
          for name, key in fds],
         [beside("phase 1 + 2 minus phase 1", second_phase(["alpha=1"]), three[:1])]),
        ("(d') and by more than as many further steps of phase 1 do",
         [part(f"{name}, phase 1 + 2 minus longer phase 1, alpha = 1", across("alpha=1", "longer"),
               key) for name, key in fds],
         [beside("longer phase 1 minus phase 1", arms("longer", "alpha=1"), three),
          both_ways("longer phase 1 minus phase 1", "longer", "alpha=1", three),
          both_ways("with attention minus without", "alpha=1", "no-attention",
                    [("rFD, phase 1 + 2", "rec_phase2_rfd"), *after])]),
        ("(6) the order of Table 6: sem below D below low below E, by the FD of samples",
         [part(f"{name}, {text}", arms(a, b), key) for text, a, b in steps for name, key in fds],
         [both_ways(text, a, b, three) for text, a, b in steps]),
    ]
    for claim, parts, told in claims:
        found = [fine for fine, _ in parts]
        verdict = "does not hold" if False in found else "not decided" if None in found else "holds"
        yield claim, verdict, [text for _, text in parts] + told
