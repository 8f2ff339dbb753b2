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
from pathlib import Path

import lpips
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
import studies.extractors
import studies.metrics
import studies.probe
import studies.references
import studies.rows
import studies.tables
from helpers import ROOT, call, command, few, fork, forked, study, wait_for, wait_until
from PIL import Image
from test_foreign import images as random_images, taming
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import perceptual
import sample
import train
from studies.commands import main, study_args
from studies.distances import fidelity, reference_statistics, ssim
from plumbing.errors import UserError
from studies.perturbed import interpolate, near_codes, nearest_images, perturb
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


def test_our_distances_equal_those_that_torch_fidelity_takes_of_the_images(scorer):
    fake, real = ([Shapes(split, count, 32).view(i) // part for i in range(count)]
                  for split, count, part in (("train", 60, 2), ("val", 70, 1)))
    extractor = studies.extractors.Extractor(scorer, 32, torch.device("cpu"))
    drawn, other = (extractor(torch.stack(images)) for images in (fake, real))
    ours = fidelity(drawn["features"], drawn["logits"], reference_statistics(other["features"]))

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

    class Images(list, torch.utils.data.Dataset):
        pass

    torch_fidelity.register_feature_extractor("ours", Registered)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(fake), input2=Images(real), feature_extractor="ours", cuda=False, isc=True, fid=True,
        kid=True, prc=True, kid_subset_size=60, cache=False, verbose=False, save_cpu_ram=True)
    names = dict(fid="frechet_inception_distance", inception_score="inception_score_mean",
                 kid="kernel_inception_distance_mean", precision="precision", recall="recall")
    for name, key in names.items():  # KID is a difference of float32 means of about 1: a bound of its own
        bound = dict(abs=1e-6) if name == "kid" else dict(rel=1e-6)
        assert ours[name] == pytest.approx(theirs[key], **bound), name
    assert ours["fid"] > 0.001 and ours["kid"] > 0 and ours["inception_score"] > 1


def test_the_frechet_distance_of_a_shifted_set_is_the_squared_shift():
    features = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    reference = {key: reference_statistics(features)[key] for key in ("mu", "sigma")}
    found = fidelity(features + torch.tensor([3.0, 4, 0, 0, 0]), features, reference)
    assert found["fid"] == pytest.approx(25, rel=1e-5) and found.keys() == {"fid", "inception_score"}
    assert fidelity(features, features, reference)["fid"] == pytest.approx(0, abs=1e-5)


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
    vgg = plumbing.weights.load_vgg16("random")
    ours = plumbing.weights.build_lpips(vgg)
    assert torch.equal(getattr(ours.net.slice5, "28").weight, vgg.features[28].weight)
    theirs = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", "cpu", weights_only=True)
    assert len(theirs) == 5 and all(torch.equal(ours.state_dict()[name], w) for name, w in theirs.items())
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert ours(x, x).abs().max() == 0 and (ours(x, y) > 0).all()
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training


# Extractors -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inception_is_torch_fidelity_s_and_a_file_that_is_none_is_refused_with_the_place_for_it(
        tmp_path, monkeypatch):
    """With random weights in the real format, where torch keeps what it downloads."""
    path = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=f"weights-inception-2015-12-05-6726825d.pth into {tmp_path}"):
        studies.extractors.load_inception()
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(network.state_dict(), path)
    extractor = studies.extractors.Extractor("inception", 32, torch.device("cpu"))
    images = pictures(8, 0)
    features, logits = network(images)
    found = extractor(images[:2])  # alone as among eight
    assert torch.equal(found["features"], features[:2]) and torch.equal(found["logits"], logits[:2])
    assert features.shape == (8, 2048) and features.std() > 0
    assert extractor.info["resize"] == "tf1-bilinear-299" and extractor.info["feature_layer"] == "2048"


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


def images_and(run, name, changed):
    """The validation images, their tokens, and the reconstructions of changed(model, tokens)."""
    model, ckpt = plumbing.models.load_model(run / f"{name}.pt", (name,))
    val = plumbing.data.load_data(ckpt["config"])[1]
    x = torch.stack([val.view(i) for i in range(20)])
    tokens = model.encode(plumbing.images.to_float(x, "cpu"))
    return x, tokens, plumbing.images.to_uint8(plumbing.slices.decode(model, changed(model, tokens)))


def psnr_of(x, x_hat):
    a, b = (plumbing.images.to_float(y, "cpu") for y in (x, x_hat))
    return pytest.approx(plumbing.images.psnr(a, b).mean().item(), rel=1e-3)


def test_a_result_of_reconstructions_holds_the_numbers_and_how_they_were_measured(run, scorer, references):
    result = measure(run, "phase2.pt", scorer, references)
    assert result["protocol"] == "rfd-val" and result["num_images"] == 20 == result["reference_images"]
    assert {*studies.metrics.HOW, "extractor", "tokenizer", "decoder", "batch", "command", "seconds",
            "images_hash", "torch_fidelity", "threads"} <= result.keys()
    x, tokens, x_hat = images_and(run, "phase2", lambda model, tokens: tokens)
    numbers = result["results"]
    assert numbers["usage"] == len(tokens.unique()) / 32
    assert numbers["l1"] == pytest.approx((x.double() - x_hat.double()).abs().mean().item() / 127.5, rel=1e-3)
    assert numbers["ssim"] == pytest.approx(ssim(x, x_hat).mean().item(), rel=1e-3)
    assert numbers["psnr"] == psnr_of(x, x_hat)
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


def swapped(model, tokens):
    return perturb(tokens, near_codes(model, 2), 0)  # 2 of 32 codes


def mixed(model, tokens):
    return interpolate(tokens, tokens[nearest_images(model, tokens)], 0)


@pytest.mark.parametrize("flag, changed", [("--perturb", swapped), ("--interpolate", mixed)])
def test_p_fd_and_i_fd_measure_images_of_changed_tokens(run, scorer, references, flag, changed):
    result = measure(run, "phase1.pt", scorer, references, flag, "--batch", 7)
    numbers, letter = result["results"], flag[2]
    assert result["protocol"] == f"{letter}fd-val"
    assert {f"{letter}fd", f"{letter}kd", "usage", "psnr"} <= numbers.keys() and "rfd" not in numbers
    x, own, x_hat = images_and(run, "phase1", changed)
    assert numbers["psnr"] == psnr_of(x, x_hat)
    assert numbers["usage"] == len(own.unique()) / 32  # of the tokens of the images


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
    real = np.random.default_rng(0).normal(size=(100, 16))
    np.savez(run / "reference.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    result = measure(run, "ar.pt", scorer, references, "--num", 40, "--reference", run / "reference.npz")
    f = rows["features"].double().numpy()
    gap, a, b = f.mean(0) - real.mean(0), np.cov(f, rowvar=False), np.cov(real, rowvar=False)
    expected = gap @ gap + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvals(a @ b)).real.sum()
    assert result["results"]["fd"] == pytest.approx(expected, rel=1e-3)
    assert "class_score" in result["results"] and "kd" not in result["results"]
    assert result["reference"] == "npz reference.npz" and len(result["reference_hash"]) == 16


def test_a_reference_of_others_does_not_stand_for_the_images_that_are_measured(
        run, data, scorer, references, tmp_path):
    real = np.random.default_rng(0).normal(size=(100, 16))
    np.savez(run / "reference.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    shutil.copytree(data, tmp_path / "other")
    for path in (tmp_path / "other" / "val").rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    words = run, "phase1.pt", scorer, references, "--reference", run / "reference.npz", "--data"
    one, two = measure(*words, data), measure(*words, tmp_path / "other")
    assert one["results"]["psnr"] != two["results"]["psnr"] and one["images_hash"] != two["images_hash"]


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
    monkeypatch.setattr(studies.references, "reference_statistics", None)  # nothing is made twice
    monkeypatch.setattr(studies.references.time, "sleep", lambda seconds: asked.touch())
    (run / "result.json").unlink()
    assert measure(run, "ar.pt", scorer, place.parent, "--num", 30)["reference_images"] == 60
    assert asked.exists() and capsys.readouterr().out.count("waiting: ") == 1 and wait_for(child) == 0


@pytest.mark.slow
def test_another_result_takes_the_place_of_the_old_one_and_never_its_parts(
        run, scorer, references, capsys, monkeypatch):
    words = run, "ar.pt", scorer, references, "--num", 30
    first, second = measure(*words), measure(*words, "--seed", 1)
    assert f"note: {run / 'result.json'} holds another result" in capsys.readouterr().out
    assert first["images_hash"] != second["images_hash"] and second["seed"] == 1
    assert measure(*words, "--seed", 1) == second
    out = capsys.readouterr().out
    assert "is there already" in out and "another result" not in out

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(studies.metrics, "results_of", stop)
        measure(*words)
    (run / "result.json").unlink()
    assert measure(*words, "--seed", 1)["images_hash"] == second["images_hash"]


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


def test_an_evaluation_that_another_process_is_making_is_refused(run, scorer, references, monkeypatch):
    real, codes, words = plumbing.slices.generate_tokens, [], (run, "ar.pt", scorer, references, "--num", 40)

    def meanwhile(*settings):
        if not codes:  # the same command once more, as another process: locks are between processes
            codes.append(forked(measure, *words))
        return real(*settings)

    monkeypatch.setattr(plumbing.slices, "generate_tokens", meanwhile)
    assert measure(*words)["results"]["fd"] > 0 and codes == [2]


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


@pytest.mark.parametrize("words, told", [
    ("ar --num 10", "10 images are too few for a Frechet distance in 16 features"),
    ("phase2 --num 10", "takes all 20"),
    ("ar --extractor ar.pt", "needs vgg or resnet"),
    ("ar --extractor nowhere.pt", "no checkpoint"),
    ("ar --extractor nowhere.pth", "it is inception, lite0, or a checkpoint"),
    ("ar --extractor large.pt", "trained on 64-pixel images and these have 32"),
    ("phase2 --lpips nowhere.pth", "--lpips"),
    ("ar --interpolate", "this needs phase1 or phase2"),
    ("phase1 --interpolate --perturb", "two measures"),
    ("phase2 --seed 1", "--seed changes nothing in rfid-val"),
    ("ar --lpips none", "--lpips changes nothing in gfid-train"),
    ("ar --num 30 --out empty.json", "no result of python -m studies"),
    ("ar --num 30 --reference ar.pt", "no npz with mu and sigma")])
def test_bad_input_of_metrics_ends_with_one_line_before_anything_is_drawn(
        words, told, run, scorer, references, capsys, monkeypatch):
    monkeypatch.setattr(plumbing.slices, "generate_tokens", None)
    monkeypatch.chdir(run)
    (run / "empty.json").write_text("{}")
    if "large.pt" in words:
        ckpt = torch.load(scorer, weights_only=True)
        ckpt["config"]["image_size"] = 64
        torch.save(ckpt, "large.pt")
    name, *words = words.split()
    words = ["metrics", "--ckpt", f"{name}.pt", "--device", "cpu", *words]
    words += ["--extractor", scorer] * ("--extractor" not in words)
    words += ["--references", references] * ("--reference" not in words)
    words += ["--lpips", "none"] * (name != "ar" and "--lpips" not in words)
    assert told in refused(capsys, words)
    assert (run / "empty.json").read_text() == "{}"


@pytest.mark.parametrize("arrays, reason", [
    (dict(mu=np.zeros(16)), "no npz with mu and sigma"),
    (dict(mu=np.array([os.system]), sigma=np.eye(16)), "no npz with mu and sigma"),  # pickled
    (dict(mu=np.zeros(2048), sigma=np.eye(2048)), "this extractor 16 features")])
def test_an_npz_of_something_else_is_no_reference(arrays, reason, tmp_path):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(UserError, match=reason):
        studies.references.adm_reference(tmp_path / "reference.npz", 16)


@pytest.mark.parametrize("words, told", [
    ("sharpness=1", "no setting"), ("top_p=high", "NUMBER"), ("steps=4", "does nothing for AR"),
    ("top_p=0.5,2", "top_p must be a number between 1e-09 and 1"),
    ("top_p=1 --top-p 0.5", "--top-p is what is swept")])
def test_bad_input_of_a_sweep_ends_with_one_line(words, told, run, scorer, references, capsys):
    assert told in refused(capsys, ["sweep", *words.split(), "--ckpt", run / "ar.pt", "--extractor", scorer,
                                    "--references", references, "--num", 30])


def test_few_images_for_the_features_are_warned_of(scorer, capsys):
    extractor = studies.extractors.Extractor(scorer, 32, torch.device("cpu"))
    extractor.check_number(32, "images")
    assert not capsys.readouterr().err
    extractor.check_number(31, "images")
    assert "warning: 31 images are few for a Frechet distance in 16 features" in capsys.readouterr().err


@pytest.mark.slow
def test_images_that_are_not_finite_are_refused_and_not_rounded_to_black(run, scorer, references, capsys):
    ckpt = torch.load(run / "phase2.pt", weights_only=True)
    for weights in (ckpt["model"], ckpt["ema"] or {}):
        if weights:
            weights["decoder.conv_out.bias"][:] = math.nan
    torch.save(ckpt, run / "nan.pt")
    words = ["--extractor", scorer, "--references", references]
    for more in (["nan.pt", "--lpips", "none"], ["ar.pt", "--tokenizer", run / "nan.pt", "--num", 40]):
        assert "not finite" in refused(capsys, ["metrics", *words, "--ckpt", run / more[0], *more[1:]])


# Results side by side -------------------------------------------------------------------------------------


def fake_result(**changes):
    how = dict(protocol="gfd-train", num_images=100, image_size=32, images_hash="i", classes=[0, 1],
               extractor_hash="e", resize="none",
               feature_layer="pool", reference="train", reference_images=60, reference_hash="r")
    return how | dict(extractor="resnet.pt", results=dict(fd=3.5, precision=0.25)) | changes


def test_numbers_of_unlike_protocols_never_share_a_column(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(fake_result()))
    for key in studies.metrics.HOW:
        (tmp_path / "b.json").write_text(json.dumps(fake_result(**{key: 7})))
        error = refused(capsys, ["metrics", tmp_path / "a.json", tmp_path / "b.json"])
        assert "cannot share a column" in error and key in error and "7 in the other" in error


def test_like_results_stand_side_by_side(tmp_path, capsys):
    for name, fd in (("a", 3.5), ("b", 4.25)):
        (tmp_path / f"{name}.json").write_text(json.dumps(fake_result(results=dict(fd=fd, precision=0.25))))
    study("metrics", tmp_path / "a.json", tmp_path / "b.json")
    out = capsys.readouterr().out
    assert "gfd-train" in out and "3.5" in out and "4.25" in out and "precision" in out
    (tmp_path / "a.json").write_text("[]")
    for path in (tmp_path / "a.json", tmp_path / "nowhere.json"):
        assert "no result of python -m studies metrics" in refused(capsys, ["metrics", path])


def test_compare_names_the_best_and_what_is_within_the_noise_of_it():
    images = 5 * torch.randn(200, generator=torch.Generator().manual_seed(0))  # the same for all
    wiggle = torch.tensor([1.0, -1]).repeat(100)
    values = dict(a=images, b=images + 0.01 + wiggle, c=images + 1 + wiggle)
    rows = [dict(ckpt=name, psnr=v.mean().item(), relative=v.mean().item()) for name, v in values.items()]
    found = [studies.probe.best(name, rows, [dict(psnr=v, relative=v) for v in values.values()])
             for name in ("psnr", "relative")]
    assert found == ["psnr: higher is better, and best is c",
                     "relative: lower is better, and best is a; within the noise of it: b"]
    alone = [dict(psnr=v[:1]) for v in values.values()]  # of one part no noise is known
    assert studies.probe.best("psnr", rows, alone).endswith("best is c; within the noise of it: a, b")


def test_a_number_is_called_fid_in_the_features_of_inception_alone():
    """Distances of our own classifier were called fid, rfid, inception_score and gfid-train too."""
    draw = torch.Generator().manual_seed(0)
    features, logits = torch.randn(50, 4, generator=draw), torch.randn(50, 3, generator=draw)
    rows = dict(features=features, logits=logits, tokens=torch.zeros(50, 4, dtype=torch.int64))
    reference, names = reference_statistics(features + 1), {}
    for layer in ("pool", "2048"):
        extractor = argparse.Namespace(info=dict(feature_layer=layer), class_names=["other"])
        names[layer] = {name for protocol in studies.metrics.PROTOCOLS for name in
                        studies.metrics.results_of(protocol, rows, reference, dict(K=4), extractor, [])}
    both = "precision recall usage perplexity "
    assert names["pool"] == set((both + "fd kd class_score rfd rkd pfd pkd ifd ikd").split())
    assert names["2048"] == set((both + "fid kid inception_score rfid rkid pfid pkid ifid ikid").split())


def test_results_with_the_former_names_are_still_read():
    """Of metrics_*.json in which every distance is called an FID."""
    for file in sorted((ROOT / "assets").glob("*cifar10_metrics_*.json")):
        old, new = json.loads(file.read_text()), studies.metrics.read_result(file)
        assert list(old["results"].values()) == list(new["results"].values())
        assert "fid" not in str([new["protocol"], *new["results"]]) and {"fd", "rfd"} & new["results"].keys()


# Tables ---------------------------------------------------------------------------------------------------


def table(name, out, data, *words):
    sets = command("phase1", out, data, **{"classifier.width": 2})
    sets = [word for pair in zip(sets, sets[1:], strict=False) if pair[0] == "--set" for word in pair]
    words = [name, "--preset", "demo", "--data", data, "--out", out, "--samples", 20, *sets, *words]
    return study_args(words)


def in_process(monkeypatch):
    """Commands of a table run in this process; the list of their words."""
    ran = []

    class Command:
        def __init__(self, path, words, nproc, threads):
            self.start = time.time()
            path.parent.mkdir(parents=True, exist_ok=True)
            ran.append(words)
            if words[0] == "train.py":
                train.main(*recipes.options.train_args(words[1:]))
            else:
                study(*words[2:])

        def ended(self):
            return ""

    monkeypatch.setattr(studies.rows, "Command", Command)
    monkeypatch.setattr(studies.tables.Table, "WIDER", 1)  # so few images allow few features
    return ran


@pytest.mark.slow
def test_a_table_trains_and_measures_every_row_once_and_shows_the_paper_beside(
        data, tmp_path, monkeypatch, capsys):
    table1 = recipes.ablations.TABLES["table1"]
    monkeypatch.setitem(table1, "rows", table1["rows"][:2])
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
    made = "phase1, ar, metrics_phase1_phase1, metrics_ar_phase1"
    assert out.count(f": {made}\n") == 6 and "--run makes them, in about" in out


def test_a_damaged_checkpoint_counts_as_missing_and_its_numbers_are_refused(trained, tmp_path):
    path = tmp_path / "phase1.pt"
    shutil.copy(trained / "phase1.pt", path)
    assert studies.rows.finished(path, []) and studies.rows.seconds_of(path) >= 0
    result, extractor = tmp_path / "x.json", tmp_path / "resnet.pt"
    extractor.write_text("")
    result.write_text(json.dumps(fake_result(extractor=str(extractor), num_images=20)))
    words = ["--ckpt", str(path), "--extractor", str(extractor)]
    assert studies.rows.finished(result, words)
    os.utime(extractor, (time.time() + 9, time.time() + 9))  # trained once more
    assert not studies.rows.finished(result, words)
    path.write_bytes(path.read_bytes()[:5000])
    assert not studies.rows.finished(path, [])
    with pytest.raises(UserError, match="phase1.pt is damaged or no checkpoint"):
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
    ("phase1.stepz=3", "phase1.stepz"), ("prior.n_head=3", "multiple of n_head")])
def test_a_wrong_setting_of_a_table_is_refused_before_anything_is_written(
        item, named, tmp_path, capsys, monkeypatch):
    """settings.json kept it, and then refused the right command in the same folder."""
    monkeypatch.setattr(studies.rows, "Command", None)
    words = ["table1", "--preset", "demo", "--set", item, "--out", str(tmp_path / "out"), "--run"]
    assert named in refused(capsys, words) and not list(tmp_path.iterdir())


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
