"""Claims about configurations, environments and numbers that once cost a run, or told something wrong."""

import pytest
import torch

import perceptual
from prior_ar import ARPrior, PriorConfig, sample_logits
from prior_nar import NARPrior


def test_images_in_bf16_are_normalised_in_float32():
    x = (torch.rand(2, 3, 8, 8) * 2 - 1).bfloat16()
    found = perceptual.normalize_images(x)
    assert found.dtype == torch.float32 and torch.equal(found, perceptual.normalize_images(x.float()))


SIZES = dict(codebook_size=16, num_tokens=9, n_layer=1, n_head=2, n_embd=16)


@pytest.mark.parametrize("temperature", [1e-31, 1e-39, 1e-45, 1e-300])
def test_a_temperature_that_would_overflow_the_logits_takes_the_argmax(temperature):
    torch.manual_seed(0)
    logits, u = 30 * torch.randn(5, 16), torch.rand(5)
    assert torch.equal(sample_logits(logits, u, temperature, top_p=0.9), logits.argmax(1))
    ar, noise = ARPrior(PriorConfig(**SIZES)), torch.rand(2, 9)
    assert torch.equal(ar.generate(None, noise, temperature), ar.generate(None, noise, 0))
    nar, noise = NARPrior(PriorConfig(**SIZES)), torch.rand(2, 4, 2, 9)
    tokens = nar.generate(None, noise, 4, token_temperature=temperature)
    assert torch.equal(tokens, nar.generate(None, noise, 4, token_temperature=0))


def test_the_smallest_temperature_that_divides_takes_the_argmax_too():
    logits = torch.tensor([[3.0, 1e7, -1e7]])
    assert sample_logits(logits, torch.tensor([0.99]), 1e-30).item() == 1
