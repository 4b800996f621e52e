"""The door for Automatic1111, Forge and their relatives, which run every file in an extension's `scripts` folder.

The repository's root becomes a package of a private name here: its `__init__.py` is ComfyUI's door and is not run, and
the web UIs have a module called `webui` of their own.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "oft_pack"


def _package() -> None:
    """Make the package, anew where its files have changed since: the host's "Reload UI" runs this file again."""
    newest = max(path.stat().st_mtime_ns for part in ("webui", "oft_core") for path in (ROOT / part).rglob("*.py"))
    there = sys.modules.get(PACKAGE)
    if there is not None and there.newest == newest:
        return
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]:
        del sys.modules[name]
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    package = importlib.util.module_from_spec(spec)
    package.newest = newest
    sys.modules[PACKAGE] = package


_package()
extension = importlib.import_module(PACKAGE + ".webui.extension")
extension.start()
OFTScript = extension.OFTScript  # the host looks for its own script classes in this module
