"""The hosts' own kind of extra network: hands the tags' names and strengths to their LoRA engine at once."""

import lora_files
import networks
from modules import extra_networks


class ExtraNetworkLora(extra_networks.ExtraNetwork):
    def __init__(self):
        super().__init__("lora")

    def activate(self, p, params_list):
        known = [params for params in params_list if params.items[0] in lora_files.files]
        strengths = [float(params.items[1]) if len(params.items) > 1 else 1.0 for params in known]
        networks.load_networks([params.items[0] for params in known], strengths, strengths)

    def deactivate(self, p):
        pass
