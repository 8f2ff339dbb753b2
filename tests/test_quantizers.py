"""Claims about the forks that quantize in other ways: each has the property that its article is about."""

import itertools
import math

import pytest
import torch

from forks.fsq import FSQTokenizer
from forks.ibq import IBQTokenizer
from forks.lfq import LFQTokenizer
from forks.rotation import RotationTokenizer, rotate
from forks.simvq import SimVQTokenizer

SIZES = dict(codebook_size=24, codebook_dim=8, codebook="plain")


def quantizer(kind, **sizes):
    torch.manual_seed(0)
    return kind.Quantizer(kind.Config(**SIZES | sizes))


def latents(n_z=8, scale=1.0):
    z = scale * torch.randn(3, n_z, 4, 4, generator=torch.Generator().manual_seed(1))
    return z.requires_grad_()


@pytest.mark.parametrize("kind, sizes", [
    (FSQTokenizer, dict(levels=[4, 6], codebook_dim=2)), (SimVQTokenizer, {}), (RotationTokenizer, {}),
    (IBQTokenizer, {})])
def test_training_and_encoding_give_the_same_tokens_and_decoding_the_same_codes(kind, sizes):
    q = quantizer(kind, **sizes)
    z = latents(sizes.get("codebook_dim", 8))
    z_st, indices, losses = q(z)
    assert torch.equal(indices, q.quantize(z)) and indices.min() >= 0 and indices.max() < 24
    torch.testing.assert_close(z_st, q.lookup(indices), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # codes stay float32
        torch.testing.assert_close(z_st, q.lookup(indices), rtol=0, atol=1e-6)
    assert set(losses) <= set(kind.WEIGHTS) and all(loss.dim() == 0 for loss in losses.values())
    (z_st.square().sum() + sum(losses.values())).backward()
    assert z.grad.isfinite().all() and (z.grad != 0).any()


def test_the_codes_of_fsq_are_the_whole_grid_and_the_bounds_are_reached_evenly():
    q = quantizer(FSQTokenizer, levels=[4, 6], codebook_dim=2)
    codes = q.lookup(torch.arange(24).view(1, 4, 6)).flatten(2)[0].T
    grid = itertools.product([-1, -0.5, 0, 0.5], [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3])
    torch.testing.assert_close(torch.tensor(sorted(codes.tolist())), torch.tensor(sorted(grid)))
    far = torch.tensor([-50.0, 50.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1)  # far out the outermost levels
    outermost = torch.tensor([[-1, -1], [0.5, 2 / 3]])
    torch.testing.assert_close(q.lookup(q.quantize(far)).flatten(1), outermost)
    z = torch.randn(1, 2, 200, 200)
    assert q.quantize(z).unique().tolist() == list(range(24))  # nothing has to be learned to use them all


def test_the_gradient_passes_the_rounding_of_fsq_as_that_of_the_bound():
    q, z, g = quantizer(FSQTokenizer, levels=[4, 6], codebook_dim=2), latents(2), torch.randn(3, 2, 4, 4)
    q(z)[0].backward(g)
    found, z.grad = z.grad, None
    (q.bound(z) / (q.levels // 2)).backward(g)
    torch.testing.assert_close(found, z.grad)


def test_levels_that_do_not_fit_the_codebook_are_refused():
    for levels in ([4, 6], [2, 32], [4, 4, 4]):  # of two levels, the upper one is hardly ever reached
        with pytest.raises(ValueError, match="codebook_dim levels above 2, codebook_size is their product"):
            FSQTokenizer.Config(codebook_size=64, codebook_dim=2, levels=levels)


def test_the_table_of_simvq_stays_and_one_step_moves_every_code():
    q = quantizer(SimVQTokenizer)
    table, codes = q.codebook.weight.clone(), q.codes.detach().clone()
    z_st, indices, losses = q(latents())
    assert len(indices.unique()) < 24  # not all are in use
    trained = [p for p in q.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [(8, 8)]
    (losses["loss_codebook"]).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert torch.equal(q.codebook.weight, table) and ((q.codes - codes).norm(dim=1) > 1e-4).all()


def test_the_rotation_takes_the_latent_to_its_code_and_its_gradient_keeps_the_angle():
    g = torch.Generator().manual_seed(0)
    z, q, upstream = (torch.randn(50, 8, generator=g) for _ in range(3))
    z.requires_grad_()
    out = rotate(z, q)
    torch.testing.assert_close(out, q)
    out.backward(upstream)
    cos = torch.cosine_similarity
    torch.testing.assert_close(cos(z.grad, z.detach()), cos(upstream, q), rtol=0, atol=1e-5)
    longer = q.norm(dim=1) / z.detach().norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), longer * upstream.norm(dim=1))
    z.grad = None
    rotate(z, 3 * z.detach()).backward(upstream)  # in the same direction nothing turns
    torch.testing.assert_close(z.grad, 3 * upstream)


def test_the_quantizer_sends_the_rotated_gradient_back():
    q, z, upstream = quantizer(RotationTokenizer), latents(), torch.randn(3, 8, 4, 4)
    q(z)[0].backward(upstream)
    code, found = q.lookup(q.quantize(z)), z.grad
    cos = torch.cosine_similarity
    torch.testing.assert_close(cos(found, z.detach()), cos(upstream, code), rtol=0, atol=1e-5)


def test_the_gradient_of_ibq_reaches_every_code_and_that_of_nearest_codes_does_not():
    q = quantizer(IBQTokenizer)
    q.codebook.weight.data.normal_()
    z_st, indices, losses = q(latents())
    assert len(indices.unique()) < 24
    z_st.backward(torch.randn_like(z_st))
    assert (q.codebook.weight.grad.abs().sum(1) > 0).all()
    other = quantizer(SimVQTokenizer.__mro__[1])  # VQTokenizer
    z_st, indices, losses = other(latents(scale=0.02))
    losses["loss_codebook"].backward()
    assert len(indices.unique()) < 24
    reached = other.codebook.weight.grad.abs().sum(1) > 0
    assert reached.nonzero().flatten().tolist() == indices.unique().tolist()


def test_the_entropy_falls_for_sure_vectors_and_for_even_use_of_whole_codes():
    def loss(z):
        return lfq(z)[2]["loss_entropy"].item()

    lfq = LFQTokenizer.Quantizer(LFQTokenizer.Config(codebook_size=64, codebook_dim=6))
    z = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 6, 1, 1)  # every bit even, but 2 codes of 64
    assert loss(z) == pytest.approx(math.log(64 / 2), abs=1e-3)
    assert loss(z[:1]) == pytest.approx(math.log(64), abs=1e-3)
    assert loss(0 * z) == pytest.approx(math.log(64), abs=1e-3)  # even, but sure of nothing
    assert loss(lfq.lookup(torch.arange(64).view(1, 8, 8))) == pytest.approx(0, abs=1e-3)


def test_more_codes_than_k_means_can_take_are_refused_only_where_it_is_used():
    sizes = dict(codebook="entropy", codebook_size=20_000, codebook_dim=2)
    assert quantizer(RotationTokenizer, warm_start=0, **sizes).codes.shape == (20_000, 2)
    with pytest.raises(ValueError, match="set warm_start=0 or fewer codes"):
        quantizer(RotationTokenizer, warm_start=1, **sizes)


@pytest.mark.parametrize("kind, K, n_z", [(LFQTokenizer, 16, 4), (IBQTokenizer, 24, 8)])
def test_the_entropy_of_micro_batches_is_that_of_the_whole_batch(kind, K, n_z):
    q = quantizer(kind, codebook="entropy", codebook_size=K, codebook_dim=n_z)
    parts = [0.01 * i * q.lookup(q.quantize(latents(n_z))).detach() for i in (1, 2)]
    whole = torch.cat(parts).requires_grad_()
    q(whole)[2]["loss_entropy"].backward()
    probs = sum(q.probs(part) for part in parts) / 2
    for i, part in enumerate(parts):
        part = part.clone().requires_grad_()
        (q(part, probs)[2]["loss_entropy"] / 2).backward()
        torch.testing.assert_close(part.grad, whole.grad[3 * i : 3 * i + 3], rtol=1e-3, atol=1e-7)
    assert whole.grad.abs().max() > 1e-4
