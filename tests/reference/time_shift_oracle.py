"""Time-shift sampling, slow and obvious, in float64 NumPy: one image, one candidate at a time.

It follows the pseudo-code of the released repository (variant A: mode "target") and Algorithm 3 of arXiv 2305.15583
(mode "network"; "both" also starts the step at the level the network was told), and not our code.
"""

import numpy as np


def nearest_step(x, t, width, expected, lowest=0, highest=None):
    """The timestep in t - width // 2 .. t + width // 2 whose expected variance is nearest to that of image x."""
    pixels = x.ravel()
    variance = ((pixels - pixels.mean()) ** 2).sum() / (len(pixels) - 1)
    highest = len(expected) - 1 if highest is None else highest
    best = None
    for candidate in range(t - width // 2, t + width // 2 + 1):
        if not lowest <= candidate <= highest or candidate >= len(expected):
            continue
        key = (abs(variance - expected[candidate]), abs(candidate - t))
        if best is None or key < best[0]:
            best = (key, candidate)
    return best[1]


def ddim_move(x, eps, start, end, eta, noise):
    """Variant A's DDIM and "DDPM" updates; eta 1 is DDPM with the small variance."""
    x0 = (x - np.sqrt(1 - start) * eps) / np.sqrt(start)
    spread = eta * np.sqrt((1 - start / end) * (1 - end) / (1 - start)) if eta > 0 else 0.0
    return np.sqrt(end) * x0 + np.sqrt(1 - end - spread**2) * eps + spread * noise


def walk(network, x, timesteps, alpha_bar, *, mode, width, cutoff, v=0.0, final=1.0, eta=0.0, noises=None):
    """(images, shifts[k][n] that step k reports for image n), by DDIM from x (N, C, H, W).

    ``network(x, t)`` is eps of one image; ``final`` is the level after the last step. With noise a step must lead to
    less of it, so then a target lies below the step's start and a start above its end.
    """
    expected = [a * v + 1 - a for a in alpha_bar]
    images, shifts = [], [[0] * len(x) for _ in timesteps]
    for n, image in enumerate(x):
        for k, t in enumerate(timesteps):
            after = timesteps[k + 1] if k + 1 < len(timesteps) else None
            told, start, end = t, alpha_bar[t], final if after is None else alpha_bar[after]
            if mode == "target":
                if k > 0 and after is not None and after > cutoff:
                    chosen = nearest_step(image, after, width, expected, highest=t - 1 if eta > 0 else None)
                    shifts[k][n] = chosen - after
                    end = alpha_bar[chosen]
            elif k > 0 and t > cutoff:
                lowest = (0 if after is None else after + 1) if eta > 0 else 0
                told = nearest_step(image, t, width, expected, lowest=lowest)
                shifts[k - 1][n] = told - t  # it is known, and reported, when the step before ends
                start = alpha_bar[told] if mode == "both" else start
            noise = 0.0 if noises is None or after is None else noises[k][n]
            image = ddim_move(image, network(image, told), start, end, eta, noise)
        images.append(image)
    return np.stack(images), shifts
