"""Picture files: reading them, masks, and fitting them to a size. Needs Pillow (ComfyUI has it)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

#: Of a mask, for errors: what it is, and what to do if nothing of the picture is left.
TRANSPARENCY = ("the picture is transparent", "Leave the picture out, or save it without transparency.")
MASK_FILE = ("the mask is black", "White counts and black does not: invert the mask, or delete it to learn from the whole picture.")


@dataclass(frozen=True)
class Picture:
    """A picture that is read, and what is known of it.

    name: file path or any label that is unique in the set; label: short, for people.   image: Pillow "RGB"; mask: Pillow "L" of its
    size, white counts, or None.   caption: its own, "" without one; otherwise: what goes before the prompt for all then.
    repeats: how often it is seen an epoch.   mask_file: where the mask comes from, None for its own transparency.   mask_is: see
    ``TRANSPARENCY``.   remarks: (remark, name) that a summary gathers.
    """

    name: str
    label: str
    image: Any
    mask: Any = None
    caption: str = ""
    otherwise: str = ""
    repeats: int = 1
    mask_file: str | None = None
    mask_is: tuple[str, str] = TRANSPARENCY
    remarks: tuple[tuple[str, str], ...] = ()


def _eight_bits(picture):
    """Grey pictures of 16 bits as "L": Pillow's own conversion cuts everything above 255 off."""
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if picture.mode == "I" and values.max() <= 255:  # eight bits, kept in 32
        return picture.convert("L")
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values from {values.min()} to {values.max()}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def open_picture(path: str | os.PathLike):
    """(RGB picture upright by its EXIF orientation, alpha as an "L" picture or None), as Pillow images.

    Of several frames the first. Fully opaque alpha counts as none. Raises ConfigError if Pillow cannot read the file, if it has more
    pixels than Pillow opens, or if its values are no grey or colour of 8 or 16 bits.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if file.mode == "F":
                raise ValueError("grey values in floating point, of which no range is known")
            picture = _eight_bits(ImageOps.exif_transpose(file))
            has_alpha = "A" in picture.getbands() or "transparency" in picture.info
            picture = picture.convert("RGBA" if has_alpha else "RGB")
    except Image.DecompressionBombError as error:
        raise ConfigError(
            "This picture has too many pixels to be opened", file=path, found=str(error), expected=f"at most {2 * Image.MAX_IMAGE_PIXELS}",
            hint="Scale it down; training uses far fewer.",
        ) from error
    except UnidentifiedImageError as error:
        found = "contents of no known kind" if os.path.getsize(path) else "an empty file"
        raise ConfigError("This picture cannot be read", file=path, found=found) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError("This picture cannot be read", file=path, found=str(error)) from error
    if not has_alpha:
        return picture, None
    alpha = picture.getchannel("A")
    return picture.convert("RGB"), None if alpha.getextrema()[0] == 255 else alpha


def open_mask(path: str | os.PathLike):
    """The grey values of a mask file as an "L" picture; what is transparent in it is black. Raises ConfigError as ``open_picture``."""
    from PIL import ImageChops

    picture, alpha = open_picture(path)
    grey = picture.convert("L")
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def spread(mask, size: tuple[int, int]):
    """The mask scaled to the (width, height) of its picture."""
    from PIL import Image

    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def fitted(picture, bucket: tuple[int, int], flip: bool = False):
    """The picture scaled to cover the bucket and cut in the middle, mirrored if ``flip``. Pillow image in, Pillow image out."""
    from PIL import Image

    width, height = picture.size
    scale = max(bucket[0] / width, bucket[1] / height)
    size = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    kind = Image.Resampling.LANCZOS if picture.mode == "RGB" else Image.Resampling.BILINEAR
    left, top = (size[0] - bucket[0]) // 2, (size[1] - bucket[1]) // 2
    out = picture.resize(size, kind).crop((left, top, left + bucket[0], top + bucket[1]))
    return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else out


def to_tensor(picture) -> Tensor:
    """Pillow image -> float32 (height, width, channels), 0..1 (ComfyUI's IMAGE layout without the batch)."""
    array = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None])
