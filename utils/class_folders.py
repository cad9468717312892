"""Find class folders and the images in them, and note what is left out and why."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import processes
from utils.images import NO_IMAGE, extensions, is_named_like_an_image, opens, shown, why

# What systems, archives and notebooks leave in folders, in lower case. Hidden files are leftovers too.
LEFTOVERS = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "@recycle", "$recycle.bin",
    "system volume information", "lost+found", "found.000", "__pycache__",
}  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".gz", ".7z", ".rar")


@dataclass
class LeftOut:
    """The files and folders that were not read. One line reports them, and skipped_images.csv lists them.

    Attributes:
        images: (path, reason) of images, folders and links.
        others: files that are neither images nor named like images.
        leftovers: files and folders for which `is_leftover` is true.
        empty: class folders without a readable image.
    """

    images: list[tuple[Path, str]] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)

    def add(self, more: "LeftOut") -> None:
        """Add everything in `more`."""
        for name, paths in vars(more).items():
            getattr(self, name).extend(paths)

    def add_unread(self, unread: Sequence[tuple[Path, str]]) -> None:
        """Add the files that `read_images` could not read."""
        self.images += [(path, reason) for path, reason in unread if reason != NO_IMAGE]
        self.others += [path for path, reason in unread if reason == NO_IMAGE]

    def rows(self) -> list[tuple[str, str]]:
        """Return (path, reason) for skipped_images.csv: a row per image, and one per folder for its other files."""
        rows = sorted(self.images)
        for folder in dict.fromkeys(path.parent for path in self.others):
            names = [path.name for path in self.others if path.parent == folder]
            rows.append((folder, f"{len(names)} file(s) in it are no images, the first {shown(min(names))}"))
        rows += [(path, "is a class folder without a readable image") for path in self.empty]
        return [(shown(path), reason) for path, reason in rows]

    def line(self, root: Path) -> str:
        """Return a line with the count and the first of each kind of left-out file; "" if there are none."""

        def first(path: Path) -> str:
            return shown(path.relative_to(root) if path != root else path.name)

        parts = []
        if self.images:
            path, reason = min(self.images)
            parts.append(f"{len(self.images)} unreadable image(s), the first {first(path)}: {reason}")
        if self.empty:
            parts.append(f"{len(self.empty)} class(es) without an image, the first {first(self.empty[0])}")
        if self.others:
            parts.append(f"{len(self.others)} file(s) that are no images, the first {first(self.others[0])}")
        if self.leftovers:
            parts.append(f"{len(self.leftovers)} leftover(s) of other programs, the first {first(self.leftovers[0])}")
        return f"left out {' and '.join(parts)}" if parts else ""

    def say(self, root: Path) -> None:
        """Print the line on stderr, if it is not empty and this is the first process."""
        if (line := self.line(root)) and processes.is_first():
            print(f"{shown(root)}: {line}", file=sys.stderr)


def is_leftover(name: str) -> bool:
    """Return whether a file or folder name is hidden, or was left behind by a system, an archive or an editor."""
    return name.startswith(".") or name.endswith("~") or name.lower() in LEFTOVERS


def require_folder(folder: str | os.PathLike, holds: str) -> Path:
    """Return `folder` as a Path. Raises ValueError if it is missing or a file. holds: its contents, for the message."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    if not folder.exists():
        raise ValueError(f"{shown(folder)}: no such folder; {holds}")
    cure = "unpack it and give the folder" if folder.name.lower().endswith(ARCHIVES) else "give the folder"
    raise ValueError(f"{shown(folder)}: is a file, expected a folder; {cure}; {holds}")


def find_images(folder: str | os.PathLike, *, deep: bool = True) -> tuple[list[Path], LeftOut]:
    """List the files in `folder` that may be images, and what is left out.

    To avoid endless loops, links to folders in `folder` are not followed, nor is `folder` itself if it links to a
    folder that contains it. If `folder` is a file, that file is returned.

    deep: search its subfolders as well.

    Returns:
        The sorted paths, which may turn out to be unreadable or no images. And what is left out: leftovers, links to
        folders, empty folders named like images, unreadable folders, and without `deep` all folders.

    Raises:
        ValueError: `folder` is missing.
    """
    folder, left_out = Path(folder), LeftOut()
    if folder.is_file():
        return [folder], left_out
    require_folder(folder, f"expected one with images ({extensions()})")
    if folder.is_symlink() and folder.absolute().parent.resolve().is_relative_to(folder.resolve()):
        left_out.images.append((folder, "is a link back to a folder that it lies in"))
        return [], left_out
    paths: list[Path] = []

    def failed(error: OSError) -> None:
        left_out.images.append((Path(error.filename), why(error)))

    for place, folders, files in os.walk(folder, onerror=failed):
        left_out.leftovers += [Path(place, name) for name in (*folders, *files) if is_leftover(name)]
        folders[:] = [name for name in folders if not is_leftover(name)]
        paths += [Path(place, name) for name in files if not is_leftover(name)]
        if not deep:
            left_out.images += [(Path(place, name), "is a folder, not an image") for name in folders]
            break
        if Path(place) != folder and not (folders or files) and _has_ending_of_an_image(Path(place)):
            left_out.images.append((Path(place), "is a folder, not an image"))
        links = [Path(place, name) for name in folders if Path(place, name).is_symlink()]
        left_out.images.extend((path, "is a link to a folder, which is not followed") for path in links)
    left_out.images.sort()
    left_out.leftovers.sort()
    return sorted(paths), left_out


def listing(root: Path) -> tuple[list[Path], list[Path], LeftOut]:
    """Return the folders and the files directly in `root`, each sorted, and the leftovers there."""
    entries = sorted(root.iterdir())
    kept = [path for path in entries if not is_leftover(path.name)]
    leftovers = LeftOut(leftovers=[path for path in entries if is_leftover(path.name)])
    return [path for path in kept if path.is_dir()], [path for path in kept if not path.is_dir()], leftovers


def class_folders(
    root: str | os.PathLike, holds: str, cure: Callable[[Path, list[Path]], str]
) -> tuple[dict[Path, tuple[list[Path], LeftOut]], LeftOut]:
    """Return the class folders in `root`, sorted, each with the result of `find_images` directly in it.

    Leftovers do not count. Also returns what is left out of `root` itself: leftovers, and images beside the folders.

    Args:
        root: the folder with one folder per class.
        holds: what `root` should hold, for the error if it is missing.
        cure: (first, all) class folders that hold folders of images -> the advice on them, for the error.

    Raises:
        ValueError: `root` is missing; a class folder is empty, or holds a folder with images.
    """
    root = require_folder(root, holds)
    folders, files, left_out = listing(root)
    found = {folder: find_images(folder, deep=False) for folder in folders}
    nested = [folder for folder, (_, inner) in found.items() if any(map(_has_images, _folders_of(folder, inner)))]
    if nested:
        raise ValueError(f"{shown(nested[0])}: holds folders of images, expected images; {cure(nested[0], nested)}")
    for folder, (paths, inner) in found.items():
        if not paths and len(_folders_of(folder, inner)) == len(inner.images):
            raise ValueError(
                f"{shown(folder)}: is a class without a readable image; add one, or take the folder away (it is empty)"
            )
    if found:
        beside = [(path, "lies beside the class folders, in none of them") for path in files if _is_image(path)]
        left_out.images += beside
    return found, left_out


def place_with(root: Path, name: str) -> Path | None:
    """Return a folder one level above or below `root` that holds a folder `name`, or None."""
    near = [root.parent, *(listing(root)[0] if root.is_dir() else ())]
    return next((folder for folder in near if root.is_dir() and (folder / name).is_dir()), None)


def _folders_of(folder: Path, left_out: LeftOut) -> list[Path]:
    """Return the folders in `folder` that `find_images` left out."""
    return [path for path, _ in left_out.images if path != folder and path.is_dir()]


def _has_images(folder: Path) -> bool:
    return any(_is_image(path) for path in find_images(folder)[0])


def _is_image(path: Path) -> bool:
    return _has_ending_of_an_image(path) or opens(path)


def _has_ending_of_an_image(path: Path) -> bool:
    return bool(path.suffix) and is_named_like_an_image(path)
