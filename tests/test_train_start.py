"""How a run starts: never over another one unasked, on from one with its settings or for longer;
what flags may hold."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from miniclip.image_text import Preset as MatcherPreset
from minidiff.text_to_image import Preset
from tests.test_train_parallel import needs_fork, together
from train import judge, train_clip, train_diffusion, validation
from train.errors import UserError
from train.run import cli, distributed, loop
from train.run.checkpoint import load_checkpoint, save_checkpoint
from train.run.cli import check_flags, command, parse_flags

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "diffusion": (train_diffusion, {"data": str(ROOT / "data" / "calligraphy"), "size": 16, "preset": "tiny",
                                    "steps": 4,
                                    "batch": 4, "samples": 1, "sample_steps": 1, "device": "cpu"}),
    "clip": (train_clip, {"data": str(ROOT / "data" / "herbs"), "size": 32, "preset": "vit-tiny", "steps": 4,
                          "batch": 8,
                          "checks": 1, "hold_out": "artist=twitter", "device": "cpu"}),
}
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))
    monkeypatch.setitem(train_clip.PRESETS, "vit-tiny", MatcherPreset("vit", 32, (1,), 8, 32, 1, 32))
    monkeypatch.setattr(validation, "TIMESTEPS", (499,))


def train(name: str, out: Path, **changes) -> Path:
    script, flags = SCRIPTS[name]
    script.main(script.TrainConfig(**{**flags, "out": str(out), **changes}))
    return out


def from_shell(name: str, *argv: str) -> None:
    script, _ = SCRIPTS[name]
    script.main(parse_flags(script.TrainConfig, "", list(argv)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def steps_in(out: Path) -> list[int]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["step"] for row in rows if "loss" in row]


# ------------------------------------------------------------------------------------------- over another run


@both
def test_a_run_is_not_written_over_unasked(name: str, tmp_path: Path) -> None:
    before = contents(train(name, tmp_path / "run"))
    with pytest.raises(UserError, match=r"holds a run already \(checkpoint.*--resume.*--overwrite"):
        train(name, tmp_path / "run", steps=2)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("mark", ["checkpoint.1.pt", "checkpoint.new.pt", "best.pt", "model/",
                                  "metrics.jsonl"])
def test_what_makes_a_run_folder(mark: str, tmp_path: Path) -> None:
    (tmp_path / mark).mkdir() if mark.endswith("/") else (tmp_path / mark).touch()
    with pytest.raises(UserError, match=re.escape(f"holds a run already ({mark.rstrip('/')})")):
        train("diffusion", tmp_path)


def test_a_folder_of_other_files_is_free(tmp_path: Path) -> None:
    for other in ("notes.txt", "config.json", "samples/mine.png"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("mine", encoding="utf-8")
    train("diffusion", tmp_path)
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "samples" / "mine.png").exists()


@both
def test_overwriting_leaves_what_a_first_run_leaves_and_other_files(name: str, tmp_path: Path) -> None:
    """Longer, with other pictures on the way and more checkpoints: nothing of it is left,
    not even a folder."""
    out, more = tmp_path / "run", {"samples": 5} if name == "diffusion" else {"checks": 5}
    wanted = set(contents(train(name, tmp_path / "first")))
    train(name, out, steps=9, save_every=1, keep=5, **more)
    ours = ("skipped.1.txt", "evaluation.html", "lora/adapter_config.json", "index-other/index.json",
            "model/vae/config.json",
            "model/vocab.txt", "matrix/held_out_000009.png", "samples/000009.png", "checkpoint.new.pt")
    theirs = ("notes.txt", "samples/mine.png", "model/unet/notes.md", "checkpoint.mine.pt",
              "cache/x.safetensors", "index.json")
    for file in (*ours, *theirs):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("old", encoding="utf-8")
    train(name, out, overwrite=True)
    assert set(contents(out)) == wanted | set(theirs)
    assert not (out / "lora").exists() and not (out / "model" / "vae").exists()
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert settings["steps"] == 4 and not {"resume", "overwrite"} & set(settings)
    train(name, out, resume=True)                       # neither is it a setting that a checkpoint remembers


def test_what_is_refused_costs_the_earlier_run_nothing(tmp_path: Path) -> None:
    before = contents(train("clip", tmp_path / "run"))
    for changes in ({"data": str(tmp_path / "nowhere")}, {"hold_out": "artist=nobody"}, {"resume": True},
                    {"init": str(tmp_path / "run" / "model")}, {"init": str(tmp_path / "nowhere")}):
        with pytest.raises(Exception, match=r"nowhere|nobody|--resume, --overwrite: give one|lies in --out"):
            train("clip", tmp_path / "run", overwrite=True, **changes)
    assert contents(tmp_path / "run") == before


@needs_fork
@both
def test_two_processes_share_the_refusal_and_the_removal(name: str, tmp_path: Path, capfd) -> None:
    out = train(name, tmp_path / "run", steps=3, optimizer="adamw")
    (out / "skipped.1.txt").write_text("old", encoding="utf-8")
    before = contents(out)
    assert together(2, lambda: train(name, out, optimizer="adamw")) == [2, 2]
    assert capfd.readouterr().err.count("holds a run already") == 2 and contents(out) == before
    assert together(2, lambda: train(name, out, optimizer="adamw", overwrite=True)) == [0, 0]
    assert steps_in(out) == [0, 1, 2, 3] and not (out / "skipped.1.txt").exists()


@needs_fork
def test_the_others_wait_until_the_earlier_run_is_gone(tmp_path: Path, monkeypatch) -> None:
    """What they leave from then on is of the new run."""
    def slowly(out: Path) -> None:
        time.sleep(0.5)
        (out / "cleared").touch()

    def work() -> None:
        cfg = train_clip.TrainConfig(out=str(tmp_path), overwrite=True)
        loop.begin(cfg, tmp_path, distributed.init(torch.device("cpu")))
        assert (tmp_path / "cleared").exists()

    monkeypatch.setattr(loop, "clear", slowly)
    assert together(2, work) == [0, 0]


def test_a_report_shows_pictures_of_its_own_run_alone(tmp_path: Path) -> None:
    """Those of later steps than the one resumed at are from a life that is over."""
    out = train("diffusion", tmp_path / "run", save_every=1, keep=9)
    for step in (1, 777):
        (out / "samples" / f"{step:06d}.png").write_bytes((out / "samples" / "000004.png").read_bytes())
    (out / "checkpoint.3.pt").replace(out / "checkpoint.pt")                # of step 1
    train("diffusion", out, save_every=1, keep=9, samples=0, resume=True)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<figcaption>after (\d+) steps",
                      page) == ["0"] and page.count("data:image/png;base64,") == 2
    assert "Newest samples" in page


def test_a_judge_is_not_written_over_unasked(tmp_path: Path) -> None:
    (tmp_path / "judge.pt").write_bytes(b"trained for hours")
    with pytest.raises(UserError, match=r"holds a judge already \(judge.pt\); --overwrite"):
        judge.main(judge.JudgeConfig(out=str(tmp_path), fonts=str(tmp_path / "none")))
    with pytest.raises(UserError, match="--fetch"):                  # asked to, it goes on to look for fonts
        judge.main(judge.JudgeConfig(out=str(tmp_path), fonts=str(tmp_path / "none"), overwrite=True))


# ---------------------------------------------------------------------------------------------- on from a run


@both
def test_resume_takes_the_settings_of_the_run(name: str, tmp_path: Path) -> None:
    """And a flag that is given wins, and is held against the checkpoint."""
    script, _ = SCRIPTS[name]
    out = train(name, tmp_path / "run", save_every=2, ema=0.5, lr=0.002)
    settings = (out / "config.json").read_bytes()
    (out / "checkpoint.pt").unlink()
    from_shell(name, "--out", str(out), "--resume")
    assert steps_in(out) == [0, 1, 2, 3] and (out / "config.json").read_bytes() == settings
    cfg = parse_flags(script.TrainConfig, "", ["--out", str(out), "--resume", "--keep", "7", "--no-jitter"])
    assert (cfg.keep, cfg.jitter, cfg.ema, cfg.resume, cfg.out) == (7, False, 0.5, True, str(out))
    with pytest.raises(UserError, match="trained with lr = 0.002, not 0.5"):
        from_shell(name, "--out", str(out), "--resume", "--lr", "0.5")
    moved = out.rename(tmp_path / "moved")
    assert parse_flags(script.TrainConfig, "", ["--out", str(moved), "--resume"]).out == str(moved)


@both
def test_resume_steps_over_a_checkpoint_that_is_wrong_inside(name: str, tmp_path: Path, capsys) -> None:
    out = train(name, tmp_path / "run", save_every=2)
    state = load_checkpoint(out / "checkpoint.pt")
    state["optimizers"][0]["param_groups"][0]["lr"] = "fast"
    save_checkpoint(out / "checkpoint.pt", state)
    before = load_checkpoint(out / "checkpoint.1.pt")["step"]
    capsys.readouterr()
    train(name, out, save_every=2, resume=True)
    said = capsys.readouterr().out
    assert f"resumed at step {before}" in said and steps_in(out) == [0, 1, 2, 3]
    assert re.search(r"warning: .*checkpoint.pt: damaged: .*lr is 'fast'.*; trying the checkpoint b", said)


@pytest.mark.parametrize("text, words", [
    (None, "no .*config.json to take the run's settings from"), ("{", "config.json: not JSON"),
    ("[]", "expected a JSON object"),
    ('{"caption_drop": 0.1}', "'caption_drop' is no setting of train.train_clip"),
    ('{"lr": -1}', "lr = -1: must be above 0"), ('{"steps": "4"}', "steps = '4': must be a whole number"),
    ('{"jitter": 1}', "jitter = 1: must be true or false"),
    ('{"preset": "huge"}', "preset = 'huge': must be one of tiny"),
    ('{"data": 3}', "data = 3: must be a text"),
])  # fmt: skip
def test_settings_that_cannot_be_taken_are_one_line(text: str | None, words: str, tmp_path: Path,
                                                    capsys) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        cli.start(lambda: from_shell("clip", "--out", str(tmp_path), "--resume"))
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and re.search(words, said) and "\n" not in said


def test_an_older_config_has_the_defaults_of_newer_flags(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"steps": 7, "out": "elsewhere", "clip": 2}', encoding="utf-8")
    cfg = parse_flags(train_clip.TrainConfig, "", ["--out", str(tmp_path), "--resume"])
    assert cfg == train_clip.TrainConfig(steps=7, clip=2, out=str(tmp_path), resume=True)


@both
def test_a_run_grows_and_never_shrinks_below_what_is_done(name: str, tmp_path: Path, capsys) -> None:
    out = train(name, tmp_path / "run")
    capsys.readouterr()
    from_shell(name, "--out", str(out), "--resume", "--steps", "7")
    said = capsys.readouterr().out
    longer = "planned for 4 steps, it now ends after 7: the learning rate follows the new length"
    assert f"resumed at step 4; {longer}" in said
    assert steps_in(out) == [0, 1, 2, 3, 4, 5, 6]
    assert load_checkpoint(out / "checkpoint.pt")["config"]["steps"] == 7
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = {row["step"]: row["lr"] for row in rows if "loss" in row}
    fall = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / 7)) for step in (4, 5, 6)]
    assert [rate[step] for step in (4, 5, 6)] == pytest.approx([min(1, (s + 1) / 20) * f
                                                                for s, f in zip((4, 5, 6), fall)])
    for fewer in (7 - 1, 3):
        with pytest.raises(UserError, match=f"--steps {fewer}: this run has done 7 already"):
            train(name, out, steps=fewer, resume=True)
    capsys.readouterr()
    train(name, out, steps=7, resume=True)
    assert "planned for" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ flags


CONFIGS = {"train_diffusion": "TrainConfig", "train_clip": "TrainConfig", "judge": "JudgeConfig",
           "sample": "SampleConfig", "search": "SearchConfig", "evaluate": "EvaluateConfig",
           "evaluate_clip": "EvaluateConfig", "merge_lora": "MergeConfig"}
TOO_LOW = {"guidance": -1001, "scale": -1001}


@pytest.mark.parametrize("script, config", CONFIGS.items())
def test_every_number_has_limits_that_main_holds(script: str, config: str) -> None:
    module = importlib.import_module(f"train.{script}")
    config = getattr(module, config)
    numbers = [f for f in dataclasses.fields(config) if type(f.default) in (int, float)]
    assert numbers
    for f in numbers:
        name = "--" + f.name.replace("_", "-")
        for value in (TOO_LOW.get(f.name, -1), 10**30, math.nan, math.inf, -math.inf, "3", True, None):
            with pytest.raises(UserError, match=f"^{name} {value}: "):
                module.main(config(**{f.name: value}))
    check_flags(config())


@pytest.mark.parametrize("script, argv, words", [
    ("train_diffusion", ["--lr", "-1"], "--lr -1: must be above 0"),
    ("train_clip", ["--lr", "nan"], "--lr nan: must be above 0"),
    ("train_clip", ["--muon-lr", "0"], "--muon-lr 0: must be above 0"),
    ("train_clip", ["--seed", "9" * 20], f"--seed {'9' * 20}: from 0 to 9,223,372,036,854,775,807"),
    ("sample", ["--guidance", "nan"], "--guidance nan: from -1,000 to 1,000"),
    ("evaluate", ["--guidance=-inf"], "--guidance -inf"),
    ("train_diffusion", ["--warmup", "-5"], "--warmup -5: at least 0"),
    ("train_diffusion", ["--clip", "1e99"], "--clip 1e99: at most 1,000,000,000"),
    ("train_diffusion", ["--steps", "many"], "--steps many: must be a whole number"),
    ("train_clip", ["--preset", "huge"], "--preset huge: must be one of tiny, "),
])  # fmt: skip
def test_a_flag_out_of_range_is_one_line(script: str, argv: list[str], words: str, capsys) -> None:
    module, name = importlib.import_module(f"train.{script}"), CONFIGS[script]
    with pytest.raises(SystemExit) as end:
        cli.start(lambda: module.main(parse_flags(getattr(module, name), "", argv)))
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and said.startswith("error: ") and words in said and "\n" not in said


@both
def test_a_run_folder_is_not_its_model(name: str, tmp_path: Path) -> None:
    first = train(name, tmp_path / "first", steps=1)
    with pytest.raises(UserError, match=re.escape(f"--init {first}: a run folder; did you mean "
                                                  f"{first / 'model'}?")):
        train(name, tmp_path / "second", init=str(first))
    train(name, tmp_path / "second", steps=1, init=str(first / "model"))


# -------------------------------------------------------------------------------------------- what is printed


def test_a_command_can_be_pasted(tmp_path: Path, monkeypatch) -> None:
    words = command("search", run="my runs/春", text="it's 薑", top=3, resume=True)
    assert shlex.split(words) == [cli.interpreter(), "-m", "train.search", "--run", "my runs/春", "--text",
                                  "it's 薑",
                                  "--top", "3", "--resume"]
    assert shlex.split(command("x", text="-5")) == [cli.interpreter(), "-m", "train.x", "--text=-5"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv" / "bin" / "python"))
    assert command("x", out="a") == f"{Path('.venv', 'bin', 'python')} -m train.x --out a"


def test_a_command_for_windows(monkeypatch) -> None:
    monkeypatch.setattr(cli, "interpreter", lambda: r"C:\My Python\python.exe")
    monkeypatch.setattr(cli.os, "name", "nt")
    said = command("sample", run="my runs", prompt="春 草書")
    monkeypatch.undo()
    assert said == r'"C:\My Python\python.exe" -m train.sample --run "my runs" --prompt "春 草書"'


def test_the_closing_line_names_a_command_that_runs(tmp_path: Path, capsys) -> None:
    out = train("clip", tmp_path / "my herbs", steps=1)
    asked = capsys.readouterr().out.strip().splitlines()[-1].split("ask with ")[1]
    done = subprocess.run(shlex.split(asked), cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and (out / "hits.png").exists(), done.stderr


@both
def test_a_stopped_run_says_how_to_go_on(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    script, _ = SCRIPTS[name]

    class StopAtOnce(loop.StopFlag):
        def __init__(self) -> None:
            super().__init__()
            self.set = True

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopFlag", StopAtOnce)
        out = train(name, tmp_path / "my run")
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].split("go on with ")[1])
    assert words == [cli.interpreter(), "-m", f"train.train_{name}", "--out", str(out), "--resume"]
    from_shell(name, *words[3:])
    assert steps_in(out) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", [*CONFIGS, "compare"])
def test_usage_names_the_module(module: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(f"train.{module}", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith(f"usage: python -m train.{module} ")


@pytest.mark.skipif(os.name == "nt", reason="a pipe that is closed early, as POSIX has it")
@pytest.mark.parametrize("argv", [
    ["train.train_clip", "--preset", "vit-tiny", "--size", "32", "--steps", "3", "--device", "cpu"],
    ["train.sample", "--help"], ["train.compare", "--help"],
], ids=["while it trains", "help", "help of compare"])  # fmt: skip
def test_a_reader_that_leaves_ends_a_script_quietly(argv: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    more = ["--out", str(tmp_path / "run")] if "--steps" in argv else []
    done = subprocess.run([sys.executable, "-m", *argv, *more], cwd=ROOT, stdout=writer,
                          stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""})
    os.close(writer)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_an_error_is_told_even_if_nobody_reads_the_output(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "train.sample", "--count", "0"], cwd=ROOT, stdout=writer,
                          text=True, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 2 and done.stderr.strip() == "error: --count 0: from 1 to 100,000"
