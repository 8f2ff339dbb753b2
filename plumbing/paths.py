"""The types of flags that name files and folders. No torch here, so that a wrong flag answers at once."""

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
