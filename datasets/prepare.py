"""Turn what there is into the folder layout `<root>/{meta_train,meta_val,meta_test}/<class>/*.png`.

python -m datasets.prepare glyphs --out data/glyphs --per-class 600
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from datasets.glyphs import SPLIT_CLASSES, make_split
from utils.cli import OneLineParser, run


def glyphs(out: Path, per_class: int, splits: list[str], seed: int) -> None:
    """Draw glyphs into `out`, `per_class` images a class of each split; images that are there are kept."""
    for split in splits:
        data = make_split(split, per_class, seed=seed)
        paths = [out / split / name / f"{index:05d}.png" for name in data.class_names for index in range(per_class)]
        for name in data.class_names:
            (out / split / name).mkdir(parents=True, exist_ok=True)
        pixels = data.images.permute(0, 2, 3, 1).numpy()

        def write(item) -> None:
            path, picture = item
            if not path.exists():
                Image.fromarray(picture).save(path)

        with ThreadPoolExecutor() as threads:
            list(threads.map(write, zip(paths, pixels, strict=True)))
        print(f"{out / split}: {len(data.class_names)} classes of {per_class} images")


def main() -> None:
    """Parse and do."""
    parser = OneLineParser(description="Prepare image folders.")
    what = parser.add_subparsers(dest="what", required=True)
    flags = what.add_parser("glyphs", help="the set that the program draws")
    flags.add_argument("--out", type=Path, default=Path("data/glyphs"), help="root folder (default data/glyphs)")
    flags.add_argument("--per-class", type=int, default=600, help="images a class (default 600)")
    flags.add_argument("--splits", nargs="+", default=list(SPLIT_CLASSES), choices=list(SPLIT_CLASSES))
    flags.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    glyphs(args.out, args.per_class, args.splits, args.seed)


if __name__ == "__main__":
    run(main)
