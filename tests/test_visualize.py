"""Claims about visualize.py: the teacher-forced view, the summary of a run, its figures and its report."""

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
import plumbing.hashes
import plumbing.images
import plumbing.models
import plumbing.progress
import plumbing.run
import plumbing.slices
import recipes.ablations
import recipes.options
import recipes.paper
import studies.metrics
import studies.probe
import studies.report
import studies.summary
from helpers import ROOT, call, command, few, open_run, refused, study
from PIL import Image
from benchmarks.curves import thin
from matplotlib.text import Text
from tqdm import tqdm

import visualize
from prior_ar import ARPrior, PriorConfig
from plumbing.files import read_checkpoint
from plumbing.models import load_model
from recipes.small import MILLISECONDS

K, SIDE = 5, 4


class LookupTokenizer:
    """Tokens are the red channel: image (B, 3, 4, 4) with values 0..K-1 to 16 tokens and back."""

    def encode(self, x):
        return x[:, 0].flatten(1).long()

    def decode(self, tokens):
        return tokens.float().view(-1, 1, SIDE, SIDE).expand(-1, 3, -1, -1) / K


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


# A trained run --------------------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may write into."""
    return shutil.copytree(trained, tmp_path / "run")


def all_finite(value):
    if isinstance(value, dict | list):
        return all(map(all_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def test_stage_all_leaves_a_summary_with_all_numbers_and_the_pictures(trained):
    summary = json.loads((trained / "summary.json").read_text())
    names = """usage perplexity recon_class_accuracy ar_class_accuracy nar_class_accuracy
        phase2_tokens_changed
        psnr_phase1 psnr_phase2 lpips_like_phase1 lpips_like_phase2 ar_nats_per_token nar_nats_per_token
        unigram_entropy ln_K seconds peak_rss_mb command vgg_accuracy alpha latent_hash view"""
    assert set(names.split()) <= summary.keys() and "commit" in summary and all_finite(summary)
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
    told = studies.summary.ending(summary, run)
    assert "after phase 1;" in told and "phase 2" not in told and f"{run}/phase1.pt --reconstruct" in told


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


def draw(figure, *words):
    visualize.main(recipes.options.visualize_args([figure, *map(str, words), "--device", "cpu"]))


BAD = [  # below a run folder, with a run of larger images in big/
    ("view --ckpt nar.pt", "stage 'nar'; this needs ar"), ("view --ckpt nowhere.pt", "no checkpoint"),
    ("view --ckpt ar.pt --num 21", "only 20 images"), ("view --ckpt ar.pt --num 0", "--num"),
    ("view --ckpt ar.pt --tokenizer phase1.pt phase2.pt", "one file per --ckpt"),
    ("view --ckpt ar.pt --tokenizer vgg.pt", "this needs phase1 or phase2"),
    ("view --ckpt ar.pt --data nowhere", "nowhere does not exist"),
    ("fig1b --ckpt ar.pt big/ar.pt --num 4", "64-pixel"), ("fig3 --ckpt phase1.pt", "this needs ar"),
    ("fig3 --ckpt ar.pt --out x.json", ".png"), ("fig3 --ckpt ar.pt ar.pt", "fig3 is of one --ckpt, got 2"),
    ("fig3 --ckpt ar.pt --wide", "--wide does nothing for fig3"), ("fig4 ar.pt", "unknown argument ar.pt"),
    ("fig7a", "needs --ckpt"), ("fig7a --ckpt nar.pt --tokenizer phase1.pt", "two"),
    ("fig7a --ckpt nar.pt --tokenizer phase2.pt phase1.pt", "phase 1 first, then phase 2"),
    ("fig8 --ckpt ar.pt", "this needs phase1 or phase2"),
    ("fig8 --ckpt phase1.pt --num 21", "only 20 images"),
    ("fig8 --ckpt a.pt --tokenizer b.pt", "--tokenizer does nothing for fig8"),
    ("fig10 --ckpt phase1.pt", "this needs ar or nar"), ("fig12 --ckpt ar.pt", "fig12"),
    ("report", "required: RUN"), ("report ..", "holds no phase1.pt"), ("compare", "required: CKPT"),
    ("compare phase1.pt --steps 0", "--steps"), ("compare phase1.pt big/phase2.pt", "64-pixel")]


@pytest.fixture(scope="module")
def sizes(trained, tmp_path_factory):
    """A run folder, and in it one of larger images."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("sizes") / "run")
    (folder / "big").mkdir()
    for name in ("ar", "phase2"):
        ckpt = torch.load(folder / f"{name}.pt", weights_only=True)
        ckpt["config"]["image_size"] = 64
        torch.save(ckpt, folder / "big" / f"{name}.pt")
    return folder


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input_of_figures_and_studies_ends_with_one_line_and_exit_code_2(
        sizes, monkeypatch, capsys, words, message):
    monkeypatch.chdir(sizes)
    before = {path: path.stat().st_mtime_ns for path in sizes.rglob("*")}
    name, *more = words.split()
    assert message in refused(capsys, study if name in ("report", "compare") else draw, name, *more)
    assert {path: path.stat().st_mtime_ns for path in sizes.rglob("*")} == before


@pytest.mark.dist
def test_sample_with_two_processes_equals_one_bit_for_bit(run):
    words = ["--ckpt", run / "ar.pt", "--num", "10", "--batch", "4", "--format", "npz", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    for name, launch in dict(one=[sys.executable], two=torchrun).items():  # as training here changed a switch
        done = subprocess.run([*launch, ROOT / "sample.py", *words, "--out", run / f"{name}.npz"],
                              capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (np.load(run / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert (one == two).all() and one.std() > 1


# Figures --------------------------------------------------------------------------------------------------

FIGURES = [("view", ["ar.pt"]), ("fig1b", ["ar.pt", "ar.pt"]), ("fig3", ["ar.pt"]),
           ("fig4", ["ar.pt", "ar.pt"]), ("fig5a", ["ar.pt", "ar.pt"]), ("fig7a", ["nar.pt"]),
           ("fig8", ["phase1.pt", "phase2.pt"]),
           ("fig9", ["ar.pt", "nar.pt"]), ("fig10", ["ar.pt", "nar.pt"]), ("fig11", ["ar.pt", "ar.pt"])]


@pytest.mark.parametrize("figure, names", few(FIGURES, 0), ids=[name for name, _ in FIGURES])
def test_every_figure_runs_on_tiny_checkpoints_twice_the_same_with_finite_numbers(
        run, capsys, figure, names):
    found = []
    for i in range(2):
        num = [] if figure == "fig10" else ["--num", 2]
        draw(figure, "--ckpt", *(run / name for name in names), *num, *["--pdf"] * i, "--out",
             run / f"{i}.png")
        found.append((run / f"{i}.json").read_bytes())
        picture = Image.open(run / f"{i}.png")
        assert min(picture.size) > 250 and picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
    numbers = json.loads(found[0])
    assert found[0] == found[1] and all_finite(numbers) and len(str(numbers)) > 100
    assert (run / "1.pdf").read_bytes().startswith(b"%PDF") and not (run / "0.pdf").exists()
    told = capsys.readouterr().out
    assert f"{run / names[0]}: alpha 1" in told or "psnr between" in told
    assert max(map(len, told.replace(str(run), "").splitlines())) <= 110


def words_of(fig):
    return [text.get_text() for text in fig.findobj(Text) if text.get_text()]


def test_fig_3_has_five_numbered_steps_the_class_by_its_name_and_a_scale_for_nats(trained):
    words = ["fig3", "--ckpt", str(trained / "ar.pt"), "--num", "4"]
    fig, numbers = visualize.draw(recipes.options.visualize_args(words), "cpu")
    told, val = words_of(fig), json.loads((trained / "summary.json").read_text())["view"]
    steps = [int(text[0]) for text in told if re.match(r"\d\. ", text)]
    assert sorted(steps) == [1, 2, 3, 4, 5, 5] and "nats (more: a surprise)" in told
    classes = read_checkpoint(trained / "ar.pt", ["ar"])["class_names"]
    assert any(f"condition c: class {name}\n" in text for name in classes for text in told)
    assert numbers["tokenizer_hash"] == val["tokenizer_hash"]


def test_a_grid_writes_shared_titles_once_and_lies_wide_or_tall():
    x = torch.zeros(3, 8, 8)
    rows = [[("input", x, ""), ("a\nrec", x, ""), ("a\npred", x, f"{i}%")] for i in range(2)]
    tall = plumbing.drawing.draw_grid(rows, ("disk", "star"))
    assert [axis.get_title() for axis in tall.axes] == ["input", "\nrec", "\npred", "", "", ""]
    assert words_of(tall).count("a") == 1 and tall.axes[3].get_ylabel() == "star"
    wide = plumbing.drawing.draw_grid(rows, ("disk", "star"), wide=True)
    assert [axis.get_title() for axis in wide.axes[:2]] == ["disk", "star"]
    assert [axis.get_ylabel() for axis in wide.axes[::2]] == ["input", "a\nrec", "a\npred"]
    assert [axis.get_xlabel() for axis in wide.axes[4:]] == ["0%", "1%"]


def test_the_enlarged_part_is_framed_in_the_whole():
    framed = visualize.framed(torch.zeros(3, 8, 8), slice(2, 6), 1)
    assert framed.sum() == 3 * 12 and framed[:, 2, 2:6].min() == 1 and framed[:, 3:5, 3:5].max() == 0


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


@pytest.mark.parametrize("figure, name", few([("fig7a", "nar.pt"), ("fig9", "ar.pt")], 1))
def test_both_phases_decode_identical_tokens(run, monkeypatch, figure, name):
    real, seen = plumbing.slices.decode, []

    def spy(tokenizer, tokens):
        seen.append((plumbing.hashes.weights_hash(tokenizer), tokens))
        return real(tokenizer, tokens)

    monkeypatch.setattr(visualize, "decode", spy)
    draw(figure, "--ckpt", run / name, "--num", 8, "--out", run / "x.png")  # the first few are drawn
    (first, one), (second, two) = seen
    assert first != second and torch.equal(one, two)
    numbers = json.loads((run / "x.json").read_text())[0]
    assert numbers["tokens"] == one.tolist() and numbers["mean_difference"] > 0
    assert numbers["num_images"] == 8 == len(numbers["tokens"])


def test_images_of_some_of_the_classes_are_viewed_by_name_and_others_are_refused(
        run, data, tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        for name in ("star", "ring"):
            shutil.copytree(data / split / name, tmp_path / split / name)
    seen, real = [], visualize.teacher_forced_view
    monkeypatch.setattr(visualize, "teacher_forced_view",
                        lambda *words: seen.append(words[3]) or real(*words))
    draw("view", "--ckpt", run / "ar.pt", "--num", 4, "--data", tmp_path, "--out", tmp_path / "x.png")
    names = read_checkpoint(run / "ar.pt", ["ar"])["class_names"]
    assert {names[label] for label in seen[0].tolist()} <= {"star", "ring"}
    for split in ("train", "val"):
        (tmp_path / split / "star").rename(tmp_path / split / "other")
    error = refused(capsys, draw, "view", "--ckpt", run / "ar.pt", "--num", 4, "--data", tmp_path)
    assert "knows other classes" in error and "names out of " in error


def test_an_unconditional_prior_has_figures_without_class_names(run, data, tmp_path):
    call("nar", tmp_path, data, "--tokenizer", run / "phase2.pt", conditional=False, nar__steps=1)
    draw("fig7a", "--ckpt", tmp_path / "nar.pt", "--num", 2, "--tokenizer", run / "phase1.pt",
         run / "phase2.pt")
    assert (tmp_path / "fig7a.png").stat().st_size > 10_000


def test_losses_of_a_collapsed_codebook_and_missing_ones_are_drawn(run):
    rows = [dict(stage="ar", step=i, val_loss=loss, unigram_entropy=0.0)
            for i, loss in enumerate((1.0, None, 2.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw("fig10", "--ckpt", run / "ar.pt", "--out", run / "x.png")
    assert json.loads((run / "x.json").read_text())[0]["val_loss"] == [1.0, 2.0]


def test_the_numbers_of_a_view_tell_the_class_kept_the_distances_and_each_position(trained):
    pairs, x = visualize.load_pairs([trained / "ar.pt"], 6, "cpu")
    numbers = pairs[0]["numbers"]
    assert np.shape(numbers["nats_by_position"]) == (4, 4)
    assert np.mean(numbers["nats_by_position"]) == pytest.approx(numbers["nats_per_token"], rel=1e-3)
    for key in ("class_kept_by_reconstruction", "class_kept_by_prediction"):
        assert numbers[key] * 6 == pytest.approx(round(numbers[key] * 6))
    assert numbers["lpips_like_reconstruction"] > 0
    assert "class_kept_by_prediction" not in visualize.view_numbers(x, pairs[0]["view"], vgg=None)


# Stability, probe ----------------------------------------------------------------------------------------


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


def test_the_probe_counts_bits_and_is_the_same_twice():
    codes = torch.randint(0, 8, (60, 9), generator=torch.Generator().manual_seed(0))
    one, two = (studies.probe.probe(codes[:50], codes[50:], 8, steps=2, batch=4) for _ in range(2))
    assert one == two and all_finite(one) and one["unigram_bits_per_image"] == pytest.approx(27, rel=0.05)
    assert one["relative"] == pytest.approx(one["bits_per_image"] / one["unigram_bits_per_image"])
    odd = studies.probe.probe(codes[:50], codes[:1].expand(101, 9), 8, steps=2, batch=4)
    assert len(odd["nats_of_images"]) == 101  # `compare` weighs each alike, also in a last part of one
    assert odd["nats_per_token"] == pytest.approx(sum(odd["nats_of_images"]) / 101)


@pytest.mark.slow
def test_the_probe_finds_predictable_codes_easier_than_the_same_codes_shuffled():
    draw = torch.Generator().manual_seed(0)
    start = torch.randint(0, 8, (600, 1), generator=draw)
    codes = (start + torch.arange(9)) % 8  # every token follows from the one before
    shuffled = torch.stack([row[torch.randperm(9, generator=draw)] for row in codes])
    small = dict(steps=60, batch=32, n_layer=1)
    easy, hard = (studies.probe.probe(c[:500], c[500:], 8, **small) for c in (codes, shuffled))
    assert 2.9 < easy["bits_per_image"] < 0.5 * hard["bits_per_image"]  # log2 8 for the first token


def test_compare_probes_several_tokenizers_on_the_same_images(run, capsys):
    study("compare", run / "phase1.pt", run / "phase2.pt", "--steps", "1", "--device", "cpu")
    one, two = json.loads((run / "compare.json").read_text())
    assert one["tokenizer_hash"] == two["tokenizer_hash"] and one["bits_per_image"] == two["bits_per_image"]
    assert one["psnr"] != two["psnr"] and all_finite(one) and one["train_images"] == 60


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
    assert visualize.loss_in_words(run.config["phase1"]) == "α = 0.25"
    assert visualize.alpha_of(run.config) == dict(alpha=0.25)
    layers = dict(phase1=dict(alpha=0.25, layers="A"))
    assert visualize.loss_in_words(layers["phase1"]) == "layers A"
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


def test_names_in_figures_are_shown_as_they_are(tmp_path):
    """No formula of "$", nothing left out for a "_" in front."""
    names = ["_a$x_1$", "$\\frac$ ^", "100%_$"]
    x = torch.zeros(3, 8, 8)
    fig = plumbing.drawing.draw_grid([[(name, x, name), ("", None, "")] for name in names], names, names[1])
    plumbing.drawing.save_figure(fig, tmp_path / "x.png", names)
    assert {*names} <= {*words_of(fig)} and json.loads((tmp_path / "x.json").read_bytes()) == names
    assert not any(text.get_parse_math() for text in fig.findobj(Text))


# The report -----------------------------------------------------------------------------------------------


def test_the_report_is_one_page_that_needs_no_other_file_with_each_stage_s_own_configuration(run):
    """It showed that of phase 1's checkpoint for all, so the steps of a preset that a flag had changed."""
    (run / "metrics_ar.json").write_text(json.dumps(dict(
        protocol="gfd-train", num_images=100, image_size=32, classes=None, images_hash="i",
        extractor_hash="e", resize="none",
        feature_layer="pool", reference="train", reference_images=60, reference_hash="r",
        extractor="<b>resnet.pt</b>", results=dict(fd=3.25))))
    for stage, section, value in (("phase2", "phase2", 8), ("vgg", "classifier", 9)):
        ckpt = torch.load(run / f"{stage}.pt", weights_only=True)
        ckpt["config"][section]["steps"] = value
        torch.save(ckpt, run / f"{stage}.pt")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(row for row in rows if '"phase1"' in row))
    study("report", run, "--num", "4", "--device", "cpu")
    page = (run / "report.html").read_text()
    assert len(page) < 8 * 2**20 and "http" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 12 and all(s.startswith("data:image/png;base64,") for s in sources)
    for title in ("At a glance", "Stages", "Metrics", "Curves", "Codebook", "Reconstructions",
                  "Teacher-forced view", "Samples of the AR prior", "Samples of the NAR prior",
                  "NAR decoding"):
        assert f"<h2>{title}" in page, title
    assert "&lt;b&gt;resnet.pt" in page and "<td>3.25</td>" in page and "crescent" in page
    assert page.count("<img") == page.count('alt="') and "<p>phase2</p>" in page
    summary = json.loads((run / "summary.json").read_text())
    assert f"<td>{summary['psnr_phase1']:.2f}, {summary['psnr_phase2']:.2f} dB</td>" in page
    shown = re.findall("<td>([^<]*steps)</td><td>([^<]*)</td>", page.split("<h2>Stages")[1])
    assert {*shown} >= {("classifier.steps", "9"), ("phase2.steps", "8"), ("phase1.steps", "6")}


def test_a_report_of_a_run_that_has_only_begun_shows_what_is_there_as_utf8_in_every_locale(
        run, data, monkeypatch):
    """Names of folders and classes need not be UTF-8; no curve is drawn of a stage that logged none."""
    for name in ("phase2.pt", "ar.pt", "nar.pt", "vgg.pt", "summary.json", "metrics.jsonl"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text('{"stage": "phase1", "step": 1, "usage": 0.5}\n')
    (odd := run.with_name("caf\udce9 α")).symlink_to(data)
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")  # as LC_ALL=C has it
    ckpt = torch.load(run / "phase1.pt", weights_only=True)
    torch.save(ckpt | dict(config=ckpt["config"] | dict(data=str(odd))), run / "phase1.pt")
    study("report", run, "--device", "cpu", "--num", "4", "--data", data)
    page = (run / "report.html").read_bytes().decode("utf-8")
    assert "<h2>Reconstructions" in page and "<h2>Teacher" not in page and "<p>phase2</p>" not in page
    assert "caf\\udce9 α" in page and page.count('class="plot"') == 2 and "At a glance" not in page


@pytest.mark.slow
def test_a_report_on_other_images_counts_the_codes_of_these(run, data, tmp_path):
    for split in ("train", "val"):
        for name in ("star", "ring"):
            shutil.copytree(data / split / name, tmp_path / split / name)
    study("report", run, "--device", "cpu", "--num", "4", "--data", tmp_path, "--out", tmp_path / "x.html")
    assert "codes are chosen for 4 validation images" in (tmp_path / "x.html").read_text()


def test_results_measured_alike_share_a_table():
    def result(num, **results):
        how = dict.fromkeys(studies.metrics.HOW, "x")
        return how | dict(protocol="gfd-train", num_images=num, extractor="r.pt", results=results)

    one, two = studies.report.metric_tables(dict(
        a=result(100, fd=3.0, precision=0.5), b=result(100, fd=2.0, usage=1.0), c=result(50, fd=1.0)))
    assert "50 images" in two and one.count("<tr>") == 3 and "<th>precision</th>" in one
    assert "<td>b</td><td>2</td><td>nan</td>" in one


def write_reference(folder, seed, config, **last):
    """A committed run whose curves end at `last`."""
    rows = [dict(stage="phase1", step=step, lr=1, **{name: end + 10 - step for name, end in last.items()})
            for step in (1, 5, 10)]
    lines = [dict(config=config | dict(seed=seed)), *thin(rows)]
    (folder / f"demo_{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_are_drawn_over_the_band_of_the_runs_with_the_same_values_and_what_differs_is_told(
        tmp_path, monkeypatch):
    config, drawn = recipes.options.PRESETS["demo"], []
    monkeypatch.setattr(studies.report, "CURVES_OF", tmp_path)
    monkeypatch.setattr(studies.report, "plot", lambda fig, alt: drawn.append((alt, fig)) or "")
    for seed in range(3):
        write_reference(tmp_path, seed, config, loss_rec=2 + seed, loss_per=5 + seed)
    rows = [dict(stage="phase1", step=step, loss_rec=3.5, loss_per=9.5) for step in (1, 10)]

    def told(stage="phase1", **changes):
        drawn.clear()
        other = recipes.paper.variant(config, seed=9, **changes)
        return studies.report.curves(rows, {stage: dict(config=other)})[1:]

    of, ended = told()
    assert "perceptual loss ends at 9.5; the 3 reference runs end between 5 and 7" in ended
    assert "The band (phase1) is of runs on shapes with the same values" in of
    bands = {alt: fig.axes[0].collections for alt, fig in drawn}
    (one,) = bands["phase1: L1 of reconstructions"]
    assert sorted({tuple(point) for point in one.get_paths()[0].vertices.tolist()}) == [
        (1, 11), (1, 13), (5, 7), (5, 9), (10, 2), (10, 4)]
    (why,) = told(phase1=dict(lr=0.5), classifier=dict(steps=7))
    assert "no band" in why and "phase1.lr is 0.001, not 0.5" in why and "more" not in why
    assert not [fig for _, fig in drawn if fig.axes[0].collections]
    assert told(data="elsewhere") == () == told("ar")  # another data set; a stage without a checkpoint
    write_reference(tmp_path, 0, config | dict(data="cifar10"), loss_rec=2)
    assert "runs on cifar10 with" in told(data="elsewhere")[0] and "on shapes" in told()[0]
    assert told(data="elsewhere", image_size=64) == ()  # of which there is nothing to compare
    write_reference(tmp_path, 0, config, loss_rec=2, loss_per=5)
    assert len(told()) == 2
    for seed in (1, 2):
        (tmp_path / f"demo_{seed}.jsonl").unlink()
    assert len(told()) == 1  # one run has no width that a curve could end outside of


def test_a_thinned_log_keeps_validations_the_last_step_and_at_most_sixty_more():
    rows = [dict(stage="ar", step=step, lr=1, loss=2.0, top1=0.1) for step in range(1, 1001)]
    kept = thin([*rows, dict(stage="ar", step=1000, val_loss=3.0, ln_K=4.0)])
    assert len(kept) <= 62 and kept[-1] == dict(stage="ar", step=1000, val_loss=3.0)
    assert kept[-2] == dict(stage="ar", step=1000, loss=2.0)


# Progress, --quick ----------------------------------------------------------------------------------------


def test_progress_tells_the_stage_and_the_time_left_of_it_and_of_all(monkeypatch, capsys):
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(plumbing.progress.time, "time", lambda: next(now))
    progress = plumbing.progress.Progress(dict(vgg=100, phase1=50), "demo")
    known = MILLISECONDS["demo"]
    assert progress.name("phase1") == "phase1 (2 of 2)"
    progress.begin(20)  # resumed: ten steps in ten seconds
    left = tqdm.format_interval(70 + 50 * known["phase1"] / known["vgg"])
    assert progress.words("vgg", 29) == ["00:10", "1 steps/s", "01:10 left", f"{left} of all stages"]
    assert "minutes left on this machine, for all stages" in capsys.readouterr().out
    assert progress.words("vgg", 39)[2] == "01:00 left" and capsys.readouterr().out == ""
    alone = plumbing.progress.Progress(dict(ar=10), "imagenet")
    assert alone.name("ar") == "ar"


def test_a_table_of_which_nothing_is_there_is_short_ends_with_the_time_and_writes_no_file(tmp_path, capsys):
    study("table1", "--preset", "demo", "--out", tmp_path, "--device", "cpu")
    told = capsys.readouterr().out
    assert "+Attention" in told and not [*tmp_path.iterdir()]
    *_, row, last = told.splitlines()
    assert row.startswith("  missing for +2x training: phase1, ar, nar") and "python" not in told
    assert re.search(r"--run makes them, in about \d+ minutes on an EPYC", last)


@pytest.mark.parametrize("preset", ["demo", "imagenet", "demo-fq"])
def test_quick_scales_all_that_is_counted_in_steps_and_what_is_set_stays(preset):
    def config(*words):
        return recipes.options.train_args(["--stage", "all", "--preset", preset, *words])[1]

    whole, quick = config(), config("--quick", "--set", "nar.warmup=7")
    stages = ("classifier", "phase1", "phase2", "ar", "nar")
    share = 400 / sum(whole[stage]["steps"] for stage in stages)
    assert sum(quick[stage]["steps"] for stage in stages) == pytest.approx(400, abs=10)
    for stage in stages:
        for name in ("steps", "lr_start", "warmup"):
            wanted = 7 if (stage, name) == ("nar", "warmup") else share * whole[stage][name]
            assert quick[stage][name] == pytest.approx(wanted, abs=2)
        if whole[stage]["ema"]:
            assert (1 - quick[stage]["ema"]) * share == pytest.approx(1 - whole[stage]["ema"]) \
                or quick[stage]["ema"] == 0
    assert quick["tokenizer"].get("warm_start", 0) == pytest.approx(
        share * whole["tokenizer"].get("warm_start", 0), abs=1)
    assert recipes.paper.variant(quick, limit=None, **{s: whole[s] for s in (*stages, "tokenizer")}) == whole


def test_a_quick_run_says_so_wherever_it_is_shown(data, tmp_path):
    opened = open_run("phase1", tmp_path / "run", data, "--quick")
    assert opened.note == "--quick: a test run"
    told = studies.summary.ending(dict(note=opened.note, num_val=1, num_samples=1, usage=0.5), "runs/x")
    assert told.splitlines()[1] == "  --quick: a test run" and "50.0 %" in told
