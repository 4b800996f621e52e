import torch


def get_torch_device():
    return torch.device("cpu")


def load_models_gpu(models, **_):
    """Loading takes off what an earlier patcher has merged and merges what this one has."""
    for patcher in models:
        patcher.lora_loader.refresh(patcher.lora_patches)


def cast_to_device(tensor, device, dtype, copy=False):
    return tensor.to(device=device, dtype=dtype, copy=copy)
