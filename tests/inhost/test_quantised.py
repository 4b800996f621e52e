"""Turned activations of quantised weights."""

from __future__ import annotations

import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sample
import comfy.sd
import comfy.supported_models
import families
import gguf_layers
import torch
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import everywhere, folders, plan, runtime
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.oft_core import AdapterError, Strength, read_tensors
from turning import (
    LATER,
    NET_FILES,
    QUANTISED,
    adapter_for,
    add_lora,
    apart,
    applied,
    loaded,
    nearly,
    net_tensors,
    numbers,
    outputs,
    quantised,
    raises,
    shapes_of,
    tensors_for,
    truth,
    turned,
)


def on_net(patcher, tensors, how, s=1.0, shape=(96, 256)):
    """A clone with a file for the layer `linear` applied."""
    shapes = host_names.shapes_of(patcher)
    assert shapes["linear.weight"] == shape, shapes
    index = host_names.HostIndex(shapes, {"linear": host_names.Target("linear.weight")})
    side = host_names.Side("model", "Model", patcher, patcher, shapes, {})
    adapter = read_tensors(tensors, {}, name="test.safetensors")
    placed = [(patch, Strength(s)) for patch in adapter.bind(index).patches]
    ways = plan.plan(side, placed, how)
    return host.patched(side, ways), ways.notes


def answer(patcher, x):
    with loaded(patcher) as model, torch.no_grad():
        return model.linear(x).clone()


def test_quantised_layers_lose_nothing():
    """Errors against the file applied exactly to the weight that the layer stands for, and to the original."""
    said = []
    for kind in QUANTISED:
        for dtype in (torch.float32, torch.bfloat16):
            patcher, means, true, bias = quantised(kind, dtype=dtype)
            x = numbers(3, 40, 256, seed=13).to(dtype)
            bias = bias.to(dtype).double()

            def beside_bias(patcher, x=x, bias=bias):
                return answer(patcher, x).double() - bias

            exact = x.double() @ means.double().t()
            own = apart(beside_bias(patcher), exact)
            lost = apart(beside_bias(patcher), x.double() @ true.double().t())
            for which in NET_FILES:
                clone, notes = on_net(patcher, net_tensors(which), "auto")
                assert turned(clone) == 1 and "turned" in notes[0], notes
                got = beside_bias(clone)
                exact = x.double() @ truth(which, means).t()
                wanted = x.double() @ truth(which, true).t()
                error, all_lost = apart(got, exact), apart(got, wanted)
                # Beside what the layer itself makes: float32 arithmetic, and one rounding to bfloat16.
                unit = 2e-7 if dtype == torch.float32 else 2.0**-9
                # bitsandbytes' CPU kernel rounds the bias too, which is then not turned with the rest.
                slack = 1.05 if kind == "bitsandbytes" else 1.0
                assert error <= slack * own + unit, (kind, dtype, which, error, own)
                assert all_lost <= 1.05 * lost + unit, (kind, dtype, which, all_lost, lost)
                if which != "in, DoRA" and dtype == torch.float32 and kind in QUANTISED[:3]:
                    patched, _ = on_net(patcher, net_tensors(which), "weights")
                    again = apart(beside_bias(patched), exact)
                    assert again > 1e-2 > 1e4 * error, (kind, which, again, error)
                    said.append(
                        f"{kind}, {which}: {error:.1e}, as a weight patch {again:.1e}, layer alone {own:.1e}"
                    )
            assert apart(beside_bias(patcher), exact) > 1e-2, "the base is as before"
    print("\n".join(said))


def test_later_quantised_layers_lose_nothing():
    """Core's formats beyond fp8, where the host has them; native ones also round what goes into the layer."""
    said = [f"formats: {', '.join(LATER) or 'none on this host'}"]
    for kind in LATER:
        for dtype in (torch.float32, torch.bfloat16):
            patcher, means, _, bias = quantised(kind, dtype=dtype)
            x, bias = numbers(3, 40, 256, seed=13).to(dtype), bias.to(dtype).double()

            def beside_bias(patcher, x=x, bias=bias):
                return answer(patcher, x).double() - bias

            try:
                base = beside_bias(patcher)
            except (ValueError, RuntimeError) as error:  # no kernel for this processor
                said.append(f"{kind}, {dtype}: the layer alone does not run here: {error}")
                continue
            own = apart(base, x.double() @ means.double().t())
            for which in NET_FILES:
                clone, notes = on_net(patcher, net_tensors(which), "auto")
                assert turned(clone) == 1 and "quantised, " in notes[0], notes
                error = apart(beside_bias(clone), x.double() @ truth(which, means).t())
                unit = 4e-7 if dtype == torch.float32 else 2.0**-8
                # Turned inputs have other largest values, by which native layers scale them.
                assert error <= 1.1 * own + unit, (kind, dtype, which, error, own)
                patched, notes = on_net(patcher, net_tensors(which), "weights")
                again = apart(beside_bias(patched), x.double() @ truth(which, means).t())
                said.append(f"{kind}, {dtype}, {which}: {error:.1e}, weights {again:.1e}, alone {own:.1e}")
            assert torch.equal(beside_bias(patcher), base), "the base is as before"
        on_net(quantised(kind, 72)[0], net_tensors("in"), "auto", shape=(72, 256))  # its blocks are padded
    print("\n".join(said))


def test_stored_bytes_stay():
    for kind in (*QUANTISED, *(kind for kind in LATER if kind.endswith("emulated"))):
        patcher, *_ = quantised(kind)
        weight = patcher.model.linear.weight
        clone, _ = on_net(patcher, net_tensors("in"), "auto")
        answer(clone, numbers(2, 256))
        now = patcher.model.linear.weight
        if now is not weight:  # later hosts wrap the same quantised data anew when they load
            assert torch.equal(now._qdata.view(torch.uint8), weight._qdata.view(torch.uint8)), kind
        assert not clone.patches and not patcher.backup, kind


def test_bias_patches_of_dynamic_vram():
    """Dynamic VRAM of later hosts keeps the patch of a bias beside the other functions of the layer."""
    patcher, means, _, bias = quantised("fp8")
    layer, x = patcher.model.linear, numbers(2, 256, seed=13)

    def with_patch(x):
        return torch.nn.functional.linear(x, layer.weight.float(), layer.bias_lowvram_function(layer.bias))

    layer.comfy_cast_weights = True
    layer.bias_lowvram_function, layer.forward_comfy_cast_weights = (lambda b: b + 1), with_patch
    clone, _ = on_net(patcher, net_tensors("out"), "activations")
    expected = x.double() @ truth("out", means).t() + bias.double() + 1
    assert apart(answer(clone, x), expected) < 1e-6
    assert apart(answer(patcher, x), expected) > 1e-2


def test_lent_kernels_are_given_back():
    """Kernels that ComfyUI casts for one forward are handed back after it, also after an error."""
    model = families.make_model("sd15")
    live = applied(adapter_for(model, "in", want=("in_layers.2",)), model, "activations").model
    key = next(iter(runtime.live_entries(live)))
    lend, give_back, lent, calls = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight, [], []

    def lending(module, *args, **more):
        lent.append(module)
        calls.append(more)
        return lend(module, *args, **more)

    def giving_back(module, *args):
        lent.remove(module)
        return give_back(module, *args)

    with loaded(live) as net:
        module = net.get_submodule(key.removesuffix(".weight"))
        x = numbers(1, module.in_channels, 6, 5)
        comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight = lending, giving_back
        try:
            module(x)
            assert len(calls) == 1 and not lent
            module._conv_forward = lambda *_: 1 / 0
            try:
                module(x)
            except ZeroDivisionError:
                assert not lent
            else:
                raise AssertionError("the convolution was not called")
        finally:
            comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight = lend, give_back
            module.__dict__.pop("_conv_forward", None)


def test_weights_that_no_patch_reaches():
    patcher, *_ = quantised("bitsandbytes")
    text = raises(AdapterError, lambda: on_net(patcher, net_tensors("in"), "weights"))
    assert "runtime" in text and "Params4bit" in text, text


def test_packs_that_patch_by_name_are_refused_what_no_patch_reaches():
    """Through `comfy.lora.load_lora`, where nothing but weight patches can be given back."""
    import bitsandbytes as bnb

    model = families.make_model("sd15")
    key = next(k for k in shapes_of(model) if isinstance(model.model.get_submodule(k[:-7]), torch.nn.Linear))
    tensors = tensors_for({key: shapes_of(model)[key]}, "in")
    folders.register()
    everywhere.turn(True)
    try:
        table = comfy.lora.model_lora_keys_unet(model.model, {})
        assert set(comfy.lora.load_lora(tensors, table)) == {key}
        parent, _, leaf = key[:-7].rpartition(".")
        plain = getattr(model.model.get_submodule(parent), leaf)
        packed = bnb.nn.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, quant_type="nf4")
        packed.load_state_dict(plain.state_dict())
        packed = packed.to("cpu")
        packed(torch.zeros(1, plain.in_features))
        setattr(model.model.get_submodule(parent), leaf, packed)
        table = comfy.lora.model_lora_keys_unet(model.model, {})
        text = raises(AdapterError, lambda: comfy.lora.load_lora(tensors, table))
    finally:
        everywhere.turn(False)
    assert all(words in text for words in ("cannot be patched", "Params4bit", "Use Load OFT")), text


def test_packed_models_choose_by_layer():
    """A GGUF model: activations of packed layers, weights of the others, and a LoRA after it in its place."""
    model, types = gguf_layers.make_model(families, "sd15")
    keys = [
        k
        for k in shapes_of(model)
        if isinstance(model.model.get_submodule(k.removesuffix(".weight")), torch.nn.Linear)
    ]
    done = applied(adapter_for(model, "in"), model, "auto")
    packed = {f"diffusion_model.{n}" for n, t in types.items() if t not in gguf_layers.UNPACKED}
    live = set(runtime.live_entries(done.model))
    assert live and live <= packed and not set(done.model.patches) & packed and len(done.model.patches) > 3
    assert "GGUF Q8_0" in done.report and "weights of" in done.report, done.report
    keys = [k for k in keys if k in live]
    merged = applied(adapter_for(model, "in"), model, "weights")
    assert "unpacked and patched" in merged.report
    nearly(outputs(done.model, keys), outputs(merged.model, keys), outputs(model, keys))
    chosen = keys[:2]
    patches = {k: ("diff", (numbers(*host_names.shapes_of(model)[k], seed=3) * 0.05,)) for k in chosen}
    late, late_merged = add_lora(done.model, patches), add_lora(merged.model, patches)
    nearly(outputs(late, keys), outputs(late_merged, keys), outputs(model, keys))
    assert live - set(runtime.live_entries(late)) == set(chosen)
