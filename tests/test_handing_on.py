"""Claims about handing a run on (studies export) and watching one (studies watch).

Neither safetensors nor a logger is among the requirements: a file of the published safetensors format is
written and read here, and what a logger is told is looked at. Both were tried with the real packages by hand.
"""

import json
import os
import resource
import shutil
import struct
import sys
import types

import numpy as np
import pytest
import torch
from helpers import call, fork, forked, open_run, refused, study, wait_for, wait_until
from PIL import Image

import recipes.options
import sample
import studies.export
import studies.watch
from plumbing.files import claim, read_checkpoint
from plumbing.hashes import latent_hash, weights_hash
from plumbing.models import find_vgg, load_model
from plumbing.preflight import check_perception
from plumbing.stages import vgg_sizes
from studies.balance import vgg_for
from studies.extractors import Extractor

KINDS = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8",
         torch.bool: "BOOL"}


def save(tensors):
    """8 bytes of length, a JSON header of types, shapes and places, then the bytes."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        new = tensor.numpy().tobytes()
        header[name] = dict(dtype=KINDS[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[len(data), len(data) + len(new)])
        data += new
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def save_file(tensors, path):
    """Its file is its owner's alone, and a full disk an error of its own."""
    try:
        path.touch(0o600)
        path.write_bytes(save(tensors))
    except OSError as error:
        raise Exception("SafetensorError") from error


def load_file(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    kinds = {name: kind for kind, name in KINDS.items()}
    found = {}
    for name, one in json.loads(content[8 : 8 + length]).items():
        a, b = (8 + length + offset for offset in one["data_offsets"])
        found[name] = torch.frombuffer(bytearray(content[a:b]), dtype=kinds[one["dtype"]]).view(one["shape"])
    return found


@pytest.fixture
def package(monkeypatch):
    module = types.SimpleNamespace(save=save, save_file=save_file, load_file=load_file)
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)


@pytest.mark.slow
def test_an_exported_run_draws_the_same_images_to_the_last_bit(trained, package, tmp_path):
    out = tmp_path / "out"
    study("export", trained, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "ar", "nar", "phase2"]
    for stage in ("phase2", "ar", "nar"):
        (ours, ckpt), (theirs, other) = (load_model(path, (stage,)) for path in (
            trained / f"{stage}.pt", out / stage))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(a, theirs.state_dict()[k]) for k, a in ours.state_dict().items())
        assert other["config"] == ckpt["config"] and other["class_names"] == ckpt["class_names"]
    for name, place in dict(a=trained / "ar.pt", b=out / "ar").items():  # its tokenizer is found beside it
        words = ["--ckpt", place, "--num", 4, "--format", "npz", "--out", tmp_path / f"{name}.npz"]
        sample.main(recipes.options.sample_args(list(map(str, words))))
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(a, b) and a.shape == (4, 32, 32, 3)
    sample.main(recipes.options.sample_args(["--ckpt", str(out / "ar"), "--num", "2"]))  # a sheet there
    study("export", trained, "--out", out)  # again: the same files
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~umask} and {"model.safetensors", "samples_ar.png"} < modes.keys()


@pytest.mark.parametrize("size", [2000, 100_000])
def test_an_export_to_a_full_disk_ends_in_one_line_whatever_its_writers_raise(
        trained, package, tmp_path, capfd, size):
    """Weights by safetensors, whose error is no OSError, and the program of torch.export, which aborts."""
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        study("export", trained, "--out", tmp_path / "out", "--decoder")

    assert forked(child) == 1
    error = capfd.readouterr().err
    assert "could not be written" in error and "GB are free" in error and "Traceback" not in error
    assert not list(tmp_path.rglob(".tmp*"))


def test_the_card_tells_the_numbers_of_the_run_and_the_licence(trained, package, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "summary.json").write_text(json.dumps(dict(psnr_phase1=17.25, preset="demo", usage=1.0)))
    study("export", run, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| psnr_phase1 | 17.25 |" in card and "MIT licence" in card and "`ar`: ar, 6 steps" in card


def test_the_exported_decoder_decodes_any_number_of_images_alike(trained, package, tmp_path):
    study("export", trained, "--out", tmp_path / "out", "--decoder")
    program = torch.export.load(tmp_path / "out" / "phase2" / "decoder.pt2").module()
    model, _ = load_model(trained / "phase2.pt", ("phase2",))
    for count in (1, 2, 5):
        tokens = torch.randint(32, (count, 16), generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            torch.testing.assert_close(program(tokens), model.decode(tokens), rtol=0, atol=1e-5)


def test_a_vgg_in_half_precision_is_the_same_wherever_it_is_loaded(trained, data, package, tmp_path):
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
    call("phase1", run, data, "--vgg", out, phase1__steps=3)  # goes on with the same VGG
    path = run / "phase1.pt"
    phase1 = load_model(path, ("phase1",))[1]
    found = [open_run("phase1", run, data, "--vgg", out).vgg, find_vgg(path, phase1, "cpu"),
             *(vgg_for(path, phase1, source, "cpu") for source in (None, str(out)))]
    assert phase1["step"] == 3 and {weights_hash(v) for v in [vgg, *found]} == {phase1["vgg_hash"]}
    assert vgg_sizes(dict(vgg=str(out), classifier={})) == ckpt["config"]["classifier"]
    with pytest.raises(ValueError, match="needs torchvision's VGG-16"):
        check_perception(dict(vgg=str(out), phase1=dict(layers="lpips")), ["phase1"])
    features = {source: Extractor(str(source), 32, "cpu").info for source in (out, trained / "vgg.pt")}
    assert features[out]["feature_layer"] == "pool" and features[out]["resize"] == "none"
    assert features[out]["extractor_hash"] == weights_hash(Extractor(str(out), 32, "cpu").network)
    assert features[out]["extractor_hash"] != features[trained / "vgg.pt"]["extractor_hash"]


@pytest.mark.slow
def test_a_run_in_half_precision_keeps_its_priors_and_its_tokenizer_together(trained, package, tmp_path):
    out = tmp_path / "out"
    study("export", trained, "--out", out, "--half")
    tokenizer, ckpt = load_model(out / "phase2", ("phase2",))
    hashes = [load_model(out / stage, (stage,))[1]["tokenizer_hash"] for stage in ("phase2", "ar", "nar")]
    assert {*hashes} == {latent_hash(tokenizer)} and hashes[0] != read_checkpoint(
        trained / "phase2.pt", ["phase2"])["tokenizer_hash"]
    sample.main(recipes.options.sample_args(["--ckpt", str(out / "ar"), "--num", "2"]))
    whole = sum((trained / f"{s}.pt").stat().st_size for s in ("phase2", "ar", "nar"))
    assert sum(p.stat().st_size for p in out.rglob("*.safetensors")) < whole / 4


def test_a_weight_too_large_for_half_precision_is_refused(trained, package, tmp_path, capsys):
    ckpt = torch.load(trained / "vgg.pt")
    next(v for v in (ckpt["ema"] or ckpt["model"]).values() if v.dim() == 2)[0, 0] = 1e5
    torch.save(ckpt, tmp_path / "vgg.pt")
    words = tmp_path / "vgg.pt", "--out", tmp_path / "out", "--half"
    assert "too large for float16" in refused(capsys, study, "export", *words)


def test_what_cannot_be_exported_or_opened_is_refused_in_one_line(trained, package, tmp_path, capsys):
    assert "holds no phase1.pt" in refused(capsys, study, "export", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    error = refused(capsys, study, "export", trained, "--out", tmp_path / "mine")
    assert "holds other files" in error and (tmp_path / "mine" / "thesis.tex").read_text() == "do not touch"
    (tmp_path / "mine" / "thesis.tex").rename(tmp_path / "mine" / "README.md")
    error = refused(capsys, study, "export", trained, "--out", tmp_path / "mine")
    assert "holds other files" in error and (tmp_path / "mine" / "README.md").read_text() == "do not touch"
    error = refused(capsys, study, "export", trained, "--out", tmp_path / "mine" / "README.md")
    assert "cannot be written" in error
    study("export", trained, "--out", tmp_path / "out")
    weights = tmp_path / "out" / "ar" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # a bit of a weight
    words = "--ckpt", tmp_path / "out" / "ar", "--num", 2

    def draw(*words):
        sample.main(recipes.options.sample_args([*map(str, words)]))

    capsys.readouterr()
    assert "damaged or no exported model" in refused(capsys, draw, *words)
    (tmp_path / "out" / "ar" / "config.json").write_text("{")
    assert "damaged or no exported model" in refused(capsys, draw, *words)


def test_without_the_package_one_line_names_it(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused(capsys, study, "export", trained, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for target in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, target, None)
        words = tmp_path, "--once", "--to", target
        assert f"pip install {target}" in refused(capsys, study, "watch", *words)
    assert "no folder of a run" in refused(capsys, study, "watch", tmp_path / "nowhere", "--once")
    for every in ("inf", "nan", "0", "1e9"):
        assert "--every" in refused(capsys, study, "watch", tmp_path, "--every", every)


class Logger:
    def __init__(self, run=None):
        self.begun = 0
        self.begin()

    def begin(self):
        self.seen, self.pictures, self.begun = [], [], self.begun + 1

    def numbers(self, stage, step, values):
        self.seen.append((stage, step, values))

    def picture(self, name, pixels, step):
        self.pictures.append((name, pixels.shape, step))

    def flush(self):
        pass

    close = flush


def test_a_watcher_hands_on_every_line_and_picture_once_and_waits_for_half_lines(tmp_path):
    follower = studies.watch.Follower(tmp_path, Logger())
    assert follower.follow() == 0  # nothing is there yet
    lines = [dict(stage="ar", step=i, loss=1.0 / i, told="word", flags=[1]) for i in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = tmp_path / "metrics.jsonl"
    path.write_text(text[:-10])
    Image.new("RGB", (8, 6)).save(tmp_path / "samples.png")
    assert follower.follow() == 3
    assert follower.target.seen == [("ar", 1, {"loss": 1.0}), ("ar", 2, {"loss": 0.5})]
    assert follower.target.pictures == [("samples", (6, 8, 3), 2)]
    assert follower.follow() == 0
    path.write_text(text + "{torn\n" + json.dumps(dict(stage="nar", step=1, loss=2.0)) + "\n")
    assert follower.follow() == 2 and follower.target.seen[2:] == [
        ("ar", 3, {"loss": 1 / 3}), ("nar", 1, {"loss": 2.0})]
    Image.new("RGB", (8, 6)).save(tmp_path / ".tmp1.samples.png")  # being written
    assert follower.follow() == 0


def test_what_a_resumed_run_takes_out_of_its_log_is_taken_back_and_no_curve_runs_backwards(tmp_path):
    """The kind: after a kill and a resume, a target that only appends holds step 3 before another step 2."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(dict(stage="ar", step=step, loss=1.0)) + "\n" for step in (1, 2, 3)]
    follower = studies.watch.Follower(tmp_path, target := Logger())
    path.write_text("".join(lines) + "{torn")
    Image.new("RGB", (8, 6)).save(tmp_path / "samples.png")
    assert follower.follow() == 4 and follower.follow() == 0 and target.begun == 1
    path.write_text(lines[0] + json.dumps(dict(stage="ar", step=2, loss=0.5)) + "\n")
    assert follower.follow() == 3 and follower.follow() == 0 and target.begun == 2
    assert target.seen == [("ar", 1, {"loss": 1.0}), ("ar", 2, {"loss": 0.5})] and target.pictures


def test_a_second_watcher_of_a_run_is_refused_while_the_first_one_watches(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.watch.TARGETS, "tensorboard", Logger)

    def other():
        lock = claim(tmp_path / "tensorboard")
        (tmp_path / "held").touch()
        wait_until((tmp_path / "done").exists)
        lock.close()

    child = fork(other)
    wait_until((tmp_path / "held").exists)
    assert "end it first" in refused(capsys, study, "watch", tmp_path, "--once")
    (tmp_path / "done").touch()
    assert wait_for(child) == 0
    study("watch", tmp_path, "--once")


def test_the_command_looks_at_a_run_once(trained, tmp_path, monkeypatch, capsys):
    trained, loggers = shutil.copytree(trained, tmp_path / "run"), [Logger()]
    monkeypatch.setitem(studies.watch.TARGETS, "tensorboard", lambda run: loggers[0])
    study("watch", trained, "--once")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(loggers[0].seen) == len(rows) and loggers[0].pictures
    assert {(stage, step) for stage, step, _ in loggers[0].seen} == {(r["stage"], r["step"]) for r in rows}
    assert "handed on to tensorboard" in capsys.readouterr().out

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(studies.watch.time, "sleep", interrupted)
    study("watch", trained)  # Ctrl-C ends it without a traceback
    assert "Ctrl-C ends watching" in capsys.readouterr().out
