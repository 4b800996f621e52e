"""The web-UI face on stand-ins: what the hosts' code does with prompts and weights, as far as the face touches it.

Every host is a folder in `standin`; `Web` puts one on the import path, starts the extension through its own door, and draws
"pictures" that are the weights which the model would have run with.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dev.oft_files import write_random_oft
from oft_core import load_adapter, merge_file
from oft_core.constraint import Strength

from . import learner

REPO = Path(__file__).resolve().parent.parent.parent
STANDIN = Path(__file__).parent / "standin"
HOSTS = ("a1111", "forge", "reforge", "neo")
#: Names that the stand-ins, and only they, may have in a test process.
NAMES = (
    "modules", "gradio", "network", "networks", "backend", "ldm_patched", "modules_forge", "lora_files", "lora_network", "patch_lists",
)

_BLOCK = "1.transformer_blocks.0."
UNET = {
    "input_blocks.0.0": nn.Conv2d(4, 16, 3),
    "input_blocks.1.0.in_layers.2": nn.Conv2d(16, 16, 3),
    "input_blocks.1.0.in_layers.0": nn.GroupNorm(4, 16),
    **{f"input_blocks.1.{_BLOCK}attn1.{name}": nn.Linear(32, 32, bias=False) for name in ("to_q", "to_k", "to_v")},
    f"input_blocks.1.{_BLOCK}attn1.to_out.0": nn.Linear(32, 32),
    f"input_blocks.1.{_BLOCK}attn2.to_k": nn.Linear(24, 32, bias=False),
    f"input_blocks.1.{_BLOCK}ff.net.0.proj": nn.Linear(32, 64),
    f"middle_block.{_BLOCK}attn1.to_q": nn.Linear(32, 32, bias=False),
    f"output_blocks.3.{_BLOCK}attn2.to_q": nn.Linear(32, 32, bias=False),
}
_LAYERS = "text_model.encoder.layers"
TEXT = {
    f"{_LAYERS}.{i}.{name}": nn.Linear(32, rows)
    for i in range(2) for name, rows in (("self_attn.q_proj", 32), ("self_attn.out_proj", 32), ("mlp.fc1", 64))
}
#: Where the parts' parameters are in a checkpoint.
PREFIX = {"model": "model.diffusion_model.", "clip": "cond_stage_model.transformer."}


def _tree(layers: dict[str, nn.Module], seed: int) -> nn.Module:
    """Modules nested by their dotted names, with seeded half-precision weights."""
    root = nn.Module()
    random = torch.Generator().manual_seed(seed)
    for path, layer in layers.items():
        *folders, leaf = path.split(".")
        at = root
        for name in folders:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at._modules[name]
        at.add_module(leaf, layer)
    for parameter in root.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random).half()
        parameter.requires_grad_(False)
    return root


def _nested(**parts: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, part in parts.items():
        root.add_module(name, part)
    return root


class Web:
    """One stand-in host with the extension in it.

    name: of `HOSTS`.   base: the checkpoint that the model is.   folder: its models/OFT.
    """

    def __init__(self, name: str, tmp: Path, monkeypatch: pytest.MonkeyPatch):
        for known in [n for n in sys.modules if n.partition(".")[0] in (*NAMES, "oft_pack")]:
            monkeypatch.delitem(sys.modules, known)
        for root in (STANDIN / "common", STANDIN / name):
            monkeypatch.syspath_prepend(str(root))
        self.name, self.monkeypatch, self.prefix = name, monkeypatch, PREFIX
        self.folder, self.loras = tmp / "models" / "OFT", tmp / "models" / "Lora"
        for path in (self.folder, self.loras):
            path.mkdir(parents=True, exist_ok=True)
        self.modules = SimpleNamespace(**{n: importlib.import_module(f"modules.{n}") for n in (
            "cache", "extra_networks", "paths", "processing", "script_callbacks", "scripts", "shared", "ui_extra_networks",
        )})
        self.modules.paths.models_path = str(tmp / "models")
        self.modules.shared.cmd_opts.lora_dir = str(self.loras)
        self.lora_files = importlib.import_module("lora_files")
        self.networks = importlib.import_module("networks")
        self.modules.extra_networks.register_extra_network(importlib.import_module("lora_network").ExtraNetworkLora())
        self.start()
        self.scripts = [self.door.OFTScript()]
        self.unet, self.text = _tree(copy.deepcopy(UNET), 1), _tree(copy.deepcopy(TEXT), 2)
        self.sd_model = self.modules.shared.sd_model = self._model()
        self.base = tmp / "base.safetensors"
        save_file({k: v.clone() for k, v in self.weights().items()}, self.base)

    def start(self) -> None:
        """What the host does with scripts/oft.py, and then before and while it builds its page."""
        spec = importlib.util.spec_from_file_location("oft.py", REPO / "scripts" / "oft.py")
        self.door = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.door)
        self.modules.script_callbacks.run("before_ui")
        self.modules.script_callbacks.run("ui_settings")

    def pack(self, name: str):
        """A module of the pack, as the host sees it."""
        return importlib.import_module(f"oft_pack.{name}")

    def _model(self):
        if self.name == "a1111":
            encoder = _nested(transformer=self.text)
            model = nn.Module()
            model.add_module("model", _nested(diffusion_model=self.unet))
            model.add_module("cond_stage_model", _nested(wrapped=encoder))
            return model
        where = {"forge": "backend.patcher.base", "neo": "backend.patcher.base", "reforge": "ldm_patched.modules.model_patcher"}
        patcher = importlib.import_module(where[self.name]).ModelPatcher
        kmodel, clip = _nested(diffusion_model=self.unet), _nested(clip_l=_nested(transformer=self.text))
        kmodel.storage_dtype = torch.float16
        objects = _Objects(patcher(kmodel), _Clip(patcher(clip)))
        return SimpleNamespace(
            forge_objects=objects.shallow_copy(), forge_objects_original=objects.shallow_copy(),
            forge_objects_after_applying_lora=objects.shallow_copy(), current_lora_hash="[]",
        )

    def use_openclip(self) -> None:
        """A1111's text encoder of SD2: torch's own attention, with queries, keys and values in one matrix."""
        layers = {}
        for i in range(2):
            layers[f"resblocks.{i}.attn"] = nn.MultiheadAttention(32, 4)
            layers[f"resblocks.{i}.mlp.c_fc"] = nn.Linear(32, 64)
            layers[f"resblocks.{i}.ln_1"] = nn.LayerNorm(32)
        self.text, self.prefix = _tree(layers, 3), {**PREFIX, "clip": "cond_stage_model.model.transformer."}
        self.sd_model = self.modules.shared.sd_model = nn.Module()
        self.sd_model.add_module("model", _nested(diffusion_model=self.unet))
        encoder = _nested(model=_nested(transformer=self.text))
        self.sd_model.add_module("cond_stage_model", _nested(wrapped=encoder))
        save_file({k: v.clone() for k, v in self.weights().items()}, self.base)

    def use_learner(self, *, xl: bool = False, in_channels: int = 4, prediction: str = "eps") -> None:
        """A model that can be trained and drawn with, in float32; see `learner`."""
        torch.manual_seed(5)
        self.unet = learner.UNet(in_channels, xl).requires_grad_(False)
        self.sd_model = self.modules.shared.sd_model = self._model()
        if xl and self.name == "a1111":
            encoder = self.sd_model.cond_stage_model.wrapped
            self.sd_model.add_module("conditioner", _nested(embedders=nn.ModuleList([_nested(wrapped=encoder)])))
            self.prefix = {**PREFIX, "clip": "conditioner.embedders.0.transformer."}
        learner.equip(self.sd_model, self.unet, xl=xl, prediction=prediction, file=str(self.base))
        save_file({k: v.clone() for k, v in self.weights().items()}, self.base)

    def before_batch(self) -> None:
        if self.name != "a1111":
            self.sd_model.forge_objects = self.sd_model.forge_objects_original.shallow_copy()

    @torch.inference_mode()
    def draw(self, is_hr_pass: bool) -> dict[str, torch.Tensor]:
        """The weights that the model would run with now, by their keys in a checkpoint."""
        if self.name == "a1111":
            # What torch's attention has inside never runs on its own, and so is not asked.
            inside = {id(m.out_proj) for m in self.sd_model.modules() if isinstance(m, nn.MultiheadAttention)}
            for module in self.sd_model.modules():
                if isinstance(module, self.networks.KINDS) and id(module) not in inside:
                    self.networks.network_apply_weights(module)
            return self.weights()
        # The first pass encodes with what is in place after the LoRAs, the second with what is there already.
        after = self.sd_model.forge_objects_after_applying_lora
        encoder = (self.sd_model.forge_objects if is_hr_pass else after).clip.patcher
        self.sd_model.forge_objects = after.shallow_copy()
        for patcher in (encoder, self.sd_model.forge_objects.unet):
            patcher.lora_loader.refresh(patcher.lora_patches) if self.name == "forge" else patcher.load()
        return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights as they are, those that are patched in every step as they would be then."""
        out = {}
        for part, root in (("model", self.unet), ("clip", self.text)):
            for key, weight in root.named_parameters():
                parent, _, leaf = key.rpartition(".")
                online = getattr(root.get_submodule(parent), "forge_online_loras", {}).get(leaf)
                if online:
                    merge = importlib.import_module("backend.patcher.lora").merge_lora_to_weight
                    weight = merge(online, weight, computation_dtype=weight.dtype)
                out[self.prefix[part] + key] = weight.detach().clone()
        return out

    def picture(self, prompt: str, hr_prompt: str | None = None, **more):
        """Draw -> (weights of each pass, the Processing)."""
        p = self.modules.processing.Processing(self, prompt, hr_prompt, **more)
        with torch.inference_mode():
            return self.modules.processing.process_images(p), p

    def drawn(self, prompt: str) -> dict[str, torch.Tensor]:
        return self.picture(prompt)[0][0]

    # --- files

    def oft(self, name: str, **how) -> Path:
        """A random OFT file for the model in models/OFT; see `write_random_oft`."""
        path = self.folder / f"{name}.safetensors"
        write_random_oft(self.base, path, **{"block_size": 8, "layers": "attn|ff|mlp", **how})
        return path

    def merged(self, *steps) -> dict[str, torch.Tensor]:
        """The checkpoint with files merged into it one after the other by the library. A step: (path, options of Strength)."""
        source = self.base
        for i, (path, *how) in enumerate(steps):
            target = self.base.with_name(f"merged{i}.safetensors")
            merge_file(load_adapter(path), source, target, Strength(*how), dtype="fp32")
            source = target
        with safe_open(source, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118

    def lora(self, name: str, seed: int = 0) -> dict[str, torch.Tensor]:
        """A LoRA for two layers of the diffusion model: key in the host's model -> what it adds."""
        random = torch.Generator().manual_seed(seed)
        keys = [f"diffusion_model.{k}.weight" for k in UNET if k.endswith(("attn1.to_q", "to_out.0"))]
        self.lora_files.files[name] = {key: torch.randn(32, 32, generator=random) for key in keys}
        return {"model." + key: delta for key, delta in self.lora_files.files[name].items()}


class _Objects:
    def __init__(self, unet, clip):
        self.unet, self.clip = unet, clip

    def shallow_copy(self):
        return _Objects(self.unet, self.clip)


class _Clip:
    def __init__(self, patcher):
        self.patcher, self.cond_stage_model = patcher, patcher.model

    def clone(self):
        return _Clip(self.patcher.clone())


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal but for the rounding of half precision."""
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[k].float(), expected[k].float(), rtol=2e-3, atol=2e-3) for k in found)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


@pytest.fixture(params=HOSTS)
def web(request, tmp_path, monkeypatch) -> Web:
    """Each of the stand-in hosts in turn."""
    return Web(request.param, tmp_path, monkeypatch)


@pytest.fixture
def web_of(tmp_path, monkeypatch):
    """Makes the stand-in of one host, by name."""
    return lambda name: Web(name, tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _gone(tmp_path):
    yield
    for known in [n for n in sys.modules if n.partition(".")[0] in (*NAMES, "oft_pack")]:
        del sys.modules[known]
    shutil.rmtree(tmp_path, ignore_errors=True)
