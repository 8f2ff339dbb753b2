"""Other tokenizers and priors (docs/forking.md), each a file or a package in this folder.

A fork offers `parts()`, the classes that it replaces (tokenizer, ar, nar), and `PRESETS`; if it wants, also
`TABLES` (rows for --ablation, as in recipes/ablations.py) and `FIGURES` ({name: help}) with
`draw(args, device)`.
A folder `forks` on PYTHONPATH is searched too. Nothing here imports torch.
"""

import importlib.util
import pkgutil
from pathlib import Path

from plumbing.errors import of_fork, one_line, print_traceback

__path__ = pkgutil.extend_path(__path__, __name__)


def names():
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name):
    """The module of a fork.  raises: ValueError if it is no plain word, missing, broken or without parts()"""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"fork {name!r} is no plain word; a fork is the name of a file in forks/")
    if name not in names():
        raise ValueError(f"there is no fork {name!r} in {' or '.join(__path__)}; there are "
                         f"{', '.join(names())}")
    try:
        module = importlib.import_module(f"forks.{name}")
    except Exception as error:  # whatever its author wrote
        print_traceback()
        raise ValueError(f"fork {name} cannot be imported: {of_fork(error) or one_line(error)}") from error
    if not callable(getattr(module, "parts", None)):
        raise ValueError(f"{module.__file__} has no function parts(), which names what it replaces")
    return module


def shown(name, kinds=("FIGURES", "TABLES")):
    """The names of what a fork offers of these kinds; none of one that cannot be imported. Only a fork whose
    text has these words is imported, as that may import torch."""
    text = Path(importlib.util.find_spec(f"forks.{name}").origin).read_text(encoding="utf-8", errors="ignore")
    try:
        return [entry for kind in kinds if kind in text for entry in getattr(load(name), kind, {})]
    except ValueError:
        return []


def preset(name):
    """The preset FORK.NAME, or NAME of the first fork that has it; None if there is none.

    raises: ValueError of `load`
    """
    fork, _, rest = name.rpartition(".")
    fork = fork or next((one for one in names() if rest in shown(one, ["PRESETS"])), None)
    presets = getattr(load(fork), "PRESETS", {}) if fork else {}
    return dict(presets[rest], fork=fork) if rest in presets else None
