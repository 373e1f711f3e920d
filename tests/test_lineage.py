"""docs/lineage.md: its code runs as printed, block after block, and each block asserts what it claims."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parent.parent / "docs" / "lineage.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)


def test_every_block_runs_and_asserts() -> None:
    space: dict = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/lineage.md, block {number}", "exec"), space)
    assert len(BLOCKS) == 12
    assert all(any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block)))
               for block in BLOCKS[1:])             # the first holds what the others share


def test_a_dit_block_that_has_learned_is_no_identity() -> None:
    space: dict = {}
    for block in BLOCKS:
        exec(block, space)
        if "DiTBlock" in space:
            break
    dit, tokens, c = space["block"], space["tokens"], space["c"]
    torch.nn.init.normal_(dit.modulation.weight, std=0.1)
    assert dit(tokens, c).shape == tokens.shape and not torch.allclose(dit(tokens, c), tokens, atol=1e-2)
    assert not torch.allclose(dit(tokens, c), dit(tokens, -c), atol=1e-2)     # and c matters


def test_each_section_cites_a_paper_of_the_list() -> None:
    body, papers = PAGE.split("## Papers")
    listed = set(re.findall(r"^- (\w+).*? (20\d\d), \*", papers, flags=re.M))
    cited = {(name, year) for name, year in re.findall(r"(\w+)(?: & \w+)? (20\d\d)", body)}
    assert listed == cited
    links = re.findall(r"\[arXiv ([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", papers)
    assert len(links) == len(listed) and all(a == b for a, b in links)
