"""Procedural images for runs without data: ten classes of structure under free detail."""

import math
import random

import torch

from plumbing.dataset import ImageData
from plumbing.processes import mix


class Shapes(ImageData):
    """Procedural images, a function of (split, index): ten classes of structure under free detail.

    Structure is what, where, how large and which orientation; detail is colours, fine texture and lighting.
    Any resolution; values and factors are the same at each. `seed` orders and flips them.
    """

    NAMES = ["disk", "ring", "square", "triangle", "cross", "star", "bar", "crescent", "pair", "hourglass"]

    def __init__(self, split, size, image_size, seed=0):
        super().__init__(image_size, seed, self.NAMES)
        self.split, self.size = split, size
        self.labels, self.fingerprint = [i % 10 for i in range(size)], [size, f"shapes{seed or ''}"]

    def __len__(self):
        return self.size

    def name(self, index):
        return f"{self.split} shape {index}"

    def factors(self, index):
        """All factors of one image: floats and tuples. Lengths in half image sides, angles in radians."""
        key = (0, self.split, index)
        s, d = random.Random(mix("structure", *key)), random.Random(mix("detail", *key, 0))
        radius = s.uniform(0.6, 0.85)
        dark, bright = [tuple(d.uniform(*span) for _ in range(3)) for span in ((0.0, 0.45), (0.55, 1.0))]
        swap = d.random() < 0.5
        return dict(
            label=index % 10, radius=radius, angle=s.uniform(-0.4, 0.4),
            x=s.uniform(radius - 1, 1 - radius), y=s.uniform(radius - 1, 1 - radius),
            foreground=bright if swap else dark, background=dark if swap else bright,
            texture=d.choice(("plain", "stripes", "checks")), frequency=d.uniform(4, 8),
            phase=d.uniform(0, 2 * math.pi),
            texture_angle=d.uniform(0, math.pi), texture_strength=d.uniform(0.03, 0.12),
            light_angle=d.uniform(0, 2 * math.pi), light_strength=d.uniform(0, 0.2),
        )

    def mask(self, index):
        """Coverage of each pixel by the shape: (S, S) float32 in [0, 1]."""
        f, (x, y) = self.factors(index), self._grid()
        x, y = (x - f["x"]) / f["radius"], (y - f["y"]) / f["radius"]
        c, s = math.cos(f["angle"]), math.sin(f["angle"])
        distance = shape_distance(f["label"], c * x + s * y, c * y - s * x) * f["radius"]
        return (0.5 - distance * self.image_size / 2 / 1.5).clamp(0, 1)  # an edge 1.5 pixels wide

    def render(self, index):
        f, (x, y) = self.factors(index), self._grid()
        foreground, background = (torch.tensor(f[k])[:, None, None] for k in ("foreground", "background"))
        image = background + (foreground - background) * self.mask(index)
        if f["texture"] != "plain":
            c, s = math.cos(f["texture_angle"]), math.sin(f["texture_angle"])
            wave = torch.sin(f["frequency"] * math.pi * (c * x + s * y) + f["phase"])
            if f["texture"] == "checks":
                wave = wave * torch.sin(f["frequency"] * math.pi * (c * y - s * x))
            image = image + f["texture_strength"] * wave
        light = math.cos(f["light_angle"]) * x + math.sin(f["light_angle"]) * y
        image = image * (1 + f["light_strength"] * light)
        return (image.clamp(0, 1) * 255).round().byte()

    def _grid(self):
        axis = (torch.arange(self.image_size) + 0.5) / self.image_size * 2 - 1
        return axis[None, :], axis[:, None]  # x runs to the right, y downwards


def shape_distance(label, u, v):
    """About the signed distance to shape `label` of radius 1 at the origin, negative inside."""
    a, b, r = u.abs(), v.abs(), torch.hypot(u, v)
    angle = torch.atan2(v, u)
    if label == 0:  # disk
        return r - 0.9
    if label == 1:  # ring
        return (r - 0.75).abs() - 0.2
    if label == 2:  # square
        return torch.maximum(a, b) - 0.75
    if label == 3:  # triangle
        return torch.maximum(-v - 0.5, torch.maximum(0.87 * u + 0.5 * v, -0.87 * u + 0.5 * v) - 0.5)
    if label == 4:  # cross
        return torch.minimum(torch.maximum(a, b - 0.7), torch.maximum(b, a - 0.7)) - 0.27
    if label == 5:  # star with five points
        wedge = (angle * 5 / (2 * math.pi) % 1 - 0.5).abs() * 2  # 1 at a point, 0 between two points
        return (r - (0.38 + 0.65 * wedge**2)) * 0.7
    if label == 6:  # bar
        return torch.maximum(a - 1, b - 0.25)
    if label == 7:  # crescent
        return torch.maximum(r - 0.95, 0.75 - torch.hypot(u - 0.5, v))
    if label == 8:  # pair of disks
        return torch.hypot(a - 0.55, v) - 0.4
    return torch.maximum(b - 0.85, a - 0.85 * b - 0.05)  # hourglass
