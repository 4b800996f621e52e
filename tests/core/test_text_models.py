"""Adapters of language models: what they are called, and merging into Hugging Face's folders, against live `peft`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oft_core import FileError, ModelMismatch, Strength, describe, load_adapter
from oft_core.cli import main
from oft_core.model_folder import merge_folder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(tied: bool = False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def trained(model, folder: Path, **config):
    """An adapter with random rotations, saved; the model that PEFT merges it into."""
    wrapped = peft.get_peft_model(model, peft.OFTConfig(**{"r": 0, "oft_block_size": 8, "target_modules": ATTENTION, **config}))
    generator = torch.Generator().manual_seed(1)
    for name, value in wrapped.named_parameters():
        if "oft_" in name or "modules_to_save" in name or (value.requires_grad and name.endswith("bias")):
            value.data += torch.randn(value.shape, generator=generator) * 0.05
    wrapped.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrapped.merge_and_unload()


def saved(model, folder: Path, shard: str = "10GB", dtype=torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"weights of the base in another form")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def near(found: dict[str, torch.Tensor], merged: torch.nn.Module, before: dict[str, torch.Tensor], limit: float = 1e-5) -> int:
    """How many tensors PEFT changed; all are within ``limit`` of their change, and no other differs."""
    want, changed = merged.state_dict(), 0
    for key, value in found.items():
        change = (want[key].float() - before[key].float()).norm()
        off = (want[key].float() - value.float()).norm()
        assert off <= limit * change + 1e-30, (key, float(off), float(change))
        changed += bool(change > 0)
    return changed


@pytest.mark.parametrize("shard", ["10GB", "20KB"], ids=["one file", "shards"])
def test_a_folder_is_merged_as_peft_merges_it(tmp_path, shard):
    base, out = saved(llama(), tmp_path / "base", shard), tmp_path / "out"
    before = weights(base)
    merged = trained(llama(), tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(base), "-o", str(out)]) == 0
    assert near(weights(out), merged, before) == 8
    names = {p.name for p in base.iterdir()} - {"pytorch_model.bin"}
    assert {p.name for p in out.iterdir()} == names
    if shard == "20KB":
        assert len(list(out.glob("*.safetensors"))) > 2
        index = json.loads((out / "model.safetensors.index.json").read_text("utf-8"))
        assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in before.values())
    ids = torch.arange(12)[None]
    again = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(again(ids).logits, merged.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_and_another_can_be_asked_for(tmp_path):
    base = saved(llama(), tmp_path / "base", "20KB", torch.bfloat16)
    before = weights(base)
    # PEFT's rotations of the same rounded weights, in float32.
    rounded = llama().to(torch.bfloat16).float()
    merged = trained(rounded, tmp_path / "adapter")
    merge_folder(load_adapter(tmp_path / "adapter"), base, tmp_path / "out", Strength())
    found = weights(tmp_path / "out")
    assert {v.dtype for v in found.values()} == {torch.bfloat16}
    for key, want in merged.state_dict().items():
        assert torch.equal(found[key], want.to(torch.bfloat16)) or (found[key].float() - want).abs().max() < 2**-8 * want.abs().max(), key
    assert sum(not torch.equal(found[k], before[k]) for k in found) == 8
    merge_folder(load_adapter(tmp_path / "adapter"), base, tmp_path / "fp32", Strength(), dtype="fp32")
    assert {v.dtype for v in weights(tmp_path / "fp32").values()} == {torch.float32}
    index = json.loads((tmp_path / "fp32" / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in found.values())


def test_a_report_says_what_it_is(tmp_path):
    model = llama()
    model.name_or_path = model.config._name_or_path = "meta/tiny-llama"
    trained(model, tmp_path / "adapter")
    text = describe(load_adapter(tmp_path / "adapter")).to_text()
    assert "Language model: 8 layers" in text and "UNet" not in text
    assert "meta/tiny-llama" in text and "a language model" in text


def test_one_shard_alone_names_the_folder(tmp_path, capsys):
    base = saved(llama(), tmp_path / "base", "20KB")
    trained(llama(), tmp_path / "adapter")
    shard = min(base.glob("*.safetensors"))
    assert main(["merge", str(tmp_path / "adapter"), str(shard), "-o", str(tmp_path / "x.safetensors")]) == 1
    assert "one of several" in capsys.readouterr().err
    index = base / "model.safetensors.index.json"
    assert main(["merge", str(tmp_path / "adapter"), str(index), "-o", str(tmp_path / "x.safetensors")]) == 1
    assert "Name the folder" in capsys.readouterr().err


def test_bad_folders_are_explained_and_nothing_is_left(tmp_path):
    trained(llama(), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")

    def refused(base, *words, kind=FileError, out="out"):
        with pytest.raises(kind) as caught:
            merge_folder(adapter, base, tmp_path / out, Strength())
        assert all(w in str(caught.value) for w in words), str(caught.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "0 safetensors files")
    base = saved(llama(), tmp_path / "base", "20KB")
    index = base / "model.safetensors.index.json"
    whole = json.loads(index.read_text("utf-8"))
    first = next(iter(whole["weight_map"]))
    for name in ("../outside.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "config.json"):
        index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], first: name}}))
        refused(base, "something else than a file beside it")
    index.write_text("{")
    refused(base, "cannot be read", "JSON")
    index.write_text(json.dumps(whole))
    gone = base / whole["weight_map"][first]
    kept = gone.read_bytes()
    gone.unlink()
    refused(base, gone.name, "missing")
    gone.write_bytes(kept[: len(kept) // 2])
    refused(base, "damaged")
    gone.write_bytes(kept)
    refused(base, "of this name already", out="adapter")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    refused(base, "bitsandbytes", "unquantised")
    pipeline = tmp_path / "pipe"
    saved(llama(), pipeline / "transformer")
    refused(pipeline, "transformer", "part's folder")


def test_a_tied_output_layer_has_no_weight_of_its_own(tmp_path):
    base = saved(llama(tied=True), tmp_path / "base")
    trained(llama(), tmp_path / "adapter", target_modules=[*ATTENTION, "lm_head"])
    with pytest.raises(ModelMismatch, match="tie_word_embeddings"):
        merge_folder(load_adapter(tmp_path / "adapter"), base, tmp_path / "out", Strength())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    base = saved(llama(), tmp_path / "base", "20KB")
    trained(llama(), tmp_path / "adapter")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oft_core.model_folder.sync", full)
    with pytest.raises(FileError, match="No space left"):
        merge_folder(load_adapter(tmp_path / "adapter"), base, tmp_path / "out", Strength())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_parts_of_pipelines_too(tmp_path):
    """A folder of diffusers: other names for the same kind of files."""
    folder = tmp_path / "unet"
    folder.mkdir()
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    save_file({f"{key}.weight": weight}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    blocks = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.1
    save_file({f"lora_unet_{key.replace('.', '_')}.oft_blocks": blocks}, tmp_path / "a.safetensors")
    merge_folder(load_adapter(tmp_path / "a.safetensors"), folder, tmp_path / "out", Strength())
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", "pt") as f:
        assert not torch.equal(f.get_tensor(f"{key}.weight"), weight) and "oft_merge" in f.metadata()
