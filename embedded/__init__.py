"""A tiny pretrained text-to-image model (SD3 family, 64 x 64 px emoji) that stock ComfyUI loaders accept."""
