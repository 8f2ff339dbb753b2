"""Claims about tokens of many images: python -m studies tokens, a file of them and the images of one."""

import contextlib
import json
import types

import pytest
import safetensors.torch
import torch
from helpers import contents, refused, study
from safetensors import safe_open
from test_foreign import images, taming
from test_sample import CONFIG, call, picture, tiny_tokenizer, write_checkpoint

import plumbing.models
import studies.tokens
from plumbing.codes import encode_all
from plumbing.data import images_of
from plumbing.hashes import latent_hash
from plumbing.slices import reconstructions


@pytest.fixture
def run(tmp_path):
    return write_checkpoint(tmp_path / "phase1.pt", "phase1", tiny_tokenizer()).parent


def write(run, data, *words):
    study("tokens", "--ckpt", run / "phase1.pt", "--data", data, "--batch", 8, *words, "--device", "cpu")
    return run / "tokens_phase1.safetensors"


def decode(run, file, *words):
    study("tokens", "--ckpt", run / "phase1.pt", "--decode", file, "--batch", 8, *words, "--device", "cpu")
    return run / f"{file.stem}_images"


def opened(path):
    """The tensors and the header, by the package alone."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])


def test_the_file_holds_the_tokens_of_all_validation_images_and_gives_their_reconstructions(run, data):
    tensors, header = opened(write(run, data))
    images, tokenizer = images_of(run / "phase1.pt", CONFIG, data)[1], tiny_tokenizer()
    expected = [tokens for *_, tokens in reconstructions(tokenizer, images, 20, 8, "cpu")]
    assert tensors["tokens"].dtype == torch.int16 and len(tensors["tokens"].unique()) > 4
    assert torch.equal(tensors["tokens"].long(), torch.cat(expected))
    assert tensors["labels"].tolist() == images.labels
    assert header["names"] == ["/".join(path.split("/")[-2:]) for path in images.files]
    assert [header["class_names"][label] for label in images.labels] == [
        name.split("/")[0] for name in header["names"]] and len({*images.labels}) == 10
    assert header["tokenizer"] == latent_hash(tokenizer) and header["codebook_size"] == 16
    found = contents(decode(run, run / "tokens_phase1.safetensors"))
    words = ["--reconstruct", "--num", 20, "--batch", 8, "--format", "files", "--data", data]
    call("--ckpt", run / "phase1.pt", *words, "--out", run / "reconstructed")
    pngs, same = ({path.name: text for path, text in some.items() if path.suffix == ".png"}
                  for some in (found, contents(run / "reconstructed")))
    assert pngs == same and len(pngs) == 20 and len({*pngs.values()}) > 10


def test_tokens_of_a_public_tokenizer_go_to_a_file_and_back(data, tmp_path, monkeypatch):
    monkeypatch.setattr(plumbing.models.as_checkpoint, "__defaults__", (32,))  # published ones are for 256
    torch.save(taming(images())[0], tmp_path / "phase1.pt")
    tensors, header = opened(write(tmp_path, data))
    assert tensors["tokens"].shape == (20, 256) and "taming" in header["note"]
    assert len([*decode(tmp_path, tmp_path / "tokens_phase1.safetensors").glob("*.png")]) == 20


def test_an_interrupted_call_goes_on_with_what_is_missing_and_ends_in_the_same_files(run, data, monkeypatch):
    for call_, function, place in ((lambda: write(run, data), "in_slices", "tokens_phase1.safetensors"),
                                   (lambda: decode(run, run / "tokens_phase1.safetensors"), "decode",
                                    "tokens_phase1_images")):
        call_()
        whole = contents(run)
        (run / place).rename(run.parent / f"{run.name}_{place}")
        real, done = getattr(studies.tokens, function), []

        def spy(network, x, real=real, done=done):
            done.append(len(x))
            if len(done) == 2:
                raise KeyboardInterrupt
            return real(network, x)

        monkeypatch.setattr(studies.tokens, function, spy)
        with pytest.raises(KeyboardInterrupt):
            call_()
        assert place == "tokens_phase1_images" or not (run / place).exists()
        call_()
        assert done == [8, 8, 8, 4]
        assert contents(run) == whole  # and the parts are gone


def test_an_image_that_cannot_be_read_has_the_name_of_the_one_in_its_place_and_a_flat_folder_no_labels(
        run, tmp_path):
    for i in range(12):
        picture(tmp_path / "flat" / f"{i:02d}.png", (20 * i, 9, 200), (20, 20))
    (tmp_path / "flat" / "03.png").write_bytes(b"no image")
    tensors, header = opened(write(run, tmp_path / "flat"))
    names, order = header["names"], images_of(run / "phase1.pt", CONFIG, tmp_path / "flat")[1].files
    bad = order.index(str(tmp_path / "flat" / "03.png"))
    stand_in = (bad + 1) % 12
    assert names[bad] == names[stand_in] != names[bad - 1] and "03.png" not in names and len({*names}) == 11
    assert torch.equal(tensors["tokens"][bad], tensors["tokens"][stand_in])
    assert {*tensors} == {"tokens"} and header["class_names"] == []


def test_a_prior_s_tokens_are_encoded_in_micro_batches_too(data, run, tmp_path, monkeypatch):
    """With --micro-batch 1 a pass of 128 images took 19 GiB all the same."""
    tokenizer, images = tiny_tokenizer(), images_of(run / "phase1.pt", CONFIG, data)[1]
    real, sizes, found = tokenizer.encode, [], []
    monkeypatch.setattr(tokenizer, "encode", lambda x: sizes.append(len(x)) or real(x))
    views = [(images, i, None, False) for i in range(20)]
    for size in (8, 3):
        settings = types.SimpleNamespace(micro=lambda x, size=size: x.split(size), request=0, device="cpu",
                                         autocast=contextlib.nullcontext())
        found.append(encode_all(settings, tokenizer, views, tmp_path / str(size), batch=8)["tokens"])
    assert sizes == [8, 8, 4, 3, 3, 2, 3, 3, 2, 3, 1]
    assert (found[0] == found[1]).float().mean() > 0.99 and len(found[0].unique()) > 4  # but for rounding


def own(path, tokens, **header):
    """A file that another program wrote."""
    header = {"tokenizer": latent_hash(tiny_tokenizer())} | header
    safetensors.torch.save_file({"tokens": tokens}, path, {"about": json.dumps(header)})
    return path


def test_tokens_of_one_s_own_need_the_tokenizer_s_hash_alone(run, capsys):
    path = own(run / "mine.safetensors", torch.arange(48).view(3, 16) % 16)
    assert len([*decode(run, path).glob("*.png")]) == 3
    assert "3 images" in capsys.readouterr().out
    other = own(run / "mine.safetensors", torch.zeros(3, 16, dtype=torch.int64))
    assert "pass another --out" in refused(capsys, decode, run, other)  # other tokens in a folder of these


@pytest.mark.parametrize("tokens, header, told", [
    (torch.full((2, 16), 16), {}, "from 0 to 15"), (torch.full((2, 16), -1), {}, "from 0 to 15"),
    (torch.zeros(2, 16), {}, "torch.float32"), (torch.zeros(2, 9, dtype=torch.int32), {}, "(2, 9)"),
    (torch.zeros(2, 16, dtype=torch.int32), dict(tokenizer="0" * 16), "pass the right one with --ckpt"),
    (torch.zeros(2, 16, dtype=torch.int32), dict(tokens_hash="0" * 16), "is damaged"),
    (torch.zeros(0, 16, dtype=torch.int32), {}, "(0, 16)")])
def test_tokens_that_this_tokenizer_cannot_decode_are_refused(run, tokens, header, told, capsys):
    error = refused(capsys, decode, run, own(run / "x.safetensors", tokens, **header))
    assert told in error and "x.safetensors" in error and not (run / "x_images").exists()


def test_a_damaged_file_and_one_of_another_kind_are_refused_and_not_overwritten(run, data, capsys):
    path = write(run, data)
    content, tokens = path.read_bytes(), opened(path)[0]["tokens"].numpy().tobytes()
    place = content.index(tokens) + 100
    changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for damaged in (content[:-9], b"text", changed, safetensors.torch.save({"a": torch.zeros(3)})):
        path.write_bytes(damaged)
        assert "is damaged or no file" in refused(capsys, decode, run, path)
        assert "is damaged or no file" in refused(capsys, write, run, data)
        assert path.read_bytes() == damaged
    assert "must end in .safetensors" in refused(capsys, write, run, data, "--out", run / "x.pt")
