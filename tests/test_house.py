"""The house stands as docs/architecture.md says: which way imports point, what may be copied out,
what keeps working."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miniclip import image_text
from minidiff import text_to_image
from train import sample, search, train_clip, train_diffusion

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
         for part in ("miniclip", "minidiff", "data", "train") for path in (ROOT / part).rglob("*.py")
         if path.parent.name != "embed"}            # what exports copy beside their graphs: runs alone
EMBEDDED = sorted(ROOT.glob("mini*/embed/*.py"))
MAY_IMPORT = {"miniclip": {"miniclip"}, "minidiff": {"miniclip", "minidiff"},
              "train": {"miniclip", "minidiff", "train"}, "data": {"data", "miniclip", "train"}}
HEAVY = {"torchvision", "PIL", "numpy"}             # only where an image is read, in the two packages
UNET_ALONE = ("miniclip/files.py", "miniclip/config.py", "miniclip/output.py", "miniclip/habits.py",
              "miniclip/weights.py", "minidiff/config.py", "minidiff/habits.py", "minidiff/embeddings.py",
              "minidiff/resnet.py", "minidiff/attention.py", "minidiff/unet.py")


def imports(path: str, tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(module, names) of each import in a tree; relative ones spelled out."""
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.removesuffix(".py").split("/")[:-node.level] if node.level else []
            found.append((".".join([*package, *([node.module] if node.module else [])]),
                          [a.name for a in node.names]))
    return found


def at_import(path: str) -> list[tuple[str, list[str]]]:
    """The imports that run when a module is imported: not those inside of functions, nor of type checkers."""
    body = [node for node in FILES[path].body
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If))]
    return imports(path, ast.Module(body, []))


def own(name: str) -> bool:
    return name.split(".")[0] in MAY_IMPORT


def file_of(module: str) -> str | None:
    path = module.replace(".", "/")
    return next((p for p in (f"{path}.py", f"{path}/__init__.py") if p in FILES), None)


# ------------------------------------------------------------------------------------------------ the imports


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path: str) -> None:
    found = {module.split(".")[0] for module, _ in at_import(path) if own(module)}
    assert found <= MAY_IMPORT[path.split("/")[0]]
    if path.startswith("mini"):
        assert not HEAVY & {module.split(".")[0] for module, _ in at_import(path)}
    if path.startswith("train/run/"):                   # knows nothing of what is trained
        assert all(m.startswith(("train.run", "train.errors", "miniclip"))
                   for m, _ in at_import(path) if own(m))


def test_the_judge_alone_reaches_into_data() -> None:
    """Inside of functions: an installed minidiff_train has no data beside it."""
    reaching = {path for path in FILES if path.startswith("train") and
                any(module.split(".")[0] == "data" for module, _ in imports(path, FILES[path]))}
    assert reaching == {"train/judge.py"}


def test_no_script_imports_another() -> None:
    """But the gallery, which is made of what others leave."""
    scripts = {path.removesuffix(".py").replace("/", ".") for path in FILES if path.startswith("train/")
               and any(isinstance(node, ast.FunctionDef) and node.name == "main"
                       for node in FILES[path].body)}
    assert len(scripts) == 16
    for path in set(FILES) - {"train/gallery.py"}:
        for module, names in imports(path, FILES[path]):
            assert not scripts & {module, *(f"{module}.{name}" for name in names)}, path


def test_there_is_no_import_cycle() -> None:
    needs = {path: {file_of(m) for module, names in at_import(path)
                    for m in (module, *(f"{module}.{n}" for n in names))}
             - {None, path} for path in FILES}
    packages = {path for path in FILES if path.endswith("__init__.py")}     # which only re-export
    done: set[str] = set()

    def visit(path: str, above: tuple[str, ...]) -> None:
        assert path not in above, f"{' -> '.join(above)} -> {path}"
        if path not in done:
            for other in needs[path] - packages:
                visit(other, (*above, path))
            done.add(path)

    for path in set(FILES) - packages:
        visit(path, ())


@pytest.mark.parametrize("path", FILES)
def test_no_private_name_is_used_across_files(path: str) -> None:
    for module, names in imports(path, FILES[path]):
        assert not own(module) or not [name for name in names if name.startswith("_")], (path, module)


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = {f"{path}:{node.name}" for path, tree in FILES.items() for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60}
    assert long == {"minidiff/pipeline.py:__call__"}


@pytest.mark.parametrize("path", FILES)
def test_what_is_public_has_a_docstring(path: str) -> None:
    nodes = [node for node in ast.walk(FILES[path]) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    inner = {id(child) for node in nodes if isinstance(node, ast.FunctionDef)
             for child in ast.walk(node) if child is not node}
    assert not [f"{node.name}, line {node.lineno}" for node in nodes if id(node) not in inner
                and not node.name.startswith("_") and not ast.get_docstring(node)]


def test_the_architecture_page_names_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {path.split("/")[-1] for path in [*FILES, *map(str, EMBEDDED)]} - {"__init__.py"}
    assert not [name for name in names if f"`{name}`" not in page]


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: path.name)
def test_what_exports_copy_runs_without_us_and_can_be_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = {module.split(".")[0] for module, _ in imports("embed", ast.parse(text))}
    assert found - set(sys.stdlib_module_names) <= {"numpy", "onnxruntime", "PIL", "tokens"}
    assert text.count("\n") < 200
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'{path.parent.parent.name} = ["embed/*"]' in project        # so that an installed package has it


# --------------------------------------------------------------------------- one way in for each kind of file

READERS = ("miniclip/files.py", "miniclip/convert.py")      # of JSON, zips and pickles
MAY_OPEN = {                # which files may use a module or a function; no other in the project
    "Image.open": ("miniclip/picture.py",), "json.load": (), "json.loads": READERS, "torch.load": READERS,
    "zipfile": READERS, "pickle": READERS, "marshal": (), "shelve": (), "np.load": (), "numpy.load": (),
    "tarfile": ("data/packages.py",), "bz2": ("data/packages.py",),
    "gzip": ("data/packages.py", "miniclip/tokenizer.py"),
}


def dotted(node: ast.AST) -> str:
    """a.b.c of an expression, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", FILES)
def test_files_from_outside_are_opened_in_one_place_for_each_kind(path: str) -> None:
    used = {dotted(node) for node in ast.walk(FILES[path]) if isinstance(node, ast.Attribute)}
    for module, names in imports(path, FILES[path]):
        used |= {module, *(f"{module.removeprefix('PIL.')}.{name}" for name in names)}
    found = {name for name, places in MAY_OPEN.items() if path not in places
             and any(use == name or use.startswith(f"{name}.") or use.endswith(f".{name}") for use in used)}
    assert not found, f"{path}: there are open_picture of miniclip.picture, and the readers of miniclip.files"


# --------------------------------------------------------------------------------------- copied and installed


def run_in(folder: Path, code: str) -> str:
    """What a fresh interpreter prints that finds the files of a folder before any others."""
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    code = f"""
import sys                                          # no checkout that is installed as editable beside it
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
""" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_unet_alone(tmp_path: Path) -> None:
    """The eleven files that the README names are all that a forward pass needs, with torch."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in UNET_ALONE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
        assert name.split("/")[1].removesuffix(".py") in readme
    out = run_in(tmp_path, """
import sys, torch
from minidiff.unet import UNet2DConditionModel
unet = UNet2DConditionModel(block_out_channels=(8, 16), norm_num_groups=8, cross_attention_dim=8,
                            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
print(list(unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 3, 8)).sample.shape))
print(sorted(m for m in sys.modules if m.startswith(("minidiff.", "miniclip."))))
print({m for m in ("torchvision", "PIL", "diffusers", "transformers") if m in sys.modules})
""").splitlines()
    assert out[0] == "[1, 4, 8, 8]" and out[2] == "set()"
    assert ast.literal_eval(out[1]) == sorted(n.removesuffix(".py").replace("/", ".") for n in UNET_ALONE)


@pytest.mark.parametrize("name", ["train_diffusion", "train_clip"])
def test_started_by_its_path(name: str, tmp_path: Path) -> None:
    """As torchrun may do. The root has to be on the path, where `make setup` puts it."""
    done = subprocess.run([sys.executable, str(ROOT / "train" / f"{name}.py"), "--help"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: python -m train.{name} [options]"), done.stderr


def test_installed_it_trains_under_a_name_of_its_own(tmp_path: Path) -> None:
    """pip install . puts train/ under minidiff_train, and nothing called train or data anywhere."""
    for name, to in (("miniclip", "miniclip"), ("minidiff", "minidiff"), ("train", "minidiff_train")):
        shutil.copytree(ROOT / name, tmp_path / to, ignore=shutil.ignore_patterns("__pycache__"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".")
                for path in ROOT.glob("train/**/__init__.py")}
    assert all(f'"{name.replace("train", "minidiff_train", 1)}"' in project for name in packages)
    out = run_in(tmp_path, """
import importlib, pathlib, sys
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("train", "data"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for path in sorted(pathlib.Path("minidiff_train").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
from minidiff_train.run.cli import command
print(command("sample", prompt="春"))
""")
    assert " -m minidiff_train.sample --prompt " in out


# ------------------------------------------------------------------------------------------------ from Python


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_to_image.PRESETS, "tiny", text_to_image.Preset((8, 16), (False, True), 1, 32, 1))
    monkeypatch.setitem(image_text.PRESETS, "tiny",
                        image_text.Preset("resnet", 4, (1, 1, 1, 1), 0, 32, 1, 16))


def python_of(page: str, heading: str) -> str:
    """The first Python block below a heading of a page of docs."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.split(heading)[1].split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("heading", ["### A diffusion model", "### A CLIP"])
def test_ten_lines_of_python_train_on_any_dataset(heading: str, tmp_path: Path, tiny_presets,
                                                  monkeypatch) -> None:
    code = python_of("training.md", heading)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (out,) = (tmp_path / "out").iterdir()
    assert (out / "report.html").exists() and (out / "model").is_dir()


@pytest.mark.parametrize("item, words", [
    ((torch.zeros(1, 8, 8), "春"), r"item 0 .*\[1, 8, 8\], not a tensor \[1, 16, 16\] or a Pillow image"),
    ((torch.full((1, 16, 16), 255.0), "春"), "values from 255 to 255, not -1 to 1"),
    (("a.png", "春"), "the image is str"),
])  # fmt: skip
def test_items_that_are_no_images_are_named(item: tuple, words: str, tmp_path: Path, tiny_presets) -> None:
    cfg = train_diffusion.TrainConfig(out=str(tmp_path), size=16, preset="tiny", steps=1, device="cpu")
    with pytest.raises(ValueError, match=words):
        train_diffusion.main(cfg, [item])
    with pytest.raises(ValueError, match="the dataset is empty"):
        train_diffusion.main(cfg, [])


def test_one_dataset_one_run(tmp_path: Path, tiny_presets) -> None:
    """Resuming needs the same images."""
    images = [(torch.full((1, 16, 16), i / 10), f"grey {i}") for i in range(4)]
    cfg = train_diffusion.TrainConfig(out=str(tmp_path), size=16, preset="tiny", steps=2, batch=4, samples=0,
                                      sample_steps=1, device="cpu")
    train_diffusion.main(cfg, images)
    longer = dataclasses.replace(cfg, steps=3, resume=True)
    with pytest.raises(Exception, match="the data is not what this run was trained on"):
        train_diffusion.main(longer, [*images[:3], (torch.zeros(1, 16, 16) - 1, "grey 3")])
    train_diffusion.main(longer, images)


# --------------------------------------------------------------------------------- runs of before this layout


@pytest.mark.parametrize("name", ["diffusion", "clip"])
def test_a_run_of_before_goes_on_as_it_would_have(name: str, tmp_path: Path, tiny_presets) -> None:
    """Stopped at step 4 of 6 by the code of then; its metrics, had it not been stopped, lie beside it.

    But for R@k of the clip run, whose batch norm averaged over more steps then: of these rows the names.
    To the last digits only on the processor that wrote them: another adds up in another order.
    """
    script = train_diffusion if name == "diffusion" else train_clip
    shutil.copytree(FIXTURES / f"run_{name}", tmp_path / "run")
    wanted = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    settings |= {"out": str(tmp_path / "run"), "data": str(ROOT / settings["data"])}
    if name == "diffusion":
        settings |= {"jitter_amount": 1.0, "noise_bias": 1.0}       # settings younger than the run
    script.main(script.TrainConfig(**settings, resume=True))
    found = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # batch norm over four single pixels multiplies what another torch rounds otherwise
    rel = 1e-4 if torch.__version__.startswith("2.14") else 1e-3 if name == "diffusion" else 0.2
    for mine, then in zip(map(json.loads, found), map(json.loads, wanted), strict=True):
        assert list(mine) == list(then)
        if not (name == "clip" and any("R@1" in key for key in then)):
            assert mine == pytest.approx(then, rel=rel)


def test_models_of_before_still_answer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    run = FIXTURES / "run_diffusion"
    sample.main(sample.SampleConfig(run=str(run), prompt="春", count=2, steps=2, out=str(tmp_path / "out"),
                                    device="cpu"))
    assert (tmp_path / "out" / "0001.png").exists()
    search.main(search.SearchConfig(run=str(FIXTURES / "run_clip"), text="薑", out=str(tmp_path / "hits.png"),
                                    device="cpu"))
    assert (tmp_path / "hits.png").exists()
