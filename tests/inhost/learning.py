"""Sets, runs and comparisons for tests of training inside ComfyUI."""

from __future__ import annotations

import contextlib
import tempfile

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import families
import folder_paths
import pytest
import torch
from comfyui_oft.nodes import dataset
from comfyui_oft.nodes.binding import folders
from comfyui_oft.nodes.training import mode as train_mode
from comfyui_oft.nodes.training import run as train_run
from comfyui_oft.oft_core.training import plan as train_plan
from safetensors.torch import load_file

from dev.inprocess import work_dir

folders.register()


_parts = {}


def parts(family):
    """(model, clip, vae) of a family, made once, under inference mode as in a node."""
    if family not in _parts:
        with torch.inference_mode():
            _parts[family] = (
                families.make_model(family),
                families.make_clip(family),
                families.make_vae(family),
            )
    return _parts[family]


def pictures(count=2, size=(64, 64), seed=0):
    g = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(rough, size=size, mode="bilinear")
    return smooth.permute(0, 2, 3, 1)


def a_set(**options):
    options = {"instance_prompt": "a photo of [trigger]", "trigger": "ohwx", "resolution": 64, **options}
    if "folder" not in options:
        options.setdefault("pictures", [pictures()])
    with torch.inference_mode():
        return dataset.build(**options)


KNOBS = {
    "preset": "subject",
    "steps": 6,
    "learning_rate": 0.02,
    "block_size": 8,
    "coft": "off",
    "coft_degrees": 15.0,
    "coft_eps": 1.0,
    "seed": 3,
    "sample_prompts": "",
    "sample_every": 0,
    "save_every": 0,
    "low_vram": "off",
    "resume": True,
    "name": "training/test",
}


def a_run(family="sd15", of=None, of_parts=None, config=None, **knobs):
    """A Run as the node makes it."""
    of = of or a_set()
    config = train_plan.make_config(**{"sample_steps": 2, "sample_cfg": 1.0, **(config or {})})
    with train_mode.training_mode():
        plan = train_plan.make_plan(dataset=of, config=config, **{**KNOBS, **knobs})
        return train_run.Run(plan, of, *(of_parts or parts(family)), None)


def go(run):
    with torch.inference_mode(), train_mode.training_mode():
        return run()


def fresh_user():
    """An empty user folder: nothing that was trained before is known."""
    folder_paths.set_user_directory(tempfile.mkdtemp(prefix="user-", dir=work_dir()))


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def fixed_loss(run, values, weight_seed=77):
    """Mean error over a fixed batch: same pictures, noise and levels, rotations `values`."""
    with train_mode.training_mode(), torch.no_grad(), run.bank.installed(), run.bank.evaluation(values):
        total = 0.0
        for k in range(8):
            record = list(run.dataset.records)[k % len(run.dataset.records)]
            loaded = run.host.load_batch([record])
            noised = run.objective.noised(loaded.latents, weight_seed, k, [0])
            noised.drop[:] = [False]
            error = run.host.predict(noised, [record]) - run.objective.target(noised)
            total += float(error.square().mean())
        return total / 8


def zeros(bank):
    """Values with which the model is the untrained one: no rotation, own weights in modules trained whole."""
    out = {n: torch.zeros_like(p) for n, p in bank.parameters.items()}
    for name, value in out.items():
        part, _, rest = name.partition("/saved/")
        if rest:
            value.copy_(bank.parts[part][0].get_parameter(rest).detach())
    return out


def state(patcher):
    return {k: v.detach().clone() for k, v in patcher.model.state_dict().items()}


def untouched(module):
    """Nothing of a training is left on the modules."""
    for name, m in module.named_modules():
        assert "forward" not in m.__dict__, f"{name} still has a forward of its own"
        assert not m._forward_pre_hooks and not m._forward_hooks, f"{name} still has hooks"
    assert not any(p.requires_grad for p in module.parameters())


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key} differs"


def raises(kind, call, *words):
    """The message of the error of this kind that the call must raise, with these words in it."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "Traceback" not in text and len(text) > 25, text
    for word in words:
        assert word.lower() in text.lower(), f"{word!r} is not in: {text}"
    return text


def learnt(outcome):
    return load_file(outcome.adapter.path)


def merged(patcher):
    """All weights of a model with its patches merged by ComfyUI."""
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
        out = {k: v.detach().clone() for k, v in patcher.model_state_dict().items() if v.is_floating_point()}
        comfy.model_management.unload_all_models()  # takes the patches out again
        return out
