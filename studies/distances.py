"""Distances between images and sets of images that nothing is trained on."""

import re

import torch
import torch.nn.functional as F


def plain(name, layer=""):
    """The name of a number or protocol, which says FID of Inception's features alone: of others rfid-val is
    rfd-val, view_kid view_kd, inception_score class_score. Results up to commit 92012fd call all of them FID.

    layer: of the features; Inception's "2048" leaves the name as it is
    """
    found = re.sub(r"(?<![a-z])([gipr]?[fk])id(?![a-z])", r"\1d", name)
    return name if layer == "2048" else found.replace("inception_score", "class_score")


def plain_names(row):
    """Numbers of a table, in which nothing is called FID, whatever the features: {name: number}"""
    return {plain(name): value for name, value in row.items()}


def fidelity(features, logits, reference, subset=10_000):
    """FID, IS, KID, precision and recall of generated images, all computed by torch-fidelity.

    features:  (n, F) float32 of the generated images, logits (n, C), both on the CPU
    reference: dict of `reference_statistics`: mu, sigma of all real images, `features` of at most `subset`,
               without which there are FID and IS alone
    returns:   dict of floats. KID takes 100 subsets of at most 1,000 images, precision and recall take the
               first `subset` generated images, 3 neighbours, and the features of the reference.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real = reference.get("features")
    statistics = {name: reference[name].numpy() for name in ("mu", "sigma")}
    values = fid_statistics_to_metric(fid_features_to_statistics(features), statistics, False)
    values |= isc_features_to_metric(logits)
    if real is not None:
        size = min(1000, len(features), len(real))
        values |= kid_features_to_metric(features, real, kid_subset_size=size, verbose=False)
        values |= prc_features_to_metric(features[:subset], real, save_cpu_ram=True, verbose=False)
    short = dict(fid="frechet_inception_distance", inception_score="inception_score_mean",
                 kid="kernel_inception_distance_mean", precision="precision", recall="recall")
    return {name: values[key] for name, key in short.items() if key in values}


def reference_statistics(features, subset=10_000):
    """What `fidelity` compares with: mu and sigma of (n, F) features of real images, and `subset` of them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    statistics = fid_features_to_statistics(features)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:subset].sort().values
    return dict(mu=torch.from_numpy(statistics["mu"]), sigma=torch.from_numpy(statistics["sigma"]),
                features=features[chosen].clone())


def ssim(x, x_hat):
    """Structural similarity of each pair of uint8 images (B, 3, H, W): (B,) float64, 1 for equal images.

    Wang et al. 2004 as it is usually computed: Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01,
    K2 = 0.03, range 255, the mean over colours and over all places where the window fits: a side needs 11.
    """
    window = torch.exp(-((torch.arange(11.0, device=x.device, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(y):
        y = F.conv2d(y.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))  # (B * 3, 1, H - 10, W)
        return F.conv2d(y, window.view(1, 1, 1, 11)).view(*y.shape[:1], -1).unflatten(0, x.shape[:2])

    a, b = x.double(), x_hat.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance, c1, c2 = blur(a * b) - mean_a * mean_b, (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2))
