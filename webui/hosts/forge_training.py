"""Forge's loaded model for training; imported when one begins, since relatives of Forge lack some of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from backend import attention, memory_management
from backend.nn import unet as unet_code
from modules import sd_models, shared
from modules.prompt_parser import SdConditioning

from ...oft_core.tensors import ordinary_
from ...oft_core.training import ConfigError
from . import training
from .contract import Trainee

PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def chosen() -> Any:
    """The model of the user's choice; Forge loads it when it is first needed."""
    sd_models.forge_model_reload()
    return shared.sd_model


def trainee(sd_model: Any) -> Trainee:
    kind = training.kind_of(sd_model)
    patcher = sd_model.forge_objects_original.unet
    net, predictor = patcher.model.diffusion_model, patcher.model.predictor
    training.check_input(next(p for name, p in net.named_parameters() if name == "input_blocks.0.0.weight").shape[1])
    if patcher.model.storage_dtype not in PLAIN:
        raise ConfigError(
            "Weights that are stored packed cannot be trained here", found=str(patcher.model.storage_dtype),
            expected="Diffusion in Low Bits: Automatic, with a checkpoint in fp16, bf16 or fp32",
        )
    dtype = patcher.model.computation_dtype

    def call(x: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given = {"y": cond["vector"].to(dtype)} if "vector" in cond else {}
        return net(x.to(dtype), timesteps.float(), context=cond["crossattn"].to(dtype), transformer_options={}, **given)

    def text(prompt: str, width: int, height: int) -> dict[str, torch.Tensor]:
        made = sd_model.get_learned_conditioning(SdConditioning([prompt], width=width, height=height))
        return dict(made) if isinstance(made, dict) else {"crossattn": made}

    def load() -> None:
        memory_management.load_models_gpu([patcher])
        ordinary_(net)

    return Trainee(
        kind, net, "diffusion_model.", "v" if predictor.prediction_type == "v_prediction" else "eps",
        1 / (predictor.sigmas.detach().cpu().double() ** 2 + 1), memory_management.get_torch_device(), training.file_of(sd_model),
        call, text, lambda picture: sd_model.encode_first_stage(picture * 2 - 1), lambda latent: sd_model.decode_first_stage(latent) / 2 + 0.5,
        lambda: _trained(sd_model, patcher, net), load,
    )


@contextlib.contextmanager
def _trained(sd_model: Any, patcher: Any, net: torch.nn.Module) -> Iterator[None]:
    """The unpatched model on its device; torch's own attention, since others work in place or only forward."""
    before = sd_model.forge_objects
    sd_model.forge_objects = sd_model.forge_objects_original.shallow_copy()
    memory_management.load_models_gpu([patcher])  # what an earlier picture has merged is taken out
    attend, unet_code.attention_function = unet_code.attention_function, attention.attention_pytorch
    try:
        with training.own_checkpoints_off(net):
            yield
    finally:
        unet_code.attention_function = attend
        sd_model.forge_objects = before
