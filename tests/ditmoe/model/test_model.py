"""The transformer: published sizes, what it must not depend on, saving and loading, gradient checkpointing."""

import dataclasses
import re
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
import torch

from ditmoe.config.experts import RouterInput, RouterKind
from ditmoe.config.presets import PRESETS
from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.model import KEYS, DiTMoETransformer2DModel, build, count_parameters, layers
from ditmoe.model.layers import rotary_positions, rotate, sincos_positions, unpatchify
from ditmoe.moe import contrastive_loss

PAPER = {  # total and activated parameters in millions (DiT-MoE, Table 1; the release instantiated)
    "dit-moe-s/2-8e2a": (199.31, 71.91),
    "dit-moe-s/2-16e2a": (369.21, 71.94),
    "dit-moe-b/2-8e2a": (795.86, 286.25),
    "dit-moe-l/2-8e2a": (2823.8, 1011.8),
    "dit-moe-xl/2-8e2a": (4168.2, 1492.7),
    "dit-moe-g/2-16e2a": (16503.7, 3181.6),
}
DENSE_DIT = {"s": 33, "b": 130, "l": 458, "xl": 675}


def meta(config: Config) -> DiTMoETransformer2DModel:
    with torch.device("meta"):
        return build(config, 1000)


def small(**changes: object) -> DiTMoETransformer2DModel:
    torch.manual_seed(0)
    values = {
        "sample_size": 8, "in_channels": 2, "num_classes": 5, "patch_size": 2, "hidden_size": 32, "depth": 4,
        "num_heads": 2, "ffn_width": 48, "num_experts": 4, "top_k": 2, "expert_width": 16, "shared_width": 16,
    }  # fmt: skip
    model = DiTMoETransformer2DModel(**{**values, **changes})
    for p in model.parameters():  # adaLN-Zero starts as a constant: move every weight
        torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 8, 8, generator=g), torch.tensor([10.0, 500, 990])[:n], torch.tensor([0, 3, 5])[:n]


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_have_the_published_sizes(name: str) -> None:
    total, activated = (n / 1e6 for n in count_parameters(meta(PRESETS[name])))
    assert (total, activated) == (pytest.approx(PAPER[name][0], rel=1e-4), pytest.approx(PAPER[name][1], rel=1e-4))


@pytest.mark.parametrize("name", DENSE_DIT)
def test_our_presets_activate_what_the_dense_dit_has(name: str) -> None:
    total, activated = (n / 1e6 for n in count_parameters(meta(PRESETS[name])))
    assert activated == pytest.approx(DENSE_DIT[name], rel=0.05)
    assert total > 1.5 * activated
    dense = replace(PRESETS[name], moe=replace(PRESETS[name].moe, blocks="none"))
    assert count_parameters(meta(dense))[0] / 1e6 == pytest.approx(activated, rel=0.01)


@pytest.mark.parametrize("name", ["digits", "fashion", "folder"])
def test_small_presets_have_a_dense_twin_of_equal_activated_size(name: str) -> None:
    dense = replace(PRESETS[name], moe=replace(PRESETS[name].moe, blocks="none"))
    assert count_parameters(meta(dense))[0] == pytest.approx(count_parameters(meta(PRESETS[name]))[1], rel=0.02)


@pytest.mark.parametrize("positions", ["rope", "sincos"])
@pytest.mark.parametrize("qk_norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("moe_blocks", ["all", "every-second", "none"])
def test_shapes(positions: str, qk_norm: str, moe_blocks: str) -> None:
    model = small(positions=positions, qk_norm=qk_norm, moe_blocks=moe_blocks, learn_sigma=True)
    x, t, y = inputs()
    out = model(x, t, y)
    assert out.sample.shape == (3, 4, 8, 8)
    assert len(out.routing) == {"all": 4, "every-second": 2, "none": 0}[moe_blocks]
    assert all(r.counts.sum() == 3 * 16 * 2 for r in out.routing)


def test_routing_by_place_survives_saving(tmp_path: Path) -> None:
    model = small(router_input="position", moe_blocks="all").eval()
    x, t, y = inputs()
    out = model(x, t, y)
    first, second = (model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).routing for i in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.served(), b.served())  # other image, time and label: the same experts
        assert len(torch.unique(a.served()[0], dim=0)) > 1  # other place: others
    model.save_pretrained(tmp_path)
    again = DiTMoETransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x, t, y).sample, out.sample)
    with pytest.raises(ValueError, match="positions"):
        model.blocks[0].moe(torch.randn(1, 9, 32))


@pytest.mark.parametrize("seen", get_args(RouterInput))
@pytest.mark.parametrize("kind", get_args(RouterKind))
def test_every_router_trains_a_model(seen: str, kind: str) -> None:
    model = small(router_input=seen, router_kind=kind, moe_blocks="all").train()
    x, t, y = inputs()
    out = model(x, t, y)
    out.sample.square().mean().backward()
    if kind != "centroid":  # which do not learn
        assert all(block.moe.router.weight.grad.abs().sum() > 0 for block in model.blocks)
    an_image = seen in ("time", "label", "time+label")
    assert all(record.served().shape[1] == (1 if an_image else 16) for record in out.routing)
    alone = model(x[:1], t[:1], y[:1]).sample
    torch.testing.assert_close(alone, out.sample[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "score"), [(None, "sigmoid"), (20.0, "sigmoid"), (None, "identity")])
def test_a_prototype_router_survives_saving(tmp_path: Path, scale: float | None, score: str) -> None:
    options = {"router_kind": "prototype", "router_input": "plain+position", "cosine_scale": scale}
    model = small(**options, router_score=score, router_renormalize=False, moe_blocks="all").eval()
    model.save_pretrained(tmp_path)
    again = DiTMoETransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(*inputs()).sample, model(*inputs()).sample)
    largest = max(float(record.logits.detach().abs().max()) for record in again(*inputs()).routing)
    bound = scale or (1.0 if score == "identity" else 64**0.5)
    assert 0.2 * bound < largest <= bound


@pytest.mark.parametrize("seen", [seen for seen in get_args(RouterInput) if "label" in seen])
def test_a_router_of_labels_needs_labels(seen: str) -> None:
    with pytest.raises(ValueError, match=rf"router_input {re.escape(seen)} needs a model with classes"):
        small(router_input=seen, num_classes=0)


def test_a_class_has_its_experts_at_a_place_in_every_image_and_at_every_time() -> None:
    model = small(router_input="label+position", moe_blocks="all", num_experts=16).eval()
    x, _, _ = inputs()
    x, t, y = torch.cat([x, -x])[:3], torch.tensor([10.0, 900.0, 10.0]), torch.tensor([1, 1, 2])
    for record in model(x, t, y).routing:
        one, other_image, other_class = record.served()
        assert torch.equal(one, other_image)
        assert not torch.equal(one, other_class)
        assert len(torch.unique(one, dim=0)) > 1  # other place: others


def test_every_option_of_model_and_experts_reaches_the_network_or_is_the_trainings_own() -> None:
    known = signature(DiTMoETransformer2DModel.__init__).parameters
    fields = [KEYS.get(f.name, f.name) for section in (ModelConfig, MoEConfig) for f in dataclasses.fields(section)]
    trainings = {"balance_weight", "balance_over", "z_weight", "bias_rate", "capacity_start", "centroids"}
    trainings |= {"contrastive_weight", "contrastive_temperature", "domain_weight", "hoyer_weight"}
    trainings |= {"experts"}  # which expert_rank says too
    assert set(fields) - known.keys() == {"gradient_checkpointing", *trainings}
    foreign = {"time_scale", "reverse_time", "freq_shift", "norm2_eps"}  # of checkpoints that others trained
    assert known.keys() - {"self", *fields} == {
        "router_bias",
        "learn_sigma",
        "prediction_type",
        "other_sizes",
        "expert_storage",
        *foreign,
    }


def test_a_new_model_predicts_zero() -> None:
    model = DiTMoETransformer2DModel(sample_size=8, in_channels=2, hidden_size=32, depth=2, num_heads=2)
    assert model(*inputs()).sample.abs().max() == 0


def test_no_labels_is_the_null_label_and_unconditional_models_work() -> None:
    model = small()
    x, t, _ = inputs()
    assert torch.equal(model(x, t).sample, model(x, t, torch.full((3,), 5)).sample)
    free = small(num_classes=0)
    assert free.null_label is None
    assert free(x, t).sample.shape == x.shape
    with pytest.raises(ValueError, match="without labels"):
        free(x, t, torch.zeros(3, dtype=torch.int64))


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    model = small().eval()
    x, t, y = inputs()
    together = model(x, t, y).sample
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_time_and_label_and_position_matter() -> None:
    model = small().eval()
    x, t, y = inputs()
    base = model(x, t, y).sample
    assert (model(x, t + 50, y).sample - base).abs().max() > 1e-4
    assert (model(x, t, (y + 1) % 5).sample - base).abs().max() > 1e-4
    turned = model(x.flip(3), t, y).sample.flip(3)
    assert (turned - base).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{"freq_shift": 128}, {"freq_shift": 2}, {"norm2_eps": 0.0}])
def test_what_no_checkpoint_has_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="they are 0 or 1, and above 0"):
        small(**options)


def test_an_imported_time_scale_is_undone() -> None:
    ours, imported = small(), small(time_scale=1.0)
    x, t, y = inputs()
    torch.testing.assert_close(imported(x, t * 1000, y).sample, ours(x, t, y).sample)


@pytest.mark.parametrize("variant", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_models_agree(tmp_path: Path, variant: torch.dtype) -> None:
    model = small(router_bias=True)
    model.blocks[1].moe.router.expert_bias.copy_(torch.tensor([0.1, -0.1, 0.2, -0.2]))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.to(variant))  # numbers that the variant can hold
    DiTMoETransformer2DModel.from_config(model.config).to(variant)  # fails if a part cannot be cast
    small_copy = small(router_bias=True)
    small_copy.load_state_dict(model.state_dict())
    small_copy.to(variant).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = DiTMoETransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(*inputs()).sample, again(*inputs()).sample)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kind", get_args(RouterKind))
def test_gradient_checkpointing_gives_the_same_gradients_and_counts_once(kind: str, joined: bool) -> None:
    grads, counts = [], []
    for checkpointing in (False, True):
        model = small(router_kind=kind, long_skips=joined, local_conv=joined).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        out = model(*inputs())
        losses = [out.sample.square().mean()]
        losses += [contrastive_loss(record, 0.1) for record in out.routing if kind == "prototype"]
        torch.stack(losses).sum().backward()
        grads.append([p.grad for p in model.parameters()])
        counts.append(torch.stack([r.counts for r in out.routing]))
    assert torch.equal(*counts)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 8\)"):
        small()(torch.randn(1, 2, 6, 6), 5)


def test_rotary_positions_see_only_differences() -> None:
    cos, sin = rotary_positions(16, 5)
    q, k = torch.randn(16), torch.randn(16)
    turned_q = rotate(q.expand(1, 1, 25, 16), cos, sin)[0, 0].view(5, 5, 16)
    turned_k = rotate(k.expand(1, 1, 25, 16), cos, sin)[0, 0].view(5, 5, 16)
    a = turned_q[1, 2] @ turned_k[3, 3]
    b = turned_q[2, 1] @ turned_k[4, 2]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (a - turned_q[1, 2] @ turned_k[3, 2]).abs() > 1e-3


@pytest.mark.parametrize("more", [{}, {"long_skips": True, "local_conv": True, "refine_width": 8}])
@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_images_of_other_sizes_have_their_places_on_the_same_grid(
    tmp_path: Path, positions: str, more: dict[str, object]
) -> None:
    grown = sincos_positions(16, 2, 4)[0], *rotary_positions(8, 2, 4)  # tokens lie at 0.5 and 2.5 of 0..3
    omega, turns = 10000.0 ** -(torch.arange(4) / 4), 100.0 ** -(torch.arange(2) / 2)
    torch.testing.assert_close(grown[0][1, :4], (2.5 * omega).sin())  # row 0, column 1
    torch.testing.assert_close(grown[0][1, 8:12], (0.5 * omega).sin())
    torch.testing.assert_close(grown[1][1], torch.cat([(0.5 * turns).repeat(2), (2.5 * turns).repeat(2)]).cos())
    model = small(positions=positions, other_sizes=(4, 16), **more).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, y = inputs()
    model.save_pretrained(tmp_path)
    again = DiTMoETransformer2DModel.from_pretrained(tmp_path).eval()
    for size in (4, 8, 16):
        z = torch.nn.functional.interpolate(x, size=(size, size))
        out = model(z, t, y)
        assert out.sample.shape == z.shape
        assert torch.equal(again(z, t, y).sample, out.sample)
    with pytest.raises(ValueError, match=r"\(2, 8, 8\) or \(2, 4, 4\) or \(2, 16, 16\)"):
        model(x[:, :, :6, :6], t, y)


def test_sincos_positions_are_those_of_dit() -> None:
    """DiT's table by its definition: sin then cos of position * 10000^(-j/(D/4)), columns first."""
    table = sincos_positions(16, 3)[0]
    omega = 10000.0 ** -(torch.arange(4) / 4)
    row, column = 2, 1
    wanted = torch.cat([(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()])
    torch.testing.assert_close(table[row * 3 + column], wanted, rtol=1e-5, atol=1e-6)


def test_unpatchify_undoes_the_patch_order() -> None:
    image = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    patches = image.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)
    assert torch.equal(unpatchify(patches, 2, 3), image)


def test_long_skips_join_mirror_images_and_convolutions_neighbours_and_both_start_as_nothing() -> None:
    values = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_heads": 2, "depth": 5, "num_classes": 5}
    plain = DiTMoETransformer2DModel(**values)
    model = DiTMoETransformer2DModel(**values, long_skips=True, local_conv=True)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    more = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    own = {f"blocks.{i}.local_conv" for i in range(5)} | {f"blocks.{i}.skip" for i in (3, 4)}
    assert {name.rsplit(".", 1)[0] for name in more} == own
    x, (_, t, y) = torch.randn(2, 1, 8, 8), inputs(2)
    assert torch.equal(model(x, t, y).sample, plain(x, t, y).sample)
    began: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: began.append((given[0], given[4])))
    model(x, t, y)
    assert [early is not None for _, early in began] == [False, False, False, True, True]
    assert began[3][1] is began[1][0]
    assert began[4][1] is began[0][0]
    conv = model.blocks[0].local_conv
    torch.nn.init.normal_(conv.weight)
    tokens = torch.randn(1, 16, 32, requires_grad=True)
    (seen,) = torch.autograd.grad(conv(tokens)[0, 5, 7], tokens)
    assert seen[0, :, 7].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert seen[0, :, :7].abs().max() == 0


def test_what_starts_as_nothing_does_so_for_images_of_every_size() -> None:
    values = {"sample_size": 8, "in_channels": 2, "num_classes": 5, "hidden_size": 32, "depth": 3, "num_heads": 2}
    values["other_sizes"] = (4, 16)
    plain = DiTMoETransformer2DModel(**values)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model = DiTMoETransformer2DModel(**values, long_skips=True, local_conv=True, refine_width=8)
    weights, own = plain.state_dict(), model.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):  # which says more to the convolutions
        own[name].view(4, 2 + 8, -1)[:, :2] = weights.pop(name).view(4, 2, -1)
    model.load_state_dict(weights, strict=False)
    x, t, y = inputs()
    for size in (4, 8, 16):
        z = torch.nn.functional.interpolate(x, size=(size, size))
        torch.testing.assert_close(model(z, t, y).sample, plain(z, t, y).sample)


def test_refinement_starts_as_nothing_and_sees_across_the_seams_of_patches() -> None:
    values = {"sample_size": 8, "in_channels": 2, "num_classes": 5, "hidden_size": 32, "depth": 1, "num_heads": 2}
    model = DiTMoETransformer2DModel(**values, refine_width=8)
    x, t, y = inputs(2)
    assert DiTMoETransformer2DModel(**values).refiner is None
    assert model(x, t, y).sample.abs().max() == 0
    with torch.no_grad():
        for p in model.refiner.parameters():
            p.normal_()
    x.requires_grad_()
    out = model(x, t, y).sample
    assert out.shape == x.shape
    (seen,) = torch.autograd.grad(out[0, 0, 3, 3], x)  # the tokens say nothing yet: what is seen is the convolutions'
    assert seen[1].abs().max() == 0
    touched = seen[0].abs().sum(0).nonzero()
    assert (touched.amin(0).tolist(), touched.amax(0).tolist()) == (
        [0, 0],
        [6, 6],
    )  # three pixels around: other patches


@pytest.mark.parametrize(("channels", "grad"), [(1, False), (3, True), (8, False)])
def test_refinement_is_three_convolutions_and_what_they_come_to(channels: int, grad: bool) -> None:
    torch.manual_seed(0)
    refiner = layers.Refiner(1, channels, 16).double()  # in float64 by torch's convolutions
    drawn, x_t = torch.randn(2, channels + 8, 9, 9).double(), torch.randn(2, 1, 9, 9).double()
    conv1, conv2, conv3 = refiner.conv1, refiner.conv2, refiner.conv3
    with torch.set_grad_enabled(grad):
        hidden = torch.nn.functional.silu(conv1(torch.cat([drawn, x_t], dim=1)))
        expected = drawn[:, :channels] + conv3(torch.nn.functional.silu(conv2(hidden)))
        torch.testing.assert_close(refiner(drawn, x_t), expected)
        wanted = torch.autograd.grad(expected.square().sum(), [*refiner.parameters()]) if grad else None
        refiner.float()
        found = refiner(drawn.float(), x_t.float())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    if wanted is not None:
        gradients = torch.autograd.grad(found.square().sum(), [*refiner.parameters()])
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


def test_refinement_changes_nothing_that_is_read_again() -> None:
    refiner = layers.Refiner(1, 1, 16)
    drawn, x_t = torch.randn(2, 9, 8, 8), torch.randn(2, 1, 8, 8)
    before, seen = (drawn.clone(), x_t.clone()), list[torch.Tensor]()
    with torch.no_grad():
        refiner(drawn, x_t)
        hook = refiner.conv1.register_forward_hook(lambda module, given, out: seen.append(out))
        refiner(drawn, x_t)
        hook.remove()
        torch.testing.assert_close(seen[0], refiner.conv1(torch.cat([drawn, x_t], dim=1)), rtol=1e-4, atol=1e-5)
        assert refiner(drawn[:0], x_t[:0]).shape == (0, 1, 8, 8)
    assert torch.equal(drawn, before[0])
    assert torch.equal(x_t, before[1])


def test_the_norm_of_queries_and_keys_is_the_same_with_and_without_gradients() -> None:
    norm = layers.RMSNorm(6, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 4, 6)[:, :, 1]
    before = x.clone()
    with torch.no_grad():
        found = norm(x)
    torch.testing.assert_close(found, norm(x).detach())
    torch.testing.assert_close(
        found, torch.nn.functional.rms_norm(x.double(), (6,), norm.weight.double(), 1e-6).float()
    )
    assert torch.equal(x, before)
