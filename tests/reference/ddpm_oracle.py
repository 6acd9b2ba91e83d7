"""Respaced DDPM with a learned variance, slow and obvious, in float64 NumPy.

It follows the papers and not our code: the chain over the kept timesteps is a diffusion of its own,
with betas of its own (Nichol & Dhariwal 2021, arXiv 2102.09672, section 4).
"""

import numpy as np


def chain(network, x, timesteps, alpha_bar, noises):
    """The image after walking ``timesteps`` (descending) from x, with one noise per step."""
    kept = sorted(timesteps)
    betas, last = [], 1.0
    for t in kept:
        betas.append(1 - alpha_bar[t] / last)
        last = alpha_bar[t]
    alphas = 1 - np.array(betas)
    products = np.cumprod(alphas)
    for index in reversed(range(len(kept))):
        output = network(x, kept[index])
        eps, v = np.split(output, 2, axis=1)
        product, before = products[index], products[index - 1] if index > 0 else 1.0
        beta = betas[index]
        x0 = (x - np.sqrt(1 - product) * eps) / np.sqrt(product)
        mean = (np.sqrt(before) * beta * x0 + np.sqrt(alphas[index]) * (1 - before) * x) / (1 - product)
        if index == 0:
            return mean
        smallest = beta * (1 - before) / (1 - product)
        fraction = (v + 1) / 2
        log_variance = fraction * np.log(beta) + (1 - fraction) * np.log(smallest)
        x = mean + np.exp(log_variance / 2) * noises[len(kept) - 1 - index]
    raise AssertionError("a chain has at least one step")
