"""The arena's configurations, their order, and the recipes of phase 2 that its pilot compares: the plan of
assets/arena_protocol.md."""

from dataclasses import dataclass

PRESET, SAMPLES = "claims", 10_000
FIRST = ("A0", "A1", "P0", "P1", "C2")  # of one seed: made in one session on one machine, compared in pairs
FORKS = ("lfq", "fsq", "simvq", "rotation", "ibq", "perturb", "crt", "align", "frozen")


@dataclass
class Configuration:
    """Flags of train.py, stages, the configuration whose phase 1 (and AR prior) it builds on, and a fork."""

    words: str
    stages: tuple = ("phase1", "ar")
    of: str = ""
    fork: str = ""


CONFIGURATIONS = {
    "A0": Configuration("--alpha 0"),
    "A1": Configuration("--alpha 1"),
    "P0": Configuration("--alpha 0", ("phase2",), "A0"),
    "P1": Configuration("--alpha 1", ("phase2",), "A1"),
    "C2": Configuration("--alpha 1 --set phase2.alpha=1", ("phase2",), "A1", "noattention"),
    **{fork: Configuration("--alpha 1", fork=fork) for fork in FORKS},
    "L4": Configuration("--set phase1.layers=L4"),
    "A.4": Configuration("--alpha 0.4"),
    "NAR0": Configuration("--alpha 0", ("nar",), "A0"),
    "NAR1": Configuration("--alpha 1", ("nar",), "A1"),
    "E": Configuration("--ablation E"),
    "K/4": Configuration("--alpha 0 --set tokenizer.codebook_size=64"),
}


def in_turn(names, seeds):
    return [(name, seed) for seed in seeds for name in names]


ORDER = [*in_turn(FIRST, range(4)), *in_turn(FORKS, [0]), *in_turn(FIRST, range(4, 8)), *in_turn(FORKS, [1]),
         *in_turn(["L4"], range(4)), *in_turn(["A.4"], range(4)), *in_turn(["NAR0", "NAR1"], range(3)),
         *in_turn(["E"], range(2)), *in_turn(["K/4"], range(2))]

RECIPES = dict(  # of phase 2: what the pilot compares; the preset's is a constant 2e-4
    constant="", cosine="--set phase2.schedule=cosine --set phase2.lr_end=3e-5",
    low="--set phase2.lr=3e-5",
    r1="--set phase2.schedule=cosine --set phase2.lr_end=3e-5 --set phase2.r1_gamma=10",
    no_adversary="--set phase2.adv_weight=0")
CHOSEN = "constant"  # by the pilot: assets/arena_pilot.json
PILOT_SEED = 100
