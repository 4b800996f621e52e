from patch_lists import get_attr, set_attr  # noqa: F401
