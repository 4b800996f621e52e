from types import SimpleNamespace


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, onchange=None, section=None, refresh=None):
        self.default, self.label, self.component, self.component_args, self.section = (
            default, label, component, component_args, section,
        )


class Options:
    """Attributes are options; only those that were added have a value."""

    def __init__(self):
        self.data, self.data_labels = {}, {}

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


opts = Options()
cmd_opts = SimpleNamespace(lora_dir="", oft_dir=None)
state = SimpleNamespace(interrupted=False)
sd_model = None
