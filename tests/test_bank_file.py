"""Banks as files and as numbers: what comes back is what was kept, what will be kept is told, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_tools import PIPES, captured, run
from safetensors import safe_open
from safetensors.torch import save_file

import attnctrl as ac
from attnctrl.bank.packing import pack

SUBJECT = [ac.Region(name="star", box=(0, 0, 0.5, 1))]
AGAIN = """
import sys
sys.path[:0] = {path!r}
import torch
import attnctrl as ac
from bank_tools import PIPES, run
pipe = PIPES["flux"]()
torch.save(run(pipe, range(2, 3), ac.Share(bank=ac.Bank.load({file!r}, pipe))), {out!r})
"""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return PIPES["flux"]()


@pytest.fixture(scope="module")
def bank(pipe: Any) -> ac.Bank:
    return captured(pipe)


def test_a_loaded_bank_gives_the_same_images_to_the_bit_in_another_process(
    pipe: Any, bank: ac.Bank, tmp_path: Path
) -> None:
    here = run(pipe, range(2, 3), ac.Share(bank=bank))
    file = bank.save(tmp_path / "deep" / "two.safetensors")
    assert [path.name for path in file.parent.iterdir()] == ["two.safetensors"]
    script = AGAIN.format(path=[str(Path(__file__).parent)], file=str(file), out=str(tmp_path / "out.pt"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), here)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8"])
def test_what_is_saved_is_loaded(pipe: Any, dtype: str | None, tmp_path: Path) -> None:
    bank = captured(pipe, bank=ac.Bank(dtype), regions=SUBJECT, tokens="subject", every=2, queries=True)
    again = ac.Bank.load(bank.save(tmp_path / "a.safetensors"))
    assert again.entries.keys() == bank.entries.keys()
    told = (
        "model",
        "sigmas",
        "every",
        "tokens",
        "dtype",
        "layers",
        "steps",
        "branches",
        "pictures",
        "nbytes",
        "queries",
    )
    assert [getattr(again, name) for name in told] == [getattr(bank, name) for name in told]
    assert again.places.keys() == bank.places.keys()
    assert all(again.places[key].same_as(held) for key, held in bank.places.items())
    for entry, packed in bank.entries.items():
        like = torch.zeros(())
        assert torch.equal(again.entries[entry].opened(like), packed.opened(like))
        assert torch.equal(again.entries[entry].opened_query(like), packed.opened_query(like))


def test_files_that_are_not_this_models_bank_are_refused(pipe: Any, bank: ac.Bank, tmp_path: Path) -> None:
    file = bank.save(tmp_path / "a.safetensors")
    other = PIPES["flux"](seed=1)
    with pytest.raises(ac.AssetError, match=r"another model .*weights"):
        ac.Bank.load(file, other)
    with pytest.raises(ac.AssetError, match=r"another model .*dtype"):
        ac.Bank.load(file, PIPES["flux"]().to(torch.bfloat16))
    with pytest.raises(ac.UnsupportedModelError, match=r"another model"):
        run(other, range(2, 3), ac.Share(bank=ac.Bank.load(file)))
    data = file.read_bytes()
    for part in (len(data) - 1, len(data) // 2, 4, 0):
        short = tmp_path / "short.safetensors"
        short.write_bytes(data[:part])
        with pytest.raises(ac.AssetError, match="no whole bank"):
            ac.Bank.load(short)
    with pytest.raises(ac.AssetError, match="no whole bank"):
        ac.Bank.load(tmp_path / "none.safetensors")
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["attnctrl.bank"])
    save_file({}, tmp_path / "new.safetensors", {"attnctrl.bank": json.dumps({**told, "format": 2})})
    with pytest.raises(ac.AssetError, match=r"format 2, and this attnctrl .* reads format 1"):
        ac.Bank.load(tmp_path / "new.safetensors")
    save_file({}, tmp_path / "other.safetensors")
    with pytest.raises(ac.AssetError, match="no whole bank"):
        ac.Bank.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", PIPES)
def test_the_bytes_are_told_before(name: str, tmp_path: Path) -> None:
    pipe = PIPES[name]()
    for dtype in (None, "float16", "float8"):
        keep = ac.Keep(SUBJECT, bank=ac.Bank(dtype), tokens="subject", pictures=1, every=2, window=(0.0, 0.9))
        need = keep.predict(pipe, width=32, height=16, steps=3, pictures=2)
        run(pipe, range(2), keep)
        assert need.nbytes == keep.bank.nbytes > 0
        assert (need.steps, need.share, need.layers) == ((0, 2), 0.5, len(keep.bank.layers))
    keep = ac.Keep(bank=ac.Bank(), branch="cond")
    need = keep.predict(pipe, width=32, height=16, steps=3)
    run(pipe, range(1), keep)
    assert (need.nbytes, need.branches) == (keep.bank.nbytes, 1)
    for dtype in (None, "float8"):
        more = ac.Keep(bank=ac.Bank(dtype), branch="cond", queries=True, texts=name != "sd")
        run(pipe, range(1), more)
        packed = next(iter(more.bank.entries.values()))
        texts = packed.states.shape[2] - next(iter(more.bank.places.values())).tokens.numel()
        assert (texts > 0) == more.texts
        assert packed.query is not None
        told = more.predict(pipe, width=32, height=16, steps=3, text_tokens=texts)
        again = ac.Bank.load(more.bank.save(tmp_path / "more.safetensors"))
        assert (again.queries, again.texts, again.nbytes) == (True, more.texts, more.bank.nbytes)
        assert told.nbytes == more.bank.nbytes >= 1.5 * (need.nbytes if dtype is None else 0)
    if name == "sd":
        with pytest.raises(ac.UnsupportedModelError, match="as in UNets"):
            ac.Keep(bank=ac.Bank(), texts=True).predict(pipe, width=32, height=16, steps=3)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11), ("float8", 2**-4)]
)
def test_narrow_dtypes_round(dtype: str, error: float) -> None:
    states = torch.randn(2, 2, 50, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e4]).view(
        2, 1, 1
    )
    if dtype == "float16":
        states = states.clamp(-6e4, 6e4)
    packed = pack(states[0], states[1], dtype, None)
    wrong = (packed.opened(states) - states).abs()
    # numbers below a head's largest by 2 ** 14 and more have fewer digits in float8
    least = states.abs().amax(dim=(2, 3), keepdim=True) * 2.0**-18
    assert (wrong <= error * states.abs() + least * (dtype in ("float8", "float16"))).all()
    assert (wrong.max() > 0) == (error > 0)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ac.ControlError, match="1e\\+05 do not fit into float16"):
        pack(torch.full((1, 1, 2), 1e5), torch.zeros(1, 1, 2), "float16", None)
    with pytest.raises(ac.ControlError, match="dtype must be None or one of"):
        ac.Bank("int8")


def test_runs_that_do_not_fit_are_refused(pipe: Any, bank: ac.Bank) -> None:
    def refused(error: type[Exception], match: str, control: Any, **more: Any) -> None:
        with pytest.raises(error, match=match):
            run(pipe, range(2, 3), control, **more)
        assert torch.equal(run(pipe, range(2, 3)), plain)

    plain = run(pipe, range(2, 3))
    refused(ac.ControlError, "empty", ac.Share(bank=ac.Bank()))
    refused(ac.ScheduleError, "of a run of 3 steps .* this one has 4 steps", ac.Share(bank=bank), num_inference_steps=4)
    refused(ac.ControlError, "already has keys", ac.Keep(bank=bank))
    refused(ac.ControlError, "keeps tokens='all'", ac.Keep(SUBJECT, bank=bank, tokens="subject"))
    few = captured(pipe, layers="single", window=(0.3, 1.0), guidance=1.0, regions=SUBJECT, tokens="subject")
    how = {"tokens": "subject", "regions": SUBJECT}
    refused(
        ac.ScheduleError, "no keys for step 0; it has 2 steps from 1 to 2", ac.Share(bank=few, **how, branch="cond")
    )
    late = {"window": (0.3, 1.0), **how}
    refused(ac.ControlError, "no keys of layer transformer_blocks.0.attn", ac.Share(bank=few, **late), guidance=1.0)
    prompt = ac.Share(bank=few, **late, layers="single")
    refused(ac.ControlError, "keeps branches cond, and a forward of branch 'uncond'", prompt)
    only = ac.Share(bank=few, window=late["window"], layers="single")
    refused(ac.ControlError, "reads tokens='all', but the bank keeps tokens='subject'", only, guidance=1.0)
    refused(ac.ControlError, "nothing tells which these are", ac.Share(bank=bank, tokens="subject"))
    with pytest.raises(ac.ControlError, match="readers and group say nothing"):
        ac.Share(bank=bank, readers="anchors")
    with pytest.raises(ac.ControlError, match="not written to documents"):
        ac.Share(bank=bank).to_dict()
    with pytest.raises(ac.LayoutError, match="no control of the stack declares regions"):
        captured(pipe, tokens="subject")


def test_compiled_models_are_refused(pipe: Any, bank: ac.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnctrl.engine.is_compiled", lambda model: True)
    for control, match in ((ac.Share(bank=bank), "compiled"), (ac.Keep(bank=ac.Bank()), "compiled")):
        with pytest.raises(ac.UnsupportedModelError, match=match):
            run(pipe, range(2, 3), control)


def test_steps_that_are_left_out_read_those_before(pipe: Any, bank: ac.Bank) -> None:
    sparse = captured(pipe, every=2)
    assert (sparse.steps, len(sparse.entries)) == ((0, 2), len(bank.entries) * 2 // 3)
    repeated = ac.Bank.__new__(ac.Bank)
    vars(repeated).update(vars(bank))
    repeated.entries = {entry: bank.entries[entry._replace(step=entry.step // 2 * 2)] for entry in bank.entries}
    same = run(pipe, range(2, 3), ac.Share(bank=sparse))
    assert torch.equal(same, run(pipe, range(2, 3), ac.Share(bank=repeated)))
    assert not torch.equal(same, run(pipe, range(2, 3), ac.Share(bank=bank)))
    sparse.clear()
    assert (sparse.pictures, sparse.nbytes, sparse.entries) == (0, 0, {})
