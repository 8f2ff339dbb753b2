"""Claims about images in tar archives: they are those of the same folder, bit for bit."""

import gzip
import io
import tarfile

import pytest
import torch
from helpers import call, differing
from PIL import Image

from plumbing.archives import is_archive, numbered
from plumbing.data import images_of, load_data
from plumbing.errors import UserError
from plumbing.files import read_checkpoint

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


def unpacked(path, folder):
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder


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


def alone(path):
    """The images of one archive, as training and as validation images."""
    return load_data(CONFIG | dict(data=str(path), val=str(path)))


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{0..1}.tar"])
def test_archives_hold_the_images_of_the_folder_in_its_order_with_its_crops_and_fingerprint(
        data, archives, pattern):
    theirs = load_data(CONFIG | dict(data=str(data)))
    for ours, folder in zip(load_data(config(archives, data=f"{archives}/{pattern}")), theirs, strict=True):
        assert ours.class_names == folder.class_names and len(ours.class_names) == 10
        assert ours.labels == folder.labels and ours.fingerprint == folder.fingerprint
        for i in range(len(folder)):
            assert torch.equal(ours.pixels(i), folder.pixels(i))
        assert torch.equal(ours.view(0, 7, True), folder.view(0, 7, True))
        assert ours.name(0).startswith(f"{archives}/") and len(ours.times()) == 1 + (len(ours) == 60)


def test_a_pattern_with_numbers_is_expanded_as_webdataset_does():
    assert numbered("x-{008..010}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar"]
    assert numbered("x-{8..10}.tar") == ["x-8.tar", "x-9.tar", "x-10.tar"] and numbered("x.tar") == ["x.tar"]
    assert is_archive("x-{0..1}.TAR") and not is_archive("x.tar.gz") and not is_archive(None)


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
    assert found["a"]["step"] == 4


def labels_of(path):
    """{shade: name of its class} of the pictures in an archive"""
    data = alone(path)[0]
    return {data.pixels(i)[0, 0, 0].item(): data.class_names[data.labels[i]] for i in range(len(data))}


@pytest.mark.parametrize("members, found", [
    ([("photo.00.png", 1), ("photo.00.cls", b"7"), ("photo.01.png", 2), ("photo.01.cls", b"10")],
     {1: "7", 2: "10"}),
    ([("in/a.png", 1), ("in/a.cls", b"7"), ("b.png", 2), ("b.cls", b"8"), ("b.json", b"9")],
     {1: "7", 2: "8"}),
    ([("a.png", 1), ("a.cls", b"b/balcony")], {1: "b_balcony"}),
    ([("key.png", 1), ("key.seg.png", 2), ("key.cls", b"7")], "key.seg.png"),
    ([("a.png", 1), ("a.jpg", 2), ("a.cls", b"7")], "a.png"),
    ([("a.1.png", 1), ("a.2.png", 2), ("a.cls", b"7")], "a.1.png"),
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


def test_of_a_member_that_is_stored_twice_the_last_one_counts_as_when_it_is_unpacked(tmp_path):
    """`tar -u` and `tar -r` append; the kind: images and labels that a later member replaces."""
    path = pack(tmp_path / "x.tar", *((f"{kind}/{i}.png", i) for kind in "ab" for i in range(9)))
    pack(path, ("a/0.png", 100), ("a//1.png", 101), mode="a")
    ours, theirs = alone(path)[0], alone(unpacked(path, tmp_path / "x"))[0]
    assert ours.fingerprint == theirs.fingerprint and len(ours) == 18
    assert all(torch.equal(ours.pixels(i), theirs.pixels(i)) for i in range(18))
    pack(tmp_path / "y.tar", ("a.cls", b"7"), ("a.png", 1), ("b.png", 2), ("b.cls", b"7"), ("a.cls", b"8"))
    assert labels_of(tmp_path / "y.tar") == {1: "8", 2: "7"}


def test_a_label_is_one_line_of_text_with_whatever_ends_it_or_refused(tmp_path):
    """The kind: one label that becomes several classes by bytes around it, or several that become one."""
    texts = [b"7", b"7\n", b"7\r\n", b"\xef\xbb\xbf7\r\n", b"caf\xe9", b"caf\xe8"]
    pack(tmp_path / "x.tar", *((f"{i}.cls", text) for i, text in enumerate(texts)),
         *((f"{i}.png", i) for i in range(6)))
    found = labels_of(tmp_path / "x.tar")
    assert found == dict.fromkeys(range(4), "7") | {4: r"caf\xe9", 5: r"caf\xe8"}
    for text in (b"7\x00", b"", b"\n", b"7\n8", "7".encode("utf-16")):
        pack(tmp_path / "z.tar", ("a.png", 1), ("in/a.cls", text))
        with pytest.raises(UserError, match="z.tar: in/a.cls names no class: one line of text"):
            labels_of(tmp_path / "z.tar")


@pytest.mark.parametrize("sources, missing", [
    (("d/train-*.tar", None), "d/train-*.tar"), (("train-{0..2}.tar", "val.tar"), "train-{0..2}.tar"),
    (("train-*.tar", "d/val.tar"), "d/val.tar")])
def test_archives_that_are_not_there_are_laid_to_the_run_that_named_them(
        archives, tmp_path, monkeypatch, sources, missing):
    monkeypatch.chdir(archives)
    run, about = tmp_path / "phase1.pt", CONFIG | dict(zip(("data", "val"), sources, strict=True))
    with pytest.raises(UserError, match="pass --data PATH") as stop:
        images_of(run, about)
    assert f"the run of {run} had its images in {missing}, and from {archives}" in str(stop.value)
    assert len(images_of(run, about, f"{archives}/val.tar")[1]) == 20


def test_what_is_hidden_is_left_out_and_numbers_are_sorted_as_in_a_folder(flat, tmp_path):
    hidden = "./.thumbs/1.png", "2/.ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "10/._x.png"
    pack(tmp_path / "a.tar", *((name, 1) for name in ("./2/x.png", "./10/x.png", *hidden)))
    ours, theirs = alone(tmp_path / "a.tar")[0], alone(unpacked(tmp_path / "a.tar", tmp_path / "a"))[0]
    assert ours.class_names == theirs.class_names == ["10", "2"] and ours.fingerprint == theirs.fingerprint
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        archive.add(flat, ".")
    (train, val), theirs = load_data(config(tmp_path, data=f"{tmp_path}/flat.tar", val=None)), load_data(
        CONFIG | dict(data=str(flat)))[0]
    assert train.class_names == [] and train.fingerprint == theirs.fingerprint
    assert val.files and not {*train.files} & {*val.files}


def test_an_image_that_is_none_is_replaced_as_in_a_folder(tmp_path):
    pack(tmp_path / "a.tar", *((f"{i}.png", 20 * i) for i in range(12)), ("3x.png", b"no picture"))
    for _ in range(2):  # a later process finds it again and lists it once
        data = alone(tmp_path / "a.tar")[0]
        data.bad_list = tmp_path / "bad_files.txt"
        bad = next(i for i in range(13) if "3x" in data.name(i))
        assert torch.equal(data.pixels(bad), data.pixels(bad + 1)) and data.readable(bad) == bad + 1
    said = "UnidentifiedImageError: cannot identify image file"
    assert data.bad_list.read_text() == f"{data.name(bad)}\t{said}\n"


def cases(good):
    """{file name: (its content, what is said of it)} of archives that cannot be read whole"""
    with tarfile.open(fileobj=io.BytesIO(good)) as archive:
        member = archive.getmembers()[10]
    place, data = member.offset, member.offset_data
    return {
        "bit.tar": (good[: place + 3] + bytes([good[place + 3] ^ 1]) + good[place + 4 :], "damaged after"),
        "in a header.tar": (good[: place + 200], "damaged"),
        "before a header.tar": (good[:place], "damaged"),
        "in an image.tar": (good[: data + 20], "damaged"),
        "two.tar": (good + good, "damaged after"),
        "first.tar": (b"x" * 100 + good[100:], "no plain tar archive"),
        "text.tar": (b"this is no archive at all" * 100, "no plain tar archive"),
        "empty.tar": (b"", "no plain tar archive"),
        "packed.tar": (gzip.compress(good), "unpack a compressed one"),
        "packed.tgz": (gzip.compress(good), "is a file; unpack it first"),
        "nowhere.tar": (None, "there is no")}


def test_an_archive_that_cannot_be_read_whole_is_named_and_refused_in_one_line(archives, tmp_path):
    """The kind: images that vanish without a word."""
    for name, (content, told) in cases((archives / "val.tar").read_bytes()).items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=told) as stop:
            alone(tmp_path / name)
        assert str(tmp_path / name) in str(stop.value) and "\n" not in str(stop.value)
    with pytest.raises(UserError, match="there is no .*/train-2.tar"):
        load_data(config(archives, data=f"{archives}/train-{{0..2}}.tar"))


@pytest.mark.parametrize("members, told", [
    ([("a/1.png", 1), ("a/2.png", (tarfile.LNKTYPE, "a/1.png"))], "a/2.png is a link; pack the images"),
    ([("1.png", 1), ("1.cls", (tarfile.SYMTYPE, "0.cls"))], "1.cls is a link; pack the images"),
    ([("a/1.png", 1), ("2.png", 2)], "with and without a class"),
    ([("set/train/1.png", 1), ("set/val/1.png", 2)], "train, val in --data .* are splits of a data set"),
    ([("inner.tar", b"x")], "no images in --data"),
])
def test_an_archive_whose_images_or_classes_are_no_such_is_refused(tmp_path, members, told):
    with pytest.raises(UserError, match=told):
        alone(pack(tmp_path / "x.tar", *members))
