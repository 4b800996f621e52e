"""As much of gradio as is named when the face is imported; real ones are in the page tests' own environments."""


class Blocks:
    pass


class Dropdown:
    pass


class Radio:
    pass


class Textbox:
    pass


def update(**changes):
    return changes
