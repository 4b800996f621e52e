"""Tools for working on the pack: host installer, server driver, tiny models, demo. Users never load them."""
