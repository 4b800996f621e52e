"""The order of things in one generation, as far as it matters to extra networks."""

from . import extra_networks


class Processing:
    """prompt, hr_prompt: with tags.   host: what stands in for the web UI's model handling; see the tests' conftest."""

    def __init__(self, host, prompt, hr_prompt=None, *, batch_size=1, n_iter=1, disable_extra_networks=False):
        self.host, self.sd_model, self.scripts = host, host.sd_model, host.scripts
        self.batch_size, self.n_iter, self.iteration = batch_size, n_iter, 0
        self.disable_extra_networks = disable_extra_networks
        self.all_prompts = [prompt] * (batch_size * n_iter)
        self.all_hr_prompts = None if hr_prompt is None else [hr_prompt] * (batch_size * n_iter)
        self.is_hr_pass = False
        self.extra_generation_params, self.comments = {}, {}
        self.cached = {}

    def comment(self, text):
        self.comments[text] = 1

    def _pass(self, prompts):
        prompts, data = extra_networks.parse_prompts(prompts)
        if not self.disable_extra_networks:
            extra_networks.activate(self, data)
        return self.host.draw(self.is_hr_pass), data


def process_images(p):
    """Draw: a list of what each pass of each batch has drawn."""
    drawn = []
    for n in range(p.n_iter):
        p.iteration = n
        p.host.before_batch()
        for script in p.scripts:
            script.before_process_batch(p, batch_number=n)
        rows = slice(n * p.batch_size, (n + 1) * p.batch_size)
        drawn.append(p._pass(p.all_prompts[rows])[0])
        if p.all_hr_prompts is not None:
            p.is_hr_pass = True
            drawn.append(p._pass(p.all_hr_prompts[rows])[0])
            p.is_hr_pass = False
    return drawn
