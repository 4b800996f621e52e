"""LoRAs for the stand-ins: a file's name -> layer -> what is added at strength 1. The web UIs read real ones."""

from types import SimpleNamespace

files: dict = {}


def on_disk(name):
    return SimpleNamespace(name=name, filename=f"/lora/{name}.safetensors")


def aliases():
    return {name: on_disk(name) for name in files}
