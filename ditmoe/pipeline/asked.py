"""What a call of the pipeline is asked, checked at the door: every refusal names the argument, its value and the fix.

Shapes: N images, C channels, H W size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor

from samplers import image_generators, initial_noise

from ..config.checks import near, plural
from ..data.pixels import to_pil, to_pixels

Arguments = ParamSpec("Arguments")
MOST = 100_000  # images of a call, which are all in memory
OUTPUTS = ("pil", "np", "pt", "latent")
MEANT = {  # what other pipelines call arguments of a call
    "num_images_per_prompt": "num_images_per_label", "prompt": "class_labels", "steps": "num_inference_steps",
    "cfg": "guidance_scale", "batch_size": "num_images, of a model without labels", "num": "num_images",
    "image": "pipe.image_to_image(image, ...)", "mask_image": "pipe.inpaint(image, mask_image, ...)",
    "strength": "of pipe.image_to_image and pipe.inpaint",
    "height": "the model's own size", "width": "the model's own size", "scheduler": "pipe.scheduler = ..., or sampler",
    "callback_steps": "callback_on_step_end, after every step",
}  # fmt: skip


def names_of(id2label: Mapping[int, str]) -> dict[str, list[int]]:
    """The labels that a class name means: the whole name, or as in DiTPipeline one of several with commas between."""
    found: dict[str, list[int]] = {}
    for label, name in id2label.items():
        for word in dict.fromkeys([name.strip(), *(part.strip() for part in name.split(","))]):
            found.setdefault(word, []).append(label)
    return found


def labels_of(asked: Any, classes: int, id2label: Mapping[int, str]) -> list[int]:
    """The labels that are asked for: a number or a class name, or several."""
    if not classes:
        raise ValueError("this model was trained without labels; ask with num_images instead of class_labels")
    if isinstance(asked, str | Real):
        asked = [asked]
    if isinstance(asked, Tensor | np.ndarray):
        asked = asked.reshape(-1).tolist()
    if not isinstance(asked, Iterable):
        raise ValueError(f"class_labels is {asked!r}; give labels in 0..{classes - 1}, or class names")
    labels = [_label(label, classes, id2label) for label in asked]
    if not labels:
        raise ValueError("class_labels is empty; give the label of every image, such as [0]")
    return labels


def _label(asked: Any, classes: int, id2label: Mapping[int, str]) -> int:
    if isinstance(asked, str):
        names = names_of(id2label)
        found = names.get(asked.strip(), [])
        if len(found) > 1:
            raise ValueError(f"class {asked!r} is the name of labels {', '.join(map(str, found))}; give one of these")
        if not found:
            known = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
            known = known or f"0..{classes - 1}, unnamed"
            raise ValueError(f"there is no class {asked!r}; {near(asked, names)}this model has {known}")
        return found[0]
    if isinstance(asked, Tensor) and asked.ndim == 0:
        asked = asked.item()
    if isinstance(asked, bool) or not isinstance(asked, Integral):
        raise ValueError(f"label {asked!r} is no whole number; give one in 0..{classes - 1}, or a class name")
    if not 0 <= int(asked) < classes:
        raise ValueError(f"label {asked} is out of range: this model has classes 0..{classes - 1}")
    return int(asked)


def images_of(
    class_labels: Any, num_images: Any, each: Any, network: Any, id2label: Mapping[int, str]
) -> tuple[list[int] | None, int]:
    """(labels or None for a model without, N): `each` images a label, one after the other."""
    for name, value in {"num_images": 1 if num_images is None else num_images, "num_images_per_label": each}.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= MOST:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, from 1 to {MOST} in one call")
    if not (classes := network.num_classes):
        if class_labels is not None:
            labels_of(class_labels, 0, id2label)
        if each != 1:
            raise ValueError(f"num_images_per_label is {each}, but this model has no labels; ask with num_images")
        return None, 1 if num_images is None else int(num_images)
    if class_labels is None:
        raise ValueError(f"this model needs class_labels, each in 0..{classes - 1} or a class name")
    labels = [label for label in labels_of(class_labels, classes, id2label) for _ in range(each)]
    if num_images not in (None, len(labels)):
        raise ValueError(
            f"num_images is {num_images}, but class_labels asks for {len(labels)}; leave it out, or repeat the labels "
            "with num_images_per_label"
        )
    return labels, len(labels)


def guarded(call: Callable[Arguments, Any]) -> Callable[Arguments, Any]:
    """The call, after a refusal of which every torch.Generator that was handed in is as it was before.

    A TypeError says what an argument that it does not have is called here.
    """
    names = signature(call).parameters

    @wraps(call)
    def guarded(*args: Arguments.args, **options: Arguments.kwargs) -> Any:
        for name in options.keys() - names.keys():
            meant = f"here it is {MEANT[name]}" if name in MEANT else f"{near(name, names)}see help(pipe.__call__)"
            raise TypeError(f"this pipeline's call has no {name}; {meant}")
        given: Any = options.get("generator")
        generators = [g for g in (given if isinstance(given, list | tuple) else [given]) if hasattr(g, "get_state")]
        states = [g.get_state() for g in generators]
        try:
            return call(*args, **options)
        except ValueError:
            for one, state in zip(generators, states, strict=True):
                one.set_state(state)
            raise

    return guarded


def generators_of(
    N: int, seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None,
    indices: Sequence[int] | None,
) -> list[torch.Generator]:  # fmt: skip
    """One generator an image: of (seed, index), of a generator as a seed, or those given.

    A generator that nothing was drawn from is the seed that it was given; a used one is its next number. Either is
    moved on by one number, so that the next call draws other images.
    """
    if seed is not None and generator is not None:
        raise ValueError(f"seed is {seed!r} beside a generator; leave one of them out")
    if indices is not None and (wrong := [i for i in indices if isinstance(i, bool) or not isinstance(i, Integral)]):
        raise ValueError(f"indices have {wrong[0]!r}; they must be whole numbers, 0 or more")
    if indices is not None and len(indices) != N:
        raise ValueError(f"indices are {len(indices)} numbers for {plural(N, 'image')}")
    if isinstance(generator, list | tuple):
        if len(generator) != N or not all(isinstance(one, torch.Generator) for one in generator) or indices is not None:
            beside = "" if indices is None else " beside indices"
            what = f"{plural(len(generator), 'item')} for {plural(N, 'image')}{beside}"
            raise ValueError(f"generator is a list of {what}; give a torch.Generator for each image, without indices")
        return list(generator)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator is {generator!r}; give a torch.Generator, or one for each image")
        seed = _seed_of(generator)
    seed = 0 if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed is {seed!r}, but a seed is an integer from 0 to 2^64 - 1")
    return image_generators(int(seed), range(N) if indices is None else indices)


def _seed_of(generator: torch.Generator) -> int:
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed()).get_state()
    is_fresh = torch.equal(generator.get_state(), fresh)
    drawn = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return generator.initial_seed() if is_fresh else drawn


def check_call(
    output_type: Any, callback: Any, interval: Any, channels: Any, indices: Any, sampler: Any, options: Any,
    numbers: Mapping[str, Any],
) -> None:  # fmt: skip
    """ValueError for arguments of a call that are of another kind than it takes; scales of guidance may be None."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {callback!r}; it must be a function")
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type is {output_type!r}; it must be pil or pt, np or latent")
    if not isinstance(sampler, str | None):
        raise ValueError(f"sampler is {sampler!r:.100}; it must be a name of samplers.SAMPLERS, or set pipe.scheduler")
    if not isinstance(options, Mapping | None):
        raise ValueError(f"sampler_options is {options!r:.100}; it must be a dictionary of the scheduler's fields")
    for name, value in numbers.items():
        if not (is_number(value) or (value is None and name.startswith("guid"))):
            raise ValueError(f"{name} is {value!r}; it must be a number")
    pair = isinstance(interval, tuple | list) and len(interval) == 2 and all(map(is_number, interval))
    if interval is not None and not pair:
        raise ValueError(f"guidance_interval is {interval!r}; it must be (lowest, highest) timestep")
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, Integral)):
        raise ValueError(f"guidance_channels is {channels!r}; it must be a whole number")
    if indices is not None and not isinstance(indices, Sequence):
        raise ValueError(f"indices is {indices!r}; it must be a list of whole numbers, 0 or more")


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python or numpy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def noise_of(
    latents: Any, generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """The initial noise (N, C, H, W): latents that were given, or drawn. ValueError unless they are finite, and so."""
    if latents is None:
        return initial_noise(generators, shape, device)
    wanted = (len(generators), *shape)
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or tuple(latents.shape) != wanted:
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents are {found}; they must be standard normal noise {wanted}, floating-point")
    if not bool(latents.isfinite().all()):
        raise ValueError("latents are not finite; give standard normal noise")
    return latents.to(device, torch.float32)


def output(x: Tensor, kind: str) -> Any:
    """Images x (N, C, H, W) as one of `OUTPUTS`."""
    if kind == "pil":
        return [to_pil(picture) for picture in to_pixels(x)]
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy() if kind == "np" else x


def step_end(pipe: Any, callback: Any, inputs: Sequence[str]) -> Callable[[int, Tensor, Tensor], Tensor]:
    """What a callback_on_step_end makes of the image after a step, for `samplers.sample`; itself where there is none.

    It goes on with the latents of the dictionary that the callback returns, or where it has none with those it had.
    """
    known = pipe._callback_tensor_inputs
    if not isinstance(inputs, list | tuple) or not all(isinstance(x, str) and x in known for x in inputs):
        raise ValueError(f"callback_on_step_end_tensor_inputs is {inputs!r}; it must be a list of {', '.join(known)}")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end is {callback!r}; it must be a function")

    def end(k: int, t: Tensor, x: Tensor) -> Tensor:
        answer = None if callback is None else callback(pipe, k, t, dict.fromkeys(inputs, x))
        answer = {} if answer is None else answer
        if not isinstance(answer, dict) or not answer.keys() <= {*known}:
            raise ValueError("callback_on_step_end must return a dictionary with latents, or None")
        latents = answer.get("latents", x)
        if not isinstance(latents, Tensor):
            raise ValueError(f"callback_on_step_end returned latents that are {type(latents).__name__}; give a tensor")
        if latents.shape != x.shape:
            raise ValueError(f"callback_on_step_end returned latents of {tuple(latents.shape)} for {tuple(x.shape)}")
        if latents is not x and not bool(latents.isfinite().all()):
            raise ValueError(f"callback_on_step_end returned latents that are not finite after step {k}")
        return latents.to(x.device)

    return end
