"""What README and docs/ show: links and pictures exist, commands parse, the paper is cited rightly."""

import contextlib
import functools
import inspect
import io
import json
import re
import shlex
from pathlib import Path

import pytest

import perceptual
import prior_ar
import prior_nar
import tokenizer
import train
import visualize
from recipes.ablations import TABLES
from recipes.options import PRESETS, sample_args, train_args, visualize_args
from studies.commands import study_args
from studies.summary import ending, headline

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "assets").glob("*.md"))]
PARSERS = {"train.py": train_args, "sample.py": sample_args, "visualize.py": visualize_args,
           "studies": study_args}
SECTIONS = "3.1.1 3.1.2 3.2 3.3.1 3.3.2 3.4 4.1 4.2 4.3 4.4 6.1 6.2 6.3 6.4".split()  # of the preprint
CITED = {  # of what each docstring must name, among others
    "3.1.1": [tokenizer], "3.1.2": [prior_ar, prior_nar, prior_ar.ARPrior, prior_nar.NARPrior],
    "3.2": [visualize.teacher_forced_view, prior_ar.ARPrior.predict],
    "3.3.1": [perceptual.layer_weights, perceptual.perceptual_loss],
    "3.4": [tokenizer.VQTokenizer.freeze_latent_space, tokenizer.VQTokenizer.add_attention,
            tokenizer.BlockAttention, tokenizer.code_distances, tokenizer.average_probs,
            tokenizer.entropy_loss],
    "6.1": [prior_ar, prior_nar, prior_ar.Transformer, perceptual.StyleDiscriminator,
            train.build_discriminator, prior_ar.ARPrior.generate, prior_nar.NARPrior.generate]}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # (language, text)


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """Lines of code blocks that call a script or the door of the studies: [(line, script, words after it, up
    to a word such as >)]."""
    found = []
    for language, text in BLOCK.findall(page.read_text()):
        for line in text.splitlines() if language not in ("python", "bibtex") else ():
            if not re.search(r"\b(python|torchrun) (.* )?((train|sample|visualize)\.py|-m studies)\b", line):
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
            except SystemExit as stop:
                if stop.code == 0:  # the list of studies, or --help
                    continue
                refused.append(f"{page.relative_to(ROOT)}: {line}\n    {capsys.readouterr().err}")
    assert not refused, "\n".join(refused)
    assert seen > 40


def test_the_readme_has_at_most_220_lines_and_none_is_long():
    lines = README.read_text().splitlines()
    assert len(lines) <= 220
    long = [i for i, line in enumerate(lines, 1) if len(line) > 400 and not line.startswith("|")]
    assert not long, f"lines {long} have more than 400 characters"


def sections(text):
    """"Sec. 3.1.2 and 6.1" -> ["3.1.2", "6.1"]."""
    lists = re.findall(r"Sec\. (\d[\d.]*\b(?:(?:, | and )\d[\d.]*\b)*)", text)
    return [number for numbers in lists for number in re.findall(r"\d[\d.]*\b", numbers)]


def test_every_section_cited_is_one_of_the_preprint():
    """The kind: a reader with the paper in hand is sent to a section where the thing is not, or to none."""
    files = [*PAGES, *(p for p in ROOT.rglob("*.py") if p.parent.name != "tests" and ".venv" not in p.parts)]
    cited = {(str(path.relative_to(ROOT)), s) for path in files for s in sections(path.read_text())}
    assert not {(path, s) for path, s in cited if s not in SECTIONS}
    assert len(cited) > 25


@pytest.mark.parametrize("section", CITED)
def test_what_the_paper_describes_cites_its_section(section):
    missing = [place.__name__ for place in CITED[section] if section not in sections(inspect.getdoc(place))]
    assert not missing


def test_the_loss_of_each_prior_and_their_loop_cite_eq_3():
    for place in (prior_ar.ARPrior.loss, prior_nar.NARPrior.loss, train.train_prior):
        assert "Eq. 3" in inspect.getdoc(place)


def place_exists(word):
    """A command parses, a file is there, a name is one of the scripts'. None: a flag or a recipe's word."""
    script, _, rest = word.removeprefix("python -m ").partition(" ")
    if rest and script in PARSERS:
        return bool(PARSERS[script](shlex.split(rest)))
    if script.endswith(".py"):
        return (ROOT / script).exists()
    if re.fullmatch(r"\w*[A-Z_]\w+(\.\w+)?", word):
        scripts = (tokenizer, perceptual, prior_ar, prior_nar, train, visualize)
        return any(functools.reduce(lambda at, name: getattr(at, name, None), word.split("."), script)
                   for script in scripts)
    words = {row.name for table in TABLES.values() for row in table["rows"]}
    return None if word.startswith("--") or word in words | {*PRESETS, *PRESETS["imagenet"]} else False


def test_the_readme_names_a_place_for_every_equation_and_table():
    table = README.read_text().split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    found = set()
    for paper, code in [row for row in rows if re.match(" (Eq|Table)", row[0])]:
        places = [place_exists(word) for word in re.findall(r"`([^`]+)`", code)]
        assert True in places and False not in places, (paper, places)
        found |= {paper[1] + number for number in re.findall(r"\d+", paper.split(",")[0])}
    assert found == {"E1", "E2", "E3", "E4", *(f"T{i}" for i in range(1, 11))}
    phases = [row[0] for row in rows if re.search("stage `phase[12]`", row[-1])]
    assert [sections(paper) for paper in phases] == [["3.4"], ["3.4"]]


def test_a_command_that_prints_numbers_prints_those_beneath_it(monkeypatch):
    """The kind: a printed command forgets a condition, and gives other numbers than its page."""
    monkeypatch.chdir(ROOT)
    blocks = [text for page in PAGES for _, text in BLOCK.findall(page.read_text()) if "python -c" in text]
    for block in blocks:
        command, _, shown = block.partition("\n")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(shlex.split(command)[2], {})
        assert printed.getvalue() == shown, command
    assert len(blocks) > 1


@pytest.mark.parametrize("page, rows, text", [
    ("README.md", "demo_summary", "its {seconds} s add up"),
    ("docs/speed.md", "demo_summary", "| {psnr_phase1:.2f}, {psnr_phase2:.2f} dB |"),
    ("README.md", "cifar10_summary", "; {psnr_phase1:.2f} dB | "),
    ("README.md", "cifar10_metrics_phase2", "| {rfd:.2f}; {psnr:.2f} dB |"),
    ("docs/results.md", "cifar10_summary", "AR's loss {ar_nats_per_token:.2f} nats"),
    ("README.md", "cifar10_metrics_ar", "| {fd:.2f}; "),
    ("docs/results.md", "cifar10_summary", "is {psnr_phase1:.2f} dB after phase 1 and {psnr_phase2:.2f} dB"),
    ("docs/results.md", "cifar10_metrics_phase1", "rFD {rfd:.2f} to "),
    ("docs/results.md", "cifar10_metrics_phase2", " to {rfd:.2f}, rKD "),
    ("docs/fqgan.md", "demo_fq_summary", "phase 1 + 2 {psnr_phase2:.2f} against"),
])
def test_the_numbers_of_a_run_are_those_of_its_committed_row(page, rows, text):
    """The kind: one run told by two values, or a page that keeps those of the run before."""
    row = json.loads((ROOT / "assets" / f"{rows}.json").read_text())
    assert text.format(**row | row.get("results", {})) in (ROOT / page).read_text()


def test_the_quick_start_shows_the_end_of_its_run_to_the_letter():
    row = json.loads((ROOT / "assets/demo_summary.json").read_text())
    assert f"```{ending(row, 'runs/demo')}\n\ndone in " in README.read_text()
    classless = {name: None if "class_accuracy" in name else value for name, value in row.items()}
    assert "class" not in " ".join(what for what, _, _ in headline(classless)) and len(headline(row)) == 9
    told = ending({key: value for key, value in row.items() if key != "ar_class_accuracy"}, "runs/u n")
    assert "--ckpt 'runs/u n'/ar.pt" in told and "column per class" not in told  # an unconditional prior
    factorised = json.loads((ROOT / "assets/demo_fq_summary.json").read_text())
    for summary, word in ((row, "a token;"), (factorised, "a sub-token;")):
        assert next(words for what, _, words in headline(summary) if what == "AR loss").startswith(word)
