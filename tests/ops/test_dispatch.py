"""Which attention backend a request becomes."""

import logging
import sys
import types

import pytest

from megatronish.config.model import KernelConfig
from megatronish.config.presets import resolve_model
from megatronish.model.transformer import Transformer
from megatronish.ops import dispatch


def _machine(monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, *modules: str) -> None:
    """A machine with this GPU and these modules; the modules have the two functions without an implementation."""
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(dispatch.torch.cuda, "get_device_capability", lambda: gpu)
    for name in ("flash_attn", "flash_attn_interface"):
        module = types.ModuleType(name)
        module.__version__ = "2.9"  # type: ignore[attr-defined]
        module.flash_attn_func = module.flash_attn_varlen_func = print  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module if name in modules else None)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("gpu", "modules", "chosen", "message"),
    [
        (None, [], "fused_or_sdpa", None),
        (None, ["flash_attn"], "fused_or_sdpa", None),
        ((9, 0), [], "fused_or_sdpa", "attention: SDPA (flash-attn is not installed)"),
        (
            (7, 5),
            ["flash_attn"],
            "fused_or_sdpa",
            "attention: SDPA (flash-attn needs a GPU of compute capability 8.0, this one has 7.5)",
        ),
        ((8, 9), ["flash_attn"], "flash2_or_sdpa", "attention: flash_attn 2.9 for fp16 and bf16, else SDPA"),
        ((9, 0), ["flash_attn", "flash_attn_interface"], "flash3_or_sdpa", None),
        ((10, 0), ["flash_attn", "flash_attn_interface"], "flash2_or_sdpa", None),
    ],
)
def test_auto(monkeypatch, caplog, gpu, modules, chosen, message) -> None:  # type: ignore[no-untyped-def]
    _machine(monkeypatch, gpu, *modules)
    with caplog.at_level(logging.INFO):
        assert dispatch.resolve_attention("auto") == chosen
    assert len(caplog.messages) == (gpu is not None)
    assert message is None or caplog.messages == [message]


def test_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, (9, 0))
    assert dispatch.resolve_attention("sdpa") == "sdpa"
    assert dispatch.resolve_attention("reference") == "reference"
    with pytest.raises(
        ValueError, match="'flash' was asked for, but flash-attn is not installed: `pip install flash-attn"
    ):
        Transformer(resolve_model({"preset": "tiny"}), KernelConfig(attention="flash"), seed=None)
    _machine(monkeypatch, (9, 0), "flash_attn")
    assert dispatch.resolve_attention("flash") == "flash2"
    del sys.modules["flash_attn"].flash_attn_func  # as where only version 4 shares the name
    with pytest.raises(ValueError, match="flash_attn has no flash_attn_func"):
        dispatch.resolve_attention("flash")
    _machine(monkeypatch, None, "flash_attn")
    with pytest.raises(ValueError, match="there is no CUDA GPU"):
        dispatch.resolve_attention("flash")
    with pytest.raises(ValueError, match="unknown attention backend 'flsh': choose auto, sdpa, flash or reference"):
        dispatch.resolve_attention("flsh")


def test_a_flash_attn_built_for_another_torch_is_reported_and_skipped(monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    _machine(monkeypatch, (8, 0))

    def broken(name: str) -> types.ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    with caplog.at_level(logging.INFO):
        assert dispatch.resolve_attention("auto") == "fused_or_sdpa"
    assert caplog.messages == ["attention: SDPA (flash_attn does not load (undefined symbol: _ZN3c10))"]
