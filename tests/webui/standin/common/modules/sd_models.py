from pathlib import Path
from types import SimpleNamespace

checkpoints_list: dict = {}
folder = None  # the tests say


def list_models():
    checkpoints_list.clear()
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        checkpoints_list[path.name] = SimpleNamespace(filename=str(path), name=path.name, title=path.name)


def forge_model_reload():
    """Forge's model is loaded when it is first needed; here it is there."""
