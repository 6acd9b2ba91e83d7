"""What a launch is refused for, and where it computes."""

import pytest
import torch
from accelerate import PartialState

from ditmoe.launch.start import best_device, check_launch, resolve_precision


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
