"""Dense layers cut into experts: all of them are the layer, clusters are even, routers know norms."""

from typing import Any

import pytest
import torch

from ditmoe.convert.split import clusters, fitted, norms, split
from ditmoe.moe import FeedForward, Steering
from tests.ditmoe.convert.toys import BATCH, drawn, network, off


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_all_experts_of_a_split_layer_are_the_layer(activation: str) -> None:
    dense = network(activation=activation, blocks="none")
    made, served, _ = split(dense, 6, [BATCH], tau=1.0, steps=1)
    assert off(drawn(made), drawn(dense)) < 1e-5
    assert served == [1.0] * 4
    assert made.config.top_k == 6
    with torch.no_grad():
        fewer = made(*BATCH, steering=Steering(tau=0.3))
    assert all(record.counts.sum() < 6 * 6 * 16 for record in fewer.routing)


def test_clusters_are_even_and_find_units_that_are_alike() -> None:
    torch.manual_seed(0)
    layer = FeedForward(16, 24, "gelu")
    kinds = 5 * torch.eye(16)[:4]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    rows = kinds.repeat_interleave(6, dim=0) * torch.rand(24, 1).add(0.5) + 0.1 * torch.randn(24, 16)
    with torch.no_grad():
        layer.fc1.weight.copy_(rows[order])
    found = order[clusters(layer, 4)] // 6
    assert (found == found[:, :1]).all()
    assert sorted(found[:, 0].tolist()) == [0, 1, 2, 3]
    assert sorted(clusters(FeedForward(16, 96, "swiglu"), 8).flatten().tolist()) == list(range(96))


def test_a_fitted_router_knows_norms_and_chooses_better_than_chance() -> None:
    """Of a layer whose clusters answer to directions of their own."""
    torch.manual_seed(0)
    layer = FeedForward(16, 32, "gelu")
    with torch.no_grad():
        layer.fc1.weight.copy_(4 * torch.eye(16)[:4].repeat_interleave(8, dim=0) + 0.1 * torch.randn(32, 16))
    units, tokens = clusters(layer, 4), torch.randn(4000, 16)
    sizes = norms(layer, units, tokens)
    hidden = layer.hidden(tokens)
    one = hidden[:, units[2]] @ layer.fc2.weight[:, units[2]].T
    torch.testing.assert_close(sizes[:, 2], one.norm(dim=1))
    router, error = fitted(tokens[:3000], sizes[:3000], 1000, torch.Generator().manual_seed(0))
    logits = router([tokens[3000:].unsqueeze(0)])[0][0]
    assert error < 0.3
    assert (logits.argmax(dim=1) == sizes[3000:].argmax(dim=1)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("E", "batches", "tau", "words"),
    [(7, [BATCH], 0.5, "num_experts is 7"), (6, [], 0.5, "no image"), (6, [BATCH], 1.5, "tau is 1.5")],
)
def test_splits_that_cannot_be(E: int, batches: Any, tau: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split(network(blocks="none"), E, batches, tau=tau)
