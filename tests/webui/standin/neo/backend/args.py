from types import SimpleNamespace

dynamic_args = SimpleNamespace(online_lora=False, ops="", nunchaku=False)
