"""Flags that name files and folders, and what a name tells. No torch here: a wrong flag answers at once."""

import os
import re
from pathlib import Path


def expanded(value):
    """`~` as the home folder, which a shell leaves as it is in --out=~/x; also in each word of a list."""
    if isinstance(value, list):
        return [expanded(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def as_path(text):
    """The type of a flag that takes a path."""
    return Path(expanded(text))


SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
ABOUT = "(images?|imgs?|pictures|data|set|split)?"


def split_of(name):
    """The split that a folder is named after ("test" of "Images_test2017"), or None."""
    found = re.fullmatch(rf"{ABOUT}[\W_]*({'|'.join(SPLITS)})[\W_]*{ABOUT}[\W_]*\d*", name, re.I)
    return found and found[2].lower()
