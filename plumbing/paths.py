"""Flags that name files and folders, and what a name tells. No torch here: a wrong flag answers at once."""

import os
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
