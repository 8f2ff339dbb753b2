"""Claims about `python -m studies edit`: what is not redrawn stays, token for token and pixel for pixel."""

import json

import numpy as np
import pytest
import torch
from helpers import refused, study
from PIL import Image

import plumbing.images
import studies.edit
from plumbing.models import load_model
from plumbing.shapes import Shapes


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A 96x64 picture; what counts is the 64x64 in its middle, scaled to 32x32."""
    path, shapes = tmp_path_factory.mktemp("picture") / "x.png", Shapes("val", 20, 64)
    pixels = torch.cat([shapes.view(i) for i in (3, 4)], 2)[:, :, 16:112]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return path


def edit(trained, picture, out, *words):
    study("edit", picture, "--ckpt", trained / "nar.pt", "--device", "cpu", "--out", out, *words)
    return json.loads((out / "info.json" if out.suffix == "" else out.with_suffix(".json")).read_text())


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_tokens_outside_the_box_are_those_of_the_image_and_pixels_far_from_it_its_own(
        trained, picture, tmp_path, capsys):
    # columns 48 to 80 of the picture are 32 to 64 of its middle, 16 to 32 of 32: the right half of the grid
    info = edit(trained, picture, tmp_path / "out", "--box", "48,0,32,64", "--num", 5, "--format", "files",
                "--classes", "star")
    redrawn = torch.tensor(info["redrawn"]).bool()
    assert redrawn.tolist() == [[False, False, True, True]] * 4
    tokens, given, steps = (torch.tensor(info[key]) for key in ("tokens", "input_tokens", "steps"))
    assert (tokens[:, ~redrawn.flatten()] == given[~redrawn.flatten()]).all() and tokens.shape == (5, 16)
    assert ((steps == -1) == ~redrawn).all() and steps.max() > 0 and len(tokens.unique(dim=0)) > 1
    model, _ = load_model(trained / "phase2.pt", ("phase2",))
    middle = plumbing.images.to_square(plumbing.images.load_rgb(picture), 32)[:, :, 8:40]
    assert torch.equal(pixels(tmp_path / "out" / "input.png"), middle)
    x = plumbing.images.to_float(middle[None], "cpu")
    assert model.encode(x)[0].tolist() == info["input_tokens"]
    x_hat = plumbing.images.to_uint8(model.decode(tokens))
    for i in range(5):
        assert (pixels(tmp_path / "out" / f"candidate_{i:03d}.png").int() - x_hat[i].int()).abs().max() <= 1
        blended = pixels(tmp_path / "out" / f"composite_{i:03d}.png")
        assert torch.equal(blended[:, :, :7], middle[:, :, :7])  # a seam of f = 8 pixels and its half
        assert (blended[:, :, 16:].int() - x_hat[i, :, :, 16:].int()).abs().max() <= 1
    assert "redraws 8 of 16 tokens: wrote" in capsys.readouterr().out
    masked = pixels(tmp_path / "out" / "masked.png")
    assert torch.equal(masked[:, :, :16], middle[:, :, :16])
    assert (masked[:, :, 16:] != middle[:, :, 16:]).any()


def test_candidate_i_depends_on_seed_and_i_alone(trained, picture, tmp_path):
    words = ("--box", "32,8,30,30", "--classes", "ring")
    many = edit(trained, picture, tmp_path / "a.png", *words, "--num", 6)
    few = edit(trained, picture, tmp_path / "b.png", *words, "--num", 2)
    other = edit(trained, picture, tmp_path / "c.png", *words, "--num", 2, "--seed", 1)
    assert many["tokens"][:2] == few["tokens"] != other["tokens"]
    assert Image.open(tmp_path / "a.png").width > Image.open(tmp_path / "b.png").width


def test_a_mask_is_scaled_to_the_image_and_white_is_redrawn(trained, picture, tmp_path):
    drawn = Image.new("1", (192, 128))  # twice as large
    drawn.paste(1, (96, 0, 160, 128))  # columns 48 to 80 of the picture
    drawn.save(tmp_path / "mask.png")
    info = edit(trained, picture, tmp_path / "x.png", "--mask", tmp_path / "mask.png", "--classes", "star")
    assert info["redrawn"] == [[0, 0, 1, 1]] * 4 and len(info["tokens"]) == 8


LAYER = (255, 255, 255, 0)  # as paint programs save it: transparent, and white where it is laid over white


@pytest.mark.parametrize("mode, ground, paint, told", [
    ("L", 0, 255, "paint"), ("RGB", (0, 0, 0), (250, 250, 250), "paint"), ("L", 255, 0, "ground"),
    ("RGBA", LAYER, (255, 255, 255, 255), "paint"), ("RGBA", LAYER, (0, 0, 0, 255), "paint"),
    ("RGBA", LAYER, (200, 0, 0, 255), "paint"), ("RGBA", (0, 0, 0, 0), (255, 255, 255, 200), "paint"),
    ("LA", (0, 0), (0, 255), "paint"), ("RGBA", (0, 0, 0, 255), (255, 255, 255, 255), "paint")])
def test_white_is_redrawn_or_on_a_transparent_layer_whatever_is_painted(tmp_path, mode, ground, paint, told):
    image = Image.new(mode, (20, 10), ground)
    image.paste(paint, (5, 0, 10, 10))
    image.save(tmp_path / "mask.png")
    redrawn = np.array(studies.edit.read_mask(tmp_path / "mask.png"))
    painted = np.zeros((10, 20), bool)
    painted[:, 5:10] = True
    assert np.array_equal(redrawn, painted if told == "paint" else ~painted)


def test_a_single_pixel_hides_its_token_and_no_other(trained, picture, tmp_path):
    info = edit(trained, picture, tmp_path / "x.png", "--box", "16,63,1,1", "--classes", "star")
    assert info["redrawn"] == [[0] * 4] * 3 + [[1, 0, 0, 0]]


def test_an_image_laid_on_the_canvas_keeps_its_tokens_and_the_rest_is_drawn(trained, picture, tmp_path):
    info = edit(trained, picture, tmp_path / "out", "--onto", "8,16,16", "--format", "files", "--num", 2,
                "--classes", "star")
    assert info["redrawn"] == [[1] * 4, [1] * 4, [1, 0, 0, 1], [1, 0, 0, 1]]
    laid = pixels(tmp_path / "out" / "input.png")
    small = plumbing.images.to_square(plumbing.images.load_rgb(picture), 16)[:, :, 4:20]
    assert torch.equal(laid[:, 16:, 8:24], small)


def test_without_classes_all_are_drawn_in_turn(trained, picture, tmp_path):
    info = edit(trained, picture, tmp_path / "x.png", "--box", "40,0,8,8", "--num", 2)
    assert info["classes"] == sorted(Shapes.NAMES)


def test_a_folder_of_another_edit_is_refused_and_the_same_one_goes_on(trained, picture, tmp_path, capsys):
    words = ["--box", "40,0,8,8", "--format", "files", "--classes", "star", "--num"]
    edit(trained, picture, tmp_path / "out", *words, 1)
    before = (tmp_path / "out" / "candidate_000.png").read_bytes()
    assert "differ" in refused(capsys, edit, trained, picture, tmp_path / "out", *words, 2, "--seed", 1)
    assert not (tmp_path / "out" / "candidate_001.png").exists()
    assert len(edit(trained, picture, tmp_path / "out", *words, 2)["tokens"]) == 2
    assert (tmp_path / "out" / "candidate_000.png").read_bytes() == before


def test_what_cannot_be_edited_is_refused_in_one_line(trained, picture, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (50, 64)).save(tmp_path / "form.png")
    Image.new("L", (96, 64)).save(tmp_path / "black.png")
    for image, words, told in (
            (picture, ["--box", "90,0,10,10"], "does not lie inside the image, which has 96x64 pixels"),
            (picture, ["--box", "1,2,3"], "expected x,y,width,height"),
            (picture, ["--box", "1.5,0,5,5"], "expected x,y,width,height"),
            (picture, ["--box", "0,0,4,4"], "nothing is redrawn"),  # left of the middle
            (picture, ["--mask", tmp_path / "form.png"], "another form"),
            (picture, ["--mask", tmp_path / "black.png"], "nothing is redrawn"),
            (picture, ["--mask", tmp_path / "text.png"], "--mask"),
            (picture, ["--onto", "20,0,16"], "canvas of 32x32"),
            (tmp_path / "text.png", ["--box", "0,0,4,4"], "error: edit "),
            (picture, ["--box", "40,0,8,8", "--classes", "cat"], "--classes cat"),
            (picture, ["--box", "40,0,8,8", "--ckpt", trained / "ar.pt"], "needs nar")):
        assert told in refused(capsys, edit, trained, image, tmp_path / "x.png", *words)
    assert not (tmp_path / "x.png").exists()
    for words, told in (("x.png", "edit needs --box"), ("--box 1,2,3,4", "required: IMAGE"),
                        ("x.png --box 1 --format npz", "--format"), ("x.png --box 1 --top-p 1", "--top-p")):
        assert told in refused(capsys, study, "edit", "--ckpt", "nar.pt", *words.split())
