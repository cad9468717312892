import json, pytest, torch
import main
from collections import Counter
from tests.conftest import TINY
from tests.fake_cuda import fake_cuda, on_gpu

@pytest.mark.usefixtures("few_glyphs", "few_rounds", "enough_memory")
@pytest.mark.parametrize("recipe", ["paper", "clusters"])
def test_run(call, two_models, tmp_path, recipe):
    flags = (*TINY, "--pool", two_models, "--data-root", tmp_path / "none", "--precision", "float32", "--recipe", recipe)
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        args = (*flags, "--save-dir", folder, "--device", device)
        if device == "cpu":
            status, out, err = call(main, *args)
        else:
            with fake_cuda() as cuda:
                status, out, err = call(main, *args)
            print(*[f"{n} {w}" for w, n in Counter(cuda.waits).items()], sep="\n")
        assert status == 0, err
        print(out, err)
        lines = [json.loads(l) for l in (folder / "metrics.jsonl").read_text().splitlines()]
        found[device] = lines
    print(found)
    assert 0
