"""Claims about the models in the box, assets/models: they work in a clone, before anything is trained."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, study
from PIL import Image
from safetensors.torch import load_file

import sample
import visualize
from plumbing.files import read_checkpoint
from plumbing.hashes import latent_hash
from plumbing.images import psnr, to_float
from plumbing.models import load_model, load_tokenizer_of
from plumbing.shapes import Shapes
from recipes.options import sample_args, visualize_args
from studies.rounding import MEASURES, numbers, rounding

BOX = ROOT / "assets" / "models"
MODELS = sorted(path.name for path in BOX.iterdir() if path.is_dir())
STAGES = ("phase1", "phase2", "ar", "nar", "vgg")


@pytest.fixture(params=MODELS)
def box(request, tmp_path):
    """A copy of a model's folder: pictures go beside what draws them."""
    return shutil.copytree(BOX / request.param, tmp_path / request.param)


def pictures(box, stage, folder):
    """Words that name images: none for a model of `shapes`, else a folder with one of each class."""
    ckpt = read_checkpoint(box / stage, STAGES)
    if ckpt["config"]["data"] == "shapes":
        return []
    for i, name in enumerate(ckpt["class_names"]):
        (folder / name).mkdir(parents=True)
        image = Shapes("val", 10, ckpt["config"]["image_size"]).view(i)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name / "0.png")
    return ["--data", str(folder)]


def test_they_are_small_rounded_and_name_no_folder_of_the_machine_that_made_them():
    files = [path for path in BOX.rglob("*") if path.suffix == ".safetensors"]
    sizes = {path: path.stat().st_size / 1e6 for path in files}
    assert "demo" in MODELS and sum(sizes.values()) <= 12
    assert sum(size for path, size in sizes.items() if BOX / "demo" in path.parents) <= 7.5
    for path in files:
        text = path.with_name("config.json").read_text()
        about = json.loads(text)
        assert about["rounded"] == "float16" and about["config"]["data"] in (None, "shapes", "cifar10")
        assert not re.search('"[^"]*/[^"]*"', text), path
    assert all((BOX / name / "README.md").exists() for name in MODELS)


def test_samples_of_each_prior_are_drawn_beside_it(box):
    for stage in ("ar", "nar"):
        ckpt = read_checkpoint(box / stage, STAGES)
        sample.main(sample_args(["--ckpt", str(box / stage), "--num", "10"]))
        side = max(64, ckpt["config"]["image_size"])
        width, height = Image.open(box / f"samples_{stage}.png").size
        assert width == 10 * (side + 2) - 2 and height > side  # a row, and the names of the classes above it


def test_the_view_and_phase_1_against_phase_2_are_drawn_beside_the_prior(box, tmp_path):
    data = pictures(box, "ar", tmp_path / "data")
    visualize.main(visualize_args(["view", "--ckpt", str(box / "ar"), "--num", "10", *data]))
    (view,) = json.loads((box / "view.json").read_text())
    assert view["num_images"] == 10
    assert ("class_kept_by_prediction" in view) == (box / "vgg").exists()  # as its VGG sees it
    if (box / "phase1").exists():
        visualize.main(visualize_args(["fig7a", "--ckpt", str(box / "ar"), "--num", "6"]))
        (phases,) = json.loads((box / "fig7a.json").read_text())
        assert phases["mean_difference"] > 0


def test_an_edit_of_an_image_without_its_class_keeps_what_is_outside_the_box(box):
    ckpt = read_checkpoint(box / "nar", STAGES)
    study("edit", ROOT / "assets/star.png", "--ckpt", box / "nar", "--box", "64,0,64,128", "--num", 4)
    about = json.loads((box / "edit.json").read_text())
    kept = np.array(about["redrawn"]).flatten() == 0
    assert kept.any() and (np.array(about["tokens"])[:, kept] == np.array(about["input_tokens"])[kept]).all()
    assert about["classes"][0] in ckpt["class_names"] and (box / "edit.png").exists()


def test_phase_1_holds_its_decoder_alone_and_takes_the_rest_from_phase_2():
    box = BOX / "demo"
    (one, _), (two, _) = (load_model(box / stage, (stage,)) for stage in ("phase1", "phase2"))
    assert latent_hash(one) == latent_hash(two) == load_tokenizer_of(
        box / "nar", read_checkpoint(box / "nar", STAGES))[1]["tokenizer_hash"]
    assert (box / "phase1" / "model.safetensors").stat().st_size < (
        0.6 * (box / "phase2" / "model.safetensors").stat().st_size)
    assert not any("reservoir" in name for name in load_file(box / "phase2" / "model.safetensors"))
    tokens = torch.randint(one.codebook_size, (2, *one.token_shape))
    assert not torch.equal(one.decode(tokens), two.decode(tokens))


def test_the_numbers_before_and_after_a_rounding_are_those_of_the_models():
    paths = {stage: BOX / "demo" / stage for stage in MEASURES}
    shapes = Shapes("val", 1000, 32)
    x, labels = to_float(torch.stack([shapes.view(i) for i in range(20)]), "cpu"), torch.arange(20) % 10
    found, tokens = numbers(paths, x.split(10), labels.split(10))
    models = {stage: load_model(path, (stage,))[0] for stage, path in paths.items()}
    with torch.no_grad():
        assert torch.equal(tokens, models["phase1"].encode(x))
        for stage in ("phase1", "phase2"):
            values = psnr(x, models[stage].decode(tokens))
            assert found[stage] == pytest.approx(values.mean().item(), rel=1e-4)
        nats = models["ar"].predict(tokens, labels)[1]
        assert found["ar"] == pytest.approx(nats.mean().item(), rel=1e-4)
        seen = models["vgg"](x, ["logit"])["logit"].argmax(1)
        assert found["vgg"] == pytest.approx((seen == labels).float().mean().item())
    assert 0 < found["nar"] < 4.16


def test_a_rounding_whose_images_are_not_there_is_not_measured(tmp_path):
    ckpt = read_checkpoint(BOX / "demo" / "vgg", STAGES)
    ckpt["config"]["data"] = str(tmp_path / "nowhere")
    torch.save(ckpt, tmp_path / "vgg.pt")
    (line,) = rounding({"": tmp_path / "vgg.pt"}, {"": tmp_path / "vgg.pt"})
    assert "was not measured" in line and "nowhere" in line


def test_every_card_says_what_the_rounding_did():
    for name in MODELS:
        text = (BOX / name / "README.md").read_text()
        assert "before rounding" in text and "tokens that changed" in text and "ar_class_accuracy" in text


@pytest.mark.slow
def test_the_card_has_the_numbers_of_the_rounded_model():
    """Of `demo`, whose images are in the box too."""
    name, paths = "demo", {stage: BOX / "demo" / stage for stage in MEASURES}

    def after(text):
        rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| ([\d.]+) \|$", text, re.M)
        return {measure: float(number) for measure, number in rows}

    card = after((BOX / name / "README.md").read_text())
    assert card == pytest.approx(after("\n".join(rounding(paths, paths))), rel=2e-3)
    assert card.keys() == {*MEASURES.values()}
