"""docs/models.md: its table is what the code makes, and its examples run."""

import re
from pathlib import Path

import timm
import torch

import mpvg_kernels  # noqa: F401  (registers the models)

DOCS = Path(__file__).parent.parent / "docs" / "models.md"


def test_table_of_models():
    """Every registered name is in it once, with the number of parameters under default and under mpvg."""
    rows = re.findall(r"^\| `(mpvg_\w+)` \| .* \| ([\d,]+) \| ([\d,]+) \| .* \|$", DOCS.read_text(), re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(timm.list_models("mpvg_*"))
    for name, *stated in rows:
        for scheme, count in zip(("default", "mpvg"), stated, strict=True):
            model = timm.create_model(name, scheme=scheme, device="meta")
            assert f"{sum(p.numel() for p in model.parameters()):,}" == count, (name, scheme)


def test_readme_links_it():
    assert "(docs/models.md)" in (DOCS.parent.parent / "README.md").read_text()


def test_examples_run(tmp_path, monkeypatch):
    """In one process, top to bottom."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(examples) == 5
    names: dict = {}
    with torch.random.fork_rng():
        for example in examples:
            exec(compile(example, DOCS.name, "exec"), names)
