"""Read by Automatic1111, Forge and their relatives before they parse their command line."""


def preload(parser):
    """Add the pack's own options to the web UI's."""
    parser.add_argument("--oft-dir", type=str, default=None, help="Folder with OFT files (default: models/OFT).")
