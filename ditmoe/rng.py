"""One counter-based generator a thing, so that nothing but (seed, stream, index) decides what is drawn."""

import numpy as np


def sample_rng(seed: int, stream: int, index: int) -> np.random.Generator:
    """The generator of one thing: counter-based (Philox), so that nothing but (seed, stream, index) matters."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))
