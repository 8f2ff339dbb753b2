"""Claims about the VGG's scaled taps and `python -m studies balance`. CPU, no network."""

import json

import pytest
import torch
import torch.nn.functional as F
import plumbing.data
import plumbing.images
import plumbing.models
import plumbing.weights
import recipes.options
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


def test_a_vgg_with_one_pool_left_out_sees_the_token_grid_of_f_8_in_relu5_3(trained):
    vgg, _ = plumbing.models.load_model(trained / "vgg.pt", ("vgg",))
    tokenizer, _ = plumbing.models.load_model(trained / "phase1.pt", ("phase1",))
    x = torch.zeros(1, 3, 32, 32)
    assert vgg(x, ["relu5_3"])["relu5_3"].shape[2:] == (tokenizer.grid_size,) * 2 == (4, 4)


def test_a_vgg_whose_taps_are_not_to_be_scaled_keeps_no_scales(trained, data, tmp_path):
    call("vgg", tmp_path, data, classifier__scale_taps=False)
    one, other = read(trained / "vgg.pt"), read(tmp_path / "vgg.pt")
    assert "scale" in one["model_config"] and "scale" not in other["model_config"]
    assert not differing(one["model"], other["model"])  # training is the same


def test_a_vgg_of_before_has_no_scales_and_is_opened_as_it_was(trained, tmp_path):
    ckpt = read(trained / "vgg.pt")
    scale = ckpt["model_config"].pop("scale")
    torch.save(ckpt, tmp_path / "vgg.pt")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    new, old = (plumbing.models.load_model(folder / "vgg.pt", ("vgg",))[0](x, P.NAMES)
                for folder in (trained, tmp_path))
    for name in P.NAMES:
        torch.testing.assert_close(new[name], old[name] * scale[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_vgg_that_was_interrupted_gets_the_scales_of_one_that_was_not(trained, data, tmp_path):
    for steps in (3, 6):
        call("vgg", tmp_path, data, "--steps", steps, classifier__schedule="constant")
    call("vgg", tmp_path / "straight", data, classifier__schedule="constant")
    a, b = read(tmp_path / "vgg.pt"), read(tmp_path / "straight" / "vgg.pt")
    assert not [name for name in differing(a, b) if not name.startswith(".config")]


def test_the_balance_is_that_of_sizes_and_gradients_by_their_definition(trained, tmp_path):
    look(trained / "phase1.pt", "--num", 4, "--out", tmp_path / "b.json")
    (told,) = json.loads((tmp_path / "b.json").read_text())
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
    weights = P.layer_weights(1.0)
    sizes = {}
    for name in P.NAMES:
        found = gradients(lambda x_hat, name=name: (vgg(x_hat, [name])[name] - vgg(x, [name])[name])
                          .square().mean())
        row = told["terms"][name]
        assert [row[key] for key in ("size", "at_image", "at_layer")] == pytest.approx(
            [a / b for a, b in zip(found, one, strict=True)], rel=1e-3)
        sizes[name] = found[0] * weights.get(name, 0)
    for name, size in sizes.items():
        assert told["terms"][name]["share"] == pytest.approx(size / sum(sizes.values()), rel=1e-3)
    c = ckpt["config"]["phase1"]["per_weight"]
    whole = gradients(lambda x_hat: c * P.perceptual_loss(vgg, x, x_hat, weights))
    assert [told["weighted_loss"][key] for key in ("size", "at_image", "at_layer")] == pytest.approx(
        [a / b for a, b in zip(whole, one, strict=True)], rel=1e-3)
    assert told["l1"] == pytest.approx(one[0], rel=1e-4) and told["alpha"] == 1.0


def test_the_balance_tells_a_table_and_one_line_for_the_decisions(trained, capsys, tmp_path):
    look(trained / "phase1.pt", trained / "phase2.pt", "--out", tmp_path / "b.json")
    text = capsys.readouterr().out
    assert text.count(" times the size of L1, ") == 2 and text.count("| relu5_3 ") == 2
    assert [told["stage"] for told in json.loads((tmp_path / "b.json").read_text())] == ["phase1", "phase2"]


def test_imagenet_s_vgg_serves_too_and_random_weights_are_told(trained, capsys, tmp_path):
    look(trained / "phase1.pt", "--vgg", "random", "--num", 2, "--out", tmp_path / "b.json")
    assert "random weights" in capsys.readouterr().out
    (told,) = json.loads((tmp_path / "b.json").read_text())
    assert told["vgg"] == "random" and told["note"]


def test_what_has_no_balance_is_refused(trained, data, capsys, tmp_path, monkeypatch):
    alone = tmp_path / "alone"
    earlier(trained, alone, "phase2")
    (alone / "vgg.pt").unlink()
    assert "no vgg.pt beside" in refused(capsys, look, alone / "phase1.pt")
    assert "ar.pt" in refused(capsys, look, trained / "ar.pt")
    assert "is not a file" in refused(capsys, look, trained / "phase1.pt", "--vgg", tmp_path / "no.pth")
    assert "required: CKPT" in refused(capsys, look)
    ckpt = read(trained / "phase1.pt")
    ckpt["config"]["phase1"]["layers"] = "lpips"
    torch.save(ckpt, tmp_path / "phase1.pt")
    assert "LPIPS" in refused(capsys, look, tmp_path / "phase1.pt")
    with pytest.raises(SystemExit):
        recipes.options.visualize_args(["view", "--ckpt", "ar.pt", "--vgg", "random"])
    assert "unknown argument --vgg" in capsys.readouterr().err
    assert not (tmp_path / "balance.json").exists() and not (trained / "balance.json").exists()


@pytest.mark.parametrize("preset", recipes.small.PRESETS.values(), ids=recipes.small.PRESETS)
def test_the_vgg_of_every_small_preset_has_relu5_3_on_the_token_grid(preset):
    side, vgg = preset["image_size"], preset["classifier"]
    tokens = side // 2 ** (len(preset["tokenizer"]["channel_mult"]) - 1)
    taps = P.VGGTaps(plumbing.weights.build_vgg16(vgg["width"], 10, vgg["hidden"],
                                              skip_pools=vgg["skip_pools"]))
    assert taps(torch.zeros(1, 3, side, side), ["relu5_3"])["relu5_3"].shape[2:] == (tokens, tokens)
    assert vgg["scale_taps"]
