"""The switch of the same setting, inside a ComfyUI process: which functions are exchanged, and given back."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def everywhere(pack: ModuleType):
    module = importlib.import_module(f"{pack.__name__}.nodes.binding.everywhere")
    module.folders.register()
    yield module
    module.turn(False)


def now(comfy: ModuleType) -> tuple:
    names = ("load_lora", "model_lora_keys_unet", "model_lora_keys_clip")
    theirs = (getattr(comfy.lora, name) for name in names)
    return comfy.sd.load_lora_for_models, vars(comfy.hooks.WeightHook)["add_hook_patches"], *theirs


def test_names_alone_are_left_to_comfyui(
    comfy: ModuleType, everywhere: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that was copied has lost its model: nothing can be placed, and that is said."""
    everywhere.turn(True)
    oft = {"x.oft_R.weight": torch.zeros(1, 28)}
    assert comfy.lora.load_lora(oft, {"x": "diffusion_model.x.weight"}, False) == {}
    assert "names only" in caplog.text


def test_off_gives_the_same_functions_back(comfy: ModuleType, everywhere: ModuleType) -> None:
    before = now(comfy)
    for _ in range(2):
        assert everywhere.turn(True) == [] and everywhere.is_on()
        assert all(a is not b for a, b in zip(now(comfy), before, strict=True))
        once = now(comfy)
        everywhere.turn(True)
        assert now(comfy) == once, "on twice is on once"
        assert everywhere.turn(False) == [] and not everywhere.is_on()
        assert all(a is b for a, b in zip(now(comfy), before, strict=True))


def test_under_another_packs_function_ours_does_nothing(
    comfy: ModuleType, everywhere: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list = []

    def stock(model, clip, lora, strength_model, strength_clip):
        seen.append(lora)
        return model, clip

    monkeypatch.setattr(comfy.sd, "load_lora_for_models", stock)
    everywhere.turn(True)
    ours = comfy.sd.load_lora_for_models
    comfy.sd.load_lora_for_models = lambda *given: ours(*given)
    notes = everywhere.turn(False)
    assert len(notes) == 1 and "comfy.sd.load_lora_for_models" in notes[0]
    monkeypatch.setattr(everywhere, "read", lambda lora: pytest.fail("it is off, but reads"))
    oft = {"x.oft_blocks": torch.zeros(1, 2, 2)}
    assert comfy.sd.load_lora_for_models(None, None, oft, 1, 1) == (None, None) and seen == [oft]
    # The other pack goes away: the next time off gives everything back.
    comfy.sd.load_lora_for_models = ours
    assert everywhere.turn(False) == [] and comfy.sd.load_lora_for_models is stock


@pytest.mark.parametrize(
    ("said", "settings", "expected"),
    [
        (None, None, False),
        (None, {"OFT.everywhere": True}, True),
        (None, {"OFT.everywhere": False}, False),
        (None, "{broken", False),
        ("1", None, True),
        ("off", {"OFT.everywhere": True}, False),
    ],
)
def test_at_start(
    everywhere: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said, settings, expected
) -> None:
    monkeypatch.setattr(everywhere.folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.delenv("OFT_EVERYWHERE", raising=False)
    if said is not None:
        monkeypatch.setenv("OFT_EVERYWHERE", said)
    if settings is not None:
        (tmp_path / "default").mkdir()
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (tmp_path / "default" / "comfy.settings.json").write_text(text, "utf-8")
    assert everywhere.wanted_at_start() is expected


def test_a_file_is_found_by_its_tensors_only(
    everywhere: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a.oft_blocks": torch.randn(2, 2, 2), "a.alpha": torch.tensor(0.0)}
    other = {**tensors, "a.oft_blocks": tensors["a.oft_blocks"] + 1}
    save_file(other, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no")
    monkeypatch.setattr(everywhere.folders, "names", lambda: sorted(p.name for p in tmp_path.iterdir()))
    monkeypatch.setattr(everywhere.folders, "find", lambda name: str(tmp_path / name))
    assert everywhere.file_of(tensors) == "b.safetensors"
    assert everywhere.file_of(other) == "a.safetensors"
    assert everywhere.file_of({"a.oft_blocks": tensors["a.oft_blocks"]}) is None


def sd15(comfy: ModuleType, dtype: torch.dtype):
    from dev.host_nodes import families

    return families.make_model("sd15", dtype=dtype)


LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


def blocks(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.05
    return {f"{LAYER}.oft_blocks": found, f"{LAYER}.alpha": torch.tensor(0.0)} | {
        f"{LAYER}.{k}": v for k, v in more.items()
    }


CASES = {
    "right": (blocks(), 1.0, torch.float32, True),
    "strength": (blocks(), 0.5, torch.float32, False),
    "half precision": (blocks(), 1.0, torch.float16, False),
    "limit out of reach of both": (blocks(alpha=torch.tensor(50.0)), 1.0, torch.float32, True),
    "limit that ComfyUI takes raw": (blocks(alpha=torch.tensor(0.1)), 1.0, torch.float32, False),
    "rescale": (blocks(rescale=torch.full((64, 1), 1.1)), 1.0, torch.float32, False),
    "a key of another kind": (blocks(dora_scale=torch.ones(64, 1)), 1.0, torch.float32, False),
    "kohya's prefix": (
        {k.replace("lora_unet", "oft_unet"): v for k, v in blocks().items()},
        1.0,
        torch.float32,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_where_comfyui_is_right(comfy: ModuleType, everywhere: ModuleType, case: str) -> None:
    """Where it is said to be, its weight is compared with ours; where not, it must differ at strength 1."""
    tensors, strength, dtype, expected = CASES[case]
    model = sd15(comfy, dtype)
    adapter, _ = everywhere.read(tensors)
    at = everywhere.Strength(strength)
    assert everywhere.core_is_right(adapter, tensors, model, None, at, at) is expected
    weight = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"

    def made(patched) -> torch.Tensor:
        """The weight as a partly loaded model uses it; for float32 the same as a merged one."""
        value = comfy.utils.get_attr(model.model, weight).detach().clone()
        done = comfy.lora.calculate_weight(patched.patches.get(weight, []), value, weight, intermediate_dtype=dtype)
        return done.float()

    stock = made(comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0])
    everywhere.turn(True)
    ours = made(everywhere.apply(adapter, model, None, at, at).model)
    base = made(model)
    error = float((stock - ours).norm() / (ours - base).norm())
    if expected:
        assert error < 1e-5
    elif case != "a key of another kind":
        assert error > 1e-2
