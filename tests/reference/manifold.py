"""Precision, recall, density and coverage from their definitions: one pair of samples at a time."""

import numpy as np


def distance(a, b):
    return float(np.sqrt(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()))


def radius(samples, i, k):
    """Distance from sample i to its k-th nearest other sample."""
    return sorted(distance(samples[i], samples[j]) for j in range(len(samples)) if j != i)[k - 1]


def prdc(real, generated, pr_k=3, dc_k=5):
    """Kynkäänniemi et al., 2019, eq. 1 and 2 (closed balls); Naeem et al., 2020, eq. 3 and 4 (open balls)."""
    real_radius = [radius(real, i, pr_k) for i in range(len(real))]
    generated_radius = [radius(generated, j, pr_k) for j in range(len(generated))]
    precision = np.mean([any(distance(y, x) <= r for x, r in zip(real, real_radius, strict=True)) for y in generated])
    recall = np.mean([any(distance(x, y) <= r for y, r in zip(generated, generated_radius, strict=True)) for x in real])
    balls = [(x, radius(real, i, dc_k)) for i, x in enumerate(real)]
    density = sum(distance(y, x) < r for y in generated for x, r in balls) / (dc_k * len(generated))
    coverage = np.mean([any(distance(y, x) < r for y in generated) for x, r in balls])
    return float(precision), float(recall), density, float(coverage)
