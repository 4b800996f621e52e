"""The hosts' queue for what takes long; ours has no second place."""

import functools
import threading

queue_lock = threading.Lock()


def wrap_gradio_gpu_call(func, extra_outputs=None):
    @functools.wraps(func)
    def called(*args, **kwargs):
        return list(func(*args, **kwargs))

    return called
