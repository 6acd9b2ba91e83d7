"""Habits from diffusers: what of a pipeline there works here, with the right value, or is refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ditmoe import pipeline
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config, DataConfig, ModelConfig, MoEConfig, ObjectiveConfig, SampleConfig
from ditmoe.data.open import open_data
from ditmoe.generate.request import requested
from ditmoe.model import build
from ditmoe.pipeline import DiTMoEPipeline
from ditmoe.pipeline.edit import pixels_of
from samplers import DDPMScheduler, make_scheduler
from samplers.catalog import name_of
from tests.ditmoe.pipeline.test_pipeline import make


def drawn(pipe: DiTMoEPipeline, labels: Any = (1, 2), **call: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe([*labels], output_type="pt", **call).images
    return images


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def pair(scheduler: Any) -> tuple[DiTMoEPipeline, diffusers.DiTPipeline]:
    """Our pipeline and DiTPipeline around one network, VAE and scheduler of diffusers."""
    torch.manual_seed(0)
    model = ModelConfig(sample_size=4, in_channels=4, patch_size=2, hidden_size=32, depth=2, num_heads=2)
    moe = MoEConfig(num_experts=4, expert_width=16, shared_width=16)
    net = build(Config(model=model, moe=moe, objective=ObjectiveConfig(prediction_type="epsilon")), 1000)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    names = {"0": "tench, Tinca tinca", "1": "goldfish", "134": "crane", "517": "crane"}
    ours = DiTMoEPipeline(net, scheduler, vae, names)
    net.register_to_config(out_channels=4)  # which DiTPipeline reads
    theirs = diffusers.DiTPipeline(net, vae, scheduler, {int(k): v for k, v in names.items()})
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler(clip_sample=False),
    "pndm": diffusers.PNDMScheduler(skip_prk_steps=True),
    "dpm": diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm-single": diffusers.DPMSolverSinglestepScheduler(),
    "deis": diffusers.DEISMultistepScheduler(),
    "unipc": diffusers.UniPCMultistepScheduler(solver_order=3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_list_of_generators_draws_what_ditpipeline_draws(scheduler: Any) -> None:
    ours, theirs = pair(scheduler)
    call: dict[str, Any] = {"class_labels": [7, 1, 999], "guidance_scale": 4.0, "num_inference_steps": 8}
    ours.set_progress_bar_config(disable=True)
    a = ours(**call, generator=seeds(3, 4, 5), output_type="np", return_dict=False)
    b = theirs(**call, generator=seeds(3, 4, 5), output_type="np", return_dict=False)
    assert isinstance(a, tuple)
    assert len(a) == len(b) == 1
    assert a[0].shape == b[0].shape == (3, 4, 4, 3)
    assert np.isfinite(a[0]).all()
    np.testing.assert_allclose(a[0], b[0], atol=2e-5)
    pictures = [ours(**call, generator=seeds(3, 4, 5)).images, theirs(**call, generator=seeds(3, 4, 5)).images]
    levels = [np.stack([np.asarray(p).astype(int) for p in some]) for some in pictures]
    assert abs(levels[0] - levels[1]).max() <= 1  # numpy_to_pil rounds half to even


def test_a_generator_is_a_seed_and_moves_on() -> None:
    pipe = make()
    g = torch.Generator().manual_seed(7)
    first, second = drawn(pipe, generator=g), drawn(pipe, generator=g)
    assert torch.equal(first, drawn(pipe, seed=7))
    assert not torch.equal(first, second)
    g.manual_seed(7)
    assert torch.equal(drawn(pipe, generator=g), first)
    assert torch.equal(drawn(pipe, generator=g), second)
    torch.testing.assert_close(drawn(pipe, (1,), generator=seeds(7)[0]), first[:1])  # whatever it is drawn with
    listed = drawn(pipe, generator=seeds(5, 6))
    torch.testing.assert_close(drawn(pipe, (2, 1), generator=seeds(6, 5)).flip(0), listed)
    _, theirs = pair(diffusers.DDIMScheduler())
    g = torch.Generator().manual_seed(7)
    a, b, c = (theirs([1], generator=one, num_inference_steps=2, output_type="np").images for one in (g, g, *seeds(7)))
    assert np.array_equal(a, c)  # the same habits
    assert not np.array_equal(a, b)


def test_latents_are_the_initial_noise() -> None:
    pipe = make()
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in seeds(5, 6)])
    assert torch.equal(drawn(pipe, latents=noise), drawn(pipe, generator=seeds(5, 6)))
    assert torch.equal(drawn(pipe, latents=noise.double()), drawn(pipe, latents=noise, seed=3))


def test_output_types() -> None:
    pipe, _ = pair(SCHEDULERS["ddim"])
    made = {
        kind: pipe([1, 2], num_inference_steps=2, output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    }
    assert np.array_equal(made["np"], (made["pt"] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    assert made["np"].dtype == np.float32
    assert torch.equal(pipe.decode(made["latent"]), made["pt"])
    assert [p.size for p in made["pil"]] == [(4, 4)] * 2
    assert np.abs(np.asarray(made["pil"][0]) / 255 - made["np"][0]).max() <= 0.51 / 255
    assert make()([1], output_type="np").images.shape == (1, 8, 8, 1)


def test_class_names_stand_beside_numbers() -> None:
    pipe, theirs = pair(SCHEDULERS["ddim"])
    assert pipe.labels == {**theirs.labels, "tench, Tinca tinca": 0}
    assert (
        pipe.get_label_ids(["goldfish", "Tinca tinca"]) == theirs.get_label_ids(["goldfish", "Tinca tinca"]) == [1, 0]
    )
    assert pipe.get_label_ids("goldfish") == [1]
    for name, sentence in (("golfish", "did you mean 'goldfish'"), ("crane", "the name of labels 134, 517")):
        with pytest.raises(ValueError, match=sentence):
            pipe([name])
    pipe = make()
    assert torch.equal(drawn(pipe, ("class 3", 1)), drawn(pipe, (3, 1)))
    for labels in ((3,), torch.tensor([3]), np.array([3]), np.int64(3), 3, "class 3", [np.int32(3)]):
        assert torch.equal(pipe(labels, output_type="pt").images, drawn(pipe, (3,)))
    twice = pipe(["class 3", 1], num_images_per_label=2, output_type="pt").images
    assert torch.equal(twice, drawn(pipe, (3, 3, 1, 1)))


def test_a_callback_after_each_step_sees_and_changes_the_latents() -> None:
    pipe = make()
    seen: list[tuple[int, float, torch.Tensor]] = []

    def note(caller: Any, step: int, t: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert caller is pipe
        seen.append((step, float(t), given["latents"].clone()))
        return given

    x = drawn(pipe, callback_on_step_end=note)
    assert torch.equal(x, drawn(pipe))
    assert [s for s, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pipe.scheduler_for().timesteps.tolist()
    assert torch.equal(seen[-1][2], x)
    rest = [seen[2][2]] * 4  # from the third step on, as at its end
    later = drawn(pipe, seed=9, callback_on_step_end=lambda p, k, t, given: {"latents": rest[k]} if k == 2 else None)
    assert torch.equal(later, x)


def test_a_scheduler_that_is_set_is_drawn_with_and_saved(tmp_path: Path) -> None:
    pipe = make("epsilon", sampler="unipc")
    before = drawn(pipe)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    assert pipe.config.sampler is None
    ddim = drawn(pipe)
    assert not torch.equal(ddim, before)
    torch.testing.assert_close(drawn(pipe, sampler="ddim"), ddim, atol=1e-4, rtol=1e-4)  # ours is the same method
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(drawn(pipe), ddim, atol=5e-3, rtol=1e-3)  # which DDIM is, in other words
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    karras = drawn(pipe)
    assert (karras - ddim).abs().max() > 0.01
    pipeline.save(pipe, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["sampler"] is None
    loaded = pipeline.load(tmp_path)
    assert torch.equal(drawn(loaded), karras)
    assert loaded.network_calls() == 4
    given = DiTMoEPipeline.from_pretrained(tmp_path / "model", scheduler=make_scheduler("ddim", pipe.scheduler.config))
    assert given.config.sampler == "ddim"
    loaded.scheduler = make_scheduler("unipc", loaded.scheduler.config)
    assert loaded.config.sampler == "unipc"
    assert torch.equal(drawn(loaded), before)


@pytest.mark.parametrize(
    ("stock", "told", "sampler", "sentence"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "unipc", "'unipc' has no use_karras_sigmas.* as True"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "ddim", "'ddim' has no use_beta_sigmas"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpm++2m", "has no algorithm_type"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "dpm++2m", "'dpm\\+\\+2m' has no use_lu_lambdas"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "ddim", r"name one that has it \(dpm\+\+2m, unipc\)"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift": 3.0},
            "ddim",
            "'ddim' has no shift, .* as 3.0; leave the",
        ),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}, "ddim", "has no flow_shift"),
        ("DDIMScheduler", {"clip_sample": True}, "unipc", "'unipc' has no clip_sample; .* where no sampler"),
    ],
)
def test_what_a_scheduler_was_told_is_not_lost_by_a_sampler_that_is_named(
    stock: str, told: dict[str, Any], sampler: str, sentence: str, tmp_path: Path
) -> None:
    pipe = make("flow_prediction" if "Flow" in stock or "flow_shift" in told else "epsilon", sampler="ddim")
    drawn(pipe, sampler=sampler)
    pipe.scheduler = getattr(diffusers, stock).from_config(pipe.scheduler.config)
    drawn(pipe, sampler=sampler)
    pipe.scheduler = getattr(diffusers, stock).from_config(pipe.scheduler.config, **told)
    with pytest.raises(ValueError, match=sentence):
        drawn(pipe, sampler=sampler)
    pipeline.save(pipe, tmp_path / "model")
    with pytest.raises(ValueError, match=sentence):
        requested(SampleArgs(tmp_path, sampler=sampler, num=2))


def test_what_a_scheduler_was_told_goes_on_to_a_sampler_that_has_it() -> None:
    pipe = make("flow_prediction", sampler="flow-euler")
    wanted = drawn(pipe, sampler="flow-euler", sampler_options={"shift": 3.0})
    pipe.scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0)
    assert torch.equal(drawn(pipe, sampler="flow-euler"), wanted)
    pipe = make("epsilon", sampler="ddim")
    told = {"solver_order": 3, "timestep_spacing": "leading"}
    wanted = drawn(pipe, sampler="unipc", sampler_options=told)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **told)
    assert torch.equal(drawn(pipe, sampler="unipc"), wanted)


def test_a_model_of_the_hub_is_loaded_as_a_folder_is_and_its_pickles_are_not(tmp_path: Path) -> None:
    """From the cache, where a download of me/gift puts it."""
    kept = tmp_path / "models--me--gift"
    pipeline.save(pipe := make(), snapshot := kept / "snapshots" / "a1")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a1")
    given: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    for kind in (DiTMoEPipeline, diffusers.DiffusionPipeline):
        assert torch.equal(drawn(kind.from_pretrained("me/gift", **given)), drawn(pipe))
    weights = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(pipe.transformer.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    for place, options in (("me/gift", given), (snapshot, {})):
        with pytest.raises(OSError, match=r"safetensors"):
            DiTMoEPipeline.from_pretrained(place, **options)


def test_a_sampler_is_no_argument_of_from_pretrained(tmp_path: Path) -> None:
    pipeline.save(make(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"sampler 'unipc' is of a call: pipe\(..., sampler='unipc'\)"):
        DiTMoEPipeline.from_pretrained(tmp_path / "model", sampler="unipc")


def test_the_scheduler_of_a_new_pipeline_is_drawn_with() -> None:
    pipe = make("epsilon")
    new = DiTMoEPipeline(pipe.transformer, DDPMScheduler(), num_inference_steps=4)
    assert torch.equal(drawn(new), drawn(pipe, sampler="ddpm"))
    stochastic = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    sde = DiTMoEPipeline(pipe.transformer, stochastic, sampler="ddim", num_inference_steps=4)
    assert torch.equal(drawn(sde), drawn(sde))
    assert not torch.equal(drawn(sde), drawn(sde, seed=1))
    torch.testing.assert_close(drawn(sde, (1, 2))[:1], drawn(sde, (1,)), rtol=1e-4, atol=1e-4)  # MKL rounds by shape
    assert [name_of(make_scheduler(name, {})) for name in ("ts-ddpm", "pndm")] == ["ts-ddpm", "pndm"]


STOCK = (
    diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler, diffusers.HeunDiscreteScheduler, diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler, diffusers.LCMScheduler, diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["flow_prediction", "v_prediction", "sample"])
@pytest.mark.parametrize("stock", STOCK)
def test_every_stock_scheduler_draws_from_every_model(kind: str, stock: Any) -> None:
    pipe = make(kind, sampler="flow-euler" if kind == "flow_prediction" else "ddim")
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    x = drawn(pipe, num_inference_steps=40)
    assert x.isfinite().all()
    if "Ancestral" not in stock.__name__ and stock not in (diffusers.DDPMScheduler, diffusers.LCMScheduler):
        exact = drawn(pipe, sampler="ddim", num_inference_steps=200)  # the path that all of them follow
        ours = drawn(pipe, sampler="ddim", num_inference_steps=40)  # a network of "sample" is stiff at the end
        off = [(some - exact).abs().mean() for some in (x, ours)]
        assert off[0] < max(0.1 * exact.std(), 3 * off[1])


def test_schedulers_that_do_not_fit_are_refused() -> None:
    pipe = make()
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler is not for such networks; use one such as DDIM"):
        drawn(pipe)
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"set pipe.scheduler = EulerDiscreteScheduler.from_config\(.*, order="):
        drawn(pipe, sampler_options={"order": 2})
    for inverse in (diffusers.DDIMInverseScheduler, diffusers.DPMSolverMultistepInverseScheduler):
        pipe.scheduler = inverse.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=r"is not for such networks|goes from images to noise"):
            drawn(pipe, num_inference_steps=4)
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="CogVideoXDPMScheduler is not for such networks"):
        drawn(pipe)
    for nothing in (None, "ddim"):
        with pytest.raises(ValueError, match="scheduler is .*; give one of diffusers' or of samplers.make_scheduler"):
            pipe.scheduler = nothing


def test_a_scheduler_that_is_given_is_drawn_with_however_the_pipeline_is_made(tmp_path: Path) -> None:
    pipe = make(sampler="ddim")
    pipeline.save(pipe, tmp_path / "model")
    ddpm = make_scheduler("ddpm", pipe.scheduler.config)
    wanted = drawn(pipe, sampler="ddpm")
    for made in (
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", scheduler=ddpm),
        DiTMoEPipeline.from_pretrained(tmp_path / "model", scheduler=ddpm),
        DiTMoEPipeline.from_pipe(pipe, scheduler=ddpm),
    ):
        assert made.config.sampler == "ddpm"
        assert torch.equal(drawn(made), wanted)


@pytest.mark.parametrize("stock", [diffusers.LMSDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler])
def test_schedulers_that_remember_steps_cannot_start_from_an_image(stock: Any) -> None:
    pipe = make("flow_prediction", sampler="flow-euler")
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    for labels in ([1], [1, 2]):
        with pytest.raises(ValueError, match="cannot start at a noise level"):
            pipe.image_to_image(torch.zeros(1, 1, 8, 8), labels, strength=0.5)


@pytest.mark.parametrize("stock", [diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_of_another_time_is_refused(stock: Any) -> None:
    pipe = make()
    pipe.scheduler = stock.from_config(pipe.scheduler.config, num_train_timesteps=500)
    for sampler in (None, "ddim"):
        with pytest.raises(ValueError, match="scheduler has num_train_timesteps 500; the time of this network has"):
            pipe([1], sampler=sampler)


def test_a_network_of_unknown_settings_is_not_loaded_without_them(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_window": 7}))
    for load in (DiTMoEPipeline.from_pretrained, pipeline.load):
        with pytest.raises(ValueError, match=r"has attention_window 7, which .* it may be of a newer version"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("image", "mask", "sentence"),
    [
        (Image.new("I;16", (8, 8)), None, "image is of mode I;16, which has more than 8 bits"),
        ([Image.new("L", (8, 8)), Image.new("L", (4, 4))], None, "images are of several sizes"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), None, "image is a tensor of torch.uint8"),
        (np.zeros((8, 8, 1), complex), None, "image is an array of complex128"),
        (torch.zeros(1, 1, 8, 8), np.eye(8, dtype=np.uint8), "mask_image is uint8 with no value above 1"),
        (torch.zeros(1, 1, 8, 8), np.full((8, 8), np.nan), "mask_image has values that are no numbers"),
        (torch.zeros(1, 1, 8, 8), np.eye(8) * 1j, "mask_image is complex128"),
    ],
)
def test_images_and_masks_that_would_be_misread_are_refused(image: Any, mask: Any, sentence: str) -> None:
    pipe = make()
    with pytest.raises(ValueError, match=sentence):
        pipe.image_to_image(image, [1, 2]) if mask is None else pipe.inpaint(image, mask, [1, 2])


def test_diffusers_opens_a_folder_without_being_told_the_class(tmp_path: Path) -> None:
    pipe = make()
    pipeline.save(pipe, tmp_path / "model")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(again) is DiTMoEPipeline
    assert torch.equal(drawn(again), drawn(pipe))
    assert torch.equal(drawn(DiTMoEPipeline.from_pipe(again)), drawn(pipe))


def test_dtype_variant_and_device_map(tmp_path: Path) -> None:
    pipe = make()
    full = drawn(pipe)
    pipe.save_pretrained(tmp_path, variant="bf16")
    assert [p.name for p in tmp_path.glob("transformer/*.safetensors")] == ["diffusion_pytorch_model.bf16.safetensors"]
    assert torch.equal(drawn(DiTMoEPipeline.from_pretrained(tmp_path, variant="bf16", device_map="cpu")), full)
    half = DiTMoEPipeline.from_pretrained(tmp_path, variant="bf16", torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert (drawn(half) - full).abs().mean() < 0.05 * full.std()


def test_layerwise_casting_stores_the_experts_too() -> None:
    pipe = make()
    full = drawn(pipe)
    size = sum(p.nbytes for p in pipe.transformer.parameters())
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    experts = pipe.transformer.blocks[1].moe.experts
    assert experts.w_in.dtype == experts.w_out.dtype == torch.float8_e4m3fn
    assert pipe.transformer.blocks[1].moe.router.weight.dtype == torch.float32
    assert sum(p.nbytes for p in pipe.transformer.parameters()) < 0.35 * size
    assert 0 < (drawn(pipe) - full).abs().mean() < 0.3 * full.std()
    assert experts.w_in.dtype == torch.float8_e4m3fn


class Elsewhere(accelerate.hooks.ModelHook):
    """What accelerate does of weights that lie elsewhere: on the device of the execution during the forward alone."""

    execution_device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: p.data for name, p in module.named_parameters(recurse=False)}
        self.post_forward(module, None)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, weight in self.weights.items():
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for name, weight in self.weights.items():
            module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
        return output


@pytest.mark.parametrize("attention_experts", [0, 4])
def test_weights_may_lie_elsewhere_between_the_calls_of_a_module(attention_experts: int) -> None:
    model = ModelConfig(sample_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2)
    moe = MoEConfig(num_experts=4, expert_width=16, shared_width=16, attention_experts=attention_experts)
    config = Config(model=model, moe=moe, sample=SampleConfig(sampler="ddim", steps=3))
    torch.manual_seed(0)
    pipe = pipeline.assemble(build(config, 4), config, {})
    for p in pipe.transformer.parameters():
        nn.init.normal_(p, std=0.1)
    whole = drawn(pipe)
    for module in pipe.transformer.modules():
        accelerate.hooks.add_hook_to_module(module, Elsewhere(module))
    assert pipe.device.type == "meta"
    assert torch.equal(drawn(pipe), whole)


def test_model_offload_computes_where_it_should_and_frees() -> None:
    pipe = make()
    whole = drawn(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(drawn(pipe), whole)
    freed: list[int] = []
    pipe.maybe_free_model_hooks = lambda: freed.append(1)
    drawn(pipe)
    assert freed == [1]
    group = make()
    group.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(drawn(group), whole)


def test_blocks_that_repeat_are_named_and_the_bar_is_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make()
    assert {type(b).__name__ for b in pipe.transformer.blocks} == {*pipe.transformer._repeated_blocks}
    pipe.set_progress_bar_config(desc="drawing", disable=False)
    pipe([1])
    assert "drawing: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"class_labels": [1.5]}, r"label 1\.5 is no whole number; give one in 0\.\.3, or a class name"),
        ({"class_labels": [True]}, "label True is no whole number"),
        ({"class_labels": []}, "class_labels is empty; give the label of every image"),
        ({"class_labels": {}}, "class_labels is empty"),
        ({"class_labels": 4}, "label 4 is out of range"),
        ({"class_labels": object()}, "class_labels is <object .*; give labels in 0..3, or class names"),
        ({"class_labels": ["clas 3"]}, r"there is no class 'clas 3'; did you mean 'class 3'\?"),
        ({"class_labels": [0], "num_images": 5}, "num_images is 5, but class_labels asks for 1; leave it out"),
        ({"class_labels": [0], "num_images_per_label": 0}, "num_images_per_label is 0; it must be a whole number"),
        ({"class_labels": [0], "seed": 1.5}, r"seed is 1\.5, but a seed is an integer"),
        ({"class_labels": [0], "seed": "a"}, "seed is 'a', but a seed is an integer"),
        ({"class_labels": [0], "seed": 1, "generator": torch.Generator()}, "seed is 1 beside a generator"),
        ({"class_labels": [0], "generator": 3}, r"generator is 3; give a torch\.Generator"),
        ({"class_labels": [0], "generator": seeds(1, 2)}, "generator is a list of 2 items for 1 image"),
        ({"class_labels": [0], "generator": seeds(1), "indices": [4]}, "beside indices"),
        ({"class_labels": [0], "indices": [1.5]}, r"indices have 1\.5; they must be whole numbers"),
        ({"class_labels": [0], "latents": torch.zeros(1, 8, 8)}, r"latents are \(1, 8, 8\); they must be standard"),
        ({"class_labels": [0], "latents": [0]}, "latents are list"),
        ({"class_labels": [0], "latents": torch.full((1, 1, 8, 8), torch.nan)}, "latents are not finite"),
        ({"class_labels": [0], "guidance_scale": "4"}, "guidance_scale is '4'; it must be a number"),
        ({"class_labels": [0], "eta": None}, "eta is None; it must be a number"),
        ({"class_labels": [0], "guide_scale": [2]}, r"guide_scale is \[2\]; it must be a number"),
        ({"class_labels": [0], "num_inference_steps": 2.5}, r"num_inference_steps is 2\.5; it must be a whole number"),
        ({"class_labels": [0], "num_inference_steps": 0}, "num_inference_steps is 0; it must be a whole number, 1 or"),
        ({"class_labels": [0], "num_inference_steps": True}, "num_inference_steps is True; it must be a whole number"),
        ({"class_labels": [0], "num_inference_steps": 1001}, "num_inference_steps is 1001, but it must be an integer"),
        ({"class_labels": [0], "num_images_per_label": None}, "num_images_per_label is None; it must be a whole"),
        ({"class_labels": [0], "epsilon_scale": None}, "epsilon_scale is None; it must be a number"),
        (
            {"class_labels": [0], "guidance_scale": 1e30},
            r"guidance_scale is 1e\+30, .* 1000000 at most",
        ),
        ({"class_labels": [0], "guidance_scale": torch.nan}, "guidance_scale is nan, but it must be 0 or more"),
        ({"class_labels": [0], "guide": 3}, "guide is 3; it must be a network, such as another pipeline's transformer"),
        ({"class_labels": [0], "guide": nn.Linear(2, 2)}, "guide is Linear; it must be a network, such as"),
        ({"class_labels": [0], "edit": 3}, "edit is 3; leave it out: image_to_image and inpaint give it"),
        ({"class_labels": [0], "policy": 3}, "policy: it is 3"),
        ({"class_labels": [0], "tau": "x"}, "tau"),
        ({"class_labels": [0], "sampler": 3}, "sampler is 3; it must be a name of samplers.SAMPLERS"),
        ({"class_labels": [0], "sampler_options": 3}, "sampler_options is 3; it must be a dictionary"),
        ({"class_labels": [0], "num_images_per_label": 10**9}, "is 1000000000; it must be a whole number, from 1 to"),
        ({"class_labels": [0], "output_type": None}, "output_type is None; it must be pil or pt, np or latent"),
        ({"class_labels": [0], "callback": 3}, "callback is 3; it must be a function"),
        ({"class_labels": [0], "callback_on_step_end": 3}, "callback_on_step_end is 3; it must be a function"),
        ({"class_labels": [0], "callback_on_step_end_tensor_inputs": ["x"]}, "must be a list of latents"),
        ({"class_labels": [0], "callback_on_step_end_tensor_inputs": 3}, "must be a list of latents"),
        ({"class_labels": [0], "callback_on_step_end": lambda *_: {"latents": None}}, "latents that are NoneType"),
        ({"class_labels": [0], "callback_on_step_end": lambda *_: torch.ones(2)}, "must return a dictionary"),
        ({"class_labels": [0], "guidance_interval": 3}, "guidance_interval is 3; it must be"),
        ({"class_labels": [0], "guidance_interval": (1, 2, 3)}, "it must be \\(lowest, highest\\) timestep"),
        ({"class_labels": [0], "guidance_channels": "x"}, "guidance_channels is 'x'; it must be a whole number"),
        ({"class_labels": [0], "indices": 3}, "indices is 3; it must be a list"),
        ({"class_labels": [0], "epsilon_scale": "x"}, "epsilon_scale is 'x'; it must be a number"),
        (
            {"class_labels": [0], "callback_on_step_end": lambda *a: {"latents": a[3]["latents"] / 0}},
            "callback_on_step_end returned latents that are not finite after step 0",
        ),
        ({"class_labels": [0], "callback_on_step_end": lambda *_: 3}, "must return a dictionary with latents"),
        ({"class_labels": [0], "callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, r"latents of \(1,\)"),
    ],
)
def test_what_a_call_cannot_have_is_refused_at_the_door(call: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()(**call)


def test_arguments_of_other_pipelines_are_told_what_they_are_here() -> None:
    for name, sentence in (
        ("num_images_per_prompt", "has no num_images_per_prompt; here it is num_images_per_label"),
        ("num_inference_step", "has no num_inference_step; did you mean 'num_inference_steps'"),
    ):
        with pytest.raises(TypeError, match=sentence):
            make()([0], **{name: 2})


def test_numbers_of_numpy_are_numbers() -> None:
    pipe = make()
    given = {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(2.0), "num_images_per_label": np.int32(1)}
    assert torch.equal(drawn(pipe, **given), drawn(pipe, num_inference_steps=2, guidance_scale=2.0))


def test_what_does_nothing_is_refused() -> None:
    pipe = make()
    for refused in (pipe.enable_attention_slicing, pipe.enable_xformers_memory_efficient_attention):
        with pytest.raises(ValueError, match="do nothing here: .*; leave them out"):
            refused()
    with pytest.raises(ValueError, match="num_images is 0"):
        make(num_classes=0)(num_images=0)
    with pytest.raises(ValueError, match="this model has no labels; ask with num_images"):
        make(num_classes=0)(num_images_per_label=2)


# Images from images


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "ts-ddim", "dpm++2m", "unipc", "flow-euler", "flow-sde", None])
def test_image_to_image_starts_at_a_noise_level(sampler: str | None) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    if sampler is None:
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    call: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 20, "output_type": "pt"}
    x = torch.from_numpy(np.asarray(picture())).float()[None, None] / 127.5 - 1
    apart = [(pipe.image_to_image(picture(), 1, strength=s, **call).images - x).abs().mean() for s in (0.05, 0.3, 0.8)]
    assert apart[0] < 0.2
    assert apart[0] < apart[1] < apart[2]
    everything = pipe.image_to_image(picture(), 1, strength=1.0, **call).images
    assert torch.equal(everything, pipe([1], **call).images)  # from noise alone
    steps: list[int] = []
    pipe.image_to_image(picture(), 1, strength=0.3, **call, callback_on_step_end=lambda p, k, t, _: steps.append(k))
    assert len(steps) == (6 if sampler is not None else 11)  # Heun asks twice a step but the last


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "pndm", "ts-ddim", "unipc", "flow-euler", "flow-heun", None])
def test_inpainting_keeps_the_known_region_to_the_bit(sampler: str | None) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    if sampler is None:
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 3:8] = 255
    call: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 6, "seed": 3}
    made = pipe.inpaint(picture(), Image.fromarray(mask), ["class 1", 2], **call).images
    for image in made:
        assert np.array_equal(np.asarray(image)[mask == 0], np.asarray(picture())[mask == 0])
        assert not np.array_equal(np.asarray(image)[mask > 0], np.asarray(picture())[mask > 0])
    assert np.array_equal(*(np.asarray(pipe.inpaint(picture(), m, 1, **call).images[0]) for m in (mask, mask > 0)))
    partly = pipe.inpaint(picture(), mask, 1, strength=0.5, output_type="np", **call | {"sampler": "ddim"}).images[0]
    assert np.allclose(partly[mask == 0, 0], np.asarray(picture())[mask == 0] / 255, atol=1e-6)


def test_the_same_by_a_vae() -> None:
    pipe, _ = pair(SCHEDULERS["ddim"])
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 4, 4) * 2 - 1
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    x = pipe.inpaint(image, mask, 1, num_inference_steps=3, output_type="pt").images
    assert torch.equal(x[..., 2:, :], image[..., 2:, :])
    near = pipe.image_to_image(image, 1, strength=0.01, num_inference_steps=100, output_type="latent").images
    coded = pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert (near - coded).abs().max() < 0.2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"strength": 0}, "strength is 0; it must be above 0 and at most 1"),
        ({"strength": 0.1}, r"strength 0\.1 of 4 steps is none; give 0\.25 or more"),
        ({"strength": 0.333, "num_inference_steps": 3}, r"of 3 steps is none; give 0\.334 or more"),
        ({"sampler": "pndm", "num_inference_steps": 8}, "PNDMScheduler cannot start at a noise level; use another"),
        ({"sampler": "flow-heun"}, "FlowHeunScheduler cannot start"),
        ({"image": Image.new("L", (9, 8))}, r"images are .*\(1, 1, 8, 9\); they must be 1 of 1 x 8 x 8"),
        ({"image": "a.png"}, "image is str; give PIL images"),
        ({"image": torch.full((1, 1, 8, 8), 3.0)}, r"values outside of \[-1, 1\]"),
    ],
)
def test_images_that_cannot_be_drawn_from(call: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make().image_to_image(**{"image": picture(), "class_labels": 1, **call})


def test_an_image_is_decoded_as_training_does(tmp_path: Path) -> None:
    turned = Image.new("L", (8, 8))
    turned.paste(255, (0, 0, 8, 3))
    turned.getexif()[0x0112] = 3  # upside down
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for i, image in enumerate((turned, clear)):
        image.save(tmp_path / f"{i}.png", exif=image.getexif())
    trained = open_data(DataConfig(name="folder", path=tmp_path, fit="crop"), size=8, channels=1).tensors([0, 1])
    images = [Image.open(tmp_path / f"{i}.png") for i in range(2)]
    assert torch.equal(pixels_of(images, 2, (1, 8, 8)), trained)
    assert trained[0, 0, 0].mean() == -1
    assert trained[1].mean() == 1


def test_masks_that_cannot_be_used() -> None:
    for mask, sentence in ((None, "mask_image is None"), (np.zeros((4, 8)), "mask_image is not 1 of 8 x 8")):
        with pytest.raises(ValueError, match=sentence):
            make().inpaint(picture(), mask, 1)


@pytest.mark.parametrize("listed", [False, True])
def test_a_refused_call_leaves_generators_where_they_were(listed: bool) -> None:
    pipe, g = make(), seeds(7)[0]
    before = g.get_state()
    for wrong in ({"epsilon_scale": -1.0}, {"sampler": "nothing"}, {"eta": 0.5, "sampler": "unipc"}):
        with pytest.raises(ValueError):  # noqa: PT011 - any of them
            pipe([0], generator=[g] if listed else g, num_inference_steps=2, **wrong)
        assert torch.equal(g.get_state(), before)
