"""A model to give away: the pipeline of a run in bfloat16, with a page that says how it came about."""

import shlex
from pathlib import Path
from typing import Any

import torch

from .. import __version__, pipeline
from ..config.convert import ExportArgs, check_replaced
from ..config.file import read_config
from ..files import read_object, replacing
from ..pipeline.guide import EXPERTS_OFF
from ..run_folder.network import load_guide
from ..run_folder.place import COMMAND, CONFIG, REPORT
from .standalone import make_standalone

README, TRAINING = "README.md", "training.json"
_TASK = "unconditional-image-generation"  # the Hub's word for images without a text


def export(args: ExportArgs) -> None:
    """Write the pipeline folder: weights in `dtype`, the run's config.json as training.json, and a README.md.

    Of a folder that was exported (not `standalone`, which holds code) the README.md stays, with what is done now. With
    `standalone` also a pipeline.py for those who have no ditmoe; with `push` all goes to the Hub, too.

    Raises:
        ValueError: The run holds no model, the folder exists, the VAE is not that of the latents, the guide cannot
            guide it, or the Hub does not take it.
    """
    if args.folder.exists() and not args.folder.is_dir():
        raise ValueError(f"folder {args.folder} is a file; give a folder that is empty, or none yet")
    if args.folder.exists() and any(args.folder.iterdir()) and not args.force:
        raise ValueError(f"folder {args.folder} is not empty; give another one, or --force to replace it")
    again = (args.run / TRAINING).is_file() and not (args.run / CONFIG).exists()
    name = TRAINING if again else CONFIG
    read_config(args.run, name)  # refuses what is no run
    if again and (args.run / README).exists() and args.license != ExportArgs.license:
        raise ValueError(f"license is {args.license}, but {args.run / README} stays; leave it out, or change it there")
    check_replaced("folder", args.folder, "run", args.run)
    page = _card_again(args) if again else card(args)  # before anything is written
    pipe = pipeline.load(args.run)
    if args.vae is not None:
        pipeline.add_vae(pipe, args.vae)
    if args.guide is not None:
        guide = args.guide if args.guide == EXPERTS_OFF else load_guide(Path(args.guide), pipe)
        pipeline.add_guide(pipe, guide, args.guide_scale)
    for net in (pipe.transformer, pipe.guide):
        if net is not None:
            torch.nn.Module.to(net, getattr(torch, args.dtype))  # diffusers' own `to` warns without a reason
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.folder) as temporary:
        pipeline.save(pipe, temporary)
        (temporary / TRAINING).write_text((args.run / name).read_text())
        (temporary / README).write_text(page)
        if args.standalone:
            make_standalone(temporary, __version__)
    print(f"wrote {args.folder}; {_use(args)}")
    if args.push is not None:
        _push(args.push, args.folder)


_STANDALONE = [
    "With diffusers and without ditmoe, which pipeline.py carries along (`pip install diffusers accelerate`):",
    "",
    "```python", "from diffusers import DiffusionPipeline", "",
    'pipe = DiffusionPipeline.from_pretrained("FOLDER or OWNER/NAME", trust_remote_code=True)', "```", "",
]  # fmt: skip


def _use(args: ExportArgs) -> str:
    if args.standalone:
        return (
            f"DiffusionPipeline.from_pretrained({str(args.folder)!r}, trust_remote_code=True) reads it without ditmoe"
        )
    return f"`python -m ditmoe sample {shlex.quote(str(args.folder))} --out grid.png` draws a grid of samples"


def _push(name: str, folder: Path) -> None:
    import huggingface_hub

    try:
        huggingface_hub.create_repo(name, exist_ok=True, private=True)
        huggingface_hub.upload_folder(repo_id=name, folder_path=folder)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        what = f"push {name}: {folder} is finished, but the Hub did not take it ({why})"
        raise ValueError(f"{what}; hf auth login, then hf upload {name} {shlex.quote(str(folder))}") from error
    print(f"pushed to https://huggingface.co/{name}, private until you change that")


def _metadata(args: ExportArgs, report: dict[str, Any]) -> str:
    """What the Hub reads of a model: with its score, where there is one, the score's protocol."""
    from huggingface_hub import EvalResult, ModelCardData

    score, results = report.get("score"), None
    if score:
        drawn = {
            name: value for name, value in report.get("sampling", {}).items() if isinstance(value, str | int | float)
        } | ({} if args.guide is None else {"guide": "none"})
        protocol = {name: score.get(name) for name in ("n_gen", "n_ref", "extractor", "resize", "crop")}
        results = [
            EvalResult(
                task_type=_TASK, dataset_type="image-folder", dataset_name=report["data"]["name"],
                metric_type=score["metric"], metric_name=score["metric"], metric_value=score["value"],
                metric_args={**protocol, "sampling": drawn},
            )
        ]  # fmt: skip
    data = ModelCardData(
        library_name="diffusers", license=args.license, pipeline_tag=_TASK, model_name=args.folder.name,
        tags=["ditmoe", "diffusion", "mixture-of-experts", "image-generation"], eval_results=results,
    )  # fmt: skip
    return str(data.to_yaml())


def card(args: ExportArgs) -> str:
    """The model's page: the commands that made it, what it was trained on, and its score if the run has one."""
    file, runs = args.run / REPORT, [args.run, *([Path(args.guide)] if args.guide else [])]
    report = read_object(file) if file.exists() else {}
    without = "draws without" + ", as the scored images were" * bool(report.get("score"))
    files = [run / COMMAND for run in runs if (run / COMMAND).exists()]
    commands = dict.fromkeys(line for file in files for line in file.read_text().splitlines())
    lines = [
        "---", _metadata(args, report), "---", "",
        f"# {args.folder.name}", "", "A diffusion transformer with mixture-of-experts layers, made by ditmoe:", "",
        "```", *commands, _command(args), "```", "",
        *(_facts(report) if report else []),
        *(_STANDALONE if args.standalone else [_use(args) + ".", ""]),
        *([f"They are guided by {args.guide}; `--guide none` {without}.", ""] if args.guide else []),
    ]  # fmt: skip
    return "\n".join(lines)


def _card_again(args: ExportArgs) -> str:
    """The page of a model that was exported before, and below it what is done now."""
    file = args.run / README
    before = file.read_text() if file.exists() else card(args)
    lines = ["", "Exported again:", "", "```", _command(args), "```", ""]
    lines += [f"From then on they are guided by {args.guide}.", ""] if args.guide else []
    lines += _STANDALONE if args.standalone else []
    return before.rstrip("\n") + "\n" + "\n".join(lines)


def _command(args: ExportArgs) -> str:
    words = ["python", "-m", "ditmoe", "export", str(args.run), str(args.folder), "--dtype", args.dtype]
    words += [] if args.guide is None else ["--guide", args.guide]
    words += [] if args.guide_scale is None else ["--guide-scale", str(args.guide_scale)]
    return shlex.join(words + (["--standalone"] if args.standalone else []))


def _facts(report: dict[str, Any]) -> list[str]:
    model, score = report["model"], report.get("score")
    lines = [
        f"* {model['parameters_total'] / 1e6:.2f} M parameters, "
        f"{model['parameters_activated'] / 1e6:.2f} M activated by a token",
        f"* data: {report['data']['source']}",
        f"* {report['training']['steps']} steps of {report['training']['batch_size']} images",
    ]
    if score:
        lines.append(f"* {score['metric']} {score['value']:.4f} with {score['n_gen']} samples")
    return [*lines, ""]
