"""What is said of parts of a model that were not given, in the words of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from oft_core import ModelMismatch, Strength, read_tensors
from oft_core.place import Words, place

UNET, TEXT = "lora_unet_middle_block_1_proj_in", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


@dataclass
class Part:
    name: str = "model"
    words: str = "Model"
    shapes: ClassVar = {
        "diffusion_model.middle_block.1.proj_in.weight": (16, 16),
        "diffusion_model.input_blocks.0.0.weight": (16, 4, 3, 3),
    }


def file(*modules: str):
    blocks = {f"{m}.oft_blocks": torch.full((2, 8, 8), 0.1).triu(1) for m in modules}
    return read_tensors(blocks | {f"{m}.alpha": torch.tensor(0.0) for m in modules}, name="a.safetensors")


def test_parts_that_were_not_given_are_called_as_the_host_says():
    at = {"model": Strength(), "clip": Strength()}
    report = place(file(UNET, TEXT), [Part()], at).report
    assert "1 layers for the text encoder (not given) not used." in report
    words = Words(text="the words (no words)", alone="Nothing for pictures", hint="Give words.")
    assert "1 layers for the words (no words) not used." in place(file(UNET, TEXT), [Part()], at, words=words).report

    with pytest.raises(ModelMismatch) as neutral:
        place(file(TEXT), [Part()], at)
    assert "only for a part that was not given" in str(neutral.value) and "the text encoder (not given)" in str(neutral.value)
    assert not any(word in str(neutral.value) for word in ("node", "MODEL", "CLIP", "Load OFT"))
    with pytest.raises(ModelMismatch) as own:
        place(file(TEXT), [Part()], at, words=words)
    assert all(text in str(own.value) for text in ("Nothing for pictures", "the words (no words)", "Give words."))
