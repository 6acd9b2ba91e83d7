"""Noise: one stream per image, the same in any batch."""

import pytest
import torch

from samplers import draw_noise, image_generators, initial_noise


def test_torch_still_keeps_only_32_bits_of_a_seed():
    """The reason for image_generators: if this fails, its seeds may use all 64 bits."""
    low, high = (torch.Generator().manual_seed(s) for s in (1, 1 + 2**32))
    assert torch.equal(torch.rand(3, generator=low), torch.rand(3, generator=high))


def test_no_two_images_of_a_run_share_a_stream():
    indices = [*range(20_000), *range(2**16, 2**32, 2**20), 2**31, 2**32 - 1]
    seeds = {g.initial_seed() for g in image_generators(0, indices)}
    assert len(seeds) == len(indices)
    assert max(seeds) < 2**32


def test_runs_do_not_share_images():
    seeds = [g.initial_seed() for run in range(20) for g in image_generators(run, range(500))]
    assert len(set(seeds)) == len(seeds)


def test_an_image_has_the_same_noise_in_any_batch():
    shape = (3, 4, 4)
    whole = initial_noise(image_generators(7, range(4)), shape, "cpu")
    assert whole.shape == (4, 3, 4, 4)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 4
    for i in range(4):
        assert torch.equal(initial_noise(image_generators(7, [i]), shape, "cpu")[0], whole[i])
    backwards = initial_noise(image_generators(7, [3, 2, 1, 0]), shape, "cpu")
    assert torch.equal(backwards.flip(0), whole)
    assert not torch.equal(initial_noise(image_generators(8, range(4)), shape, "cpu"), whole)


def test_half_precision_noise_is_the_rounded_float32_noise():
    shape = (3, 4, 4)
    half = initial_noise(image_generators(0, [5]), shape, "cpu", torch.bfloat16)
    full = initial_noise(image_generators(0, [5]), shape, "cpu")
    assert torch.equal(half, full.bfloat16())


def test_noise_is_standard_normal():
    noise = initial_noise(image_generators(0, range(64)), (1, 32, 32), "cpu")
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(64)
    assert correlation.abs().max() < 6 / 32


def test_one_generator_draws_the_whole_batch_and_none_the_global_one():
    generator = torch.Generator().manual_seed(3)
    want = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw_noise((2, 3, 4, 4), generator, "cpu"), want)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(draw_noise((2, 3, 4, 4), None, "cpu"), want)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_seeds_and_indices_out_of_range_are_refused(seed, index):
    with pytest.raises(ValueError, match="integer from 0 to"):
        image_generators(seed, [index])


def test_a_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="2 generators were given for 3 images"):
        draw_noise((3, 1, 2, 2), image_generators(0, range(2)), "cpu")
