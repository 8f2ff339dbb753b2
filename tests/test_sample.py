"""Claims about sample.py: data as functions of their address, image files, checkpoints, samples, pictures."""

import itertools
import math
import os
import pickle
from pathlib import Path
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import Bomb, refused
from PIL import Image

import plumbing.data
import plumbing.dataset
import plumbing.fast
import plumbing.files
import plumbing.hashes
import plumbing.images
import plumbing.models
import plumbing.processes
import plumbing.shapes
import plumbing.slices
import recipes.options
import sample
from forks.guidance import GuidedAR, GuidedNAR
from prior_ar import ARPrior, PriorConfig
from prior_nar import NARPrior
from plumbing.data import FolderData, scan_folder
from plumbing.errors import UserError
from plumbing.files import FORMAT, read_checkpoint
from plumbing.images import load_rgb
from plumbing.processes import mix
from plumbing.shapes import Shapes
from tokenizer import TokenizerConfig, VQTokenizer

SETTINGS = dict(
    top_p=0.92, temperature=1.0, nar_steps=3, token_temperature=1.0, choice_temperature=0.45,
    confidence_space="prob", guidance=1.0, top_k=0,
)
CONFIG = dict(data="shapes", image_size=16, seed=0, limit=None, val=None, sample=SETTINGS)
TOKENIZER = dict(image_size=16, base_width=8, channel_mult=(1, 2, 2), codebook_size=16, codebook_dim=4)
PRIOR = dict(codebook_size=16, num_tokens=16, num_classes=3, n_layer=1, n_head=2, n_embd=16)


def tiny_tokenizer(seed=0):
    torch.manual_seed(seed)
    tokenizer = VQTokenizer(TokenizerConfig(**TOKENIZER)).eval()
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    return tokenizer


def tiny_prior(kind=ARPrior, **changes):
    """Weights scaled so that the logits, and with them the images, differ clearly."""
    torch.manual_seed(1)
    prior = kind(PriorConfig(**{**PRIOR, **changes})).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(5)
    return prior


def write_checkpoint(path, stage, model, /, **changes):
    """A checkpoint as train.py writes it."""
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(model.config).items()}
    ckpt = dict(
        format=FORMAT, stage=stage, step=1, config=CONFIG, model_config=sizes, model=model.state_dict(),
        ema=None, class_names=["disk", "ring", "star"], tokenizer_hash=None, note="", seconds=0.0, train={},
    )
    torch.save({**ckpt, **changes}, path)
    return path


@pytest.fixture
def run(tmp_path):
    """A run folder with a tokenizer and both priors."""
    tokenizer = tiny_tokenizer()
    write_checkpoint(tmp_path / "phase1.pt", "phase1", tokenizer)
    for stage, kind in (("ar", ARPrior), ("nar", NARPrior)):
        ours = plumbing.hashes.latent_hash(tokenizer)
        write_checkpoint(tmp_path / f"{stage}.pt", stage, tiny_prior(kind), tokenizer_hash=ours)
    return tmp_path


def picture(path, colour=(10, 200, 30), size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


# Seeds ----------------------------------------------------------------------------------------------------


def test_mix_is_the_same_number_on_every_machine_and_differs_for_other_parts():
    assert mix(0, "sample", 3) == 4826775862454517698  # golden
    assert mix("order", 7) == 6676722207188498306  # golden
    numbers = {mix(*parts) for parts in itertools.product(range(20), ("crop", "order"), range(50))}
    assert len(numbers) == 2000 and all(0 <= number < 2**63 for number in numbers)
    assert mix(1, 23) != mix(12, 3) and mix("1") != mix(1)
    state = torch.get_rng_state()
    first, again = (plumbing.processes.seeded_rand(2, 3, seed=5) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


# Shapes ---------------------------------------------------------------------------------------------------


def test_shapes_are_a_function_of_split_and_index():
    first, again = Shapes("train", 30, 16), Shapes("train", 100, 16)
    large = Shapes("train", 30, 64)  # any resolution: the same picture up to its edges
    for index in (0, 7, 29):
        assert large.factors(index) == first.factors(index)
        shrunk = torch.nn.functional.avg_pool2d(large.render(index).float(), 4)
        assert (shrunk - first.render(index)).abs().mean() < 20
        assert torch.equal(first.render(index), again.render(index))
        assert torch.equal(first.pixels(index), first.pixels(index))
        assert not torch.equal(first.mask(index), Shapes("val", 30, 16).mask(index))
        assert torch.equal(first.render(index), Shapes("train", 30, 16, seed=1).render(index))
        assert not torch.equal(first.mask(index), first.mask(index + 10))  # the same class, another structure


def test_classes_of_shapes_are_balanced_and_every_class_looks_different():
    data = Shapes("train", 200, 32)
    assert data.num_classes == 10 and len(set(data.class_names)) == 10
    assert np.bincount(data.labels).tolist() == [20] * 10
    assert all(data.factors(index)["label"] == data.labels[index] for index in range(20))
    for index in range(200):
        assert 0.02 < data.mask(index).mean() < 0.6  # a shape under enough of the image, on enough ground
    axis = torch.linspace(-1.2, 1.2, 33)
    fields = [plumbing.shapes.shape_distance(label, axis[None, :], axis[:, None]) < 0 for label in range(10)]
    assert all((a != b).float().mean() > 0.02 for a, b in itertools.combinations(fields, 2))


# The stream of training images ----------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_of_its_own():
    data = Shapes("train", 30, 8)
    epochs = [[data.shuffled(30 * epoch + i) for i in range(30)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert data.shuffled(4) == epochs[0][4]  # back to an earlier epoch
    assert [Shapes("train", 30, 8, seed=1).shuffled(i) for i in range(30)] != epochs[0]


def test_an_item_depends_on_its_position_only_and_brings_its_label(tmp_path):
    files = [picture(tmp_path / f"{i}.png", (i, 0, 0), (11, 9)) for i in range(4)]
    data, again = (FolderData(files, [], 8, seed=0) for _ in range(2))
    for position in (9, 2, 13, 2):
        torch.manual_seed(position)
        assert torch.equal(data[position][0], again[position][0])
    shapes = Shapes("train", 20, 8)
    assert all(shapes[p][1] == shapes.labels[shapes.shuffled(p)] for p in range(25))


def test_crops_are_central_without_a_seed_and_deterministic_with_one(tmp_path):
    ramp = np.stack([np.arange(40)[None, :].repeat(8, 0)] * 3, 2).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    data = FolderData([tmp_path / "ramp.png"], [], 8, seed=0)
    assert torch.equal(data.view(0)[0, 0], torch.arange(16, 24).byte())
    assert torch.equal(data.view(0, flip=True), data.view(0).flip(2))
    starts = [data.view(0, crop_seed)[0, 0, 0].item() for crop_seed in range(300)]
    assert starts == [data.view(0, crop_seed)[0, 0, 0].item() for crop_seed in range(300)]
    assert set(starts) == set(range(33))  # every place, both ends included
    both = {data[position][0][0, 0].diff()[0].item() for position in range(40)}
    assert both == {1, 255}  # some items are mirrored: their ramp falls


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_later_step_are_the_rest_of_the_stream_for_any_number_of_workers(workers):
    data = Shapes("train", 10, 8)  # 4 does not divide 10: batches cross the epochs
    expected = [[data[position] for position in range(4 * step, 4 * step + 4)] for step in range(6)]
    loader = plumbing.dataset.batches(data, 4, 3, workers)
    for items, (x, labels) in zip(expected[3:], loader, strict=False):
        assert x.dtype == torch.uint8 and torch.equal(x, torch.stack([item[0] for item in items]))
        assert labels.tolist() == [item[1] for item in items]


# Image files ----------------------------------------------------------------------------------------------


def test_every_mode_becomes_rgb_16_bits_scaled_and_transparency_white(tmp_path):
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(load_rgb(tmp_path / "x.png"))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=1)
    assert load_rgb(tmp_path / "palette.png").getpixel((0, 0)) == (0, 0, 255)
    for mode, colour, more, shown in (
            ("RGBA", (255, 0, 0, 0), {}, (255,) * 3), ("RGBA", (255, 0, 0, 51), {}, (255, 204, 204)),
            ("LA", (0, 0), {}, (255,) * 3), ("RGB", (1, 2, 3), dict(transparency=(1, 2, 3)), (255,) * 3),
            ("L", 77, {}, (77,) * 3), ("1", 1, {}, (255,) * 3)):
        Image.new(mode, (8, 8), colour).save(tmp_path / "x.png", **more)
        assert load_rgb(tmp_path / "x.png").getpixel((4, 4)) == shown, mode
    assert load_rgb(tmp_path / "palette.png").getpixel((4, 4)) == (255, 255, 255)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, blue = load_rgb(tmp_path / "cmyk.jpg").getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def test_exif_rotation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (32, 16), "blue"), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 16, 16))  # the left half red
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    shown = load_rgb(tmp_path / "x.jpg")
    assert shown.size == (16, 32)
    assert shown.getpixel((8, 4))[0] > 200 and shown.getpixel((8, 28))[2] > 200  # red above, blue below


@pytest.mark.parametrize("size", [(40, 20), (5, 7), (16, 16), (4, 30)])
def test_files_are_resized_to_the_short_side(tmp_path, size):
    data = FolderData([picture(tmp_path / "x.png", size=size)], [], 16, seed=0)
    pixels = data.pixels(0)
    assert min(pixels.shape[1:]) == 16 and pixels.dtype == torch.uint8
    assert pixels.shape[2] / pixels.shape[1] == pytest.approx(size[0] / size[1], rel=0.05)
    assert data.view(0, crop_seed=1).shape == (3, 16, 16)
    assert (data.view(0) == torch.tensor([10, 200, 30])[:, None, None]).all()
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255  # every second pixel alone would be white or black
    shrunk = plumbing.images.to_square(Image.fromarray(stripes).convert("RGB"), 16).float()
    assert (shrunk - 127.5)[:, :, 1:-1].abs().max() < 4  # shrinking averages over all pixels


# Folders --------------------------------------------------------------------------------------------------


def test_sub_folders_are_classes_and_hidden_things_are_ignored(tmp_path, capsys):
    hidden = (".hidden/1.png", "__MACOSX/1.png", "a/._1.png", "a/d.png/x.png")
    for name in ("b/1.png", "a/2.JPEG", "a/1.PNG", *hidden):
        picture(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "circle.png").symlink_to(tmp_path / "a" / "circle.png")
    (tmp_path / "empty").mkdir()
    files, names = scan_folder(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in files] == ["a/1.PNG", "a/2.JPEG", "b/1.png"]
    assert names == ["a", "b"]
    data = FolderData(files, names, 8, seed=0)
    assert data.labels == [0, 0, 1] and data.num_classes == 2 and data.render(1).shape[0] == 3
    (tmp_path / "b" / "1.png").rename(tmp_path / "loose.png")
    assert scan_folder(tmp_path)[1] == ["a"]
    assert "1 images beside the class folders" in capsys.readouterr().err


def test_a_flat_folder_has_no_classes(tmp_path):
    for name in ("2.webp", "1.BMP", ".3.png"):
        picture(tmp_path / name)
    files, names = scan_folder(tmp_path)
    assert [Path(path).name for path in files] == ["1.BMP", "2.webp"] and names == []
    assert FolderData(files, names, 8, seed=0).num_classes == 0


def test_a_missing_folder_an_empty_one_and_a_file_are_named_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist.*--data shapes"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images under"):
        scan_folder(tmp_path)
    with pytest.raises(UserError, match="is a file; unpack"):
        scan_folder(picture(tmp_path / "x.png"))


def test_without_a_validation_folder_a_twentieth_is_held_out_and_stays_the_same(tmp_path):
    for i in range(40):
        picture(tmp_path / "a" / f"{i:02d}.png")
    train, val = plumbing.data.load_data(dict(CONFIG, data=str(tmp_path)))
    assert (len(train), len(val)) == (38, 2) and not set(train.files) & set(val.files)
    again = plumbing.data.load_data(dict(CONFIG, data=str(tmp_path), limit=5))
    assert again[1].files == val.files and len(again[0]) == 5 and set(again[0].files) < set(train.files)


def test_the_first_validation_images_are_of_many_classes(tmp_path):
    for name in "abcd":
        picture(tmp_path / "train" / name / "0.png")
        for i in range(40):
            picture(tmp_path / "val" / name / f"{i:02d}.png")
    _, val = plumbing.data.load_data(dict(CONFIG, data=str(tmp_path)))
    assert set(val.labels[:20]) == {0, 1, 2, 3}


def test_train_and_val_folders_are_found_and_val_has_no_class_of_its_own(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png"):
        picture(tmp_path / name)
    train, val = plumbing.data.load_data(dict(CONFIG, data=str(tmp_path)))
    assert (len(train), len(val)) == (2, 2) and train.class_names == val.class_names == ["a", "b"]
    picture(tmp_path / "train/0/3.png")  # sorts before a and b: the labels of val follow the training classes
    train, val = plumbing.data.load_data(dict(CONFIG, data=str(tmp_path)))
    assert train.class_names == ["0", "a", "b"] and sorted(val.labels) == [1, 2]
    folders = [Path(path).parent.name for path in val.files]
    assert [train.class_names[label] for label in val.labels] == folders
    picture(tmp_path / "val/c/3.png")
    with pytest.raises(UserError, match="classes that .* lacks: c"):
        plumbing.data.load_data(dict(CONFIG, data=str(tmp_path)))
    with pytest.raises(UserError, match="--data FOLDER"):
        plumbing.data.load_data(dict(CONFIG, data=None))


# Checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_in_a_checkpoint_is_never_executed(tmp_path):
    bomb = Bomb(tmp_path / "exploded")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bomb))
    torch.save(dict(format=FORMAT, stage="ar", model=bomb), tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(UserError, match="damaged or no checkpoint"):
            read_checkpoint(tmp_path / name, ["ar"])
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "exploded").exists()  # the bomb would have worked


@pytest.mark.parametrize("content", [b"", b"hello\n", b"a text read as opcodes", b"{}", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="x.pt is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "x.pt", ["ar"])


def test_missing_files_folders_other_stages_and_other_formats_are_refused(run):
    with pytest.raises(UserError, match="no checkpoint .*nowhere.pt"):
        read_checkpoint(run / "nowhere.pt", ["ar"])
    with pytest.raises(UserError, match="it is a folder, name a stage in it"):
        read_checkpoint(run, ["ar"])
    (run / "exported").mkdir()
    (run / "exported" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint .*exported.pt; .*exported is one"):
        read_checkpoint(run / "exported.pt", ["ar"])
    with pytest.raises(UserError, match="stage 'nar'; this needs phase1 or phase2"):
        read_checkpoint(run / "nar.pt", ["phase1", "phase2"])
    for other in ([1, 2], dict(format=FORMAT, stage="ar"), dict(state_dict={})):
        torch.save(other, run / "other.pt")
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            read_checkpoint(run / "other.pt", ["ar"])
    torch.save(dict(format=FORMAT + 1, stage="ar", model={}), run / "other.pt")
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}, this code reads {FORMAT}"):
        read_checkpoint(run / "other.pt", ["ar"])


def test_averaged_weights_are_loaded_where_there_are_any_and_names_must_match(tmp_path):
    prior = tiny_prior()
    averaged = {name: 2 * value for name, value in prior.state_dict().items()}
    write_checkpoint(tmp_path / "ar.pt", "ar", prior, ema=averaged)
    model, _ = plumbing.models.load_model(tmp_path / "ar.pt", ["ar"])
    assert type(model) is ARPrior and not model.training
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
    renamed = {f"module.{name}": value for name, value in averaged.items()}
    write_checkpoint(tmp_path / "ar.pt", "ar", prior, model=renamed)
    with pytest.raises(UserError, match="Missing key"):
        plumbing.models.load_model(tmp_path / "ar.pt", ["ar"])


def test_the_latent_hash_covers_encoder_and_codebook_and_not_the_decoder():
    tokenizer, hashes = tiny_tokenizer(), []
    for part in (tokenizer.decoder.conv_out, tokenizer.encoder.conv_in, tokenizer.quantizer.codebook):
        hashes.append(plumbing.hashes.latent_hash(tokenizer))
        with torch.no_grad():
            part.weight[0] += 1e-3
    hashes.append(plumbing.hashes.latent_hash(tokenizer))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert plumbing.hashes.latent_hash(tiny_tokenizer()) == hashes[0]


def test_a_prior_finds_its_tokenizer_and_refuses_a_foreign_one(run, tmp_path_factory):
    ckpt = read_checkpoint(run / "ar.pt", ["ar"])
    assert plumbing.models.load_tokenizer_of(run / "ar.pt", ckpt)[1]["stage"] == "phase1"
    second = tiny_tokenizer()
    second.add_attention()
    write_checkpoint(run / "phase2.pt", "phase2", second)
    assert (
        plumbing.models.load_tokenizer_of(run / "ar.pt", ckpt)[1]["stage"] == "phase2"
    )  # the better decoder first
    foreign = write_checkpoint(run / "foreign.pt", "phase1", tiny_tokenizer(seed=9))
    with pytest.raises(UserError, match="is not the tokenizer that .*ar.pt was trained on"):
        plumbing.models.load_tokenizer_of(run / "ar.pt", ckpt, given=foreign)
    with pytest.raises(UserError, match="pass --tokenizer FILE"):
        plumbing.models.load_tokenizer_of(tmp_path_factory.mktemp("alone") / "ar.pt", ckpt)


# Sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ARPrior, NARPrior])
def test_image_i_is_the_same_for_any_number_of_images_and_whatever_follows(kind):
    prior, tokenizer, labels = tiny_prior(kind), tiny_tokenizer(), [0, 1, 2, 2, 1, 0, 1]

    def draw(num, labels, seed=0):
        return plumbing.slices.generate_images(prior, tokenizer, num, labels, seed, SETTINGS, batch=4)

    seven = draw(7, labels)
    assert seven.shape == (7, 3, 16, 16) and seven.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in seven}) == 7  # equal images would prove nothing
    torch.manual_seed(99)
    for num in (1, 3, 4, 5):
        assert torch.equal(draw(num, labels[:num]), seven[:num])
    assert torch.equal(draw(7, labels[:3] + [0, 0, 2, 0])[:3], seven[:3])
    assert torch.equal(draw(7, labels), seven)
    assert not torch.equal(draw(7, labels, seed=1), seven)
    prior = tiny_prior(kind, num_classes=0)
    assert draw(3, None).shape == (3, 3, 16, 16)  # unconditional


@pytest.mark.parametrize("kind", [ARPrior, NARPrior])
def test_tokens_of_an_image_depend_on_its_index_and_not_on_its_place_in_a_batch(kind):
    prior, labels = tiny_prior(kind), torch.ones(6, dtype=torch.int64)
    together = plumbing.slices.generate_tokens(prior, labels, 0, range(6), SETTINGS)
    assert together.unique(dim=0).shape[0] == 6
    for some in ([5], [4, 1], [3, 0, 2]):
        found = plumbing.slices.generate_tokens(prior, labels[: len(some)], 0, some, SETTINGS)
        assert torch.equal(found, together[some])


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 20])
def test_slices_have_exactly_eight_rows_and_the_filling_is_cut_off_again(rows):
    x, sizes = torch.randn(rows, 2, 4, generator=torch.Generator().manual_seed(0)), []
    assert torch.equal(plumbing.fast.in_slices(lambda part: sizes.append(len(part)) or part + 1, x), x + 1)
    assert sizes == [8] * math.ceil(rows / 8)


@pytest.mark.parametrize("shape, size", [
    ((3, 32, 32), 256), ((3, 128, 128), 128), ((3, 256, 256), 32), ((3, 1024, 1024), 8), ((64,), 128),
    ((256,), 32), ((256, 2), 32), ((8, 16, 16), 32)])
def test_slices_on_a_gpu_hold_two_million_pixels_and_at_most_256_rows(shape, size):
    x, sizes = torch.zeros(5, *shape, device="meta"), []
    plumbing.fast.in_slices(lambda part: sizes.append(len(part)) or part, x)
    assert sizes == [size]


def test_classes_are_chosen_by_name_or_number():
    names = ["disk", "ring", "2", "star"]
    assert sample.choose_classes(None, names) == [0, 1, 2, 3]
    assert sample.choose_classes("star, 1,disk", names) == [3, 1, 0]
    assert sample.choose_classes("2", ["2", "1", "0"]) == [0]  # a name goes before a number
    assert sample.choose_classes(None, []) is None
    for wrong in ("4", "-1", "moon", "disk,", "1.0", "²"):
        with pytest.raises(UserError, match="not one of disk, ring, 2, star or 0..3"):
            sample.choose_classes(wrong, names)
    with pytest.raises(UserError, match="unconditional"):
        sample.choose_classes("0", [])


def test_flags_are_written_over_the_sampler_of_the_preset_and_zero_counts():
    def flags(*words):
        return recipes.options.sample_args(["--ckpt", "x.pt", *words])

    args = flags("--steps", "5", "--confidence-space", "log", "--choice-temperature", "0")
    settings = sample.sample_settings(args, CONFIG, NARPrior)
    expected = dict(nar_steps=5, confidence_space="log", choice_temperature=0.0,
                    token_temperature=SETTINGS["token_temperature"])
    assert settings == expected and SETTINGS["nar_steps"] == 3  # the preset is not touched
    with pytest.raises(UserError, match="--steps does nothing for ARPrior"):
        sample.sample_settings(args, CONFIG, tiny_prior())
    assert sample.sample_settings(flags("--temperature", "0"), CONFIG, ARPrior)["temperature"] == 0
    with pytest.raises(UserError, match="--guidance does nothing for NARPrior.*guidance.demo"):
        sample.sample_settings(flags("--guidance", "2"), CONFIG, tiny_prior(NARPrior))
    assert sample.sample_settings(flags("--guidance", "2"), CONFIG, GuidedNAR)["guidance"] == 2
    with pytest.raises(UserError, match="without prior.class_dropout and has no null class"):
        prior = GuidedNAR(GuidedNAR.Config(**PRIOR, class_dropout=0.0))
        prior.generate(torch.tensor([0]), None, guidance=2.0)


@pytest.mark.parametrize("kind", [ARPrior, NARPrior, GuidedAR, GuidedNAR])
def test_every_setting_of_the_sampler_reaches_its_prior(kind, monkeypatch):
    settings = dict(temperature=0.9, top_k=3, top_p=0.8, guidance=1.5, nar_steps=2, token_temperature=0.7,
                    choice_temperature=0.3, confidence_space="log")
    got, shapes = {}, []
    torch.manual_seed(1)
    prior = kind(kind.Config(**PRIOR))

    def generate(prior, labels, noise, **sampler):
        shapes.append(tuple(noise.shape[1:]))
        got.update(sampler)

    monkeypatch.setattr(kind, "generate", generate)
    plumbing.slices.generate_tokens(prior, torch.tensor([0]), 0, [0], settings)
    assert got == {name: settings[name] for name in kind.SAMPLER} and len(got) >= 3
    assert shapes == [(16,) if isinstance(prior, ARPrior) else (2, 2, 16)]


def test_data_of_train_and_val_folders_is_split_as_in_training_and_another_folder_is_taken_whole(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            picture(tmp_path / split / f"{i}.png")
    config = dict(CONFIG, data="shapes", val="elsewhere")
    assert [
        len(part) for part in plumbing.data.load_data(plumbing.data.with_data(config, str(tmp_path)))
    ] == [6, 2]
    whole = plumbing.data.load_data(plumbing.data.with_data(config, str(tmp_path / "train")))
    assert [len(part) for part in whole] == [6, 6] and plumbing.data.with_data(config, None) == config


def test_the_seed_orders_and_flips_procedural_images_too():
    data = [plumbing.data.load_data(dict(CONFIG, seed=seed, limit=30))[0] for seed in (0, 1)]
    flips = [[torch.equal(d[i][0], d.view(d.shuffled(i)).flip(2)) for i in range(30)] for d in data]
    assert flips[0] != flips[1] and data[0].fingerprint != data[1].fingerprint
    assert [data[0].shuffled(i) for i in range(30)] != [data[1].shuffled(i) for i in range(30)]
    assert all(torch.equal(data[0].view(i), data[1].view(i)) for i in range(5))


def test_numbers_of_the_sampler_out_of_bounds_are_refused_by_the_name_of_their_flag(capsys):
    temperatures = ("--temperature", "--token-temperature", "--choice-temperature")
    for flag, value in (*itertools.product(temperatures, ("-1", "inf", "nan", "warm")),
                        ("--top-p", "0"), ("--top-p", "1.01")):
        assert flag in refused(capsys, recipes.options.sample_args, ["--ckpt", "x.pt", flag, value])
    for top_p in ("1e-6", "1"):
        assert recipes.options.sample_args(["--ckpt", "x.pt", "--top-p", top_p]).top_p == float(top_p)


def test_bf16_weights_give_the_logits_of_float32_up_to_rounding_cached_or_not():
    prior, batch = tiny_prior(n_layer=3, n_embd=32), 4
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(0.5)
    tokens = torch.randint(0, 16, (batch, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(batch, dtype=torch.int64)
    exact, half = prior(tokens, labels), prior.bfloat16()
    model, steps = half.transformer, []
    caches = [plumbing.fast.KVCache(16) for _ in model.blocks]
    for i in range(16):
        x = model.token_table(tokens[:, i - 1 : i]) if i else model.embed_condition(labels, batch)
        steps.append(model.hidden(x, i, caches))
    for logits in (model.logits(torch.cat(steps, 1)), half(tokens, labels)):
        assert (logits.float() - exact).abs().max() < 0.05 * exact.std()


@pytest.mark.parametrize("stage", ["ar", "nar"])
def test_samples_of_bf16_weights_are_pictures_and_say_so(run, stage):
    words = ["--ckpt", str(run / f"{stage}.pt"), "--num", "4", "--format", "npz", "--device", "cpu"]
    for precision in ("fp32", "bf16"):
        out = run / f"{precision}.npz"
        sample.main(recipes.options.sample_args([*words, "--precision", precision, "--out", str(out)]))
        with np.load(out) as file:
            assert file["arr_0"].shape == (4, 16, 16, 3) and file["arr_0"].std() > 1
            assert f'"precision": "{precision}"' in str(file["info"])


# Pixels and pictures --------------------------------------------------------------------------------------


def test_all_256_values_survive_the_way_to_float_and_back():
    u = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = plumbing.images.to_float(u, "cpu")
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(plumbing.images.to_uint8(x), u)
    assert plumbing.images.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_psnr_has_its_closed_form_and_counts_after_rounding():
    u = torch.randint(0, 200, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    x = plumbing.images.to_float(u, "cpu")
    found = plumbing.images.psnr(
        x, plumbing.images.to_float(u + torch.tensor([1, 5, 50]).byte()[:, None, None, None], "cpu")
    )
    assert found.shape == (3,)
    torch.testing.assert_close(found, torch.tensor([20 * math.log10(255 / d) for d in (1, 5, 50)]).double())
    one = u.clone()
    one[0, 0, 0, 0] += 6  # one value of 48
    expected = 10 * math.log10(255**2 / (36 / 48))
    assert plumbing.images.psnr(x, plumbing.images.to_float(one, "cpu"))[0].item() == pytest.approx(expected)
    assert plumbing.images.psnr(x, x + 0.001).min() > 140 and plumbing.images.psnr(x, x).isfinite().all()


def test_a_sheet_has_rows_of_columns_with_gaps_and_room_for_its_note():
    images = torch.arange(5).byte().mul(50).view(5, 1, 1, 1).expand(5, 3, 4, 6).contiguous()
    sheet = plumbing.images.make_sheet(images, 3, zoom=2)
    assert sheet.size == (3 * 12 + 2 * 2, 2 * 8 + 2)
    pixels = np.asarray(sheet)
    for i in range(5):
        top, left = i // 3 * 10, i % 3 * 14
        assert (pixels[top : top + 8, left : left + 12] == 50 * i).all()
    assert (pixels[8:10] == 255).all() and (pixels[:, 12:14] == 255).all() and (pixels[10:, 28:] == 255).all()
    noted = plumbing.images.make_sheet(images, 3, note="random weights", zoom=2)
    assert noted.size == (40, 18 + 15) and (np.asarray(noted)[:18] == pixels).all()
    assert (np.asarray(noted)[18:] < 128).any()
    named = np.asarray(plumbing.images.make_sheet(images[[0, 1, 0, 1, 2]], 2, zoom=2, names="ababc"))
    assert named.shape[0] == 15 + 8 + 2 + 8 + 2 + 15 + 8  # a and b once, since the next row has the same
    assert (named[:15] < 128).any() and (named[15:23, :12] == 0).all() and (named[35:50] < 128).any()
    sided = np.asarray(plumbing.images.make_sheet(images, 3, zoom=2, sides=("input", "reconstruction")))
    left = sided.shape[1] - 40
    assert left > 60 and (sided[:, left:] == pixels).all() and (sided[:8, :left] < 128).any()
    assert plumbing.images.make_sheet(images, 5).size[1] == 64  # small images are enlarged
    assert plumbing.images.make_sheet(images[:1], 1, zoom=1).size == (6, 4)


def test_a_stopped_writer_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "new" / "x.txt"
    plumbing.files.save_atomic(lambda p: p.write_text("old"), path)

    def fail(temporary):
        assert temporary.parent == path.parent and path.read_text() == "old"
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plumbing.files.save_atomic(fail, path)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    plumbing.files.save_atomic(lambda p: p.write_text("new"), path)
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


# Command line ---------------------------------------------------------------------------------------------


def call(*words):
    sample.main(recipes.options.sample_args([*map(str, words), "--device", "cpu"]))


@pytest.mark.parametrize("stage", ["ar", "nar"])
def test_the_command_writes_sheet_files_and_npz_of_the_same_images(run, stage, capsys):
    ckpt = ("--ckpt", run / f"{stage}.pt", "--num", 3, "--batch", 2)
    call(*ckpt)
    assert f"samples_{stage}.png" in capsys.readouterr().out
    assert Image.open(run / f"samples_{stage}.png").size == (3 * 66 - 2, 79)  # a column per class, zoom 4
    call(*ckpt, "--scale", 2, "--classes", "star")  # one class fills rows
    assert Image.open(run / f"samples_{stage}.png").size == (3 * 34 - 2, 47)
    call(*ckpt, "--format", "files")
    call(*ckpt, "--format", "npz")
    files = sorted((run / f"samples_{stage}").glob("*.png"))
    assert [Path(path).name for path in files] == ["000000.png", "000001.png", "000002.png"]
    with np.load(run / f"samples_{stage}.npz") as arrays:
        assert (arrays["arr_0"] == np.stack([np.asarray(Image.open(path)) for path in files])).all()
    call(*ckpt, "--format", "npz", "--classes", "star,0", "--seed", 4, "--out", run / "o.npz")
    with np.load(run / "o.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8


def test_the_command_reconstructs_validation_images(run):
    call("--ckpt", run / "phase1.pt", "--reconstruct", "--num", 3, "--batch", 2, "--format", "npz")
    data, tokenizer = Shapes("val", 3, 16), tiny_tokenizer()
    x = plumbing.images.to_float(torch.stack([data.view(i) for i in range(3)]), "cpu")
    with np.load(run / "reconstructions_phase1.npz") as arrays:
        found = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
    expected = plumbing.images.to_uint8(plumbing.slices.decode(tokenizer, tokenizer.encode(x)))
    assert (found.int() - expected.int()).abs().max() <= 1  # another batch size rounds differently
    call("--ckpt", run / "phase1.pt", "--reconstruct", "--num", 10)
    sheet = np.asarray(Image.open(run / "reconstructions_phase1.png"))
    sheet = sheet[:, sheet.shape[1] - (8 * 66 - 2) :]  # at the left stands what each row is
    assert sheet.shape[0] == 4 * 66 - 2  # 8 above 8, then 2 above 2
    for i in range(10):  # under every input its reconstruction
        top, left = i // 8 * 132, i % 8 * 66
        x, x_hat = (sheet[row : row + 64 : 4, left : left + 64 : 4] for row in (top, top + 66))
        assert (x == Shapes("val", 10, 16).view(i).permute(1, 2, 0).numpy()).all()
        assert i > 2 or abs(x_hat.astype(int) - found[i].permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ckpt", "nowhere.pt"], "no checkpoint"),
        (["--ckpt", "phase1.pt"], "needs ar or nar"),
        (["--ckpt", "ar.pt", "--reconstruct"], "needs phase1 or phase2"),
        (["--ckpt", "ar.pt", "--num", "0"], "--num"),
        (["--ckpt", "ar.pt", "--top-p", "2"], "--top-p"),
        (["--ckpt", "ar.pt", "--classes", "moon"], "moon"),
        (["--ckpt", "phase1.pt", "--reconstruct", "--num", "1001"], "only 1000 images"),
        (["--ckpt", "phase1.pt", "--reconstruct", "--data", "nowhere"], "does not exist"),
        (["--ckpt", "ar.pt", "--format", "npz", "--scale", "4"], "--scale enlarges a sheet"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(run, monkeypatch, capsys, words, message):
    monkeypatch.chdir(run)
    assert message in refused(capsys, call, *words)
