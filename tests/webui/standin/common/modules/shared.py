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


class State:
    interrupted = stopping_generation = False
    job, job_count, sampling_step, sampling_steps, textinfo = "", 0, 0, 0, None

    def begin(self, job="(unknown)"):
        self.job, self.interrupted, self.stopping_generation = job, False, False

    def end(self):
        self.job = ""

    def interrupt(self):
        self.interrupted = True


opts = Options()
cmd_opts = SimpleNamespace(lora_dir="", oft_dir=None)
state = State()
sd_model = None
