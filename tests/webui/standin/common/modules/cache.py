"""What the web UIs keep about files, by section and title, until a file's time moves on."""

import os

kept: dict = {}


def cached_data_for_file(subsection, title, filename, func):
    at = os.path.getmtime(filename)
    entry = kept.get((subsection, title))
    if entry is None or at > entry[0]:
        value = func()
        if value is None:
            return None
        entry = kept[subsection, title] = (at, value)
    return entry[1]
