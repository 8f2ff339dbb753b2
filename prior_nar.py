"""The non-autoregressive prior: masked tokens are predicted together, in T rounds (Sec. 4.2, Table 10).

The paper uses MaskGIT as it is. Training hides a random share of the tokens; decoding starts with all of
them hidden and keeps, in each round, the candidates the model is surest of.
Sections and tables are those of arXiv 2212.03185.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from prior_ar import (
    GREEDY, build_transformer, check_labels, check_noise, check_tokens, eval_mode, guide, guided_condition,
    sample_logits,
)


def mask_schedule(r):
    """cos(pi r / 2): the share of tokens still masked at progress r in [0, 1] (MaskGIT; Sec. 4.2).

    r: a float or a float tensor; the result has the same type. Its mean over r ~ U(0, 1) is 2/pi.
    """
    return torch.cos(r * (math.pi / 2)) if torch.is_tensor(r) else math.cos(r * (math.pi / 2))


def mask_tokens(tokens, mask_id, noise):
    """Hide max(1, ceil(N cos(pi r / 2))) tokens of each row, chosen evenly without replacement (Sec. 4.2).

    tokens:    (B, N) int64 in [0, K), or (B, N, k), whose k sub-tokens are hidden together; mask_id: K.
    noise:     (B, N + 1) uniforms in [0, 1) drawn by the caller: column 0 is r, and the positions with the
               lowest of the other columns are hidden. The count is computed in float64, without a host sync.
    returns:   inputs like tokens, with mask_id at hidden positions; mask of this shape, True where hidden.
    raises:    ValueError for shapes that do not fit.
    deviation: the paper does not say how the count is rounded; ceil, and at least one, is ours.
    """
    check_tokens(tokens, tokens.shape[1:])
    num_tokens = tokens.shape[1]
    if noise.shape != (tokens.shape[0], num_tokens + 1):
        raise ValueError(f"noise: expected {(tokens.shape[0], num_tokens + 1)}, got {tuple(noise.shape)}")
    count = torch.ceil(mask_schedule(noise[:, :1].double()) * num_tokens).clamp(min=1)  # (B, 1)
    mask = order(noise[:, 1:]) < count  # (B, N)
    mask = mask if tokens.ndim == 2 else mask[..., None].expand_as(tokens)
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
    """Bidirectional masked-token prior (Sec. 4.2): the Transformer of `ARPrior` without the causal mask.

    In training write `inputs, mask = mask_tokens(...)`, `logits = ddp(inputs, labels)`, then
    `loss, accuracy = prior.loss(logits, tokens, mask)`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask_id = config.codebook_size  # [MASK] = K, one past the last code
        self.transformer = build_transformer(config, causal=False)

    def forward(self, inputs, labels=None, targets=None):
        """Logits of all positions at once; each sees the condition and every visible token (Sec. 4.2).

        inputs:  (B, N) int64 in [0, K], K = [MASK]. Out-of-range values are not checked.
        labels:  (B,) int64 in [0, num_classes), or None for the null condition.
        targets: (B, N, k), the true tokens: a head that predicts sub-tokens one after the other sees those
                 before the one that it predicts. Only head="ar" reads them.
        returns: logits (B, N, K) or (B, N, k, K); the output at the condition's position is dropped.
        raises:  ValueError for a wrong shape or dtype, or labels given to an unconditional prior.
        """
        check_tokens(inputs, self.config.token_shape)
        check_labels(labels, inputs.shape[0], self.config.num_classes)
        return self.transformer(inputs, labels, targets, skip=1)

    def loss(self, logits, tokens, mask, label_smoothing=0.0):
        """Mean cross-entropy in nats over the masked positions of the batch, and top-1 accuracy (Sec. 4.2).

        logits:    (B, N, K), any float dtype; tokens: (B, N) int64 in [0, K), the originals;
                   mask: (B, N) bool, True where the input was hidden. All with k after N, where k > 1.
        returns:   (loss, accuracy), 0-dim float32 tensors. The mean is over this batch's masked tokens; a
                   caller with several micro-batches or processes weights each mean by its masked tokens.
        deviation: MaskGIT smooths labels by 0.1; the paper does not mention it, so our default is 0.
        """
        check_tokens(tokens, logits.shape[1:-1])
        if mask.shape != tokens.shape or mask.dtype != torch.bool:
            got = f"{tuple(mask.shape)} {mask.dtype}"
            raise ValueError(f"mask: expected {tuple(tokens.shape)} bool, got {got}")
        entropy = F.cross_entropy(
            logits.float().flatten(0, -2), tokens.flatten(), reduction="none", label_smoothing=label_smoothing
        )  # (B * N * k,)
        count = mask.sum().clamp(min=1)  # sums and a count instead of logits[mask], which syncs with the host
        loss = entropy.masked_fill(~mask.flatten(), 0.0).sum() / count
        hits = (logits.detach().argmax(dim=-1) == tokens) & mask
        return loss, hits.sum() / count

    @torch.no_grad()
    def generate(self, labels, noise, steps=12, token_temperature=1.0, choice_temperature=0.45,
                 confidence_space="prob", tokens=None, return_steps=False, guidance=1.0):
        """Fill all holes in `steps` rounds, surest candidates first (MaskGIT decoding; Sec. 4.2, Table 10).

        Round t draws a candidate for every hole and fixes those with the highest score: confidence +
        choice_temperature * (1 - (t + 1) / T) * Gumbel noise. Fixed tokens never change.

        labels:    (B,) int64 in [0, num_classes), or None.
        noise:     (B, steps, k + 1, N) uniforms in [0, 1): [:, t, j] draws the candidates of sub-codebook j,
                   [:, t, k] is turned into the Gumbel noise of the choice. An image depends on its row only.
        steps:     T. A row with h < T holes takes h rounds, so that every round fixes at least one token.
        token_temperature: divides the logits; 0, or below GREEDY, takes the argmax, with confidences from
                   temperature 1.
        confidence_space:  the score starts from the candidate's probability ("prob") or its log ("log").
        tokens:    optional (B, N) int64 in [0, K] with mask_id at the holes (inpainting); rows may differ in
                   their number of holes. None: all holes. With k > 1 (B, N, k), all or none of a position.
        guidance:  scale of classifier-free guidance, see `prior_ar.guide`.
        returns:   (B, N) int64 in [0, K), or (B, N, k); with return_steps also (B, N) int64, the round that
                   fixed each position, -1 where it was given.
        raises:    ValueError for wrong shapes or settings, values out of range.
        deviation: what the paper's "sampling temperature" 0.45 (classes) and 0.65 (unconditional) multiplies
                   is UNRESOLVED. It may be (a) the softmax temperature of the tokens, (b) the choice
                   temperature on log-probabilities, where MaskGIT uses 4.5 and 0.45 is nearly greedy, or
                   (c) the choice temperature on probabilities, where 0.45 is about as strong as 4.5 in (b).
                   All three can be set; our default is (c). MaskGIT itself is confidence_space="log" with
                   choice_temperature=4.5. Rounds per row and inpainting are ours, and so is all of k > 1: the
                   confidence is the geometric mean over the sub-tokens.
        """
        model, k, num_tokens = self.transformer, self.config.num_codebooks, self.config.num_tokens
        check_noise(noise, (steps, k + 1, num_tokens))
        check_labels(labels, noise.shape[0], self.config.num_classes, values=True)
        if confidence_space not in ("prob", "log"):
            raise ValueError(f'confidence_space: expected "prob" or "log", got {confidence_space!r}')
        tokens = self._start(tokens, noise)
        holes = self._holes(tokens).sum(dim=1).tolist()
        counts = [decode_counts(h, steps) for h in holes]
        rounds = max((len(c) for c in counts), default=0)
        left = torch.tensor([c + [0] * (rounds - len(c)) for c in counts], device=noise.device)  # (B, rounds)
        row_steps = torch.tensor([[len(c)] for c in counts], device=noise.device)  # (B, 1)
        fixed_at = torch.full((len(holes), num_tokens), -1, device=noise.device)
        guidance = guidance if self.config.num_classes else 1
        copies = 1 if guidance == 1 else 2
        divisor = token_temperature if token_temperature >= GREEDY else 1.0
        with eval_mode(self):
            condition = guided_condition(model, labels, len(holes), guidance)  # (B, 1, d) or (2B, 1, d)
            for t in range(rounds):
                masked, log_probs = self._holes(tokens), []  # (B, N)

                def pick(j, logits, t=t, log_probs=log_probs):  # candidates of sub-token j for all positions
                    logits = guide(logits.float(), guidance)  # (B * N, K)
                    drawn = sample_logits(logits, noise[:, t, j].flatten(), token_temperature)
                    found = F.log_softmax(logits / divisor, dim=1)
                    log_probs.append(found.gather(1, drawn[:, None])[:, 0])
                    return drawn.repeat(copies)

                inputs = model.embed(torch.cat([tokens] * copies))
                x = model.run(torch.cat([condition, inputs], dim=1))[:, 1:]  # (B, N, d)
                candidates = model.draw(x.flatten(0, 1), pick)[: len(holes) * num_tokens].view_as(tokens)
                confidence = (sum(log_probs) / k).view_as(masked)
                if confidence_space == "prob":
                    confidence = confidence.exp()
                gumbel = -torch.log(-torch.log(noise[:, t, k].float().clamp(min=1e-9)))
                anneal = (1 - (t + 1) / row_steps).clamp(min=0)  # (B, 1), 0 in the last round
                score = confidence + choice_temperature * anneal * gumbel
                score = score.masked_fill(~masked, math.inf)  # what is fixed stays fixed
                fix = masked & (order(score) >= left[:, t : t + 1])  # the lowest `left` stay masked
                tokens = torch.where(fix if k == 1 else fix[..., None], candidates, tokens)
                fixed_at = fixed_at.masked_fill(fix, t)
        return (tokens, fixed_at) if return_steps else tokens

    def _holes(self, tokens):
        """(B, N) bool, True where a position is hidden."""
        return tokens == self.mask_id if tokens.ndim == 2 else (tokens == self.mask_id).any(dim=2)

    def _start(self, tokens, noise):
        """The sequence decoding starts from: all [MASK], or a checked partial input."""
        batch_size, shape = noise.shape[0], self.config.token_shape
        if tokens is None:
            return torch.full((batch_size, *shape), self.mask_id, dtype=torch.int64, device=noise.device)
        check_tokens(tokens, shape)
        if tokens.shape[0] != batch_size:
            raise ValueError(f"tokens and noise differ in batch size: {tokens.shape[0]} and {batch_size}")
        if not bool(((tokens >= 0) & (tokens <= self.mask_id)).all()):
            raise ValueError(f"tokens: expected values in [0, {self.mask_id}], {self.mask_id} being a hole")
        return tokens
