"""Models, files and comparisons for tests of turned activations (runtime = activations)."""

from __future__ import annotations

import json
import math

import comfy.hooks
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sample
import comfy.sd
import comfy.supported_models
import families
import gguf_layers
import pytest
import torch
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.nodes.binding import runtime
from comfyui_oft.oft_core import Strength, read_tensors

CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(key):
    return "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")


def tensors_for(shapes, side="out", seed=0, block=8, std=0.1, rows=False):
    """LyCORIS (out) or OneTrainer (in) tensors for {key: shape}; rows: with row scales of their dialect."""
    out = {}
    for i, (key, shape) in enumerate(shapes.items()):
        length = shape[0] if side == "out" else math.prod(shape[1:])
        if length % block:
            continue
        name, n = named(key), length // block
        if side == "out":
            out[f"{name}.oft_blocks"] = numbers(n, block, block, seed=seed + i) * std
            out[f"{name}.alpha"] = torch.tensor(0.0)
            if rows:
                out[f"{name}.rescale"] = 1 + 0.2 * numbers(shape[0], *[1] * (len(shape) - 1), seed=i).tanh()
        else:
            out[f"{name}.oft_R.weight"] = numbers(n, block * (block - 1) // 2, seed=seed + i) * std / 4
            if rows:
                out[f"{name}.dora_scale"] = 2 + 0.5 * numbers(shape[0], 1, seed=i).tanh()
    assert out
    return out


WANT = (
    "attn1.to_",
    "attn2.to_",
    "ff.net",
    "proj_in",
    "proj_out",
    "in_layers.2",
    "emb_layers.1",
    ".op.",
    "qkv",
    "linear",
    "mlp",
)


def shapes_of(patcher, want=WANT):
    return {
        k: shape
        for k, shape in host_names.shapes_of(patcher).items()
        if k.startswith("diffusion_model.")
        and k.endswith(".weight")
        and len(shape) in (2, 4)
        and any(w in k for w in want)
    }


def adapter_for(patcher, side="out", seed=0, want=WANT, **more):
    return read_tensors(
        tensors_for(shapes_of(patcher, want), side, seed, **more), {}, name="test.safetensors"
    )


def applied(adapter, model, how, s=1.0, mode="rotation", clip=None):
    at = Strength(s, mode)
    return host.apply(adapter, model, clip, at, at, how)


def turned(patcher):
    return len(runtime.live_entries(patcher))


class loaded:
    """The model as it is in use for a patcher, loaded directly or, with a budget, partly."""

    def __init__(self, patcher, budget=0):
        self.patcher, self.budget = patcher, budget

    def __enter__(self):
        self.patcher.patch_model(CPU, lowvram_model_memory=self.budget)
        return self.patcher.model

    def __exit__(self, *_):
        self.patcher.detach()


def outputs(patcher, keys, budget=0, dtype=torch.float32):
    """What every layer answers to the same random input, {key: tensor}."""
    out = {}
    with loaded(patcher, budget) as model, torch.no_grad():
        for i, key in enumerate(keys):
            module = model.get_submodule(key.removesuffix(".weight"))
            if isinstance(module, torch.nn.modules.conv._ConvNd):
                x = numbers(2, module.in_channels, 6, 5, seed=i)
            else:
                x = numbers(2, 7, module.in_features, seed=i)
            out[key] = module(x.to(dtype)).clone()
    return out


def apart(a, b):
    """Relative distance of two tensors."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def nearly(got, expected, base=None, limit=1e-5):
    assert got.keys() == expected.keys()
    for key in got:
        assert apart(got[key], expected[key]) < limit, (key, apart(got[key], expected[key]))
        assert base is None or apart(got[key], base[key]) > 1e-3, (key, "nothing was turned")


def same(a, b, what=""):
    for key in a:
        assert torch.equal(a[key], b[key]), f"{what} {key}"


def inputs_of(family, seed=3):
    """Arguments of a diffusion model's forward."""
    channels = families.LATENT_CHANNELS[family]
    widths = {
        "sd15": (77, 768, None),
        "sdxl": (77, 2048, 2816),
        "sd3": (77, 4096, 2048),
        "flux": (16, 4096, 768),
    }
    tokens, width, pooled = widths[family]
    args = {"context": numbers(2, tokens, width, seed=seed + 1)}
    if pooled:
        args["y"] = numbers(2, pooled, seed=seed + 2)
    if family == "flux":
        args["guidance"] = torch.tensor([3.5, 3.5])
    return numbers(2, channels, 8, 8, seed=seed), torch.tensor([0.5, 0.7]), args


def forward(patcher, family="sd15", budget=0):
    x, t, args = inputs_of(family)
    with loaded(patcher, budget) as model, torch.no_grad():
        return model.diffusion_model(x, t, **args)


def raises(kind, call):
    """The message of the error of this kind that the call must raise."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def lora(keys, model, seed=5, rank=4):
    """A LoRA on these parameters, as ComfyUI's loader makes it."""
    tensors = {}
    for i, key in enumerate(keys):
        shape = model.model.state_dict()[key].shape
        tensors[f"{named(key)}.lora_up.weight"] = numbers(shape[0], rank, seed=seed + i) * 0.2
        tensors[f"{named(key)}.lora_down.weight"] = numbers(rank, shape[1], seed=seed + i + 50) * 0.2
    return comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}))


def add_lora(patcher, patches, s=1.0):
    clone = patcher.clone()
    assert clone.add_patches(patches, s)
    return clone


def factors_like(n):
    return 1 + 0.2 * numbers(n, seed=9).tanh()


def special(model):
    """Contents of single layers that are more than one rotation: {what: (tensors, key)}."""
    key = next(k for k in shapes_of(model) if "attn1.to_q" in k)
    conv = next(k for k in shapes_of(model) if "in_layers.2" in k)
    out = {}
    for what, at in (("linear", key), ("convolution", conv)):
        shape, name = tuple(model.model.state_dict()[at].shape), named(at)
        n = math.prod(shape[1:])
        weight = model.model.state_dict()[at]
        left = {f"{name}.oft_R.weight": numbers(n // 8, 28) * 0.02}
        out[f"DoRA on the base's norms, {what}"] = (
            {**left, f"{name}.dora_scale": 1.5 * weight.flatten(1).norm(dim=1, keepdim=True)},
            at,
        )
        out[f"DoRA on the arriving norms, {what}"] = (
            {**left, f"{name}.lora_magnitude_vector.weight": 1.5 * weight.flatten(1).norm(dim=1)},
            at,
        )
        out[f"column factors, {what}"] = (
            {**left, f"{name}.dora_log_multiplier_col": 0.2 * numbers(n, seed=2)},
            at,
        )
        out[f"difference beside it, {what}"] = (
            {
                f"{name}.oft_blocks": numbers(shape[0] // 8, 8, 8) * 0.02,
                f"{name}.alpha": torch.tensor(1.0),
                f"{name}.diff_b": numbers(shape[0], seed=3),
            },
            at,
        )
        out[f"reflections, {what}"] = ({f"{name}.hra_u": numbers(n, 2).repeat_interleave(2, 1) + 0.2 * numbers(n, 4, seed=1)}, at)
        if what == "linear":
            out[f"its own directions, {what}"] = ({f"{name}.psoft_R.weight": 0.3 * numbers(28, seed=4)}, at)
            wide, shape_of = next((k, v) for k, v in shapes_of(model).items() if "ff.net.0" in k and v[0] % 64 == 0)
            half = shape_of[0] // 2
            pairs = {f"{named(wide)}.road_theta": 0.3 * numbers(half), f"{named(wide)}.road_alpha": factors_like(half)}
            out[f"pairs, {what}"] = (pairs, wide)
        out[f"BOFT, {what}"] = (
            {
                f"{name}.oft_blocks": numbers(3, shape[0] // 8, 8, 8) * 0.05,
                f"{name}.alpha": torch.tensor(0.0),
            },
            at,
        )
        out[f"PEFT BOFT, {what}"] = (
            {
                f"base_model.model.{at.removeprefix('diffusion_model.').removesuffix('.weight')}.boft_R": numbers(
                    3, n // 4, 4, 4
                )
                * 0.05,
                f"base_model.model.{at.removeprefix('diffusion_model.').removesuffix('.weight')}.boft_s": torch.ones(
                    shape[0], 1
                ),
            },
            at,
        )
    name, shape = named(key), tuple(model.model.state_dict()[key].shape)
    out["DoKr-OFT"] = (
        {
            f"{name}.oft_R.weight": numbers(shape[1] // 8, 28) * 0.02,
            f"{name}.lokr_w1": numbers(4, 4, seed=4) * 0.1,
            f"{name}.lokr_w2": numbers(shape[0] // 4, shape[1] // 4, seed=5) * 0.1,
        },
        key,
    )
    return out


def encoders(family):
    """Text encoders in float32: rounding patched weights to float16 would hide what is compared."""
    clip = families.make_clip(family)
    management.unload_all_models()  # ComfyUI loads new text encoders at once
    clip.cond_stage_model.to(torch.float32)
    return clip


def sampled(patcher, seed=1):
    conds = [[numbers(1, 77, 768, seed=5), {"pooled_output": None}]]
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), seed)
    return comfy.sample.sample(
        patcher, noise, 2, 3.0, "euler", "normal", conds, conds, torch.zeros(1, 4, 8, 8), seed=seed
    )


class Net(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear


def later_formats():
    """Core's formats of quantised layers that this host knows, beside fp8; each also with quantised inputs."""
    known = [f for f in getattr(comfy.quant_ops, "QUANT_ALGOS", {}) if not f.startswith("float8")]
    return [f"{of} {how}" for of in known for how in ("emulated", "native")]


def later_layer(kind, true, bias, dtype):
    """A layer in one of `later_formats`, from its state dict: (layer, weight that it stands for)."""
    of, how = kind.split()
    rows, columns = true.shape
    layout = comfy.quant_ops.QUANT_ALGOS[of]["comfy_tensor_layout"]

    def empty():
        ops = comfy.ops.mixed_precision_ops({}, dtype, disabled={of} if how == "emulated" else set())
        return ops.Linear(columns, rows, device="cpu", dtype=dtype)

    made = empty()
    stored = comfy.quant_ops.QuantizedTensor.from_float(true.to(dtype), layout)
    made.weight = torch.nn.Parameter(stored, requires_grad=False)
    made.quant_format, made.layout_type = of, layout
    made.bias.data.copy_(bias)
    layer = empty()
    layer.load_state_dict(made.state_dict())
    return layer, layer.weight.dequantize().float()


def quantised(kind, rows=96, columns=256, dtype=None):
    """A model of one quantised layer: (patcher, weight that it stands for, original weight, bias)."""
    dtype = dtype or torch.float32
    true, bias = numbers(rows, columns, seed=11) * 0.05, numbers(rows, seed=12)
    patcher_class = comfy.model_patcher.ModelPatcher
    if kind.startswith("GGUF"):
        layer = gguf_layers.Operations.Linear(columns, rows)
        stored = gguf_layers.packed(true, getattr(gguf_layers.Type, kind.split()[1]))
        layer.weight = torch.nn.Parameter(stored, requires_grad=False)
        layer.bias = torch.nn.Parameter(gguf_layers.packed(bias, gguf_layers.Type.F32), requires_grad=False)
        means, patcher_class = gguf_layers.unpacked(stored, torch.float32), gguf_layers.Patcher
    elif kind in LATER:
        layer, means = later_layer(kind, true, bias, dtype)
    elif kind == "bitsandbytes":
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(columns, rows, quant_type="nf4", compute_dtype=dtype)
        layer.load_state_dict({"weight": true, "bias": bias})
        layer = layer.to("cpu")
        layer(torch.zeros(1, columns))
        means = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        means = means.reshape(rows, columns)
    elif kind == "mixed precision" or (kind == "scaled fp8" and not hasattr(comfy.ops, "scaled_fp8_ops")):
        ops = comfy.ops.mixed_precision_ops(
            {"linear": {"format": "float8_e4m3fn"}}, compute_dtype=dtype, full_precision_mm=True
        )
        layer = ops.Linear(columns, rows, device="cpu", dtype=dtype)
        scale = true.abs().max() / 448
        net = Net(layer)
        state = {
            "weight": (true / scale).to(torch.float8_e4m3fn),
            "weight_scale": scale,
            "bias": bias.to(dtype),
        }
        means = state["weight"].float() * scale
        if not hasattr(comfy.ops, "scaled_fp8_ops"):  # later hosts read the format from the file
            conf = json.dumps({"format": "float8_e4m3fn"}).encode()
            state["comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
        net.load_state_dict({f"linear.{k}": v for k, v in state.items()})
    else:
        scaled = kind == "scaled fp8"
        ops = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False) if scaled else comfy.ops.manual_cast
        layer = ops.Linear(columns, rows, device="cpu", dtype=torch.float8_e4m3fn)
        scale = true.abs().max() / 448 if scaled else torch.tensor(1.0)
        layer.weight = torch.nn.Parameter((true / scale).to(torch.float8_e4m3fn), requires_grad=False)
        layer.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
        if scaled:
            layer.scale_weight = torch.nn.Parameter(scale, requires_grad=False)
            layer.scale_input = None
        means = layer.weight.float() * scale
    return patcher_class(Net(layer).eval(), CPU, CPU), means, true, bias


NET_FILES = {
    "out": {"linear.oft_blocks": None, "linear.alpha": None},
    "in": {"linear.oft_R.weight": None},
    "in, DoRA": {"linear.oft_R.weight": None, "linear.dora_scale": None},
}


def net_tensors(which):
    out = {}
    for name in NET_FILES[which]:
        out[name] = {
            "oft_blocks": lambda: numbers(12, 8, 8) * 0.1,
            "alpha": lambda: torch.tensor(0.0),
            "oft_R.weight": lambda: numbers(32, 28) * 0.03,
            "dora_scale": lambda: 2 + 0.3 * numbers(96, 1, seed=6).tanh(),
        }[name.removeprefix("linear.")]()
    return out


def truth(which, weight, s=1.0):
    """The file applied to a float64 weight."""
    adapter = read_tensors(net_tensors(which), {}, name="t")
    index = host_names.HostIndex({"linear.weight": tuple(weight.shape)}, {"linear": host_names.Target("linear.weight")})
    out = weight.double()
    for patch in adapter.bind(index).patches:
        norm = weight.double().norm(dim=1).float() if patch.op.needs_base else None
        patch.op.apply_(out, Strength(s), measured=norm)
    return out


QUANTISED = ("fp8", "scaled fp8", "mixed precision", "GGUF Q8_0", "GGUF Q4_K", "bitsandbytes")


LATER = tuple(later_formats())
