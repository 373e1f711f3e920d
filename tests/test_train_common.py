"""The pieces that both training scripts share: checkpoints that survive, metrics, flags of precision."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from miniclip.weights import WeightsError
from train.errors import UserError
from train.run import cli, loop
from train.run.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from train.run.distributed import Ranks
from train.run.folder import make_folder
from train.run.log import Metrics, Speed, StopFlag, read_rows
from train.run.settings import autocast
from train.run.state import EMA, TrainState, fingerprint
from train.train_diffusion import TrainConfig


def run_state(seed: int = 0, **config) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    return TrainState({"lr": 0.1, "out": "x", "resume": False, **config}, fingerprint(["a.png"], ["春"]),
                      model,
                      EMA(model.parameters(), 0.9), [optimizer], scaler, torch.Generator().manual_seed(seed))


def train(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(5, 3, generator=state.generator)
        state.optimizers[0].zero_grad()
        state.model(x).square().sum().backward()
        state.optimizers[0].step()
        state.ema.update(state.step)
        state.step += 1


def same(a: TrainState, b: TrainState) -> bool:
    x, y = a.capture(), b.capture()
    tensors = [[*v["model"].values(), *v["ema"], v["dice"], v["rng"],
                *(t for s in v["optimizers"][0]["state"].values() for t in s.values())] for v in (x, y)]
    plain = [{k: v[k] for k in ("config", "data", "step", "best", "scaler")} for v in (x, y)]
    return plain[0] == plain[1] and all(torch.equal(p, q) for p, q in zip(*tensors, strict=True))


@pytest.mark.parametrize("script", ["train_diffusion", "train_clip"])
def test_help_goes_by_sections_and_names_every_flag_once(script: str, capsys) -> None:
    config = importlib.import_module(f"train.{script}").TrainConfig
    with pytest.raises(SystemExit) as end:
        cli.parse_flags(config, "What it does.", ["--help"])
    page = capsys.readouterr().out
    assert end.value.code == 0 and page.startswith("usage: ") and page.index("\n") < 60
    sections = [line for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections[:3] == ["options:", "data and run folder:",
                            "model and training:"] and sections[-1] == "checkpoints:"
    for field in dataclasses.fields(config):
        assert len(re.findall(rf"^  --{field.name.replace('_', '-')}[ ,]", page, re.M)) == 1


# ------------------------------------------------------------------------------------------------ checkpoints


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code in a pickle ran",)


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    """The less the score the better; none, or one that is no number, is never the best."""
    checkpoints, state, alone = Checkpoints(tmp_path, keep=1), run_state(), Ranks(0, 1, torch.device("cpu"))
    for step, (score, best) in enumerate([(math.inf, None), (0.5, 1), (math.nan, 1), (0.6, 1), (0.4, 4),
                                          (math.inf, 4)]):
        state.step = step
        loop.save(state, checkpoints, alone, score)
        assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == step
        assert (load_checkpoint(tmp_path / "best.pt")["step"] if best else None) == best
    loop.save(state, Checkpoints(tmp_path / "none", keep=1), alone._replace(rank=1))
    assert not (tmp_path / "none").exists() and state.best == 0.4


def test_a_restored_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole, first = run_state(), run_state()
    train(whole, 7)
    torch.manual_seed(0)
    first = run_state()
    train(first, 3)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(first.capture(), best=False)
    torch.manual_seed(99)
    second = run_state(seed=5)
    second.restore(checkpoints.load(print), ())
    assert same(first, second)
    train(second, 4)
    torch.manual_seed(0)
    whole = run_state()
    train(whole, 7)
    assert same(whole, second)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=3), run_state()
    for step in range(6):
        state.step = step
        checkpoints.save(state.capture(), best=step == 1)
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"checkpoint.pt": 5, "checkpoint.1.pt": 4, "checkpoint.2.pt": 3, "best.pt": 1}
    Checkpoints(tmp_path / "none", keep=1)
    (tmp_path / "one").mkdir()
    one = Checkpoints(tmp_path / "one", keep=1)
    one.save(state.capture(), best=False)
    one.save(state.capture(), best=False)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("killed_at", range(6))
def test_a_kill_between_any_two_file_operations_of_a_save_costs_nothing(
        tmp_path: Path, monkeypatch, killed_at: int) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=2), run_state()
    for step in (1, 2):
        state.step = step
        checkpoints.save(state.capture(), best=True)
    calls, replace = [], os.replace

    def dies(source, target):
        calls.append(1)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    state.step = 3
    try:
        checkpoints.save(state.capture(), best=True)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    newest = Checkpoints(tmp_path, keep=2).load(pytest.fail)["step"]        # no warning: nothing is damaged
    assert newest == (2 if killed_at < 2 else 3)
    for state.step in range(newest + 1, 5):
        checkpoints.save(state.capture(), best=state.step == 3)
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.glob("*.pt")}
    assert steps == {"checkpoint.pt": 4, "checkpoint.1.pt": 3, "best.pt": 3}    # as if nothing had happened


def test_a_damaged_newest_falls_back_with_a_line(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=2), run_state()
    for step in (1, 2):
        state.step = step
        checkpoints.save(state.capture(), best=False)
    good, newest = checkpoints.kept[0].read_bytes(), checkpoints.kept[0]
    damaged = {"hostile": pickle.dumps(Bomb(), protocol=2), "cut": good[:-700], "empty": b"",
               "one byte": good[:1600] + bytes([good[1600] ^ 1]) + good[1601:]}
    for content in damaged.values():
        newest.write_bytes(content)
        lines: list[str] = []
        assert checkpoints.load(lines.append)["step"] == 1
        assert len(lines) == 1 and "checkpoint.pt" in lines[0] and "before" in lines[0]
    newest.unlink()
    assert checkpoints.load(pytest.fail)["step"] == 1
    checkpoints.kept[1].write_bytes(b"no pickle")
    with pytest.raises(UserError, match="checkpoint.1.pt"):
        checkpoints.load(print)


def places(value, path=()):
    """The path to each part of a checkpoint, containers included."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, (list, tuple)) else ()
    for key, part in entries:
        if key in (0, "0.weight") or not isinstance(key, int) and "." not in key:       # the first of a kind
            yield from places(part, (*path, key))


def with_part(value, path, part):
    """A copy with another value at a path; `DROP` for none."""
    if not path:
        return part
    copy = dict(value) if isinstance(value, dict) else list(value)
    if part is DROP and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = with_part(copy[path[0]], path[1:], part)
    return copy


DROP = object()
STRANGE = [DROP, None, True, "x", -1, 10**30, math.nan, [], {}, [[]], {"x": {}}, torch.zeros(0),
           torch.zeros(1, 7), torch.zeros(1, dtype=torch.complex64), torch.zeros(1).expand(30_000, 30_000)]


def test_whatever_is_wrong_inside_of_the_newest_the_one_before_goes_on(tmp_path: Path, monkeypatch) -> None:
    """Each part in turn replaced by something else: the checkpoint before, or a run that trains."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    torch.manual_seed(0)
    checkpoints, state = Checkpoints(tmp_path, keep=2), run_state(steps=9)
    for _ in range(2):
        train(state, 1)
        checkpoints.save(state.capture(), best=False)
    good, fell_back = state.capture(), 0
    paths = [path for path in places(good) if path and (path[0] not in ("data", "config") or len(path) == 1)]
    for path, part in itertools.product(paths, STRANGE):
        if not (path == ("data",) and part == {}):          # of other data: nothing is damaged
            save_checkpoint(checkpoints.kept[0], with_part(good, path, part))
            lines: list[str] = []
            again = run_state(seed=1, steps=9)
            found = checkpoints.load(lines.append, lambda saved, again=again: again.check(saved, ()))
            again.restore(found, ())
            train(again, 1)
            assert len(lines) == (found["step"] == 1), (path, part)
            assert all("checkpoint.pt: " in line and "\n" not in line and len(line) < 600 for line in lines)
            fell_back += len(lines)
    assert fell_back > 300


def test_names_that_look_like_checkpoints(tmp_path: Path) -> None:
    state = run_state()
    for name in ("checkpoint.1x.pt", "checkpoint.1²2.pt", f"checkpoint.{9**20}.pt", "checkpoint.-1.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="there is no .*checkpoint.pt"):
        Checkpoints(tmp_path, keep=2).load(pytest.fail)
    (tmp_path / "checkpoint.pt").mkdir()
    Checkpoints(tmp_path / "x", keep=1)
    save_checkpoint(tmp_path / "checkpoint.12.pt", state.capture())
    lines: list[str] = []
    assert Checkpoints(tmp_path, keep=2).load(lines.append)["step"] == 0
    assert len(lines) == 1 and "checkpoint.pt: not a regular file" in lines[0]


def test_a_flipped_byte_anywhere_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, run_state().capture())
    good = path.read_bytes()
    unseen = []
    for i in range(0, len(good), 97):
        path.write_bytes(good[:i] + bytes([good[i] ^ 0x10]) + good[i + 1:])
        try:
            state = load_checkpoint(path)
        except (UserError, WeightsError):
            continue
        unseen.append(state["model"]["0.weight"])
    path.write_bytes(good)
    assert all(torch.equal(weight, load_checkpoint(path)["model"]["0.weight"]) for weight in unseen)
    assert len(unseen) < 0.5 * len(good) / 97       # padding and unused fields of the archive hold nothing


def test_a_disk_that_fills_up_while_saving(tmp_path: Path, monkeypatch) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=2), run_state()
    checkpoints.save(state.capture(), best=False)

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="checkpoint.new.pt: cannot be written"):
        checkpoints.save(state.capture(), best=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert checkpoints.load(print)["step"] == 0


def test_resuming_another_run_is_refused() -> None:
    saved = run_state().capture()
    run_state(out="elsewhere").restore(saved, ("out",))
    with pytest.raises(UserError, match="lr = 0.1, not 0.2"):
        run_state(lr=0.2).restore(saved, ("out",))
    run_state(added_later=3).restore(saved, ())         # a flag younger than the checkpoint has its default
    other = run_state()
    other.data = fingerprint(["a.png"], ["滿"])
    with pytest.raises(UserError, match="data is not"):
        other.restore(saved, ())
    del saved["model"]["0.bias"]
    with pytest.raises(UserError, match="another model"):
        run_state().restore(saved, ())


def test_frozen_weights_are_not_in_the_checkpoint() -> None:
    state = run_state()
    state.model[0].requires_grad_(False)
    saved = state.capture()
    assert set(saved["model"]) == {"2.weight", "2.bias"}
    state.restore(saved, ())


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in (".checkpoint.pt.0123456789ab.tmp", "model/.x.ba9876543210.tmp", ".mine.tmp",
                 "0123456789ab.tmp"):
        (tmp_path / name).write_text("x")
    make_folder(tmp_path, write=False)
    assert len(list(tmp_path.rglob("*.tmp"))) == 4
    make_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.tmp")) == [".mine.tmp", "0123456789ab.tmp"]


# ------------------------------------------------------------------------------------------ metrics and speed


def test_metrics_of_a_resumed_run_are_those_of_one_never_stopped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def write(metrics: Metrics, steps: range, evaluated_at_start: bool) -> None:
        for step in steps:
            if step % 2 == 0 and (step > steps.start or evaluated_at_start):
                metrics.add(step=step, val=step)
            metrics.add(step=step, loss=step)

    write(Metrics(path), range(0, 6), True)
    whole = path.read_bytes()
    for checkpoint in range(6):
        path.write_bytes(whole + b'{"step": 6, "lo')               # torn by the kill
        write(Metrics(path, resume_at=checkpoint), range(checkpoint, 6), False)
        assert path.read_bytes() == whole
    assert Metrics(path).rows == [] and path.read_bytes() == b""    # a fresh run starts a fresh file


@pytest.mark.parametrize("line", [b"[1]", b'{"loss": 1}', b'{"step": 1, "loss": "x"}', b"\xff", b"",
                                  b'{"step": 1, "loss": [2]}', b'{"step": 1e400}', b"{" * 9999])
def test_damage_before_the_last_line_of_metrics_is_one_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": NaN}\n' + line + b'\n{"step": 2, "loss": 1}\n')
    whole = path.read_bytes()
    with pytest.raises(WeightsError, match="metrics.jsonl, line 2: ") as caught:
        Metrics(path, resume_at=2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and path.read_bytes() == whole
    path.write_bytes(b'{"step": 0, "loss": NaN}\n' + line)             # the same, torn: cut off
    assert math.isnan(Metrics(path, resume_at=2).rows[0]["loss"]) and path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("lines", [
    [b'{"step": 1},{"step": 2', b'"x": 3}'], [b'{"step": 1}, {"step": 2}'], [b'{"},', b'{": 1, "step": 1}'],
    [b'{"},', b'{": 1, "step": 1},{"step": 2}'], [b'{"step": 1}]}'], [b'{"step": 1}], "rows": [{"step": 1}'],
])
def test_lines_that_are_rows_only_together_are_none(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + b"\n".join(lines) + b"\n")
    with pytest.raises(WeightsError, match="metrics.jsonl, line 2: not JSON"):
        read_rows(path)
    path.write_bytes(b"".join(b'{"step": %d}\r\n' % i for i in range(12_000)))
    assert [row["step"] for row in read_rows(path)] == list(range(12_000))


def test_rows_that_memory_is_not_taken_for(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" * 101)
    monkeypatch.setattr("train.run.log.MAX_ROWS", 100)
    with pytest.raises(WeightsError, match="a.jsonl: more than 100 lines"):
        read_rows(tmp_path / "a.jsonl")
    monkeypatch.setattr("train.run.log.MAX_ROW_BYTES", 100)
    with pytest.raises(WeightsError, match="a.jsonl: a file of more than 100 bytes"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "speed.jsonl").write_bytes(b'{"step": 2}\n')
    with pytest.raises(WeightsError, match="speed.jsonl, line 1: no seconds"):
        Metrics(tmp_path / "speed.jsonl", 3, ("step", "seconds"))


def test_only_the_first_process_writes_metrics(tmp_path: Path) -> None:
    metrics = Metrics(None)
    metrics.add(step=0, loss=1.0)
    assert metrics.series("loss") == [(0, 1.0)] and not list(tmp_path.iterdir())


def test_speed(tmp_path: Path) -> None:
    speed = Speed(Metrics(tmp_path / "speed.jsonl"), torch.device("cpu"), steps=200, batch=4)
    for step in range(7):
        speed.add(step)
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["pictures_per_second"] > 0 and row["memory_mib"] >= 0 for row in rows)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_asks_and_a_second_interrupt_ends(name: str) -> None:
    flag = StopFlag()
    try:
        signal.raise_signal(getattr(signal, name))
        assert flag.set
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        flag.restore()


# -------------------------------------------------------------------------------------------------- precision


def test_autocast() -> None:
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    for precision, dtype in (("auto", torch.float32), ("float32", torch.float32), ("bf16", torch.bfloat16),
                             ("fp16", torch.float16)):
        context = autocast(precision, cpu)
        for _ in range(2):                      # one context, entered at each step
            with context:
                assert (x @ x).dtype == dtype
    with pytest.raises(UserError, match="--precision fp16"):
        autocast("fp16", torch.device("mps"))


def test_help_shows_defaults_but_no_empty_ones(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.parse_flags(TrainConfig, "text", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 220)" in said and "(default: )" not in said and "checkpoints to keep" in said


def test_best_starts_at_infinity() -> None:
    assert run_state().best == math.inf
