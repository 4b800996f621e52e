"""A1111's LoRA engine: each layer asks the loaded networks for differences when their list has changed."""

from types import SimpleNamespace

import lora_files
import torch

available_network_aliases: dict = {}
loaded_networks: list = []
KINDS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.MultiheadAttention)


class _Lora:
    def __init__(self, name, key, delta):
        self.delta = delta

    def calc_updown(self, weight):
        return self.delta.clone(), None


def assign_network_names_to_compvis_modules(sd_model):
    mapping = {}
    roots = [sd_model.model, sd_model.cond_stage_model.wrapped]
    for root in roots:
        for name, module in root.named_modules():
            module.network_layer_name = name.replace(".", "_")
            mapping[module.network_layer_name] = module
    sd_model.network_layer_mapping = mapping


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    loaded_networks.clear()
    available_network_aliases.update(lora_files.aliases())
    for name, strength in zip(names, unet_multipliers, strict=False):
        modules = {
            key.removesuffix(".weight").replace(".", "_"): _Lora(name, key, delta * strength)
            for key, delta in lora_files.files[name].items()
        }
        loaded_networks.append(SimpleNamespace(
            name=name, mentioned_name=name, te_multiplier=1.0, unet_multiplier=strength, dyn_dim=None, modules=modules,
            bundle_embeddings={},
        ))


@torch.no_grad()
def network_apply_weights(layer):
    """What a layer does before it runs."""
    name = getattr(layer, "network_layer_name", None)
    wanted = tuple((n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in loaded_networks)
    if name is None or getattr(layer, "network_current_names", ()) == wanted:
        return
    joint = isinstance(layer, torch.nn.MultiheadAttention)
    held = [layer.in_proj_weight, layer.out_proj.weight, layer.out_proj.bias] if joint else [layer.weight, layer.bias]
    held = [parameter for parameter in held if parameter is not None]
    if not hasattr(layer, "kept"):
        layer.kept = [parameter.clone() for parameter in held]
        weights = layer.kept[:2] if joint else layer.kept[:1]
        layer.network_weights_backup = tuple(weights) if joint else weights[0]
    for parameter, before in zip(held, layer.kept, strict=True):
        parameter.copy_(before)
    for net in loaded_networks:
        module = net.modules.get(name)
        if module is not None and hasattr(layer, "weight"):
            half = getattr(layer, "fp16_weight", None)
            weight = layer.weight if half is None else half.clone()
            updown, bias = module.calc_updown(weight)
            layer.weight.copy_((weight.to(updown.dtype) + updown).to(layer.weight.dtype))
            if bias is not None:
                layer.bias.copy_(layer.bias + bias)
            continue
        thirds = [net.modules.get(name + last) for last in ("_q_proj", "_k_proj", "_v_proj", "_out_proj")]
        if joint and all(thirds):
            parts = zip(thirds[:3], layer.in_proj_weight.chunk(3, 0), strict=True)
            updown = torch.vstack([module.calc_updown(part)[0] for module, part in parts])
            out, bias = thirds[3].calc_updown(layer.out_proj.weight)
            layer.in_proj_weight += updown
            layer.out_proj.weight += out
            if bias is not None:
                layer.out_proj.bias += bias
    layer.network_current_names = wanted
