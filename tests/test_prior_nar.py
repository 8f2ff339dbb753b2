"""Claims about prior_nar.py: exact mask counts, the decoding schedule, and tokens that stay once fixed."""

import functools
import math

import pytest
import test_prior_ar
import torch
from test_prior_ar import random_tokens, uniforms

from prior_ar import ARPrior, sample_logits
from prior_nar import NARPrior, decode_counts, mask_schedule, mask_tokens

MASK = 32
tiny_prior = functools.partial(test_prior_ar.tiny_prior, NARPrior)


def test_mask_count_is_exact_for_500_random_ratios():
    noise = uniforms(500, 257)
    inputs, mask = mask_tokens(random_tokens(500, 256), MASK, noise)
    expected = [max(1, math.ceil(math.cos(math.pi * r / 2) * 256)) for r in noise[:, 0].tolist()]
    assert mask.sum(dim=1).tolist() == expected
    assert torch.equal(inputs == MASK, mask)


@pytest.mark.parametrize("r, count", [(0.0, 256), (0.5, 182), (1 - 2**-24, 1)])
def test_mask_count_at_the_ends_and_the_middle(r, count):
    noise = uniforms(2, 257)
    noise[:, 0] = r
    assert mask_tokens(random_tokens(2, 256), MASK, noise)[1].sum(dim=1).tolist() == [count, count]


def test_mean_masked_share_tends_to_two_over_pi():
    r = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert mask_schedule(r).mean().item() == pytest.approx(2 / math.pi, abs=1e-6)
    assert mask_schedule(0.5) == pytest.approx(math.sqrt(0.5))


def test_masking_leaves_visible_tokens_and_picks_positions_evenly():
    tokens, noise = random_tokens(4000), uniforms(4000, 13)
    noise[:, 0] = 2 / 3 + 0.01  # 6 of 12
    inputs, mask = mask_tokens(tokens, MASK, noise)
    assert torch.equal(inputs[~mask], tokens[~mask])
    assert (mask.float().mean(dim=0) - 0.5).abs().max() < 0.04


def test_masking_hides_the_positions_of_lowest_noise():
    noise = torch.tensor([[0.9, 0.4, 0.1, 0.3, 0.2]])  # ceil(4 * 0.156) = 1
    assert mask_tokens(random_tokens(1, 4), MASK, noise)[1].tolist() == [[False, True, False, False]]


def test_decode_schedule_of_256_tokens_in_12_steps():
    counts = decode_counts(256, 12)
    assert counts == [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0]
    accepted = [a - b for a, b in zip([256] + counts, counts, strict=False)]
    assert accepted == [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33] and sum(accepted) == 256


def test_every_schedule_fixes_at_least_one_token_per_step_and_ends_at_zero():
    for num_tokens in range(1, 50):
        for steps in (1, 2, 3, 7, num_tokens - 1, num_tokens, num_tokens + 5):
            counts = [num_tokens] + decode_counts(num_tokens, steps)
            assert len(counts) - 1 == max(1, min(steps, num_tokens)) and counts[-1] == 0
            assert all(a > b for a, b in zip(counts, counts[1:], strict=False)), (num_tokens, steps)
    assert decode_counts(256, 1) == [0]


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_every_output_may_change_with_any_token_and_with_the_label(changed):
    prior, tokens = tiny_prior(sharpen=5.0), random_tokens(1)
    other = tokens.clone()
    other[:, changed] = MASK
    assert ((prior(tokens) - prior(other)).abs().amax(dim=2) > 1e-5).all()
    label = torch.tensor([0])
    assert ((prior(tokens, label) - prior(tokens, label + 1)).abs().amax(dim=2) > 1e-5).all()


def test_output_i_belongs_to_token_i():
    prior, tokens = tiny_prior(n_layer=0), random_tokens(1)  # without blocks nothing moves between positions
    other = tokens.clone()
    other[0, 4] = MASK
    changed = (prior(tokens) != prior(other)).any(dim=2)[0]
    assert changed.nonzero().flatten().tolist() == [4]


def test_loss_ignores_visible_tokens():
    prior, tokens = tiny_prior(sharpen=5.0), random_tokens(3)
    inputs, mask = mask_tokens(tokens, MASK, uniforms(3, 13))
    logits = prior(inputs).detach().requires_grad_()
    loss, accuracy = prior.loss(logits, tokens, mask)
    other = torch.where(mask, tokens, (tokens + 1) % 32)
    assert torch.equal(loss, prior.loss(logits, other, mask)[0])
    assert torch.equal(accuracy, prior.loss(logits, other, mask)[1])
    loss.backward()
    assert not logits.grad[~mask].any() and logits.grad[mask].any(dim=1).all()


def test_loss_is_the_mean_over_all_masked_tokens_of_the_batch():
    prior, tokens = tiny_prior(sharpen=5.0), random_tokens(3)
    inputs, mask = mask_tokens(tokens, MASK, uniforms(3, 13))
    logits = prior(inputs)
    loss, accuracy = prior.loss(logits, tokens, mask)
    assert loss.ndim == accuracy.ndim == 0 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[mask], tokens[mask]))
    torch.testing.assert_close(accuracy, (logits.argmax(2) == tokens)[mask].float().mean())
    smoothed = torch.nn.functional.cross_entropy(logits[mask], tokens[mask], label_smoothing=0.1)
    torch.testing.assert_close(prior.loss(logits, tokens, mask, label_smoothing=0.1)[0], smoothed)


@pytest.mark.parametrize("space", ["prob", "log"])
@pytest.mark.parametrize("steps", [1, 5, 12, 20])
def test_each_round_fixes_the_scheduled_number_and_no_hole_is_left(steps, space):
    prior = tiny_prior(sharpen=5.0)
    noise = uniforms(3, *prior.noise_shape(dict(nar_steps=steps)))
    assert noise.shape == (3, min(steps, 12), 2, 12)
    tokens, fixed_at = prior.generate(None, noise, confidence_space=space, return_steps=True)
    assert tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < MASK
    counts = decode_counts(12, steps)
    for row in fixed_at:
        assert [int((row > t).sum()) for t in range(len(counts))] == counts
        assert set(row.tolist()) == set(range(len(counts)))


@pytest.mark.parametrize("space", ["prob", "log"])
@pytest.mark.parametrize("token_temperature, choice_temperature", [(0.6, 0.45), (1.7, 4.5), (1.0, 0)])
def test_decoding_is_the_loop_of_maskgit_written_out(space, token_temperature, choice_temperature):
    prior, noise, labels = tiny_prior(sharpen=5.0), uniforms(3, 5, 2, 12), torch.tensor([0, 2, 1])
    tokens, rounds = torch.full((3, 12), MASK), torch.full((3, 12), -1)
    for t, left in enumerate(decode_counts(12, 5)):
        logits = prior(tokens, labels).detach()
        for b in range(3):
            scores, candidates = {}, {}
            for n in (tokens[b] == MASK).nonzero().flatten().tolist():
                probs = (logits[b, n] / token_temperature).softmax(0)
                drawn = sample_logits(logits[b, n : n + 1], noise[b, t, 0, n : n + 1], token_temperature)
                candidates[n] = drawn.item()
                confidence = probs[candidates[n]].item()
                gumbel = -math.log(-math.log(noise[b, t, 1, n].item()))
                scores[n] = confidence if space == "prob" else math.log(confidence)
                scores[n] += choice_temperature * (1 - (t + 1) / 5) * gumbel
            for n in sorted(scores, key=scores.get)[left:]:
                tokens[b, n], rounds[b, n] = candidates[n], t
    sampler = dict(token_temperature=token_temperature, choice_temperature=choice_temperature)
    found = prior.generate(labels, noise, confidence_space=space, return_steps=True, **sampler)
    assert torch.equal(found[0], tokens) and torch.equal(found[1], rounds)


def test_a_fixed_token_never_changes():
    prior, seen = tiny_prior(sharpen=5.0), []
    prior.transformer.token_table.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    tokens = prior.generate(None, uniforms(2, 6, 2, 12))
    assert len(seen) == 6
    for before, after in zip(seen, seen[1:] + [tokens], strict=True):
        visible = before != MASK
        assert torch.equal(before[visible], after[visible])
        assert ((after == MASK).sum(1) < (before == MASK).sum(1)).all()


def test_given_tokens_survive_in_rows_with_different_numbers_of_holes():
    prior, given = tiny_prior(sharpen=5.0), random_tokens(5)
    partial = given.clone()
    for row, holes in enumerate([0, 1, 3, 7, 12]):
        partial[row, torch.randperm(12, generator=torch.Generator().manual_seed(row))[:holes]] = MASK
    tokens, fixed_at = prior.generate(None, uniforms(5, 4, 2, 12), partial, return_steps=True)
    visible = partial != MASK
    assert torch.equal(tokens[visible], given[visible]) and tokens.max() < MASK
    assert torch.equal(fixed_at == -1, visible)
    for row, holes in enumerate([0, 1, 3, 7, 12]):
        counts = decode_counts(holes, 4)
        assert [int((fixed_at[row] > t).sum()) for t in range(len(counts))] == counts
    for row in range(5):  # and no row depends on the others
        alone = prior.generate(None, uniforms(5, 4, 2, 12)[row : row + 1], partial[row : row + 1])
        assert torch.equal(alone[0], tokens[row])


def test_one_step_at_token_temperature_zero_is_argmax():
    prior = tiny_prior(sharpen=5.0)
    expected = prior(torch.full((2, 12), MASK)).argmax(2)
    assert torch.equal(prior.generate(None, uniforms(2, 1, 2, 12), token_temperature=0), expected)


@pytest.mark.parametrize("kind", [ARPrior, NARPrior])
def test_special_ids_are_never_sampled_however_strong_their_rows(kind):
    prior = test_prior_ar.tiny_prior(kind)
    with torch.no_grad():
        prior.transformer.norm.bias.fill_(1.0)
        prior.transformer.token_table.weight[MASK] = 100.0  # [MASK] would win by far
        prior.transformer.condition_table.weight.fill_(100.0)
    assert prior(random_tokens(2)).shape == (2, 12, 32)
    for temperature in (0, 1.0, 100.0):
        name = "temperature" if kind is ARPrior else "token_temperature"
        tokens = prior.generate(None, test_prior_ar.noise_of(prior, 16), **{name: temperature})
        assert tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < MASK


@pytest.mark.parametrize("kind", [ARPrior, NARPrior])
def test_bfloat16_weights_and_noise_at_its_bounds_give_valid_tokens(kind):
    prior = test_prior_ar.tiny_prior(kind).bfloat16()
    noise = torch.zeros_like(test_prior_ar.noise_of(prior, 1))
    noise[..., ::2] = 1 - 2**-24
    tokens = prior.generate(None, noise)
    assert tokens.shape == (1, 12) and tokens.max() < MASK


@pytest.mark.parametrize("settings", [
    dict(nar_steps=5),  # of which the noise has 4
    dict(noise=torch.zeros(2, 0, 2, 12)), dict(noise=torch.zeros(2, 4, 2, 11)),
    dict(noise=torch.ones(2, 4, 2, 12)),
    dict(noise=torch.zeros(2, 13, 2, 12)),  # more rounds than tokens
    dict(confidence_space="logit"), dict(labels=torch.tensor([0, 3])),
    dict(tokens=torch.full((2, 12), 33)), dict(tokens=torch.zeros(1, 12, dtype=torch.int64))])
def test_generate_rejects_bad_settings(settings):
    settings = {"labels": None, "noise": torch.zeros(2, 4, 2, 12), **settings}
    with pytest.raises(ValueError):
        tiny_prior().generate(**settings)


@pytest.mark.slow
def test_a_tiny_prior_overfits_four_sequences():
    prior, tokens, labels = tiny_prior(num_classes=4).train(), random_tokens(4), torch.arange(4)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for step in range(200):
        inputs, mask = mask_tokens(tokens, MASK, uniforms(4, 13, seed=step))
        loss, accuracy = prior.loss(prior(inputs, labels), tokens, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 and accuracy.item() == 1.0
    assert torch.equal(prior.generate(labels, uniforms(4, 4, 2, 12)), tokens)
