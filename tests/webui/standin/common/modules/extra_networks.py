"""Tags in prompts: parsed, handed to the registered kinds in the order of the prompt, then to the scripts."""

import re

registry: dict = {}
_TAG = re.compile(r"<(\w+):([^>]+)>")


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = items or []
        # The hosts' own reading: a second = makes a word positional.
        split = [item.split("=", 2) for item in self.items]
        self.named = dict(pair for pair in split if len(pair) == 2)
        self.positional = [item for item, pair in zip(self.items, split, strict=True) if len(pair) != 2]

    def __eq__(self, other):
        return self.items == other.items


class ExtraNetwork:
    def __init__(self, name):
        self.name = name

    def activate(self, p, params_list):
        raise NotImplementedError

    def deactivate(self, p):
        raise NotImplementedError


def register_extra_network(network):
    registry[network.name] = network


def parse_prompts(prompts):
    """(prompts without tags, kind -> params): the tags of the first prompt are those of the batch."""
    first: dict = {}
    for kind, text in _TAG.findall(prompts[0]):
        first.setdefault(kind, []).append(ExtraNetworkParams(text.split(":")))
    return [_TAG.sub("", prompt) for prompt in prompts], first


def activate(p, data):
    done = []
    for kind, params in list(data.items()):
        if kind in registry:
            registry[kind].activate(p, params)
            done.append(kind)
    for kind, network in registry.items():
        if kind not in done:
            network.activate(p, [])
    for script in p.scripts:
        script.after_extra_networks_activate(p, batch_number=p.iteration, extra_network_data=data)
