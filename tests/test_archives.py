"""Claims about images in tar archives: they are those of the same folder, bit for bit."""

import functools
import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile

import pytest
import torch
from helpers import call, differing, study
from PIL import Image

import plumbing.archives
import plumbing.data
from plumbing.data import load_data
from plumbing.errors import UserError
from plumbing.files import read_checkpoint
from plumbing.paths import braces

CONFIG = dict(image_size=32, seed=0, limit=None, val=None)


def picture(shade):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def pack(path, *members, mode="w"):
    """Adds (name, content) to an archive: bytes, the shade of a picture, or a link's kind and aim."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
            else:
                content = picture(content) if isinstance(content, int) else content
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if info.size else None)
    return path


@pytest.fixture(scope="module")
def archives(data, tmp_path_factory):
    """The pictures of `data` in archives: train-0.tar and train-1.tar, val.tar, class folders inside."""
    out = tmp_path_factory.mktemp("archives")
    for split, count in (("train", 2), ("val", 1)):
        files = sorted((data / split).rglob("*.png"))
        for i in range(count):
            pack(out / (f"{split}-{i}.tar" if count > 1 else f"{split}.tar"), ("a/README.txt", b"no image"),
                 *((f"a/b/{path.parent.name}/{path.name}", path.read_bytes()) for path in files[i::count]))
    return out


def config(out, **changes):
    return CONFIG | dict(data=f"{out}/train-*.tar", val=f"{out}/val.tar") | changes


def test_archives_hold_the_images_of_the_folder_in_its_order_with_its_crops_and_fingerprint(data, archives):
    theirs = load_data(CONFIG | dict(data=str(data)))
    for ours, folder in zip(load_data(config(archives)), theirs, strict=True):
        assert len(ours) == len(folder) and ours.class_names == folder.class_names
        assert ours.labels == folder.labels and ours.fingerprint == folder.fingerprint
        for i in range(len(ours)):
            assert torch.equal(ours.pixels(i), folder.pixels(i))
            assert torch.equal(ours.view(i, 7, True), folder.view(i, 7, True))
    assert load_data(config(archives))[0].name(0).startswith(f"{archives}/train-0.tar/")


@pytest.mark.slow
def test_a_run_goes_on_from_a_folder_in_archives_as_if_nothing_had_changed(data, archives, tmp_path):
    place, found = (f"{archives}/train-*.tar", "--val", f"{archives}/val.tar"), {}
    for name, first, then in (("a", (data,), (data,)), ("b", (data,), place), ("c", place, place)):
        for where, steps in ((first, 2), (then, 4)):
            call("phase1", tmp_path / name, *where, "--workers", 2 * (name == "c"), phase1__steps=steps,
                 classifier__steps=2, phase1__schedule="constant")
        found[name] = read_checkpoint(tmp_path / name / "phase1.pt", ("phase1",))
        del found[name]["config"]  # in which they were
    assert not differing(found["a"], found["b"]) and not differing(found["a"], found["c"])
    assert found["a"]["step"] == 4 and list((tmp_path / "c").glob("archives-*.json"))


def web(path, count=12):
    """The WebDataset form: key.png beside key.cls, classes 0, 2, 10 in turn."""
    parts = [(f"{i:04d}.png", 20 * i) for i in range(count)]
    parts += [(f"{i:04d}.cls", b"%d" % (0, 2, 10)[i % 3]) for i in range(count)]
    return pack(path, *sorted(parts), ("0000.json", b"{}"))


def test_cls_files_name_the_classes_in_the_order_of_their_numbers(tmp_path):
    web(tmp_path / "a.tar")
    data, val = load_data(config(tmp_path, data=f"{tmp_path}/a.tar", val=f"{tmp_path}/a.tar"))
    assert data.class_names == ["0", "2", "10"] and data.labels == [0] * 4 + [1] * 4 + [2] * 4
    shades = [data.pixels(i)[0, 0, 0].item() for i in range(12)]
    assert shades == [20 * i for i in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)]
    assert sorted(val.files) == sorted(data.files)  # the order of validation images is a shuffled one


def labels_of(path):
    """{shade: name of its class} of the pictures in an archive"""
    data = load_data(CONFIG | dict(data=str(path), val=str(path)))[0]
    return {data.pixels(i)[0, 0, 0].item(): data.class_names[data.labels[i]] for i in range(len(data))}


@pytest.mark.parametrize("members, found", [
    ([("photo.00.png", 1), ("photo.00.cls", b"7"), ("photo.01.png", 2), ("photo.01.cls", b"8")],
     {1: "7", 2: "8"}),
    ([("a.image.png", 1), ("a.target.cls", b"7"), ("b.png", 2), ("b.cls", b"8"), ("b.json", b"9")],
     {1: "7", 2: "8"}),
    ([("key.png", 1), ("key.seg.png", 2), ("key.cls", b"7")], "key.seg.png"),
    ([("a.png", 1), ("a.jpg", 2), ("a.cls", b"7")], "a.png"),
    ([("a.1.png", 1), ("a.2.png", 2), ("a.cls", b"7")], "a.1.png"),
    ([("a.png", 1), ("a.cls", b"7"), ("a.fine.cls", b"8")], "a.fine.cls"),
    ([("in/a.png", 1), ("in/a.cls", b"7"), ("in/b.png", 2)], "in/b.png"),
    ([("a.png", 1), ("b.cls", b"7")], "a.png"),
])
def test_every_image_has_the_label_of_its_own_key_or_the_archive_is_refused(tmp_path, members, found):
    """The kind: images of one archive that share a label, or get that of another."""
    pack(tmp_path / "x.tar", *members)
    if isinstance(found, dict):
        assert labels_of(tmp_path / "x.tar") == found
    else:
        with pytest.raises(UserError, match=f"x.tar: {found}: it is not clear which image has which label"):
            labels_of(tmp_path / "x.tar")


def test_without_labels_dots_in_names_mean_what_they_mean_in_a_folder_and_a_mask_is_named(tmp_path, capsys):
    names = [f"n{kind}/n{kind}.{i}.png" for kind in (1, 2) for i in range(3)]
    pack(tmp_path / "x.tar", *((name, i) for i, name in enumerate(names)))
    with tarfile.open(tmp_path / "x.tar") as archive:
        archive.extractall(tmp_path / "x", filter="data")
    ours, theirs = (load_data(CONFIG | dict(data=str(tmp_path / name)))[0] for name in ("x.tar", "x"))
    assert ours.fingerprint == theirs.fingerprint and not capsys.readouterr().err
    pack(tmp_path / "y.tar", ("key.png", 1), ("key.seg.png", 2))
    load_data(CONFIG | dict(data=str(tmp_path / "y.tar")))
    assert "key.seg.png is taken for an image, as is what is called key alone" in capsys.readouterr().err


def test_of_a_member_that_is_stored_twice_the_last_one_counts_as_when_it_is_unpacked(tmp_path):
    """`tar -u` and `tar -r` append; the kind: images, labels and links that a later member replaces."""
    path = pack(tmp_path / "x.tar", *((f"{kind}/{i}.png", i) for kind in "ab" for i in range(9)))
    pack(path, ("a/0.png", 100), ("./a/1.png", (tarfile.SYMTYPE, "x")), ("a//1.png", 101), mode="a")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "x", filter="data")
    ours, theirs = (load_data(CONFIG | dict(data=str(tmp_path / name)))[0] for name in ("x.tar", "x"))
    assert ours.fingerprint == theirs.fingerprint and len(ours) == 18 - 1  # one is held out
    assert all(torch.equal(ours.pixels(i), theirs.pixels(i)) for i in range(17))
    pack(tmp_path / "y.tar", ("a.cls", b"7"), ("a.png", 1), ("b.png", 2), ("b.cls", b"7"), ("a.cls", b"8"))
    assert labels_of(tmp_path / "y.tar") == {1: "8", 2: "7"}


def test_a_label_is_its_text_in_whatever_encoding_or_refused(tmp_path):
    """The kind: one label that becomes several classes by bytes around it, or several that become one."""
    texts = [b"7", b"7\n", b"7\r\n", b"\xef\xbb\xbf7\r\n", "7".encode("utf-16"), b"\xfe\xff\x007\x00\n"]
    pack(tmp_path / "x.tar", *((f"{i}.cls", text) for i, text in enumerate(texts)),
         *((f"{i}.png", i) for i in range(6)))
    assert set(labels_of(tmp_path / "x.tar").values()) == {"7"}
    pack(tmp_path / "y.tar", ("a.png", 1), ("a.cls", b"caf\xe9"), ("b.png", 2), ("b.cls", b"caf\xe8"))
    assert labels_of(tmp_path / "y.tar") == {1: r"caf\xe9", 2: r"caf\xe8"}
    for text in (b"7\x00", b"", b"\n", b"7\n8", b"\xff\xfe7", b"x" * 5000):
        pack(tmp_path / "z.tar", ("a.png", 1), ("in/a.cls", text))
        with pytest.raises(UserError, match="z.tar: in/a.cls names no class: one line of text"):
            labels_of(tmp_path / "z.tar")


@pytest.mark.parametrize("text", [
    "x-{000..012}.tar", "{8..11}", "{08..11}", "{3..1}", "a{b,c}{0..1}", "{a,b{1..2}}", "{x}", "a{1..}"])
def test_braces_are_those_of_bash(text):
    words = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True).stdout.split()
    assert set(braces(text)) == set(words)


def test_archives_are_named_with_braces_and_one_that_is_missing_or_bad_is_named(archives, tmp_path):
    for path in archives.iterdir():
        shutil.copy(path, tmp_path)
    theirs, (data, val) = load_data(config(archives)), ("train-{0..1}.tar", "{val.tar,val.tar}")
    ours = load_data(config(tmp_path, data=f"{tmp_path}/{data}", val=f"{tmp_path}/{val}"))
    assert [part.fingerprint for part in ours] == [part.fingerprint for part in theirs]
    for key, name, missing in (("data", "train-{0..2}.tar", "train-2.tar"), ("val", "{val,v}.tar", "v.tar")):
        with pytest.raises(UserError, match=f"^--{key} .*no such archive: {tmp_path}/{missing} is not there"):
            load_data(config(tmp_path, **{key: f"{tmp_path}/{name}"}))
    (tmp_path / "train-1.tar").write_bytes(b"no archive" * 1000)
    with pytest.raises(UserError, match=f"^{tmp_path}/train-1.tar is damaged or no tar"):
        load_data(config(tmp_path, data=f"{tmp_path}/train-{{0..1}}.tar"))
    shutil.copy(archives / "val.tar", tmp_path / "v[1]{a,b}.tar")  # a file of that very name
    assert len(load_data(config(tmp_path, data=f"{tmp_path}/v[1]{{a,b}}.tar", val=None))[0]) == 19


@pytest.mark.parametrize("sources, missing", [
    (("d/train-*.tar", None), "d/train-*.tar"), (("train-{0..2}.tar", "val.tar"), "train-{0..2}.tar"),
    (("train-*.tar", "d/val.tar"), "d/val.tar")])
def test_archives_that_are_not_there_are_laid_to_the_run_that_named_them(
    archives, tmp_path, monkeypatch, sources, missing
):
    monkeypatch.chdir(archives)
    run, about = tmp_path / "phase1.pt", CONFIG | dict(zip(("data", "val"), sources, strict=True))
    with pytest.raises(UserError) as stop:
        plumbing.data.images_of(run, about)
    assert str(stop.value) == (f"the run of {run} had its images in {missing}, and from {archives} there is "
                               "no such archive; pass --data PATH")
    assert len(plumbing.data.images_of(run, about, f"{archives}/val.tar")[1]) == 20


def test_folders_that_are_called_by_numbers_are_classes_in_the_order_of_a_folder_of_images(tmp_path):
    pack(tmp_path / "a.tar", *((f"{kind}/x.png", kind) for kind in (2, 10)))
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "folder", filter="data")
    archives, folder = (load_data(config(tmp_path, data=str(place), val=str(place)))[0] for place in (
        tmp_path / "a.tar", tmp_path / "folder"))
    assert archives.class_names == folder.class_names == ["10", "2"]
    assert archives.fingerprint == folder.fingerprint and torch.equal(archives.view(0), folder.view(0))


def test_metrics_compare_with_images_of_archives(trained, data, archives, tmp_path):
    call("vgg", tmp_path, data, "--arch", "resnet", classifier__width=2)  # 16 features, for 20 images
    study("metrics", "--ckpt", trained / "phase1.pt", "--extractor", tmp_path / "resnet.pt", "--lpips",
          "none", "--data", f"{archives}/val.tar", "--references", tmp_path / "r", "--out",
          tmp_path / "x.json", "--device", "cpu")
    assert json.loads((tmp_path / "x.json").read_text())["reference_images"] == 20


def test_without_val_a_share_is_held_out_and_without_classes_there_are_no_labels(tmp_path, capsys):
    pack(tmp_path / "a.tar", *((f"{i}.png", i) for i in range(40)))
    train, val = load_data(config(tmp_path, data=f"{tmp_path}/*.tar", val=None))
    assert (len(train), len(val), train.class_names) == (38, 2, []) and not {*train.files} & {*val.files}


def test_an_archive_is_looked_through_again_only_when_it_changed(archives, tmp_path, monkeypatch):
    looked = []
    real = plumbing.archives.look_through
    monkeypatch.setattr(plumbing.archives, "look_through", lambda path: looked.append(path) or real(path))
    for path in archives.iterdir():
        shutil.copy(path, tmp_path)
    first = load_data(config(tmp_path), tmp_path / "run")[0]
    assert len(looked) == 3
    assert load_data(config(tmp_path), tmp_path / "run")[0].files == first.files and len(looked) == 3
    os.utime(tmp_path / "train-1.tar")  # written anew, perhaps
    assert load_data(config(tmp_path), tmp_path / "run")[0].files == first.files
    assert looked[3:] == [f"{tmp_path}/train-1.tar"]
    (index,) = [p for p in (tmp_path / "run").iterdir() if "val" not in p.read_text()]
    index.write_text("{")
    assert load_data(config(tmp_path), tmp_path / "run")[0].files == first.files and len(looked) == 6
    monkeypatch.setattr(plumbing.archives, "RULES", 0)  # an index of other rules is not believed
    assert load_data(config(tmp_path), tmp_path / "run")[0].files == first.files and len(looked) == 9


def test_few_archives_are_open_at_a_time_and_workers_share_none(archives, monkeypatch):
    few = functools.lru_cache(1)(plumbing.archives.opened.__wrapped__)
    monkeypatch.setattr(plumbing.archives, "opened", few)
    data = load_data(config(archives))[0]
    pixels = [data.render(i) for i in range(len(data))]
    assert few.cache_info().currsize == 1 and few.cache_info().misses >= 2
    before, number = few.cache_info().misses, os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: number + 1)  # as in a forked child
    assert torch.equal(data.render(len(data) - 1), pixels[-1]) and few.cache_info().misses == before + 1


def test_an_image_that_is_none_is_replaced_as_in_a_folder(tmp_path):
    web(tmp_path / "a.tar")
    pack(tmp_path / "a.tar", ("0003x.png", b"no picture"), ("0003x.cls", b"0"), mode="a")
    for _ in range(2):  # a later process finds it again and lists it once
        data = load_data(config(tmp_path, data=f"{tmp_path}/a.tar", val=f"{tmp_path}/a.tar"))[0]
        data.bad_list = tmp_path / "bad_files.txt"
        bad = next(i for i in range(13) if "0003x" in data.name(i))
        assert torch.equal(data.pixels(bad), data.pixels(bad + 1)) and data.readable(bad) == bad + 1
    said = "UnidentifiedImageError: cannot identify image file"
    assert data.bad_list.read_text() == f"{data.name(bad)}\t{said}\n"


def test_splits_that_would_become_one_are_refused(archives, tmp_path):
    with pytest.raises(UserError, match=r"several splits of a data set \(train, val\)"):
        load_data(config(archives, data=f"{archives}/*.tar"))
    for form in ("set/{}/cat/1.png", "set/{}/1.png"):
        pack(tmp_path / "all.tar", *((form.format(split), b"1") for split in ("train", "val")))
        with pytest.raises(UserError, match="several splits"):
            load_data(config(tmp_path, data=f"{tmp_path}/all.tar"))


@pytest.mark.parametrize("harm", ["bit", "cut in a header", "cut before a header", "two"])
def test_no_image_of_a_damaged_archive_vanishes_without_a_word(archives, tmp_path, harm):
    whole = (archives / "val.tar").read_bytes()
    with tarfile.open(archives / "val.tar") as archive:
        place = archive.getmembers()[10].offset
    (tmp_path / "x.tar").write_bytes({
        "bit": whole[: place + 3] + bytes([whole[place + 3] ^ 1]) + whole[place + 4 :],
        "cut in a header": whole[: place + 200], "cut before a header": whole[:place],
        "two": whole + whole}[harm])
    with pytest.raises(UserError, match=f"{tmp_path}/x.tar is (cut off or )?damaged after"):
        load_data(config(tmp_path, data=f"{tmp_path}/x.tar"))


def test_an_archive_of_a_flat_folder_has_no_classes_and_hidden_folders_none(flat, tmp_path):
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        archive.add(flat, ".")
    theirs, ours = load_data(CONFIG | dict(data=str(flat)))[0], load_data(config(
        tmp_path, data=f"{tmp_path}/flat.tar", val=None))[0]
    assert ours.class_names == [] and ours.fingerprint == theirs.fingerprint
    hidden = "./.thumbs/1.png", "cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/1.png"
    pack(tmp_path / "hidden.tar", *((name, 1) for name in ("./cat/1.png", "./dog/1.png", *hidden)))
    files, names = plumbing.archives.scan_archives(tmp_path / "hidden.tar")
    assert names == ["cat", "dog"] and len(files) == 2


def test_a_link_for_an_image_or_a_label_is_refused_and_a_class_with_a_slash_is_one_folder(tmp_path):
    assert labels_of(pack(tmp_path / "x.tar", ("1.png", 1), ("1.cls", b"b/balcony"))) == {1: "b_balcony"}
    for names in (("a/1.png", "a/2.png"), ("1.png", "1.cls")):
        pack(tmp_path / "link.tar", (names[0], 1), (names[1], (tarfile.LNKTYPE, names[0])))
        with pytest.raises(UserError, match=f"{names[1]} is a link; pack the images themselves"):
            load_data(config(tmp_path, data=f"{tmp_path}/link.tar"))


def test_where_no_index_can_be_kept_the_images_are_still_read(archives, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    files, _ = plumbing.archives.scan_archives(archives / "val.tar", keep=tmp_path / "file" / "below")
    assert len(files) == 20 and "is not kept" in capsys.readouterr().err


def test_archives_that_cannot_be_read_are_refused_in_one_line(archives, tmp_path):
    good = (archives / "val.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(good[: len(good) // 2 + 100])
    (tmp_path / "text.tar").write_bytes(b"this is no archive at all" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "packed.tar").write_bytes(gzip.compress(good))
    shutil.copy(tmp_path / "packed.tar", tmp_path / "packed.tgz")
    broken = bytearray(good)
    broken[:100] = b"x" * 100  # the first header
    (tmp_path / "broken.tar").write_bytes(broken)
    pack(tmp_path / "nested.tar", ("inner.tar", good))
    pack(tmp_path / "mixed.tar", ("a/1.png", b"1"), ("2.png", b"2"))
    for name, told in (("cut", "cut off|damaged"), ("text", "damaged or no tar"),
                       ("empty", "damaged or no|no images"), ("packed", "is compressed"),
                       ("broken", "damaged or no tar"), ("nested", "holds archives"),
                       ("mixed", "with and without a class"), ("nowhere", "no such archive")):
        with pytest.raises(UserError, match=told) as caught:
            load_data(config(tmp_path, data=f"{tmp_path}/{name}.tar"))
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is compressed"):
        load_data(config(tmp_path, data=f"{tmp_path}/packed.tgz"))
