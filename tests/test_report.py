"""report.html: its parts, what it needs, and that no run ends for it."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusionmix
import main
import report
import report.__main__ as command
from config import SCENARIOS, parse
from models.learners import PaperLearners
from report import predictions
from report.folder import Run
from report.page import element
from report.pictures import contact_sheet, shown_rounds
from tests.conftest import NO_IMAGES, TINY
from utils.environment import note_start
from utils.metrics import rate_by_class

pytestmark = [pytest.mark.usefixtures("few_glyphs"), pytest.mark.pictures]

PARTS = {
    "Verdict", "Images", "Learning", "Did guidance hit?", "Mixes", "The pool", "Results", "Time", "Environment",
    "Settings",
}  # fmt: skip
TEST = "--episodes 4 --nTestNovel 10 --mix-steps 2 --head-steps 5 --device cpu --sample-batch 7".split()


@pytest.fixture(scope="module")
def made(toy_pool, tmp_path_factory):
    """A finished toy run of two rounds, tested in its folder 1-shot. For copying only."""
    place = tmp_path_factory.mktemp("report")
    pool, folder = shutil.copytree(toy_pool, place / "pool"), place / "run"
    for m in (1, 2):
        Image.new("RGB", (60, 40), (200, 60 * m, 0)).save(pool / f"subset{m}" / "ckpt" / "samples.png")
    shared = ("--pool", pool, "--data-root", NO_IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.sources.GLYPHS_PER_CLASS", 10)
        patch.setattr("sys.argv", ["main.py", *TINY, *map(str, (*shared, "--save-dir", folder))])
        main.main()
        flags = (*shared, "--resume", folder / "best_model.pt", "--save-dir", folder / "1-shot", *TEST)
        patch.setattr("sys.argv", ["diffusionmix.py", *map(str, flags)])
        diffusionmix.main()
    return folder


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def train(call, two_models, tmp_path):
    """train(folder, *flags): run main.py, tiny; returns its status and stderr."""

    def go(folder, *flags):
        status, _, err = call(main, "--save-dir", folder, "--pool", two_models, "--data-root", NO_IMAGES, *TINY, *flags)
        return status, err

    return go


class Reader(HTMLParser):
    """What a page shows and what it names."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.named, self.links, self.headings, self.last = [], [], [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.last = tag
        self.links += [v for k, v in attrs if tag == "a" and k == "href"]
        loaded = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.named += [v or "" for k, v in attrs if k in loaded and tag != "a"]
        self.named += [v for k, v in attrs if k.startswith("on") or "url(" in (v or "") and "url(#" not in v]

    def handle_data(self, data):
        self.text.append(data)
        if self.last == "h2":
            self.headings.add(data.strip())


def rendered(folder):
    return Reader(report.render(Run.read(folder)))


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_run_and_its_test_leave_whole_reports(made):
    page = Reader((made / "report.html").read_text())
    assert page.headings - {""} >= PARTS, PARTS - page.headings
    assert (made / "1-shot" / "report.html").exists()
    text = "".join(page.text)
    assert "guided on glyphs, seed 1" in text and "epoch 2 of 2, finished" in text
    result = json.loads((made / "1-shot" / "results.json").read_text())
    for name in ("accuracy", "accuracy_without_mix"):
        assert f"{result[name]:.2f}\xa0±" in text
    best = max(json.loads(line)["val_accuracy"] for line in (made / "metrics.jsonl").read_text().splitlines())
    assert f"{best:.2f}" in text and "samples_per_class" in text
    test = Reader((made / "1-shot" / "report.html").read_text()).headings
    assert {"Verdict", "Results", "Mixes", "Environment", "Settings"} <= test and "Learning" not in test


def test_training_and_tests_link_to_each_other(made):
    for page in (made / "report.html", made / "1-shot" / "report.html"):
        links = Reader(page.read_text()).links
        assert links and all((page.parent / name).is_file() for name in links)
        other = {made / "report.html", made / "1-shot" / "report.html"} - {page}
        assert other <= {(page.parent / name).resolve() for name in links}


@pytest.mark.parametrize(
    "gone, parts",
    [
        ("metrics.jsonl", {"Learning"}),
        ("1-shot", {"Results", "Mixes"}),
        ("pseudo", {"Images", "Did guidance hit?"}),
        ("environment.json 1-shot/environment.json", {"Environment"}),
        ("config.json environment.json 1-shot/environment.json", {"Settings", "The pool", "Environment"}),
    ],
)
def test_a_part_is_there_where_its_data_is(copied, gone, parts):
    for name in gone.split():
        path = copied / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = rendered(copied)
    assert not page.headings & parts and not any("cannot be shown" in text for text in page.text)


def test_nothing_comes_from_outside(made):
    text = (made / "report.html").read_text()
    page = Reader(text)
    assert page.named and all(name.startswith("data:image/") for name in page.named)
    assert not any("//" in name or name.startswith("/") for name in page.links)  # which a click alone follows
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"@import|url\(", text) and "default-src &#x27;none&#x27;" in text


def test_the_preset_is_told_apart(copied):
    run = Run.read(copied)
    changed = run.changed()
    assert changed["samples_per_class"] == (4, SCENARIOS["glyphs"].defaults["samples_per_class"])
    assert "num_classes" not in changed and "kl_weight" not in changed  # the former is what the pool said
    page = "".join(Reader(report.render(run)).text)
    assert f"--samples-per-class is 4 instead of {SCENARIOS['glyphs'].defaults['samples_per_class']}" in page
    for argv in ([], ["--dataset", "co_cifarfs"], ["--recipe", "paper"]):
        assert parse([*argv, "--lr", "3"], description="").preset() == parse(argv, description="").as_dict()


def test_text_is_no_markup(copied):
    evil = "<script>alert('1')</script><img src=x onerror=y>\"&"
    edit(copied / "config.json", dataset=evil, backbone=evil, source=evil)
    edit(next((copied / "1-shot" / "results").iterdir()), split=evil, shot=evil, domains={evil: {"accuracy": evil}})
    (copied / "1-shot").rename(copied / "<u>'")
    starts = json.loads((copied / "environment.json").read_text())
    starts[0] |= {"command": evil, "commit": [evil]}
    starts[0]["settings"]["seed"] = evil
    (copied / "environment.json").write_text(json.dumps(starts))
    for path in copied.glob("pseudo/round*/manifest.json"):
        edit(path, hit_rate=evil)
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    (copied / "metrics.jsonl").write_text(lines[0] + "\n" + json.dumps(json.loads(lines[1]) | {"loss": evil}) + "\n")
    page = rendered(copied)
    assert not {"script", "u"} & set(page.tags) and all(name.startswith("data:") for name in page.named)
    assert "".join(page.text).count("<script>") >= 6
    run = Run.read(copied)
    both = Reader(report.render_several([run, run], copied))
    assert not {"script", "u"} & set(both.tags) and all(name.startswith("data:") for name in both.named)
    assert element("p", "<", title='"') == '<p title="&quot;">&lt;</p>'


def test_old_and_damaged_files(copied):
    for path in copied.glob("pseudo/round*/manifest.json"):
        manifest = json.loads(path.read_text())
        assert len(manifest.pop("hit_rate_by_class")) == 20
        path.write_text(json.dumps(manifest))
    page = rendered(copied)
    assert "Did guidance hit?" in page.headings and "not noted" not in "".join(page.text)
    images = copied / "pseudo" / "round01" / "images.npy"
    images.write_bytes(images.read_bytes()[:1000])
    (copied / "1-shot" / "mixes.npz").write_bytes(b"PK")
    (copied / "environment.json").write_text("{")
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    text = "".join(rendered(copied).text)
    assert "“images” cannot be shown" in text and "Cannot be read: environment.json" in text
    assert "epoch 2 of 2" in text


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_that_is_not_done_has_a_report(train, tmp_path, monkeypatch, epochs):
    real, calls = PaperLearners.train_meta_model, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(PaperLearners, "train_meta_model", killed)
    monkeypatch.setattr(report, "SHARE", 1.0)
    assert train(tmp_path / "run")[0] == 130
    page = Reader((tmp_path / "run" / "report.html").read_text())
    assert f"epoch {epochs} of 2, not finished yet" in "".join(page.text)
    assert ("Learning" in page.headings) == (epochs > 0)


def test_no_run_ends_for_its_report(train, tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("of a\nlibrary")

    monkeypatch.setattr(report, "render", broken)
    status, err = train(tmp_path / "run", "--max-epoch", 1)
    assert status == 0 and "no report (RuntimeError: of a library)\n" in err and "Traceback" not in err
    assert not (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "best_model.pt").exists()


def test_reports_take_a_share_of_the_time(copied, monkeypatch):
    now, writes = [0.0], []

    def slow(run):
        now[0] += 1
        writes.append(now[0])
        return "page"

    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(report, "render", slow)
    made = report.Report(copied)
    made.write()
    for _ in range(200):
        now[0] += 1
        made.write_sometimes()
    assert len(writes) == 1 + 4 and min(np.diff(writes)) >= 1 / report.SHARE
    monkeypatch.setattr(report.processes, "is_first", lambda: False)
    made.write()
    assert len(writes) == 5


def test_the_command(call, copied, made, tmp_path, monkeypatch):
    (copied / "report.html").unlink()
    assert call(command, copied) == (0, f"{copied / 'report.html'}\n", "")
    assert (copied / "report.html").stat().st_size > 10_000
    assert call(command, copied, "--out", tmp_path / "one.html")[0] == 0 and (tmp_path / "one.html").exists()
    other = shutil.copytree(copied, tmp_path / "other")
    edit(other / "config.json", lr=0.25)
    edit(next((other / "1-shot" / "results").iterdir()), accuracy=12.34, by_episode=[12.34] * 4)
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(command, copied, other)
    assert status == 0 and out.splitlines() == [str(copied / "report.html"), str(other / "report.html"), "report.html"]
    page = Reader((tmp_path / "report.html").read_text())
    text = "".join(page.text)
    assert "2 runs" in text and "12.34" in text and {"Settings that differ", "Images", "Learning"} <= page.headings
    assert "lr" in page.text and "0.25" in page.text and "kl_weight" not in page.text
    assert page.tags.count("svg") == 2
    assert {(tmp_path / name).resolve() for name in page.links} == {copied / "report.html", other / "report.html"}
    assert "../report.html" in Reader((other / "report.html").read_text()).links


def test_no_run_is_one_line_and_status_2(call, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        status, _, err = call(command, folder)
        assert status == 2 and err.count("\n") == 1 and str(folder) in err
    assert call(command)[0] == 2


FIGURES = {
    "subset1": {"ratio": 1.02, "too_near": 0.05, "held_out": 0.3},
    "subset2": {"ratio": 1.5, "too_near": 0.0, "held_out": 0.3},
    "subset3": {"ratio": 0.4, "too_near": 0.6, "held_out": 0.3},
    "subset4": {"ratio": None, "too_near": None, "held_out": None},
}


@pytest.fixture
def pool(toy_pool, tmp_path):
    """Five models with what their training leaves, and with damage."""
    folder = shutil.copytree(toy_pool, tmp_path / "pool")
    models = [{"classes": [f"<b>{m}", "other"]} for m in range(1, 6)]
    index = {"image_size": 16, "steps": 1500, "models": models, "memorisation": FIGURES}
    (folder / "pool.json").write_text(json.dumps(index))
    for m in (1, 2):
        lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(10, (1501, 1001)[m - 1], 10)]
        (folder / f"subset{m}" / "ckpt" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"st')
        Image.new("RGB", (60, 40), (200, 60 * m, 0)).save(folder / f"subset{m}" / "ckpt" / "samples.png")
    (folder / "subset3" / "ckpt" / "samples.png").write_bytes(b"no picture")
    (folder / "subset5" / "ckpt" / "model.pt").unlink()
    return folder


def test_the_report_of_a_pool(call, pool):
    assert call(command, pool) == (0, f"{pool / 'report.html'}\n", "")
    rows = [Reader(row) for row in (pool / "report.html").read_text().split("<tr>")[2:]]
    text = ["".join(row.text) for row in rows]
    assert len(rows) == 5 and all(f"<b>{m}, other" in row for m, row in enumerate(text, 1))
    words = (
        "no sign of copying; samples lie 1.02 times",
        "undertrained: samples lie 1.50 times",
        "copies: samples lie 0.40 times",
        "not known",
        "not measured",
    )
    assert all(word in row for word, row in zip(words, text, strict=True))
    assert "1,500" in text[0] and "1,000 of 1,500" in text[1] and "not trained yet" in text[4]
    assert [(row.tags.count("svg"), row.tags.count("img")) for row in rows] == [(1, 1), (1, 1), (0, 0), (0, 0), (0, 0)]
    assert "cannot be shown" in text[2] and rows[0].tags.count("circle") == 100  # thinned out
    page = Reader((pool / "report.html").read_text())
    assert "b" not in page.tags and all(name.startswith("data:image/") for name in page.named)


@pytest.mark.parametrize("steps, images, told", [(1500, 40, 0), (200, 40, 1), (1000, 39, 1), (999, 12, 2)])
def test_a_pool_of_few_steps_or_images_is_told(call, pool, steps, images, told):
    index = json.loads((pool / "pool.json").read_text()) | {"steps": steps}
    index["memorisation"]["subset1"]["images"] = images  # of two classes
    (pool / "pool.json").write_text(json.dumps(index))
    assert call(command, pool)[0] == 0
    text = (pool / "report.html").read_text()
    assert Reader(text).tags.count("li") == told
    assert ("subset1 (39" in text or "subset1 (12" in text) == (images < 40)


@pytest.mark.parametrize("index", [None, "{", "[]", '{"models": 3, "memorisation": [1], "steps": "x"}'])
def test_a_pool_without_a_sound_index_has_a_report(call, pool, index):
    (pool / "pool.json").unlink() if index is None else (pool / "pool.json").write_text(index)
    assert call(command, pool)[0] == 0
    assert (pool / "report.html").read_text().count('scope="row"') == 4


def test_starts_are_noted_where_they_differ(tmp_path):
    def start(**notes):
        note_start(tmp_path, "main.py", torch.device("cpu"), notes)
        return json.loads((tmp_path / "environment.json").read_text())

    first = start(settings={"seed": 1})
    assert (
        first[0]["torch"] == torch.__version__ and first[0]["hardware"] and first[0]["command"] and first[0]["commit"]
    )
    assert start(settings={"seed": 1}) == first and len(start(settings={"seed": 2})) == 2
    (tmp_path / "environment.json").write_text('[{"pro')
    assert len(start(settings={"seed": 1})) == 1


def test_rate_by_class():
    hits, labels = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 2, 2])
    assert rate_by_class(hits, labels, 4) == [0.5, None, 1.0, None]


def test_contact_sheets_are_of_the_same_classes_and_small(copied):
    rounds = Run.read(copied).rounds()
    classes, rows = contact_sheet(rounds)
    assert classes == list(range(20)) and all(len(row) == 2 for row in rows)
    images, labels = (np.load(rounds[1].folder / f"{name}.npy") for name in ("images", "labels"))
    shown = np.asarray(rows[7][1])[:, 18 * 2 : 18 * 2 + 16, :3].transpose(2, 0, 1)
    assert np.array_equal(shown, images[labels == 7][2])
    assert [each for each in shown_rounds(range(30))][::9] == [0, 29] and len(shown_rounds(range(30))) == 10


def test_mixes_that_are_shown_are_those_that_were_made(made):
    with np.load(made / "1-shot" / "mixes.npz") as file:
        a, b, mix, share = (file[name] for name in ("x_a", "x_b", "mix", "share"))
    assert a.shape == b.shape == mix.shape == (4, 4, 3, 16, 16) and share.shape == (4, 4)
    assert a.dtype == mix.dtype == np.uint8 and 0 <= share.min() <= share.max() <= 1
    assert not (b == b[:1]).all() and not (a == b).all((2, 3, 4)).any()  # none with itself, where that can be
    argv = json.loads((made / "1-shot" / "environment.json").read_text())[0]["settings"]
    s = diffusionmix.Settings(**argv)
    testing = diffusionmix.Testing(s, s.data_paths[0])
    fitter, support = testing.fitter, testing.episodes.support
    given = (testing.images.images, support, [fitter.partners(m, *support.shape) for m in range(5)], testing.shown)
    got = fitter.mix_part(*given, fitter.pool.load(2), 2, torch.arange(support.numel()))
    assert len(got["features"]) == support.numel() and np.array_equal(got["pictures"].numpy(), mix[2])
    assert not len(fitter.mix_part(*given, fitter.pool.load(4), 4, torch.arange(2))["pictures"])


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROBE = """<!doctype html><body><iframe id="frame" style="border:0;width:WIDTHpx;height:900px" src="PAGE"></iframe>
<script>onload = () => {
  const page = document.getElementById('frame').contentDocument, root = page.documentElement;
  page.querySelectorAll('details').forEach(each => each.open = true);
  const images = [...page.images];
  const found = {images: images.length, charts: page.querySelectorAll('svg').length, wide: root.scrollWidth,
    room: root.clientWidth, width: page.defaultView.innerWidth, title: page.title,
    broken: images.filter(i => !i.complete || !i.naturalWidth).length,
    hidden: [...page.querySelectorAll('img, svg')].filter(i => i.getBoundingClientRect().height < 8).length};
  document.body.textContent = 'found' + JSON.stringify(found) + 'end';
}</script>"""


def browse(tmp_path, page, width):
    """Show a page in a frame of that width: (what is found in it, what the console says, addresses it asks for)."""
    (tmp_path / "probe.html").write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", page.as_uri()))
    log = tmp_path / "net.json"
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1400,1000",
         f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom",
         (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, check=True, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    found = json.loads(re.search(r"found(\{.*\})end", done.stdout)[1])
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests, of updates and the like, have no initiator.
    asked = {e["url"] for e in events if e.get("initiator", "not an origin") != "not an origin" and "url" in e}
    return found, console, {url for url in asked if not url.startswith(("file:", "data:"))}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to show the page in")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("what", ["run", "several"])
def test_in_a_browser(made, tmp_path, width, what):
    page = made / "report.html"
    if what == "several":
        run = Run.read(made)
        page = tmp_path / "several.html"
        report.write(report.render_several([run] * 7, tmp_path), page)
    found, console, asked = browse(tmp_path, page, width)
    assert found["width"] == width and not console and not asked
    assert found["wide"] <= found["room"], found
    assert not found["broken"] and not found["hidden"] and found["charts"] >= 2
    assert found["images"] > 40 or what == "several"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to show the page in")
def test_pools_and_labels_in_a_browser(pool, tmp_path):
    rng = np.random.default_rng(0)
    images, values = rng.integers(0, 256, (40, 3, 16, 16), np.uint8), rng.dirichlet([1, 1, 1], 40)
    paths, labels = [Path(f"{'long' * 10}{i}.png") for i in range(40)], np.arange(40) % 3
    pages = {
        "pool": report.render_folder(pool),
        "labels": predictions.render(paths, images, "abc", values, images, labels),
    }
    for name, text in pages.items():
        report.write(text, tmp_path / f"{name}.html")
        found, console, asked = browse(tmp_path, tmp_path / f"{name}.html", 400)
        assert found["wide"] <= found["room"] and found["images"] >= 2, found
        assert not console and not asked and not found["broken"] and not found["hidden"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to show the page in")
def test_the_browser_would_tell(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<title>bad</title><img src='http://127.0.0.1:9/x.png'><div style='width:2000px'>wide</div>"
        "<script>console.error('oh')</script><svg></svg>"
    )
    found, console, asked = browse(tmp_path, Path(tmp_path / "bad.html"), 400)
    assert found["broken"] == 1 and found["wide"] > found["room"]
    assert any("oh" in line for line in console) and asked == {"http://127.0.0.1:9/x.png"}
