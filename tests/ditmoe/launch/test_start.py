"""What a launch is refused for, where it computes, and that its environment changes no run."""

import re
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import PartialState

from ditmoe.config.sections import Config, TrainConfig
from ditmoe.data.open import open_data
from ditmoe.launch.start import best_device, check_launch, joined, launched, overruled, resolve_precision
from ditmoe.pipeline import load
from ditmoe.training.loop import train


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> PartialState:
    state = PartialState(cpu=True)
    assert state.num_processes == 1
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return state


def test_a_launch_for_several_that_started_one_is_refused(alone: PartialState, monkeypatch) -> None:
    check_launch(alone)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch, for one
    check_launch(alone)
    monkeypatch.setenv("MASTER_PORT", "29500")  # for several
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="asked for several processes .* and has started 1; on CPUs write"):
        check_launch(alone)
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun, for one
    check_launch(alone)


def test_an_address_of_a_cluster_is_no_launch(alone: PartialState, monkeypatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    check_launch(alone)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_device_is_the_accelerator_or_the_cpu(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    assert best_device() == torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert best_device() == torch.device("cpu")


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_where_it_is_fast(fast: bool, monkeypatch) -> None:
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    for kind in ("cuda", "xpu", "cpu"):
        assert resolve_precision("auto", torch.device(kind)) == ("bf16" if fast else "fp32")
        assert resolve_precision("fp32", torch.device(kind)) == "fp32"
    assert resolve_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(("maker", "precision"), [("GenuineIntel", "fp32"), ("AuthenticAMD", "bf16")])
def test_avx512_bf16_alone_is_fast_on_other_cpus_than_intels(
    maker: str, precision: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {maker}\n")
    monkeypatch.setattr("ditmoe.launch.start.CPUINFO", tmp_path / "cpuinfo")
    assert resolve_precision("auto", torch.device("cpu")) == precision


ENGINES = {f"ACCELERATE_USE_{name}" for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")}
OVERRULED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}
OF_ENGINES = r"ACCELERATE_(DEEPSPEED_|FP8_|CONFIG_DS_FIELDS|GRADIENT_CLIPPING|ALLOW_CP_STANDALONE)"  # and of fp8
ELSEWHERE = {  # of where and how loudly it runs, not of what comes out; device maps and buffers are not used here
    *("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DOWNCAST_BF16"),
    *("ACCELERATE_USE_SAGEMAKER", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "ACCELERATE_BYPASS_DEVICE_MAP"),
    *("ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH", "ACCELERATE_INIT_INCLUDE_BUFFERS"),
}


def test_all_that_accelerate_reads_from_its_environment_is_known() -> None:
    root = Path(accelerate.__file__).parent
    apart = ("commands", "test_utils", "launch.py", "launchers.py")  # they write it, for others to read
    files = [file for file in root.rglob("*.py") if not set(apart) & set(file.relative_to(root).parts)]
    read = {name for file in files for name in re.findall(r"""["'](ACCELERATE_[A-Z0-9_]+)["']""", file.read_text())}
    read = {name.replace("DYNAMO_", "DYNAMO_BACKEND") if name.endswith("_DYNAMO_") else name for name in read}
    left = {name for name in read - ENGINES - set(OVERRULED) - ELSEWHERE if not re.match(OF_ENGINES, name)}
    assert left == {"ACCELERATE_TORCH_DEVICE"}
    assert set(OVERRULED) <= read


@pytest.mark.parametrize("name", sorted(ENGINES))
@pytest.mark.parametrize("begin", [lambda: launched(TrainConfig()), joined])
def test_engines_of_the_environment_are_refused(name: str, begin: Callable[[], object], monkeypatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=rf"asks for {name[15:]} \({name}\); start plain processes"):
        begin()


def test_a_device_of_the_environment_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ValueError, match="ACCELERATE_TORCH_DEVICE is meta, another device than .*; leave it out"):
        launched(TrainConfig())


def test_the_environment_changes_nothing_of_a_run_and_that_is_said(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch, capsys
) -> None:
    weights = []
    for out in (tmp_path / "plain", tmp_path / "told"):
        config = tiny(out=out, max_steps=2, train={"accumulation": 2})
        train(config, open_data(config.data, size=8, channels=1))
        weights.append(load(out).transformer.state_dict())
        said = capsys.readouterr().out
        for name, value in OVERRULED.items():
            sentence = f"note: {name}={value} in the environment changes nothing, the run goes by config.json\n"
            assert said.count(sentence) == (out.name == "told")
            monkeypatch.setenv(name, value)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_accelerate_launch_says_of_its_own_is_no_news(monkeypatch) -> None:
    for name, value in {"GRADIENT_ACCUMULATION_STEPS": "1", "DYNAMO_BACKEND": "NO", "MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert overruled(TrainConfig(accumulation=4), "bf16") == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert overruled(TrainConfig(), "bf16") == []


def test_one_process_may_train_in_one_precision_after_the_other() -> None:
    for precision, wanted in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert launched(TrainConfig(precision=precision)).mixed_precision == wanted
