"""Claims about the house: seven scripts for the reader of the paper, folders for the rest.

Budgets and import edges are those of the plan that the scripts were re-arranged by (README, Reading order).
"""

import ast
import os
import re
import subprocess
import sys
import tokenize

import pytest
from helpers import ROOT, few

from studies.commands import STUDIES

BUDGETS = dict(
    tokenizer=480, perceptual=350, prior_ar=360, prior_nar=200, train=400, sample=260, visualize=420)
READING_ORDER = list(BUDGETS)
FOLDERS = ("recipes", "plumbing", "studies", "forks")
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__").replace("/", "."): path
    for path in (*(ROOT / f"{name}.py" for name in BUDGETS),
                 *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def lines(name):
    return FILES[name].read_text().splitlines()


def imports(nodes):
    """Modules that statements import, those of `from plumbing import files` with their last part."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found


def loaded(name):
    """What the import of a module imports: statements outside of functions and of the guard of a script."""
    return imports(TREES[name].body)


def anywhere(name):
    return imports(ast.walk(TREES[name]))


def of(folder, names):
    return {name for name in names if name.split(".")[0] == folder}


def function(name, *path):
    """A function or method of a script by its names."""
    node = TREES[name]
    for part in path:
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def length(node, docstring=True):
    count = node.end_lineno - node.lineno + 1
    if not docstring and ast.get_docstring(node):
        count -= node.body[0].end_lineno - node.body[0].lineno + 1
    return count


# Budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETS)
def test_a_script_keeps_to_its_budget_and_is_not_squeezed(name):
    text = lines(name)
    assert len(text) <= BUDGETS[name]
    assert max(map(len, text)) <= 110
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
              for node in TREES[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(starts) > 3 and all(text[start - 2] == text[start - 3] == "" for start in starts)
    for node in ast.walk(TREES[name]):  # one statement a line
        body = getattr(node, "body", None)
        if isinstance(body, list) and not isinstance(node, ast.If | ast.For | ast.With | ast.Try):
            assert len({child.lineno for child in body}) == len(body)
    tokens = tokenize.generate_tokens(iter([line + "\n" for line in text]).__next__)
    assert not [token for token in tokens if token.type == tokenize.OP and token.string == ";"]


def test_the_seven_scripts_together_keep_to_2300_lines():
    assert sum(len(lines(name)) for name in BUDGETS) <= 2300


@pytest.mark.parametrize("name", [name for name in FILES if name not in BUDGETS])
def test_a_file_of_a_folder_has_at_most_350_lines(name):
    assert len(lines(name)) <= 350


def test_the_top_level_holds_the_seven_scripts_and_no_other():
    assert {path.stem for path in ROOT.glob("*.py")} == set(BUDGETS)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = {path.split("/")[0] for path in tracked if "/" in path}
    assert not tracked or folders <= {*FOLDERS, "tests", "docs", "assets", ".ci", ".github"}


def test_the_workflow_calls_the_checks_that_anybody_can_run():
    steps = (ROOT / ".github/workflows/ci.yml").read_text().split("- run: ")[1:]
    assert [step.strip() for step in steps] == [".ci/run"] and os.access(ROOT / ".ci/run", os.X_OK)


def test_the_method_stands_on_one_screen_each():
    """Eq. 1, Eq. 2 and Sec. 3.4; the loop of the tokenizer; the loop of both priors."""
    assert length(function("tokenizer", "VectorQuantizer", "forward"), docstring=False) <= 20
    assert length(function("train", "train_tokenizer")) <= 60
    assert length(function("train", "train_prior")) <= 45


def test_the_loop_of_the_priors_has_one_path():
    loop = ast.unparse(function("train", "train_prior"))
    assert '"nar"' not in loop and "'nar'" not in loop and "'ar'" not in loop


def test_the_loss_of_the_tokenizer_is_one_expression_with_every_term_under_the_heading_of_eq_2():
    text = "\n".join(lines("train"))
    heading, end = text.index("# E, Z, G (Eq. 2"), text.index("        # D\n")
    sums = [node for node in ast.walk(function("train", "train_tokenizer")) if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.BinOp) and ast.unparse(node.targets[0]) == "loss"]
    found = ast.get_source_segment(text, sums[0])
    assert heading < text.index(found) < end
    assert re.sub(r"[\s()]+", " ", ast.unparse(sums[0].value).replace("'", "")).split(" + ") == [
        "loss_rec", "loss_codebook", "c[beta] * loss_commit", "c[gamma] * loss_entropy",
        "c[per_weight] * loss_per", "adv_weight * loss_adv", "fork_loss latent, tokenizer, c "]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_class_or_function_of_more_than_ten_lines_says_what_it_is(name):
    """Of `main` the heading of its section says it."""
    bare = {node.name for node in TREES[name].body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not ast.get_docstring(node)
            and length(node) > 10}
    assert bare <= {"main"}


# Words ----------------------------------------------------------------------------------------------------

OTHERS = re.compile(r"\bfq|fqgan|num_codebooks|sub-?codebook|sub-?token|disentangl|representation"
                    r"|teacher_widths|teachers\b|adapter|(?-i:\bFAR\b)|factori[sz]ed|guidance|lookup-free"
                    r"|lfq", re.I)


@pytest.mark.parametrize("name", BUDGETS)
def test_no_word_of_fqgan_or_of_another_fork_stands_in_a_script(name):
    found = [line for line in lines(name) if OTHERS.search(line)]
    assert not found, found


def test_those_words_would_be_noticed():
    assert all(OTHERS.search(FILES[name].read_text())
               for name in ("forks.fqgan.tokenizer", "forks.fqgan.prior", "forks.guidance", "forks.lfq"))


# Imports --------------------------------------------------------------------------------------------------


def test_scripts_import_each_other_in_reading_order_only():
    scripts = {name: loaded(name) & set(BUDGETS) for name in BUDGETS}
    assert scripts == dict(
        tokenizer=set(), perceptual=set(), prior_ar=set(), prior_nar={"prior_ar"}, train={"perceptual"},
        sample=set(), visualize={"perceptual"})
    for name in BUDGETS:
        order = [READING_ORDER.index(other) for other in anywhere(name) & set(BUDGETS)]
        assert all(place < min(READING_ORDER.index(name), 4) for place in order)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_script_imports_studies_and_forks_by_a_lazy_line_only(name):
    assert not of("studies", loaded(name))
    assert of("forks", anywhere(name)) <= ({"forks"} if name == "visualize" else set())  # the finder


def test_plumbing_and_recipes_are_the_bottom_and_models_alone_imports_scripts():
    """Lazily neither: whoever needs more than they offer imports them, and not they it."""
    for name in of("plumbing", FILES) | of("recipes", FILES):
        scripts = {"tokenizer", "perceptual", "prior_ar", "prior_nar"} if name == "plumbing.models" else set()
        assert anywhere(name) & set(BUDGETS) == scripts and not of("studies", anywhere(name)), name
        presets = {"forks"} if name in ("plumbing.models", "recipes.flags", "recipes.options") else set()
        assert of("forks", anywhere(name)) <= presets, name


def test_nobody_imports_forks_by_name_but_forks_themselves():
    for name in FILES:
        if not name.startswith("forks"):
            assert of("forks", anywhere(name)) <= {"forks"}, name


def test_no_module_is_imported_by_what_it_imports():
    """Lazily neither."""
    graph, done = {name: anywhere(name) & set(FILES) for name in FILES}, set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(of("recipes", FILES)))
def test_recipes_need_no_torch(name):
    for module in anywhere(name):
        assert module.split(".")[0] in {*sys.stdlib_module_names, "recipes", "forks", "plumbing"}
    assert of("plumbing", anywhere(name)) <= {"plumbing.console", "plumbing.paths"}


def test_the_door_of_the_studies_is_the_only_way_to_them_and_needs_no_torch():
    """But for `train.py --explain`, the summary after --stage all, and one study that measures by another."""
    allowed = dict(train={"studies.cost", "studies.summary"})
    for name in FILES:
        if not name.startswith("studies"):
            assert of("studies", anywhere(name)) <= allowed.get(name, set()), name
    assert anywhere("studies.__main__") == {"plumbing.console", "studies.commands"}
    door = {"forks", "recipes.ablations", "recipes.flags", "recipes.options", "recipes.values"}
    assert loaded("studies.commands") - {*sys.stdlib_module_names} == door
    answers = {STUDIES[name][0] for name in STUDIES} | {"tables.table", "tables.compare_metrics"}
    for module, answer in (answer.split(".") for answer in answers):
        assert [arg.arg for arg in function(f"studies.{module}", answer).args.args][0] == "args", answer


@pytest.mark.parametrize("words, code", few([
    *((f"{script}.py --help", 0) for script in ("train", "sample", "visualize")),
    ("train.py --stage vgg --tokenizer x", 2), ("sample.py --ckpt x --no-flag", 2), ("visualize.py fig0", 2),
    ("studies", 0), ("studies metrics --help", 0), ("studies table1 --preset no-such --no-flag", 2),
    ("studies metric", 2), ("sample.py --ckpt x --metrics", 2), ("visualize.py table1 --run", 2)], 0, 6))
def test_help_and_what_is_refused_are_printed_without_torch(words, code):
    script, *words = words.split()
    run = "run_module('studies'" if script == "studies" else f"run_path('{script}'"
    text = ("import runpy, sys, atexit\n"
            "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
            f"sys.argv = {[script, *words]}\n"
            f"sys.path.insert(0, '.'); runpy.{run}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *error, loaded = done.stderr.splitlines()
    assert done.returncode == code and loaded == "False", done.stderr
    assert "usage" in done.stdout if code == 0 else len(error) == 1 and error[0].startswith("error: ")


@pytest.mark.slow
def test_the_scripts_start_without_the_compiler():
    code = "import sys, train, sample, visualize; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr  # it takes as long to import as all the rest of torch


def test_text_is_written_in_an_encoding_that_no_locale_decides():
    """By `save_text`, or with an encoding that is named: names and Greek letters stand in what is written."""
    left = []
    for name, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            words = [word.value for word in call.args if isinstance(word, ast.Constant)]
            kind = getattr(call.func, "attr", getattr(call.func, "id", ""))
            text = kind == "write_text" or kind == "open" and {"w", "a", "a+", "x"} & {*map(str, words)}
            if text and "utf-8" not in words + [getattr(key.value, "value", None) for key in call.keywords]:
                left.append(f"{name}:{call.lineno}")
    assert not left
