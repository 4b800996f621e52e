registered: dict[str, list] = {}


def _registrar(kind):
    def register(callback, *, name=None):
        registered.setdefault(kind, []).append(callback)

    return register


def clear_callbacks():
    registered.clear()


def run(kind, *args):
    """All callbacks of a kind. (The hosts have one function a kind, and print errors.)"""
    return [callback(*args) for callback in registered.get(kind, ())]


on_app_started = _registrar("app_started")
on_before_ui = _registrar("before_ui")
on_infotext_pasted = _registrar("infotext_pasted")
on_ui_settings = _registrar("ui_settings")
on_ui_tabs = _registrar("ui_tabs")
