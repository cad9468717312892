"""Draw characters from font files, black on white, for image sets such as fontchars."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from utils.images import why
from utils.progress import progress
from utils.seeding import numpy_generator

ENDINGS = (".ttf", ".otf", ".woff", ".woff2")
CHARACTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghimnqrty23456789&@?$%#"  # the classes of fontchars
SIDE, BOX, SHIFT = 32, 24, 2  # pixels: side of an image, longer side of the character in it, greatest shift
_DRAWN = 96  # pixels per em at which characters are drawn, before they are scaled down
_NO_CHARACTER = "\U0010ffff"  # never assigned, so every font draws its sign for missing characters

Drawings = dict[str, dict[str, np.ndarray]]  # class -> font -> image


def class_name(character: str) -> str:
    """Return the name of a character's class, safe on file systems that ignore case: A, small_a, 7, u0023 for #."""
    if character.isascii() and character.isalnum():
        return f"small_{character}" if character.islower() else character
    return f"u{ord(character):04x}"


def find_fonts(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Return the font files in `folder` and its subfolders by name, and the files left out because a name is taken.

    A name is the lower-case path in `folder` without its ending, with dashes for separators.
    """
    found: dict[str, Path] = {}
    doubles = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in ENDINGS and path.is_file() and not path.name.startswith("."):
            inside = path.relative_to(folder).with_suffix("").as_posix().lower()
            name = re.sub(r"[^\w.-]", "-", inside)
            if name in found:
                doubles.append(path)
            found.setdefault(name, path)
    return found, doubles


def draw_fonts(fonts: dict[str, Path], characters: Sequence[str]) -> tuple[Drawings, list[tuple[Path, str]]]:
    """Draw each character in each font that has it.

    Returns the images (SIDE, SIDE) uint8 by class and font, and (path, reason) of each unreadable font.
    """
    drawn: Drawings = {class_name(character): {} for character in characters}
    unreadable = []
    for name, path in progress(fonts.items(), desc="fonts", unit="font"):
        try:
            font = ImageFont.truetype(str(path), _DRAWN, layout_engine=ImageFont.Layout.BASIC)
            images = {character: _image(font, name, character) for character in characters}
        except Exception as error:  # a damaged font can raise nearly anything out of FreeType
            unreadable.append((path, why(error)))
            continue
        for character, image in images.items():
            if image is not None:
                drawn[class_name(character)][name] = image
    return drawn, unreadable


def _image(font: ImageFont.FreeTypeFont, name: str, character: str) -> np.ndarray | None:
    """Return a character's image, shifted by a draw seeded by `name` and `character`; None if the font lacks it.

    A font that draws a small letter like its capital lacks the small letter.
    """
    ink = _ink(font, character)
    others = {_NO_CHARACTER, character.upper()} - {character}
    if ink is None or any(_same(ink, _ink(font, other)) for other in others if len(other) == 1):
        return None
    scale = BOX / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    ink = ink.resize((width, height), Image.Resampling.LANCZOS)
    across, down = numpy_generator(0, "fonts", name, character).integers(-SHIFT, SHIFT + 1, 2).tolist()
    image = Image.new("L", (SIDE, SIDE))
    image.paste(ink, ((SIDE - width) // 2 + across, (SIDE - height) // 2 + down))
    return 255 - np.asarray(image)


def _ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Return a character as a font draws it, white on black, cropped to its ink; None if it has no ink."""
    mask = font.getmask(character, mode="L")
    if not all(mask.size):
        return None
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    return image.crop(box) if box else None


def _same(one: Image.Image, other: Image.Image | None) -> bool:
    return other is not None and one.size == other.size and one.tobytes() == other.tobytes()
