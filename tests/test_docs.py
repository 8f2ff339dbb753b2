"""What README and docs/ show: links and pictures exist, commands parse, and the README stays short."""

import re
import shlex
from pathlib import Path

from recipes.options import sample_args, train_args, visualize_args

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "assets").glob("*.md"))]
PARSERS = {"train.py": train_args, "sample.py": sample_args, "visualize.py": visualize_args}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # (language, text)


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """Lines of code blocks that call a script: [(line, script, words after it, up to a word such as >)]."""
    found = []
    for language, text in BLOCK.findall(page.read_text()):
        for line in text.splitlines() if language not in ("python", "bibtex") else ():
            if not re.search(r"\b(python|torchrun) (.* )?(train|sample|visualize)\.py\b", line):
                continue
            words = shlex.split(line, comments=True)
            start = next(i for i, word in enumerate(words) if word in PARSERS)
            after = words[start + 1 :]
            end = next((i for i, word in enumerate(after) if word in ("&&", ">", "&", "|")), len(after))
            found.append((line, words[start], after[:end]))
    return found


def test_every_link_and_picture_exists():
    missing, seen = [], 0
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        for link in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
            link = "".join(link)
            if re.match(r"\w+:", link):  # https:
                continue
            seen += 1
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert not missing, missing
    assert seen > 50


def test_every_command_shown_parses(capsys):
    refused, seen = [], 0
    for page in PAGES:
        for line, script, words in commands(page):
            seen += 1
            try:
                PARSERS[script](words)
            except SystemExit:
                refused.append(f"{page.relative_to(ROOT)}: {line}\n    {capsys.readouterr().err}")
    assert not refused, "\n".join(refused)
    assert seen > 40


def test_the_readme_has_at_most_220_lines_and_none_is_long():
    lines = README.read_text().splitlines()
    assert len(lines) <= 220
    long = [i for i, line in enumerate(lines, 1) if len(line) > 400 and not line.startswith("|")]
    assert not long, f"lines {long} have more than 400 characters"
