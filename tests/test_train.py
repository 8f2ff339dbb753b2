"""Claims about train.py: presets, schedules, accumulation, processes, both phases, refusals.

What happens when something fails is in test_reliability.py.
"""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
import types
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import forks
import perceptual
import plumbing.codes
import plumbing.dataset
import plumbing.images
import plumbing.classifiers
import plumbing.processes
import plumbing.run
import recipes.ablations
import recipes.options
import recipes.paper
import recipes.small
import studies.cost
from helpers import (
    ROOT, STEPS, call, command, contents, differing, earlier, few, forked, open_run, refusal,
    refused, rows, script,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from plumbing.files import read_checkpoint
from plumbing.hashes import latent_hash
from plumbing.models import load_model

# Schedules and presets ------------------------------------------------------------------------------------


def test_the_schedules_pass_through_the_points_of_tables_9_and_10():
    phase1, ar, nar = (recipes.options.PRESETS["imagenet"][stage] for stage in ("phase1", "ar", "nar"))
    middle = (80_000 + 1_500_000) // 2
    for c, step, lr in [
        (phase1, 0, 1e-4), (phase1, 250_000, 7.5e-5), (phase1, 500_000, 5e-5),
        (phase1, 125_000, 7.5e-5 + 2.5e-5 * math.cos(math.pi / 4)),  # no straight line
        (ar, 0, 1e-4), (ar, 80_000, 1e-4), (ar, middle, (1e-4 * 5e-6) ** 0.5), (ar, 1_500_000, 5e-6),
        (nar, 0, 1e-4), (nar, 50_000, 1e-4), (nar, 775_000, 5e-5), (nar, 1_500_000, 0),
        (recipes.options.PRESETS["imagenet"]["phase2"], 123_456, 5e-5),
    ]:
        assert train.lr_at(step, c) == pytest.approx(lr, rel=1e-9, abs=1e-20)
    assert train.lr_at(80_001, ar) < 1e-4 and train.lr_at(50_001, nar) < 1e-4


def test_warm_up_grows_in_a_straight_line_and_then_changes_nothing():
    plain = recipes.options.PRESETS["imagenet"]["ar"]
    warm = dict(plain, warmup=100)
    assert [train.lr_at(step, warm) for step in (0, 49, 99)] == pytest.approx([1e-6, 5e-5, 1e-4])
    assert train.lr_at(100_000, warm) == train.lr_at(100_000, plain)


@pytest.mark.parametrize(
    "preset, batches, steps, lr, priors, nar_temperature, top_p",
    [
        ("imagenet", (256, 128), (500_000, 200_000), (1e-4, "cosine"), (256, 1_500_000), 0.45, 0.92),
        ("ffhq", (64, 32), (300_000, 200_000), (1e-4, "cosine"), (32, 500_000), 0.65, 0.98),
        ("lsun-cat", (64, 64), (26_000, 200_000), (5e-5, "constant"), (256, 500_000), 0.65, 0.98),
        ("lsun-bedroom", (64, 64), (48_000, 200_000), (5e-5, "constant"), (256, 500_000), 0.65, 0.98),
        ("lsun-church", (32, 32), (4_000, 200_000), (5e-5, "constant"), (64, 500_000), 0.65, 0.98),
    ],
)
def test_each_preset_equals_its_column_of_tables_9_and_10(
    preset, batches, steps, lr, priors, nar_temperature, top_p
):
    c = recipes.options.PRESETS[preset]
    first, second, ar, nar = (c[stage] for stage in ("phase1", "phase2", "ar", "nar"))
    assert (first["batch"], second["batch"]) == batches and (first["steps"], second["steps"]) == steps
    assert (first["lr"], first["schedule"]) == lr and first["lr_end"] == 5e-5 and first["lr_start"] == 0
    assert first["init"] == ("required" if preset.startswith("lsun") else None)
    assert (second["lr"], second["schedule"]) == (5e-5, "constant")
    assert (first["betas"], second["betas"]) == ([0.9, 0.99], [0.5, 0.9])
    assert (first["alpha"], second["alpha"]) == (1, 0)
    for phase in (first, second):
        assert (phase["beta"], phase["gamma"], phase["weight_decay"], phase["ema"]) == (0.25, 0.01, 0, 0)
    for prior in (ar, nar):
        assert (prior["batch"], prior["steps"], prior["lr"]) == (*priors, 1e-4)
        assert (prior["betas"], prior["weight_decay"], prior["ema"]) == ([0.9, 0.96], 1e-2, 0)
    assert (ar["schedule"], ar["lr_start"], ar["lr_end"]) == ("exponential", 80_000, 5e-6)
    assert (nar["schedule"], nar["lr_start"], nar["lr_end"]) == ("linear", 50_000, 0)
    wanted = dict(top_p=top_p, nar_steps=12, choice_temperature=nar_temperature, temperature=1)
    assert wanted.items() <= c["sample"].items()
    assert c["image_size"] == 256 and c["vgg"] == "imagenet" and c["tokenizer"] == {}
    assert c["prior"] == dict(n_layer=24, n_head=16, n_embd=768, dropout=0.1)
    assert c["conditional"] == (preset == "imagenet")


@pytest.mark.parametrize("preset", recipes.options.PRESETS)
def test_all_presets_have_the_same_keys(preset):
    for key, value in recipes.paper.IMAGENET.items():
        if isinstance(value, dict) and key != "tokenizer":
            assert recipes.options.PRESETS[preset][key].keys() == value.keys()
    assert recipes.options.PRESETS[preset].keys() - {"stages"} == recipes.paper.IMAGENET.keys()


def test_weight_decay_is_on_matrices_of_linear_layers_and_convolutions_only():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4))
    optimizer = train.build_optimizer(module, recipes.options.PRESETS["imagenet"]["ar"])
    assert isinstance(optimizer, torch.optim.AdamW) and list(optimizer.defaults["betas"]) == [0.9, 0.96]
    decayed, others = optimizer.param_groups
    assert [p is module[0].weight for p in decayed["params"]] == [True] and decayed["weight_decay"] == 1e-2
    assert len(others["params"]) == 4 and others["weight_decay"] == 0
    plain = train.build_optimizer(module, recipes.options.PRESETS["imagenet"]["phase1"])
    assert type(plain) is torch.optim.Adam and plain.defaults["weight_decay"] == 0


# The command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ("--set nothing=1", "nothing"),
        ("--set phase1.lr", "phase1.lr"),
        ("--set phase1.lr=fast", "phase1.lr"),
        ("--set phase1.batch=0", "phase1.batch"),
        ("--set conditional=maybe", "conditional"),
        ("--set phase1.betas=[2,3]", "phase1.betas"),
        ("--set phase1.lr=NaN", "phase1.lr"),
        ("--set phase1.gamma=Infinity", "phase1.gamma"),
        ("--set discriminator.kind=patchh", "discriminator.kind"),
        ("--set precision=fp8", "precision"),
        ("--set limit=abc", "limit"), ("--set limit=2.5", "limit must be a whole number"),
        ('--set phase1.betas=["a",0.9]', "phase1.betas"), ("--set phase1.betas=[null,0.9]", "phase1.betas"),
        ("--set phase1.init=FILE", "phase1.init"), ("--set sample.guidance=2", "sample.guidance"),
        ("--set data=5", "data"),
        ("--precision fp16", "bf16"),
        ("--timeout nan", "--timeout"),
        ("--seed 1208925819614629174706176", "--seed"),
        ("--pres demo", "did you mean --preset?"),
        ("--batch x", "--batch"),
        ("--micro-batch -1", "--micro-batch"),
        ("--alpha 2", "alpha"),
        ("--limit -3", "--limit"),
        ("--preset imagenette", "imagenet"),
        ("--stepz=5", "did you mean --steps?"),
        ("--stage all --steps 5", "phase1.steps"),
        ("--stage phase3", "phase3"),
        ("", "--stage is missing"),
    ],
)
def test_a_wrong_command_line_ends_with_exit_code_2_and_names_the_cause(words, message, capsys):
    words = words if "--stage" in words or not words else f"--stage phase1 {words}"
    assert message in refused(capsys, recipes.options.train_args, words.split())


def test_flags_and_set_are_written_into_a_copy_of_the_preset():
    words = "--stage ar --steps 7 --batch 3 --alpha 0.5 --seed 4 --limit 9 --set ar.lr=0.5"
    _, config = recipes.options.train_args([*words.split(), "--set", "tokenizer.bias=true"])
    assert (config["ar"]["steps"], config["ar"]["batch"], config["ar"]["lr"]) == (7, 3, 0.5)
    assert (config["phase1"]["alpha"], config["seed"], config["limit"]) == (0.5, 4, 9)
    assert config["tokenizer"]["bias"] is True
    assert recipes.options.train_args(["--stage", "vgg", "--steps", "7"])[1]["classifier"]["steps"] == 7
    assert "bias" not in recipes.small.DEMO["tokenizer"] and recipes.small.DEMO["ar"]["steps"] != 7


# Resuming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", few(recipes.options.STAGES, 0))
def test_a_finished_stage_started_again_changes_no_checkpoint(trained, data, tmp_path, stage):
    out = tmp_path / "again"
    shutil.copytree(trained, out)
    before = contents(out)
    call(stage, out, data)
    assert contents(out) == before


@pytest.mark.parametrize(
    "stage, sets, name",
    few([
        ("phase1", dict(phase1__lr=1e-3), "phase1.lr"),
        ("phase2", dict(discriminator__max_width=4), "phase1.pt was made with discriminator.max_width"),
        ("phase1", dict(seed=1), "seed"),
        ("phase2", dict(phase2__per_weight=2.0), "phase2.per_weight"),
        ("vgg", dict(classifier__width=8), "classifier.width"),
        ("ar", dict(prior__n_embd=16), "prior.n_embd"),
        ("nar", dict(limit=20), "limit"),
    ], 0, 1),
)
def test_a_run_is_not_continued_with_other_settings(trained, data, capsys, stage, sets, name):
    before = contents(trained)
    error = refusal(capsys, stage, trained, data, **sets)
    assert f"{name} = " in error and "--out" in error
    assert contents(trained) == before


# Accumulation and processes -------------------------------------------------------------------------------


def losses(out, stage):
    return [{k: v for k, v in row.items() if k.startswith(("loss", "val_l"))} for row in rows(out, stage)]


def check_losses(found, expected, rel):
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=rel, abs=rel / 100)


# Sums in another order are compared in double precision, where rounding grows to 1e-9 of a gradient at most.
# In single precision it flips a ReLU, a maximum or a code now and then, which moves whole layers by percents.
DOUBLE = "import torch; torch.set_default_dtype(torch.float64); torch.Tensor.float = torch.Tensor.double"


def call_in_double(*words, **sets):
    assert forked(lambda: (exec(DOUBLE, {}), call(*words, **sets)), patience=600) == 0


def check_same_sums(found, expected, stage):
    """The losses of two runs, and what Adam sums up of all gradients, differ by rounding alone."""
    check_losses(losses(found, stage), losses(expected, stage), 1e-4)  # as many digits are logged
    two, one = (moments(read_checkpoint(folder / f"{stage}.pt", (stage,))["train"])
                for folder in (found, expected))
    largest = max(m.norm() for m in one.values())
    assert two.keys() == one.keys() and len(one) > 10 and largest.dtype == torch.float64
    for name, mean in one.items():
        if mean.norm() > 1e-7 * largest:  # less is nothing but rounding: a bias ahead of a norm
            assert (two[name] - mean).norm() < 1e-6 * mean.norm(), name


def moments(train):
    """{name: Adam's mean of the gradients} of all optimizers in a checkpoint."""
    return {f"{name}.{i}": state["exp_avg"] for name, part in train.items()
            if isinstance(part, dict) and "state" in part for i, state in part["state"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage, micro, adv_start", [
    ("phase1", 4, 0.0), ("phase1", 4, 1.0), ("ar", 3, 0.0), ("nar", 3, 0.0)])
def test_micro_batches_equal_one_batch(trained, data, tmp_path, stage, micro, adv_start):
    """With the GAN too: groups of four neighbours share the minibatch statistics."""
    for name, size in (("one", 8), ("more", micro)):
        out = earlier(trained, tmp_path / name, stage)
        call_in_double(stage, out, data, "--micro-batch", size, phase1__adv_start=adv_start,
                       prior__dropout=0.0)
    assert stage != "phase1" or ("loss_disc" in rows(out)[0]) == (adv_start == 0)
    check_same_sums(tmp_path / "more", tmp_path / "one", stage)


class HostWaits(TorchDispatchMode):
    """Notes each value that is read, for which the host would wait for a GPU. Data, seeds and the counter of
    AveragedModel are the host's own."""

    HOST = {"dataset.py", "processes.py", "codes.py", "swa_utils.py"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            files = {Path(frame.filename).name for frame in traceback.extract_stack()}
            self.seen += [] if files & self.HOST else [name]
        return function(*args, **(kwargs or {}))


def host_waits(stage, monkeypatch, out, data):
    """What the third step of a stage waits for; it neither logs nor saves."""
    real, waits = plumbing.run.Run.loop, HostWaits()

    def loop(run, stage, start):
        for step in real(run, stage, start):
            with waits if step == 2 else contextlib.nullcontext():
                yield step

    monkeypatch.setattr(plumbing.run.Run, "loop", loop)
    call(stage, out, data, "--log-every", 100, "--save-every", 100, phase1__adv_start=0.0, phase1__steps=4)
    return waits.seen


@pytest.mark.parametrize("stage", few(["ar", "vgg", "phase1", "phase2", "nar"], 0))
def test_a_training_step_never_waits_for_the_device(trained, data, tmp_path, monkeypatch, stage):
    """R1 included: it is due at every second step of the tiny run."""
    out = earlier(trained, tmp_path / "out", stage)
    assert host_waits(stage, monkeypatch, out, data) == []


@pytest.mark.slow
def test_that_one_which_reads_a_gradient_is_noticed(trained, data, tmp_path, monkeypatch):
    real = plumbing.run.Run.update

    def update(run, optimizer, *words):
        optimizer.param_groups[0]["params"][0].grad.norm().item()
        real(run, optimizer, *words)

    monkeypatch.setattr(plumbing.run.Run, "update", update)
    assert host_waits("ar", monkeypatch, earlier(trained, tmp_path / "out", "ar"), data) != []


def test_the_unigram_entropy_is_that_of_all_classes_in_whatever_order_the_images_are():
    tokens = (torch.arange(40_000) // 10_000)[:, None].expand(-1, 3)  # four classes, a code for each
    assert plumbing.codes.unigram_entropy(tokens, 8) == pytest.approx(math.log(4), abs=1e-3)
    assert plumbing.codes.unigram_entropy(tokens[:7], 8) == 0  # fewer images than it draws
    pair = torch.stack([tokens, torch.zeros_like(tokens)], -1)  # the mean of two sub-codebooks
    assert plumbing.codes.unigram_entropy(pair, 8) == pytest.approx(math.log(4) / 2, abs=1e-3)


DRIVER = DOUBLE + """
import json, sys
import train
from plumbing.processes import rank
from recipes.options import train_args

for words in json.loads(sys.argv[1]):
    run = train.Run(*train_args(words))
    train.train_stage(run, words[1])
found, model = [], torch.nn.ModuleDict(dict(encoder=torch.nn.Linear(1, 1), decoder=torch.nn.Linear(1, 1)))
model.sizes = {}
for part in ("encoder", "decoder"):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1)
    if rank() == 1:
        torch.nn.init.constant_(model[part].bias, 2)
    try:
        run.save("differ", 0, model)
    except RuntimeError as error:
        found.append(str(error))
if rank() == 0:
    print("REFUSED", json.dumps(found))
train.main(*train_args(words))
"""
DIST = [(stage, (), dict(prior__dropout=0.0)) for stage in recipes.options.STAGES]
DIST += [("phase1", ("--micro-batch", 2), dict(phase1__adv_start=1.0))]
DIST += [("phase1", ("--steps", 3), dict(discriminator__kind="patch", discriminator__max_width=16,
                                         phase1__adv_start=0.0))]


@pytest.fixture(scope="module")
def two_processes(trained, data, tmp_path_factory):
    """The output of one torchrun that trains all of DIST, each in a folder of its own, and the folders."""
    folders = [earlier(trained, tmp_path_factory.mktemp("dist"), stage) for stage, *_ in DIST]
    words = [command(stage, folders[i], data, *more, **sets) for i, (stage, more, sets) in enumerate(DIST)]
    driver = folders[0] / "driver.py"
    driver.write_text(DRIVER)
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, driver, json.dumps(words)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, folders


@pytest.mark.dist
@pytest.mark.parametrize("case", range(len(DIST)), ids=[*recipes.options.STAGES, "micro-batch", "patch"])
def test_two_processes_equal_one_with_the_same_global_batch(two_processes, trained, data, tmp_path, case):
    stage, more, sets = DIST[case]
    out = earlier(trained, tmp_path / "one", stage)
    call_in_double(stage, out, data, *[8 if word == 2 else word for word in more], **sets)
    check_same_sums(two_processes[1][case], out, stage)


@pytest.mark.dist
def test_weights_that_differ_between_processes_are_never_saved(two_processes):
    stdout, folders = two_processes
    found = json.loads(next(line for line in stdout.splitlines() if line.startswith("REFUSED"))[8:])
    assert len(found) == 2 and all("differ between processes" in message for message in found)
    assert not (folders[-1] / "differ.pt").exists()


# The two phases and the GAN -------------------------------------------------------------------------------


def test_phase_2_leaves_encoder_codebook_and_tokens_bit_equal_and_trains_the_decoder_alone(trained, data):
    first, _ = load_model(trained / "phase1.pt", ["phase1"])
    second, ckpt = load_model(trained / "phase2.pt", ["phase2"])
    for name, value in first.state_dict().items():
        if not name.startswith("decoder."):
            assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.decoder.conv_out.weight, second.decoder.conv_out.weight)
    assert latent_hash(first) == latent_hash(second) == ckpt["tokenizer_hash"]
    assert read_checkpoint(trained / "phase1.pt", ["phase1"])["tokenizer_hash"] == latent_hash(first)
    val = open_run("phase2", trained, data).val
    x = plumbing.images.to_float(torch.stack([val.view(i) for i in range(20)]), "cpu")
    assert torch.equal(first.encode(x), second.encode(x)) and len(first.encode(x).unique()) > 1
    groups = ckpt["train"]["opt_g"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(list(second.decoder.parameters()))
    latent = {"loss_commit", "loss_codebook", "loss_entropy"}
    assert all(latent <= row.keys() for row in rows(trained, "phase1")[:-1])
    assert not any(latent & row.keys() for row in rows(trained, "phase2"))


def test_phase_2_starts_as_the_decoder_and_the_discriminator_of_phase_1(trained, data):
    run = open_run("phase2", trained, data)
    first, ckpt = load_model(trained / "phase1.pt", ["phase1"])
    first.to(memory_format=torch.contiguous_format)
    second, disc = train.build_tokenizer(run, "phase2")
    assert all(p.is_contiguous() for p in second.parameters())  # channels_last trains ten times slower
    x = plumbing.images.to_float(torch.stack([run.val.view(i) for i in range(4)]), "cpu")
    with torch.no_grad():
        assert torch.equal(second.decode(second.encode(x)), first.decode(first.encode(x)))
    assert len(list(second.parameters())) > len(list(first.parameters()))
    assert differing(disc, ckpt["train"]["disc"]) == [] and disc


def test_before_adv_start_the_discriminator_is_untouched_and_the_loss_has_no_adversarial_part(
    trained, data, tmp_path
):
    out = earlier(trained, tmp_path / "out", "phase1")
    call("phase1", out, data, phase1__adv_start=1.0, phase1__steps=2)
    initial = train.build_discriminator(open_run("phase1", out, data), {}).state_dict()
    assert differing(read_checkpoint(out / "phase1.pt", ["phase1"])["train"]["disc"], dict(initial)) == []
    assert not any("loss_adv" in row or "loss_disc" in row for row in rows(out))
    assert all(row["adv_weight"] == 0 for row in rows(out, "phase1")[:-1])
    late = dict(adv_start=0.5, adv_ramp=0.25, adv_weight=0.1, steps=8)
    ramp = [train.adv_ramp(step, late) for step in range(8)]
    assert ramp == pytest.approx([0, 0, 0, 0, 0.05, 0.1, 0.1, 0.1])


def test_each_player_s_step_leaves_the_other_player_alone(trained, data, tmp_path, monkeypatch):
    """Looks at weights and gradients of both whenever an optimizer steps."""
    players, seen, build, real = [], [], train.build_optimizer, plumbing.run.Run.update

    def copies():
        weights = [[p.detach().clone() for p in player.parameters()] for player in players]
        grads = [[None if p.grad is None else p.grad.clone() for p in x.parameters()] for x in players]
        return weights, grads

    def update(run, optimizer, name, clip):
        before = copies()
        real(run, optimizer, name, clip)
        seen.append((int(name == "discriminator"), before, copies()))

    monkeypatch.setattr(train, "build_optimizer", lambda model, c: players.append(model) or build(model, c))
    monkeypatch.setattr(plumbing.run.Run, "update", update)
    call("phase1", earlier(trained, tmp_path / "out", "phase1"), data, phase1__adv_start=0.0,
         phase1__steps=2)
    assert [player for player, *_ in seen] == [0, 1] * 2
    for player, before, after in seen:
        assert differing(before[0][1 - player], after[0][1 - player]) == []
        assert differing(before[0][player], after[0][player])
    for (_, _, generator), (_, disc_before, _) in zip(seen[::2], seen[1::2], strict=True):
        assert differing(generator[1][0], disc_before[1][0]) == []  # the tokenizer's gradients
    for (_, _, disc_after), (_, generator, _) in zip(seen[1::2], seen[2::2], strict=False):
        assert differing(disc_after[1][1], generator[1][1]) == []  # the discriminator's


# Cached codes ---------------------------------------------------------------------------------------------


def test_codes_are_reused_while_nothing_changes_and_made_again_for_another_tokenizer(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "ar")
    run = open_run("ar", out, data)
    tokenizer, _ = load_model(out / "phase2.pt", ["phase2"])
    (out / "codes.pt").unlink()

    def made():
        codes = plumbing.codes.cached_codes(run, tokenizer)
        return (out / "codes.pt").stat().st_ino, codes["train"].clone()  # a new file has a new inode

    first = made()
    assert made()[0] == first[0]
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight += 1  # decides no token
    assert made()[0] == first[0]
    with torch.no_grad():
        tokenizer.encoder.conv_in.weight.add_(torch.randn_like(tokenizer.encoder.conv_in.weight))
    assert not torch.equal(made()[1], first[1])


def test_variants_0_and_1_are_the_central_crop_and_its_mirror_image(trained, data):
    run = open_run("ar", trained, data)
    tokenizer, _ = load_model(trained / "phase1.pt", ["phase1"])
    codes = torch.load(trained / "codes.pt", weights_only=True)
    assert codes["train"].shape == (2, 60, 16) and codes["val"].shape == (20, 16)
    for variant, flip in ((0, False), (1, True)):
        x = plumbing.images.to_float(torch.stack([run.train.view(i, flip=flip) for i in range(60)]), "cpu")
        same = (tokenizer.encode(x) == codes["train"][variant]).float().mean()
        assert same > 0.98  # all, but for ties that another batch size rounds differently
    assert (codes["train"][0] != codes["train"][1]).any()
    x = plumbing.images.to_float(torch.stack([run.val.view(i) for i in range(20)]), "cpu")
    assert (tokenizer.encode(x) == codes["val"]).float().mean() > 0.98


def test_variants_from_2_on_are_random_crops_every_second_one_mirrored(trained, data, monkeypatch, tmp_path):
    views = []
    monkeypatch.setattr(plumbing.codes, "encode_all", lambda *args: views.append(args[2]) or dict(
        tokens=torch.zeros(len(views[-1]), 16, dtype=torch.int16), labels=torch.zeros(300, dtype=int)))
    run = open_run("ar", tmp_path, data, code_variants=5)
    plumbing.codes.cached_codes(run, load_model(trained / "phase1.pt", ["phase1"])[0])
    asked = [views[0][60 * v : 60 * (v + 1)] for v in range(5)]
    assert [{flip for *_, flip in part} for part in asked] == [{False}, {True}, {False}, {True}, {False}]
    seeds = [{seed for *_, seed, _ in part} for part in asked]
    assert seeds[:2] == [{None}, {None}] and len(set.union(*seeds[2:])) == 3 * 60
    assert all([index for _, index, *_ in part] == list(range(60)) for part in asked)


# Refusals -------------------------------------------------------------------------------------------------


def test_shifted_images_are_crops_of_the_reflected_image_and_depend_on_seed_step_and_row_alone():
    x = torch.arange(24 * 3 * 16 * 16.0).view(24, 3, 16, 16)
    shifted, padded = (
        plumbing.classifiers.random_shift(x, 0, 5, 24),
        torch.nn.functional.pad(x, (2,) * 4, mode="reflect"),
    )
    places = []
    for image, whole in zip(shifted, padded, strict=True):
        found = [(t, left) for t in range(5) for left in range(5)
                 if torch.equal(image, whole[:, t : t + 16, left : left + 16])]
        assert len(found) == 1
        places += found
    assert {t for t, _ in places} == {left for _, left in places} == set(range(5))
    assert torch.equal(plumbing.classifiers.random_shift(x, 0, 5, 24), shifted)
    assert not torch.equal(plumbing.classifiers.random_shift(x, 0, 6, 24), shifted)


def test_a_batch_of_codes_has_the_labels_of_its_images_and_takes_turns_with_their_variants(trained, data):
    run, num = open_run("ar", trained, data), 60
    codes = dict(train=torch.stack([torch.arange(num) * 10 + v for v in range(3)])[..., None],
                 labels=torch.arange(num) + 1000)
    tokens, labels = (torch.cat(parts) for parts in zip(
        *(plumbing.codes.code_batch(run, codes, step, 20) for step in range(6)), strict=True))
    assert torch.equal(tokens[:, 0] // 10 + 1000, labels)
    assert all(labels[part].unique().numel() == num for part in (slice(0, 60), slice(60, 120)))  # two epochs
    assert set((tokens % 10).flatten().tolist()) == {0, 1, 2}


def test_the_gradients_of_a_step_are_those_of_eq_2_and_of_the_discriminator_s_loss(
        trained, data, tmp_path, monkeypatch):
    sets = dict(phase1__adv_start=0.0, phase1__adv_ramp=0.0, phase1__steps=1)
    out, found = earlier(trained, tmp_path / "out", "phase1"), {}

    def spy(run, optimizer, name, clip=0.0):
        found[name] = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

    monkeypatch.setattr(plumbing.run.Run, "update", spy)
    call("phase1", out, data, **sets)
    run = open_run("phase1", out, data, **sets)
    tokenizer, disc = train.build_tokenizer(run, "phase1")[0].train(), train.build_discriminator(run, {})
    x = plumbing.images.to_float(next(plumbing.dataset.batches(run.train, 8, 0, 0))[0], "cpu")
    x_hat, _, latent = tokenizer(x)
    rec = (x_hat - x).abs().mean() + 0.03 * perceptual.perceptual_loss(
        run.vgg, x, x_hat, perceptual.layer_weights(1.0))
    adv, weight = perceptual.adv_loss(disc(x_hat)), 0.1
    loss = rec + latent["loss_codebook"] + 0.25 * latent["loss_commit"] + 0.1 * latent["loss_entropy"]
    expected = torch.autograd.grad(loss + weight * adv, list(tokenizer.parameters()))
    torch.testing.assert_close(found["tokenizer"], list(expected), rtol=1e-3, atol=1e-6)
    loss = perceptual.disc_loss(disc(x), disc(x_hat.detach()))
    loss = loss + 2 * perceptual.r1_penalty(disc, x, 0.1)  # every second step, so twice
    expected = torch.autograd.grad(loss, list(disc.parameters()))
    torch.testing.assert_close(found["discriminator"], list(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_codebook_that_was_overwritten_starts_with_new_moments(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "phase1")
    call("phase1", out, data, tokenizer__warm_start=2, phase1__steps=3)
    states = torch.load(out / "phase1.pt", weights_only=True)["train"]["opt_g"]["state"]
    names = [name for name, _ in load_model(out / "phase1.pt", ("phase1",))[0].named_parameters()]
    steps = {name: int(states[i]["step"]) for i, name in enumerate(names)}
    assert steps.pop("quantizer.codebook.weight") == 1 and set(steps.values()) == {3}


@pytest.mark.slow
def test_a_data_set_with_five_validation_images_goes_through_all_stages_to_its_summary(
        data, tmp_path):
    for split, count in (("train", 6), ("val", 1)):
        for folder in sorted((data / split).iterdir())[:5]:
            for file in sorted(folder.iterdir())[:count]:
                (tmp_path / split / folder.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / split / folder.name)
    stages = ("classifier", "phase1", "phase2", "ar", "nar")
    call("all", tmp_path / "out", tmp_path, **{f"{stage}__steps": 2 for stage in stages})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["num_val"], summary["num_samples"]) == (5, 50)
    assert (tmp_path / "out" / "phases.png").exists()


@pytest.mark.parametrize("stage, name", few([("phase2", "phase1"), ("ar", "phase2")], 0))
def test_a_checkpoint_made_with_another_tokenizer_is_not_continued(
        trained, data, tmp_path, capsys, stage, name):
    out = earlier(trained, tmp_path / "out", stage)
    shutil.copy(trained / f"{stage}.pt", out)
    ckpt = torch.load(out / f"{name}.pt", weights_only=True)
    ckpt["ema"]["quantizer.codebook.weight"] += 1e-3
    torch.save(ckpt, out / f"{name}.pt")
    before = contents(out)
    error = refusal(capsys, stage, out, data)
    assert "was made with tokenizer" in error and f"{stage}.previous.pt away" in error
    assert contents(out) == before
    for file in (out / f"{stage}.pt", out / f"{stage}.previous.pt"):  # as it says
        file.unlink(missing_ok=True)
    call(stage, out, data, **{f"{stage}__steps": 1})


def test_a_finished_phase_of_lpips_is_not_asked_for_the_vgg_of_the_other_phase(trained, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    ckpt = torch.load(out / "phase2.pt", weights_only=True)
    ckpt["config"]["phase2"]["layers"], ckpt["vgg_hash"] = "lpips", None
    torch.save(ckpt, out / "phase2.pt")
    run = open_run("phase2", out, data, phase2__layers="lpips")
    run.vgg  # noqa: B018  loaded for phase 1
    assert run.start("phase2") == ckpt["step"]


def test_another_tokenizer_to_start_from_is_noted_where_phase_1_goes_on(trained, data, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out")
    call("phase1", tmp_path / "out", data, "--tokenizer", trained / "phase1.pt")
    assert "phase1.pt is where a new one begins" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["vgg", "phase1"])
def test_more_steps_of_what_later_stages_were_made_from_are_refused_before_they_begin(
        trained, data, tmp_path, capsys, stage):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before, section = contents(out), "classifier" if stage == "vgg" else stage
    error = refusal(capsys, "all", out, data, **{f"{section}__steps": 50})
    assert f"{stage}.pt would go on to 50 steps" in error and "use another --out" in error
    assert contents(out) == before


@pytest.mark.parametrize(
    "stage, words, sets, message",
    [
        ("phase1", ["--data", "nowhere"], {}, "nowhere does not exist"),
        ("phase1", ["--data", "EMPTY"], {}, "no images under"),
        ("phase2", [], {}, "run --stage phase1 first"),
        ("ar", [], {}, "run --stage phase1 first"),
        ("vgg", ["--data", "FLAT"], {}, "needs labels"),
        ("ar", ["--data", "FLAT", "--tokenizer", "TRAINED/phase1.pt"], {}, "conditional=false"),
        ("phase1", [], dict(image_size=36), "not divisible by"),
        ("phase1", [], dict(image_size=48), "power of two"),
        ("phase2", ["--tokenizer", "TRAINED/phase1.pt"], dict(discriminator__max_width=4), "size mismatch"),
        ("vgg", [], dict(image_size=16), "32"),
        ("phase1", ["--vgg", "nowhere.pt"], {}, "nowhere.pt"),
        ("phase1", ["--vgg", "TRAINED/ar.pt"], {}, "this needs vgg"),
        ("phase1", ["--vgg", "imagenet"], {}, "--vgg FILE"),
        ("phase2", ["--tokenizer", "TRAINED/ar.pt"], {}, "stage 'ar'; this needs phase1"),
        ("ar", ["--tokenizer", "TRAINED/vgg.pt"], {}, "stage 'vgg'; this needs phase1 or phase2"),
        ("ar", ["--tokenizer", "nowhere.pt"], {}, "no checkpoint nowhere.pt"),
        ("phase1", [], dict(tokenizer__codebook="big"), "codebook must be one of"),
        ("phase1", [], dict(phase1__gan="big"), "one of logistic, hinge"),
        ("phase1", ["--preset", "lsun-cat"], dict(image_size=32), "--tokenizer FILE"),
        ("phase1", ["--device", "tpu"], {}, "--device must be"),
    ],
)
def test_bad_input_ends_with_one_line_exit_code_2_and_no_file_changed(
    trained, data, flat, tmp_path, capsys, monkeypatch, stage, words, sets, message
):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    out, empty = earlier(trained, tmp_path / "out", "vgg" if stage == "vgg" else "phase1"), tmp_path / "empty"
    empty.mkdir()
    before = contents(out, trained, data, flat)
    places = dict(EMPTY=empty, FLAT=flat, TRAINED=trained)
    words = [re.sub("EMPTY|FLAT|TRAINED", lambda found: str(places[found[0]]), word) for word in words]
    assert message in refusal(capsys, stage, out, data, *words, **sets)
    assert contents(out, trained, data, flat) == before


@pytest.mark.slow
def test_an_unconditional_prior_trains_on_a_folder_without_classes(trained, flat, tmp_path):
    for stage in ("ar", "nar"):
        call(stage, tmp_path / "out", flat, "--tokenizer", trained / "phase1.pt", conditional=False)
        prior, ckpt = load_model(tmp_path / "out" / f"{stage}.pt", [stage])
        assert prior.config.num_classes == 0 and ckpt["class_names"] == [] and ckpt["step"] == STEPS


@pytest.mark.slow
def test_phase_1_trains_the_vgg_it_needs(trained, data, tmp_path):
    call("phase1", tmp_path, data)
    for stage in ("vgg", "phase1"):
        a, b = (read_checkpoint(folder / f"{stage}.pt", [stage]) for folder in (trained, tmp_path))
        assert differing(a, b) == []


# Sizes and the shape of the code base ---------------------------------------------------------------------


@pytest.mark.slow
def test_explain_prints_the_parameter_counts_of_the_paper(monkeypatch):
    monkeypatch.setattr(studies.cost, "cost", lambda *args: (1, 1))  # test_explain_counts_... is for FLOPs

    def explain(*words):
        code, out, error = script("train.py", "--explain", "--preset", "imagenet", *words)
        assert code == 0 and not error, error
        return out

    base = explain()
    for count in ("54,532,867", "57,948,419", "24,001,089", "171,096,832", "171,864,832"):
        assert count in base, count
    more = explain("--set", "prior.n_embd=1024", "--set", "tokenizer.num_attention=2")
    assert "304,650,240" in more and "61,363,971" in more  # Table 1, +Attention x2


# Ablations ------------------------------------------------------------------------------------------------


def config_of(*words):
    return recipes.options.train_args(["--stage", "phase1", *words])[1]


@pytest.mark.parametrize(
    "name, words",
    [
        ("baseline", "--alpha 0"), ("low", "--alpha 0"), ("sem", "--alpha 1"), ("alpha=0.4", "--alpha 0.4"),
        ("+conv2", "--alpha 0 --set tokenizer.decoder_extra_blocks=2"),
        ("+attention2", "--alpha 0 --set tokenizer.num_attention=2"),
        ("+2x", "--alpha 0 --steps 1000000"),
        ("vqgan", "--alpha 0 --set tokenizer.codebook=plain"),
        ("entropy", "--alpha 0 --set tokenizer.codebook=entropy"),
        ("fn", "--alpha 0 --set tokenizer.codebook=fn --set tokenizer.codebook_dim=32 "
               "--set tokenizer.codebook_size=8192"),
        ("kmeans", "--alpha 0 --set tokenizer.codebook=kmeans --set tokenizer.kmeans_warmup=10000 "
                   "--set tokenizer.kmeans_every=2000 --set tokenizer.kmeans_last=30000"),
        *((name, f"--set phase1.layers={name}") for name in "ABCDE"),
    ],
)
def test_an_ablation_is_the_plain_flags_that_the_paper_s_row_needs(name, words):
    preset = ["--preset", "imagenet-ablation"]
    expected = config_of(*preset, *words.split())
    if name in [row.name for row in recipes.ablations.TABLES["table5"]["rows"]]:
        expected["tokenizer"]["warm_start"] = 0  # which is the default
    assert config_of(*preset, "--ablation", name) == expected


def test_alpha_is_never_given_where_other_layers_would_take_its_place(capsys):
    for words in (["--preset", "fqgan-dual"], ["--set", "phase1.layers=A"]):
        with pytest.raises(SystemExit):
            config_of(*words, "--alpha", "0")
        assert "--alpha does nothing beside phase1.layers" in capsys.readouterr().err
    for name in ("alpha=0.5", "sem", "baseline"):
        phase1 = config_of("--preset", "fqgan-dual", "--ablation", name)["phase1"]
        assert phase1["layers"] is None and phase1["alpha"] == {"alpha=0.5": 0.5, "sem": 1}.get(name, 0)


def test_the_ablation_setting_is_the_paper_s_and_every_row_of_its_tables_has_a_name():
    c = recipes.options.PRESETS["imagenet-ablation"]
    assert [c[stage]["batch"] for stage in ("phase1", "ar", "nar")] == [64, 64, 64]
    assert [c[stage]["steps"] for stage in ("phase1", "ar", "nar")] == [500_000] * 3
    assert c["phase1"]["alpha"] == 0 and c["tokenizer"] == {}
    assert list(recipes.ablations.LAYERS) == list(perceptual.LAYER_SETS)
    named, fork = ({row.name for table in tables.values() for row in table["rows"]}
                   for tables in (recipes.ablations.TABLES, forks.load("fqgan").TABLES))
    assert {n for n in named if not n.startswith("alpha=")} == {
        "baseline", "+conv2", "+attention2", "+2x", "vqgan", "fn", "kmeans", "entropy",
        *recipes.ablations.LAYERS} - {"L4"}  # which is ours: of no table of the paper
    assert fork == {"fq-1x", "fq-2x", "fq-none", "fq-dis", "fq-rep", "fq-both", "fq-alpha1", "head-linear",
                    "head-mlp"}
    for name in named | fork:
        config_of("--preset", "demo-fq" if name in fork else "demo", "--ablation", name)


def test_ablations_scale_with_a_small_preset_and_with_the_steps_it_is_given():
    demo = ["--preset", "demo"]
    assert config_of(*demo, "--ablation", "+2x")["phase1"]["steps"] == 1000
    assert config_of(*demo, "--ablation", "+2x", "--set", "phase1.steps=50")["phase1"]["steps"] == 100
    fn, kmeans = (config_of(*demo, "--ablation", name)["tokenizer"] for name in ("fn", "kmeans"))
    assert (fn["codebook_dim"], fn["codebook_size"], fn["warm_start"]) == (32 // 8, 64 * 8, 0)
    assert (kmeans["kmeans_warmup"], kmeans["kmeans_every"], kmeans["kmeans_last"]) == (10, 2, 30)


@pytest.mark.parametrize("name", ["alpha=0.4", "low", "A", "B", "C", "D", "sem", "E"])
def test_the_perceptual_loss_of_a_row_of_table_6_has_its_layers(monkeypatch, name):
    monkeypatch.setattr(train, "perceptual_loss", lambda vgg, x, x_hat, layers: layers)
    c = config_of("--preset", "demo", "--ablation", name)["phase1"]
    layers = train.build_perceptual(types.SimpleNamespace(vgg=None), c)(None, None)
    ends = {"alpha=0.4": perceptual.layer_weights(0.4)}
    assert layers == (ends.get(name) or perceptual.LAYER_SETS[name])
    assert c["layers"] == (name if name in "ABCDE" else None)


def test_an_ablation_tells_its_flags_and_bad_ones_are_refused(data, tmp_path, capsys):
    with open_run("phase1", tmp_path, data, "--ablation", "+attention2").session():
        pass
    assert "ablation +attention2: --set phase1.alpha=0.0 --set tokenizer.num_attention=2" in (
        capsys.readouterr().out)
    for words, message in [
        ("--ablation attention", "+attention2"), ("--ablation alpha=2", "alpha must be"),
        ("--ablation alpha=x", "alpha=NUMBER"), ("--ablation A --alpha 1", "leave --alpha out"),
        ("--arch resnet", "belongs to --stage vgg"), ("--set phase1.layers=F", "phase1.layers"),
    ]:
        assert message in refused(capsys, config_of, *words.split())


def test_the_cost_of_a_layer_and_of_a_prior_has_its_closed_form():
    x, layer = torch.zeros(3, 4), torch.nn.Linear(4, 5)
    flops, kept = studies.cost.cost([lambda: layer(x).sum().backward()], layer)
    assert flops == 2 * (2 * 3 * 4 * 5)  # forwards, and backwards to the weights: x needs no gradient
    assert kept == 2 * 3 * 4  # x in bf16, not the weights
    twice = studies.cost.cost([lambda: layer(x).sum().backward()] * 2, layer)
    assert twice == (2 * flops, kept)  # one after the other: FLOPs add up, memory does not


def test_the_cost_of_attention_counts_its_products_and_every_view_of_what_is_kept():
    with FakeTensorMode():
        x = torch.zeros(1, 2, 8, 3 * 4, requires_grad=True)

        def step():
            qkv = x * 1  # of whose storage all three are views
            F.scaled_dot_product_attention(*qkv.split(4, 3)).sum().backward()

        flops, kept = studies.cost.cost([step])
    product = 2 * 2 * 8 * 8 * 4  # two heads
    assert flops == 2 * product + 5 * product  # backwards the scores once more
    assert kept >= 2 * x.numel() + 2 * 2 * 8 * 4  # q, k, v and what comes out, in bf16


def test_the_averaged_weights_of_a_fork_keep_its_integers():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("levels", torch.arange(100))
    ema = train.build_ema(model, 0.95)
    before = model.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.weight += 1
        ema.update_parameters(model)
    assert ema.module.levels.tolist() == [*range(100)]
    torch.testing.assert_close(ema.module.weight, before + 1 * 0.95**2 + 2 * 0.95 * 0.05 + 3 * 0.05)


@pytest.mark.slow
def test_explain_counts_what_each_stage_costs(capsys, monkeypatch):
    real, counted = studies.cost.print_cost, []
    monkeypatch.setattr(studies.cost, "print_cost", lambda *words: counted.append(words) or real(*words))
    train.main(*recipes.options.train_args(["--explain", "--preset", "imagenet"]))
    lines = {line.split()[2]: line for line in capsys.readouterr().out.splitlines() if "cost of" in line}
    assert list(lines) == ["phase1:", "phase2:", "ar:", "nar:"]
    found = {stage: re.search(r": ([\d,.]+) GFLOP", line)[1] for stage, line in lines.items()}
    gflop = {stage: float(text.replace(",", "")) for stage, text in found.items()}
    assert gflop["ar:"] == pytest.approx(6 * 256 * 0.1711, rel=0.1)  # 6 a parameter and token, attention
    assert gflop["phase2:"] < gflop["phase1:"]
    assert gflop["ar:"] == pytest.approx(gflop["nar:"], rel=0.01)  # one has the logits of [MASK] too
    assert all("H100-hours" in line and "GiB a GPU at" in line for line in lines.values())
    hours = [re.search(r"([\d.]+) H100-hours", line)[1] for line in lines.values()]
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]]
             for line in (ROOT / "docs" / "full-scale.md").read_text().splitlines() if line.startswith("|")]
    first, second, priors = [row for row in table if "H100-hours" in row[0]][:3]
    assert [first[1], second[1], *priors[1].split("; ")] == hours
    rows = [row[1:] for row in table if len(row) == 6 and "".join(row[1:]).isdecimal()]
    gigabytes, *held = [[*map(int, row)] for row in rows]
    del counted[2]  # AR takes a little less than NAR
    for row, (_, c, _, kept, trained, frozen, *_) in zip(held, counted, strict=True):
        most = [studies.cost.largest(memory, kept, 16 * trained + 4 * frozen) for memory in gigabytes]
        assert row == [min(size, c["batch"]) for size in most]
    assert gigabytes == [12, 16, 24, 40, 80]
    for i, name in enumerate(table[0][1:], 1):  # an image costs the same in all of these presets
        told = [studies.cost.hours(stage, 1e9 * gflop[f"{stage}:"], recipes.options.PRESETS[name][stage])
                for stage in ("phase1", "phase2", "ar", "nar")]
        assert [first[i], second[i] or told[1], *priors[i].split("; ")] == told, name


@pytest.mark.parametrize("preset, memory, told", few([
    ("demo", 1, ["into 1 GB, one image", "lower classifier.width", "lower tokenizer.base_width"]),
    ("demo", 24, ["24 GB hold --batch 21 of"]),
    ("imagenet", 24, ["24 GB hold --micro-batch 19 of 256, 294 H100-hours"]),
    ("imagenet", 1e4, ["hold --micro-batch 256 of 256", "hold --micro-batch 128 of 128"]),
    ("imagenet", 3.5, ["hold --micro-batch 1 of", "one image takes 4.0; lower prior.n_layer"])], 0, 1))
def test_explain_says_the_largest_micro_batch_that_a_gpu_holds_and_what_to_change_where_none_does(
        preset, memory, told, monkeypatch, capsys):
    monkeypatch.setattr(studies.cost, "cost", lambda *args: (10**12, 2**30))  # 1 GiB an image
    train.main(*recipes.options.train_args(["--explain", "--preset", preset, "--memory", str(memory)]))
    out = capsys.readouterr().out
    assert all(text in out for text in told) and "estimated" not in out, out


@pytest.mark.parametrize("preset, told, not_told", few([
    ("frozen.demo", [r"encoder +[\d,]+  frozen", r"phase2, "], r"encoder.*trainable"),
    ("simvq.demo", [r"codebook +3,072  1,024 trainable"], r"codebook.* 3,072 trainable"),
    ("lfq.demo", [r"codebook +0 *\n"], "codebook.*trainable"),
    ("imagenet-ablation", [r"1000 classes assumed", "8 processes x 8"], "phase2"),
    ("demo", ["vgg, 10 classes:", "prior, 10 classes "], "H100|processes|1000 classes|assumed"),
    ("demo --data DIR", ["vgg, 10 classes assumed", "prior, 10 classes assumed "],
     "H100|processes|1000 classes")], 0))
def test_explain_tells_of_each_stage_what_it_trains_and_no_more_than_is_known(
        preset, told, not_told, monkeypatch, capsys):
    """Frozen weights were trainable, a preset of one phase had two, ten classes were a thousand."""
    monkeypatch.setattr(studies.cost, "cost", lambda *args: (1, 1))
    train.main(*recipes.options.train_args(["--explain", "--preset", *preset.split()]))
    out = capsys.readouterr().out
    assert all(re.search(pattern, out) for pattern in told) and not re.search(not_told, out), out


def test_a_warm_start_beyond_the_last_step_is_shortened_where_a_run_begins(trained, data, tmp_path, capsys):
    """12 or 80 steps of a preset trained without any quantization, silently."""
    out = earlier(trained, tmp_path / "out", "phase1")
    tokenizer, _ = train.build_tokenizer(open_run("phase1", out, data, tokenizer__warm_start=6), "phase1")
    assert [*tokenizer.quantizer.reestimations] == [1] and tokenizer.config.warm_start == 6
    assert "now after step 1, a fifth of them" in capsys.readouterr().out


@pytest.mark.parametrize("has, words, wanted", [
    (False, [], "fp32"), (False, ["--precision", "bf16"], "bf16"), (True, [], "bf16")])
def test_a_cpu_without_bf16_instructions_trains_in_float32_unless_told_otherwise(
        has, words, wanted, data, tmp_path, monkeypatch, capsys):
    """There bf16 takes ten times as long, so that the quick start took hours."""
    monkeypatch.setattr(plumbing.run, "bf16_instructions", lambda: has)
    words = ["--stage", "phase1", "--data", str(data), "--device", "cpu", "--out", str(tmp_path), *words]
    run = plumbing.run.Run(*recipes.options.train_args(words))
    assert run.config["precision"] == wanted and ("no bf16" in capsys.readouterr().out) == (wanted == "fp32")
    with run.autocast:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dict(fp32=torch.float32, bf16=torch.bfloat16)[wanted]
