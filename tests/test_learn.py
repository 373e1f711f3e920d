"""The exercises: stubs are not yet, solutions are right, and plausible wrong answers hear what is wrong."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEARN = ROOT / "docs" / "learn"
FOLDERS = sorted(LEARN.glob("[0-9][0-9]_*"))
PAGES = ("page.md", "page.zh-Hant.md")

# exercise -> what of its solution somebody writes otherwise, and a part of what the check says to it
WRONG = {
    1: [("T) ** 2", "T)", "squared again"),
        ("torch.cumprod(1 - betas, dim=0)", "1 - betas", "not yet multiplied"),
        ("if scaled:", "if False:", "between the square roots")],
    2: [("a.sqrt() * x0 + (1 - a).sqrt()", "a * x0 + (1 - a)", "square root"),
        ("(1 - a).sqrt()", "(1 - a.sqrt())", "not 1 - sqrt"), (".reshape(-1, 1, 1, 1)", "", "each column")],
    3: [("(x_t - sigma * eps) / alpha", "x_t - sigma * eps", "divide by alpha"),
        ("alpha * x_t - sigma * v", "alpha * x_t + sigma * v", "sign of v"),
        ("sigma * x_t + alpha * v", "alpha * v - sigma * x_t", "sign of x_t")],
    4: [("(1 - a_prev - variance)", "(1 - a_prev)", "less room"), ("eta**2", "eta", "eta^2"),
        ("a_prev**0.5 * x0", "x0", "off by")],
    5: [("(T // n)", "T // n", "whole number"), (") - 1 for", ") for", "end at T - 1"),
        ("[::-1]", "", "high to low")],
    6: [("return eps_free + s", "return eps_text + s", "counts from 0"),
        ("torch.cat([free, text])).chunk(2)", "torch.cat([text, free])).chunk(2)", "changed places"),
        ("predict(torch.cat([x, x]), t, torch.cat([free, text])).chunk(2)",
         "predict(x, t, free), predict(x, t, text)", "batches of")],
    7: [('1e-6 if name.endswith(".norm") else ', "", "has another"),
        ("(variance + 1e-6) / (variance + 1e-5)", "(variance + 1e-5) / (variance + 1e-6)", "larger eps"),
        (" ** 0.5", "", "a root")],
    8: [("value, gate", "gate, value", "first half"),
        ("F.gelu(gate)", 'F.gelu(gate, approximate="tanh")', "exact"),
        ("F.gelu(gate)", "F.silu(gate)", "SwiGLU")],
    9: [("halves[::-1] if flip else halves", "halves", "changed places"), (" - shift", "", "denominator"),
        ("torch.cat(halves[::-1] if flip else halves, dim=-1)",
         "torch.stack(halves[::-1] if flip else halves, dim=-1).flatten(1)", "not interleaved")],
    10: [(" / q.shape[-1] ** 0.5", "", "divide the scores"),
         ("q.shape[-1] ** 0.5", "x.shape[-1] ** 0.5", "one head"),
         ("(nh, -1)).transpose(1, 2)", "(-1, nh)).permute(0, 3, 1, 2)", "neighbouring"),
         ("softmax(-1)", "softmax(-2)", "last dimension")],
    11: [("(n + (i < last))", "n", "IndexError"), ("reversed(channels)", "channels", "off by"),
         ("h = width", "pass", "off by")],
    12: [("torch.zeros_like(skips.pop())", "skips.pop()", "still in"),
         ("skips.pop()", "skips[-1]", "RuntimeError"),
         ('"higher"', '"lower"', "without")],
    13: [("sigma / (alpha + sigma), eps", "sigma, eps", "on the line"), ("eps - x0", "v", "not the same"),
         ("x_t / (alpha + sigma)", "x_t", "divided by alpha + sigma"),
         ("eps - x0", "x0 - eps", "points from")],
    14: [("x - predict", "x + predict", "off by"), ("1000 * i / n", "i / n", "first call"),
         ("range(n, 0, -1)", "range(n, -1, -1)", "t = 0")],
    15: [("min(decay, (1 + s) / (10 + s))", "decay", "smaller of"), ("min(decay", "max(decay", "smaller of"),
         ("enumerate(weights[1:], 1)", "enumerate(weights[1:])", "s = 1"),
         ("(1 - keep) * w", "(1 - keep) + w", "off")],
    16: [(".square()", "", "distance is squared"), ("sigma**2", "sigma", "sigma is squared"),
         ("2 * sigma", "sigma", "below the square"), ("alpha * rows", "rows", "to alpha x_i")],
    17: [("equal / equal.sum(dim=1, keepdim=True)", "torch.eye(len(labels)).to(logits)", "counts as wrong"),
         (" / equal.sum(dim=1, keepdim=True)", "", "sum to 1"),
         (" + F.cross_entropy(logits.T, wanted)) / 2", ")", "only texts")],
    18: [("1.702 * ", "", "factor of 1.702"),
         ("torch.sigmoid(1.702 * x)", "1.702 * torch.sigmoid(x)", "inside"),
         ("(quick_gelu(x) - F.gelu(x)).abs()", "quick_gelu(x) - F.gelu(x)", "gap")],
    19: [("ids if eos == 2 else (ids == eos).int()", "ids", "added token"),
         ("ids if eos == 2 else (ids == eos).int()", "(ids == eos).int()", "old rule"),
         ("where.argmax(dim=1)", "-1", "last position")],
    20: [("(-counts[pair], pair)", "-counts[pair]", "best_pair takes"), ("+= n", "+= 1", "best_pair takes"),
         ("i += width", "i += 1", "join(")],
    21: [("torch.finfo(dtype).min", 'float("-inf")', "NaN"), ("tril", "triu", "may"),
         ("[:, None, None]", "[:, None, :, None]", "look at"), (", dtype=dtype)", ")", "float32")],
    22: [('.replace("pre_layernorm", "pre_layrnorm")', "", "missing: vision_model.pre_layrnorm"),
         ("continue ", "pass ", "unexpected"), ("tensor = tensor[0]", "pass", "another shape"),
         ("] = tensor", "] = 0 * tensor", "off by")],
    23: [("alpha / len(A)", "alpha", "divided by r"), ("alpha / len(A) * ", "", "alpha / r is missing"),
         ("B @ A", "(B @ A).T", "first A, then B"), ("W + ", "", "W itself")],
    24: [("W.abs().flatten(1).amax(1) / 127).view(-1, *[1] * (W.ndim - 1))", "W.abs().max() / 127)",
          "one factor"),
         (".round()", "", "rounded"), ("/ 127)", "/ 128)", "127, not 128"), ("W.abs()", "W", "sign")],
}  # fmt: skip


def load(name: str):
    """A file of docs/learn as a module, by a name that is not taken."""
    spec = importlib.util.spec_from_file_location(f"learn_{name.strip('_')}", LEARN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def learn(monkeypatch):
    """The command, in English, whatever the locale here."""
    for name in ("ZH", "LC_ALL", "LC_MESSAGES", "LANG", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    return load("__main__")


@pytest.fixture
def verdict(monkeypatch):
    """The judge, with what its checks import."""
    monkeypatch.syspath_prepend(LEARN)
    yield load("verdict").verdict
    for name in ("check", "answer", "compare"):
        sys.modules.pop(name, None)


def solution(folder: Path) -> Path:
    return LEARN / "solutions" / f"{folder.name}.py"


# ------------------------------------------------------------------------------------------------ the answers


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_stub_solution_and_wrong_answers(folder: Path, verdict, tmp_path: Path) -> None:
    right, why = verdict(folder, folder / "stub.py")
    assert not right and re.fullmatch(r"\w+ is still to be written", why)
    right, why = verdict(folder, solution(folder))
    assert right, why
    for old, new, words in WRONG[int(folder.name[:2])]:
        code = solution(folder).read_text(encoding="utf-8")
        assert old in code
        answer = tmp_path / "answer.py"
        answer.write_text(code.replace(old, new), encoding="utf-8")
        right, why = verdict(folder, answer)
        assert not right and words in why and "\n" not in why, (old, new, why)


@pytest.mark.parametrize("code, words", [
    ("def f(:", "SyntaxError"), ("import no_such_module", "no_such_module"),
    ("raise SystemExit(0)", "SystemExit"),
    ("x = 1", "leading"), ("def leading(n, T): pass", "leading(10, 1000) is None"),
    ("def leading(n, T):\n    return 1 / 0", "ZeroDivisionError: division by zero (line 2)"),
    ("def leading(n, T): return 'abc'", "is a str, not numbers"),
    ("def leading(n, T): return [1]", "has shape [1]"),
    ("def leading(n, T): return [float('nan')] * n", "off by up to nan"),
])  # fmt: skip
def test_a_broken_answer_is_one_line(code: str, words: str, verdict, tmp_path: Path) -> None:
    (tmp_path / "answer.py").write_text(code, encoding="utf-8")
    right, why = verdict(LEARN / "05_timesteps", tmp_path / "answer.py")
    assert not right and words in why and "\n" not in why, why


# -------------------------------------------------------------------------------------------------- the pages


def names_in(text: str) -> set[tuple[str, str]]:
    """(file, name) of each `file.py`: `name`, `name` in a page."""
    found = set()
    for path, names in re.findall(r"`([\w/]+\.py)`[:：]((?:[,、 ]*`[\w.]+`)+)", text):
        found |= {(path, name) for name in re.findall(r"`([\w.]+)`", names)}
    return found


def defined(path: str) -> set[str]:
    """Functions, classes and methods of a file, as f, C and C.f."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    inside = {f"{node.name}.{child.name}" for node in tree.body if isinstance(node, ast.ClassDef)
              for child in node.body if isinstance(child, ast.FunctionDef)}
    return inside | {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_pages_in_both_languages_name_what_there_is(folder: Path, learn) -> None:
    english, chinese = [(folder / name).read_text(encoding="utf-8") for name in PAGES]
    assert names_in(english) == names_in(chinese) != set()
    assert not [(path, name) for path, name in names_in(english) if name not in defined(path)]
    assert learn.title_and_minutes(english)[1] == learn.title_and_minutes(chinese)[1]
    for text in (english, chinese):
        assert text.startswith("# ") and text.count("\n") <= 40
    stub, done = [{node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
                   if isinstance(node, ast.FunctionDef)} for path in (folder / "stub.py", solution(folder))]
    assert stub == done and all(f"{name}(" in text for text in (english, chinese)
                                for name in stub - {"ddpm_mean"})


def test_numbers_run_through_and_each_has_wrong_answers(learn) -> None:
    assert list(learn.exercises()) == list(range(1, len(FOLDERS) + 1)) == list(WRONG)
    assert {path.stem for path in (LEARN / "solutions").glob("*.py")} == {folder.name for folder in FOLDERS}


# ------------------------------------------------------------------------------------------------ the command


def test_the_list_before_anything_is_begun(learn, tmp_path: Path, capsys, monkeypatch) -> None:
    learn.main(["--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  1  not begun    6 min  How much of the picture is left at timestep t?"
    assert len([line for line in lines if "not begun" in line]) == len(FOLDERS)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LANG", "zh_TW.UTF-8")
    learn.main(["--out", str(tmp_path / "out")])
    assert "未開始" in capsys.readouterr().out


def test_start_never_overwrites(learn, tmp_path: Path, capsys, monkeypatch) -> None:
    arguments = ["start", "8", "--out", str(tmp_path)]
    learn.main(arguments)
    answer = tmp_path / "08_geglu.py"
    assert answer.read_text(encoding="utf-8") == (LEARN / "08_geglu" / "stub.py").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert "# Which half of GEGLU is the gate?" in out and out.endswith("python docs/learn check 8\n")
    answer.write_text("mine", encoding="utf-8")
    monkeypatch.setenv("ZH", "1")
    monkeypatch.setenv("MAKELEVEL", "1")
    learn.main(arguments)
    assert answer.read_text(encoding="utf-8") == "mine"
    out = capsys.readouterr().out
    assert "哪一半是閘門" in out and out.endswith("make learn CHECK=8\n")


def test_check_and_progress(learn, tmp_path: Path, capsys, monkeypatch) -> None:
    """In a process of its own, whose prints are seen; the list runs again only what changed."""
    learn.main(["check", "5", "--out", str(tmp_path)])
    assert capsys.readouterr().out == "not begun: python docs/learn start 5\n"
    answer = tmp_path / "05_timesteps.py"
    answer.write_text(solution(LEARN / answer.stem).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "progress.json").write_text("[1", encoding="utf-8")             # damaged: as if not there
    learn.main(["--out", str(tmp_path)])
    assert "  5  right " in capsys.readouterr().out
    monkeypatch.setattr(learn, "judge", lambda folder, answer: (False, "judged anew"))
    learn.main(["--out", str(tmp_path)])
    assert "  5  right " in capsys.readouterr().out
    answer.write_text("changed", encoding="utf-8")
    learn.main(["--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "  5  not yet " in out and "judged anew" in out
    learn.main(["check", "5", "--out", str(tmp_path)])
    assert capsys.readouterr().out == "not yet: judged anew\n"


@pytest.mark.parametrize("code, limit, words", [
    ("while True: pass", 3, "no end after 3 seconds"),
    ("import os; os._exit(0)", 60, "ended before it was checked"),
])  # fmt: skip
def test_an_answer_that_never_ends_or_ends_all(code: str, limit: int, words: str, learn, tmp_path: Path,
                                               monkeypatch) -> None:
    monkeypatch.setattr(learn, "LIMIT", limit)
    (tmp_path / "05_timesteps.py").write_text(code, encoding="utf-8")
    right, why = learn.judge(LEARN / "05_timesteps", tmp_path / "05_timesteps.py")
    assert not right and words in why


@pytest.mark.parametrize("arguments", [["check"], ["start", "99"], ["begin", "1"]])
def test_what_is_mistyped_is_one_line(arguments: list[str], learn, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        learn.main(arguments)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err
