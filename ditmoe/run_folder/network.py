"""A network from wherever it lies: a model folder, a run folder, or one of a run's checkpoints."""

from pathlib import Path
from typing import Any

from .. import pipeline
from ..config.file import from_dict
from ..model import DiTMoETransformer2DModel, build
from ..objective import scheduler_config
from ..pipeline import DiTMoEPipeline
from ..pipeline.handed_in import blank
from .checkpoint import find_fault, opened

_LABELS = "y_embedder.embedding_table.weight"  # (classes + 1, D)


def load_guide(path: Path, pipe: DiTMoEPipeline) -> DiTMoETransformer2DModel:
    """The averaged network at a path, in float32 on the pipeline's device, to guide it.

    Raises:
        ValueError: There is none, it cannot be loaded, or its noise schedule is another one than the pipeline's.
    """
    if not path.exists():
        kinds = "a model folder, a run folder, RUN/checkpoints/step-000123, or experts-off"
        raise ValueError(f"guide {path} does not exist; give {kinds}")
    folder = any((place / "model_index.json").is_file() for place in (path, path / "model"))
    if (path / "state.json").is_file() or (path.name.startswith("step-") and not folder):
        net, schedule = averaged_network(path)
    else:
        found = pipeline.load(path)
        latents = [one.config.latents for one in (found, pipe)]
        if None not in latents and latents[0] != latents[1]:
            raise ValueError(f"guide {path} is of other latents than the model (another VAE or normalisation)")
        net, schedule = found.transformer, found.scheduler.config
    its, ours = (config.get("beta_schedule") or "linear" for config in (schedule, pipe.scheduler.config))
    if net.config.prediction_type != "flow_prediction" and its != ours:
        raise ValueError(
            f"guide {path} has beta_schedule {its}, but the model has {ours}; give one of the same schedule"
        )
    net.to(pipe.device).eval()
    return net


def averaged_network(path: Path) -> tuple[DiTMoETransformer2DModel, dict[str, Any]]:
    """The averaged network of a checkpoint, in float32 on the CPU, and its noise schedule.

    Raises:
        ValueError: The checkpoint is not whole, or holds none that can be built.
    """
    if (fault := find_fault(path)) is not None:
        raise ValueError(f"checkpoint {path} is damaged ({fault}); give another one")
    parts, state = opened(path)
    try:
        config, weights = from_dict(state["config"]), parts["ema"]
        classes = weights[_LABELS].shape[0] - 1 if _LABELS in weights else 0
        empty = blank(lambda: build(config, classes), limit=2 * len(weights))
        wanted = {name: value.shape for name, value in empty.state_dict().items()}
        if wanted != {name: value.shape for name, value in weights.items()}:
            raise ValueError("its weights are not those that its configuration asks for")
        net = build(config, classes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} holds no network that can be built ({error})") from error
    net.load_state_dict({name: value.whole() for name, value in weights.items()})
    return net, scheduler_config(config.objective)
