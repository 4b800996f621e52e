"""Tools for working on the pack: host installer, server driver, tiny models, demo. Not part of what users load."""
