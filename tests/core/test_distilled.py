"""Models distilled to few steps are known by their names, and those that were brought back are not."""

from __future__ import annotations

import pytest

from oft_core.training.distilled import few_steps, remark


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("z_image_turbo_bf16.safetensors", "turbo"),
        ("Z-Image-Turbo.safetensors", "turbo"),
        ("sdxl_lightning_4step.safetensors", "lightning"),
        ("flux1-schnell-fp8.safetensors", "schnell"),
        ("flux-2-klein-4b.safetensors", "klein"),
        ("ltxv-13b-0.9.8-distilled.safetensors", "distilled"),
        ("Qwen-Image-8steps.gguf", "8steps"),
        ("dreamshaper-lcm.safetensors", "lcm"),
        ("sd3.5_large_turbo.safetensors", "turbo"),
        ("dmd2_sdxl.safetensors", "dmd2"),
        ("z_image_de_turbo.safetensors", ""),
        ("OpenFLUX.1.safetensors", ""),
        ("flux-2-klein-base-4b.safetensors", ""),
        ("flux-2-klein-4b-base.safetensors", ""),
        ("flux1-dev-de-distill.safetensors", ""),
        ("z_image_bf16.safetensors", ""),
        ("juggernautXL.safetensors", ""),
        ("hyperrealism.safetensors", ""),
        ("", ""),
    ],
)
def test_names(file, word):
    assert few_steps(file) == word


def test_a_kind_of_model_that_is_always_distilled():
    assert few_steps("mine.safetensors", "FluxSchnell") == "schnell"
    assert few_steps("OpenFLUX.1.safetensors", "FluxSchnell") == "" == few_steps("mine.safetensors", "Flux")


def test_the_remark_says_what_helps():
    text = remark("turbo")
    assert "'turbo'" in text and "training adapter" in text and "distilled from" in text and "learning rate" in text
