"""predictions.csv and its sheet: what is in them, what they must never take the place of, and where they cannot be."""

import csv
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffusionmix
from report import predictions
from report.page import page
from tests.test_few_shot import folders, pictures
from tests.test_report import Reader


@pytest.fixture
def label(call, trained, tmp_path, monkeypatch):
    """label(*flags): run the command without mixes on few/ and more/; returns its status and stderr."""
    monkeypatch.chdir(tmp_path)

    def go(*flags, query="more", support="few"):
        shared = ("--resume", trained / "best_model.pt", "--save-dir", "run", "--mix", "False", "--head-steps", 3)
        status, _, err = call(diffusionmix, "--support", support, "--query", query, *shared, "--device", "cpu", *flags)
        assert status == 0 or err.count("\n") == 1, err
        return status, err

    return go


@pytest.fixture
def few(tmp_path):
    """Two classes to learn from, and three pictures to label."""
    folders(tmp_path / "few", *pictures({"a": 2, "b": 2}))
    folders(tmp_path / "more", *pictures({".": 3}, seed=1))
    return tmp_path


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def snapshot(root):
    """Every file with its bytes, but for what a run keeps for itself."""
    files = [path for path in root.rglob("*") if path.is_file() and "run" not in path.relative_to(root).parts]
    return {str(path): path.read_bytes() for path in sorted(files)}


# ---- what is in them


def test_columns_of_probabilities_have_names_of_their_own(label, tmp_path):
    names = ["label", "path", "p_label", "a,b", 'say "x"', "two\nlines"]
    folders(tmp_path / "few", *pictures(dict.fromkeys(names, 1)))
    folders(tmp_path / "more", *pictures({".": 2}, seed=1))
    assert label()[0] == 0
    head, *rows = rows_of(tmp_path / "run" / "predictions.csv")
    known = sorted(name.replace("\n", "\\n") for name in names)
    assert head == ["path", "label", *(f"p_{name}" for name in known)] and len(set(head)) == len(head)
    for row in rows:
        values = np.array(row[2:], float)
        assert row[1] == known[int(values.argmax())] and abs(values.sum() - 1) < 1e-5


@pytest.mark.parametrize("start", ["=HYPERLINK(1)", "+1", "-1", "@x", "\t=1", "\r=1", "＝1", " =1"])
def test_no_cell_is_a_formula(label, tmp_path, start):
    folders(tmp_path / "few", *pictures({start: 1, f"{start}b": 1}))
    folders(tmp_path / "=more", *pictures({".": 2}, seed=1))
    (tmp_path / "=more" / "bad.png").write_text("no picture")
    assert label(query="=more")[0] == 0
    cells = [cell for row in rows_of(tmp_path / "run" / "predictions.csv")[1:] for cell in row[:2]]
    cells += [cell for row in rows_of(tmp_path / "run" / "skipped_images.csv")[1:] for cell in row]
    assert len(cells) == 6 and not any(cell.strip()[0] in "=+-@\t\r＝" for cell in cells)
    assert sum(cell.startswith("'=more/") for cell in cells) == 3
    assert label(query="=more")[0] == 0
    assert len(rows_of(tmp_path / "run" / "skipped_images.csv")) == 2  # the row is known again


def test_classes_that_would_be_shown_alike_are_refused(label, tmp_path):
    folders(tmp_path / "few", *pictures({"a\nb": 1, "a\\nb": 1}))
    folders(tmp_path / "more", *pictures({".": 1}, seed=1))
    status, err = label()
    assert status == 2 and "a\\nb" in err and not (tmp_path / "run").exists()


# ---- the page


def sections(text):
    """Each part of a page, with the texts on hover of its images."""
    return {part.text[0]: part.titles for part in map(Titles, text.split("<section>")[1:])}


class Titles(Reader):
    def __init__(self, text):
        self.titles = []
        super().__init__(text)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        self.titles += [dict(attrs)["title"] for _ in range(tag == "img")]


def test_the_page_shows_the_surest_the_least_sure_and_the_pairs():
    values = [[0.9, 0.1, 0], [0.5, 0.4, 0.1], [0.7, 0.3, 0], [0.1, 0.8, 0.1], [0.44, 0.45, 0.11]]
    images, support = (np.zeros((n, 3, 16, 16), np.uint8) for n in (5, 3))
    paths = [Path(f"more/{i}.png") for i in range(5)]
    told = sections(predictions.render(paths, images, ["a", "b", "c"], np.array(values), support, np.array([0, 0, 1])))
    assert [title.split(": ")[1] for title in told["a"]] == ["a", "a", *(f"more/{i}.png" for i in (0, 2, 1))]
    assert told["a"][2].startswith("a 90.0 %, b 10.0 %") and told["c"] == []
    assert [title.split(": ")[1] for title in told["b"]] == ["b", "more/3.png", "more/4.png"]
    between = told["Between two classes"]  # those whose second probability is half of the first or more
    assert [title.split(": ")[1] for title in between] == ["more/4.png", "more/1.png"]


def test_the_page_needs_nothing_and_text_is_no_markup(label, tmp_path):
    evil = "<b>&\"'"
    folders(tmp_path / "few", *pictures({evil: 2, "b": 2}))
    folders(tmp_path / "<i>more", *pictures({".": 5}, seed=1))
    assert label("--out", "out/x.csv", query="<i>more")[0] == 0
    read = Reader((tmp_path / "out" / "x.html").read_text())
    assert not {"b", "i", "script", "a"} & set(read.tags) and evil in read.headings
    assert all(name.startswith("data:image/") for name in read.named) and read.tags.count("img") >= 9


def test_the_path_of_the_page_is_printed_last(call, few, trained):
    flags = ("--resume", trained / "best_model.pt", "--save-dir", few / "run", "--mix", "False", "--head-steps", 3)
    own = ("--support", few / "few", "--query", few / "more", "--device", "cpu")
    assert call(diffusionmix, *own, *flags)[1].splitlines()[-1] == str(few / "run" / "predictions.html")
    assert call(diffusionmix, *own, *flags, "--quiet")[1].splitlines() == [str(few / "run" / "predictions.html")]


# ---- what they never take the place of

FOREIGN = {
    "picture beside it": ("out/cat.png", lambda path: Image.new("RGB", (9, 9)).save(path)),
    "picture of another program": ("out/cat.png", lambda path: save_with(path, "Another program")),
    "page": ("out/cat.html", lambda path: path.write_text("<!doctype html><p>mine</p>")),
    "report of a run": ("out/cat.html", lambda path: path.write_text(page("Run"))),
    "no picture": ("out/cat.png", lambda path: path.write_text("x")),
    "empty picture": ("out/cat.png", lambda path: path.write_bytes(b"")),
    "table": ("out/cat.csv", lambda path: path.write_text("path,label\nq/cat.png,cat\n")),
    "table of probabilities": ("out/cat.csv", lambda path: path.write_text("path,label,cat,dog\nq/cat.png,cat,1,0\n")),
    "no table": ("out/cat.csv", lambda path: zipfile.ZipFile(path, "w").close()),
    "empty table": ("out/cat.csv", lambda path: path.write_text("")),
    "dangling link": ("out/cat.csv", lambda path: path.symlink_to("nowhere")),
    "pipe": ("out/cat.csv", lambda path: os.mkfifo(path)),
    "skipped": ("out/skipped_images.csv", lambda path: path.write_text("mine,too\n1,2\n")),
}


def save_with(path, software):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", software)
    Image.new("RGB", (9, 9)).save(path, pnginfo=info)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_somebody_else_stays(label, few, monkeypatch, kind):
    name, make = FOREIGN[kind]
    (few / "out").mkdir()
    make(few / name)
    before = snapshot(few) if kind != "pipe" else None
    monkeypatch.setattr(diffusionmix, "HeadFitter", None)  # refused before any work
    status, err = label("--out", "out/cat.csv")
    assert status == 2 and name in err and "--out" in err
    assert os.path.lexists(few / name) and (before is None or snapshot(few) == before) and not (few / "run").exists()


def test_answers_do_not_take_the_place_of_the_skipped_images(label, few):
    status, err = label("--out", "out/skipped_images.csv")
    assert status == 2 and "skipped_images.csv" in err and not (few / "out").exists() and not (few / "run").exists()


def test_the_own_file_of_an_earlier_run_is_replaced(label, few):
    assert label("--out", "out/cat.csv")[0] == 0
    first = snapshot(few / "out")
    assert len(first) == 3 and label("--out", "out/cat.csv", "--head-steps", 30)[0] == 0
    assert snapshot(few / "out").keys() == first.keys() and snapshot(few / "out") != first
    with Image.open(few / "out" / "cat.png") as sheet:
        assert sheet.info["Software"]
    assert label()[0] == 0 and label()[0] == 0  # in the run folder, too


@pytest.mark.parametrize("out", ["more/x.csv", "more/deep/x.csv", "few/x.csv", "few/a/x.csv", "out/../more/x.csv",
                                 "link/x.csv"])  # fmt: skip
def test_not_among_the_pictures(label, few, out):
    """The sheet would be one of the pictures of the next run."""
    (few / "link").symlink_to("more")
    before = snapshot(few)
    status, err = label("--out", out)
    assert status == 2 and out in err and "--out" in err and snapshot(few) == before and not (few / "run").exists()


def test_not_in_the_place_of_the_one_picture_to_label(label, few):
    picture = sorted((few / "more").iterdir())[0]
    before = snapshot(few)
    status, err = label("--out", picture.with_suffix(".csv").relative_to(few))
    assert status == 2 and "--out" in err and snapshot(few) == before


# ---- where they cannot be


@pytest.mark.parametrize(
    "out",
    ["folder.csv", "sheet-is-folder.csv", "a_file/x.csv", "a_file/deep/x.csv", "/proc/x.csv", f"{'n' * 300}.csv",
     f"{'n' * 300}/x.csv", "loop/x.csv", "/dev/null/x.csv"],
    ids=lambda out: out[:20],
)  # fmt: skip
def test_where_it_cannot_be_is_refused_before_the_work(label, few, monkeypatch, out):
    (few / "folder.csv").mkdir()
    (few / "sheet-is-folder.png").mkdir()
    (few / "a_file").write_text("x")
    (few / "loop").symlink_to("loop")
    before = snapshot(few)
    monkeypatch.setattr(diffusionmix, "HeadFitter", None)
    status, err = label("--out", out)
    assert status == 2 and "--out" in err and snapshot(few) == before and not (few / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(label, few):
    (few / "closed").mkdir(mode=0o500)
    status, err = label("--out", "closed/x.csv")
    assert status == 2 and "closed" in err and "--out" in err


def test_a_folder_that_takes_no_file_is_refused_before_the_work(label, few, monkeypatch):
    (few / "closed").mkdir()
    real = os.open

    def refuse(path, *args, **more):
        if "closed" in str(path):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(diffusionmix, "HeadFitter", None)
    status, err = label("--out", "closed/x.csv")
    assert status == 2 and "Read-only" in err and "--out" in err and not list((few / "closed").iterdir())


def test_a_new_folder_is_made_only_with_the_result(label, few):
    assert label("--out", "new/deep/x.csv", "--dry-run")[0] == 0 and not (few / "new").exists()
    assert label("--out", "new/deep/x.csv")[0] == 0
    assert {path.name for path in (few / "new" / "deep").iterdir()} == {"x.csv", "x.png", "x.html"}
