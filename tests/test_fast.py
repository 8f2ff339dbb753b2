"""Claims about plumbing/fast.py: what is made faster computes what PyTorch computes."""

import pytest
import torch
import torch.nn.functional as F

from plumbing.fast import FixedConv, attention


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


@pytest.mark.parametrize("stride", [1, 2])
def test_the_transposed_fixed_convolution_in_bf16_is_that_of_float32(stride):
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 5, 9, 9).bfloat16(), torch.rand(4, 4)
    found = FixedConv.apply(x, kernel, stride, 2, True)
    weight = kernel.expand(5, 1, 4, 4)
    wanted = F.conv_transpose2d(x.float(), weight, stride=stride, padding=2, groups=5)
    assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.01 * wanted.norm()
