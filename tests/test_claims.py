"""Claims about the experiment on the paper's claims: its arms, its intervals, its verdicts."""

import math

import pytest

import recipes.ablations
import recipes.options
import studies.claims
from plumbing.errors import UserError
from recipes.ablations import CLAIMS
from studies.verdicts import Spread, judge_claims

FDS = ("rec_phase1_rfd", "ar_phase1_fd", "nar_phase1_fd", "rec_phase2_rfd", "ar_phase2_fd",
       "nar_phase2_fd")
LOSSES = ("ar_nats", "nar_nats", "ar_relative", "nar_relative")


def as_the_paper_says():
    """Runs in which every statement holds, with a spread of 0.02 between seeds; both scorers agree."""
    rows = []
    for name, arm in CLAIMS.items():
        level = float(name.rpartition("=")[2]) if "=" in name else {"D": 0.7, "E": -0.3}.get(name, 0.0)
        if name in ("longer", "no-attention"):
            level = 1.0
        for seed in range(arm.seeds):
            row = dict.fromkeys((*FDS, *LOSSES), 10 - 4 * level + 0.02 * (seed - 1))
            row["rec_phase1_rfd"] = 5 + 8 * (level - 0.5) ** 2 + 0.02 * (seed - 1)
            for key in FDS[3:]:
                row[key] -= 0.5 + 0.01 * seed
            if name == "longer":
                row = {key: value - 0.2 for key, value in row.items()}
            row = {key: value for key, value in row.items()
                   if (len(arm.phases) == 2 or "phase2" not in key) and (arm.draws or "rfd" in key)}
            row |= {f"{key}_2": 3 * row[key] for key in FDS if key in row}
            rows.append(row | dict(arm=name, seed=seed))
    return rows


def verdicts(rows):
    return {claim[: claim.index(")") + 1]: verdict for claim, verdict, _ in judge_claims(Spread(rows))}


ALL = ("(a)", "(b)", "(d)", "(d')", "(6)")


def shifted(arm, key, change, rows=None):
    """The runs of the paper's statements with one number moved, in every seed and by both scorers."""
    return [{k: v + change if k in (key, f"{key}_2") else v for k, v in row.items()}
            if row["arm"] == arm or arm == "alpha=" and row["arm"].startswith(arm) else row
            for row in rows or as_the_paper_says()]


def test_every_statement_holds_where_the_numbers_are_as_the_paper_says():
    assert verdicts(as_the_paper_says()) == dict.fromkeys(ALL, "holds")


@pytest.mark.parametrize("claim, key, arm, change", [
    ("(a)", "nar_phase1_fd", "alpha=1", 100), ("(a)", "rec_phase1_rfd", "alpha=0", -100),
    ("(b)", "ar_relative", "alpha=1", 10), ("(d)", "ar_phase2_fd", "alpha=", 100),
    ("(d')", "nar_phase1_fd", "longer", -100), ("(6)", "ar_phase1_fd", "D", 100),
    ("(6)", "ar_phase1_fd", "D", -100), ("(6)", "nar_phase1_fd", "E", -100)])
def test_one_number_on_the_other_side_refutes_a_statement(claim, key, arm, change):
    assert verdicts(shifted(arm, key, change))[claim] == "does not hold"


def test_a_wide_spread_or_a_missing_arm_decides_nothing():
    rows = as_the_paper_says()
    for row in rows:
        row["ar_relative"] = row.get("ar_relative", 0) + 40 * (row["seed"] - 1)
    assert verdicts(rows)["(b)"] == "not decided"
    rows = shifted("alpha=0.4", "rec_phase1_rfd", 100)  # the best rFD may lie elsewhere between the ends
    assert verdicts(rows)["(a)"] == "not decided"
    rows = [row for row in as_the_paper_says() if row["arm"] != "E"]
    assert verdicts(rows) == {**dict.fromkeys(ALL, "holds"), "(6)": "not decided"}
    one = [row for row in as_the_paper_says() if row["seed"] == 0]  # no two seeds: no interval
    assert set(verdicts(one).values()) == {"not decided"}


@pytest.mark.parametrize("claim, key, arm", [
    ("(a)", "ar_phase1_fd_2", "alpha=1"), ("(a)", "rec_phase1_rfd_2", "alpha=0.4"),
    ("(d)", "nar_phase2_fd_2", "alpha=1"), ("(d')", "nar_phase1_fd_2", "longer"),
    ("(6)", "ar_phase1_fd_2", "E")])
def test_scorers_that_disagree_on_a_sign_decide_nothing(claim, key, arm):
    change = -100 if arm in ("longer", "E") else 100
    rows = shifted(arm, key, change)
    assert verdicts(rows)[claim] == "not decided"
    told = "\n".join(part for *_, parts in judge_claims(Spread(rows)) for part in parts)
    assert "which disagree" in told
    refuted = shifted(arm, key.removesuffix("_2"), change)  # and where both say no, it is no
    assert verdicts(refuted)[claim] == ("not decided" if arm == "alpha=0.4" else "does not hold")


def test_the_limits_are_those_of_the_protocol():
    assert verdicts(shifted("alpha=1", "nar_relative", 4.1))["(b)"] == "does not hold"  # +0.1, ± 0.03
    assert verdicts(shifted("alpha=1", "nar_relative", 4.0))["(b)"] == "not decided"


def test_what_is_told_beside_the_verdicts_has_the_sign_that_its_words_say():
    spread = Spread(as_the_paper_says())
    told = "\n".join(part for *_, parts in judge_claims(spread) for part in parts)
    for words in ("AR FD, alpha = 1 minus 0: -4 ± 0.045 (second scorer -12 ± 0.14)",
                  "beside, phase 1 + 2 minus phase 1: rFD: ",
                  "alpha = 0.4 minus 0, paired by seed: rFD: -1.92",
                  "a quarter of the codes at alpha = 0: rFD: +0.02 ±",
                  "longer phase 1 minus phase 1: rFD: -0.22 ±",
                  "with attention minus without, paired by seed: rFD, phase 1 + 2: +0 (one seed",
                  "judge of five pools, alpha = 1 minus 0: rFD: +0 ± 0.069 (second scorer +0 ±",
                  "low minus E, paired by seed: rFD: -3.12 (one seed: no interval)"):
        assert words in told, f"{words}\n{told}"
    deviation, t = spread.pooled("ar_relative")
    assert spread.told("alpha=0", "ar_relative") == f"10 ± {t * deviation / math.sqrt(3):.2g}"
    assert spread.told("alpha=0.4", "ar_relative") == "-"  # no priors there


def test_intervals_are_student_s_of_the_variance_pooled_over_arms():
    values = dict(a=(1.0, 3.0), b=(5.0, 6.0, 7.0), c=(9.0,))
    rows = [dict(arm=arm, x=x) for arm, found in values.items() for x in found]
    deviation, t = Spread(rows).pooled("x")
    assert deviation == pytest.approx(math.sqrt((2 + 2) / 3)) and t == pytest.approx(3.182446, rel=1e-6)
    mean, half = Spread(rows).difference("b", "a", "x")
    assert mean == 4 and half == pytest.approx(t * deviation * math.sqrt(1 / 3 + 1 / 2))
    assert Spread(rows).difference("c", "d", "x") is None
    gaps = (("a", 1.0), ("a", 2.0), ("a", 3.0), ("b", 6.0), ("b", 8.0))  # squares 2 and 2, 2 and 1 free
    pairs = Spread([dict(arm=arm, x=float(i), y=i + gap) for i, (arm, gap) in enumerate(gaps)])
    alike = [dict(arm="a", seed=seed, x=11.0 * seed + 1) for seed in range(4)]  # seed 3 has no partner
    alike = Spread([*alike, *[dict(arm="b", seed=seed, x=10.0 * seed) for seed in range(3)]])
    mean, half = alike.by_seed("a", "b", "x")  # 1, 2 and 3
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert alike.by_seed("a", "c", "x") is None
    mean, half = pairs.paired(["a"], "y", "x", ["a", "b"])
    assert mean == 2 and half == pytest.approx(3.182446 * math.sqrt(4 / 3) / math.sqrt(3), rel=1e-6)


def test_the_arms_are_those_of_the_protocol_and_each_is_trained_and_measured_alike(tmp_path, monkeypatch):
    args = recipes.options.visualize_args(
        ["claims", "--preset", "claims", "--data", "DIR", "--out", str(tmp_path)]
    )
    table = studies.claims.Claims(args)
    assert [row.name for row in table.table["rows"]] == [  # cut short, it has the ends of alpha and all seeds
        "alpha=0|0", "alpha=1|0", "alpha=0|1", "alpha=1|1", "alpha=0|2", "alpha=1|2", "alpha=0.4|0",
        "alpha=0.4|1", "alpha=0.4|2", "literal|0", "longer|0", "no-attention|0", "fewer-codes|0",
        "alpha=0.2|0", "alpha=0.6|0", "alpha=0.8|0", "D|0", "E|0", "five-pools,alpha=0|0",
        "five-pools,alpha=1|0"]
    assert {row.name.split("|")[0] for row in table.table["rows"]} == set(recipes.ablations.CLAIMS)
    missing = dict(table.missing())
    counts = {"judge and scorer": 4, "alpha=1, seed 1": 4 + 7, "alpha=0, seed 2": 3 + 4,
              "alpha=0.4, seed 1": 1 + 1, "no-attention, seed 0": 2 + 6}
    assert {label: len(missing[label]) for label in counts} == counts
    for _, words in (command for commands in missing.values() for command in commands):
        parse = recipes.options.train_args if words[0] == "train.py" else recipes.options.sample_args
        parse(words[1:])
        if words[0] == "sample.py":  # both scorers, and no judge among them
            assert [words[words.index(flag) + 1] for flag in ("--extractor", "--second")] == [
                str(tmp_path / "scorer" / "resnet.pt"), str(tmp_path / "second" / "vgg.pt")]
    config = {label: recipes.options.train_args(commands[0][1][1:])[1] for label, commands in missing.items()}
    plain, long = config["alpha=1, seed 0"], config["longer, seed 0"]
    assert long["phase1"]["steps"] == plain["phase1"]["steps"] + plain["phase2"]["steps"]
    assert plain["phase2"]["steps"] >= 0.4 * plain["phase1"]["steps"]  # the paper's share
    few, all_codes = (c["tokenizer"]["codebook_size"] for c in (config["fewer-codes, seed 0"], plain))
    assert (few, config["fewer-codes, seed 0"]["phase1"]["alpha"]) == (all_codes // 4, 0)
    assert config["no-attention, seed 0"]["fork"] == "noattention" and plain["fork"] is None
    assert config["E, seed 0"]["phase1"]["layers"] == "E" and config["alpha=0.4, seed 2"]["seed"] == 2
    strong = dict(studies.claims.CLAIMS, D=recipes.ablations.Arm(["--ablation", "D"], strength=1.25))
    monkeypatch.setattr(studies.claims, "CLAIMS", strong)
    words = recipes.options.train_args(table.row("D|0", "phase1")[0][0][1][1:])[1]["phase1"]
    assert words["per_weight"] == pytest.approx(1.25 * plain["phase1"]["per_weight"])
    judges = [words for path, words in missing["judge and scorer"] if "judge" in path.parent.name]
    assert [recipes.options.train_args(words[1:])[1]["judge"]["skip_pools"] for words in judges] == [
        plain["judge"]["skip_pools"], 0]
    scorers = {path.name: words for path, words in missing["judge and scorer"] if path.parent.name in (
        "scorer", "second")}
    for name in ("resnet.pt", "vgg.pt"):  # as strong as the protocol says
        judge = recipes.options.train_args(scorers[name][1:])[1]["judge"]
        assert (judge["width"], judge["steps"]) == (24, 3000)
        assert name == "resnet.pt" or judge["skip_pools"] == 0
    for arm, judge in (("alpha=1", "judge"), ("five-pools,alpha=1", "judge,judge.skip_pools=0")):
        assert config[f"{arm}, seed 0"]["vgg"] == str(tmp_path / judge / "vgg.pt")
    drawn = {path.name: words for path, words in missing["no-attention, seed 0"]}["metrics_nar_phase2.json"]
    assert [drawn[drawn.index(flag) + 1] for flag in ("--ckpt", "--tokenizer")] == [
        str(tmp_path / "alpha=1,seed=0" / "nar.pt"), str(tmp_path / "no-attention,seed=0" / "phase2.pt")]
    words = ["claims", "--preset", "demo", "--out", str(tmp_path / "b")]
    demo = studies.claims.Claims(recipes.options.visualize_args(words))
    assert len(demo.table["rows"]) == 14 and "phase1.steps=250" in demo.args.set
    table.show()
    assert (tmp_path / "claims.jsonl").read_text() == ""


def test_runs_of_unequal_budgets_are_refused():
    rows = [dict(steps=dict(phase1=9, phase2=2)), dict(steps=dict(phase1=9))]  # an arm of one phase is fine
    rows = [row | dict(odd=False) for row in rows] + [dict(steps=dict(phase1=11), odd=True)]  # "longer"
    studies.claims.refuse_unequal(rows, "ROOT")
    with pytest.raises(UserError, match="ROOT has runs of phase1 with 8 and with 9 steps"):
        studies.claims.refuse_unequal([*rows, dict(steps=dict(phase1=8), odd=False)], "ROOT")


def test_the_picture_of_the_claims_is_drawn_with_its_intervals(tmp_path):
    studies.claims.draw_claims(Spread(as_the_paper_says()), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000 and "NaN" not in (tmp_path / "x.json").read_text()
