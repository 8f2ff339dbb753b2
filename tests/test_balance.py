"""Claims about the VGG's scaled taps and `python -m studies balance`. CPU, no network."""

import json

import pytest
import torch
import torch.nn.functional as F
import plumbing.data
import plumbing.images
import plumbing.models
import plumbing.weights
import recipes.small
from helpers import call, differing, earlier, refused, study

import perceptual as P


def read(path):
    return torch.load(path, weights_only=True)


def look(*words):
    study("balance", *words, "--device", "cpu")


def test_every_tap_of_a_vgg_that_was_trained_here_has_variance_1_over_the_training_images(trained):
    vgg, ckpt = plumbing.models.load_model(trained / "vgg.pt", ("vgg",))
    images = plumbing.data.load_data(ckpt["config"])[0]
    x = plumbing.images.to_float(torch.stack([images.view(i) for i in range(len(images))]), "cpu")
    for name, features in vgg(x, P.NAMES).items():
        assert features.var(0, unbiased=False).mean().item() == pytest.approx(1, rel=1e-3), name


def test_a_vgg_whose_taps_are_not_to_be_scaled_keeps_no_scales_and_its_training_is_the_same(
        trained, data, tmp_path):
    call("vgg", tmp_path, data, classifier__scale_taps=False)
    one, other = read(trained / "vgg.pt"), read(tmp_path / "vgg.pt")
    assert not differing(one["model"], other["model"]) and "scale" not in other["model_config"]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    scaled, plain = (plumbing.models.load_model(folder / "vgg.pt", ("vgg",))[0](x, P.NAMES)
                     for folder in (trained, tmp_path))
    for name, scale in one["model_config"]["scale"].items():
        if name in P.NAMES:
            torch.testing.assert_close(scaled[name], plain[name] * scale, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_vgg_that_was_interrupted_gets_the_scales_of_one_that_was_not(trained, data, tmp_path):
    for steps in (3, 6):
        call("vgg", tmp_path, data, "--steps", steps, classifier__schedule="constant")
    call("vgg", tmp_path / "straight", data, classifier__schedule="constant")
    a, b = read(tmp_path / "vgg.pt"), read(tmp_path / "straight" / "vgg.pt")
    assert not [name for name in differing(a, b) if not name.startswith(".config")]


def test_the_balance_is_that_of_sizes_and_gradients_by_their_definition(trained, tmp_path, capsys):
    look(trained / "phase1.pt", trained / "phase2.pt", "--num", 4, "--out", tmp_path / "b.json")
    text = capsys.readouterr().out
    assert text.count(" times the size of L1, ") == 2 and text.count("| relu5_3 ") == 2
    found, phase2 = json.loads((tmp_path / "b.json").read_text())
    assert phase2["stage"] == "phase2"
    tokenizer, ckpt = plumbing.models.load_model(trained / "phase1.pt", ("phase1",))
    vgg, _ = plumbing.models.load_model(trained / "vgg.pt", ("vgg",))
    images = plumbing.data.load_data(ckpt["config"])[1]
    draw = torch.Generator().manual_seed(plumbing.processes.mix(0, "balance"))
    x = torch.stack([images.view(i) for i in torch.randperm(len(images), generator=draw)[:4].tolist()])
    x, last = plumbing.images.to_float(x, "cpu"), tokenizer.decoder.conv_out.weight

    def gradients(loss_of):
        x_hat = tokenizer.decode(tokenizer.encode(x))
        loss = loss_of(x_hat)
        return [loss.item()] + [g.norm().item() for g in torch.autograd.grad(loss, (x_hat, last))]

    one = gradients(lambda x_hat: F.l1_loss(x_hat, x))

    def as_ratios(row, loss_of):
        expected = [a / b for a, b in zip(gradients(loss_of), one, strict=True)]
        assert [row[key] for key in ("size", "at_image", "at_layer")] == pytest.approx(expected, rel=1e-3)
        return expected[0]

    weights, sizes = P.layer_weights(1.0), {}
    for name in P.NAMES:
        size = as_ratios(found["terms"][name], lambda x_hat, name=name: F.mse_loss(
            vgg(x_hat, [name])[name], vgg(x, [name])[name]))
        sizes[name] = weights.get(name, 0) * size
    for name, size in sizes.items():
        assert found["terms"][name]["share"] == pytest.approx(size / sum(sizes.values()), rel=1e-3)
    c = ckpt["config"]["phase1"]["per_weight"]
    as_ratios(found["weighted_loss"], lambda x_hat: c * P.perceptual_loss(vgg, x, x_hat, weights))
    assert found["l1"] == pytest.approx(one[0], rel=1e-4) and found["alpha"] == 1.0


@pytest.mark.slow
def test_imagenet_s_vgg_serves_too_and_random_weights_are_told(trained, capsys, tmp_path):
    look(trained / "phase1.pt", "--vgg", "random", "--num", 2, "--out", tmp_path / "b.json")
    assert "random weights" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "b.json").read_text())
    assert found["vgg"] == "random" and found["note"]


def test_what_has_no_balance_is_refused(trained, capsys, tmp_path):
    alone = tmp_path / "alone"
    earlier(trained, alone, "phase2")
    (alone / "vgg.pt").unlink()
    assert "no vgg.pt beside" in refused(capsys, look, alone / "phase1.pt")
    assert "ar.pt" in refused(capsys, look, trained / "ar.pt")
    ckpt = read(trained / "phase1.pt")
    ckpt["config"]["phase1"]["layers"] = "lpips"
    torch.save(ckpt, tmp_path / "phase1.pt")
    assert "LPIPS" in refused(capsys, look, tmp_path / "phase1.pt")
    assert not (tmp_path / "balance.json").exists() and not (trained / "balance.json").exists()


@pytest.mark.parametrize("preset", recipes.small.PRESETS.values(), ids=recipes.small.PRESETS)
def test_the_vgg_of_every_small_preset_has_relu5_3_on_the_token_grid(preset):
    side, vgg = preset["image_size"], preset["classifier"]
    tokens = side // 2 ** (len(preset["tokenizer"]["channel_mult"]) - 1)
    taps = P.VGGTaps(plumbing.weights.build_vgg16(vgg["width"], 10, vgg["hidden"],
                                              skip_pools=vgg["skip_pools"]))
    assert taps(torch.zeros(1, 3, side, side), ["relu5_3"])["relu5_3"].shape[2:] == (tokens, tokens)
    assert vgg["scale_taps"]
