"""docs/: tables are what the code makes, examples run, and command lines are ones that there are."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

import mpvg_kernels  # noqa: F401  (registers the models)
from mpvg_kernels.__main__ import evaluate, parser, train
from mpvg_kernels.train import recipes
from mpvg_kernels.train.config import Config, from_args, ignored

DOCS = Path(__file__).parent.parent / "docs" / "models.md"
TRAINING = DOCS.with_name("training.md")
README = DOCS.parent.parent / "README.md"


def test_table_of_models():
    """Every registered name is in it once, with the number of parameters under default and under mpvg."""
    rows = re.findall(r"^\| `(mpvg_\w+)` \| .* \| ([\d,]+) \| ([\d,]+) \| .* \|$", DOCS.read_text(), re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(timm.list_models("mpvg_*"))
    for name, *stated in rows:
        for scheme, count in zip(("default", "mpvg"), stated, strict=True):
            model = timm.create_model(name, scheme=scheme, device="meta")
            assert f"{sum(p.numel() for p in model.parameters()):,}" == count, (name, scheme)


@pytest.mark.parametrize("page", [DOCS, TRAINING], ids=lambda page: page.name)
def test_readme_links_it(page):
    assert f"(docs/{page.name})" in README.read_text()


def test_examples_run(tmp_path, monkeypatch):
    """In one process, top to bottom."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(examples) == 6
    names: dict = {}
    with torch.random.fork_rng():
        for example in examples:
            exec(compile(example, DOCS.name, "exec"), names)


# ---- training


def test_table_of_recipes():
    """Every recipe is in it once, with the accuracies of its docstring in their order."""
    rows = dict(re.findall(r"^\| `(\w+)` \| .*, \d+ \| (.*) \|$", TRAINING.read_text(), re.MULTILINE))
    assert sorted(rows) == recipes.names()
    for name, stated in rows.items():
        described = " ".join(recipes.describe(name).split())
        found = re.search(r"default ([\d.]+), lape ([\d.]+), pvg ([\d.]+), mpvg ([\d.]+)\.", described)
        assert stated == " / ".join(found.groups()) if found else name == "digits"


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `mpvg` that a code block starts, by itself or by torchrun or srun."""
    text = re.sub(r"\\\n *", " ", page.read_text())
    scripts = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = re.findall(r"^    .*$", text, re.MULTILINE) + scripts.splitlines()
    start = re.compile(r" *(?:(?:torchrun|srun)(?: \S+)*? )?(?:mpvg|-m mpvg_kernels) (.*)")
    return [shlex.split(found[1], comments=True) for line in lines if (found := start.fullmatch(line))]


@pytest.mark.parametrize("page, least", [(TRAINING, 27), (README, 8)], ids=["training.md", "README.md"])
def test_commands_parse(page, least):
    """Each gives a config, in which nothing that it sets is without effect."""
    found = commands(page)
    assert len(found) >= least
    for command in found:
        args, rest = parser().parse_known_args(command)
        if args.run not in (train, evaluate):
            assert not rest, command
            continue
        recipe = getattr(args, "recipe", None)
        default = recipes.load(recipe) if recipe else Config()  # else that of a run folder
        config = from_args(default, rest)
        assert not recipe or set(ignored(config)) <= set(ignored(default)), command
