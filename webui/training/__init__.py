"""Training in the web UI, on its loaded SD 1.x, SD 2.x or SDXL model."""
