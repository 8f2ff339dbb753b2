"""Claims about visualize.py: the teacher-forced view, the summary of a run, and commands on a trained run."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import plumbing.data
import plumbing.drawing
import plumbing.files
import plumbing.hashes
import plumbing.images
import plumbing.models
import plumbing.run
import plumbing.shapes
import plumbing.slices
import recipes.ablations
import recipes.options
import studies.metrics
import studies.probe
import studies.report
import studies.summary
from helpers import ROOT, command, few, open_run, refused, study
from PIL import Image
from matplotlib.text import Text

import sample
import visualize
from prior_ar import ARPrior, PriorConfig
from plumbing.models import load_model
from studies.commands import study_args

K, SIDE = 5, 4


class LookupTokenizer:
    """Tokens are the red channel: image (B, 3, 4, 4) with values 0..K-1 to 16 tokens and back."""

    def encode(self, x):
        return x[:, 0].flatten(1).long()

    def decode(self, tokens):
        return tokens.float().view(-1, 1, SIDE, SIDE).expand(-1, 3, -1, -1) / K


class PerfectPrior:
    """Predicts every token with near certainty, as if it had learned the images by heart."""

    def __init__(self):
        self.calls = 0

    def __call__(self, tokens, labels=None):
        self.calls += 1
        return 50.0 * torch.nn.functional.one_hot(tokens, K)

    predict = ARPrior.predict


def some_images(batch=3, seed=0):
    tokens = torch.randint(0, K, (batch, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    return tokens.float().expand(-1, 3, -1, -1).clone()


def some_prior():
    """Weights scaled so that predictions depend clearly on the context."""
    torch.manual_seed(0)
    prior = ARPrior(PriorConfig(K, SIDE**2, 2, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(8)
    return prior


# The view -------------------------------------------------------------------------------------------------


def test_the_prediction_of_token_i_depends_on_the_tokens_before_it_only():
    prior, x, labels = some_prior(), some_images(), torch.tensor([0, 1, 0])
    view, later = visualize.teacher_forced_view(LookupTokenizer(), prior, x, labels), 0
    for j in range(SIDE**2):
        changed = x.clone()
        changed[:, :, j // SIDE, j % SIDE] = (changed[:, :, j // SIDE, j % SIDE] + 1) % K
        other = visualize.teacher_forced_view(LookupTokenizer(), prior, changed, labels)
        assert torch.equal(other["tokens_pred"][:, : j + 1], view["tokens_pred"][:, : j + 1])
        torch.testing.assert_close(other["nats"][:, :j], view["nats"][:, :j])
        later += (other["tokens_pred"][:, j + 1 :] != view["tokens_pred"][:, j + 1 :]).sum().item()
    assert later > 0


def test_the_view_is_one_pass_on_the_true_tokens_and_not_a_sample():
    prior, x, labels = some_prior(), some_images(), torch.tensor([0, 1, 1])
    view = visualize.teacher_forced_view(LookupTokenizer(), prior, x, labels)
    tokens = LookupTokenizer().encode(x)
    with torch.no_grad():
        log_probs = prior(tokens, labels).log_softmax(2)
    assert torch.equal(view["tokens"], tokens) and torch.equal(view["tokens_pred"], log_probs.argmax(2))
    torch.testing.assert_close(view["nats"], -log_probs.gather(2, tokens[..., None])[..., 0])
    assert torch.equal(view["hits"], view["tokens"] == view["tokens_pred"]) and 0 < view["hits"].sum() < 48
    assert torch.equal(view["prediction"], LookupTokenizer().decode(view["tokens_pred"]))
    assert torch.equal(view["reconstruction"], LookupTokenizer().decode(tokens))


def test_a_perfect_prior_returns_the_tokens_and_the_same_picture_in_one_pass():
    prior, x = PerfectPrior(), some_images()
    view = visualize.teacher_forced_view(LookupTokenizer(), prior, x)
    assert prior.calls == 1
    assert torch.equal(view["tokens_pred"], view["tokens"]) and view["hits"].all()
    assert torch.equal(view["prediction"], view["reconstruction"])
    numbers = visualize.view_numbers(x / K, view)
    assert numbers["top1"] == 1 and 0 <= numbers["nats_per_token"] < 1e-6
    assert numbers["psnr_prediction"] == numbers["psnr_reconstruction"]
    assert numbers["psnr_prediction_to_reconstruction"] > 100


# A trained run --------------------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may write into."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def test_stage_all_leaves_a_summary_with_all_numbers_and_the_pictures(trained):
    summary = json.loads((trained / "summary.json").read_text())
    names = """usage perplexity recon_class_accuracy ar_class_accuracy nar_class_accuracy
        phase2_tokens_changed
        psnr_phase1 psnr_phase2 lpips_like_phase1 lpips_like_phase2 ar_nats_per_token nar_nats_per_token
        unigram_entropy ln_K seconds peak_rss_mb command vgg_accuracy alpha latent_hash view"""
    assert set(names.split()) <= summary.keys() and None not in summary.values() and finite(summary)
    assert summary["phase2_tokens_changed"] == 0
    assert 1 / 32 <= summary["usage"] <= 1 <= summary["perplexity"] <= 32
    for name in ("recon", "ar", "nar"):
        assert 0 <= summary[f"{name}_class_accuracy"] <= 1
    assert 0 < summary["unigram_entropy"] <= summary["ln_K"] == pytest.approx(math.log(32), abs=1e-4)
    assert summary["num_val"] == 20 and summary["preset"] == "demo"
    for name in ("phases", "samples_ar", "samples_nar", "view", "reconstructions_phase1"):
        assert Image.open(trained / f"{name}.png").size[0] > 100


@pytest.mark.slow
def test_the_summary_of_a_preset_of_one_phase_tells_of_no_other(run, data):
    """As `imagenet-ablation` is: its --stage all trains no phase 2."""
    (run / "phase2.pt").unlink()
    opened = open_run("all", run, data)
    opened.config["stages"] = ["vgg", "phase1", "ar", "nar"]
    studies.summary.summarize(opened)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["recon_class_accuracy"] == summary["recon_class_accuracy_phase1"]
    assert not [name for name in summary if "phase2" in name] and summary["ar_top1"] >= 0


def test_the_numbers_of_the_summary_are_those_of_a_direct_computation(trained, data):
    summary = json.loads((trained / "summary.json").read_text())
    val = plumbing.run.Run(*recipes.options.train_args(command("ar", trained, data))).val
    x = plumbing.images.to_float(torch.stack([val.view(i) for i in range(20)]), "cpu")
    labels = torch.tensor(val.labels)
    vgg, _ = load_model(trained / "vgg.pt", ["vgg"])
    counts = None
    for stage in ("phase1", "phase2"):
        tokenizer, _ = load_model(trained / f"{stage}.pt", [stage])
        with torch.no_grad():
            tokens = tokenizer.encode(x)
            x_hat = tokenizer.decode(tokens)
            logit = vgg(x_hat.clamp(-1, 1), ["logit"])["logit"]
        counts = tokens.flatten().bincount(minlength=32)
        assert summary[f"psnr_{stage}"] == pytest.approx(
            plumbing.images.psnr(x, x_hat).mean().item(), abs=0.01
        )
        right = (logit.argmax(1) == labels).float().mean().item()
        assert summary[f"recon_class_accuracy_{stage}"] == pytest.approx(right, abs=1e-6)
    assert summary["usage"] == (counts > 0).float().mean()
    prior, _ = load_model(trained / "ar.pt", ["ar"])
    with torch.no_grad():
        nats = prior.loss(prior(tokens, labels), tokens)[0].item()
    assert summary["ar_nats_per_token"] == pytest.approx(nats, rel=1e-3)
    assert summary["view"]["nats_per_token"] == pytest.approx(nats, rel=1e-3)


def view(*words):
    visualize.main(recipes.options.visualize_args(["view", *map(str, words), "--device", "cpu"]))


def test_view_writes_a_picture_and_finite_numbers_and_twice_the_same(run):
    found = []
    for name in ("a", "b"):
        view("--ckpt", run / "ar.pt", "--num", 5, "--out", run / f"{name}.png")
        assert Image.open(run / f"{name}.png").size[1] > 100
        found.append((run / f"{name}.json").read_bytes())
    assert found[0] == found[1]
    (numbers,) = json.loads(found[0])
    assert finite(numbers) and numbers["num_images"] == 5 and 0 <= numbers["top1"] <= 1
    assert numbers["tokenizer_stage"] == "phase2" and numbers["alpha"] == 1


@pytest.mark.slow
def test_several_priors_are_seen_on_the_same_images(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    prior = torch.load(tmp_path / "other" / "ar.pt", weights_only=True)
    for weights in (prior["model"], prior["ema"]):
        for name in weights:
            if name.endswith("token_table.weight"):
                weights[name] = -weights[name]
    torch.save(prior, tmp_path / "other" / "ar.pt")
    ckpts = [run / "ar.pt", tmp_path / "other" / "ar.pt"]
    view("--ckpt", *ckpts, "--num", 4, "--out", tmp_path / "both.png")
    view("--ckpt", ckpts[1], "--num", 4, "--out", tmp_path / "second.png")
    one, two = json.loads((tmp_path / "both.json").read_text())
    assert [two] == json.loads((tmp_path / "second.json").read_text())
    assert one["nats_per_token"] != two["nats_per_token"]
    assert one["psnr_reconstruction"] == two["psnr_reconstruction"]
    wide, narrow = (Image.open(tmp_path / name).size[0] for name in ("both.png", "second.png"))
    assert wide / narrow == pytest.approx(7 / 4, rel=0.05)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ckpt", "nar.pt"], "stage 'nar'; this needs ar"),
        (["--ckpt", "nowhere.pt"], "no checkpoint"),
        (["--ckpt", "ar.pt", "--num", "21"], "only 20 images"),
        (["--ckpt", "ar.pt", "--num", "0"], "--num"),
        (["--ckpt", "ar.pt", "--tokenizer", "phase1.pt", "phase2.pt"], "one file per --ckpt"),
        (["--ckpt", "ar.pt", "--tokenizer", "vgg.pt"], "this needs phase1 or phase2"),
        (["--ckpt", "ar.pt", "--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_of_view_ends_with_one_line_and_exit_code_2(run, monkeypatch, capsys, words, message):
    monkeypatch.chdir(run)
    (run / "view.png").unlink()
    assert message in refused(capsys, view, *words)
    assert not (run / "view.png").exists()


# sample.py on the same run --------------------------------------------------------------------------------


def written(path):
    """Bytes of what a command wrote; of an npz the array, since a zip file holds the time."""
    if path.is_dir():
        return [file.read_bytes() for file in sorted(path.iterdir())]
    return np.load(path)["arr_0"].tobytes() if path.suffix == ".npz" else path.read_bytes()


@pytest.mark.parametrize(
    "words, kind, result",
    few([
        (["ar.pt"], "sheet", "samples_ar.png"),
        (["nar.pt", "--classes", "star,ring"], "sheet", "samples_nar.png"),
        (["ar.pt", "--classes", "3"], "files", "samples_ar"),
        (["nar.pt", "--seed", "5"], "npz", "samples_nar.npz"),
        (["phase1.pt", "--reconstruct"], "sheet", "reconstructions_phase1.png"),
        (["phase2.pt", "--reconstruct"], "npz", "reconstructions_phase2.npz"),
    ], 0, 4),
)
def test_sample_writes_the_same_twice(run, words, kind, result):
    found = []
    for _ in range(2):
        more = ["--num", "6", "--format", kind, "--device", "cpu"]
        sample.main(recipes.options.sample_args(["--ckpt", str(run / words[0]), *words[1:], *more]))
        found.append(written(run / result))
    assert found[0] == found[1] and len(found[0]) >= 6


@pytest.mark.dist
def test_sample_with_two_processes_equals_one_bit_for_bit(run):
    words = ["--ckpt", run / "ar.pt", "--num", "10", "--batch", "4", "--format", "npz", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    for name, launch in dict(one=[sys.executable], two=torchrun).items():  # as training here changed a switch
        done = subprocess.run([*launch, ROOT / "sample.py", *words, "--out", run / f"{name}.npz"],
                              capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr[-3000:]
    assert written(run / "one.npz") == written(run / "two.npz")


# Figures --------------------------------------------------------------------------------------------------


def draw(figure, *words):
    visualize.main(recipes.options.visualize_args([figure, *map(str, words), "--device", "cpu"]))


def all_finite(value):
    if isinstance(value, dict | list):
        return all(map(all_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


FIGURES = [("view", ["ar.pt"]), ("fig1b", ["ar.pt", "ar.pt"]), ("fig3", ["ar.pt"]),
           ("fig4", ["ar.pt", "ar.pt"]), ("fig5a", ["ar.pt", "ar.pt"]), ("fig7a", ["nar.pt"]),
           ("fig8", ["phase1.pt", "phase2.pt"]),
           ("fig9", ["ar.pt", "nar.pt"]), ("fig10", ["ar.pt", "nar.pt"]), ("fig11", ["ar.pt", "ar.pt"])]


@pytest.mark.parametrize("figure, names", few(FIGURES, 1, 3, 5, 6), ids=[name for name, _ in FIGURES])
def test_every_figure_runs_on_tiny_checkpoints_twice_the_same_with_finite_numbers(run, figure, names):
    found = []
    for i in range(2):
        num = [] if figure == "fig10" else ["--num", 4]
        draw(figure, "--ckpt", *(run / name for name in names), *num, *["--pdf"] * i, "--out",
             run / f"{i}.png")
        found.append((run / f"{i}.json").read_bytes())
        picture = Image.open(run / f"{i}.png")
        assert min(picture.size) > 250 and picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
    numbers = json.loads(found[0])
    assert found[0] == found[1] and all_finite(numbers) and len(str(numbers)) > 100
    assert (run / "1.pdf").read_bytes().startswith(b"%PDF") and not (run / "0.pdf").exists()


def test_equal_tokens_have_equal_colours_in_all_panels_of_fig_8(monkeypatch):
    """Each panel scaled its colours by itself: what one token changed changed the colours of all."""
    class Red(LookupTokenizer):
        codebook_size, token_shape = K, (SIDE**2,)

        def encode(self, x):
            return super().encode((x + 1) * 127.5 + 0.25)

    x = some_images().to(torch.uint8)
    about = dict(config=recipes.options.PRESETS["demo"], note="")
    monkeypatch.setattr(visualize, "load_model", lambda *_: (Red(), about))
    monkeypatch.setattr(visualize, "load_images", lambda *_: (None, x))
    monkeypatch.setattr(visualize, "latent_hash", str)
    monkeypatch.setattr(visualize, "disturbed", lambda x: dict(noise=(x + 1) / 2 - 1))  # halves all tokens
    fig, _ = visualize.draw(recipes.options.visualize_args(["fig8", "--ckpt", "phase1.pt"]), "cpu")
    colours = {}
    for i in range(2):
        for j, tokens in ((2, x[i, 0]), (3, x[i, 0] // 2)):
            panel = fig.axes[5 * i + j].images[0]
            drawn = map(tuple, panel.to_rgba(panel.get_array()).reshape(-1, 4))
            for token, colour in zip(tokens.flatten().tolist(), drawn, strict=True):
                colours.setdefault(token, set()).add(colour)
    assert sorted(colours) == list(range(K)) and all(len(found) == 1 for found in colours.values())
    assert len({*map(min, colours.values())}) == K


def test_every_figure_of_the_help_is_tested_and_the_paper_s_numbers_are_all_there():
    drawn = {name for name, _ in FIGURES}
    assert drawn == set(recipes.options.FIGURES)
    assert drawn | set(recipes.ablations.TABLES) >= {
        f"fig{n}" for n in "1b 3 4 5a 5b 7a 7b 8 9 10 11".split()
    }


@pytest.mark.parametrize("figure, name", [("fig7a", "nar.pt"), ("fig9", "ar.pt")])
def test_both_phases_decode_identical_tokens(run, monkeypatch, capsys, figure, name):
    real, seen = plumbing.slices.decode, []

    def spy(tokenizer, tokens):
        seen.append((plumbing.hashes.weights_hash(tokenizer), tokens))
        return real(tokenizer, tokens)

    monkeypatch.setattr(visualize, "decode", spy)
    draw(figure, "--ckpt", run / name, "--num", 3, "--out", run / "x.png")
    (first, one), (second, two) = seen
    assert first != second and torch.equal(one, two)
    numbers = json.loads((run / "x.json").read_text())[0]
    assert numbers["tokens"] == one.tolist() and numbers["mean_difference"] > 0
    draw(figure, "--ckpt", run / name, "--num", 8, "--out", run / "x.png")  # the first few are drawn
    numbers = json.loads((run / "x.json").read_text())[0]
    assert numbers["num_images"] == 8 == len(numbers["tokens"])
    with pytest.raises(SystemExit):
        draw(figure, "--ckpt", run / name, "--tokenizer", run / "phase2.pt", run / "phase1.pt", "--out",
             run / "x.png")
    assert "phase 1 first, then phase 2" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    ("fig8 --ckpt a.pt --tokenizer b.pt", "--tokenizer does nothing for fig8"),
    ("fig3 --ckpt a.pt b.pt", "fig3 is of one --ckpt, got 2")])
def test_words_that_a_figure_would_not_read_are_refused(words, told, capsys):
    assert told in refused(capsys, recipes.options.visualize_args, words.split())


def test_losses_of_a_collapsed_codebook_and_missing_ones_are_drawn(run):
    rows = [dict(stage="ar", step=i, val_loss=loss, unigram_entropy=0.0)
            for i, loss in enumerate((1.0, None, 2.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw("fig10", "--ckpt", run / "ar.pt", "--out", run / "x.png")
    assert json.loads((run / "x.json").read_text())[0]["val_loss"] == [1.0, 2.0]


def test_the_numbers_of_a_view_tell_the_class_kept_the_distances_and_each_position(run):
    draw("view", "--ckpt", run / "ar.pt", "--num", 6, "--out", run / "v.png")
    numbers = json.loads((run / "v.json").read_text())[0]
    assert np.shape(numbers["nats_by_position"]) == (4, 4)
    assert np.mean(numbers["nats_by_position"]) == pytest.approx(numbers["nats_per_token"], rel=1e-3)
    for key in ("class_kept_by_reconstruction", "class_kept_by_prediction"):
        assert numbers[key] * 6 == pytest.approx(round(numbers[key] * 6))
    assert numbers["lpips_like_reconstruction"] > 0
    tokenizer, prior = LookupTokenizer(), PerfectPrior()
    view = visualize.teacher_forced_view(tokenizer, prior, some_images())
    constant = visualize.view_numbers(some_images() / K, view, vgg=None)
    assert "class_kept_by_prediction" not in constant


# Stability, probe ---------------------------------------------------------------------------------------


def test_stability_is_the_share_of_tokens_that_change():
    class Brightness:
        def encode(self, x):
            return (x.mean(1).flatten(1) > 0).long()

    x = torch.full((4, 3, 16, 16), 0.5)
    assert visualize.stability(Brightness(), x) == dict(noise=0, shift=0, jpeg=0)
    found = visualize.stability(Brightness(), torch.zeros(4, 3, 16, 16))
    assert 0.4 < found["noise"] < 0.6  # at the threshold half of the tokens turn
    columns = torch.ones(1, 3, 16, 16)
    columns[..., ::2] = -1
    assert visualize.stability(Brightness(), columns)["shift"] == pytest.approx(15 / 16)
    noise = visualize.disturbed(torch.zeros(8, 3, 64, 64))["noise"]
    assert noise.std().item() == pytest.approx(0.02, rel=0.02)  # 0.01 on the scale of [0, 1]


def test_the_probe_finds_predictable_codes_easier_than_the_same_codes_shuffled():
    draw = torch.Generator().manual_seed(0)
    start = torch.randint(0, 8, (600, 1), generator=draw)
    codes = (start + torch.arange(9)) % 8  # every token follows from the one before
    shuffled = torch.stack([row[torch.randperm(9, generator=draw)] for row in codes])
    small = dict(steps=60, batch=32, n_layer=1)
    easy, hard = (studies.probe.probe(c[:500], c[500:], 8, **small) for c in (codes, shuffled))
    assert easy["bits_per_image"] < 0.5 * hard["bits_per_image"]
    assert easy["bits_per_image"] > 2.9  # log2 8 for the first token
    assert easy["unigram_bits_per_image"] == pytest.approx(27, rel=0.02)
    assert easy["relative"] == pytest.approx(easy["bits_per_image"] / easy["unigram_bits_per_image"])
    assert studies.probe.probe(codes[:500], codes[500:], 8, **small) == easy
    assert all_finite([studies.probe.probe(codes[:9], codes[9:12], 8, steps=n, batch=2) for n in (1, 10)])


def test_compare_probes_several_tokenizers_on_the_same_images(run, capsys):
    study("compare", run / "phase1.pt", run / "phase2.pt", "--steps", "3", "--device", "cpu")
    one, two = json.loads((run / "compare.json").read_text())
    assert one["tokenizer_hash"] == two["tokenizer_hash"] and one["bits_per_image"] == two["bits_per_image"]
    assert one["psnr"] != two["psnr"] and all_finite(one) and one["train_images"] == 60
    assert "bits_per_image" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_draws_from_all_training_images_and_never_from_those_it_validates_on(
        trained, data, monkeypatch, tmp_path):
    seen, whole = [], shutil.copytree(data / "train", tmp_path / "whole")  # 6 images of each of ten classes

    def spy(self, index):
        seen.append(self.files[index])
        return real(self, index)

    real = plumbing.data.FolderData.view
    monkeypatch.setattr(plumbing.data.FolderData, "view", spy)
    study("compare", trained / "phase1.pt", "--steps", "1", "--device", "cpu", "--data", whole,
          "--samples", "20", "--out", tmp_path / "x.json")
    train_files, val_files = seen[:20], seen[20:]
    assert len({Path(file).parent.name for file in train_files}) > 5  # the first 20 files are of 4 classes
    assert len(val_files) == 3 and not set(train_files) & set(val_files)


def test_a_figure_tells_with_which_loss_the_tokenizer_was_trained_whatever_the_prior_s_command_said(
        trained, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    ckpt = torch.load(out / "phase1.pt", weights_only=True)
    ckpt["config"]["phase1"]["alpha"] = 0.25
    torch.save(ckpt, out / "phase1.pt")
    (out / "phase2.pt").unlink()
    run = open_run("ar", out, data, "--alpha", "0.75")
    plumbing.models.earlier_tokenizer(run, ("phase1", "phase2"))
    assert visualize.told_loss(run.config["phase1"]) == "α = 0.25"
    assert visualize.alpha_of(run.config) == dict(alpha=0.25)
    layers = dict(phase1=dict(alpha=0.25, layers="A"))
    assert visualize.told_loss(layers["phase1"]) == "layers A"
    assert visualize.alpha_of(layers) == dict(alpha=None, layers="A")


@pytest.mark.slow
def test_compare_takes_images_of_which_only_some_have_classes(trained, data, tmp_path):
    """It looks at no class: pictures for validation need not lie in folders as those for training do."""
    shutil.copytree(data / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    for i, path in enumerate((data / "val").rglob("*.png")):
        shutil.copy(path, tmp_path / "val" / f"{i}.png")
    study("compare", trained / "phase1.pt", "--steps", "1", "--device", "cpu", "--data", tmp_path,
          "--samples", "20", "--out", tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())[0]["val_images"] == 20


def test_names_in_figures_are_shown_as_they_are(run, tmp_path):
    """No formula of "$", nothing left out for a "_" in front, and bytes that are no UTF-8 are escaped."""
    names = ["_a$x_1$", "$\\frac$ ^", "100%_$", "caf\udce9"]
    x = torch.zeros(3, 8, 8)
    fig = plumbing.drawing.draw_grid([[(name, x, name), ("", None, "")] for name in names], names, names[1])
    plumbing.drawing.save_figure(fig, tmp_path / "x.png", names)
    shown = {text.get_text() for text in fig.findobj(Text)}
    assert {*names[:3], "caf\\udce9"} <= shown and json.loads((tmp_path / "x.json").read_bytes()) == names
    odd = shutil.copytree(run, tmp_path / names[0])
    args = recipes.options.visualize_args(["fig10", "--ckpt", str(odd / "ar.pt")])
    fig, _ = visualize.figure_losses(args, "cpu")
    assert names[0] in fig.axes[0].get_legend().get_texts()[0].get_text()


# The report -----------------------------------------------------------------------------------------------


def test_the_report_is_one_page_that_needs_no_other_file(run):
    (run / "metrics_ar.json").write_text(json.dumps(dict(
        protocol="gfd-train", num_images=100, image_size=32, classes=None, images_hash="i",
        extractor_hash="e", resize="none",
        feature_layer="pool", reference="train", reference_images=60, reference_hash="r",
        extractor="<b>resnet.pt</b>", results=dict(fd=3.25))))
    study("report", run, "--num", "20", "--device", "cpu")
    page = (run / "report.html").read_text()
    assert len(page) < 8 * 2**20 and "http" not in page.replace("http-equiv", "")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 15 and all(s.startswith("data:image/png;base64,") for s in sources)
    for title in ("Metrics", "Loss curves", "Codebook", "Reconstructions", "Teacher-forced view",
                  "Samples of the AR prior", "Samples of the NAR prior", "NAR decoding", "Configuration"):
        assert f"<h2>{title}" in page, title
    assert "&lt;b&gt;resnet.pt" in page and "<td>3.25</td>" in page and "crescent" in page
    assert page.count("<img") == page.count('alt="') and page.count('type="range"') == 2


def test_results_measured_alike_share_a_table_in_which_the_best_is_marked():
    def result(num, **results):
        how = dict.fromkeys(studies.metrics.HOW, "x")
        return how | dict(protocol="gfd-train", num_images=num, extractor="r.pt", results=results)

    tables = list(studies.report.metric_tables(dict(
        a=result(100, fd=3.0, precision=0.5, usage=1.0), b=result(100, fd=2.0, precision=0.25, usage=1.0),
        c=result(50, fd=1.0))))
    assert len(tables) == 2 and "50 images" in tables[1] and "best" not in tables[1]
    assert re.findall('class="best">([^<]*)<', tables[0]) == ["0.5", "2"]  # more precision, less distance
    assert tables[0].count("<tr>") == 3 and "<th>precision</th>" in tables[0]


@pytest.mark.slow
def test_a_watched_report_is_written_again_when_the_run_has_news_and_reloads_itself(
        run, monkeypatch, capsys):
    written = []

    class Stopped(Exception):
        pass

    def nap(seconds):
        written.append((run / "report.html").read_text())
        if len(written) == 1:
            return
        if len(written) == 2:
            (run / "metrics_ar.json").write_text("{}")  # news
            return
        raise Stopped

    monkeypatch.setattr(studies.report.time, "sleep", nap)
    made = []
    real = studies.report.write_report
    monkeypatch.setattr(studies.report, "write_report", lambda args: made.append(1) or real(args))
    args = study_args(["report", run, "--watch", "--device", "cpu", "--num", "4"])
    with pytest.raises(Stopped):
        studies.report.report(args)
    assert len(made) == 2 and all('http-equiv="refresh"' in page for page in written)

    looks = iter([FileNotFoundError("renamed meanwhile"), studies.report.news(run), KeyboardInterrupt()])

    def news(run):
        if isinstance(look := next(looks), BaseException):
            raise look
        return look

    monkeypatch.setattr(studies.report.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(studies.report, "news", news)
    capsys.readouterr()
    studies.report.report(args)  # a file that vanishes does not end it; Ctrl-C does, without a traceback
    told = capsys.readouterr().out
    assert told.index("watching") < told.index("renamed meanwhile") < told.index("wrote") and len(made) == 3
    assert "refresh" not in (run / "report.html").read_text()  # nobody writes it any more
    args = study_args(["report", run, "--device", "cpu", "--num", "4"])
    studies.report.report(args)
    assert "refresh" not in (run / "report.html").read_text()
    with pytest.raises(SystemExit):
        study_args(["table1", "--watch"])


def test_the_report_shows_each_stage_s_configuration_as_its_own_checkpoint_has_it(run):
    """It showed that of phase 1's checkpoint for all, so the steps of a preset that a flag had changed."""
    changed = {"phase2": ("phase2", "steps", 8), "nar": ("prior", "n_layer", 7),
               "vgg": ("classifier", "steps", 9)}
    for stage, (section, key, value) in changed.items():
        ckpt = torch.load(run / f"{stage}.pt", weights_only=True)
        ckpt["config"][section][key] = value
        torch.save(ckpt, run / f"{stage}.pt")
    (run / "ar.pt").unlink()
    study("report", run, "--device", "cpu", "--num", "4")
    page = (run / "report.html").read_text()
    shown = dict(re.findall("<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page.split("<h2>Configuration")[1]))
    assert "steps = 8" in shown["phase2"] and "steps = 6" in shown["phase1"] \
        and "steps = 9" in shown["classifier"]
    assert "n_layer = 7" in shown["prior"] and "top_p" in shown["sample"] and shown["image_size"] == "32"
    assert "ar" not in shown  # not trained: the preset's values would be nobody's
    both = studies.report.configuration({}, dict(ar=dict(prior=1, ar=2), nar=dict(prior=3, nar=4)))
    assert (both["prior"], both["prior of nar"], both["ar"], both["nar"]) == (1, 3, 2, 4)


def test_a_report_of_a_run_that_has_only_begun_shows_what_is_there_as_utf8_in_every_locale(
        run, data, monkeypatch, recwarn):
    """Names of folders and classes need not be UTF-8; no curve is drawn of a stage that logged none."""
    for name in ("phase2", "ar", "nar", "vgg"):
        (run / f"{name}.pt").unlink()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"stage": "nar", "step": 1, "val_accuracy": 0.5}\n')
    (odd := run.with_name("caf\udce9 α")).symlink_to(data)
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")  # as LC_ALL=C has it
    study("report", run, "--device", "cpu", "--num", "4", "--data", odd)
    page = (run / "report.html").read_bytes().decode("utf-8")
    assert "<h2>Reconstructions" in page and "<h2>Teacher" not in page and 'type="range"' not in page
    assert "caf\\udce9 α" in page and not [w for w in recwarn if "artists" in str(w.message)]


@pytest.mark.parametrize(
    "words, message",
    [
        ("fig1b --ckpt nar.pt", "stage 'nar'; this needs ar"),
        ("fig3 --ckpt phase1.pt", "this needs ar"),
        ("fig8 --ckpt ar.pt", "this needs phase1 or phase2"),
        ("fig8 --ckpt phase1.pt --num 21", "only 20 images"),
        ("fig10 --ckpt phase1.pt", "this needs ar or nar"),
        ("fig7a --ckpt nar.pt --tokenizer phase1.pt", "two"),
        ("fig7a", "needs --ckpt"), ("report", "required: RUN"), ("compare", "required: CKPT"),
        ("fig4 ar.pt", "unknown argument ar.pt"), ("report .", "holds no phase1.pt"),
        ("fig3 --ckpt ar.pt --out x.json", ".png"), ("table1 --preset imagenette", "imagenette"),
        ("compare phase1.pt --steps 0", "--steps"), ("fig12 --ckpt ar.pt", "fig12"),
        ("fig1b --ckpt ar.pt big/ar.pt --num 4", "64-pixel"), ("compare phase1.pt big/phase1.pt", "64-pixel"),
    ],
)
def test_bad_input_of_figures_ends_with_one_line_and_exit_code_2(run, monkeypatch, capsys, words, message):
    (run / "big").mkdir()
    for name in ("ar", "phase1", "phase2"):
        ckpt = torch.load(run / f"{name}.pt", weights_only=True)
        ckpt["config"]["image_size"] = 64
        torch.save(ckpt, run / "big" / f"{name}.pt")
    if words == "report .":
        for path in run.glob("phase*.pt"):
            path.unlink()
    monkeypatch.chdir(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        name, words = words.split()[0], [*words.split(), "--device", "cpu"]
        if name.startswith("fig"):
            visualize.main(recipes.options.visualize_args(words))
        study(*words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
