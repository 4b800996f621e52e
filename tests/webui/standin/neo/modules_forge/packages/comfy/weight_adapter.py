from patch_lists import WeightAdapterBase  # noqa: F401
