"""Write the weights of WORK into ../weights as they are shipped: float16, without zero columns, with checksums.

    python -m embedded.make.ship WORK
"""

import argparse
from pathlib import Path

from embedded.model import ship

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("work", type=Path)
work = parser.parse_args().work
tuned = work / "autoencoder_tuned.safetensors"
ship(work / "transformer.safetensors", tuned if tuned.exists() else work / "autoencoder.safetensors")
