"""Claims about what is given to the commands: folders of images, class names, paths, and where results go."""

import hashlib
import inspect
import io
import locale
import os
import re
import shutil
import struct
import subprocess
import tarfile
import warnings
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import plumbing.data
import plumbing.dataset
import plumbing.files
import plumbing.images
import plumbing.slices
import recipes.flags
import recipes.options
import studies.metrics
import studies.probe
import studies.report
import studies.tables
from helpers import call, contents, differing, earlier, few, open_run, refusal, study
from PIL import Image

import sample
import train
import visualize
from plumbing.errors import UserError
from plumbing.files import read_checkpoint
from plumbing.paths import as_path, expanded
from recipes.flags import FLAGS
from studies import commands

CONFIG = dict(data=None, val=None, image_size=16, seed=0, limit=None)


def pictures(folder, *names, size=(12, 10)):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * i, 200, 30)).save(folder / name)
    return folder


def load(folder, val=None, **changes):
    return plumbing.data.load_data(dict(CONFIG, data=str(folder), val=val and str(val), **changes))


def refused_data(*words, **changes):
    with pytest.raises(UserError) as stop:
        load(*words, **changes)
    message = str(stop.value)
    assert "\n" not in message and stop.value.code == 2
    return message


# Splits and classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [
    ["train/1.png", "test/1.png"], ["Train/1.png", "valid/1.png", "x/x.txt"], ["train/1.png"],
    ["train2017/1.png", "val2017/1.png"], ["images_train/1.png", "dev/1.png"],
    ["training/1.png", "testing/1.png"]])
def test_splits_are_never_taken_for_classes_and_the_remedy_is_named(tmp_path, names):
    pictures(tmp_path, *(name for name in names if name.endswith("png")))
    splits = ", ".join(sorted(name.split("/")[0] for name in names if name.endswith("png")))
    wanted = f"{splits} in --data {tmp_path} are splits of a data set and no classes; pass one of them with"
    assert wanted in refused_data(tmp_path)


def test_a_class_that_is_called_like_a_split_stays_a_class_among_others(tmp_path):
    pictures(tmp_path, "test/1.png", "train/1.png", "cat/1.png")
    assert load(tmp_path)[0].class_names == ["cat", "test", "train"]
    for name in ("bullet_train", "testify", "valley", "trainer", "data", "2017"):
        assert not re.fullmatch(plumbing.data.SPLIT, name)


def test_classes_of_one_split_alone_are_refused_with_a_remedy_that_works(tmp_path):
    pictures(tmp_path, *(f"a/train/{c}/{i}.png" for c in "abc" for i in range(10)), "a/val/1.png")
    pictures(tmp_path, "b/train/1.png", "b/train/2.png", "b/val/a/1.png", "b/val/b/2.png")
    for name in "ab":
        train, val = tmp_path / name / "train", tmp_path / name / "val"
        said = refused_data(tmp_path / name)
        assert f"only one of {train} and {val} has class sub-folders" in said
        assert said.endswith(f"or pass --data {train} alone") and said == refused_data(train, val)
        assert load(train)[0].num_classes == (3 if name == "a" else 0)


def test_a_val_that_was_not_given_is_not_blamed(tmp_path):
    """The kind: validation images that `--data` brings along, in its folder or built in."""
    pictures(tmp_path, "train/a/1.png", "val/a/1.png", "val/b/1.png")
    assert refused_data(tmp_path) == f"{tmp_path / 'val'} has classes that {tmp_path / 'train'} lacks: b"
    pictures(tmp_path, "more/train/a/1.png", "more/val/test/1.png")
    assert f"test in --data {tmp_path}/more/val are splits" in refused_data(tmp_path / "more")
    assert f"test in --val {tmp_path}/more/val are" in refused_data(tmp_path / "train", tmp_path / "more/val")
    of_run = dict(CONFIG, data="d", val="v")
    assert len(plumbing.data.load_data(plumbing.data.with_data(of_run, "shapes"))[1]) == 1000


# Decoders -------------------------------------------------------------------------------------------------


def broken_exif():
    """EXIF of an orientation, and of two texts that lie beyond its end."""
    entries = [struct.pack("<HHII", *entry) for entry in ((0x112, 3, 1, 6), (0x10e, 2, 500, 9000),
                                                          (0x131, 2, 500, 9900))]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + b"".join(entries)


def test_decoders_chatter_about_no_file_and_pixels_stay_as_they_were(tmp_path, capfd):
    for name in ("a.jpg", "b.png", "c.webp"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / name, exif=broken_exif())
        with pytest.warns(), Image.open(tmp_path / name) as image:  # Pillow itself does warn
            image.getexif()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for file in (tmp_path / name, io.BytesIO((tmp_path / name).read_bytes())):  # as of an archive
                assert plumbing.images.load_rgb(file).size == (32, 40)
    said = capfd.readouterr()
    assert not said.err and not said.out


# CIFAR-10 and class names ---------------------------------------------------------------------------------


class FakeCifar10:
    """Torchvision's data set as far as it is used; image i has the colour i."""

    classes = ["cat", "dog"]

    def __init__(self, root, train=True, download=False):
        self.data = np.arange(50 if train else 10, dtype=np.uint8)[:, None, None, None].repeat(32, 1)
        self.data = self.data.repeat(32, 2).repeat(3, 3)
        self.targets = [i % 2 for i in range(len(self.data))]

    def __len__(self):
        return len(self.data)


@pytest.mark.parametrize("form, workers", [("folder", 0), ("archive", 2)])
def test_names_of_any_bytes_are_escaped_wherever_they_are_told(tmp_path, capfd, form, workers):
    """The kind: classes and bad files whose names are no UTF-8, or no text of the locale."""
    odd = os.fsdecode(b"caf\xe9")  # Latin-1
    pictures(tmp_path / "d", *(f"{kind}/{i}.png" for kind in (odd, "caf\u00e9") for i in range(6)))
    for kind in (odd, "caf\u00e9"):
        (tmp_path / "d" / kind / f"{odd}\u00e9.png").write_bytes(b"no picture")
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        archive.add(tmp_path / "d", ".")
    place = tmp_path / ("d.tar" if form == "archive" else "d")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")  # in which open() writes ASCII, unless a file names its encoding
    try:
        train = plumbing.data.load_data(dict(CONFIG, data=str(place), val=str(place)))[0]
        train.bad_list = tmp_path / "bad_files.txt"
        stream = plumbing.dataset.batches(train, 7, 0, workers)
        labels = [label for _ in range(4) for label in next(stream)[1].tolist()]
        stream.close()
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert train.class_names == ["caf\u00e9", r"caf\xe9"] and {*labels} == {0, 1}
    bad = {line.split("\t")[0] for line in train.bad_list.read_text(encoding="utf-8").splitlines()}
    assert bad == {f"{place}/{kind}/caf\\xe9\u00e9.png" for kind in train.class_names}
    assert rf"{place}/caf\xe9/caf\xe9" in capfd.readouterr().err


def test_only_what_torch_itself_says_of_a_worker_is_laid_to_memory(data, tmp_path):
    """The kind: errors out of a worker. Those that torch cannot make anew come as RuntimeError too."""
    run = open_run("phase1", tmp_path / "out", data)
    for text, kind in (("DataLoader worker (pid 1) is killed", UserError),
                       ("Caught RuntimeError in DataLoader worker process 0.", UserError),
                       ("Caught UnicodeEncodeError in DataLoader worker process 0.", RuntimeError)):
        with pytest.raises(kind), run.session():
            raise RuntimeError(text)


def test_a_folder_is_the_same_under_its_relative_and_its_absolute_name(data, monkeypatch):
    whole, val = load(data)
    for place, name in ((data, "."), (data.parent, data.name)):
        monkeypatch.chdir(place)
        here = load(name)
        assert [images.fingerprint for images in here] == [whole.fingerprint, val.fingerprint]
        assert here[0].labels == whole.labels and here[0].class_names == whole.class_names
    (first, *others) = whole.files
    renamed = plumbing.data.FolderData([f"{first}x", *others], whole.class_names, 32, 0)
    assert renamed.fingerprint != whole.fingerprint


def test_built_in_images_take_no_others_for_validation(flat):
    assert "has validation images of its own" in refused_data("shapes", flat)


def test_limit_draws_from_cifar10_by_the_seed_and_changes_its_fingerprint(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar10)
    whole, few, again, other = (load("cifar10", limit=limit, seed=seed) for limit, seed in
                                ((None, 0), (7, 0), (7, 0), (7, 1)))
    assert (len(whole[0]), len(few[0]), len(few[1])) == (50, 7, 10)
    assert whole[0].fingerprint == [50, "cifar10"] and few[0].fingerprint[0] == 7
    assert few[0].fingerprint == again[0].fingerprint != other[0].fingerprint  # other images of it
    drawn = [[int(data.pixels(i)[0, 0, 0]) for i in range(7)] for data in (few[0], again[0], other[0])]
    assert len(set(drawn[0])) == 7 and drawn[0] == drawn[1] != drawn[2]
    assert [few[0].label(i) for i in range(7)] == [colour % 2 for colour in drawn[0]]
    assert len(load("cifar10", limit=99)[0]) == 50


def test_where_all_class_names_are_numbers_only_names_count():
    names = ["0", "1", "10", "2"]
    assert sample.choose_classes("10,2,0", names) == [2, 3, 0]
    assert sample.choose_classes(None, names) == [0, 1, 2, 3]
    for wrong in ("3", "-1", "4", "01", "1.0"):
        with pytest.raises(UserError, match=f"{wrong}: not one of 0, 1, 10, 2, which are the names"):
            sample.choose_classes(wrong, names)
    with pytest.raises(UserError, match="--classes 1: not one of 007, -1, 0.5"):
        sample.choose_classes("1", ["007", "-1", "0.5"])
    assert sample.choose_classes("-1", ["007", "-1", "0.5"]) == [1]
    for text in ("star,star", "star,1"):
        with pytest.raises(UserError, match=f"--classes {text}: class star is named twice"):
            sample.choose_classes(text, ["disk", "star"])


# The images of a run, from another place ------------------------------------------------------------------


@pytest.fixture
def moved(trained, tmp_path, monkeypatch):
    """The run of `trained`, whose configuration names its images by a relative path, seen from elsewhere."""
    for name in ("phase1", "phase2", "ar"):
        ckpt = torch.load(trained / f"{name}.pt", weights_only=True)
        torch.save(dict(ckpt, config=dict(ckpt["config"], data="d1")), tmp_path / f"{name}.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def refused(capsys, script, *words):
    """The one line with which a command ends, exit code 2."""
    args = [*map(str, words), "--device", "cpu"]
    return helpers.refused(capsys, lambda: script.main(PARSERS[script](args)))


@pytest.mark.parametrize("script, words, name", few([
    (sample, ["--reconstruct", "--ckpt", "phase1.pt"], "phase1.pt"),
    (commands, ["metrics", "--ckpt", "phase1.pt", "--extractor", "VGG"], "phase1.pt"),
    (commands, ["metrics", "--ckpt", "ar.pt", "--extractor", "VGG", "--num", "999"], "ar.pt"),
    (visualize, ["view", "--ckpt", "ar.pt"], "ar.pt"),
    (visualize, ["fig8", "--ckpt", "phase1.pt"], "phase1.pt"),
    (commands, ["compare", "phase1.pt"], "phase1.pt"),
    (commands, ["report", "."], "phase1.pt"),
], 0, 4))
def test_images_that_are_not_there_are_laid_to_the_run_and_data_is_the_remedy(
    trained, moved, capsys, script, words, name
):
    places = {"VGG": trained / "vgg.pt", ".": moved, **{n: moved / n for n in ("phase1.pt", "ar.pt")}}
    error = refused(capsys, script, *(places.get(word, word) for word in words))
    assert f"the run of {moved / name} had its images in d1, and from {moved / 'elsewhere'}" in error
    assert "--data d1" not in error and "pass --data PATH" in error


@pytest.mark.slow
def test_data_mends_it(moved, data):
    words = ["--ckpt", moved / "phase1.pt", "--reconstruct", "--num", 2, "--data", data, "--device", "cpu"]
    sample.main(recipes.options.sample_args([*map(str, words)]))
    assert (moved / "reconstructions_phase1.png").is_file()
    study("report", moved, "--data", data, "--device", "cpu")
    assert (moved / "report.html").is_file()


# The same images under another name ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_with_its_images_under_any_name_and_as_if_they_had_none(data, tmp_path, monkeypatch):
    """Each call goes one step further, and each time the same images are named in another way."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "d1")
    shutil.copytree(data, tmp_path / "scratch" / "job7")
    call("vgg", tmp_path / "straight", "d1", "--steps", 6, classifier__schedule="constant")
    places = ["d1", "d1/", "./d1", tmp_path / "d1", tmp_path / "scratch" / "job7"]
    for steps, place in enumerate(places, 2):
        call("vgg", tmp_path / "out", place, "--steps", steps, classifier__schedule="constant")
    split = [tmp_path / "d1" / name for name in ("train", "val")]  # the same images, found by flags
    call("phase1", tmp_path / "out", split[0], "--val", split[1], "--steps", 2, classifier__steps=6,
         classifier__schedule="constant")
    call("phase2", tmp_path / "out", "scratch/job7", "--steps", 2, phase1__steps=2, classifier__steps=6,
         classifier__schedule="constant")
    straight, ckpt = (read_checkpoint(tmp_path / run / "vgg.pt", ["vgg"]) for run in ("straight", "out"))
    assert ckpt["step"] == 6 and differing(straight["model"], ckpt["model"]) == []
    assert ckpt["config"]["data"] == str(places[-1])


@pytest.mark.parametrize("stage", few(["vgg", "phase1", "phase2", "ar"], 1))
def test_a_copy_that_lacks_one_file_is_refused_by_every_stage_that_builds_on_the_run(
    trained, data, tmp_path, capsys, stage
):
    copy = shutil.copytree(data, tmp_path / "copy")
    next(copy.glob("train/*/*.png")).unlink()
    out = earlier(trained, tmp_path / "out", stage)
    if stage == "vgg":
        shutil.copy(trained / "vgg.pt", out)
    before = contents(out)
    error = refusal(capsys, stage, out, copy)
    assert "the images changed" in error and "(training images: 60 then, 59 now)" in error
    assert contents(out) == before


@pytest.mark.parametrize("source", few(["shapes", "cifar10"], 0))
def test_built_in_images_are_never_a_folder_s(trained, tmp_path, capsys, monkeypatch, source):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar10)
    out = earlier(trained, tmp_path / "out", "phase1")
    assert f"not {source} as here" in refusal(capsys, "phase1", out, source)


def test_the_fingerprint_of_a_folder_is_that_of_its_copy_and_of_classes_what_it_always_was(tmp_path):
    pictures(tmp_path / "here", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    shutil.copytree(tmp_path / "here" / "a", tmp_path / "flat" / "a")
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "deep")

    def fingerprint(folder):
        return plumbing.data.FolderData(*plumbing.data.scan_folder(folder), 8, 0).fingerprint

    assert fingerprint(tmp_path / "flat" / "a") == fingerprint(tmp_path / "here" / "a")
    lines = "".join(f"{c}/{i}.png {(tmp_path / f'here/{c}/{i}.png').stat().st_size}\n"
                    for c in "ab" for i in range(4))
    wanted = [8, hashlib.sha256(lines.encode()).hexdigest()[:16]]
    assert fingerprint(tmp_path / "here") == fingerprint(tmp_path / "there" / "deep") == wanted


def test_a_table_goes_on_with_its_images_in_another_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    (root / "settings.json").write_text('{"preset": "demo", "data": "d1", "set": []}')

    def table(data):
        return studies.tables.Table(commands.study_args(["table1", "--data", data, "--out", root]))

    for same in ("d1", "d1/", "./d1", tmp_path / "d1"):
        table(same)
    for other in ("d2", "shapes"):
        with pytest.raises(UserError, match="other settings"):
            table(other)


# ~ ---------------------------------------------------------------------------------------------------------


def paths_of(script, *words):
    """({flag: its value} of the flags that take a path, each given as ~/NAME; configuration of train.py)"""
    parsed = PARSERS[script]([*words, *(f"--{name}=~/{name}" for name in PATHS[script])])
    args, config = parsed if script is train else (parsed, {})
    return {name: getattr(args, name) for name in PATHS[script]}, config


PARSERS = {train: recipes.options.train_args, sample: recipes.options.sample_args,
           visualize: recipes.options.visualize_args, commands: commands.study_args}
PATHS = {train: ("data", "val", "out", "tokenizer", "vgg"), sample: ("ckpt", "tokenizer", "out"),
         visualize: ("data", "out"),
         commands: ("ckpt", "tokenizer", "data", "out", "extractor", "lpips", "references")}


@pytest.mark.parametrize("script", PATHS)
def test_every_path_flag_knows_the_home_folder(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    first = {train: ["--stage", "phase1"], sample: [], visualize: ["view", "--ckpt", "x"],
             commands: ["metrics"]}[script]
    found, config = paths_of(script, *first)
    assert found == {name: type(value)(f"/home/me/{name}") for name, value in found.items()}
    assert all(config[key] == f"/home/me/{key}" for key in ("data", "val", "vgg") if config)
    paths = {key.partition(".")[0] for key, how in FLAGS.items() if how.get("type") in (as_path, expanded)}
    others = {"images", "image", "results", "tokenizers", "folder", "mask", "reference", "decode"}  # the next
    assert paths == others.union(*PATHS.values()) and "type=Path" not in inspect.getsource(recipes.flags)


def test_paths_in_lists_and_in_set_know_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["view", "--ckpt", "~/a.pt", "b.pt", "--tokenizer", "~/c.pt", "d.pt"]
    args = recipes.options.visualize_args(words)
    assert [*map(str, args.ckpt)] == ["/home/me/a.pt", "b.pt"]
    assert [*map(str, args.tokenizer)] == ["/home/me/c.pt", "d.pt"]
    for words, name in ((["report", "~/x"], "run"), (["balance", "~/x"], "ckpt"),
                        (["compare", "~/x"], "files"),
                        (["metrics", "--ckpt", "a.pt", "--reference", "~/x"], "reference"),
                        (["tokens", "--ckpt", "a.pt", "--out", "b", "--decode", "~/x"], "decode"),
                        (["edit", "~/x", "--ckpt", "a.pt", "--box", "0,0,9,9"], "edit")):
        found = getattr(commands.study_args(words), name)
        assert (found[0] if isinstance(found, list) else found) == Path("/home/me/x"), words
    words = ["--set", "data=~/d", "--set", "vgg=~/vgg.pth"]
    config = recipes.options.train_args(["--stage", "phase1", "--preset", "demo", *words])[1]
    assert (config["data"], config["vgg"]) == ("/home/me/d", "/home/me/vgg.pth")


# Where results go -----------------------------------------------------------------------------------------


@pytest.fixture
def idle(monkeypatch):
    """Nothing may be drawn, reconstructed, measured or trained."""
    def never(*args, **kwargs):
        raise AssertionError("the work began")

    for module, names in ((plumbing.slices, ("decode", "generate_tokens")),
                          (studies.metrics, ("load_reference", "Extractor")),
                          (visualize, ("decode", "teacher_forced_view", "draw", "load_images")),
                          (studies.probe, ("decode", "stability")),
                          (studies.report, ("decode", "generate_images", "load_pairs", "load_images")),
                          (subprocess, ("run",))):
        for name in names:
            monkeypatch.setattr(module, name, never)


def test_a_good_place_is_left_as_it_was_until_there_is_a_result(tmp_path):
    (tmp_path / "old.png").write_text("old")
    for place in ("old.png", "new.png", "a/b/c.png"):
        plumbing.files.writable(tmp_path / place)
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_text() == "old"
    with pytest.raises(UserError, match="it is a folder"):
        plumbing.files.writable(tmp_path)


BELOW, CANNOT = "view.png/below/x", "cannot be written"  # below a file


@pytest.mark.parametrize("script, words, name, told", few([
    (sample, "--ckpt ar.pt --format sheet", BELOW, CANNOT),
    (sample, "--ckpt ar.pt --format files", BELOW, CANNOT),
    (sample, "--ckpt phase1.pt --reconstruct --format npz", BELOW, CANNOT),
    (commands, "metrics --ckpt ar.pt --num 999 --extractor vgg.pt", BELOW, CANNOT),
    (commands, "sweep top_p=0.5,1 --ckpt ar.pt --num 999 --extractor vgg.pt", BELOW, CANNOT),
    (visualize, "view --ckpt ar.pt", f"{BELOW}.png", CANNOT),
    (commands, "report .", BELOW, CANNOT),
    (commands, "compare phase1.pt", BELOW, CANNOT),
    (commands, "table1 --preset demo --run", BELOW, CANNOT),
    # of another kind
    (sample, "--ckpt ar.pt", "s.jpg", ".png"),
    (sample, "--ckpt ar.pt --format npz", "s.png", ".npz"),
    (commands, "edit view.png --ckpt nar.pt --box 0,0,9,9", "s.jpg", ".png"),
    (commands, "metrics --ckpt ar.pt --num 999 --extractor vgg.pt", "s.pt", ".json"),
    (visualize, "view --ckpt ar.pt", "summary.json", ".png"),
    (commands, "balance phase1.pt", "phase1.pt", ".json"),
    (commands, "compare phase1.pt", "phase1.pt", ".json"),
    (commands, "report .", "s.png", ".html"),
    # a picture whose numbers would take the place of the run's own
    (commands, "edit view.png --ckpt nar.pt --box 0,0,9,9", "summary.png", "would overwrite"),
    (visualize, "view --ckpt ar.pt", "summary.png", "would overwrite"),
    (visualize, "view --ckpt ar.pt --pdf", "tensorboard.png", "would overwrite"),
    # what is edited
    (commands, "edit view.png --ckpt nar.pt --box 0,0,9,9", "view.png", "would overwrite what is edited"),
    (commands, "edit samples_nar.png --ckpt nar.pt --mask view.png", "view.png", "would overwrite what"),
    (commands, "edit view.png --ckpt nar.pt --onto 8,8,16 --format files", "", "holds other files"),
], 1, 3, 5, 11, 13, 17, 18))
def test_a_bad_place_for_results_is_known_before_the_work_and_no_file_is_overwritten(
        trained, tmp_path, capsys, idle, script, words, name, told):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "tensorboard.json").mkdir()
    before = contents(run)
    words = [str(run / word) if word == "." or "." in word and "=" not in word else word
             for word in words.split()]
    assert told in refused(capsys, script, *words, "--out", run / name) and contents(run) == before
