"""K-means re-estimation of a codebook (Table 5, I20): clusters of a uniform sample of encoder outputs."""

import torch
import torch.distributed as dist

from plumbing.processes import all_rows, full_float32, print0, world

SCHEDULE = ("warm_start", "kmeans_warmup", "kmeans_every", "kmeans_last")  # what it reads of TokenizerConfig


class OfflineKMeans:
    """Goes before a quantizer: `class KMeansQuantizer(OfflineKMeans, VectorQuantizer)`.

    codebook="kmeans" re-estimates on the schedule of `kmeans_warmup`, `kmeans_every`, `kmeans_last`; other
    codebooks once, at `warm_start`. Before the first time the decoder gets z_hat itself.
    """

    RESERVOIR = 16_384  # vectors kept for the re-estimation

    def __init__(self, config):
        super().__init__(config)
        self.bypass = False  # warm-up: the decoder gets z_hat itself, normalised where codes are
        self.collecting = False  # while encoder outputs go to the reservoir
        self.reestimations = range(config.warm_start, config.warm_start + 1)
        if config.kmeans_every < 1:
            raise ValueError(f"kmeans_every must be at least 1, got {config.kmeans_every}")
        if config.codebook == "kmeans":
            self.reestimations = range(config.kmeans_warmup, config.kmeans_last + 1, config.kmeans_every)
            if not self.reestimations:
                raise ValueError(f"kmeans_last {config.kmeans_last} comes before kmeans_warmup "
                                 f"{config.kmeans_warmup}, so there would be no K-means")
        used = config.warm_start or config.codebook == "kmeans"
        if used and config.codebook_size > self.RESERVOIR:
            raise ValueError(f"K-means takes its centres from {self.RESERVOIR:,} vectors, so not "
                             f"{config.codebook_size:,} of them; set warm_start=0 or fewer codes")
        self.register_buffer("reservoir", torch.zeros(self.RESERVOIR, config.codebook_dim))
        self.register_buffer("reservoir_keys", torch.full((self.RESERVOIR,), -1.0))
        self.key_seed = 0  # of the next random keys: a function of the step and the micro-batch

    def _load_from_state_dict(self, state, prefix, *more):
        """A rounded export holds no reservoir: an empty one takes its place."""
        for name in ("reservoir", "reservoir_keys"):
            state.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state, prefix, *more)

    def fit(self, steps):
        """In a run that ends before the first re-estimation, which would never quantize, all come earlier:
        the first after a fifth of the steps. A function of the configuration, as the steps are."""
        planned = self.reestimations
        if planned[0] < max(1, steps):
            return
        first = max(min(1, steps - 1), steps // 5)
        last, every = ((n * first) // planned[0] for n in (planned[-1], planned.step))
        self.reestimations = range(first, last + 1, max(1, every))
        print0(f"note: {steps} steps end before the first K-means, after step {planned[0]}; now after step"
               f" {first}, a fifth of them")

    def forward(self, z_hat):
        """As the quantizer's; in training z_hat goes through unquantized before the first re-estimation."""
        with full_float32(z_hat):
            z = self.flatten(z_hat)
            if self.training and self.collecting:
                self._fill_reservoir(z.detach())
            if self.bypass and self.training:
                nothing = 0 * self.codes.sum()  # the codebook stays in the graph, as DDP wants
                z_st = z.view(len(z_hat), *z_hat.shape[2:], -1).permute(0, 3, 1, 2).contiguous()
                return z_st, self.quantize(z_hat), {"loss_codebook": nothing, "loss_commit": nothing}
        return super().forward(z_hat)

    def start_step(self, step):
        """Called before each training step (0-based): [the codebook's weight] if it was just overwritten, so
        that the caller resets its optimizer moments, else []."""
        self.bypass, self.collecting = step < self.reestimations[0], step < self.reestimations[-1]
        self.key_seed = step << 20
        return [self.codebook.weight] if step in self.reestimations and self.reestimate(seed=step) else []

    @torch.no_grad()
    def _fill_reservoir(self, z):
        """Keeps the vectors with the largest random keys, a uniform sample of all seen since the last
        re-estimation. The keys depend on the step alone, so all processes agree."""
        z = all_rows(z)
        keys = torch.rand(len(z), generator=torch.Generator().manual_seed(self.key_seed)).to(z.device)
        fine = z.isfinite().all(1)  # one bad step must not end up in the codebook
        z, keys = z.where(fine[:, None], 0), keys.where(fine, -1)
        keys, keep = torch.cat([self.reservoir_keys, keys]).topk(self.RESERVOIR)
        self.reservoir.copy_(torch.cat([self.reservoir, z])[keep])
        self.reservoir_keys.copy_(keys)
        self.key_seed += 1

    @torch.no_grad()
    def reestimate(self, seed):
        """Overwrites the codebook by the K-means centres of the reservoir and empties it.

        returns False, and changes nothing, while the reservoir holds fewer than K vectors."""
        vectors = self.reservoir[self.reservoir_keys >= 0]
        if len(vectors) < self.config.codebook_size:
            return False
        self.codebook.weight.copy_(kmeans(vectors, self.config.codebook_size, seed))
        if world() > 1:
            dist.broadcast(self.codebook.weight.data, 0)
        self.reservoir_keys.fill_(-1)
        return True


@torch.no_grad()
def kmeans(x, num_centres, seed, iterations=10):
    """Lloyd's algorithm from a k-means++ start: (M, n) float32 -> (num_centres, n)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.empty(num_centres, x.shape[1], device=x.device)
    gap = torch.full((len(x),), 1.0, device=x.device)  # squared distance to the nearest centre so far
    for i in range(num_centres):
        weights = (gap if gap.sum() > 0 else torch.ones_like(gap)).cpu()
        centres[i] = x[torch.multinomial(weights, 1, generator=generator).item()]
        to_new = (x - centres[i]).square().sum(1)
        gap = to_new if i == 0 else torch.minimum(gap, to_new)
    for _ in range(iterations):
        with full_float32(x):
            nearest = torch.addmm(centres.square().sum(1), x, centres.T, alpha=-2).argmin(1)
        counts = torch.bincount(nearest, minlength=num_centres).unsqueeze(1)
        means = torch.zeros_like(centres).index_add_(0, nearest, x) / counts.clamp(min=1)
        centres = torch.where(counts > 0, means, centres)  # an empty cluster keeps its centre
    return centres
