"""The pages in a real browser, at laptop and phone width, beside PyTorch.

Needs Chromium and npm, which fetches onnxruntime-web into the exported folder, as its README says.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from minidiff.text_to_image import TextToImage
from tests.parity_export.browser import Page, served
from train.explain import explain

LIBRARY = "onnxruntime-web@1.22.0"
STATUS = "document.getElementById('status')?.textContent"
SCREENS = {"laptop": (1280, 800, False), "phone": (390, 844, True)}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """node_modules with the library that the pages import."""
    folder = tmp_path_factory.mktemp("npm")
    subprocess.run(["npm", "install", "--prefix", str(folder), LIBRARY], check=True, capture_output=True)
    return folder / "node_modules"


@pytest.fixture(params=SCREENS)
def page(request: pytest.FixtureRequest, tmp_path: Path):
    opened = Page(tmp_path / "profile", *SCREENS[request.param])
    yield opened
    opened.close()


def with_library(folder: Path, library: Path) -> Path:
    """The folder, with the library in it."""
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(library)
    return folder


def fits(page: Page) -> bool:
    """Nothing is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("name, format, side", [("run", "onnx", 32), ("run", "int8", 32),
                                                ("flow_run", "onnx", 16), ("distilled_run", "onnx", 16)])
def test_a_run_writes_as_python_does(name: str, format: str, side: int, folders, library: Path,
                                     page: Page) -> None:
    with served(with_library(folders(name, format)[1], library)) as address:
        page.open(f"{address}/index.html#check")
        said = page.wait(f"{STATUS}?.startsWith('golden') && {STATUS}")
        assert int(said.split("at most ")[1].split()[0]) <= 2, said
        page.evaluate("document.querySelector('#known button').click()")
        assert page.wait(f"{STATUS}.includes(' in ') && {STATUS}").startswith(f"人蔘: {side} × {side}")
        assert page.evaluate("document.getElementById('canvas').width") == side and fits(page)


def test_an_explained_run_draws_live(folders, library: Path, page: Page) -> None:
    """The page of train.sample --explain, written into an export: what it opens draws."""
    model, out = folders("run", "onnx")
    explain(TextToImage.load(model), "人蔘", out / "explained.html", seed=0, steps=2, guidance=1.5)
    frame = "document.getElementById('frame').contentDocument"
    with served(with_library(out, library)) as address:
        page.open(f"{address}/explained.html")
        page.wait("document.getElementById('live')?.hidden === false")
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0
        page.evaluate("document.getElementById('start').click()")
        page.wait(f"{frame}?.getElementById('status')?.textContent === 'Ready.'")
        page.evaluate(f"{frame}.querySelector('#known button').click()")
        page.wait(f"{frame}.getElementById('status').textContent.includes(' in ')")
        assert page.evaluate(f"{frame}.getElementById('canvas').width") == 32 and fits(page)


@pytest.mark.parametrize("name", ["clip", "chinese_clip", "simple_clip"])
def test_a_clip_names_as_python_does(name: str, folders, library: Path, page: Page, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 31), (200, 30, 30)).save(tmp_path / "red.png")
    with served(with_library(folders(name, "onnx")[1], library)) as address:
        page.open(f"{address}/index.html#check")
        said = page.wait(f"{STATUS}?.startsWith('golden') && {STATUS}")
        assert max(float(word) for word in said.replace(",", "").split() if word[0].isdigit()) < 1e-5, said
        root = page.send("DOM.getDocument")["root"]["nodeId"]
        node = page.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        page.send("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "red.png")])
        page.wait(f"{STATUS}.endsWith(' s')")
        assert page.evaluate("document.querySelectorAll('#names li').length") == 4 and fits(page)


def test_without_the_library_the_page_says_what_to_do(folders, page: Page, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folders("run", "onnx")[1], tmp_path / "out",
                    ignore=shutil.ignore_patterns("node_modules"))
    with served(tmp_path / "out") as address:
        page.open(f"{address}/index.html")
        assert "npm install onnxruntime-web" in page.wait(f"{STATUS}?.includes('npm') && {STATUS}")
