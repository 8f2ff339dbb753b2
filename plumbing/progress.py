"""How far a command has come: which of its stages is at work, and the time left by the steps measured."""

import math
import time

from tqdm import tqdm

from plumbing.processes import print0
from recipes.small import MILLISECONDS

HIDDEN = (  # in metrics.jsonl alone: nobody acts on these while they wait
    "lr", "adv_weight", "loss_codebook", "loss_commit", "loss_entropy", "val_l1", "perplexity",
    "usage_tokens", "ln_K")


class Progress:
    """Of the stages of a command, in their order, each with so many steps.

    steps: {stage: steps};  preset: whose ratio of the stages' steps tells the time left of all stages
    """

    def __init__(self, steps, preset):
        self.steps, self.stages, self.known = steps, [*steps], MILLISECONDS.get(preset, {})
        self.told = False

    def begin(self, start):
        """At the first step of a stage that this process makes."""
        self.start, self.clock = start, time.time()

    def name(self, stage):
        """A stage, and where it stands among several."""
        place = f" ({self.stages.index(stage) + 1} of {len(self.stages)})" if len(self.stages) > 1 else ""
        return stage + place

    def words(self, stage, step):
        """["1:05", "2.1 steps/s", "3:20 left", "11:40 of all stages"]: after step + 1 steps of a stage, by
        those that this process has made. Once it also says how many minutes are left on this machine."""
        spent, clock = time.time() - self.clock, tqdm.format_interval
        each = spent / (step + 1 - self.start)
        left = (self.steps[stage] - step - 1) * each
        words = [clock(spent), f"{1 / each:.3g} steps/s", f"{clock(left)} left"]
        later, what = self.stages[self.stages.index(stage) + 1 :], f"for {stage}"
        if later and {stage, *later} <= self.known.keys():
            left += each / self.known[stage] * sum(self.known[name] * self.steps[name] for name in later)
            words.append(f"{clock(left)} of all stages")
            what = "for all stages"
        if not self.told:
            self.told = True
            print0(f"about {math.ceil(left / 60)} minutes left on this machine, {what}")
        return words
