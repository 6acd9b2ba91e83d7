"""The judge of samples: does the classifier know real digits, and does the copy rule find planted copies only?"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from eval.judge import Copies, accuracy, judge, nearest_copies, pixel_distance, train_classifier
from eval.sources.open import open_source


class ArrayImages(NamedTuple):
    pixels: Any
    labels: Any


def digits(split: str) -> ArrayImages:
    images = open_source(f"digits:{split}")
    return ArrayImages(np.concatenate(list(images.batches(100))), images.labels)


@pytest.fixture(scope="module")
def train() -> ArrayImages:
    return digits("train")


@pytest.fixture(scope="module")
def held_out() -> ArrayImages:
    return digits("test")


def noisy(images: Any, grey_levels: float) -> Any:
    noise = np.random.default_rng(0).normal(0, grey_levels, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


# ---- the classifier


def test_the_classifier_knows_held_out_digits(train: ArrayImages, held_out: ArrayImages) -> None:
    before = torch.random.get_rng_state()
    classifier = train_classifier(train.pixels, train.labels, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert accuracy(classifier, held_out.pixels, held_out.labels) >= 0.98
    assert accuracy(classifier, held_out.pixels, (held_out.labels + 1) % 10) < 0.02
    noise = np.random.default_rng(0).integers(0, 256, held_out.pixels.shape, dtype=np.uint8)
    assert accuracy(classifier, noise, held_out.labels) < 0.25


def test_the_classifier_is_a_function_of_its_seed(train: ArrayImages) -> None:
    few, labels = train.pixels[:200], train.labels[:200]
    first, again, other = (train_classifier(few, labels, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


@pytest.mark.parametrize("shape", [(12, 4, 4, 1), (20, 9, 13, 3), (20, 64, 64, 3)])
def test_the_classifier_takes_any_size(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    classifier = train_classifier(images, np.arange(len(images)) % 3, num_classes=5)
    assert set(classifier.predict(images)) <= set(range(5))


def test_the_classifier_refuses_what_does_not_match(train: ArrayImages) -> None:
    with pytest.raises(ValueError, match="do not match"):
        train_classifier(train.pixels[:5], train.labels[:4])


# ---- copies


def copies(generated: Any, train: ArrayImages, held_out: ArrayImages) -> Copies:
    return nearest_copies(generated, train.pixels, held_out.pixels)


def test_exact_copies_are_all_found(train: ArrayImages, held_out: ArrayImages) -> None:
    found = copies(train.pixels[100:400], train, held_out)
    assert found.share == 1
    assert found.distance == 0
    assert (found.nearest == np.arange(100, 400)).all()


def test_held_out_images_score_one_percent(train: ArrayImages, held_out: ArrayImages) -> None:
    found = copies(held_out.pixels, train, held_out)
    assert found.share == found.real_share == 0.01
    assert found.distance == found.real_distance > 20
    assert "300 held-out real images" in found.definition
    assert "1,497 training images" in found.definition


def test_slight_noise_does_not_hide_a_copy_and_strong_noise_does(train: ArrayImages, held_out: ArrayImages) -> None:
    assert copies(noisy(train.pixels, 10), train, held_out).share > 0.99
    assert copies(noisy(train.pixels, 20), train, held_out).share > 0.9
    assert copies(noisy(train.pixels, 80), train, held_out).share < 0.02


def test_averages_and_noise_are_no_copies(train: ArrayImages, held_out: ArrayImages) -> None:
    rng = np.random.default_rng(0)
    like = [rng.choice(np.flatnonzero(train.labels == c), 8, replace=False) for c in range(10) for _ in range(20)]
    averages = np.stack([train.pixels[rows].mean(0) for rows in like]).astype(np.uint8)
    assert copies(averages, train, held_out).share < 0.02
    assert copies(rng.integers(0, 256, (100, 8, 8, 1), dtype=np.uint8), train, held_out).share == 0


def test_planted_copies_are_counted(train: ArrayImages, held_out: ArrayImages) -> None:
    half = np.concatenate([train.pixels[:100], held_out.pixels[:100]])
    assert copies(half, train, held_out).share == pytest.approx(0.5, abs=0.02)


def test_without_held_out_images_training_images_stand_in(train: ArrayImages) -> None:
    found = nearest_copies(train.pixels[:50], train.pixels)
    assert found.share == 1
    assert found.real_share == pytest.approx(0.01, abs=0.001)
    assert found.real_distance > 20  # no image was compared with itself
    assert "each against the rest" in found.definition


def test_few_or_duplicate_real_images_still_find_exact_copies(train: ArrayImages) -> None:
    few = nearest_copies(train.pixels[:3], train.pixels[:50], train.pixels[50:60])
    assert (few.share, few.real_share) == (1, 0)
    twice = np.concatenate([train.pixels[:50], train.pixels[:50]])
    assert nearest_copies(train.pixels[:3], twice).share == 1


def test_large_images_are_compared_small() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    assert nearest_copies(images[:10], images, images[20:]).share == 1


def test_copies_refuse_what_cannot_be_compared(train: ArrayImages) -> None:
    with pytest.raises(ValueError, match="different sizes"):
        nearest_copies(train.pixels[:, :4], train.pixels, train.pixels)
    with pytest.raises(ValueError, match="too few"):
        nearest_copies(train.pixels[:2], train.pixels[:5], train.pixels[5:9])


# ---- both


def test_judge_of_real_images_and_of_wrong_labels(train: ArrayImages, held_out: ArrayImages) -> None:
    names = [str(i) for i in range(10)]
    labels = np.where(held_out.labels == 3, 4, held_out.labels)
    found = judge(
        held_out.pixels, labels, train.pixels[:700], train.labels[:700], (held_out.pixels, held_out.labels), names
    )
    assert found["classes"]["real_accuracy"] >= 0.95
    assert 0.8 < found["classes"]["accuracy"] < 0.92  # every 3 was called a 4
    assert found["classes"]["worst"][0] == "4"
    assert "3" not in found["classes"]["by_class"]
    assert found["copies"]["share"] == 0.01


def test_judge_without_labels_or_held_out_images(train: ArrayImages) -> None:
    images = train.pixels[:400]
    found = judge(images[:, :, ::-1], None, images, train.labels[:400], None, [], mirrored=True)
    assert found["classes"] is None
    assert found["copies"]["share"] == 1  # mirror images of training images
    assert judge(images[:, :, ::-1], None, images, train.labels[:400], None, [])["copies"]["share"] < 0.5


# ---- pixels as they are


def test_the_pixel_distance_is_that_of_two_gaussians(train: ArrayImages, held_out: ArrayImages) -> None:
    a = np.random.default_rng(0).integers(0, 200, (64, 2, 3, 1), dtype=np.uint8)
    assert pixel_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert pixel_distance(a + np.uint8(51), a) == pytest.approx(6 * 3.2**2)
    spread = a.reshape(64, -1).astype(float) * 16 / 255
    a[:, :, :, 0] //= 2
    close = np.cov(spread, rowvar=False).trace() / 4 + (spread.mean(0) ** 2).sum() / 4  # half as wide, half as bright
    assert pixel_distance(a, (2 * a).astype(np.uint8)) == pytest.approx(close, rel=0.02)
    assert 20 < pixel_distance(held_out.pixels, train.pixels) < 40


def test_samples_and_held_out_images_are_compared_at_equal_numbers(train: ArrayImages, held_out: ArrayImages) -> None:
    known, samples = (train.pixels[:90], train.labels[:90]), train.pixels[100:409]
    found = judge(samples, None, *known, (held_out.pixels, held_out.labels), [])["pixels"]
    assert found["value"] == pixel_distance(samples, known[0])
    assert found["few_value"] == pixel_distance(samples[:300], known[0]) != found["value"]
    assert found["real_value"] == pixel_distance(held_out.pixels, known[0])
    assert (found["num_train"], found["num_real"]) == (90, 300)
    both = np.concatenate([known[0], known[0][:, :, ::-1]])
    mirrored = judge(samples, None, *known, None, [], mirrored=True)["pixels"]
    assert mirrored == {"num_train": 180, "value": pixel_distance(samples, both)}


def test_fewer_images_than_an_image_has_pixels_have_no_distance(train: ArrayImages, held_out: ArrayImages) -> None:
    known = (train.pixels[:90], train.labels[:90])
    few = (held_out.pixels[:64], held_out.labels[:64])
    assert judge(train.pixels[:65], None, *known, few, [])["pixels"].keys() == {"value", "num_train"}
    assert judge(train.pixels[:64], None, *known, few, [])["pixels"] is None


def test_floats_are_no_images(train: ArrayImages) -> None:
    floats = train.pixels[:40] / np.float32(255)
    for generated, real in ((floats, train.pixels), (train.pixels[:40], floats)):
        with pytest.raises(ValueError, match="images are float32; give uint8, values 0 to 255"):
            nearest_copies(generated, real, None)
    with pytest.raises(ValueError, match="images are float32; give uint8"):
        train_classifier(floats, train.labels[:40])
