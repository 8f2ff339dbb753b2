"""Claims about handing a run on (studies export) and watching one (studies watch).

No logger is among the requirements: what one is told is looked at. Both were tried by hand.
"""

import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import call, forked, open_run, refused, study
from PIL import Image
from safetensors.torch import load_file

import recipes.options
import sample
import studies.watch
from plumbing.files import read_checkpoint
from plumbing.hashes import latent_hash, weights_hash
from plumbing.models import find_vgg, load_model
from plumbing.preflight import check_perception
from plumbing.stages import vgg_sizes
from studies.balance import vgg_for
from studies.extractors import Extractor


def draw(*words):
    sample.main(recipes.options.sample_args([*map(str, words)]))


@pytest.mark.slow
def test_an_exported_run_draws_the_same_images_to_the_last_bit(trained, tmp_path):
    out = tmp_path / "out"
    study("export", trained, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "ar", "nar", "phase1", "phase2", "vgg"]
    for stage in ("phase1", "phase2", "ar", "nar"):
        (ours, ckpt), (theirs, other) = (load_model(path, (stage,)) for path in (
            trained / f"{stage}.pt", out / stage))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(a, theirs.state_dict()[k]) for k, a in ours.state_dict().items())
        assert other["config"] == ckpt["config"] | dict(data=None, val=None)  # no place on this machine
        assert other["class_names"] == ckpt["class_names"]
    assert not any(key.startswith("encoder.") for key in load_file(out / "phase1" / "model.safetensors"))
    for name, place in dict(a=trained / "ar.pt", b=out / "ar").items():  # its tokenizer is found beside it
        draw("--ckpt", place, "--num", 4, "--format", "npz", "--out", tmp_path / f"{name}.npz")
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(a, b) and a.shape == (4, 32, 32, 3)
    draw("--ckpt", out / "ar", "--num", 2)  # a sheet there
    study("export", trained, "--out", out)  # again: the same files
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~umask} and {"model.safetensors", "samples_ar.png"} < modes.keys()


def test_an_export_to_a_full_disk_ends_in_one_line_whatever_its_writers_raise(trained, tmp_path, capfd):
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        study("export", trained, "--out", tmp_path / "out")

    assert forked(child) == 1
    error = capfd.readouterr().err
    assert "could not be written" in error and "Traceback" not in error
    assert not list(tmp_path.rglob(".tmp*"))


def test_the_card_tells_the_numbers_of_the_run_the_licence_and_code_that_opens_it(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "summary.json").write_text(json.dumps(dict(psnr_phase1=17.25, preset="demo", usage=1.0)))
    study("export", run, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| psnr_phase1 | 17.25 |" in card and "MIT licence" in card and "`ar`: ar, 6 steps" in card
    found = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert found["model"].encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


def test_a_vgg_in_half_precision_is_the_same_wherever_it_is_loaded(trained, data, tmp_path):
    out, run = tmp_path / "small", tmp_path / "run"
    study("export", trained / "vgg.pt", "--out", out, "--half")
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "rounded to float16" in (out / "README.md").read_text()
    held, (vgg, ckpt) = load_file(out / "model.safetensors"), load_model(out, ("vgg",))
    whole = load_model(trained / "vgg.pt", ("vgg",))[0]
    assert {t.dtype for t in held.values() if t.dim() > 1} == {torch.float16}
    assert {t.dtype for t in vgg.state_dict().values()} == {torch.float32}
    assert weights_hash(vgg) != weights_hash(whole)
    for a, b in zip(vgg.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # 11 bits
    call("phase1", run, data, "--vgg", out, phase1__steps=2)
    path = run / "phase1.pt"
    phase1 = load_model(path, ("phase1",))[1]
    found = [open_run("phase1", run, data, "--vgg", out).vgg, find_vgg(path, phase1, "cpu"),
             *(vgg_for(path, phase1, source, "cpu") for source in (None, str(out)))]
    assert {weights_hash(v) for v in [vgg, *found]} == {phase1["vgg_hash"]}
    assert vgg_sizes(dict(vgg=str(out), classifier={})) == ckpt["config"]["classifier"]
    with pytest.raises(ValueError, match="needs torchvision's VGG-16"):
        check_perception(dict(vgg=str(out), phase1=dict(layers="lpips")), ["phase1"])
    features = {source: Extractor(str(source), 32, "cpu").info for source in (out, trained / "vgg.pt")}
    assert features[out]["feature_layer"] == "pool" and features[out]["resize"] == "none"
    assert features[out]["extractor_hash"] == weights_hash(Extractor(str(out), 32, "cpu").network)
    assert features[out]["extractor_hash"] != features[trained / "vgg.pt"]["extractor_hash"]


@pytest.mark.slow
def test_a_run_in_half_precision_keeps_its_priors_and_its_tokenizer_together(trained, tmp_path):
    out = tmp_path / "out"
    study("export", trained, "--out", out, "--half")
    tokenizer, ckpt = load_model(out / "phase2", ("phase2",))
    hashes = [load_model(out / stage, (stage,))[1]["tokenizer_hash"] for stage in ("phase2", "ar", "nar")]
    assert {*hashes} == {latent_hash(tokenizer)} and hashes[0] != read_checkpoint(
        trained / "phase2.pt", ["phase2"])["tokenizer_hash"]
    draw("--ckpt", out / "ar", "--num", 2)
    card = (out / "README.md").read_text()
    assert "On 20 validation images" in card and "| AR prior, nats per token |" in card
    whole = sum((trained / f"{s}.pt").stat().st_size for s in ("phase2", "ar", "nar"))
    assert sum(p.stat().st_size for p in out.rglob("*.safetensors")) < whole / 4


def test_what_cannot_be_exported_or_opened_is_refused_in_one_line(trained, tmp_path, capsys):
    ckpt = torch.load(trained / "vgg.pt")
    next(v for v in (ckpt["ema"] or ckpt["model"]).values() if v.dim() == 2)[0, 0] = 1e5
    torch.save(ckpt, tmp_path / "vgg.pt")
    (mine := tmp_path / "mine").mkdir()
    (mine / "README.md").write_text("do not touch")
    run, other = shutil.copytree(trained, tmp_path / "run"), tmp_path / "other"
    study("export", run, "--out", other)
    (run / "phase1.pt").unlink()  # its decoder would stay beside another encoder
    for words, told in (
            ([tmp_path / "vgg.pt", "--out", tmp_path / "out", "--half"], "too large for float16"),
            ([tmp_path, "--out", tmp_path / "out"], "holds no phase1.pt"),
            ([trained, "--out", mine], "holds other files"), ([run, "--out", other], "of another export"),
            ([trained / "phase1.pt", "--out", other / "phase2"], "holds a model of another export"),
            ([trained, "--out", mine / "README.md"], "cannot be written")):
        assert told in refused(capsys, study, "export", *words)
    assert (mine / "README.md").read_text() == "do not touch" and not (tmp_path / "out").exists()
    study("export", trained, "--out", tmp_path / "out")
    weights = tmp_path / "out" / "ar" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # a bit of a weight
    for _ in range(2):
        assert "damaged or no exported model" in refused(
            capsys, draw, "--ckpt", tmp_path / "out" / "ar", "--num", 2)
        (tmp_path / "out" / "ar" / "config.json").write_text("{")


# Watching -------------------------------------------------------------------------------------------------


def test_a_logger_that_is_not_installed_and_a_wrong_folder_or_time_are_refused(tmp_path, monkeypatch, capsys):
    for target in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, target, None)
        error = refused(capsys, study, "watch", tmp_path, "--once", "--to", target)
        assert f"pip install {target}" in error
    assert "no folder of a run" in refused(capsys, study, "watch", tmp_path / "nowhere", "--once")
    for every in ("inf", "nan", "0", "1e9"):
        assert "--every" in refused(capsys, study, "watch", tmp_path, "--every", every)


class Logger:
    begun = []  # one for each beginning

    def __init__(self, run):
        self.rows, self.pictures = [], []
        self.begun.append(self)

    def row(self, *told):
        self.rows.append(told)

    def picture(self, name, pixels, step):
        self.pictures.append((name, pixels.shape, step))

    def close(self):
        pass


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A function that watches a folder: before each further look it calls one of the functions it is given.
    returns: the loggers that were begun"""
    def watch(*steps):
        left = iter(steps)

        def look_again(seconds):
            try:
                next(left)()
            except StopIteration:
                raise KeyboardInterrupt from None

        monkeypatch.setattr(studies.watch.time, "sleep", look_again)
        monkeypatch.setattr(Logger, "begun", [])
        study("watch", tmp_path, "--every", 1)  # Ctrl-C ends it without a traceback
        return Logger.begun

    monkeypatch.setitem(studies.watch.TARGETS, "tensorboard", Logger)
    return watch


def line(step, **values):
    return json.dumps(dict(stage="ar", step=step, **values)) + "\n"


def test_a_watcher_hands_on_every_line_and_picture_once_and_waits_for_half_lines(tmp_path, watched):
    text = "".join(line(i, loss=1 / i, told="word", flags=[1]) for i in (1, 2, 3))
    path = tmp_path / "metrics.jsonl"

    def begin():
        path.write_text(text[:-10])
        Image.new("RGB", (8, 6)).save(tmp_path / "samples.png")
        Image.new("RGB", (8, 6)).save(tmp_path / ".tmp1.samples.png")  # being written

    logger, = watched(begin, lambda: None, lambda: path.write_text(text + "{torn\n" + line(1, loss=2)))
    assert logger.rows == [*(("ar", i, {"ar/loss": 1 / i}) for i in (1, 2, 3)), ("ar", 1, {"ar/loss": 2})]
    assert logger.pictures == [("samples", (6, 8, 3), 2)]


def test_what_a_resumed_run_takes_out_of_its_log_is_taken_back_and_no_curve_runs_backwards(tmp_path, watched):
    """The kind: after a kill and a resume, a target that only appends holds step 3 before another step 2."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, loss=1.0) for step in (1, 2, 3)) + "{torn")
    Image.new("RGB", (8, 6)).save(tmp_path / "samples.png")
    first, second = watched(lambda: path.write_text(line(1, loss=1.0) + line(2, loss=0.5)))
    assert [step for _, step, _ in first.rows] == [1, 2, 3] and second.pictures
    assert second.rows == [("ar", 1, {"ar/loss": 1.0}), ("ar", 2, {"ar/loss": 0.5})]


def test_the_command_looks_at_a_run_once(trained, monkeypatch, capsys):
    monkeypatch.setitem(studies.watch.TARGETS, "tensorboard", Logger)
    monkeypatch.setattr(Logger, "begun", [])
    study("watch", trained, "--once")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {(stage, step) for stage, step, _ in Logger.begun[0].rows} == {
        (row["stage"], row["step"]) for row in rows}
    assert Logger.begun[0].pictures and "on to tensorboard" in capsys.readouterr().out
