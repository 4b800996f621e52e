"""Training inside ComfyUI: `plan` what is asked for, `host` the model, `run` the training, `store` what lies on disk."""
