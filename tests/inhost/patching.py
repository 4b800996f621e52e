"""Models, files and comparisons for tests of loading inside ComfyUI."""

from __future__ import annotations

import math
from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import families
import folder_paths
import pytest
import torch
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.oft_core import (
    Schedule,
    Strength,
    read_tensors,
)
from safetensors.torch import save_file


def generator(seed):
    return torch.Generator().manual_seed(seed)


def weight_names(patcher, want):
    """Two- and four-dimensional weights of the diffusion model whose name holds one of `want`."""
    sd = patcher.model.state_dict()
    return [
        k
        for k, v in sd.items()
        if k.startswith("diffusion_model.")
        and k.endswith(".weight")
        and v.ndim in (2, 4)
        and any(w in k for w in want)
    ]


def diag_oft(shapes, seed=0, block=8, std=0.1, name=lambda k: "lora_unet_" + k[16:-7].replace(".", "_")):
    """LyCORIS Diag-OFT tensors (output side) for parameters {key: shape}."""
    out, g = {}, generator(seed)
    for key, shape in shapes.items():
        if shape[0] % block == 0:
            out[name(key) + ".oft_blocks"] = torch.randn(shape[0] // block, block, block, generator=g) * std
            out[name(key) + ".alpha"] = torch.tensor(0.0)
    return out


def input_oft(shapes, seed=0, block=8, std=0.02, name=lambda k: "lora_unet_" + k[16:-7].replace(".", "_")):
    """OneTrainer OFT tensors (input side, Neumann) for parameters {key: shape}."""
    out, g = {}, generator(seed)
    for key, shape in shapes.items():
        n = math.prod(shape[1:])
        if n % block == 0:
            out[name(key) + ".oft_R.weight"] = (
                torch.randn(n // block, block * (block - 1) // 2, generator=g) * std
            )
    return out


def shapes_of(patcher, want):
    sd = patcher.model.state_dict()
    return {k: tuple(sd[k].shape) for k in weight_names(patcher, want)}


def cayley(q):
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return torch.stack([(eye + one) @ torch.linalg.inv(eye - one) for one in q.double()])


def rotated_out(weight, blocks, s=1.0):
    """Independent formula of the rotation mode: rows of each block times cay(s (A - A^T))^T, in float64."""
    q = (blocks - blocks.transpose(-1, -2)).double()
    r = cayley(s * q).transpose(-1, -2)
    flat = weight.double().reshape(r.shape[0], r.shape[1], -1)
    return torch.bmm(r, flat).reshape(weight.shape)


def state(patcher):
    return {k: v.detach().clone() for k, v in patcher.model.state_dict().items()}


def loaded(patcher):
    """Weights after a full load; unpatched again before returning."""
    patcher.patch_model(torch.device("cpu"))
    out = state(patcher)
    patcher.unpatch_model(torch.device("cpu"))
    return out


def weights_in_forward(patcher, dtype):
    """What every layer multiplies with after a partial load with nothing resident, {key: tensor}."""
    patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    out, probe = {}, torch.zeros(1, dtype=dtype)
    for name, module in patcher.model.named_modules():
        if hasattr(module, "comfy_cast_weights") and getattr(module, "weight", None) is not None:
            weight, bias = comfy.ops.cast_bias_weight(module, probe)
            out[name + ".weight"] = weight.detach().clone()
            if bias is not None:
                out[name + ".bias"] = bias.detach().clone()
    patcher.unpatch_model(torch.device("cpu"))
    return out


def sd15(seed=0):
    return families.make_model("sd15", seed=seed)


ATTENTION = ("attn1.to_", "attn2.to_")


MIXED = (*ATTENTION, "in_layers.2", "ff.net", "proj_in")


def adapter_for(patcher, want=MIXED, seed=0, make=diag_oft, **options):
    return read_tensors(make(shapes_of(patcher, want), seed), {}, name="test.safetensors", **options)


def applied(adapter, model, s=1.0, mode="rotation", coft="file", clip=None, s_clip=None):
    at = Strength(s, mode, coft)
    return host.apply(adapter, model, clip, at, Strength(s if s_clip is None else s_clip, mode, coft))


def close(a, b, tolerance):
    worst = float((a.double() - b.double()).abs().max())
    assert worst <= tolerance, f"differs by {worst:.3g}, allowed {tolerance:.3g}"


def same(a, b, what=""):
    assert a.keys() == b.keys() or not what, f"{what}: {a.keys() ^ b.keys()}"
    for key in a:
        assert torch.equal(a[key], b[key]), f"{what} {key} differs"


def raises(kind, call):
    """The message of the error of this kind that the call must raise."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert len(text) > 30 and "Traceback" not in text, text
    return text


def write(folder, name, tensors, metadata=None):
    path = Path(folder_paths.models_dir) / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    folder_paths.filename_list_cache.clear()
    return path


def scheduled(adapter, curve, **window):
    from dataclasses import replace

    return replace(adapter, schedule=Schedule.parse(curve, **window))


def run_node(node, **inputs):
    with torch.inference_mode():
        return (
            node.EXECUTE_NORMALIZED(**inputs)
            if hasattr(node, "EXECUTE_NORMALIZED")
            else node.execute(**inputs)
        )
