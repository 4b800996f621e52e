"""Every field of PEFT's OFTConfig: an adapter with it, merged by live `peft` and by us into a saved model's folder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from oft_core import Strength, load_adapter
from oft_core.model_folder import merge_folder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

#: Field -> values of it, each with what else it needs.
FIELDS = {
    "r": [{"r": 4, "oft_block_size": 0}, {"r": 1, "oft_block_size": 0}],
    "oft_block_size": [{"oft_block_size": 4}, {"oft_block_size": 32}],
    "module_dropout": [{"module_dropout": 0.3}],
    "target_modules": [
        {"target_modules": "all-linear"}, {"target_modules": r".*layers\.1\..*(q|v)_proj"}, {"target_modules": ["q_proj", "down_proj"]},
    ],
    "exclude_modules": [{"target_modules": "all-linear", "exclude_modules": ["k_proj", "gate_proj"]}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "bias": [{"bias": "all"}, {"bias": "oft_only"}],
    "init_weights": [{"init_weights": False}],
    "layers_to_transform": [{"layers_to_transform": [1]}, {"layers_to_transform": 0}],
    "layers_pattern": [{"layers_to_transform": [0], "layers_pattern": "layers"}],
    "modules_to_save": [{"modules_to_save": ["lm_head"]}],
    "coft": [{"coft": True, "eps": 0.02, "use_cayley_neumann": False}],
    "eps": [{"coft": True, "eps": 0.5}],
    "block_share": [{"block_share": True}],
    "use_cayley_neumann": [{"use_cayley_neumann": False}],
    "num_cayley_neumann_terms": [{"num_cayley_neumann_terms": 2}, {"num_cayley_neumann_terms": 9}],
}  # fmt: skip
#: Fields of every PEFT config that say nothing of a rotation.
OTHERS = {
    "task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "ensure_weight_tying", "trainable_token_indices",
}  # fmt: skip


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        max_position_embeddings=64, attention_bias=True, tie_word_embeddings=False,
    )
    out = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in out.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.1)
    return out


def test_every_field_is_tried():
    fields = {f.name for f in dataclasses.fields(peft.OFTConfig)}
    assert fields - OTHERS <= set(FIELDS), fields - OTHERS - set(FIELDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("field", "config"), [(f, c) for f, several in FIELDS.items() for c in several], ids=str)
def test_a_field(tmp_path, field, config):
    if field not in {f.name for f in dataclasses.fields(peft.OFTConfig)}:
        pytest.skip(f"this PEFT has no {field}")
    base = tmp_path / "base"
    model().save_pretrained(base)
    before = model().state_dict()
    settings = {"r": 0, "oft_block_size": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **config}
    wrapped = peft.get_peft_model(model(), peft.OFTConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value += torch.randn(value.shape, generator=generator) * 0.03
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.eval().merge_and_unload().state_dict()
    binding = merge_folder(load_adapter(tmp_path / "adapter"), base, tmp_path / "out", Strength())
    assert binding.matched and not binding.unmatched
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    changed = 0
    for key, want in merged.items():
        change = float((want - before[key]).norm())
        assert float((want - found[key]).norm()) <= 1e-5 * change + 2e-7 * float(want.norm()), key
        changed += change > 0
    assert changed
