"""Claims about `python -m studies metrics` and its parts: the numbers, and how they are told."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import torch_fidelity
import plumbing.data
import plumbing.files
import plumbing.images
import plumbing.models
import plumbing.slices
import plumbing.weights
import recipes.ablations
import recipes.options
import studies.distances
import studies.extractors
import studies.metrics
import studies.probe
import studies.references
import studies.rows
import studies.tables
from helpers import ROOT, call, command, few, fork, save_from_gpu, study, wait_for, wait_until
from PIL import Image
from test_foreign import images as random_images, taming
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import perceptual
import sample
from studies.commands import main, study_args
from studies.distances import fidelity, reference_statistics, ssim
from plumbing.errors import UserError
from studies.perturbed import near_codes, perturb
from plumbing.shapes import Shapes


@pytest.fixture(scope="session")
def scorer(tmp_path_factory, data):
    """A tiny resnet.pt: 16 features, so that 20 validation images are enough for a Frechet distance."""
    out = tmp_path_factory.mktemp("scorer")
    call("vgg", out, data, "--arch", "resnet", classifier__width=2)
    return out / "resnet.pt"


@pytest.fixture
def run(trained, tmp_path):
    """The checkpoints of the tiny run in a folder of their own."""
    for stage in ("vgg", "phase1", "phase2", "ar", "nar"):
        os.link(trained / f"{stage}.pt", tmp_path / f"{stage}.pt")
    return tmp_path


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


def measure(run, name, scorer, references, *words):
    """`python -m studies metrics` in this process; the JSON that it writes."""
    out = run / "result.json"
    lpips = ["--lpips", "none"] * (name.startswith("phase") and "--lpips" not in words)
    cache = ["--references", references] * ("--reference" not in words)
    study("metrics", "--ckpt", run / name, "--extractor", scorer, *cache, *lpips, "--device", "cpu",
          "--out", out, *words)
    return json.loads(out.read_text())


def pictures(count, seed, side=32):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


# The distances themselves ---------------------------------------------------------------------------------


def test_our_path_through_torch_fidelity_equals_its_own_on_two_folders_of_png_files(scorer, tmp_path):
    sets = {"fake": torch.stack([Shapes("train", 60, 32).view(i) // 2 for i in range(60)]),
            "real": torch.stack([Shapes("val", 70, 32).view(i) for i in range(70)])}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03d}.png")
    extractor = studies.extractors.Extractor(scorer, 32, torch.device("cpu"))
    fake, real = (extractor(images) for images in sets.values())
    ours = fidelity(fake["features"], fake["logits"], reference_statistics(real["features"]))

    class Registered(FeatureExtractorBase):
        """Our extractor as torch-fidelity wants one."""

        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "pool", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "pool"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            both = dict(zip(("pool", "logits"), extractor.network(x), strict=True))
            return tuple(both[layer] for layer in self.features_list)

    torch_fidelity.register_feature_extractor("ours", Registered)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), feature_extractor="ours",
        cuda=False, isc=True, fid=True, kid=True, prc=True, kid_subset_size=60, cache=False, verbose=False,
        save_cpu_ram=True)
    names = dict(fid="frechet_inception_distance", inception_score="inception_score_mean",
                 kid="kernel_inception_distance_mean", precision="precision", recall="recall")
    for name, key in names.items():  # KID is a difference of float32 means of about 1: a bound of its own
        bound = dict(abs=1e-6) if name == "kid" else dict(rel=1e-6)
        assert ours[name] == pytest.approx(theirs[key], **bound), name
    assert ours["fid"] > 0.001 and ours["kid"] > 0 and ours["inception_score"] > 1


def test_kid_equals_torch_fidelity_s_on_the_same_features():
    from torch_fidelity.metric_kid import kid_features_to_metric

    draw = torch.Generator().manual_seed(0)
    fake, real = torch.randn(50, 4, generator=draw), torch.randn(80, 4, generator=draw) + 1
    reference = reference_statistics(real)
    expected = kid_features_to_metric(fake, reference["features"], kid_subset_size=50, verbose=False)
    found = fidelity(fake, torch.randn(50, 3, generator=draw), reference)["kid"]
    assert found == expected["kernel_inception_distance_mean"] > 0


def test_the_frechet_distance_of_a_shifted_set_is_the_squared_shift():
    features = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    found = fidelity(features + torch.tensor([3.0, 4, 0, 0, 0]), features, reference_statistics(features))
    assert found["fid"] == pytest.approx(25, rel=1e-5)
    assert fidelity(features, features, reference_statistics(features))["fid"] == pytest.approx(0, abs=1e-5)


def test_precision_and_recall_have_their_known_values_where_samples_leave_out_a_mode():
    draw = torch.Generator().manual_seed(0)
    left, right, nowhere = (torch.randn(100, 2, generator=draw) + x for x in (-50.0, 50.0, 500.0))
    real = reference_statistics(torch.cat([left, right]))
    found = fidelity(left + 0, left, real)  # one of two modes: all samples are real, half of the real is met
    assert (found["precision"], found["recall"]) == (1, 0.5)
    found = fidelity(torch.cat([left, right, nowhere, nowhere]), torch.zeros(400, 3), real)
    assert (found["precision"], found["recall"]) == (0.5, 1)  # and half of the samples are of no mode


def test_the_inception_score_is_one_for_undecided_and_the_number_of_classes_for_even_sure_logits():
    features = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    sure = 100 * torch.nn.functional.one_hot(torch.arange(600) % 5, 5).float()
    reference = reference_statistics(features)
    values = [fidelity(features, logits, reference)["inception_score"] for logits in (0 * sure, sure)]
    assert values[0] == pytest.approx(1) and values[1] == pytest.approx(5, rel=0.05)


def test_reference_statistics_are_of_all_images_and_keep_a_subset_that_the_seed_fixes():
    features = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    found = reference_statistics(features, subset=50)
    assert torch.allclose(found["mu"], features.mean(0), atol=1e-6)
    assert torch.allclose(found["sigma"], torch.cov(features.T).double(), atol=1e-6)
    assert found["features"].shape == (50, 3) and not torch.equal(found["features"], features[:50])
    assert torch.equal(found["features"], reference_statistics(features, subset=50)["features"])


def test_ssim_has_its_closed_form_on_constant_images_and_is_one_for_equal_ones():
    x = pictures(3, 0)
    assert torch.allclose(ssim(x, x), torch.ones(3).double())
    a, b = torch.full((2, 3, 16, 16), 100).byte(), torch.full((2, 3, 16, 16), 200).byte()
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 200 + c1) / (100**2 + 200**2 + c1)
    assert torch.allclose(ssim(a, b), torch.full((2,), expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="11x11"):
        ssim(x[..., :10], x[..., :10])


def test_ssim_equals_an_independent_implementation():
    from scipy.ndimage import gaussian_filter

    x = torch.stack([Shapes("val", 3, 32).view(i) for i in range(3)])
    y = (x.int() + pictures(3, 1).int() // 4).clamp(0, 255).byte()

    def blur(channel):  # truncate 3.5 of deviation 1.5 is a window of 11
        return gaussian_filter(channel, 1.5, truncate=3.5)[5:-5, 5:-5]

    for i, value in enumerate(ssim(x, y).tolist()):
        maps = []
        for a, b in zip(x[i].double().numpy(), y[i].double().numpy(), strict=True):
            ma, mb = blur(a), blur(b)
            va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
            maps.append(np.mean((2 * ma * mb + 6.5025) * (2 * cov + 58.5225)
                        / ((ma**2 + mb**2 + 6.5025) * (va + vb + 58.5225))))
        assert value == pytest.approx(np.mean(maps), abs=1e-9) and value < 0.95


@pytest.mark.slow
def test_lpips_takes_the_vgg_it_is_given_and_its_own_linear_weights():
    import lpips

    vgg = plumbing.weights.load_vgg16("random")
    ours = plumbing.weights.build_lpips(vgg)
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    for name, layer in zip(("conv1_1", "conv5_3"), (0, 28), strict=True):
        part = getattr(ours.net, "slice1" if layer == 0 else "slice5")
        assert torch.equal(getattr(part, str(layer)).weight, vgg.features[layer].weight), name
    pairs = list(zip(ours.lins.parameters(), theirs.lins.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in pairs) and not ours.training
    with torch.no_grad():
        assert ours(x, x).abs().max() == 0 and (ours(x, y) > 0).all()
    assert not any(p.requires_grad for p in ours.parameters())


# Extractors -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random Inception weights in the real file format."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    torch.save({}, path.with_name("empty.pth"))
    torch.manual_seed(0)
    empty = dict(feature_extractor_weights_path=path.with_name("empty.pth"))
    network = Empty("inception-v3-compat", ["2048"], **empty)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_is_torch_fidelity_s_with_the_weights_of_a_local_file(inception_file, tmp_path):
    """Also of one that was saved on a GPU."""
    save_from_gpu(torch.load(inception_file, weights_only=True), tmp_path / "gpu.pth")
    extractor = studies.extractors.Extractor(tmp_path / "gpu.pth", 32, torch.device("cpu"))
    images = pictures(2, 0)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_file)
    features, logits = theirs(images.repeat(4, 1, 1, 1))  # 8 images, as ours fills a slice up
    found = extractor(images)
    assert torch.equal(found["features"], features[:2]) and torch.equal(found["logits"], logits[:2])
    features = features[:2]
    assert features.shape == (2, 2048) and features.std() > 0
    assert extractor.info["resize"] == "tf1-bilinear-299" and extractor.info["feature_layer"] == "2048"


@pytest.mark.slow
def test_inception_files_that_are_missing_damaged_or_foreign_are_refused(
        inception_file, tmp_path, monkeypatch):
    official = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    shutil.copy(inception_file, official)
    with pytest.raises(UserError, match="6726825d.pth is damaged"):
        studies.extractors.load_inception(str(official))
    foreign = tmp_path / "foreign.pth"
    torch.save({"a": torch.zeros(2)}, foreign)
    code = tmp_path / "code.pth"
    torch.save(os.system, code)
    for path in (tmp_path / "nowhere.pth", foreign, code):
        with pytest.raises(UserError, match="no Inception weights.*pass --extractor FILE"):
            studies.extractors.load_inception(str(path))
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
                        lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="no network"):
        studies.extractors.load_inception("inception")


def test_a_vgg_and_a_scorer_both_serve_and_give_their_own_logits(trained, scorer, data):
    images = torch.stack([Shapes("val", 5, 32).view(i) for i in range(5)])
    x = perceptual.normalize_images(plumbing.images.to_float(images, "cpu"))
    for path, width, stage in ((trained / "vgg.pt", 32, "vgg"), (scorer, 16, "resnet")):
        found = studies.extractors.Extractor(path, 32, torch.device("cpu"))(images)
        model, _ = plumbing.models.load_model(path, (stage,))
        with torch.no_grad():
            network = getattr(model, "vgg", model)
            expected = network(x) / getattr(network, "logit_scale", 1)  # as it was trained
        assert found["features"].shape == (5, width)
        assert torch.allclose(found["logits"], expected, atol=1e-4)


def test_a_narrow_scorer_trains_and_its_shortcuts_are_those_of_strided_convolutions():
    """A stride in a 1x1 convolution aborts below 8 channels: on processors with AVX2 alone, oneDNN's bug."""
    network = plumbing.weights.ResNet(2, 10).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    for _ in range(10):
        network(x).sum().backward()
    conv, x = network.features[4].downsample[0], torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(conv(x), torch.nn.functional.conv2d(x, conv.weight, stride=2))


def test_the_scorer_is_a_residual_network_of_another_family_with_the_members_of_a_vgg():
    network = plumbing.weights.ResNet(32, 10)
    assert sum(p.numel() for p in network.parameters()) == 1_228_970
    assert network.features(torch.zeros(2, 3, 32, 32)).shape == (2, 256, 4, 4)
    assert network.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


# The command ----------------------------------------------------------------------------------------------


def test_a_result_of_reconstructions_holds_the_numbers_and_how_they_were_measured(run, scorer, references):
    result = measure(run, "phase2.pt", scorer, references)
    assert result["protocol"] == "rfd-val" and result["num_images"] == 20 == result["reference_images"]
    assert {*studies.metrics.HOW, "extractor", "tokenizer", "decoder", "batch", "command", "seconds",
            "images_hash", "torch_fidelity", "threads"} <= result.keys()
    tokenizer, ckpt = plumbing.models.load_model(run / "phase2.pt", ("phase2",))
    val = plumbing.data.load_data(ckpt["config"])[1]
    x = torch.stack([val.view(i) for i in range(20)])
    tokens = tokenizer.encode(plumbing.images.to_float(x, "cpu"))
    x_hat = plumbing.images.to_uint8(plumbing.slices.decode(tokenizer, tokens))
    numbers = result["results"]
    assert numbers["usage"] == len(tokens.unique()) / 32
    assert numbers["l1"] == pytest.approx((x.double() - x_hat.double()).abs().mean().item() / 127.5, rel=1e-3)
    assert numbers["ssim"] == pytest.approx(ssim(x, x_hat).mean().item(), rel=1e-3)
    assert numbers["psnr"] == pytest.approx(
        plumbing.images.psnr(plumbing.images.to_float(x, "cpu"), plumbing.images.to_float(x_hat, "cpu"))
        .mean()
        .item(),
        rel=1e-3,
    )
    extractor = studies.extractors.Extractor(scorer, 32, torch.device("cpu"))
    real, fake = extractor(x), extractor(x_hat)
    expected = fidelity(fake["features"], fake["logits"], reference_statistics(real["features"]))
    assert numbers["rfd"] == pytest.approx(expected["fid"], rel=1e-2) and numbers["rfd"] > 0
    assert 0 <= numbers["class_accuracy"] <= 1 and len(numbers["class_accuracy_by_class"]) == 10
    assert all(math.isfinite(v) for v in numbers.values() if isinstance(v, float))


def test_near_codes_are_the_nearest_that_the_decoder_sees_for_every_kind_of_codebook():
    from forks.fqgan.tokenizer import FactorizedConfig, FactorizedTokenizer
    from forks.fsq import FSQTokenizer
    from tokenizer import TokenizerConfig, VQTokenizer

    sizes = dict(base_width=8, channel_mult=[1, 2], image_size=16, codebook_size=24)
    for kind, config in (
            (VQTokenizer, TokenizerConfig(codebook_dim=4, **sizes)),
            (FSQTokenizer, FSQTokenizer.Config(codebook_dim=2, levels=[4, 6], **sizes)),
            (FactorizedTokenizer, FactorizedConfig(codebook_dim=4, num_codebooks=2, **sizes))):
        model = kind(config)
        near = near_codes(model, 3)
        parts = getattr(model.quantizer, "parts", [model.quantizer])
        assert near.shape == (len(parts), 24, 3)
        for part, found in zip(parts, near, strict=True):
            codes = part.lookup(torch.arange(24).view(1, 24, 1))[0, :, :, 0].T
            far = torch.cdist(codes, codes).fill_diagonal_(float("inf"))
            torch.testing.assert_close(far.gather(1, found), far.sort(1).values[:, :3])
        tokens = torch.randint(24, (40, *model.token_shape))
        swapped = perturb(tokens, near, 0)
        changed = swapped != tokens
        assert changed.float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert torch.equal(swapped[7:9], perturb(tokens[7:9], near, 7))  # whatever the batch
        flat, other = (t.view(40, -1, len(parts)) for t in (tokens, swapped))
        for j in range(len(parts)):
            hits = near[j][flat[..., j]] == other[..., j, None]
            assert torch.equal(hits.any(2), flat[..., j] != other[..., j])


def test_p_fd_measures_images_of_swapped_tokens(run, scorer, references):
    plain = measure(run, "phase1.pt", scorer, references)
    swapped = measure(run, "phase1.pt", scorer, references, "--perturb")
    assert swapped["protocol"] == "pfd-val" and swapped["images_hash"] != plain["images_hash"]
    assert {"pfd", "pkd", "usage", "psnr"} <= swapped["results"].keys() and "rfd" not in swapped["results"]
    assert swapped["results"]["psnr"] != plain["results"]["psnr"]
    assert swapped["results"]["usage"] == plain["results"]["usage"]  # of the tokens of the images
    model, ckpt = plumbing.models.load_model(run / "phase1.pt", ("phase1",))
    val = plumbing.data.load_data(ckpt["config"])[1]
    x = torch.stack([val.view(i) for i in range(20)])
    tokens = perturb(model.encode(plumbing.images.to_float(x, "cpu")), near_codes(model, 2), 0)  # 32 / 16
    x_hat = plumbing.images.to_uint8(plumbing.slices.decode(model, tokens))
    expected = plumbing.images.psnr(*(plumbing.images.to_float(y, "cpu") for y in (x, x_hat))).mean().item()
    assert swapped["results"]["psnr"] == pytest.approx(expected, rel=1e-3)


def test_samples_and_references_are_exchanged_in_the_form_of_adm(run, scorer, references):
    """arr_0, (n, H, W, 3) uint8, and mu, sigma of an npz: what ADM's evaluator reads and publishes."""
    words = ["--ckpt", run / "ar.pt", "--num", 40, "--format", "npz", "--device", "cpu",
             "--out", run / "s.npz"]
    sample.main(recipes.options.sample_args(list(map(str, words))))
    with np.load(run / "s.npz") as arrays:
        drawn = arrays["arr_0"]
        assert drawn.dtype == np.uint8 and drawn.shape == (40, 32, 32, 3) and arrays.files[0] == "arr_0"
    extractor = studies.extractors.Extractor(scorer, 32, torch.device("cpu"))
    rows = extractor(torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous())
    rng = np.random.default_rng(0)
    real = rng.normal(size=(100, 16))
    np.savez(run / "reference.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    result = measure(run, "ar.pt", scorer, references, "--num", 40, "--reference", run / "reference.npz")
    f = rows["features"].double().numpy()
    gap, a, b = f.mean(0) - real.mean(0), np.cov(f, rowvar=False), np.cov(real, rowvar=False)
    expected = gap @ gap + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvals(a @ b)).real.sum()
    assert result["results"]["fd"] == pytest.approx(expected, rel=1e-3)
    assert {"fd", "class_score"} <= result["results"].keys() and "kd" not in result["results"]
    assert result["reference"] == "npz reference.npz" and len(result["reference_hash"]) == 16


@pytest.mark.parametrize("name", few(["ar.pt", "nar.pt"], 1))
def test_samples_measured_in_other_batches_are_the_same_pictures_with_the_same_numbers(
        run, scorer, references, name):
    results = [measure(run, name, scorer, references, "--num", 40, "--batch", batch) for batch in (8, 40)]
    assert results[0]["images_hash"] == results[1]["images_hash"]
    for key, value in results[0]["results"].items():
        assert results[1]["results"][key] == pytest.approx(value, rel=1e-6), key
    assert results[0]["protocol"] == "gfd-train" and results[0]["reference_images"] == 60
    assert {"fd", "class_score", "kd", "precision", "recall", "class_accuracy"} <= results[0][
        "results"].keys()
    assert results[0]["seed"] == 0 and ("top_p" in results[0], "nar_steps" in results[0]) == (
        name == "ar.pt", name == "nar.pt")  # what the prior does not read decides nothing


def test_an_interrupted_evaluation_makes_the_missing_images_only_and_gives_the_same_result(
        run, scorer, references, monkeypatch):
    whole = measure(run, "ar.pt", scorer, references, "--num", 40, "--batch", 8)
    (run / "result.json").unlink()
    real, drawn = plumbing.slices.generate_tokens, []

    def spy(prior, labels, seed, indices, settings):
        drawn.append(indices[0])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real(prior, labels, seed, indices, settings)

    monkeypatch.setattr(plumbing.slices, "generate_tokens", spy)
    with pytest.raises(KeyboardInterrupt):
        measure(run, "ar.pt", scorer, references, "--num", 40, "--batch", 8)
    again = measure(run, "ar.pt", scorer, references, "--num", 40, "--batch", 8)
    assert drawn == [0, 8, 16, 16, 24, 32]
    assert again["results"] == whole["results"] and again["images_hash"] == whole["images_hash"]
    assert [p.name for p in run.iterdir() if p.name.startswith(".result")] == []  # the parts are gone
    drawn.clear()
    assert measure(run, "ar.pt", scorer, references, "--num", 40, "--batch", 8) == again and not drawn


def test_who_needs_reference_statistics_that_another_process_makes_waits_for_them(
        run, scorer, references, monkeypatch, capsys):
    measure(run, "ar.pt", scorer, references, "--num", 30)
    ready = max(references.glob("train_*.pt"), key=os.path.getmtime)
    place, begun, asked = run / "references" / ready.name, run / "begun", run / "asked"

    def other():
        lock = plumbing.files.claim(place.parent)
        begun.touch()
        wait_until(asked.exists)
        shutil.copy(ready, place)
        lock.close()

    child = fork(other)
    wait_until(begun.exists)
    monkeypatch.setattr(studies.distances, "reference_statistics", None)  # nothing is made twice
    monkeypatch.setattr(studies.references.time, "sleep", lambda seconds: asked.touch())
    (run / "result.json").unlink()
    assert measure(run, "ar.pt", scorer, place.parent, "--num", 30)["reference_images"] == 60
    assert asked.exists() and capsys.readouterr().out.count("waiting: ") == 1 and wait_for(child) == 0


@pytest.mark.slow
def test_another_result_takes_the_place_of_the_old_one_and_says_so(run, scorer, references, capsys):
    first = measure(run, "ar.pt", scorer, references, "--num", 30)
    capsys.readouterr()
    second = measure(run, "ar.pt", scorer, references, "--num", 30, "--seed", 1)
    assert f"note: {run / 'result.json'} holds another result" in capsys.readouterr().out
    assert first["images_hash"] != second["images_hash"] and second["seed"] == 1
    assert measure(run, "ar.pt", scorer, references, "--num", 30, "--seed", 1) == second
    out = capsys.readouterr().out
    assert "is there already" in out and "another result" not in out


@pytest.mark.dist
def test_two_processes_measure_the_same_samples_and_the_same_numbers(run, scorer):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    found = []
    for name, launch in dict(one=[sys.executable], two=torchrun).items():
        words = ["--ckpt", run / "nar.pt", "--extractor", scorer, "--references", run / name,
                 "--count", "44", "--batch", "8", "--device", "cpu", "--out", run / f"{name}.json"]
        done = subprocess.run([*launch, "-m", "studies", "metrics", *words], capture_output=True, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS="1"), cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((run / f"{name}.json").read_text()))
    one, two = found
    assert two["processes"] == 2 and two["images_hash"] == one["images_hash"]
    assert two["reference_hash"] == one["reference_hash"]
    for key, value in one["results"].items():
        assert two["results"][key] == pytest.approx(value, rel=1e-6), key


def test_reference_statistics_are_made_once_and_again_when_an_image_changes(trained, scorer, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    config = dict(plumbing.files.read_checkpoint(trained / "ar.pt", ("ar",))["config"], data=str(folder))
    args = study_args(["metrics", "--ckpt", "x", "--references", tmp_path / "cache"])
    extractor = studies.extractors.Extractor(scorer, 32, torch.device("cpu"))

    def reference():
        return studies.metrics.load_reference(args, extractor, config, "train")

    first, files = reference(), set((tmp_path / "cache").glob("*.pt"))
    assert reference()["reference_hash"] == first["reference_hash"]
    assert set((tmp_path / "cache").glob("*.pt")) == files and len(files) == 1
    picture = next(folder.glob("train/*/*.png"))
    Image.open(picture).rotate(180).save(picture)
    assert reference()["reference_hash"] != first["reference_hash"]
    assert len(set((tmp_path / "cache").glob("*.pt"))) == 2
    size = picture.stat().st_size  # other pixels in a file of the same name and size are seen by its time
    os.utime(picture, ns=(1, picture.stat().st_mtime_ns + 1))
    reference()
    assert picture.stat().st_size == size and len(set((tmp_path / "cache").glob("*.pt"))) == 3


def test_too_few_samples_are_refused_before_any_is_drawn(run, scorer, references, capsys, monkeypatch):
    monkeypatch.setattr(plumbing.slices, "generate_tokens", None)
    error = refused(capsys, ["metrics", "--ckpt", run / "ar.pt", "--extractor", scorer, "--num", 16,
                             "--references", references])
    assert "16 images are too few" in error and "16 features" in error


@pytest.mark.slow
def test_reference_statistics_serve_where_the_images_are_not(run, scorer, references, tmp_path):
    first = measure(run, "ar.pt", scorer, references, "--num", 20)
    ckpt = torch.load(run / "ar.pt", weights_only=True)
    ckpt["config"].update(data="/nowhere", val=None)
    (run / "ar.pt").unlink()
    torch.save(ckpt, run / "ar.pt")
    (run / "result.json").unlink()
    file = next(path for path in references.glob("train_*.pt")
                if torch.load(path, weights_only=True)["reference_hash"] == first["reference_hash"])
    again = measure(run, "ar.pt", scorer, tmp_path / "none", "--num", 20, "--reference", file)
    assert again["results"] == first["results"] and not (tmp_path / "none").exists()


def test_an_evaluation_that_another_process_is_making_is_refused(run, scorer, references, monkeypatch):
    real, errors = plumbing.slices.generate_tokens, []

    def meanwhile(*words):
        if not errors:  # the same command once more, as another process: locks are between processes
            child = os.fork()
            if not child:
                code = 0
                try:
                    measure(run, "ar.pt", scorer, references, "--num", 40)
                except SystemExit as stop:
                    code = stop.code
                finally:
                    os._exit(code)
            errors.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return real(*words)

    monkeypatch.setattr(plumbing.slices, "generate_tokens", meanwhile)
    assert measure(run, "ar.pt", scorer, references, "--num", 40)["results"]["fd"] > 0
    assert errors == [2]


@pytest.mark.slow
def test_parts_of_other_images_are_not_taken_for_these(run, scorer, references, data, tmp_path, monkeypatch):
    other = tmp_path / "other"
    for i, path in enumerate(sorted((data / "val").glob("*/*.png"))):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).rotate(180).save(other / path.parent.name / f"{i}.png")
    words = ("phase2.pt", scorer, references, "--batch", 8)
    whole = measure(run, *words, "--data", other)
    (run / "result.json").unlink()
    real, seen = plumbing.images.to_uint8, []

    def stop(x):
        seen.append(len(x))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(x)

    monkeypatch.setattr(plumbing.images, "to_uint8", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(run, *words)  # of the run's own images, interrupted
    monkeypatch.setattr(plumbing.images, "to_uint8", real)
    again = measure(run, *words, "--data", other)
    assert again["images_hash"] == whole["images_hash"] and again["results"] == whole["results"]
    assert whole["num_images"] == 20  # all of the folder, none held out


@pytest.mark.slow
def test_an_unconditional_prior_of_labelled_images_is_measured(trained, data, scorer, references, tmp_path):
    for name in ("phase1", "phase2", "codes"):
        shutil.copy(trained / f"{name}.pt", tmp_path)
    call("ar", tmp_path, data, conditional=False)
    result = measure(tmp_path, "ar.pt", scorer, references, "--num", 20)
    assert result["classes"] is None and result["results"]["fd"] > 0
    assert "class_accuracy" not in result["results"]


@pytest.mark.slow
def test_a_sweep_measures_each_value_once_and_writes_a_csv_and_a_plot(run, scorer, references, monkeypatch):
    words = ("--ckpt", run / "ar.pt", "--num", 20, "--extractor", scorer, "--references", references)
    study("sweep", "top-p=0.5,1", *words, "--device", "cpu")
    lines = (run / "sweep_ar_top_p.csv").read_text().splitlines()
    assert lines[0].startswith("top_p,fd,class_score,kd,precision,recall") and len(lines) == 3
    results = [json.loads((run / "sweep_ar_top_p" / f"{v}.json").read_text()) for v in (0.5, 1.0)]
    assert [r["top_p"] for r in results] == [0.5, 1.0]
    assert results[0]["images_hash"] != results[1]["images_hash"]
    assert lines[1].split(",")[1] == str(results[0]["results"]["fd"])
    assert Image.open(run / "sweep_ar_top_p.png").size[0] > 1000
    monkeypatch.setattr(plumbing.slices, "generate_tokens", None)  # nothing is drawn a second time
    study("sweep", "top-p=0.5,1", *words, "--device", "cpu")


def test_class_accuracy_counts_by_class_and_keeps_silent_about_other_classes(scorer):
    extractor = studies.extractors.Extractor(scorer, 32, torch.device("cpu"))
    names, labels = Shapes.NAMES, torch.arange(20) % 10
    rows = dict(labels=labels, logits=torch.nn.functional.one_hot((labels + (labels == 3).long()) % 10, 10))
    names = extractor.class_names
    found = studies.metrics.class_accuracy(extractor, names, rows)
    assert found["all"] == 0.9 and found[names[3]] == 0 and found[names[4]] == 1
    assert studies.metrics.class_accuracy(extractor, ["cat", "dog"], rows) == {}


def refused(capsys, words):
    with pytest.raises(SystemExit) as stop:
        study(*words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ")
    return error


def test_bad_input_of_metrics_ends_with_one_line_and_exit_code_2(run, scorer, references, capsys, tmp_path):
    base = ["--extractor", scorer, "--references", references]
    ar = ["metrics", "--ckpt", run / "ar.pt", *base]
    phase2 = ["metrics", "--ckpt", run / "phase2.pt", *base, "--lpips", "none"]
    given = ["metrics", "--ckpt", run / "ar.pt", "--extractor", scorer, "--num", 30, "--reference"]
    assert "too few" in refused(capsys, [*ar, "--num", 10])
    assert "takes all 20" in refused(capsys, [*phase2, "--num", 10])
    assert "needs vgg or resnet" in refused(capsys, [*ar, "--extractor", run / "ar.pt"])
    assert "no checkpoint" in refused(capsys, [*ar, "--extractor", "nowhere.pt"])
    assert "no Inception weights" in refused(capsys, [*ar, "--extractor", "nowhere.pth"])
    assert "--lpips" in refused(capsys, [*phase2, "--lpips", "nowhere.pth"])
    assert "does nothing for AR" in refused(capsys, ["sweep", "steps=4", *ar[1:], "--num", 30])
    assert "this needs ar or nar" in refused(capsys, ["sweep", "top_p=0.5", *phase2[1:-2]])
    assert "--seed changes nothing in rfid-val" in refused(capsys, [*phase2, "--seed", 1])
    assert "--seed changes nothing in view-val" in refused(capsys, [*ar, "--predict", "--seed", 1])
    assert "--lpips changes nothing in gfid-train" in refused(capsys, [*ar, "--lpips", "none"])
    with pytest.raises(SystemExit):
        recipes.options.sample_args(["--ckpt", "phase2.pt", "--reconstruct", "--seed", "1"])
    assert "--seed does nothing for --reconstruct" in capsys.readouterr().err
    for name, content in (("text.json", b"\xff\x00"), ("empty.json", b"{}"), ("list.json", b"[]")):
        (run / name).write_bytes(content)
        assert "no result of python -m studies" in refused(capsys, [*ar, "--num", 30, "--out", run / name])
        assert (run / name).read_bytes() == content
    assert "no result" in refused(capsys, [*ar, "--num", 30, "--out", run])
    np.savez(run / "stats.npz", mu=np.zeros(3))
    assert "no npz with mu and sigma" in refused(capsys, [*given, run / "stats.npz"])
    np.savez(run / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    error = refused(capsys, [*given, run / "stats.npz"])
    assert "this extractor 16 features" in error
    np.savez(run / "stats.npz", mu=np.array([os.system]), sigma=np.eye(16))  # pickled
    assert "no npz with mu" in refused(capsys, [*given, run / "stats.npz"])
    for words, told in (("sharpness=1", "no setting"), ("top_p=high", "NUMBER"),
                        ("top_p=0.5,2", "top_p must be a number between 1e-09 and 1"),
                        ("top_p=1 --top-p 0.5", "--top-p is what is swept")):
        assert told in refused(capsys, ["sweep", *words.split(), *ar[1:]])
    # reference statistics of another protocol, and a file that is none
    measure(run, "phase2.pt", scorer, tmp_path / "vals")
    val = next((tmp_path / "vals").glob("val_*.pt"))
    assert "reference val, not train" in refused(capsys, [*given, val])
    assert "no file of reference" in refused(capsys, [*given, run / "ar.pt"])
    assert "missing" in refused(capsys, [*given, run / "nowhere.pt"])


def test_an_extractor_of_another_image_size_is_refused(run, scorer, capsys, tmp_path):
    ckpt = torch.load(scorer, weights_only=True)
    ckpt["config"]["image_size"] = 64
    torch.save(ckpt, tmp_path / "large.pt")
    error = refused(capsys, ["metrics", "--ckpt", run / "ar.pt", "--extractor", tmp_path / "large.pt"])
    assert "64-pixel images" in error and "32" in error


@pytest.mark.slow
def test_images_that_are_not_finite_are_refused_and_not_rounded_to_black(run, scorer, references, capsys):
    ckpt = torch.load(run / "phase2.pt", weights_only=True)
    for weights in (ckpt["model"], ckpt["ema"] or {}):
        if weights:
            weights["decoder.conv_out.bias"][:] = math.nan
    torch.save(ckpt, run / "nan.pt")
    words = ["--extractor", scorer, "--references", references]
    error = refused(capsys, ["metrics", "--ckpt", run / "nan.pt", *words, "--lpips", "none"])
    assert "not finite" in error
    error = refused(capsys, ["metrics", "--ckpt", run / "ar.pt", *words, "--tokenizer", run / "nan.pt",
                             "--num", 40])
    assert "not finite" in error


# Results side by side -------------------------------------------------------------------------------------


def fake_result(**changes):
    how = dict(protocol="gfd-train", num_images=100, image_size=32, images_hash="i", classes=[0, 1],
               extractor_hash="e", resize="none",
               feature_layer="pool", reference="train", reference_images=60, reference_hash="r")
    return how | dict(extractor="resnet.pt", results=dict(fd=3.5, precision=0.25)) | changes


@pytest.mark.parametrize("key", studies.metrics.HOW)
def test_numbers_of_unlike_protocols_never_share_a_column(key, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(fake_result()))
    (tmp_path / "b.json").write_text(json.dumps(fake_result(**{key: 7})))
    with pytest.raises(SystemExit) as stop:
        study("metrics", tmp_path / "a.json", tmp_path / "b.json")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "cannot share a column" in error and key in error and "7 in the other" in error


def test_what_others_measured_stands_beside_the_numbers_of_a_public_tokenizer(
        scorer, references, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plumbing.models.as_checkpoint, "__defaults__", (32,))  # published ones are for 256
    monkeypatch.setitem(studies.metrics.PUBLISHED, ("taming", 16, 2), dict(rfid=7.5, psnr=19.25))
    torch.save(taming(random_images())[0], tmp_path / "phase1.pt")
    result = measure(tmp_path, "phase1.pt", scorer, references, "--data", data)
    out = capsys.readouterr().out
    assert f"{result['results']['psnr']:.5g}  (published: 19.25)\n" in out and "7.5" not in out  # rFD
    assert "ImageNet's 50,000 validation images" in out and out.count("(published") == 1
    ckpt = plumbing.files.read_checkpoint(tmp_path / "phase1.pt", ("phase1",))
    assert studies.metrics.published(ckpt)["rfid"] == 7.5
    assert studies.metrics.published(ckpt | dict(step=9)) == {}  # trained on
    assert studies.metrics.published(ckpt | dict(config=ckpt["config"] | dict(fork="vqgan"))) == {}


def test_the_page_shows_the_published_numbers_that_the_command_prints():
    text = (ROOT / "docs/measuring.md").read_text()
    for (family, K, f), numbers in studies.metrics.PUBLISHED.items():
        cells = [f"{numbers[name]:.2f}" for name in ("rfid", "psnr", "ssim") if name in numbers]
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{family}`, {K}, {f} | ")]
        assert re.findall(r" (\d+\.\d\d)(?: \[L\])? (?=\|)", row)[: len(cells)] == cells, row


def test_like_results_stand_side_by_side(tmp_path, capsys):
    for name, fd in (("a", 3.5), ("b", 4.25)):
        (tmp_path / f"{name}.json").write_text(json.dumps(fake_result(results=dict(fd=fd, precision=0.25))))
    study("metrics", tmp_path / "a.json", tmp_path / "b.json")
    out = capsys.readouterr().out
    assert "gfd-train" in out and "3.5" in out and "4.25" in out and "precision" in out
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SystemExit):
        study("metrics", tmp_path / "a.json")
    assert "no result of python -m studies metrics" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        study("metrics", tmp_path / "nowhere.json")
    assert stop.value.code == 2


def test_a_number_is_called_fid_in_the_features_of_inception_alone(tmp_path):
    """Distances of our own classifier were called fid, rfid, inception_score and gfid-train too."""
    draw = torch.Generator().manual_seed(0)
    features, logits = torch.randn(50, 4, generator=draw), torch.randn(50, 3, generator=draw)
    rows = dict(features=features, logits=logits, tokens=torch.zeros(50, 4, dtype=torch.int64),
                top1=features[:, 0], nats_per_token=features[:, 0])
    reference, names = reference_statistics(features + 1), {}
    for layer in ("pool", "2048"):
        extractor = argparse.Namespace(info=dict(feature_layer=layer), class_names=["other"])
        names[layer] = {name for protocol in ("rfid-val", "pfid-val", "gfid-train", "view-val") for name in
                        studies.metrics.results_of(protocol, rows, reference, dict(K=4), extractor, [])}
    both = "precision recall usage perplexity top1 nats_per_token "
    assert names["pool"] == set((both + "fd kd class_score rfd rkd pfd pkd view_fd view_kd").split())
    assert names["2048"] == set(
        (both + "fid kid inception_score rfid rkid pfid pkid view_fid view_kid").split())


def test_results_with_the_former_names_are_still_read(tmp_path):
    """Of metrics_*.json in which every distance is called an FID."""
    assets, path = ROOT / "assets", tmp_path / "result.json"
    for file in sorted(assets.glob("*cifar10_metrics_*.json")):
        old, new = json.loads(file.read_text()), studies.metrics.read_result(file)
        assert list(old["results"].values()) == list(new["results"].values())
        assert "fid" not in str([new["protocol"], *new["results"]]) and {"fd", "rfd"} & new["results"].keys()
        path.write_text(json.dumps(old | dict(feature_layer="2048")))
        assert studies.metrics.read_result(path) == old | dict(feature_layer="2048")  # an FID stays one


# Tables ---------------------------------------------------------------------------------------------------


def table(name, out, data, *words):
    sets = command("phase1", out, data, **{"classifier.width": 2})
    sets = [word for pair in zip(sets, sets[1:], strict=False) if pair[0] == "--set" for word in pair]
    words = [name, "--preset", "demo", "--data", data, "--out", out, "--samples", 20, *sets, *words]
    return study_args(words)


def in_process(monkeypatch, fail=()):
    """Commands of a table run in this process, those whose words hold one of `fail` end with an error."""
    import train

    ran = []

    class Command:
        def __init__(self, path, words, nproc, threads):
            self.start, self.why = time.time(), ""
            path.parent.mkdir(parents=True, exist_ok=True)
            ran.append(words)
            if any(word in fail for word in words):
                self.why = "ended with 1: out of luck"
                return
            try:
                if words[0] == "train.py":
                    train.main(*recipes.options.train_args(words[1:]))
                else:
                    study(*words[2:])
            except SystemExit as stop:
                self.why = f"ended with {stop.code}"

        def ended(self):
            return self.why

    monkeypatch.setattr(studies.rows, "Command", Command)
    monkeypatch.setattr(studies.tables.Table, "WIDER", 1)  # so few images allow few features
    return ran


@pytest.mark.slow
def test_a_table_trains_and_measures_every_row_once_and_shows_the_paper_beside(
        data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        recipes.ablations.TABLES["table1"], "rows", recipes.ablations.TABLES["table1"]["rows"][:2]
    )
    ran = in_process(monkeypatch)
    words = ("--stages", "phase1,ar", "--run")
    main(table("table1", tmp_path, data, *words))
    assert len(ran) == 2 + 2 * 4  # VGG and classifier; and for each row two stages and two results
    found = json.loads((tmp_path / "table1.json").read_text())
    assert [row["paper"]["ar_fid"] for row in found["rows"]] == [16.97, 17.19]
    assert all(row["ours"]["rfd"] > 0 and row["ours"]["ar_fd"] > 0 for row in found["rows"])
    assert found["how"]["phase1"]["protocol"] == "rfd-val" and found["how"]["ar"]["num_images"] == 20
    assert found["how"]["ar"]["extractor"].endswith("classifier/resnet.pt")
    told = (tmp_path / "table1.md").read_text()
    assert "paper: ar_fid" in told and "ours: ar_fd" in told and "ours: ar_fid" not in told
    capsys.readouterr()
    ran.clear()
    main(table("table1", tmp_path, data, *words))
    assert not ran and "missing" not in capsys.readouterr().out  # all is there
    main(table("table6", tmp_path, data, "--stages", "phase1,ar"))
    out = capsys.readouterr().out
    assert "missing for low" not in out and "missing for A" in out  # "low" is the baseline of Table 1
    shown = [line.strip() for line in out.splitlines() if line.startswith("  python")]
    assert len(shown) == 6 * 4 and all("train.py" in line or "-m studies metrics" in line for line in shown)


def test_a_damaged_checkpoint_counts_as_missing_and_its_numbers_are_refused(trained, tmp_path):
    path = tmp_path / "phase1.pt"
    shutil.copy(trained / "phase1.pt", path)
    assert studies.rows.finished(path, []) and studies.rows.seconds_of(path) >= 0
    path.write_bytes(path.read_bytes()[:5000])
    assert not studies.rows.finished(path, [])
    with pytest.raises(UserError, match="phase1.pt is damaged; delete it"):
        studies.rows.seconds_of(path)


@pytest.mark.slow
def test_rows_of_other_settings_never_stand_in_one_table(data, tmp_path, monkeypatch, capsys):
    in_process(monkeypatch)
    words = ("table5", tmp_path, data, "--stages", "phase1")
    main(table(*words, "--run"))
    before = (tmp_path / "table5.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(table(*words, "--run", "--set", "phase1.lr=1e-3"))
    assert stop.value.code == 2 and "other settings" in capsys.readouterr().err
    assert (tmp_path / "table5.json").read_bytes() == before
    # another extractor measures anew instead of standing above the old numbers
    main(table(*words, "--extractor", tmp_path / "vgg" / "vgg.pt"))
    out = capsys.readouterr().out
    assert "features of " + str(tmp_path / "classifier" / "resnet.pt") in out
    assert out.count("missing for") == 4 and "train.py" not in out


@pytest.mark.parametrize("item, named", [
    ("phase1.stepz=3", "phase1.stepz"), ("tokenizer.codebok_size=8", "tokenizer.codebook_size"),
    ("prior.n_head=3", "multiple of n_head"), ("classifier.width=0", "classifier.width")])
def test_a_wrong_setting_of_a_table_is_refused_before_anything_is_written(
        item, named, tmp_path, capsys, monkeypatch):
    """settings.json kept it, and then refused the right command in the same folder."""
    monkeypatch.setattr(studies.rows, "Command", None)
    words = ["table1", "--preset", "demo", "--set", item, "--out", str(tmp_path / "out"), "--run"]
    with pytest.raises(SystemExit) as stop:
        study(*words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and named in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failed_row_is_told_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    ran = in_process(monkeypatch, fail=["vqgan"])
    with pytest.raises(SystemExit) as stop:
        main(table("table5", tmp_path, data, "--stages", "phase1", "--run"))
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "1 rows failed" in captured.err
    assert "VQGAN: phase1.pt was not made, its command ended with 1: out of luck" in captured.out
    found = {row["label"]: row["ours"] for row in json.loads((tmp_path / "table5.json").read_text())["rows"]}
    assert found["VQGAN"] == {} and all(found[x]["usage"] > 0 for x in ("+ F&N", "+ K-means", "+ entropy"))
    assert "missing for VQGAN" in captured.out and len(ran) == 2 + 1 + 3 * 2
    ran.clear()
    in_process(monkeypatch)
    main(table("table5", tmp_path, data, "--stages", "phase1", "--run"))
    assert "missing" not in capsys.readouterr().out  # the failed row alone was run again


@pytest.mark.slow
def test_fig_5b_is_drawn_over_alpha_and_fig_7b_decodes_with_both_phases(data, tmp_path, monkeypatch):
    ran = in_process(monkeypatch)
    main(table("fig7b", tmp_path, data, "--stages", "phase1,ar", "--run"))
    stages = [words[2] for words in ran if words[0] == "train.py"]
    assert stages.count("phase1") == 1 and stages.count("phase2") == 1 and stages.count("ar") == 1
    rows = json.loads((tmp_path / "fig7b.json").read_text())["rows"]
    assert rows[0]["ours"]["ar_fd"] != rows[1]["ours"]["ar_fd"]
    assert rows[1]["paper"]["nar_fid"] == 4.99
    ran.clear()
    main(table("fig5b", tmp_path, data, "--stages", "phase1", "--run"))
    assert sum(words[2] == "phase1" for words in ran if words[0] == "train.py") == 5  # 1 is there
    assert Image.open(tmp_path / "fig5b_curves.png").size[0] > 500


def test_the_fid_classifier_of_a_table_is_three_times_as_wide_as_its_vgg(tmp_path, data):
    (vgg, one), (resnet, other) = studies.tables.Table(table("table1", tmp_path, data)).shared()
    widths = [recipes.options.train_args(words[1:])[1]["classifier"]["width"] for words in (one, other)]
    assert widths == [2, 6] and (vgg.name, resnet.name) == ("vgg.pt", "resnet.pt")


@pytest.mark.parametrize("preset", [*recipes.options.PRESETS, "demo-fq", "lfq.demo"])
def test_a_table_takes_every_preset_of_train(preset, tmp_path):
    args = study_args(["table6", "--preset", preset, "--out", tmp_path])
    table, found = studies.tables.Table(args), recipes.options.find_preset(preset)
    assert (table.fork, table.small) == (found["fork"], found["vgg"] == "own")


def test_at_full_scale_the_entropy_row_is_the_baseline_and_inception_the_extractor(tmp_path):
    def folders(preset):
        table = studies.tables.Table(study_args(["table5", "--preset", preset, "--out", tmp_path]))
        rows = [table.row(name, "phase1")[0] for name in [row.name for row in table.table["rows"]]]
        return [commands[0][0].parent.name for commands in rows], table

    found, full = folders("imagenet-ablation")
    assert found == ["vqgan", "fn", "kmeans", "baseline"]
    assert full.extractor == "inception" and full.samples == 50_000 and full.shared() == []
    assert folders("demo")[0] == ["vqgan", "fn", "kmeans", "entropy"]


def test_the_commands_of_a_table_go_through_torchrun_where_several_processes_are_wanted(tmp_path, capsys):
    words = ["table5", "--preset", "imagenet-ablation", "--out", str(tmp_path), "--nproc", "8"]
    words += ["--data", "DIR", "--workers", "4", "--set", "phase1.lr=2e-4"]
    study(*words)
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines() if line.startswith("  ")]
    assert len(lines) == 4 * 6 and "ours: ar_fid" in out  # in Inception's features
    start = "torchrun --standalone --nproc_per_node=8 train.py --stage phase1 --preset imagenet-ablation"
    assert lines[0].startswith(f"{start} --data DIR --workers 4 --set phase1.lr=2e-4 --ablation vqgan --out")
    assert not any("vgg.pt" in line for line in lines) and "--num 50000" in lines[-1]
