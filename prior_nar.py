"""The non-autoregressive prior: masked tokens are predicted together, in T rounds (Sec. 3.1.2 and 6.1).

The paper uses MaskGIT as it is. Training hides a random share of the tokens; decoding starts with all of
them masked and keeps, in each round, the candidates the model is surest of.
Sections and tables are those of arXiv 2212.03185.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.checks import check, check_labels, eval_mode, with_defaults
from prior_ar import GREEDY, PriorConfig, Transformer, sample_logits


def mask_schedule(r):
    """cos(pi r / 2): the share of tokens still masked at progress r in [0, 1] (MaskGIT; Sec. 3.1.2).

    r: a float or a float tensor; the result has the same type. Its mean over r ~ U(0, 1) is 2/pi.
    """
    return torch.cos(r * (math.pi / 2)) if torch.is_tensor(r) else math.cos(r * (math.pi / 2))


def mask_tokens(tokens, mask_id, noise):
    """Hide max(1, ceil(N cos(pi r / 2))) tokens of each row, chosen evenly without replacement (Sec. 3.1.2).

    tokens:    (B, N) int64 in [0, K); mask_id: K.
    noise:     (B, N + 1) uniforms in [0, 1) drawn by the caller: column 0 is r, and the positions with the
               lowest of the other columns are masked. The count is computed in float64, without a host sync.
    returns:   inputs (B, N), with mask_id at masked positions; mask (B, N) bool, True where masked.
    raises:    ValueError for shapes that do not fit.
    deviation: the paper does not say how the count is rounded; ceil, and at least one, is ours.
    """
    num_tokens = tokens.shape[1]
    check("tokens", tokens, (num_tokens,), torch.int64)
    if noise.shape != (len(tokens), num_tokens + 1):
        raise ValueError(f"noise: expected {(len(tokens), num_tokens + 1)}, got {tuple(noise.shape)}")
    count = torch.ceil(mask_schedule(noise[:, :1].double()) * num_tokens).clamp(min=1)  # (B, 1)
    mask = order(noise[:, 1:]) < count  # (B, N)
    return tokens.masked_fill(mask, mask_id), mask


def order(scores):
    """scores: (B, N) -> (B, N) int64: 0 for the lowest of its row, N - 1 for the highest."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1)


def decode_counts(num_tokens, steps):
    """How many tokens are still masked after each decoding step (MaskGIT; the 12 steps of Table 10).

    num_tokens: masked tokens at the start; steps: T, clamped to [1, num_tokens].
    returns:    list of T falling integers, the last one 0: floor(num_tokens * cos(pi (t + 1) / (2 T))),
                held to at least one and at most one less than before. For 256 and 12: 253, 247, ... 33, 0.
    """
    steps = max(1, min(steps, num_tokens))
    counts, masked = [], num_tokens
    for t in range(steps - 1):
        # 1e-9: step 8 of 12 is exactly 128 of 256, and a cosine one bit lower would give 127.
        count = math.floor(num_tokens * mask_schedule((t + 1) / steps) + 1e-9)
        masked = max(1, min(masked - 1, count))
        counts.append(masked)
    return counts + [0]


class NARPrior(nn.Module):
    """Masked-token prior (Sec. 3.1.2 and 6.1): the Transformer of `ARPrior` without the causal mask."""

    Config, Transformer = PriorConfig, Transformer
    SAMPLER = dict(  # what `generate` reads
        nar_steps=12, token_temperature=1.0, choice_temperature=0.45, confidence_space="prob")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_shape = (config.num_tokens,)  # of the tokens of one image
        self.mask_id = config.codebook_size  # [MASK] = K, one past the last code
        self.transformer = self.Transformer(config, causal=False)

    def inputs(self, tokens, noise):
        """What a training step shows, and which positions its loss counts: the masked ones.

        tokens: (B, N) int64 in [0, K);  noise: (B, N + 1) uniforms, see `mask_tokens`
        """
        return mask_tokens(tokens, self.mask_id, noise)

    def forward(self, inputs, labels=None):
        """Logits of all positions at once; each sees the condition and every visible token (Sec. 3.1.2).

        inputs:  (B, N) int64 in [0, K], K = [MASK]. Out-of-range values are not checked.
        labels:  (B,) int64 in [0, num_classes), or None for the null condition.
        returns: logits (B, N, K); the output at the condition's position is dropped.
        raises:  ValueError for a wrong shape or dtype, or labels given to an unconditional prior.
        """
        check("inputs", inputs, self.token_shape, torch.int64)
        check_labels(labels, len(inputs), self.config.num_classes)
        return self.transformer.logits(self.transformer(inputs, labels)[:, 1:])

    def loss(self, logits, tokens, loss_mask, label_smoothing=0.0):
        """Eq. 3 for NAR: mean cross-entropy in nats over the masked positions of the batch; top-1 accuracy.

        logits:    (B, N, K), any float dtype; tokens: (B, N) int64 in [0, K), the originals;
                   loss_mask: (B, N) bool, True where the input was masked.
        returns:   (loss, accuracy), 0-dim float32 tensors. The mean is over this batch's masked tokens; a
                   caller with several micro-batches or processes weights each mean by its masked tokens.
        deviation: MaskGIT smooths labels by 0.1; the paper does not mention it, so our default is 0.
        """
        check("tokens", tokens, logits.shape[1:-1], torch.int64)
        check("loss_mask", loss_mask, tokens.shape[1:], torch.bool)
        entropy = F.cross_entropy(
            logits.float().flatten(0, -2), tokens.flatten(), reduction="none",
            label_smoothing=label_smoothing)
        count = loss_mask.sum().clamp(min=1)  # no logits[loss_mask], which would sync
        loss = entropy.masked_fill(~loss_mask.flatten(), 0.0).sum() / count
        hits = (logits.detach().argmax(dim=-1) == tokens) & loss_mask
        return loss, hits.sum() / count

    def noise_shape(self, sampler):
        """Of the uniforms in [0, 1) that `generate` wants for one image: (T, 2, N), for candidates and
        choice. More rounds than tokens would be rounds without a hole."""
        return min(sampler["nar_steps"], self.config.num_tokens), 2, self.config.num_tokens

    def draw(self, x, noise, sampler):
        """Candidates (M,) and their log-probabilities (M,) from x (M, d) of the Transformer, noise (M, 1)."""
        temperature, logits = sampler["token_temperature"], self.transformer.logits(x).float()  # (M, K)
        drawn = sample_logits(logits, noise[:, 0], temperature)
        log_probs = F.log_softmax(logits / (temperature if temperature >= GREEDY else 1.0), dim=1)
        return drawn, log_probs.gather(1, drawn[:, None])[:, 0]

    @torch.no_grad()
    def generate(self, labels, noise, tokens=None, return_steps=False, **sampler):
        """Fill all holes in T rounds, surest candidates first (MaskGIT decoding; Sec. 6.1, Table 10).

        Round t draws a candidate for every hole and fixes those with the highest score: confidence +
        choice_temperature * (1 - (t + 1) / T) * Gumbel noise. Fixed tokens never change.

        labels:    (B,) int64 in [0, num_classes), or None.
        noise:     (B, T, 2, N) uniforms in [0, 1): [:, t, 0] draws the candidates, the last row becomes the
                   Gumbel noise of the choice. An image depends on its row only.
        tokens:    optional (B, N) int64 in [0, K] with mask_id at the holes (ours, for inpainting). A row
                   with h < T holes takes h rounds. None: all holes.
        sampler:   settings out of `SAMPLER`: token_temperature divides the logits, 0 takes the argmax;
                   confidence_space is "prob" or "log", what the score starts from.
        returns:   (B, N) int64 in [0, K); with return_steps also (B, N) int64, the round that fixed each
                   position, -1 where it was given.
        raises:    ValueError for wrong shapes or settings, values out of range, TypeError for an
                   unknown setting.
        deviation: what the paper's "sampling temperature" multiplies is unresolved (I18, docs/decisions.md).
        """
        model, T = self.transformer, max((1, *noise.shape[1:2]))
        sampler = with_defaults(self.SAMPLER, {"nar_steps": T} | sampler)
        check("noise", noise, self.noise_shape(sampler), below=1)
        check_labels(labels, len(noise), self.config.num_classes, values=True)
        if sampler["confidence_space"] not in ("prob", "log"):
            raise ValueError(f'confidence_space must be "prob" or "log", not {sampler["confidence_space"]!r}')
        if tokens is None:
            tokens = torch.full((len(noise), *self.token_shape), self.mask_id, device=noise.device)
        check("tokens", tokens, self.token_shape, torch.int64, self.mask_id + 1, len(noise))
        tokens, left = tokens.clone(), [decode_counts(n, T) for n in self.holes(tokens).sum(1).tolist()]
        row_steps = torch.tensor([[len(counts)] for counts in left], device=noise.device)  # (B, 1)
        left = torch.tensor([counts + [0] * (T - len(counts)) for counts in left], device=noise.device)
        fixed_at = torch.full_like(noise[:, 0, 0], -1, dtype=torch.int64)
        with eval_mode(self):
            condition = model.embed_condition(labels, len(noise))  # (B, 1, d)
            for t in range(int(row_steps.max())):
                masked = self.holes(tokens)  # (B, N)
                x = model.hidden(torch.cat([condition, model.embed(tokens)], dim=1))[:, 1:]  # (B, N, d)
                uniforms = noise[:, t, :-1].transpose(1, 2).flatten(0, 1)  # (B * N, 1)
                candidates, confidence = self.draw(x.flatten(0, 1), uniforms, sampler)
                confidence = confidence.view_as(masked)
                if sampler["confidence_space"] == "prob":
                    confidence = confidence.exp()
                gumbel = -torch.log(-torch.log(noise[:, t, -1].float().clamp(min=1e-9)))
                anneal = (1 - (t + 1) / row_steps).clamp(min=0)  # (B, 1), 0 in the last round
                score = confidence + sampler["choice_temperature"] * anneal * gumbel
                score = score.masked_fill(~masked, math.inf)  # what is fixed stays fixed
                fix = masked & (order(score) >= left[:, t : t + 1])  # the lowest `left` stay masked
                tokens[fix] = candidates.view_as(tokens)[fix]
                fixed_at[fix] = t
        return (tokens, fixed_at) if return_steps else tokens

    def holes(self, tokens):
        """(B, N) bool, True where a position is masked."""
        return tokens == self.mask_id
