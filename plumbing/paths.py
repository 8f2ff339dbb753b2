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


def shown(name):
    """A name for messages and text files: its bytes that are no UTF-8 are escaped, as in caf\\xe9."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def braces(text):
    """All that a text with {000..099} or {a,b} in it stands for, in bash's order."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not found:
        return [text]
    first, last, words = found.groups()
    if words is None:
        width = max(len(first), len(last)) if re.match("0.", first) or re.match("0.", last) else 0
        step = 1 if int(first) <= int(last) else -1
        words = ",".join(f"{i:0{width}}" for i in range(int(first), int(last) + step, step))
    before, after = text[: found.start()], text[found.end() :]
    return [whole for word in words.split(",") for whole in braces(before + word + after)]


SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
ABOUT = "(images?|imgs?|pictures|data|set|split)?"


def split_of(name):
    """The split that a folder is named after ("test" of "Images_test2017"), or None."""
    found = re.fullmatch(rf"{ABOUT}[\W_]*({'|'.join(SPLITS)})[\W_]*{ABOUT}[\W_]*\d*", name, re.I)
    return found and found[2].lower()
