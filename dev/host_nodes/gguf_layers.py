"""A stand-in for the community's GGUF loader: layers over packed weights, as it shows them to other packs.

What the real one shows, and what a trainer has to cope with: every Linear's parameters are tensors of a class of their own, whose
`clone` and `detach` answer with the tensor itself, and whose `shape` is the unpacked one; also those that are not quantised. The state
dict holds stand-ins on the meta device for quantised layers, and for the largest one a name more, which only stands for the room that
unpacking takes. Weights are unpacked in every forward; patches lie on the tensors.
Quantising and unpacking is the `gguf` package's own; only its missing Q4_K packer is written here.
"""

from __future__ import annotations

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import gguf
import numpy as np
import torch

Type = gguf.GGMLQuantizationType
UNPACKED = (Type.F32, Type.F16)


def pack_q4_k(weight: np.ndarray) -> np.ndarray:
    """float32 (rows, n*256) -> Q4_K bytes (rows, n*144).

    A block is 8 runs of 32 numbers, value = d * scale * q - dmin * floor, scale and floor 6 bits, q 4 bits.
    """
    runs = weight.reshape(-1, 8, 32).astype(np.float32)
    floor = np.maximum(-runs.min(-1), 0)
    scale = (runs.max(-1) + floor) / 15
    out = np.zeros((len(runs), 144), np.uint8)
    steps = []
    for at, values in ((0, scale), (2, floor)):
        unit = (values.max(-1, keepdims=True) / 63).astype(np.float16)
        out[:, at : at + 2] = unit.view(np.uint8)
        unit = np.maximum(unit.astype(np.float32), 1e-12)
        steps.append(np.clip(np.round(values / unit), 0, 63).astype(np.uint8))
    sc, mn = steps
    # The first four of each keep their low 6 bits together; the others are spread over the high bits and a third row.
    out[:, 4:8] = sc[:, :4] | (sc[:, 4:] >> 4 << 6)
    out[:, 8:12] = mn[:, :4] | (mn[:, 4:] >> 4 << 6)
    out[:, 12:16] = (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4
    d, dmin = (out[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    step = np.maximum(d * sc, 1e-12)[..., None]
    q = np.clip(np.round((runs + (dmin * mn)[..., None]) / step), 0, 15).astype(np.uint8)
    out[:, 16:] = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(runs), 128)
    return out.reshape(*weight.shape[:-1], -1)


class PackedTensor(torch.Tensor):
    """Bytes of `tensor_type` that stand for a tensor of `tensor_shape`."""

    @staticmethod
    def make(data: torch.Tensor, kind: Type, shape: torch.Size) -> PackedTensor:
        out = data.as_subclass(PackedTensor)
        out.tensor_type, out.tensor_shape, out.patches = kind, shape, []
        return out

    def to(self, *args, **kwargs):
        out = super().to(*args, **kwargs)
        out.tensor_type, out.patches = getattr(self, "tensor_type", None), list(getattr(self, "patches", []))
        out.tensor_shape = getattr(self, "tensor_shape", out.size())
        return out

    def clone(self, *_, **__):
        return self

    def detach(self, *_, **__):
        return self

    @property
    def shape(self):
        return self.__dict__.get("tensor_shape", self.size())


def packed(weight: torch.Tensor, kind: Type) -> PackedTensor:
    """A float weight as a tensor of a GGUF file of this type."""
    array = weight.detach().float().numpy()
    data = pack_q4_k(array) if kind == Type.Q4_K else gguf.quantize(array, kind)
    return PackedTensor.make(torch.from_numpy(np.ascontiguousarray(data)), kind, weight.shape)


def is_packed(tensor) -> bool:
    return getattr(tensor, "tensor_type", None) not in (None, *UNPACKED)


def unpacked(tensor: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    if not is_packed(tensor):
        return tensor.to(dtype)
    data = tensor.as_subclass(torch.Tensor).cpu().numpy()
    values = gguf.dequantize(data, tensor.tensor_type).reshape(tuple(tensor.tensor_shape))
    return torch.from_numpy(values).to(tensor.device, dtype)


class Operations(comfy.ops.manual_cast):
    """Given to a model in place of ComfyUI's own layers."""

    class Linear(comfy.ops.manual_cast.Linear):
        comfy_cast_weights = True
        largest = False

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state, prefix, *_):
            self.weight = torch.nn.Parameter(state[f"{prefix}weight"], requires_grad=False)
            if f"{prefix}bias" in state:
                self.bias = torch.nn.Parameter(state[f"{prefix}bias"], requires_grad=False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            if not is_packed(self.weight):
                return super()._save_to_state_dict(destination, prefix, keep_vars)
            for name in ("weight", "bias"):
                value = getattr(self, name)
                if value is not None:
                    destination[prefix + name] = torch.zeros_like(value, device="meta")
            if self.largest:
                shape = tuple(self.weight.shape)
                destination[f"{prefix}temp.weight"] = torch.empty(shape, device="meta", dtype=torch.float16)
            return None

        def _value(self, tensor, dtype):
            if tensor is None:
                return None
            value = unpacked(tensor, dtype)
            if isinstance(value, PackedTensor):
                value = torch.Tensor(value)
            for patches, key in getattr(tensor, "patches", []):
                value = comfy.lora.calculate_weight(patches, value, key)
            return value

        def forward_comfy_cast_weights(self, x):
            if not is_packed(self.weight):
                out = super().forward_comfy_cast_weights(x)
                return torch.Tensor(out) if isinstance(out, PackedTensor) else out
            weight, bias = (self._value(t, x.dtype) for t in (self.weight, self.bias))
            return torch.nn.functional.linear(x, weight, bias)


class Patcher(comfy.model_patcher.ModelPatcher):
    """Leaves patches on packed tensors, which apply them whenever they are unpacked."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if key not in self.patches or not is_packed(weight):
            return super().patch_weight_to_device(key, device_to, inplace_update)
        out = weight.to(device_to)
        out.patches = [(self.patches[key], key)]
        comfy.utils.set_attr_param(self.model, key, out)
        return None

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for p in self.model.parameters() if unpatch_weights else ():
            if is_packed(p):
                p.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)


def make_model(families, family: str, seed: int = 0):
    """A tiny model whose linear weights are Q4_K where their rows allow it (as in GGUF files), else Q8_0, or F32 where even
    that does not fit. Returns (patcher, types: parameter name -> type).
    """
    plain = families.make_model(family, seed=seed).model
    cls, config, overrides = families.config_of(family)
    conf = cls(config)
    conf.custom_operations = Operations
    conf.set_inference_dtype(torch.float32, None)
    conf.unet_config.update(overrides)
    model = conf.get_model({}, "", device="cpu")
    types: dict[str, Type] = {}
    state = {}
    linear = {n for n, m in plain.diffusion_model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, value in plain.diffusion_model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in linear:
            width = value.shape[-1]
            kind = Type.F32
            if leaf == "weight" and not owner.startswith("final_layer"):
                kind = Type.Q4_K if width % 256 == 0 else Type.Q8_0 if width % 32 == 0 else Type.F32
            types[name], value = kind, packed(value, kind)
        state[name] = value
    model.diffusion_model.load_state_dict(state)
    max((m for m in model.modules() if is_packed(getattr(m, "weight", None))), key=lambda m: m.weight.numel()).largest = True
    return Patcher(model.eval(), torch.device("cpu"), torch.device("cpu")), types
