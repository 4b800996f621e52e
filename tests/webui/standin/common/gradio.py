"""As much of gradio as the settings name; real ones are in the page tests' own environments."""


class Textbox:
    pass


class Radio:
    pass
