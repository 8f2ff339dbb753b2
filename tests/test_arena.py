"""Claims about the arena: its rows and their order, its rules, and once more its intervals and ranks."""

import contextlib
import json
import math
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipes.arena
import recipes.options
import studies.arena
import studies.commands
import studies.probe
import studies.rows
import studies.verdicts
from helpers import ROOT, call, command
from plumbing.errors import UserError
from plumbing.files import read_checkpoint
from plumbing.hashes import latent_hash
from plumbing.models import load_model
from recipes.arena import CHOSEN, CONFIGURATIONS, FORKS, ORDER
from studies.verdicts import Gap

import train

LEVELS = dict(A0=10.0, A1=9.0, P0=9.5, P1=8.0, C2=8.8, L4=9.9, E=14.0)  # AR FD by B of made-up rows


def made_up(seed=0, names=None):
    """The arena: AR FD near LEVELS, rFD in the same order, the probe in the reverse, usage at random."""
    draw, rows = random.Random(seed), []
    for place, (name, number) in enumerate(ORDER):
        if names and name not in names:
            continue
        fd = LEVELS.get(name, 10 + list(CONFIGURATIONS).index(name) / 3) + draw.gauss(0, 0.2)
        row = dict(configuration=name, seed=number, fd_b=fd, fd_a=fd / 3, rfd_b=fd / 2 + draw.gauss(0, 0.1),
                   rfd_a=fd / 5, seconds=place, extractor_a="a", extractor_b="b", vgg="v")
        if name not in studies.verdicts.UNRANKED:
            row |= dict(probe=-fd, usage=draw.random(), nats=fd / 4, relative=fd / 20, pfd_b=draw.random(),
                        ifd_b=draw.random())
        rows.append(row)
    return rows


def arguments(tmp_path, **more):
    return SimpleNamespace(**dict(dict(
        out=tmp_path / "runs", data=None, device="auto", samples=None, rows=None, seeds=None, run=False,
        workers=0, pilot=False), **more))


# The plan -------------------------------------------------------------------------------------------------


def test_the_order_is_the_protocol_s_and_pairs_of_one_seed_stand_together():
    first, forks = ["A0", "A1", "P0", "P1", "C2"], list(FORKS)
    assert [name for name, _ in ORDER[:20]] == first * 4 and [s for _, s in ORDER[:20:5]] == [0, 1, 2, 3]
    assert ORDER[20:29] == [(name, 0) for name in forks] and len(forks) == 9
    assert [s for _, s in ORDER[29:49:5]] == [4, 5, 6, 7] and ORDER[49:58] == [(name, 1) for name in forks]
    assert ORDER[58:66] == [(name, seed) for name in ("L4", "A.4") for seed in range(4)]
    assert ORDER[66:] == [("NAR0", 0), ("NAR1", 0), ("NAR0", 1), ("NAR1", 1), ("NAR0", 2), ("NAR1", 2),
                          ("E", 0), ("E", 1), ("K/4", 0), ("K/4", 1)]
    assert len(set(ORDER)) == len(ORDER) == 76 and {name for name, _ in ORDER} == {*CONFIGURATIONS}


def test_the_configurations_are_those_of_the_protocol(tmp_path):
    arena, found = studies.arena.Arena(arguments(tmp_path)), {}
    for name in CONFIGURATIONS:
        for path, words in arena.row(name, 5)[1]:
            if words[0] == "train.py":
                found[name, path.stem] = recipes.options.train_args(words[1:])
            else:
                studies.commands.study_args(words[2:])  # refuses what is not read
    config = {key: config for key, (_, config) in found.items()}
    stages = {name: [stage for other, stage in found if other == name] for name in CONFIGURATIONS}
    assert stages["A0"] == stages["fsq"] == stages["E"] == ["phase1", "ar"]
    assert stages["P0"] == stages["C2"] == ["phase2"] and stages["NAR0"] == ["nar"]
    plain = config["A1", "phase1"]
    for (name, _), c in config.items():
        assert c["seed"] == 5 and c["phase1"]["per_weight"] == 0.1 and c["phase1"]["r1_gamma"] == 0.1
        assert (c["phase1"]["steps"], c["ar"]["steps"], c["prior"]["n_embd"]) == (1000, 800, 128)
        assert c["sample"]["top_p"] == 0.92 and c["vgg"] == str(studies.arena.VGG)
        assert c["fork"] == (name if name in FORKS else "noattention" if name == "C2" else None)
    alphas = {"A0": 0, "A1": 1, "A.4": 0.4, "K/4": 0, "lfq": 1, "frozen": 1}
    assert {name: config[name, "phase1"]["phase1"]["alpha"] for name in alphas} == alphas
    layers = {name: config[name, "phase1"]["phase1"]["layers"] for name in ("L4", "E", "A0", "lfq")}
    assert layers == dict(L4="L4", E="E", A0=None, lfq=None)
    sizes = [config[name, "phase1"]["tokenizer"]["codebook_size"] for name in ("K/4", "A0")]
    assert sizes == [64, 256] and plain["phase1"]["alpha"] == 1
    recipe = config["P1", "phase2"]["phase2"]
    assert config["P0", "phase2"]["phase2"] == recipe and recipe["alpha"] == 0
    assert config["C2", "phase2"]["phase2"] == recipe | dict(alpha=1)
    for name, base in (("P0", "A0"), ("P1", "A1"), ("C2", "A1"), ("NAR1", "A1")):
        (args, _), = [found[key] for key in found if key[0] == name]
        assert args.tokenizer == tmp_path / "runs" / f"{base},seed=5" / "phase1.pt"


def test_the_recipes_of_the_pilot_are_the_protocol_s():
    found = {}
    for name, words in recipes.arena.RECIPES.items():
        words = ["--stage", "phase2", "--preset", "claims", *words.split()]
        c = recipes.options.train_args(words)[1]["phase2"]
        found[name] = (c["schedule"], c["lr"], c["lr_end"], c["r1_gamma"], c["adv_weight"])
    lr_end = found["constant"][2]  # not read
    assert found == dict(
        constant=("constant", 2e-4, lr_end, 0.1, 0.1), cosine=("cosine", 2e-4, 3e-5, 0.1, 0.1),
        low=("constant", 3e-5, lr_end, 0.1, 0.1), r1=("cosine", 2e-4, 3e-5, 10, 0.1),
        no_adversary=("constant", 2e-4, lr_end, 0.1, 0))
    assert CHOSEN in found


def test_the_pilot_s_choice_is_the_lowest_mean_rank_and_a_tie_goes_to_the_cosine():
    tried = dict(constant=(3.0, 30.0), cosine=(1.0, 20.0), low=(2.0, 10.0))  # ranks 3 3, 1 2, 2 1
    ranks = studies.arena.mean_ranks(tried)
    assert ranks == dict(constant=3.0, cosine=1.5, low=1.5) and studies.arena.best(ranks) == "cosine"
    assert studies.arena.best(dict(ranks, low=1.0)) == "low"
    assert studies.arena.best(dict(constant=1.0, cosine=2.0, low=1.0)) == "constant"


def test_rows_and_seeds_are_picked_in_the_protocol_s_order(tmp_path):
    args = arguments(tmp_path, rows="A1,A0", seeds="1-2,5")
    assert studies.arena.chosen(args) == [
        ("A0", 1), ("A1", 1), ("A0", 2), ("A1", 2), ("A0", 5), ("A1", 5)]
    assert studies.arena.chosen(arguments(tmp_path)) == ORDER
    for more, told in ((dict(rows="A0,X"), "X is not one of A0"), (dict(seeds="1-b"), "expected numbers")):
        with pytest.raises(UserError, match=told):
            studies.arena.chosen(arguments(tmp_path, **more))


def test_a_row_is_appended_once_and_rows_of_other_classifiers_are_refused(tmp_path):
    path = tmp_path / "arena.jsonl"
    one, two = made_up(names=["L4"])[:2]
    for row in (one, two, dict(one, fd_b=0.0)):
        studies.arena.append(path, row)
    assert studies.arena.read_rows(path) == [one, two]
    path.write_text(json.dumps(one) + "\n" + json.dumps(one) + "\n")
    with pytest.raises(UserError, match="two lines of L4, seed 0"):
        studies.arena.read_rows(path)
    path.write_text(json.dumps(one) + "\n" + json.dumps(dict(two, extractor_b="other")) + "\n")
    with pytest.raises(UserError, match="L4, seed 1 has another extractor_b"):
        studies.arena.read_rows(path)
    path.write_text(json.dumps(one | dict(images="x")) + "\n")
    with pytest.raises(UserError, match="L4, seed 1 has another images"):
        studies.arena.append(path, two | dict(images="y"))
    assert len(path.read_text().splitlines()) == 1  # what does not belong there is not written


def test_another_number_of_samples_is_refused_before_a_row_is_trained(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(made_up()[0] | dict(samples=10_000)) + "\n")
    with pytest.raises(UserError, match="have 10000 samples: pass --samples 10000, or none"):
        studies.arena.run_rows(arguments(tmp_path, samples=1000, data="x"), tmp_path / "x.jsonl")


def test_a_row_tells_its_commands_without_this_machine_s_folders(tmp_path):
    arena = studies.arena.Arena(arguments(tmp_path, data="data", out=Path("arena")))
    told = arena.told(["train.py", "--data", "data", "--vgg", "assets/arena/vgg", "--out", "arena/A0,seed=0"])
    assert told == "python train.py --data DIR --vgg assets/arena/vgg --out runs/arena/A0,seed=0"


# The rules ------------------------------------------------------------------------------------------------


def gap(low, high, base=10.0):
    return Gap((low + high) / 2, low, high, 8, base)


@pytest.mark.parametrize("by_b, by_a, verdict", [
    (gap(-3, -1), gap(-2, 1), "gain"),  # A must agree in sign, not in its interval
    (gap(-3, -1), gap(0, 2), "not decided"),
    (gap(1, 3), gap(1, 3), "worse"),
    (gap(1, 3), gap(-3, -1), "not decided"),
    (gap(-1.4, 1), gap(-1, 0.5), "no gain of half the paper's size"),  # 14.5 % of 10 are 1.45
    (gap(-1.5, 1), gap(-1, 0.5), "not decided"),
    (gap(-1.4, 1.6), gap(-1, 0.5), "not decided"),  # B +0.1, A -0.25
    (gap(-1.4, 1, base=9.0), gap(-1, 0.5), "not decided"),  # of 9 they are 1.305
    (gap(-0.5, -0.1), gap(-1, 0.5), "gain"),
    (None, gap(-1, 0.5), "not decided"),
])
def test_a_difference_of_samples_is_judged_by_its_interval_and_both_classifiers(by_b, by_a, verdict):
    assert studies.verdicts.of_samples(by_b, by_a) == verdict


def test_a_statement_holds_below_0_and_is_refuted_above():
    falls = studies.verdicts.falls
    assert falls(gap(-2, -1)) == "holds" and falls(gap(1, 2)) == "does not hold"
    assert falls(gap(-2, 1)) == falls(None) == falls(gap(-2, -1), gap(-2, 0.1)) == "not decided"
    assert falls(gap(-2, 0.1), gap(1, 2)) == "does not hold"


def test_the_verdicts_are_of_the_right_pairs():
    def found(rows):
        return dict(zip(["a", "a, P", "b", "d", "d'"], [v for _, v, _ in studies.verdicts.verdicts(rows)],
                        strict=True))

    def moved(name, **changes):
        return [row | {k: row[k] + v for k, v in changes.items()} if row["configuration"] == name else row
                for row in made_up()]

    assert found(made_up()) == {"a": "gain", "a, P": "gain", "b": "holds", "d": "holds", "d'": "holds"}
    assert found(moved("A0", fd_a=-9, fd_b=-9))["a"] == "worse"
    assert found(moved("P0", fd_a=-9, fd_b=-9))["a, P"] == "worse"
    assert found(moved("A1", relative=1))["b"] == "does not hold"  # raw nats still fall
    assert found(moved("C2", fd_a=-9, fd_b=-9))["d'"] == "does not hold"
    assert found(moved("P1", fd_a=9))["d"] == "not decided"
    assert set(found([row for row in made_up() if row["seed"] == 0]).values()) == {"not decided"}
    assert {verdict for _, verdict, _ in studies.verdicts.verdicts([])} == {"not decided"}


# A second computation of what is printed ------------------------------------------------------------------

# of Student's t, 97.5 %, by the number of seeds
T = {2: 12.706205, 3: 4.302653, 4: 3.182446, 5: 2.776445, 6: 2.570582, 7: 2.446912, 8: 2.364624}


def committed():
    path = ROOT / "assets" / "arena.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


BOTH = [made_up(), committed()]


@pytest.mark.parametrize("rows", BOTH, ids=["made up", "committed"])
def test_intervals_are_those_of_a_second_computation(rows):
    seen = 0
    for a, b in (("A1", "A0"), ("P1", "P0"), ("P1", "A1"), ("P1", "C2")):
        for key in ("fd_b", "fd_a", "rfd_b", "nats", "relative"):
            left, right = ({row["seed"]: row[key] for row in rows if row["configuration"] == name
                            and row.get(key) is not None} for name in (a, b))
            both = [left[seed] - right[seed] for seed in left if seed in right]
            found = studies.verdicts.gap(rows, a, b, key)
            if len(both) < 2:
                assert found is None
                continue
            half = T[len(both)] * statistics.stdev(both) / math.sqrt(len(both))
            mean, seen = statistics.mean(both), seen + 1
            assert (found.mean, found.low, found.high) == pytest.approx(
                (mean, mean - half, mean + half), rel=1e-4, abs=1e-9)
            assert found.seeds == len(both) and found.base == pytest.approx(
                statistics.mean(right[seed] for seed in left if seed in right))
    assert seen or len({row["seed"] for row in rows}) < 2  # an interval takes two seeds


def rho(pairs):
    """Spearman by counting: ranks are one more than what is below, and half of what is equal."""
    def ranks(values):
        return [1 + sum(v < u for v in values) + (sum(v == u for v in values) - 1) / 2 for u in values]

    return statistics.correlation(*(ranks([pair[i] for pair in pairs]) for i in (0, 1)))


@pytest.mark.parametrize("rows", BOTH, ids=["made up", "committed"])
def test_rank_correlations_and_their_intervals_are_those_of_a_second_computation(rows, monkeypatch):
    monkeypatch.setattr(studies.verdicts, "DRAWS", 600)
    found = studies.verdicts.orders(rows)
    for key in ("rfd_b", "usage"):
        by_name = {}
        for row in rows:
            if row["configuration"] not in ("P0", "P1", "C2", "NAR0", "NAR1") and row.get(key) is not None:
                by_name.setdefault(row["configuration"], []).append((row[key], row["fd_b"]))
        if key not in found:
            assert len(by_name) < 5
            continue

        def mean(lines):
            return tuple(statistics.mean(line[i] for line in lines) for i in (0, 1))

        assert found[key]["n"] == len(by_name) == len(found[key]["without"])
        assert found[key]["rho"] == pytest.approx(rho([mean(lines) for lines in by_name.values()]))
        one = next(iter(by_name))
        left = [mean(lines) for name, lines in by_name.items() if name != one]
        assert found[key]["without"][one][0] == pytest.approx(rho(left))
        draw, drawn = random.Random(1), []
        for _ in range(2000):
            some = draw.choices(list(by_name.values()), k=len(by_name))
            with contextlib.suppress(statistics.StatisticsError):  # one configuration, drawn each time
                drawn.append(rho([mean(draw.choices(lines, k=len(lines))) for lines in some]))
        for bound, share in ((found[key]["low"], 0.025), (found[key]["high"], 0.975)):
            # a quantile, of a distribution that has few steps with five configurations
            below, at_most = (sum(v < bound + e for v in drawn) / len(drawn) for e in (-1e-9, 1e-9))
            assert below - 0.018 < share < at_most + 0.018


def test_a_number_orders_if_no_interval_with_or_without_a_configuration_holds_0(monkeypatch):
    monkeypatch.setattr(studies.verdicts, "DRAWS", 200)
    found = studies.verdicts.orders(made_up())
    assert found["rfd_b"]["orders"] and found["rfd_b"]["rho"] > 0.9 and found["rfd_b"]["n"] == 15
    assert found["probe"]["orders"] and found["probe"]["rho"] == pytest.approx(-1)
    assert not found["usage"]["orders"] and found["usage"]["low"] < 0 < found["usage"]["high"]
    names = ["A0", "A1", *FORKS[:5]]
    rows = [dict(configuration=name, seed=0, fd_b=float(i), rfd_b=float(y))
            for i, (name, y) in enumerate(zip(names, (3, 1, 2, 4, 0, 5, 99), strict=True))]
    alone = studies.verdicts.orders(rows)["rfd_b"]
    without = {name: low <= 0 <= high for name, (_, low, high) in alone["without"].items()}
    assert alone["orders"] == (not any(without.values()) and alone["low"] > 0) and any(without.values())


def test_the_arena_is_shown_and_drawn_from_its_rows_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies.verdicts, "DRAWS", 50)
    studies.verdicts.show(made_up(), tmp_path / "x.png")
    out = capsys.readouterr().out
    assert out.startswith("76 rows of 76") and "(a) AR FD, alpha = 1 minus alpha = 0: gain" in out
    assert "| rFD (B)" in out and "| K/4" in out and "over unigram: -0.0" in out
    numbers = json.loads((tmp_path / "x.json").read_text())
    assert len(numbers["points"]) == 20 and len(numbers["points"]["A0"]) == 8
    assert (tmp_path / "x.png").stat().st_size > 20_000
    monkeypatch.setattr(studies.arena, "ASSETS", tmp_path / "empty")
    studies.arena.arena(arguments(tmp_path))
    assert "no rows yet" in capsys.readouterr().out and not (tmp_path / "empty").exists()


def test_no_name_in_the_figure_covers_another(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(studies.verdicts, "save_figure", lambda fig, *_: figures.append(fig))
    studies.verdicts.draw(studies.arena.read_rows(ROOT / "assets" / "arena.jsonl"), None, tmp_path / "x.png")
    texts = figures[0].axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert {text.get_text() for text in texts} >= {"A0", "A1", "P1", *FORKS}
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # itself


# Rows that are trained ------------------------------------------------------------------------------------


@pytest.fixture
def tiny(data, trained, tmp_path_factory, tmp_path, monkeypatch):
    """The arena at the size of the tests, its commands in this process; the list of what was run."""
    out = tmp_path_factory.mktemp("resnet")
    for i, letter in enumerate("ab"):
        call("vgg", out / letter, data, "--arch", "resnet", "--seed", i, classifier__width=2)
    monkeypatch.setattr(studies.arena, "VGG", trained / "vgg.pt")
    monkeypatch.setattr(studies.arena, "EXTRACTORS", {x: out / x / "resnet.pt" for x in "ab"})
    monkeypatch.setattr(studies.arena, "SAMPLES", 40)
    monkeypatch.setattr(studies.arena, "PRESET", "demo")
    monkeypatch.setattr(studies.arena, "ASSETS", tmp_path)
    real_train, real_probe = studies.arena.Arena.train, studies.probe.probe

    def short(self, *words):
        path, made = real_train(self, *words)
        sets = command("phase1", path.parent, data)
        sets = [word for pair in zip(sets, sets[1:], strict=False) if pair[0] == "--set" for word in pair]
        given = made.index("--set") if "--set" in made else len(made)  # what the row sets itself comes last
        return path, [*made[:given], *sets, *made[given:], "--eval-every", "3"]

    def few_steps(train, val, K, device, steps, **more):
        return real_probe(train, val, K, device, 2, **more)

    ran = []

    class Command:
        def __init__(self, path, words, nproc, threads):
            self.start = time.time()
            path.parent.mkdir(parents=True, exist_ok=True)
            ran.append(path)
            if words[0] == "train.py":
                train.main(*recipes.options.train_args(words[1:]))
            else:
                studies.commands.main(studies.commands.study_args(words[2:]))

        def ended(self):
            return ""

    monkeypatch.setattr(studies.arena.Arena, "train", short)
    monkeypatch.setattr(studies.probe, "probe", few_steps)
    monkeypatch.setattr(studies.rows, "Command", Command)
    return ran


@pytest.mark.slow
def test_rows_are_trained_measured_and_appended_and_phase_2_shares_the_tokens(tiny, data, tmp_path, capsys):
    args = arguments(tmp_path, data=str(data), device="cpu", rows="A1,P1,C2,NAR1", seeds="0", run=True)
    studies.arena.arena(args)
    rows = {row["configuration"]: row for row in studies.arena.read_rows(tmp_path / "arena.jsonl")}
    assert list(rows) == ["A1", "P1", "C2", "NAR1"] and len(tiny) == 2 + 7 + 2 * 5 + 3
    runs = tmp_path / "runs"
    first, second, control = (load_model(runs / name, (stage,)) for name, stage in (
        ("A1,seed=0/phase1.pt", "phase1"), (f"P1,seed=0,{CHOSEN}/phase2.pt", "phase2"),
        (f"C2,seed=0,{CHOSEN}/phase2.pt", "phase2")))
    assert len({latent_hash(model) for model, _ in (first, second, control)}) == 1
    sizes = [sum(p.numel() for p in model.parameters()) for model, _ in (first, second, control)]
    assert sizes[0] == sizes[2] < sizes[1]  # C2 has no attention
    assert control[1]["config"]["phase2"]["alpha"] == 1 and second[1]["config"]["phase2"]["alpha"] == 0
    a1 = rows["A1"]
    for key, file, name in (("rfd_b", "rec_b", "rfd"), ("fd_a", "samples_a", "fd"), ("pfd_b", "pfd_b", "pfd"),
                            ("recall", "samples_a", "recall"), ("psnr", "rec_a", "psnr")):
        assert a1[key] == json.loads((runs / f"A1,seed=0/metrics_{file}.json").read_text())["results"][name]
    logged = [json.loads(line) for line in (runs / "A1,seed=0/metrics.jsonl").open()]
    seen = [line for line in logged if line["stage"] == "ar" and "val_loss" in line]
    assert a1["nats"] == seen[-1]["val_loss"] and len(seen) == 2
    assert a1["ar_last_fifth"] == pytest.approx(seen[1]["val_loss"] - seen[0]["val_loss"])
    assert a1["bits_per_image"] == pytest.approx(a1["nats"] * 16 / math.log(2))
    assert a1["relative"] == pytest.approx(a1["nats"] / a1["unigram"])
    assert a1["probe"] == json.loads((runs / "A1,seed=0/compare.json").read_text())[0]["relative"]
    assert {"fd_b", "rfd_b"} <= rows["P1"].keys() and not {"nats", "pfd_b", "probe"} & rows["P1"].keys()
    assert {"fd_b", "nats"} <= rows["NAR1"].keys() and rows["NAR1"]["fd_b"] != a1["fd_b"]
    about = json.loads((runs / "A1,seed=0/metrics_samples_b.json").read_text())
    assert (a1["samples"], a1["images"]) == (40, about["reference_hash"])
    assert a1["machine"]["threads"] == 1 and len(a1["commit"]) >= 12 and a1["seconds"] > 0
    assert len(a1["commands"]) == 9 and not any(str(tmp_path / "runs") in line or str(data) in line
                                                 for line in a1["commands"])
    assert a1["vgg"] == read_checkpoint(runs / "A1,seed=0/phase1.pt", ("phase1",))["vgg_hash"]
    tiny.clear()
    studies.arena.arena(args)  # all is there
    assert not tiny and len(studies.arena.read_rows(tmp_path / "arena.jsonl")) == 4
    (runs / "A1,seed=0" / "phase1.pt").unlink()  # another session: A1's tokens of this seed are gone
    kept = [row for row in rows.values() if row["configuration"] != "P1"]
    (tmp_path / "arena.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    capsys.readouterr()
    studies.arena.arena(args)
    assert "P1, seed 0 is left out: A1 of this seed was made" in capsys.readouterr().out and not tiny
