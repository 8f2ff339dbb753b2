"""Thins the log of a finished run for assets/curves, the band of `python -m studies report`:

    PYTHONPATH=. python tests/benchmarks/curves.py runs/demo assets/curves/demo_0.jsonl
    PYTHONPATH=. python tests/benchmarks/curves.py runs/cifar10 assets/curves/cifar10.jsonl cifar10

The first line is the configuration, with the word in the place of its folder of images. The others are lines
of metrics.jsonl with the report's curves alone.
"""

import json
import math
import sys
from pathlib import Path

from plumbing.files import header, read_metrics
from studies.report import CURVES


def thin(rows, most=60):
    """Rows of a log: of each stage all validations, about `most` training steps at most, and the last one."""
    kept = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        steps = [row["step"] for row in mine if "lr" in row]
        chosen = {*steps[:: math.ceil(len(steps) / most)], *steps[-1:]}
        for row in mine:
            values = {name: row[name] for name in CURVES if row.get(name) is not None}
            if values and ("lr" not in row or row["step"] in chosen):
                kept.append(dict(stage=stage, step=row["step"], **values))
    return kept


if __name__ == "__main__":
    run, out, *data = map(Path, sys.argv[1:])
    config = header(run / "nar.pt")["config"]
    config["data"] = str(*data) or config["data"]
    lines = [dict(config=config), *thin(read_metrics(run / "metrics.jsonl"))]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
