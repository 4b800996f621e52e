from patch_lists import ModelPatcher  # noqa: F401
