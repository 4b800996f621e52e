"""What binds adapters to ComfyUI.

`folders` reads a file; `apply` finds its layers on the host's models (`names`), lets `plan` decide for each, and gives it
a weight patch (`patch`) or turned activations (`runtime`, `turned`). Beside them: `track` follows schedules,
`layers` knows how weights are stored, `everywhere` serves other LoRA loaders, `files` names what is written.
"""
