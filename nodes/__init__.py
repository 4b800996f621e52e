"""ComfyUI face of the pack. No mathematics lives here; see `oft_core`."""
