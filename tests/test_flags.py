"""Claims about flags: each is defined once, and whatever command it is given to reads it or refuses it.

The kind: `visualize.py fig8 --run --preset no-such-preset` and `sample.py --reconstruct --classes star` ended
with exit code 0. What a command reads is looked up in the source of the functions that it reaches.
"""

import ast
import functools

import pytest
from helpers import few, refused
from test_house import FILES, TREES

from recipes import options
from recipes.flags import FLAGS, SAMPLER, spelled
from recipes.options import FIGURES, TRAIN, UNREAD, train_args
from studies.commands import STUDIES, TABLE, study_args
from studies.metrics import UNREAD as NOT_MEASURED

# What is read ---------------------------------------------------------------------------------------------

PLACES = {}  # {module: {name: its definition, or (module, name) where it comes from}}
for module, tree in TREES.items():
    places = PLACES[module] = {node.name: node for node in tree.body if hasattr(node, "name")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            places |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}


@functools.cache
def mentioned(place):
    """What one definition names: names, and pairs of what is before and after a dot."""
    nodes = list(ast.walk(place))
    inner = {node.name for node in nodes if isinstance(node, ast.FunctionDef)} - {place.name}
    return ({node.id for node in nodes if isinstance(node, ast.Name)} - inner,
            {(node.value.id, node.attr) for node in nodes if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name)})


def reached(module, name, without, seen):
    """All definitions that one names, and those that they name: {(module, name): tree}."""
    place = PLACES.get(module, {}).get(name)
    if isinstance(place, tuple):
        return reached(*place, without, seen)
    if place is None or (module, name) in seen or name in without:
        return seen
    seen[module, name] = place
    names, dotted = mentioned(place)
    for other in names:
        reached(module, other, without, seen)
    for before, after in dotted:  # module.function
        source = PLACES[module].get(before)
        if isinstance(source, tuple) and ".".join(source) in FILES:
            reached(".".join(source), after, without, seen)
    return seen


def read_by(*entries, without=()):
    """The names that functions, and whatever they reach, read of a namespace `args`."""
    trees = {}
    for entry in entries:
        reached(*entry.rsplit(".", 1), without, trees)
    return set().union(*map(read_in, trees.values()))


@functools.cache
def read_in(tree):
    """What one definition reads of `args`."""
    nodes, text = list(ast.walk(tree)), ast.unparse(tree)
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute)
             and "args" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))}
    if "getattr(args, key)" in text or "passed(self.args" in text:  # by a name out of a tuple
        found |= {node.value for node in nodes if isinstance(node, ast.Constant)}
    if "vars(args)" in text and "SAMPLER" in text:
        found |= {*SAMPLER, "confidence_space"}
    return found | {f"{node.args[0].value}_every" for node in nodes if isinstance(node, ast.Call)
                    and getattr(node.func, "attr", "") == "due" and isinstance(node.args[0], ast.Constant)}


def names(keys):
    """Keys of FLAGS as names in the namespace."""
    return {FLAGS[key].get("dest") or spelled(key)[0].strip("-").replace("-", "_") for key in keys.split()}


def reads(keys, left_out, *entries, without=()):
    """keys: of FLAGS;  left_out: names among them that `entries` must not read, as they are refused"""
    return pytest.param(keys, left_out, entries, without, id=f"{entries[-1]}-{without}")


DRAWN = {  # the function that draws each figure
    **dict.fromkeys(("view", "fig1b", "fig4", "fig5a", "fig11"), "figure_views"), "fig3": "figure_example",
    **dict.fromkeys(("fig7a", "fig9"), "figure_phases"), "fig8": "figure_stability", "fig10": "figure_losses"}
PROTOCOLS = {  # what does not run in each
    "rfid-val": ["measure_samples"], "pfid-val": ["measure_samples"],
    "gfid-train": ["measure_reconstructions"]}
ENTRIES = [
    reads(TRAIN, "", "recipes.options.train_args", "train.main"),
    *(reads(options.SAMPLE, UNREAD[mode], "recipes.options.sample_args", "sample.main", without=[other])
      for mode, other in (("samples", "reconstruct"), ("--reconstruct", "sample"))),
    *(reads(options.DRAW, UNREAD.get(name, ""), "visualize.main", f"visualize.{function}", without=["draw"])
      for name, function in DRAWN.items()),
    reads(options.DRAW.removeprefix("figure "), "", "visualize.main", "forks.fqgan.figures.figure_alone",
          without=["draw"]),
    *(reads(keys, "", "studies.tables.compare_metrics", "studies.commands.swept", f"studies.{answer}")
      for answer, keys, _ in (*STUDIES.values(), ("tables.table", TABLE, ""))),
    *(reads(STUDIES["metrics"][1].removeprefix("results"), NOT_MEASURED[name], "studies.metrics.metrics",
            without=PROTOCOLS[name]) for name in PROTOCOLS)]


@pytest.mark.parametrize("keys, left_out, entries, without", ENTRIES)
def test_a_command_reads_each_flag_that_it_takes_and_none_that_it_refuses(keys, left_out, entries, without):
    found = read_by(*entries, without=without)
    assert names(keys) - {*left_out.split()} <= found and not found & {*left_out.split()}


# What is refused ------------------------------------------------------------------------------------------

WORDS = {"--set": "seed=1", "--ablation": "+conv2", "--stages": "ar", "--preset": "demo", "--data": "shapes"}
SPELLED = {name: how for key, how in FLAGS.items() for name in spelled(key) if name[0] == "-"}
COMMANDS = {
    **{f"train.py --stage {stage}": (TRAIN, UNREAD.get(stage, "") + " memory")
       for stage in (*options.STAGES, "all")},
    "train.py --stage vgg --arch resnet": (TRAIN, UNREAD["resnet"] + " memory"),
    "train.py --explain": (TRAIN, ""),
    "sample.py --ckpt x.pt": (options.SAMPLE, UNREAD["samples"]),
    "sample.py --ckpt x.pt --reconstruct": (options.SAMPLE, UNREAD["--reconstruct"]),
    **{f"visualize.py {name} --ckpt x.pt": (options.DRAW, UNREAD.get(name, ""))
       for name in (*FIGURES, "fq_alone")},
    "studies metrics --ckpt x.pt": (STUDIES["metrics"][1], ""),
    "studies metrics x.json": ("results", ""),
    "studies sweep temperature=1 --ckpt x.pt": (STUDIES["sweep"][1], "temperature"),
    "studies edit x.png --ckpt x.pt --box 1,1,1,1": (STUDIES["edit"][1], ""),
    "studies tokens --ckpt x.pt": (STUDIES["tokens"][1], ""),
    "studies tokens --ckpt x.pt --decode x.safetensors": (STUDIES["tokens"][1], "data"),
    "studies export run --out x": (STUDIES["export"][1], ""),
    **{f"studies {name} x": (STUDIES[name][1], "") for name in ("compare", "balance", "report", "watch")},
    "studies arena": (STUDIES["arena"][1], "rows seeds data workers samples out"),
    "studies arena --run": (STUDIES["arena"][1], ""),
    "studies arena --pilot": (STUDIES["arena"][1], "rows seeds"),
    "studies table1": (TABLE, ""),
    "studies fq-table3 --preset demo-fq": (TABLE, "")}


def parse(words):
    script, *words = words
    return study_args(words) if script == "studies" else getattr(
        options, f"{script.removesuffix('.py')}_args")(words)


@pytest.mark.parametrize("command", few(COMMANDS, *range(0, len(COMMANDS), 6)))
def test_every_flag_is_in_the_list_of_a_command_or_refused_with_exit_code_2(command, capsys):
    keys, left_out = COMMANDS[command]
    wanted = {name for key in keys.split() if not names(key) & {*left_out.split()} for name in spelled(key)}
    if command.endswith(("--stage all", "--explain")):
        wanted -= {"--steps", "--batch"}  # they belong to one stage
    taken = set()
    for name, how in SPELLED.items():
        value = [WORDS.get(name) or (how["choices"][0] if "choices" in how else "1")]
        if name == "--preset" and "demo-fq" in command:
            value = ["demo-fq"]
        if name == "--tokenizer" and ("fig7a" in command or "fig9" in command):
            value = ["1", "2"]  # of phase 1, and of phase 2
        try:
            parse([*command.split(), name, *value * (how.get("action") != "store_true")])
            taken.add(name)
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert taken == {name for name in wanted if name[0] == "-"}


# Old spellings, names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [
    ("sample.py --ckpt a.pt --metrics --num 9", "metrics"),
    ("sample.py --ckpt a.pt --sweep=steps=4 --metrics", "sweep"),
    ("sample.py --ckpt n.pt --edit x.png --box 1,2,3,4", "edit"),
    ("visualize.py table1 --preset demo --run", "table1"), ("visualize.py fig5b --run", "fig5b"),
    ("visualize.py metrics a.json b.json", "metrics"), ("visualize.py compare a.pt --steps 3", "compare"),
    ("visualize.py claims --run", "arena"), ("visualize.py forks", "arena")])
def test_an_old_spelling_ends_with_the_command_of_today(old, new, capsys):
    assert f"the command is now: python -m studies {new}\n" in refused(capsys, parse, old.split())
    assert new in {*STUDIES, *options.TABLES}


@pytest.mark.parametrize("words, told", [
    ("studies tabel1", "did you mean table1?"), ("studies zzz", "there are metrics"),
    ("studies edit x.png --ckpt x --bax 1", "did you mean --box?"), ("studies metrics", "needs --ckpt FILE"),
    ("sample.py --ckpt x --topp 1", "did you mean --top-p?"), ("visualize.py fig12 --ckpt x", "fig11"),
    ("studies sweep top_q=1 --ckpt x", "did you mean top_"),
    ("train.py --stage ar --preset demoo", "did you mean demo?"),
    ("train.py --stage ar --preset fsq.dem", "did you mean fsq.demo?"),
    ("train.py --stage ar --preset zzz", "there are imagenet"),
    ("train.py --stage ar --set phase1.stepz=3", "did you mean phase1.steps?"),
    ("train.py --stage ar --set zzz=3", "--explain prints them")])
def test_a_wrong_word_is_answered_with_the_nearest_one(words, told, capsys):
    assert told in refused(capsys, parse, words.split())


def test_the_studies_are_listed_with_a_line_each(capsys):
    with pytest.raises(SystemExit) as stop:
        study_args([])
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines[2:]}
    assert stop.value.code == 0 and listed == {*STUDIES, *options.TABLES, "fq-table3", "fq-table4"}
    assert all(len(line.split()) > 4 and len(line) <= 110 for line in lines[2:])


def test_every_flag_of_a_command_has_a_help_text_of_its_own():
    for keys in (TRAIN, options.SAMPLE, options.DRAW, TABLE, *(study[1] for study in STUDIES.values())):
        texts = [FLAGS[key]["help"] for key in keys.split()]
        assert all(texts) and len(set(texts)) == len(texts)


def test_every_flag_belongs_to_a_command():
    used = {key for keys, _ in COMMANDS.values() for key in keys.split()}
    assert used == {*FLAGS}


def test_no_flag_is_taken_for_one_of_torchrun_s():
    """torchrun reads the words after the script too: it refuses a prefix that two of its own flags share, as
    --num is one; then there is a second spelling."""
    from torch.distributed.run import get_args_parser

    def passes(flag):
        try:
            words = get_args_parser().parse_args(["--standalone", "sample.py", flag, "1"])
            return words.training_script_args == [flag, "1"]
        except SystemExit:
            return False

    keys = " ".join([TRAIN, options.SAMPLE, *(STUDIES[name][1] for name in ("metrics", "sweep", "edit"))])
    for key in keys.split():
        assert spelled(key)[0][0] != "-" or any(map(passes, spelled(key))), key
    assert train_args(["--stage", "vgg"])[0].given == {"stage": "--stage"}
