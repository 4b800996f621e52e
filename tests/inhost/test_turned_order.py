"""Turned activations in stacks, with other patches and in any order."""

from __future__ import annotations

import families
from comfyui_oft.nodes.binding import runtime
from turning import adapter_for, add_lora, applied, lora, nearly, outputs, same, shapes_of, turned


def test_any_number_in_any_order():
    """Applications, weight patches and LoRAs: as if all were weight patches, in the order of the nodes."""
    model = families.make_model("sd15")
    keys = [k for k in shapes_of(model) if "attn1.to_" in k][:2]
    files = [
        adapter_for(model, side, seed=i, want=("attn1.to_",), rows=i == 1)
        for i, side in enumerate(("out", "in", "out", "in"))
    ]
    patches = lora(keys, model)
    steps = {
        "a": lambda m, how: applied(files[0], m, how, 0.7).model,
        "b": lambda m, how: applied(files[1], m, how, -0.5).model,
        "c": lambda m, how: applied(files[2], m, how, 1.2, "linear").model,
        "d": lambda m, how: applied(files[3], m, how, 0.9).model,
        "w": lambda m, how: applied(files[0], m, "weights", 0.4).model,
        "l": lambda m, how: add_lora(m, patches, 0.8),
    }
    for chain in ("abc", "cba", "lab", "alb", "abl", "awb", "abw", "alblc", "lwalcb", "aabb", "bd", "dlbda"):
        live = merged = model
        for step in chain:
            live, merged = steps[step](live, "activations"), steps[step](merged, "weights")
        for budget in (0, 1):
            nearly(outputs(live, keys, budget), outputs(merged, keys), outputs(model, keys))
        last = chain[max(chain.rfind("l"), chain.rfind("w")) + 1 :]
        assert len(runtime.live_entries(live).get(keys[0], ())) == len(last), chain
    undone = applied(files[0], applied(files[0], model, "activations", 1.0).model, "activations", -1.0).model
    nearly(outputs(undone, keys), outputs(model, keys))


def test_branches_of_a_graph():
    """A LoRA on one branch does not change another branch from the same node."""
    model = families.make_model("sd15")
    keys = [k for k in shapes_of(model) if "attn1.to_q" in k]
    node = applied(adapter_for(model, want=("attn1.to_q",)), model, "activations").model
    before = outputs(node, keys)
    other = add_lora(node, lora(keys, model))
    assert other.patches and not node.patches and turned(node) == len(keys) and not turned(other)
    same(outputs(node, keys), before, "first branch")
    assert turned(node.clone()) == len(keys)
    same(outputs(node.clone(), keys), before, "clone")


def test_order_that_cannot_be_kept_is_told():
    """Another pack has put a plain dictionary in the place of the ordered one."""
    import logging

    model = families.make_model("sd15")
    keys = [k for k in shapes_of(model) if "attn1.to_q" in k]
    node = applied(adapter_for(model, want=("attn1.to_q",)), model, "activations").model.clone()
    node.patches = dict(node.patches)
    node.add_patches(lora(keys, model))
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("oft").addHandler(handler)
    try:
        outputs(node, keys)
    finally:
        logging.getLogger("oft").removeHandler(handler)
    assert any("before the OFT file's turned activations" in text for text in said), said
