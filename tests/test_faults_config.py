"""Claims about configurations, environments and numbers that once cost a run, or told something wrong."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import plumbing.errors
import plumbing.preflight
import plumbing.processes
import plumbing.run
import plumbing.stages
import plumbing.validation
import recipes.options
import perceptual
import train
from helpers import ROOT, call, command, contents, earlier, few, refusal, refused, rows
from prior_ar import ARPrior, PriorConfig, sample_logits
from plumbing.errors import UserError
from plumbing.files import read_checkpoint
from plumbing.processes import setup_device
from prior_nar import NARPrior


def test_images_in_bf16_are_normalised_in_float32():
    x = (torch.rand(2, 3, 8, 8) * 2 - 1).bfloat16()
    found = perceptual.normalize_images(x)
    assert found.dtype == torch.float32 and torch.equal(found, perceptual.normalize_images(x.float()))


SIZES = dict(codebook_size=16, num_tokens=9, n_layer=1, n_head=2, n_embd=16)


@pytest.mark.parametrize("temperature", [1e-31, 1e-300])
def test_a_temperature_that_would_overflow_the_logits_takes_the_argmax(temperature):
    torch.manual_seed(0)
    logits, u = 30 * torch.randn(5, 16), torch.rand(5)
    assert torch.equal(sample_logits(logits, u, temperature, top_p=0.9), logits.argmax(1))
    assert sample_logits(torch.tensor([[3.0, 1e7, -1e7]]), torch.tensor([0.99]), 1e-30).item() == 1
    ar, noise = ARPrior(PriorConfig(**SIZES)), torch.rand(2, 9)
    assert torch.equal(ar.generate(None, noise, temperature=temperature),
                       ar.generate(None, noise, temperature=0))
    nar, noise = NARPrior(PriorConfig(**SIZES)), torch.rand(2, 4, 2, 9)
    tokens = nar.generate(None, noise, token_temperature=temperature)
    assert torch.equal(tokens, nar.generate(None, noise, token_temperature=0))


def test_averaged_weights_slower_than_the_run_are_warned_of_at_its_start(trained, data, tmp_path, capsys):
    out = earlier(trained, tmp_path / "out", "ar")
    call("ar", out, data, **{"ar.ema": 0.9999, "ar.steps": 2})
    told = [line for line in capsys.readouterr().err.splitlines() if "is slow for" in line]
    assert len(told) == 1 and told[0].startswith("warning: ar.ema=0.9999 is slow for 2 steps")
    call("ar", out, data, **{"ar.ema": 0.9999, "ar.steps": 2})
    assert "is slow for" not in capsys.readouterr().err  # it has all its steps


def test_no_preset_averages_more_slowly_than_it_trains():
    assert not any(c[section]["ema"] ** c[section]["steps"] > 0.15 for c in recipes.options.PRESETS.values()
                   for section in plumbing.stages.SECTION.values())


def test_a_fall_of_usage_counted_on_few_tokens_is_no_alarm():
    c = recipes.options.PRESETS["demo"]["phase1"]

    def alarms(counted):
        lines = [dict(stage="phase1", usage=usage, usage_tokens=counted) for usage in (0.25, 0.05)]
        return plumbing.validation.early_warnings(lines, "phase1", c, 64)

    assert alarms(16) == alarms(639) == {} and list(alarms(640)) == ["usage"]


@pytest.mark.slow
def test_the_log_says_on_how_many_tokens_usage_was_counted_and_notes_where_they_are_few(
        trained, data, tmp_path, capsys):
    out = earlier(trained, tmp_path / "out", "phase1")
    capsys.readouterr()
    call("phase1", out, data, "--eval-every", 3, **{"tokenizer.codebook_size": 512})
    said = capsys.readouterr().out
    told = [row["usage_tokens"] for row in rows(out, "phase1") if "usage" in row]
    assert told == [20 * 16] * 2  # validation images times tokens
    assert said.count("320 validation tokens, few for 512 codes") == 1
    assert json.loads((trained / "summary.json").read_text())["usage_tokens"] == 320


@pytest.mark.slow
def test_a_backend_that_a_notebook_left_behind_does_not_reach_matplotlib(tmp_path):
    code = ("from pathlib import Path; from plumbing import drawing; from studies import sweep; "
            f"drawing.save_figure(drawing.new_figure(1, 1), {str(tmp_path / 'a.png')!r}, []); "
            "rows = [dict(top_p=1.0, fd=1.0)]; "
            "sweep.draw_sweep(rows, 'top_p', dict(num_images=1, extractor='x'), "
            f"Path({str(tmp_path / 'b.png')!r}))")
    environment = os.environ | dict(MPLBACKEND="module://matplotlib_inline.backend_inline")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


TORCHRUN = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1234")


def left_behind(monkeypatch, variables):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables, named", [
    (dict(WORLD_SIZE="2"), "RANK expected"), (dict(TORCHRUN, LOCAL_RANK="0", MASTER_PORT="x"), "'x'")])
def test_variables_that_fit_no_launch_are_refused(variables, named, data, tmp_path, monkeypatch, capsys):
    left_behind(monkeypatch, variables)
    error = refusal(capsys, "vgg", tmp_path / "out", data)
    assert named in error and "torchrun" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("variables", [dict(RANK="y", LOCAL_RANK="7"), dict(WORLD_SIZE="1", RANK="5")])
def test_a_rank_without_a_launch_is_not_heeded_and_errors_are_still_told(
        variables, data, tmp_path, monkeypatch, capsys):
    left_behind(monkeypatch, variables)
    assert plumbing.processes.local_rank() == 0
    assert plumbing.processes.setup_device("cpu").type == "cpu" and plumbing.processes.world() == 1
    with pytest.raises(SystemExit), plumbing.processes.one_line_errors():
        raise plumbing.errors.UserError("told")
    assert capsys.readouterr().err == "error: told\n"


def test_what_torchrun_sets_is_heeded(monkeypatch):
    left_behind(monkeypatch, TORCHRUN)
    assert plumbing.processes.local_rank() == 1


WRONG = {  # section -> words that no preset can run with, and what the line names
    "tokenizer": (["--set", "tokenizer.base_width=6"], "heads"),
    "tokenizer key": (["--set", "tokenizer.base_with=8"], "did you mean tokenizer.base_width"),
    "tokenizer type": (["--set", "tokenizer.num_res_blocks=1.5"], "tokenizer.num_res_blocks must be a whole"),
    "discriminator": (["--set", "discriminator.max_width=0"], "discriminator.max_width must"),
    "side": (["--set", "image_size=96"], "power"),
    "vgg": (["--set", "classifier.width=0"], "classifier.width"),
    "phase1": (["--set", "phase1.alpha=2.0"], "phase1.alpha"),
    "phase2": (["--vgg", "own", "--set", "phase1.layers=A", "--set", "phase2.layers=lpips"],
               "phase2.layers=lpips needs"),
    "prior": (["--set", "prior.n_head=11"], "n_head 11"),
    "ar": (["--set", "ar.schedule=stairs"], "ar.schedule"),
    "nar": (["--set", "nar.ema=1.0"], "nar.ema"),
    "sample": (["--set", "sample.top_p=0.0"], "sample.top_p"),
}


UNREAD = [  # what nothing reads, or what trains nothing
    (["phase2.gamma=5.0"], "phase2.gamma changes nothing"),
    (["phase2.beta=1.0"], "phase2.beta changes nothing"),
    (["tokenizer.codebook=plain", "phase1.gamma=5.0"], "phase1.gamma changes nothing: this codebook has no"),
    (["discriminator.kind=patch", "discriminator.max_width=8"], "discriminator.max_width changes nothing"),
    (["discriminator.channel_multiplier=2", "discriminator.kind=patch"], "multiplier changes nothing"),
    (["phase1.schedule=exponential", "phase1.lr_end=0.0"], "phase1.lr_end must be above 0"),
    (["nar.schedule=exponential"], "nar.lr_end must be above 0"), (["phase2.ema=1.0"], "phase2.ema must be"),
    (["ar.lr=-0.001"], "ar.lr must be"), (["ar.lr_start=-1"], "ar.lr_start must be"),
    (["tokenizer.kmeans_every=5"], "codebook=entropy does not read tokenizer.kmeans_every"),
    (["tokenizer.codebook=kmeans"], "codebook=kmeans does not read tokenizer.warm_start")]


@pytest.mark.parametrize("sets, told", UNREAD)
def test_a_value_that_nothing_reads_or_that_trains_nothing_is_refused(
        sets, told, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "Run", None)  # nothing is trained where nothing is refused
    words = [word for item in sets for word in ("--set", item)]
    words += ["--stage", "phase1", "--data", "shapes", "--device", "cpu", "--out", tmp_path / "out"]
    assert told in refused(capsys, train_words, *words) and not (tmp_path / "out").exists()


def test_gamma_is_refused_where_a_fork_s_quantizer_has_no_entropy_term(capsys):
    words = "--stage", "phase1", "--set", "phase1.gamma=5.0", "--preset"
    assert "phase1.gamma changes nothing" in refused(capsys, train_words, *words, "fsq.demo")
    assert "phase1.gamma changes nothing" in refused(capsys, train_words, *words, "simvq.demo")  # is plain
    for preset in ("lfq.demo", "crt.demo", "demo-fq", "guidance.demo"):
        assert recipes.options.train_args([*words, preset])[1]["phase1"]["gamma"] == 5


def checked(stage, micro=None, **changes):
    """A stage's values of `demo`, changed, as `check_batch` looks at them before the first step."""
    config = dict(recipes.options.PRESETS["demo"])
    config[stage] = config[stage] | changes
    args = types.SimpleNamespace(stage=stage, micro_batch=micro)
    plumbing.preflight.check_batch(types.SimpleNamespace(config=config, args=args), stage)


@pytest.mark.parametrize("steps, noted", [(301, False), (300, True), (2, True)])
def test_a_learning_rate_that_never_decays_is_noted(steps, noted, capsys):
    checked("ar", steps=steps)
    checked("ar", steps=steps, schedule="constant")
    assert capsys.readouterr().out.count("does not decay in") == noted


def train_words(*words):
    train.main(*recipes.options.train_args(list(map(str, words))))


@pytest.mark.parametrize("section", WRONG)
@pytest.mark.parametrize("preset", few(recipes.options.PRESETS, 0, 7))
def test_one_wrong_value_of_any_section_is_refused_before_anything_is_written(
        preset, section, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_stage", None)  # nothing is trained where nothing is refused
    wrong, named = WRONG[section]
    stages = recipes.options.PRESETS[preset].get("stages", ["phase2"])  # imagenet-ablation has one phase
    stage = "phase2" if "phase2" not in stages and section in ("tokenizer", "phase2") else "all"
    words = ["--preset", preset, "--stage", stage, "--data", data, "--device", "cpu", *wrong]
    assert named in refused(capsys, train_words, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if section in ("prior", "discriminator"):  # one function serves both
        assert named in refused(capsys, train_words, "--preset", preset, "--explain", *wrong)


LSUN = ["--preset", "lsun-cat", "--vgg", "own", "--data", "shapes"]
FQ = ["--preset", "demo-fq", "--set", "tokenizer.teacher_widths=[0, 48]"]
LATER = [  # stage, images, further words, what the line names
    ("all", "flat", ["--vgg", "random"], "no class sub-folders"), ("all", "flat", [], "--vgg imagenet"),
    ("phase1", "flat", [], "needs labels"), ("all", "data", LSUN, "pass --tokenizer FILE"),
    ("all", "data", ["--set", "image_size=96"], "discriminator.kind=patch"),
    ("phase1", "data", FQ, "teacher vgg gives 32 features, not the 48"),
    ("phase2", "data", [], "run --stage phase1 first"),
    ("all", "data", ["--tokenizer", "phase1.pt", "--set", "tokenizer.codebook_size=64"], "size mismatch"),
    ("all", "data", ["--tokenizer", "none.pt"], "no checkpoint"),
    ("all", "data", ["--tokenizer", "vgg.pt"], "of stage 'vgg'"),
    ("all", "data", ["--set", "classifier.batch=6"], "split over 4 processes; use a multiple of 4"),
    ("all", "data", ["--set", "nar.batch=6"], "split over 4 processes; use a multiple of 4")]


@pytest.mark.parametrize("stage, images, more, named", LATER)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first_one(
        stage, images, more, named, trained, data, flat, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_stage", None)
    if "processes" in named:
        monkeypatch.setattr(plumbing.preflight, "world", lambda: 4)
    words = command(stage, tmp_path / "out", flat if images == "flat" else data)
    words += [str(trained / word) if word.endswith(".pt") else word for word in more]
    assert named in refused(capsys, train_words, *words)
    assert not (tmp_path / "out").exists()


def test_a_phase_2_of_another_phase_1_is_refused_before_the_vgg_is_trained(trained, data, tmp_path, capsys):
    out = earlier(trained, tmp_path / "out", "phase2")
    (out / "vgg.pt").unlink()
    before = contents(out)
    assert "tokenizer.bias" in refusal(capsys, "phase2", out, data, tokenizer__bias=True)
    assert contents(out) == before


def test_a_prior_is_checked_with_the_sizes_of_the_tokenizer_that_it_is_given(trained, data, tmp_path):
    """Not with the preset's, whose codes are not the ones that it will model."""
    sizes = {"tokenizer.codebook_size": 7, "tokenizer.channel_mult": [1, 2], "ar.steps": 1}
    call("ar", tmp_path / "out", data, "--tokenizer", trained / "phase1.pt", **sizes)
    prior = read_checkpoint(tmp_path / "out" / "ar.pt", ["ar"])["model_config"]
    assert (prior["codebook_size"], prior["num_tokens"]) == (32, 16)


def test_building_on_the_meta_device_draws_no_random_number():
    before = torch.get_rng_state()
    networks = plumbing.preflight.build_on_meta(recipes.options.PRESETS["demo"], recipes.options.STAGES)
    assert networks.keys() == {"vgg", "phase1", "phase2", "disc", "ar", "nar"}
    assert all(p.is_meta for network in networks.values() for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_apple_gpu_is_taken_with_a_note_that_nobody_tried_it_and_refused_where_there_is_none(
        monkeypatch, capsys):
    with pytest.raises(UserError, match="torch has no 'mps' here"):
        setup_device("mps")
    with pytest.raises(UserError, match="cuda, cpu, mps or auto, and be there: torch has no 'tpu'"):
        setup_device("tpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert setup_device("mps") == torch.device("mps") and setup_device("auto").type != "mps"
    assert capsys.readouterr().err.count("nobody has tried --device mps") == 1


@pytest.mark.parametrize("batch, micro, adv_weight, noted", [
    (8, 4, 0.1, 0), (12, 8, 0.1, 0), (6, None, 0.1, 1), (8, 6, 0.1, 1), (8, 3, 0.0, 0)])
def test_micro_batches_that_change_the_discriminator_s_groups_are_noted(
        batch, micro, adv_weight, noted, capsys):
    checked("phase1", micro=micro, batch=batch, adv_weight=adv_weight)
    assert capsys.readouterr().out.count("compares groups of 4 images") == noted


@pytest.mark.parametrize("item", ['phase1={"lr": 1}', "discriminator={}"])
def test_a_section_as_a_whole_is_no_value(item, capsys):
    error = refused(capsys, train_words, "--stage", "phase1", "--preset", "demo", "--set", item)
    assert "expected SECTION.KEY=VALUE" in error


def test_a_flag_that_changes_nothing_is_refused_or_told(trained, data, tmp_path, capsys):
    for more in [], ["--arch", "resnet"]:  # BatchNorm needs the whole batch
        assert "--micro-batch does nothing for" in refusal(
            capsys, "vgg", tmp_path / "x", data, "--micro-batch", 4, *more)
    out = earlier(trained, tmp_path / "out", "ar")
    call("ar", out, data, "--alpha", 0, "--steps", 1)
    assert "--alpha 0 changes nothing here: the tokenizer was trained with 1" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused_by_the_first(monkeypatch, capsys):
    launch = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_ADDR="x", MASTER_PORT=1)
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as stop, plumbing.processes.one_line_errors():
        plumbing.processes.setup_device("cuda")
    assert stop.value.code == 2 and "2 processes for the 1 visible GPUs" in capsys.readouterr().err


def test_the_line_of_an_error_is_the_cause_that_torchrun_prints_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    error = refused(capsys, train_words, "--stage", "ar", "--preset", "demoo")
    file = tmp_path / "error.json"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message == error.strip() == "error: there is no preset demoo; did you mean demo?"
    assert refusal(capsys, "vgg", tmp_path / "out", "nowhere").strip() in file.read_text()
