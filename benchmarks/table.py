"""Make the rows of a result table, over training seeds and shots, for RESULTS.md and results.csv.

    python -m benchmarks.table                                  # glyphs, seeds 1 to 5
    python -m benchmarks.table --small --dataset custom --data-root data/mine --pool ckpt/pools/mine

For every row and seed, it runs `main.py` once and `diffusionmix.py` once per shot. All rows of a seed are tested on the
same episodes. Runs stay in --folder, so a killed command resumes. With --publish, the accuracy of every episode is also
saved in benchmarks/kept/DATASET.jsonl, and RESULTS.md is written from all results there, so that seeds and rows can be
added on another machine, with the same settings. Other flags go to `main.py`, flags after --test to `diffusionmix.py`.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from config import BARE, RECIPES, SCENARIOS, Settings, check_same, flag_of, parse, that_affect
from utils.atomic import atomic_file
from utils.cli import run as run_command
from utils.environment import commit, hardware
from utils.metrics import gap_closed, over_seeds
from utils.run_log import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks"  # folder of RESULTS.md and results.csv
# Settings of the clusters recipe that the paper's row uses too: at its own rate it falls to chance on whole maps.
SAME = {"features", "optim", "lr", "weight_decay"}
PUBLISHED = [  # flags that undo the rest of that recipe; given last, so that they override the flags of the other rows
    word
    for f in fields(Settings)
    if f.name in RECIPES["clusters"]
    for word in (flag_of(f), str(RECIPES["clusters"][f.name] if f.name in SAME else f.default))
]
RUNS = {  # folder of a run -> its flags for main.py
    "none": ("--source", "none"),
    "by_model": ("--source", "by_model"),
    "unguided": ("--source", "unguided"),
    "paper": ("--source", "guided", "--recipe", "paper", *PUBLISHED),
    "guided": ("--source", "guided"),
    "real": ("--source", "real"),
}
FLOOR, BY_MODEL, UNGUIDED, PAPER, GUIDED, MIX, REAL = (
    "floor (random weights)", "unguided, by model", "unguided", "the paper's recipe, mended", "guided", "guided + mix",
    "real reference",
)  # fmt: skip
ROWS = {  # name -> run, with or without mixes
    FLOOR: ("none", False),
    BY_MODEL: ("by_model", False),
    UNGUIDED: ("unguided", False),
    PAPER: ("paper", False),
    GUIDED: ("guided", False),
    MIX: ("guided", True),
    REAL: ("real", False),
}
AGAINST = {  # row -> the row it is compared with
    BY_MODEL: FLOOR, UNGUIDED: FLOOR, PAPER: UNGUIDED, GUIDED: UNGUIDED, MIX: GUIDED, REAL: FLOOR,
}  # fmt: skip
INTERVALS = (
    "Behind each figure stands half of its 95 % interval over episodes, then over training seeds (Student t). A claim "
    "about a method needs the second; `?`: one seed, or not kept."
)
TESTED = ("dataset", "data_root", "pool", "height", "width", "nKnovel", "nTestNovel", "mix_steps", "mix_level",
          "sample_batch", "precision", "device", *BARE)  # fmt: skip
KEPT = ("dataset", "split", "way", "torch", "hardware", "commit", "training_seconds", "flags", "trained_with",
        "trained_shot", "images", "pool_digest")  # fmt: skip
OWN = (
    "--source --save-dir --seed --nExemplars --shot --dry-run --resume --mix --support --query --out --compare".split()
)
VARY = {"seed", "nExemplars", "mix", "sample_batch"}  # may differ between the rows, seeds and shots of a table
SMALL = {k: v for k, v in SCENARIOS["glyphs"].defaults.items() if k not in ("image_size", "flip")}


@dataclass(frozen=True)
class Row:
    """One line of results.csv: a row of the table at one shot. Accuracies in percent, over all episodes of all seeds.

    ci95, difference_ci95, closed_ci95: half of the 95 % interval over episodes, for these trained networks only.
    seeds_ci95, difference_seeds_ci95, closed_seeds_ci95: half of the Student-t interval of the means over training
        seeds. Empty with one seed. A claim about a method needs this one.
    against, difference: the row that this one is compared with, and the difference, paired by episode; empty if that
        row was not run.
    closed: share of the gap from the floor to the real reference, in percent; empty if either was not run.
    seconds: mean seconds of a training. by_seed: accuracy of each seed, separated by spaces.
    """

    dataset: str
    shot: int
    row: str
    accuracy: float
    ci95: float
    difference: float | str
    difference_ci95: float | str
    closed: float | str
    seconds: float
    seeds: int
    episodes: int
    split: str
    hardware: str
    torch: str
    commit: str
    by_seed: str = ""
    seeds_ci95: float | str = ""
    against: str = ""
    difference_seeds_ci95: float | str = ""
    closed_ci95: float | str = ""
    closed_seeds_ci95: float | str = ""
    way: int | str = 5


Results = dict[tuple[int, str, int], dict]  # (seed, run, shot) -> results of a test, with their origin


def run_all(
    folder: Path, seeds: list[int], shots: list[int], runs: list[str], train: list[str], test: list[str],
    mix_shots: list[int] | None = None,
) -> Results:  # fmt: skip
    """Train and test what is missing in <folder>/seed<k>/<run>, and return the results.

    runs: keys of RUNS. shots: `main.py` runs once, with the first of them; tests of n shots are in
    <folder>/seed<k>/<run>/<n>-shot. mix_shots: the shots to test with mixes; None: all.
    """
    results, trained = {}, {"trained_with": train, "trained_shot": shots[0]}
    resolved = for_testing(train, test)
    for seed in seeds:
        for name in runs:
            run = folder / f"seed{seed}" / name
            print(f"\n== seed {seed}, {name}", flush=True)
            own = ["--save-dir", str(run), "--seed", str(seed), "--nExemplars", str(shots[0])]
            call("main.py", *train, *RUNS[name], *own)  # quick if it is done; refuses changed settings
            for shot in shots:
                mix = mix_shots is None or shot in mix_shots
                mix = mix and any(ROWS[row] == (name, True) for row in ROWS)
                flags = [*resolved, "--nExemplars", str(shot), "--seed", str(seed), "--mix", str(mix)]
                results[seed, name, shot] = _tested(run, shot, flags) | trained
    check_contents(results.values())
    return results


def keep(results: Results, path: Path) -> Results:
    """Add results to the file `path`, one line each, and return all results in it.

    Raises ValueError, as `read_kept` does, for results that a table cannot mix with those in the file.
    """
    kept = read_kept(path, next(iter(results.values())))
    for (seed, run, shot), one in results.items():
        short = {name: one.get(name) for name in KEPT} | {"seed": seed, "run": run, "shot": shot}
        for name in ("by_episode", "by_episode_without_mix"):
            short[name] = [round(value, 2) for value in one[name]]
        kept[seed, run, shot] = short
    check_contents(kept.values())
    text = "".join(json.dumps(kept[key]) + "\n" for key in sorted(kept))
    with atomic_file(path) as file:
        file.write(text.encode())
    return kept


def read_kept(path: Path, new: Mapping[str, Any]) -> Results:
    """Return the results in the file `path`; none if it is missing.

    new: a result with trained_with, trained_shot and flags, made with the settings that all must have.
    Raises ValueError if a line has other settings.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    kept, here = [json.loads(line) for line in lines], settings_of(new)
    for one in kept:
        there = settings_of(one)
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if other := [f"{name} {there.get(name)!r} (got {here.get(name)!r})" for name in names]:
            raise ValueError(f"{path}: was made with {', '.join(other)}; give the same settings, or move the file away")
    return {(one["seed"], one["run"], one["shot"]): one for one in kept}


def settings_of(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a result that must be the same in all rows, seeds and shots of a table."""
    aside = VARY | that_affect("nothing")
    trained = parse(one["trained_with"], description="table").as_dict()
    tested = {k.strip("-").replace("-", "_"): v for k, v in one["flags"].items()}
    return (
        {k: v for k, v in trained.items() if k in that_affect("training", "both") - aside}
        | {f"{k} of tests": v for k, v in tested.items() if k not in aside}
        | {"shot of training": one.get("trained_shot") or 1}
    )


def check_contents(results: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if results are of different test images or pools. Those of an older version do not say which."""
    results = list(results)
    for name, what in (("images", "test images"), ("pool_digest", "pools")):
        if len({one.get(name) for one in results} - {None}) > 1:
            raise ValueError(
                f"got results of different {what}, which do not compare; restore them, or give another --folder and "
                "move the kept results away"
            )


def rows_of(results: Results) -> list[Row]:
    """Return the rows, shot by shot, each over all its seeds."""
    return [row for shot in sorted({key[2] for key in results}) for row in _rows_of(results, shot)]


def _tested(run: Path, shot: int, flags: list[str]) -> dict:
    """Return the results of a run at one shot, with training seconds and machine. Run the test if they are missing."""
    place, weights = run / f"{shot}-shot", run / "best_model.pt"
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    notes, results = ROOT / place / "made.json", ROOT / place / "results.json"
    if not results.exists() or results.stat().st_mtime < (ROOT / weights).stat().st_mtime:
        call("diffusionmix.py", *flags, "--resume", str(weights), "--save-dir", str(place))
        device = json.loads(results.read_text(encoding="utf-8"))["device"]
        write_json(notes, {"flags": given, "hardware": hardware(device), "commit": commit()})
    made = json.loads(notes.read_text(encoding="utf-8"))
    check_same(results, dict.fromkeys(given) | made["flags"], given, set())
    contents = (read_json(ROOT / run / "config.json", dict) or {}).get("contents", {})
    return {
        **made,
        "pool_digest": contents.get("pool"),  # None for a run that draws nothing
        **json.loads(results.read_text(encoding="utf-8")),
        "training_seconds": _training_seconds(ROOT / run / "metrics.jsonl"),
    }


def _rows_of(results: Results, shot: int) -> list[Row]:
    values = {}  # row -> seed -> accuracies of the episodes
    for name, (run, mixed) in ROWS.items():
        key = "by_episode" if mixed else "by_episode_without_mix"
        found = {
            seed: np.array(one[key], float)
            for (seed, r, n), one in results.items()
            if (r, n) == (run, shot) and (not mixed or one["flags"]["--mix"] == "True")
        }
        if found:
            values[name] = found
    rows = []
    for name, own in values.items():
        made = [results[seed, ROWS[name][0], shot] for seed in own]
        accuracy, ci95, seeds_ci95 = over_seeds(_common(own)[0])
        other = AGAINST.get(name, "") if own.keys() & values.get(AGAINST.get(name), {}).keys() else ""
        difference = over_seeds(np.subtract(*_common(own, values[other]))) if other else ("", "", "")
        gap = [values[FLOOR], values[REAL]] if {FLOOR, REAL} <= values.keys() else []
        rows.append(
            Row(
                made[0]["dataset"],
                shot,
                name,
                accuracy,
                ci95,
                *difference[:2],
                **_closed(*_common(own, *gap)) if gap and own.keys() & gap[0].keys() & gap[1].keys() else NOT_CLOSED,
                seconds=sum(one["training_seconds"] for one in made) / len(made),
                seeds=len(own),
                episodes=sum(map(len, own.values())),
                split=made[0]["split"],
                torch=made[0]["torch"],
                hardware=" / ".join(dict.fromkeys(one["hardware"] for one in made)),
                commit=" / ".join(dict.fromkeys(one["commit"] for one in made)),
                by_seed=" ".join(f"{each.mean():.2f}" for each in own.values()),
                seeds_ci95=seeds_ci95,
                against=other,
                difference_seeds_ci95=difference[2],
                way=made[0].get("way") or 5,
            )  # fmt: skip
        )
    return rows


def _common(*rows: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Return the accuracies (seeds, episodes) of each row, over the seeds that all rows have."""
    seeds = sorted(set.intersection(*(set(row) for row in rows)))
    return [np.stack([row[seed] for seed in seeds]) for row in rows]


NOT_CLOSED = dict.fromkeys(("closed", "closed_ci95", "closed_seeds_ci95"), "")


def _closed(own: np.ndarray, floor: np.ndarray, real: np.ndarray) -> dict[str, float | str]:
    """Return the share of the gap that is closed, in percent, with its half-widths over episodes and over seeds.

    own, floor, real: (seeds, episodes), accuracies on the same episodes. All values are "" if there is no gap.
    """
    gained, gap = own - floor, real - floor
    if gap.mean() <= 0:
        return NOT_CLOSED
    return dict(zip(NOT_CLOSED, gap_closed(gained, gap), strict=True))


def as_text(rows: list[Row]) -> str:
    """Return the table in Markdown. After each figure come its 95 % intervals over episodes and over training seeds."""
    lines = [
        "| shot | row | accuracy % | against | gap closed % | training s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        change = figure(r.difference, r.difference_ci95, r.difference_seeds_ci95, "+.2f")
        named = f"{change} ({r.against or 'the row above'})" if change else ""
        lines.append(
            f"| {r.shot} | {r.row} | {figure(r.accuracy, r.ci95, r.seeds_ci95, '.2f')} | {named} "
            f"| {figure(r.closed, r.closed_ci95, r.closed_seeds_ci95, '.0f')} | {float(r.seconds):.0f} |"
        )
    return "\n".join(lines)


def figure(value: float | str, ci95: float | str, seeds_ci95: float | str, form: str) -> str:
    """Return a figure as text, with its half-widths over episodes and over seeds if known; "" for no figure."""
    if value == "":
        return ""
    width = form.strip("+")
    halves = [" ± " + (f"{float(half):{width}}" if half != "" else "?") for half in (ci95, seeds_ci95)]
    return f"{float(value):{form}}" + "".join(halves if halves != [" ± ?"] * 2 else [])


def publish(rows: list[Row], folder: Path) -> None:
    """Replace the rows of this data set in <folder>/results.csv, and write RESULTS.md from the file."""
    path, names = folder / "results.csv", [f.name for f in fields(Row)]
    kept = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            kept = [Row(**line) for line in csv.DictReader(file) if line["dataset"] != rows[0].dataset]
    rows = sorted([*kept, *rows], key=lambda r: r.dataset)  # stable: rows of a data set stay in order
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, names, lineterminator="\n")
    lines.writeheader()
    lines.writerows(asdict(r) for r in rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
    parts = ["# Results", "", f"Made by `python -m benchmarks.table`. {INTERVALS}", ""]
    for dataset in dict.fromkeys(r.dataset for r in rows):
        own = [r for r in rows if r.dataset == dataset]
        r, each = own[0], int(own[0].episodes) // int(own[0].seeds)
        machines = "; ".join(dict.fromkeys(one for row in own for one in row.hardware.split(" / ")))
        commits = ", ".join(dict.fromkeys(one for row in own for one in row.commit.split(" / ")))
        parts += [
            f"## {dataset}, {r.split}, {r.way}-way",
            "",
            f"{_seeds(own)}, {each} episodes each. {machines}; torch {r.torch}; commit {commits}.",
            "",
            as_text(own),
            "",
        ]
    with atomic_file(folder / "RESULTS.md") as file:
        file.write("\n".join(parts).encode())


def _seeds(rows: list[Row]) -> str:
    """Return the number of training seeds as text, and name the rows that have fewer."""
    most = max(int(row.seeds) for row in rows)
    fewer = ", ".join(sorted({f"{row.row}: {row.seeds}" for row in rows if int(row.seeds) < most}))
    return f"{most} training seed{'s' * (most != 1)}" + f" ({fewer})" * bool(fewer)


def main() -> None:
    """Parse the flags, make the rows, and print them."""
    parser = argparse.ArgumentParser(
        description="The rows of a result table, over seeds and shots.", allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, help="of the runs (default ckpt/runs/table/DATASET)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="the first is that of training")
    parser.add_argument(
        "--mix-shots", type=int, nargs="*", help="shots with a row of mixes, which cost most (default all)"
    )
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), help="rows to make (default all)")
    parser.add_argument("--small", action="store_true", help="train at the sizes of glyphs, for a CPU")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/RESULTS.md and results.csv")
    parser.add_argument("--test", nargs=argparse.REMAINDER, default=[], help="flags of diffusionmix.py, at the end")
    args, train = parser.parse_known_args()
    if args.small:
        train = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))] + train
    settings = parse(train, description="table")
    if taken := flags_among([*train, *args.test], OWN):
        raise ValueError(
            f"got {taken[0]}, which the table sets itself; leave it out, or see --seeds, --shots, --mix-shots"
        )
    runs = [name for name in RUNS if name in args.runs]
    if settings.recipe == "paper":  # then these equal the rows "guided" and "unguided"
        runs = [name for name in runs if name not in ("paper", "by_model")]
    if not runs:
        raise ValueError(
            f"got --runs {' '.join(args.runs)} with --recipe paper, where these are the row guided; name it"
        )
    for name in runs:  # refuse wrong flags before hours of work
        parse([*train, *RUNS[name], *args.test], description="table")
    dataset, folder = settings.dataset, args.folder or Path("ckpt/runs/table") / settings.dataset
    if dataset == "custom":  # use the folder's name, which says more
        dataset = "+".join(path.resolve().name for path in settings.data_paths)
        if args.publish and dataset in SCENARIOS.keys() - {"custom"}:
            raise ValueError(
                f"got the folder {dataset}, where a data set has that name; rename it, or leave --publish out"
            )
    path, words = RESULTS / "kept" / f"{dataset}.jsonl", for_testing(train, args.test)
    if args.publish:
        flags = dict(zip(words[::2], words[1::2], strict=True))
        read_kept(path, {"trained_with": train, "trained_shot": args.shots[0], "flags": flags})
    results = run_all(folder, args.seeds, args.shots, runs, train, args.test, args.mix_shots)
    results = {key: one | {"dataset": dataset} for key, one in results.items()}
    if args.publish:
        results = keep(results, path)
    rows = rows_of(results)
    if args.publish:
        publish(rows, RESULTS)
    print(f"\n{rows[0].seeds} seed(s), {rows[0].episodes} episodes in all. {INTERVALS}\n\n{as_text(rows)}")


def for_testing(train: list[str], test: list[str]) -> list[str]:
    """Return the flags of `diffusionmix.py`: the training flags that it needs too, and all that `test` changes."""
    trained, s = (parse(words, description="table") for words in (train, [*train, *test]))
    changed = [f.name for f in fields(s) if f.name not in TESTED and getattr(s, f.name) != getattr(trained, f.name)]
    return [word for name in (*TESTED, *changed) for word in (f"--{name}", str(getattr(s, name)))]


def _training_seconds(path: Path) -> float:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {line["epoch"]: line for line in lines}  # an epoch that was repeated after a kill counts once
    return sum(line.get("seconds", 0) + line.get("synthesis_seconds", 0) for line in last.values())


def flags_among(words: Sequence[str], own: Collection[str]) -> list[str]:
    """Return the words of a command line that give a flag of `own`, also as --flag=value or with underscores."""
    return [word for word in words if word.partition("=")[0].replace("_", "-") in own]


def call(script: str, *flags: str) -> None:
    """Run a script of the project. Exit with its status if it fails."""
    execute(sys.executable, str(ROOT / script), *flags)


def execute(*words: str) -> None:
    """Run a command in the top folder. Exit with its status if it fails."""
    done = subprocess.run(words, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    run_command(main)
