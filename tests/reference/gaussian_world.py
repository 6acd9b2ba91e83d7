"""A world where every network is known: pixels x0 ~ N(mean, variance), with the optimal network.

All samplers are affine in x here, so three images with pixels -1, 0, 1 give the whole map from
noise to data: mean f(0), standard deviation (f(1) - f(-1)) / 2, with no Monte Carlo.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

MEAN, VARIANCE = 0.3, 0.25
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
Z = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)


def exact_data(z: np.ndarray) -> np.ndarray:
    """Where the exact probability flow takes noise z at t = 999."""
    a = ALPHA_BAR[-1]
    x0 = MEAN + np.sqrt(VARIANCE) * (z - np.sqrt(a) * MEAN) / np.sqrt(a * VARIANCE + 1 - a)
    return np.asarray(x0)


class OptimalNetwork(nn.Module):
    """E[target | x_t] for Gaussian data; label 0 has the mean ``mean``, 1 has minus it, 2 has 0.

    ``v`` appends constant variance channels, one value per label.
    """

    def __init__(self, kind="epsilon", mean=MEAN, v=None):
        super().__init__()
        self.kind, self.v = kind, v
        self.means = torch.tensor([mean, -mean, 0.0], dtype=torch.float64)
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        assert t.shape == (len(x),)
        self.batches.append(len(x))
        labels = torch.zeros(len(x), dtype=torch.int64) if class_labels is None else class_labels
        mean = self.means[labels].reshape(-1, 1, 1, 1)
        if self.kind == "flow_prediction":
            signal, noise = 1 - t.double() / 1000, t.double() / 1000
        else:
            # between two timesteps as Euler and Heun of diffusers have it: noise / signal is linear
            ratio = np.interp(t.double(), np.arange(1000), np.sqrt(1 / ALPHA_BAR - 1))
            signal = torch.from_numpy(1 / np.sqrt(1 + ratio**2))
            noise = signal * torch.from_numpy(ratio)
        signal, noise = signal.reshape(-1, 1, 1, 1), noise.reshape(-1, 1, 1, 1)
        spread = (x.double() - signal * mean) / (signal**2 * VARIANCE + noise**2)
        x0, eps = mean + signal * VARIANCE * spread, noise * spread
        output = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": signal * eps - noise * x0,
            "flow_prediction": eps - x0,
        }[self.kind].float()
        if self.v is not None:
            v = torch.tensor(self.v)[labels].reshape(-1, 1, 1, 1).expand_as(output)
            output = torch.cat([output, v], dim=1)
        return SimpleNamespace(sample=output)
