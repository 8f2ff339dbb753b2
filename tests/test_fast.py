"""Claims about plumbing/fast.py: what is made faster computes what PyTorch computes."""

import pytest
import torch
import torch.nn.functional as F

from plumbing.fast import Dropout, FixedConv, attention, drop


@pytest.mark.parametrize("T", [17, 300])  # 300: several slices
@pytest.mark.parametrize("causal", [False, True])
def test_bf16_attention_on_a_cpu_is_scaled_dot_product_attention_with_its_gradients(T, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 8, T, 16).bfloat16().requires_grad_() for _ in range(3))
    grad = torch.randn(8, 8, T, 16)
    found = attention(q, k, v, causal=causal)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=causal)
    pairs = zip([found, *torch.autograd.grad(found, (q, k, v), grad.bfloat16())],
                [wanted, *torch.autograd.grad(wanted, exact, grad)], strict=True)
    for a, b in pairs:
        assert a.dtype == torch.bfloat16 and (a - b).norm() < 0.02 * b.norm()  # of 8 bits


def test_attention_weights_are_dropped_in_training_and_the_rest_scaled():
    q = k = torch.zeros(64, 4, 32, 32).bfloat16()  # equal weights 1 / 32
    v = torch.eye(32).expand(64, 4, 32, 32).bfloat16()  # so that the output is the weights
    weights = attention(q, k, v, dropout=0.25).float()
    assert ((weights == 0) | ((weights - 1 / 24).abs() < 1e-3)).all()
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)  # of 262,144


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_its_share_scales_the_rest_and_its_gradient_has_the_same_mask(p, dtype):
    x = torch.ones(333, 777, dtype=dtype, requires_grad=True)  # not a multiple of the four masks of a number
    torch.manual_seed(0)
    out = drop(x, p)
    kept = out != 0
    assert 1 - kept.float().mean().item() == pytest.approx(p, abs=0.003)  # 3 sigma: 0.003 at p = 0.5
    for part in kept.float().split(111), kept.float().split(111, dim=1):
        assert all(abs(1 - piece.mean().item() - p) < 0.01 for piece in part)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-2, atol=0)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0] != 0, kept)
    torch.manual_seed(0)
    assert torch.equal(drop(x, p), out) and not torch.equal(drop(x, p), out)


def test_dropout_is_off_in_evaluation_and_at_0_and_drops_all_at_1():
    x = torch.randn(5, 7)
    assert drop(x, 0.0) is x and Dropout(0.5).eval()(x) is x
    assert not drop(x, 1.0).any() and not torch.equal(Dropout(0.5)(x), x)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_transposed_fixed_convolution_in_bf16_is_that_of_float32(stride):
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 5, 9, 9).bfloat16(), torch.rand(4, 4)
    found = FixedConv.apply(x, kernel, stride, 2, True)
    weight = kernel.expand(5, 1, 4, 4)
    wanted = F.conv_transpose2d(x.float(), weight, stride=stride, padding=2, groups=5)
    assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.01 * wanted.norm()
