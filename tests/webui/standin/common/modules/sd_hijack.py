from types import SimpleNamespace

optimised = True


def undo_optimizations():
    global optimised
    optimised = False


def _apply(option=None):
    global optimised
    optimised = True


model_hijack = SimpleNamespace(apply_optimizations=_apply)
