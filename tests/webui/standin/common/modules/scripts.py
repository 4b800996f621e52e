AlwaysVisible = object()
scripts_data: list = []


class Script:
    """The callbacks that the face overrides; the hosts have more."""

    def before_process_batch(self, p, *args, **kwargs):
        pass

    def after_extra_networks_activate(self, p, *args, **kwargs):
        pass
