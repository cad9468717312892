"""Convert data sets to the folder layout `<root>/{meta_train,meta_val,meta_test}/<class>/*.png`.

    python -m datasets.prepare glyphs --out data/glyphs --per-class 600
    python -m datasets.prepare fontchars --out data/fontchars
    python -m datasets.prepare fonts --from path/to/fonts --out data/characters
    python -m datasets.prepare cifarfs                                    # downloads CIFAR-100
    python -m datasets.prepare cifarfs --from path/to/cifar100            # cifar-100-python or class folders
    python -m datasets.prepare miniimagenet --from path/to/miniimagenet   # csv and images, .pkl, or class folders
    python -m datasets.prepare subsets --data-root data/cifarfs --classes_per_model 5

To resume, run the same command again: existing images are kept.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets import fontchars as embedded
from datasets import fonts as drawing
from datasets import published, unpack
from datasets.archives import unpacked
from datasets.glyphs import SPLIT_CLASSES, make_split
from datasets.unpack import ImagesByClass, ImageSource
from utils.atomic import atomic_file
from utils.class_folders import class_folders, is_leftover, place_with
from utils.cli import OneLineParser, run
from utils.images import ImageError, read_image
from utils.progress import progress
from utils.run_log import read_json, write_json, write_skipped

SETTINGS = "prepared.json"  # in the output folder: the source of its images
CIFAR_SIDE, MINI_SIDE = 32, 84  # pixels


def glyphs(out: Path, per_class: int, splits: list[str], seed: int) -> None:
    """Draw glyphs into `out`, `per_class` images for each class of each split.

    Existing images are kept, damaged ones redrawn. Raises ValueError, before anything is written, if `out` holds other
    images: from another seed, beyond `per_class`, or not made here.
    """
    if per_class < 1:
        raise ValueError(f"got --per-class {per_class}, expected 1 or more")
    for split in splits:
        data = make_split(split, 1, seed=seed)  # image 0 does not depend on the count
        known = {f"{index:05d}.png" for index in range(per_class)}
        _check_strange(out / split, data.class_names, known, f"give a greater --per-class than {per_class}")
        for name, drawn in zip(data.class_names, data.images.permute(0, 2, 3, 1).numpy(), strict=True):
            _is_written(out / split / name / "00000.png", drawn, f"--seed {seed} draws another; give its seed")
    for split in splits:
        data = make_split(split, per_class, seed=seed)
        paths = [out / split / name / f"{index:05d}.png" for name in data.class_names for index in range(per_class)]
        pixels = data.images.permute(0, 2, 3, 1).numpy()
        written = _write_missing(paths, pixels, f"--seed {seed} draws another; give its seed")
        print(f"{out / split}: {len(data.class_names)} classes of {per_class} images, {written} images written now")


def fontchars(out: Path, splits: list[str]) -> None:
    """Write fontchars into `out`, each image named by its font. Existing images are kept.

    Raises ValueError, before a split is written, if `out` holds other images of it.
    """
    for split in splits:
        images, labels, names, fonts = embedded.read_split(split)
        paths = [out / split / names[label] / f"{font}.png" for label, font in zip(labels, fonts, strict=True)]
        _check_strange(out / split, names, {path.name for path in paths})
        written = _write_missing(paths, images)
        print(f"{out / split}: {len(names)} classes, {len(images)} images, {written} images written now")


def fonts(source: Path, out: Path, characters: str) -> None:
    """Draw `characters` in every font in `source` into `out`, one folder per character. Existing images are kept.

    Unreadable fonts, and fonts without a character, are left out with a line on stderr. Raises ValueError if nothing
    can be drawn, or if `out` holds another image of the same name.
    """
    wanted = list(dict.fromkeys(characters))
    if not wanted or any(character.isspace() or not character.isprintable() for character in wanted):
        raise ValueError(f"got --characters {characters!r}, expected characters that can be seen, such as ABCabc123")
    _require_folder(source, f"give the folder with the fonts ({', '.join(drawing.ENDINGS)})")
    found, doubles = drawing.find_fonts(source)
    if not found:
        raise ValueError(f"{source}: got no fonts, expected files that end in {', '.join(drawing.ENDINGS)}")
    drawn, unreadable = drawing.draw_fonts(found, wanted)
    for path, reason in unreadable:
        print(f"{path}: left out, as it is no readable font ({reason})", file=sys.stderr)
    for path in doubles:
        print(f"{path}: left out, as another font has its name", file=sys.stderr)
    if not any(drawn.values()):
        raise ValueError(f"{source}: got no font with one of {characters!r}; give others, or other --characters")
    paths = [out / name / f"{font}.png" for name, by_font in drawn.items() for font in by_font]
    pixels = [image for by_font in drawn.values() for image in by_font.values()]
    written = _write_missing(paths, pixels)
    if others := sorted({*out.glob("*/*.png")} - {*paths}):
        print(
            f"{out}: also holds {len(others)} images of other characters or fonts, the first {others[0]}; take them "
            "away, or training uses them too", file=sys.stderr,
        )  # fmt: skip
    readable = found.keys() - {name for name, path in found.items() if path in dict(unreadable)}
    for character, (name, by_font) in zip(wanted, drawn.items(), strict=True):
        if lacking := sorted(readable - by_font.keys()):
            some = f"{len(lacking)} of {len(readable)} fonts"
            print(f"{name}: left out {some} without {character}, the first {lacking[0]}", file=sys.stderr)
    classes = sum(map(bool, drawn.values()))
    print(f"{out}: {classes} classes, {len(paths)} images of {len(readable)} fonts, {written} images written now")


def _write_missing(paths: Sequence[Path], pixels: Iterable[np.ndarray], cure: str = "take it away") -> int:
    """Write missing and damaged images, and return their number. Raises as `_is_written`, before writing any."""
    pixels = list(pixels)
    with ThreadPoolExecutor() as threads:
        there = list(threads.map(partial(_is_written, cure=cure), paths, pixels))
        missing = [pair for pair, written in zip(zip(paths, pixels, strict=True), there, strict=True) if not written]
        list(threads.map(lambda pair: _save(*pair), missing))
    return len(missing)


def _save(path: Path, pixels: np.ndarray) -> None:
    with atomic_file(path) as file:
        Image.fromarray(pixels).save(file, "png")


def _is_written(path: Path, expected: np.ndarray, cure: str) -> bool:
    """Return whether `path` has these pixels; False if it is missing or damaged. Raises ValueError for other pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            there = np.asarray(file)
    except Exception:  # a damaged file can raise nearly anything out of Pillow
        return False
    if not np.array_equal(there, expected):
        raise ValueError(f"{path}: is another image than would be written; {cure}, or give another --out")
    return True


def cifarfs(out: Path, source: Path | None) -> None:
    """Make CIFAR-FS in `out`, 32x32: CIFAR-100's train and test images together, in the published class splits.

    source: cifar-100-python, a folder that holds it, or a folder of class folders; None downloads to <out>/download.
    """
    classes, skipped = published.CIFARFS, {}
    names = [name for split in classes.values() for name in split]
    batches = None
    if source is not None:
        _require_folder(source, "give the folder that holds cifar-100-python or CIFAR-100's class folders")
        batches = next((f for f in (source, source / "cifar-100-python") if (f / "meta").is_file()), None)

    def read() -> Callable[[str], ImagesByClass]:
        if source is not None and batches is None:
            unpack.check_level(source, names, ("meta", "cifar-100-python/meta"))
            found = unpack.class_folders(source, names, skipped)
        else:
            found = unpack.cifar_batches(batches or unpack.download_cifar100(out / "download"), names)
        return lambda split: found

    kind = "class folders" if source is not None and batches is None else "cifar-100-python"
    convert(out, classes, {"dataset": "cifarfs", "source": kind, "size": CIFAR_SIDE}, read)
    write_skipped(out, skipped)


def miniimagenet(out: Path, source: Path, size: int) -> None:
    """Make miniImageNet in `out`: the central square of each image at `size` pixels, in the published class splits.

    source: a folder with the three mini-imagenet-cache-*.pkl; or train.csv, val.csv, test.csv and the images they list;
    or class folders (directly, in images, or in train, val and test). The first of these that exists is used.
    """
    if size < 1:
        raise ValueError(f"got --size {size}, expected 1 or more pixels")
    _require_folder(source, "give the folder with miniImageNet's images or pickles")
    classes, skipped = published.MINIIMAGENET, {}
    names = [name for split in classes.values() for name in split]
    caches, lists = [unpack.cache_name(split) for split in classes], [unpack.csv_name(split) for split in classes]
    if any((source / name).exists() for name in caches):
        kind = "pkl"
        unpack.require_files(source, caches)
    elif any((source / name).exists() for name in lists):
        kind = "csv"
        unpack.require_files(source, lists)
    else:
        kind = "class folders"

    def read() -> Callable[[str], ImagesByClass]:
        if kind == "pkl":  # one split at a time: the largest needs 0.8 GB of memory
            return lambda split: unpack.mini_cache(source, split, classes[split])
        if kind == "csv":
            found = unpack.csv_lists(source, classes)
        else:
            unpack.check_level(source, names, (*caches, *lists))
            found = unpack.class_folders(source, names, skipped)
        return lambda split: found

    convert(out, classes, {"dataset": "miniimagenet", "source": kind, "size": size}, read)
    write_skipped(out, skipped)


def convert(
    out: Path,
    classes: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    read: Callable[[], Callable[[str], ImagesByClass]],
) -> None:
    """Write <out>/<split>/<class>/00000.png and so on for all `classes` (split -> names), and print a summary.

    settings: the source of the images, saved in <out>/prepared.json so that no folder mixes two sources; its `size` is
        the side of the images in pixels.
    read: called if a class is incomplete; checks the source and returns a function from a split to its images.
    Raises ValueError if `out` holds anything else, or as `read` does.
    """
    _check_out(out, classes, settings)
    todo = {split: [n for n in names if not _is_complete(out / split / n)] for split, names in classes.items()}
    if any(todo.values()):
        images_of = read()
        for split in filter(todo.get, todo):
            _write_split(out, split, todo[split], images_of, settings)
    for split, names in classes.items():
        print(f"{out / split}: {len(names)} classes of {published.PER_CLASS} images, {len(todo[split])} written now")


def _write_split(
    out: Path,
    split: str,
    names: Sequence[str],
    images_of: Callable[[str], ImagesByClass],
    settings: Mapping[str, Any],
) -> None:
    """Write the classes `names` of one split. A separate function, so that its arrays are freed before the next."""
    found = images_of(split)
    write_json(out / SETTINGS, settings)  # only now that the source is known to be good
    with ThreadPoolExecutor() as threads:
        for name in progress(names, desc=split, unit="class"):
            paths = [out / split / name / file for file in _file_names()]
            list(threads.map(partial(_write, size=settings["size"]), paths, found[name]))


def subsets(data_root: Path, classes_per_model: int, out: Path) -> None:
    """Print, and write to `out` as JSON, which classes of <data_root>/meta_train each model of a pool learns.

    The assignment is that of `guided_diffusion/image_train.py --pool`: class folders in sorted order, with
    `classes_per_model` for each model and the rest for the last. Raises ValueError if there are no classes.
    """
    if classes_per_model < 1:
        raise ValueError(f"got --classes_per_model {classes_per_model}, expected 1 or more")
    folder = data_root / "meta_train"
    holds = "make it with python -m datasets.prepare cifarfs, miniimagenet, glyphs or fontchars"
    if not folder.exists() and (near := place_with(data_root, "meta_train")):
        holds = f"give --data-root {near}, which has one"
    found, left_out = class_folders(
        folder, holds, lambda *_: f"move the folders in it up to {folder}, if they are the classes"
    )
    if not found:
        raise ValueError(f"{folder}: got no class folders, expected one folder of images per class")
    names = [path.name for path in found]
    left_out.say(folder)
    groups = [names[i : i + classes_per_model] for i in range(0, len(names), classes_per_model)]
    models = [
        {"path": f"subset{m}/ckpt/model.pt", "classes": group, "num_classes": len(group)}
        for m, group in enumerate(groups, 1)
    ]
    for m, group in enumerate(groups, 1):
        print(f"subset{m}: {', '.join(group)}")
    write_json(out, {"classes_per_model": classes_per_model, "models": models})
    print(f"{out}: {len(groups)} models of {len(names)} classes")


def _write(path: Path, source: ImageSource, size: int) -> None:
    """Write one image as a PNG with a side of `size` pixels, unless the file exists."""
    if path.exists() and path.stat().st_size:
        return
    if isinstance(source, Path):
        try:
            pixels = read_image(source, size).transpose(1, 2, 0)
        except ImageError as error:
            raise ValueError(f"{source}: is no readable image ({error}); put an intact one in its place") from error
        image = Image.fromarray(np.ascontiguousarray(pixels))
    else:
        image = Image.fromarray(np.ascontiguousarray(source))
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
    with atomic_file(path) as file:
        image.save(file, "png")


def _file_names() -> list[str]:
    return [f"{index:05d}.png" for index in range(published.PER_CLASS)]


def is_complete(out: Path, classes: Mapping[str, Sequence[str]]) -> bool:
    """Return whether `out` has every image of `classes` (split -> names)."""
    return all(_is_complete(out / split / name) for split, names in classes.items() for name in names)


def _is_complete(folder: Path) -> bool:
    return folder.is_dir() and set(_file_names()) <= {path.name for path in folder.iterdir() if path.stat().st_size}


def _check_out(out: Path, classes: Mapping[str, Sequence[str]], settings: Mapping[str, Any]) -> None:
    """Raise ValueError if `out` holds images that are not of `classes`, or made with other settings."""
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ValueError(f"{out}: got a file, expected a folder for the images; give another --out")
    made_from = out / SETTINGS
    got = read_json(made_from, dict, "it is written again; only the names of the images there are checked")
    if got not in (None, settings):
        raise ValueError(f"{made_from}: the images there are of {got}, now asked for {settings}; give another --out")
    for split, names in classes.items():
        _check_strange(out / split, names, set(_file_names()))


def _check_strange(
    folder: Path, names: Sequence[str], known: set[str], cure: str = "move what is strange away"
) -> None:
    """Raise ValueError if `folder`, of a split, holds anything but the classes `names` with the files `known`."""
    there = _visible(folder)
    strange = sorted(there - set(names)) + sorted(
        f"{name}/{file}" for name in there & set(names) for file in _visible(folder / name) - known
    )
    if strange:
        raise ValueError(
            f"{folder}: got {unpack.few(strange)}, expected only the {len(names)} classes with images "
            f"{min(known)} to {max(known)}; {cure} or give another --out"
        )


def _visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not is_leftover(path.name)} if folder.is_dir() else set()


def _require_folder(folder: Path, advice: str) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {advice}")


def _from_source(args: Namespace, make: Callable[[Path | None], None]) -> None:
    """Make a data set from the source that --from names. An archive is unpacked meanwhile."""
    if args.source is None:
        return make(None)
    with unpacked(args.source, args.out) as source:
        try:
            return make(source)
        except ValueError as error:
            raise ValueError(str(error).replace(str(source), str(args.source))) from error


def main() -> None:
    """Parse the flags and prepare the data set that they name."""
    parser = OneLineParser(description="Prepare image folders.")
    what = parser.add_subparsers(dest="what", required=True)

    flags = what.add_parser("glyphs", help="the set that the program draws")
    flags.add_argument("--out", type=Path, default=Path("data/glyphs"), help="root folder (default data/glyphs)")
    flags.add_argument("--per-class", type=int, default=600, help="images per class (default 600)")
    flags.add_argument("--splits", nargs="+", default=list(SPLIT_CLASSES), choices=list(SPLIT_CLASSES))
    flags.add_argument("--seed", type=int, default=0)
    flags.set_defaults(do=lambda args: glyphs(args.out, args.per_class, args.splits, args.seed))

    flags = what.add_parser("fontchars", help="the set of real characters that ships")
    flags.add_argument("--out", type=Path, default=Path("data/fontchars"), help="root folder (default data/fontchars)")
    flags.add_argument("--splits", nargs="+", default=list(embedded.SPLITS), choices=list(embedded.SPLITS))
    flags.set_defaults(do=lambda args: fontchars(args.out, args.splits))

    flags = what.add_parser("fonts", help="characters of your own fonts, one folder per character")
    flags.add_argument(
        "--from", dest="source", type=Path, metavar="DIR", required=True, help="folder with .ttf, .otf, .woff or .woff2"
    )
    flags.add_argument("--out", type=Path, required=True, help="folder for the class folders")
    flags.add_argument(
        "--characters", default=drawing.CHARACTERS, help="all that are to be drawn, in one word (default: as fontchars)"
    )
    flags.set_defaults(do=lambda args: fonts(args.source, args.out, args.characters))

    flags = what.add_parser("cifarfs", help="CIFAR-FS, from CIFAR-100")
    flags.add_argument("--out", type=Path, default=Path("data/cifarfs"), help="root folder (default data/cifarfs)")
    flags.add_argument(
        "--from", dest="source", type=Path, metavar="DIR", help="a copy, also packed; without it, it is downloaded"
    )
    flags.set_defaults(do=lambda args: _from_source(args, lambda source: cifarfs(args.out, source)))

    flags = what.add_parser("miniimagenet", help="miniImageNet, from a copy on disk")
    flags.add_argument(
        "--out", type=Path, default=Path("data/miniimagenet"), help="root folder (default data/miniimagenet)"
    )
    flags.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        required=True,
        help="csv and images, .pkl, or class folders, also packed",
    )
    flags.add_argument("--size", type=int, default=MINI_SIDE, help="pixels a side (default 84, what the .pkl have)")
    flags.set_defaults(do=lambda args: _from_source(args, lambda source: miniimagenet(args.out, source, args.size)))

    flags = what.add_parser("subsets", help="which classes each model of a pool learns")
    flags.add_argument("--data-root", type=Path, required=True, help="root folder, with meta_train")
    flags.add_argument("--classes_per_model", type=int, default=5, help="classes per model (default 5)")
    flags.add_argument("--out", type=Path, help="the JSON file (default <data-root>/subsets.json)")
    flags.set_defaults(
        do=lambda args: subsets(args.data_root, args.classes_per_model, args.out or args.data_root / "subsets.json")
    )
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    run(main)
