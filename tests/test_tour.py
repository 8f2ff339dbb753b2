"""Claims about docs/tour.ipynb: it runs, its outputs are those of its code and models, its links lead on."""

import ast
import base64
import functools
import importlib
import inspect
import io
import json
import re

import pytest
import torch
from helpers import ROOT
from PIL import Image
from test_docs import SECTIONS, anchors, sections

from plumbing.hashes import weights_hash
from plumbing.models import load_model

TOUR = ROOT / "docs" / "tour.ipynb"
CELLS = json.loads(TOUR.read_text())["cells"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
ANSWERS = re.findall(r"<details><summary>Answer</summary>\n(.*?)</details>", TEXT, re.S)


def printed(cell):
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def shown(cell):
    return [out["data"]["image/png"] for out in cell["outputs"] if "image/png" in out.get("data", {})]


def test_it_is_small_and_executed_from_top_to_bottom_without_an_error():
    assert TOUR.stat().st_size <= 1.5e6 and len(CODE) > 20
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    kinds = {out["output_type"] for cell in CODE for out in cell["outputs"]}
    assert kinds == {"stream", "execute_result"}
    assert {out["name"] for cell in CODE for out in cell["outputs"] if "name" in out} == {"stdout"}
    for cell in CODE:
        text = "".join(cell["source"])
        assert len(shown(cell)) == ("\nPicture(" in "\n" + text)
        assert bool(printed(cell)) == ("print(" in text or "source(" in text)


def test_its_pictures_are_pictures():
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for cell in CODE for data in shown(cell)]
    assert len(images) > 12
    for image in images:
        dark, bright = image.convert("L").getextrema()
        assert min(image.size) > 100 and bright - dark > 200


def test_no_output_names_a_place_of_the_machine_that_made_it():
    text = json.dumps([[printed(cell), cell["metadata"]] for cell in CODE])
    assert not re.search(r"/(tmp|home|root|Users|work|usr)/|[A-Z]:\\\\|0x[0-9a-f]{6}", text)
    assert {*json.loads(TOUR.read_text())["metadata"]} == {"kernelspec", "language_info"}


def test_its_outputs_are_those_of_the_models_in_the_box():
    """The kind: the models are trained anew, and the tour keeps the pictures of those before."""
    text = "".join(map(printed, CODE))
    for stage in ("phase1", "phase2", "ar", "nar", "vgg"):
        model = load_model(ROOT / "assets" / "models" / "demo" / stage, (stage,))[0]
        assert re.search(rf"^{stage} .*{weights_hash(model)}$", text, re.M), stage


def test_the_code_that_it_shows_is_the_code_of_today():
    """If not, execute the tour anew (docs/handing-on.md)."""
    shown_code = {name: cell for cell in CODE for name in re.findall(
        r"^source\((.*)\)$", "".join(cell["source"]), re.M)}
    for name, cell in shown_code.items():
        script, *rest = name.split(".")
        thing = functools.reduce(getattr, rest, importlib.import_module(script))
        assert inspect.getsource(thing) in printed(cell), f"{name} has changed since"
    assert len(shown_code) > 15


def test_its_equations_sections_and_links_are_those_of_the_paper_and_of_this_project():
    assert {*sections(TEXT)} <= {*SECTIONS} and {f"Eq. {i}" for i in (1, 2, 3, 4)} <= {
        *re.findall(r"Eq\. \d", TEXT)}
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    own = {"#" + heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    for link in links:
        path, _, anchor = link.partition("#")
        if link.startswith("#"):
            assert link in own, link
        elif not link.startswith("https:"):
            assert (TOUR.parent / path).exists(), link
            assert not anchor or anchor in anchors(TOUR.parent / path), link
    assert "bugs.md" in links


def test_there_are_ten_exercises_whose_answers_are_folded_away():
    assert len(ANSWERS) == 10 and all(f"\n**{i}. " in TEXT for i in range(1, 11))
    assert "```" not in re.sub(r"<details>.*?</details>", "", TEXT, flags=re.S)


@pytest.mark.slow
def test_its_cells_and_the_code_of_its_answers_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    space = {"__name__": "__main__"}
    pieces = ["".join(cell["source"]) for cell in CODE]
    answers = re.findall(r"```python\n(.*?)```", "\n".join(ANSWERS), re.S)
    pictures = 0
    for piece in pieces + answers:
        tree = ast.parse(piece)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "tour.ipynb", "exec"), space)
        value = last and eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), space)
        pictures += hasattr(value, "_repr_png_") and value._repr_png_().startswith(b"\x89PNG")
    assert pictures == sum(len(shown(cell)) for cell in CODE)
    assert len(answers) >= 8 and all("assert" in answer for answer in answers)
    assert torch.is_grad_enabled() and "K = " in capsys.readouterr().out
