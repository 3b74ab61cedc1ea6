"""Files of models of CHELA blocks: what comes back, and what is refused or survives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from chela_bench.errors import ArgumentError, EnvironmentProblem
from chela_bench.kernels.chela_models import (
    ChelaForCausalLM,
    ChelaForSequenceClassification,
)
from tests.chela_models import (
    MODELS,
    model,
    tokens,
)
from tests.running import environment

pytestmark = pytest.mark.usefixtures("one_thread")


@MODELS
@pytest.mark.parametrize(
    "options",
    [{}, {"tie_embeddings": False, "long_kernel": "multiscale", "short_sizes": (3, 5)}],
    ids=str,
)
def test_a_saved_model_comes_back(kind, options, tmp_path):
    m, ids = model(kind, **options), tokens()
    m.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    again = kind.from_pretrained(str(tmp_path / "new" / "folder"))
    assert torch.equal(state, torch.get_rng_state())
    assert again.config == m.config and not again.training
    path = tmp_path / "new" / "folder" / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # nothing reads it any more
    assert torch.equal(again(ids).logits, m(ids).logits)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_dtypes_are_kept_or_chosen(tmp_path):
    m = model().bfloat16()
    m.norm.float()
    m.save_pretrained(tmp_path)
    kept = ChelaForCausalLM.from_pretrained(tmp_path)
    assert kept.norm.weight.dtype == torch.float32
    assert kept.embedding.weight.dtype == torch.bfloat16
    wide = ChelaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    with pytest.raises(ArgumentError, match=r"floating-point dtype, got torch\.int64"):
        ChelaForCausalLM.from_pretrained(tmp_path, dtype=torch.int64)


def test_parameters_that_do_not_lie_in_a_row_are_saved(tmp_path):
    m = model()
    m.embedding.weight.data = m.embedding.weight.data.T.contiguous().T
    m.save_pretrained(tmp_path)
    assert torch.equal(
        ChelaForCausalLM.from_pretrained(tmp_path).embedding.weight, m.embedding.weight
    )


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_config_may_be_edited_where_it_keeps_the_function(tmp_path):
    model().save_pretrained(tmp_path)
    edit(tmp_path, implementation="reference", dropout=0.5)
    again = ChelaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model()(tokens()).logits)
    edit(tmp_path, order="parallel", eps=1e-3)  # neither changes a shape
    with pytest.raises(ArgumentError, match=r'there eps = 1e-05, order = "serial"; set it so in'):
        ChelaForCausalLM.from_pretrained(tmp_path)


def rewritten(folder, change):
    """model.safetensors as another tool may have made it: without our config in its header."""
    import safetensors.torch

    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_weights_of_another_tool_load(tmp_path):
    model().save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: None)
    again = ChelaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model()(tokens()).logits)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.pop("norm.bias"), "does not fit .*config.json: norm.bias is missing; both"),
        (lambda x: x.update(extra=torch.ones(1)), "extra is too much"),
        (
            lambda x: x.update({"norm.bias": torch.ones(9)}),
            r"norm.bias is \[9\], wanted \[8\]",
        ),
        (lambda x: x.clear(), r"is missing, .* and \d+ more; both"),
        (
            lambda x: x.update({"norm.bias": torch.ones(8, dtype=torch.int64)}),
            "norm.bias is of I64, wanted floating-point numbers",
        ),
    ],
    ids=["missing", "extra", "shape", "empty", "dtype"],
)
def test_weights_that_do_not_fit_are_refused(change, match, tmp_path):
    model().save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ArgumentError, match=rf"model.safetensors .*{match}"):
        ChelaForCausalLM.from_pretrained(tmp_path)


def damage(name, content):
    def damaged(folder):
        path = folder / name
        path.write_bytes(content(path.read_bytes()))

    return damaged


@pytest.mark.parametrize(
    ("damaged", "match"),
    [
        (lambda f: (f / "config.json").unlink(), "could not read .*config.json: .*No such file"),
        (lambda f: (f / "model.safetensors").unlink(), "could not read .*model.safetensors: "),
        (damage("config.json", lambda _: b""), "could not read .*config.json"),
        (damage("config.json", lambda x: x[:-9]), "could not read .*config.json"),
        (damage("config.json", lambda _: b"\xff\xfe"), "could not read .*config.json"),
        (damage("config.json", lambda _: b"[1]"), "config.json: wanted an object, got a list"),
        (damage("model.safetensors", lambda _: b""), "could not read .*model.safetensors"),
        (damage("model.safetensors", lambda x: x[:-1]), "could not read .*model.safetensors"),
        (damage("model.safetensors", lambda x: x[:99]), "could not read .*model.safetensors"),
        (damage("model.safetensors", lambda x: b"\xff" * 9 + x[9:]), "could not read .*model.sa"),
        (lambda f: edit(f, d_model="8"), "config.json: wanted d_model: int, got '8'"),
        (lambda f: edit(f, depth=2), "config.json: no 'depth' in ChelaConfig"),
        (lambda f: edit(f, architecture=None), "wanted the architecture ChelaForCausalLM in "),
    ],
)
def test_damaged_files_are_refused_by_name(damaged, match, tmp_path):
    model().save_pretrained(tmp_path)
    damaged(tmp_path)
    with pytest.raises(ArgumentError, match=match) as caught:
        ChelaForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_model_of_another_class_is_refused(tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(
        ArgumentError, match=r"architecture ChelaForSequenceCl.* in .*, got 'ChelaForCausalLM'"
    ):
        ChelaForSequenceClassification.from_pretrained(tmp_path)


SAVES = {  # what a save goes through, and the model that is there before
    "killed with the config aside": ("kill(1); save(order='parallel')", "serial"),
    "killed with both files aside": ("kill(2); save(order='parallel')", "serial"),
    "killed with both in their places": ("kill(3); save(order='parallel')", "parallel"),
    "a disk that fills up": ("fill_up(); save()", "serial"),
}
SAVING = """
import json, os, resource, signal, sys
import chela_bench.kernels.chela_files as files
from chela_bench.profiles.forks import each_in_a_fork
from tests.chela_models import *

def kill(left):
    flush = files._flush
    def killing(path):
        nonlocal left
        flush(path)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    files._flush = killing

def fill_up():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

def saving(code, folder):
    def save(**changes):
        model(seed=1, **changes).save_pretrained(folder)
    return lambda: exec(code, globals() | {"save": save})

model()  # the first one imports for seconds
jobs = [saving(*job) for job in json.load(sys.stdin)]
endings = dict(each_in_a_fork(jobs, parallel=1, limit_s=200))
print(json.dumps([str(endings[i]) for i in range(len(jobs))]))
"""


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Folders, what was there before, and how saving there ended, each in a fork of one process."""
    folders = {}
    for name, (_, order) in SAVES.items():
        folders[name] = folder = tmp_path_factory.mktemp("save")
        model(order=order).save_pretrained(folder)
    before = {name: contents(folder) for name, folder in folders.items()}
    jobs = [(code, str(folders[name])) for name, (code, _) in SAVES.items()]
    done = subprocess.run(
        [sys.executable, "-c", SAVING], input=json.dumps(jobs), env=environment(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    endings = dict(zip(SAVES, json.loads(done.stdout), strict=True))
    return {name: (folders[name], before[name], endings[name]) for name in SAVES}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("killed with the config aside", 0),
        ("killed with both files aside", 0),
        ("killed with both in their places", 1),
    ],
)
def test_a_killed_save_leaves_the_old_model(name, seed, saves):
    folder, _, ending = saves[name]
    assert "SIGKILL" in ending
    aside = [path.name[:8] for path in folder.iterdir() if path.is_dir()]
    assert aside == [".saving-"] or seed == 1  # on the same disk
    again = ChelaForCausalLM.from_pretrained(folder)
    wanted = model(seed=seed, order="parallel" if seed else "serial")
    assert torch.equal(again(tokens()).logits, wanted(tokens()).logits)


def test_a_disk_that_fills_up_leaves_the_old_model(saves):
    folder, before, ending = saves["a disk that fills up"]
    assert "EnvironmentProblem" in ending and "could not save the model in" in ending
    assert "File too large" in ending and "make room" in ending
    assert contents(folder) == before
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_new_weights_beside_an_old_config_are_refused(tmp_path):
    """What a kill between both moves leaves."""
    model(order="parallel").save_pretrained(tmp_path)
    old = (tmp_path / "config.json").read_bytes()
    model(seed=1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(old)
    with pytest.raises(ArgumentError, match=r'is not of the save .* there order = "serial"'):
        ChelaForCausalLM.from_pretrained(tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentProblem, match=r"could not save the model in .*file"):
        model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_safetensors_may_be_missing(tmp_path, monkeypatch):
    m = model()
    m.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: m.save_pretrained(tmp_path), lambda: type(m).from_pretrained(tmp_path)):
        with pytest.raises(EnvironmentProblem, match=r"pip install -e '\.\[models\]'"):
            call()
