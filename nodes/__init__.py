"""ComfyUI face of the pack: the nodes themselves. No mathematics lives here; see `oft_core`.

`binding` puts adapters on the host's models, `training` trains them there.
"""
