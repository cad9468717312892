"""Addresses: read once, checked from then on, and a line where they cannot be."""

import io
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import main
from guided_diffusion.pool import subset_path
from tests.conftest import TINY, same
from utils import checkpoint, remote
from utils.remote import local


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and notes what was asked for. A file named short ends early; broken answers 500."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        if "broken" in self.path:
            self.send_error(500)
        elif "page" in self.path:  # whatever is asked for
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"\n<!DOCTYPE html><title>Log in</title>")
        elif "short" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 40)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, make_pool, monkeypatch):
    """The address of a server that has a pool of three models, and what it was asked for."""
    make_pool(tmp_path / "there" / "pool", [5, 5, 5])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "there"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_paths_are_left_alone():
    for place in ("ckpt/glyphs", "/a/b.pt", "odd:/name", "s3://bucket/x"):
        assert local(place) == Path(place)


def test_a_file_is_read_once(web, tmp_path):
    place = f"{web}/pool/subset1/ckpt/model.pt?token=1"
    found = local(place)
    assert found == Path(f"ckpt/cache/http/{web[7:]}/pool/subset1/ckpt/model.pt")
    assert same(checkpoint.load(found), checkpoint.load(subset_path(tmp_path / "there" / "pool", 1)))
    assert local(place) == found and len(Handler.asked) == 1
    names = {file.name for file in found.parent.iterdir()}
    assert names == {"model.pt", "model.pt.sha256"}


def test_a_damaged_copy_is_read_again(web, capsys):
    found = local(f"{web}/pool/subset1/ckpt/model.pt")
    sound = found.read_bytes()
    found.write_bytes(sound[:-1] + b"!")
    local(f"{web}/pool/subset1/ckpt/model.pt")
    assert found.read_bytes() == sound and len(Handler.asked) == 2
    assert "does not match its checksum" in capsys.readouterr().err


def test_a_pool_is_read_once_and_trained_on(web, tmp_path, call, picture_folder):
    picture_folder(tmp_path / "here" / "data" / "meta_val", {f"c{i}": [50 * i] * 12 for i in range(5)})
    command = ("--dataset", "custom", "--data-root", "data", "--pool", f"{web}/pool/", *TINY)
    command += ("--max-epoch", 1, "--save-dir")
    assert call(main, *command, "far")[0] == 0
    asked = len(Handler.asked)
    assert asked >= 3
    assert call(main, *command, "far again")[0] == 0 and len(Handler.asked) == asked  # not even what there is
    assert call(main, *command, "near", "--pool", tmp_path / "there" / "pool")[0] == 0
    far, near = (checkpoint.load(Path(name, "last.pt")) for name in ("far", "near"))
    assert same(*({k: v for k, v in state.items() if k != "settings"} for state in (far, near)))


def test_without_a_bar(web, monkeypatch):
    monkeypatch.setattr("utils.progress._quiet", True)
    assert checkpoint.load(local(f"{web}/pool/subset1/ckpt/model.pt"))


def test_a_pool_that_is_numbered_from_0(web, tmp_path):
    there = tmp_path / "there" / "pool"
    (there / "subset3").rename(there / "subset0")
    found = local(f"{web}/pool")
    assert sorted(path.name for path in found.glob("subset*")) == ["subset0", "subset1", "subset2"]


def test_a_run_starts_from_weights_at_an_address(web, tmp_path, call, picture_folder, trained):
    picture_folder(tmp_path / "here" / "data" / "meta_val", {f"c{i}": [50 * i] * 12 for i in range(5)})
    shutil.copytree(trained, tmp_path / "there" / "run")
    command = ("--dataset", "custom", "--data-root", "data", "--source", "none", *TINY, "--save-dir", "more")
    status, out, _ = call(main, *command, "--resume", f"{web}/run/best_model.pt")
    assert status == 0 and "/run/best_model.pt" in " ".join(Handler.asked)


@pytest.mark.parametrize(
    "path, words",
    [
        ("/pool/none.pt", "nothing is there; check the address"),
        ("/nothing", "got no diffusion models there"),
        ("/broken.pt", "cannot be read (HTTP Error 500"),
        ("/broken", "cannot be read (HTTP Error 500"),
        ("/short.pt", "ended after 40 of 100 bytes"),
        ("/../x.pt", "without .."),
        ("/page/of/login.pt", "got a web page"),
        ("/page/pool", "got a web page"),
    ],
)
def test_what_cannot_be_read_is_a_line_and_leaves_nothing(web, path, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        local(web + path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not [file for file in (tmp_path / "here").rglob("*") if file.is_file()]


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="check address, network and credentials"):
        local("http://127.0.0.1:9/model.pt")


class Store:
    """Stands for a bucket, by blobfile's names."""

    def __init__(self, files):
        self.files, self.opened = files, []

    def glob(self, pattern):
        return (name for name in [*self.files, "gs://b/pool/subset1/ckpt/model.txt"] if name.startswith("gs://b/pool/"))

    def stat(self, place):
        if place not in self.files:
            raise FileNotFoundError(place)
        return type("Stat", (), {"size": len(self.files[place])})

    @contextmanager
    def BlobFile(self, place, mode, streaming):
        self.opened.append(place)
        yield io.BytesIO(self.files[place])


def test_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store({f"gs://b/pool/subset{m}/ckpt/model.pt": bytes([m]) * 10 for m in (1, 2)})
    monkeypatch.setattr(remote, "_blobs", lambda: store)
    folder = local("gs://b/pool")
    assert folder == Path("ckpt/cache/gs/b/pool") and subset_path(folder, 2).read_bytes() == bytes([2]) * 10
    assert local("gs://b/pool") == folder and len(store.opened) == 2
    with pytest.raises(ValueError, match="nothing is there"):
        local("gs://b/none.pt")


def test_names_of_blobfile():
    """The double above is held against the real thing, which needs no network to be made."""
    context = remote._blobs()
    assert all(callable(getattr(context, name)) for name in ("glob", "stat", "BlobFile"))
    for place in ("az://a/c/x.pt", "gs://b/x.pt", "https://a.blob.core.windows.net/c/x.pt"):
        assert remote._is_blob(place)
    assert not remote._is_blob("https://example.org/blob.core.windows.net/x.pt")
