"""Reproduce a row of the paper's table: data, pool, meta-training, tests at 1 and 5 shots, beside published figures.

    python -m benchmarks.paper --scenario un_cifarfs --data path/to/cifar100 --gpus 4
    python -m benchmarks.paper --scenario cifar_mini --data path/to/cifar100,path/to/miniimagenet --seeds 1 2 3
    python -m benchmarks.paper --scenario un_cifarfs --print sbatch         # prints the commands and runs nothing

Run it in the top folder. Data sets are in data/, pools in ckpt/pools/, everything else in --folder. To resume, run the
same command again. Other flags go to `main.py` and `diffusionmix.py`, flags after --test only to `diffusionmix.py`, and
flags after --pretrain to `image_train.py`. published.json has the published figures, each with its source.
"""

import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import PAPER
from benchmarks.table import INTERVALS, ROOT, execute, figure, flags_among
from config import SCENARIOS, parse
from datasets import prepare, published
from guided_diffusion import train_flags
from report import write
from report.comparison import results as compared
from report.folder import Run
from report.page import element, page, section, table
from utils.cli import OneLineParser, run
from utils.metrics import over_seeds
from utils.run_log import read_json, write_json

NAMES = [name for name, scenario in SCENARIOS.items() if {*scenario.images} <= {"cifarfs", "miniimagenet"}]
SHOTS = (1, 5)  # shots of the tests; one training serves both, as in benchmarks.table
TESTED_ALIKE = (  # what all tests of a table share
    "split", "way", "query", "episodes", "images", "pool_models", "mix_steps", "mix_level", "pool", "head_steps",
    "head_init", "head_scale",
)  # fmt: skip
PER_MODEL = 5  # classes per pool model; with 64 classes, the last of 13 models has 4
NETWORK = [word for name, value in PAPER.items() for word in (f"--{name}", str(value))] + ["--random_flip", "True"]
OWN = (
    "-d --dataset --data-root --pool --source --save-dir --resume --seed --nExemplars --shot "
    "--dry-run --support --query --out --compare"
).split()  # set here
FREE = {"cifarfs"}  # data sets that can be downloaded
TASK = "@TASK@"  # placeholder for a task number in an array job
FIGURES = Path(__file__).with_name("published.json")
TOLD = f"{INTERVALS} Published figures have the interval of their source."
HEAD = ("method", "1 shot, %", "5 shots, %", "source")
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


class Step(NamedTuple):
    """A command. words: as typed in the top folder; makes: a file or folder that exists once it has finished."""

    words: list[str]
    makes: Path

    @property
    def line(self) -> str:
        """The command as a shell line."""
        return shlex.join(self.words)


def classes_of(domain: str) -> dict[str, tuple[str, ...]]:
    """Return the published classes of a data set, by split."""
    return {"cifarfs": published.CIFARFS, "miniimagenet": published.MINIIMAGENET}[domain]


def models(domain: str) -> int:
    """Return the number of models in the pool of a data set."""
    return -(-len(classes_of(domain)["meta_train"]) // PER_MODEL)


def plan(a: Namespace, array: bool = False) -> dict[str, list[Step]]:
    """Return the steps of each stage, in order. array: one step stands for all models of a pool, or for all seeds."""
    many = ["torchrun", "--standalone", "--nproc_per_node", str(a.gpus)] if a.gpus > 1 else ["python"]
    condition, joined, before = "co" if a.scenario.startswith("co_") else "un", f"ckpt/pools/{a.scenario}", 0
    stages = {stage: [] for stage in ("data", "pool", "train", "test", "table")}
    for domain, source in a.data.items():
        pool = f"ckpt/pools/{condition}_{domain}"
        words = ["python", "-m", "datasets.prepare", domain, "--out", f"data/{domain}"]
        if source or domain in FREE:
            stages["data"].append(Step([*words, *(["--from", source] if source else [])], Path("data", domain)))
        if pool != joined:  # link each model, so that other scenarios can use the pools of both data sets too
            link = f"{joined}/subset$((m + {before}))"
            each = f"[ -d {link} ] || ln -sfn ../{Path(pool).name}/subset$m {link}"
            words = ["sh", "-c", f"mkdir -p {joined} && for m in $(seq {models(domain)}); do {each}; done"]
            stages["data"].append(Step(words, Path(joined, f"subset{before + 1}")))
            before += models(domain)
        words = ["guided_diffusion/image_train.py", "--data_dir", f"data/{domain}/meta_train", "--pool", pool]
        words += ["--classes_per_model", str(PER_MODEL), *NETWORK, *["--class_cond", "True"] * (condition == "co")]
        start, share = (["python"], ["--subsets", TASK]) if array else (many, [])
        stages["pool"].append(Step([*start, *words, *a.pretrain, *share], Path(pool, "pool.json")))
    for seed in [TASK] if array else a.seeds:
        folder, given = a.folder / f"seed{seed}", ["--dataset", a.scenario, "--seed", str(seed)]
        weights = folder / "best_model.pt"
        stages["train"].append(Step([*many, "main.py", *given, "--save-dir", str(folder), *a.train], weights))
        for shot in SHOTS:
            words = ["--nExemplars", str(shot), "--resume", str(weights), "--save-dir", str(folder / f"{shot}-shot")]
            words = [*many, "diffusionmix.py", *given, *words, *a.train, *a.test]
            stages["test"].append(Step(words, folder / f"{shot}-shot" / "results.json"))
    words = ["python", "-m", "benchmarks.paper", "--scenario", a.scenario, "--folder", str(a.folder), "--table"]
    stages["table"].append(Step([*words, "--seeds", *map(str, a.seeds)], a.folder / "paper.html"))
    return stages


def sbatch(a: Namespace) -> list[str]:
    """Return the lines that submit the jobs: arrays of pool models and of seeds, each after the jobs it depends on."""
    stages, lines = plan(a, array=True), []
    seeds = f"--array={','.join(map(str, a.seeds))} --gpus-per-node={a.gpus} "

    def submit(name: str, options: str, steps: list[Step], known: str = "") -> None:
        wrap = " && ".join(step.line for step in steps).replace(TASK, "$SLURM_ARRAY_TASK_ID") or "true"
        lines.append(
            f"{name}={known}$(sbatch --parsable --job-name={a.scenario}-{name} {options}--wrap {shlex.quote(wrap)})"
        )

    submit("data", "", stages["data"])
    for domain, step in zip(a.data, stages["pool"], strict=True):
        options = f"--dependency=afterok:$data --array=1-{models(domain)} --gpus-per-node=1 "
        submit("pool", options, [step], "$pool:" * (len(lines) > 1))
    submit("train", f"--dependency=afterok:$pool {seeds}", stages["train"])
    submit("test", f"--dependency=aftercorr:$train {seeds}", stages["test"])
    submit("table", "--dependency=afterok:$test ", stages["table"])
    return lines


def run_all(a: Namespace) -> None:
    """Run the steps that are not done, and exit with the status of a step that fails.

    done.json notes for each file or folder the command that made it last, after the commands that made its pool.
    Raises ValueError if a seed was trained on a pool that other commands made, which `main.py` would refuse much later.
    """
    stages, notes = plan(a), ROOT / a.folder / "done.json"
    del stages["table"]
    made_pools, finished = [pool.line for pool in stages["pool"]], read_json(notes, dict) or {}
    for step in stages["train"]:
        before = finished.get(str(step.makes), [])[:-1]
        if before and before != made_pools and os.path.lexists(ROOT / step.makes):
            raise ValueError(
                f"{step.makes.parent}: was trained on the pool of {'; '.join(before)}; give the same flags after "
                "--pretrain, or another --folder"
            )
    for stage, steps in stages.items():
        pools = made_pools if stage in ("train", "test") else []
        for step in steps:
            done, made_by = read_json(notes, dict, "its steps are run again") or {}, [*pools, step.line]
            data = step.makes.parts[0] == "data" and prepare.is_complete(ROOT / step.makes, classes_of(step.makes.name))
            if data or (done.get(str(step.makes)) == made_by and os.path.lexists(ROOT / step.makes)):
                print(f"\n{step.makes}: is there", flush=True)
                continue
            print(f"\n$ {step.line}", flush=True)
            if done.pop(str(step.makes), None):  # a command that is cut leaves what neither made
                write_json(notes, done)
            call(step.words)
            write_json(notes, done | {str(step.makes): made_by})


def call(words: list[str]) -> None:
    """Run a command in the top folder. Exit with its status if it fails."""
    execute(*PROGRAMS.get(words[0], words[:1]), *words[1:])


def rows_of(a: Namespace) -> list[tuple[str, ...]]:
    """Return the table's rows under `HEAD`: ours, then the published ones. Accuracies are in percent."""
    found = {}
    for shot in SHOTS:
        paths = [ROOT / a.folder / f"seed{seed}" / f"{shot}-shot" / "results.json" for seed in a.seeds]
        found[shot] = [read_json(path, dict) for path in paths]
        if None in found[shot]:
            raise ValueError(f"{paths[found[shot].index(None)]}: no results; give the command without --table")
    for name in TESTED_ALIKE:
        if len(values := {str(each.get(name)) for shot in SHOTS for each in found[shot]}) > 1:
            raise ValueError(
                f"{a.folder}: got tests of {name} {' and '.join(f'{v:.14}' for v in sorted(values))}; delete the "
                "N-shot folders of the tests you do not want, then run the command without --table"
            )
    way, split, rows = found[1][0]["way"], found[1][0].get("split", "meta_test"), []
    seeds = " ".join(map(str, a.seeds))
    kinds = [("ours, with mixes", "by_episode"), ("ours, without mixes", "by_episode_without_mix")]
    mixed = all(each.get("pool_models", 1) for shot in SHOTS for each in found[shot])
    for name, key in kinds if mixed else kinds[1:]:
        cells = (figure(*over_seeds([each[key] for each in found[shot]]), ".2f") for shot in SHOTS)
        rows.append((name, *cells, f"{way}-way, {split}, seeds {seeds}, {a.folder}"))
    known: dict[tuple[str, str], dict[int, str]] = {}
    for each in (read_json(FIGURES, dict, "no figures are taken") or {}).get(a.scenario, []):
        key = (each["method"], f"{each['paper']}, {each['table']}, {each['url']}")
        half = "" if each["interval"] is None else f" ± {each['interval']}"
        known.setdefault(key, {})[each["shot"]] = f"{each['accuracy']}{half}"
    return rows + [(name, *(one.get(shot, "") for shot in SHOTS), source) for (name, source), one in known.items()]


def show(a: Namespace) -> None:
    """Print the table and write paper.html."""
    rows, title, out = rows_of(a), a.scenario, a.folder / "paper.html"
    none = f"no published figure on file; add one to benchmarks/{FIGURES.name}" if len(rows) == 2 else ""
    print("", f"{title}. {TOLD}", "", sep="\n")
    print(*(f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *rows)), "", sep="\n")
    print(*filter(None, [none]), f"{out}", sep="\n")
    runs = {f"seed {seed}": Run.read(ROOT / a.folder / f"seed{seed}") for seed in a.seeds}
    beside = section("Ours and published", TOLD, table(HEAD, rows, class_="numbers"), element("p", none, class_="told"))
    write(page(title, element("h1", title), beside, *compared(runs)), ROOT / out)


def arguments(argv: list[str]) -> Namespace:
    """Return the settings of a command line. Raises ValueError for any setting that a later step would refuse."""
    parts, at = {None: [], "--pretrain": [], "--test": []}, None
    for word in argv:
        if word in parts:
            at = word
        else:
            parts[at].append(word)
    parser = OneLineParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", required=True, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--data", default="", help="CIFAR-100 ('': download it), or miniImageNet; of cifar_mini both, "
                        "with a comma between")  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, help="of a machine, a process for each (default 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of meta-training and tests (default 1)")
    parser.add_argument("--folder", type=Path, help="of the runs and the table (default ckpt/runs/paper/NAME)")
    parser.add_argument("--print", choices=("torchrun", "sbatch"), help="print the commands for one machine, or those "
                        "that submit jobs to Slurm, and stop")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only make the table, of the results that are there")
    a, a.train = parser.parse_known_args(parts[None])
    a.pretrain, a.test, a.folder = parts["--pretrain"], parts["--test"], a.folder or Path("ckpt/runs/paper", a.scenario)
    domains, sources = SCENARIOS[a.scenario].images, a.data.split(",")
    sources = sources * len(domains) if sources == [""] else sources
    if len(sources) != len(domains):
        raise ValueError(f"got --data {a.data}, expected the place of {' and, after a comma, that of '.join(domains)}")
    if a.gpus < 1:
        raise ValueError(f"got --gpus {a.gpus}, expected 1 or more")
    if taken := flags_among([*a.train, *a.test], OWN):
        raise ValueError(f"got {taken[0]}, which this command sets itself; leave it out, or see --seeds and --folder")
    parse(["--dataset", a.scenario, *a.train, *a.test], description="")
    train_flags.parse([*NETWORK, *a.pretrain])
    a.data = dict(zip(domains, sources, strict=True))
    for domain, source in a.data.items():
        if not (a.table or source or domain in FREE or prepare.is_complete(ROOT / "data" / domain, classes_of(domain))):
            raise ValueError(f"got no --data for {domain}, which cannot be downloaded; give the place of a copy")
    return a


def main() -> None:
    """Parse the flags, then print the commands, or run them and print the table."""
    a = arguments(sys.argv[1:])
    if a.print:
        return print(*(sbatch(a) if a.print == "sbatch" else (s.line for s in sum(plan(a).values(), []))), sep="\n")
    if not a.table:
        run_all(a)
    show(a)


if __name__ == "__main__":
    run(main)
