"""The documentation: every command runs, examples run, tables are what the code makes, links lead somewhere."""

import re
import subprocess

import pytest
import timm
import torch
from doc_commands import (
    PAGES,
    ROOT,
    Command,
    Shell,
    Unknown,
    blocks,
    check_script,
    commands,
    inline,
    is_script,
    options,
    words,
)
from warm_process import WarmProcess

import mpvg_kernels  # noqa: F401  (registers the models)
from mpvg_kernels.__main__ import parser
from mpvg_kernels.models import create_dense
from mpvg_kernels.train import config, recipes

BY_NAME = {page.name: page for page in PAGES}
README, MODELS, TRAINING = (BY_NAME[name] for name in ("README.md", "models.md", "training.md"))


def of_pages(what) -> list:
    """A parameter for each thing that `what` finds in a page; a page is one group, run in order by one worker."""
    return [
        pytest.param(found, id=str(found), marks=pytest.mark.xdist_group(f"docs {page.name}"))
        for page in PAGES
        for found in what(page)
    ]


# ---- commands


@pytest.fixture(scope="session")
def warm():
    tools = [f"mpvg_kernels.tools.{name}" for name in ("evaluate", "predict", "report", "analyze", "export", "study")]
    with WarmProcess("sklearn.datasets", "mpvg_kernels.demo", *tools) as process:
        yield process


@pytest.fixture(scope="session")
def shells(warm, tmp_path_factory):
    """A page's shell, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("docs"), {}

    def shell(page) -> Shell:
        if page not in made:
            (root / page.stem).mkdir()
            made[page] = Shell(warm, root / page.stem, root / "shared")
        return made[page]

    return shell


@pytest.mark.slow
@pytest.mark.parametrize("command", of_pages(commands))
def test_command(shells, command):
    """Runs, in the order of its page; doc_commands.py says how it is shortened."""
    shells(command.page).run(command.text)


@pytest.mark.parametrize("block", of_pages(lambda page: [b for b in blocks(page) if is_script(b)]))
def test_script(block):
    check_script(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text(page):
    """`mpvg COMMAND --option` in a sentence or a table: the command has it, or the config a field of that name."""
    known = options()
    for name, given in inline(page):
        assert name in known, f"{page.name}: mpvg {name}"
        own = [option for option in given if option not in known[name]]
        if name in ("train", "eval", "report", "analyze", "study"):
            config.check_options(own)
        elif name != "bench":
            assert not own, f"{page.name}: mpvg {name} {own}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("mpvg train --recipe digits --optim.rl 1", "did you mean 'optim.lr'"),
        ("mpvg train --recipe deit_tiny_in1k --data.root /nothing/here", "data.root"),
        ("mpvg eval runs/digits --weights first", "invalid choice: 'first'"),
        ("mpvg recipes --all", "mpvg recipes does not take '--all'"),
        ("torchrun --stand-alone -m mpvg_kernels recipes", "torchrun does not take"),
        ("torchrun --standalone -m mpvg_kernels train --recipe digitz", "unknown recipe 'digitz'"),
        ("srun --gpus=8 mpvg recipes", "are these its options"),
        ("MPVG_BAKEND=cpp mpvg info", "nothing reads this variable"),
        ("make tests", "the Makefile has demo, test"),
        ("pip install '.[trian]'", "no package or extra"),
        ("pytest -m nothing", "no such file, mark or option"),
        ("pytest tests/test_operators.py -k nothing_here", "no test's name has it"),
        ("bash benchmarks/gpu_suite.sh --stage x", "does not know it"),
        ("bash benchmarks/gpu_suit.sh", "no such file"),
        ("python -c 'raise SystemExit(3)'", "returned non-zero"),
        ("python benchmarks/nothing.py", "no such file"),
        ("wget https://example.org", "a command of no class"),
    ],
)
@pytest.mark.xdist_group("docs README.md")
def test_what_a_wrong_command_does(shells, text, message):
    """Each fails, and so would a page that had it."""
    with pytest.raises((Unknown, AssertionError, subprocess.CalledProcessError)) as error:
        shells(README).run(text)
    assert message in str(error.value)


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    indented, bash = "    mpvg info  # b\n    mpvg \\\n      recipes\n", "```bash\ncd x && make test\n```\n"
    page.write_text(f"a\n\n{indented}\n{bash}```text\nno\n```\n")
    assert commands(page) == [
        Command(page, 3, "mpvg info  # b"),
        Command(page, 4, "mpvg   recipes"),
        Command(page, 8, "cd x && make test"),
    ]
    page.write_text("```\nmpvg info\n```\n")
    with pytest.raises(Unknown, match="has a block of ''"):
        commands(page)


# ---- examples


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    """Those of a page in one process, top to bottom."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with torch.random.fork_rng():
        for block in blocks(page):
            if block.language == "python":
                exec(compile("\n" * (block.line - 1) + "\n".join(block.lines), page.name, "exec"), names)


# ---- tables


def test_table_of_models():
    """Every registered name is in it once, with the number of parameters under default and under mpvg."""
    rows = re.findall(r"^\| `(mpvg_\w+)` \| .* \| ([\d,]+) \| ([\d,]+) \| .* \|$", MODELS.read_text(), re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(timm.list_models("mpvg_*"))
    for name, *stated in rows:
        for scheme, count in zip(("default", "mpvg"), stated, strict=True):
            model = timm.create_model(name, scheme=scheme, device="meta")
            assert f"{sum(p.numel() for p in model.parameters()):,}" == count, (name, scheme)


def test_table_of_dense_models():
    """With the number of parameters of each."""
    rows = dict(re.findall(r"^\| (UperNet|Mask R-CNN) \| (.*) \|$", MODELS.read_text(), re.MULTILINE))
    for name, task, classes in (("UperNet", "segmentation", 150), ("Mask R-CNN", "detection", 80)):
        with torch.device("meta"):
            model = create_dense(task, "mpvg_vit_adapter_tiny", classes)
        assert (
            rows[name].startswith(f"{classes} (")
            and f"| {sum(p.numel() for p in model.parameters()):,} |" in rows[name]
        )


def test_table_of_recipes():
    """Every recipe is in it once, with the accuracies of its docstring in their order."""
    pages = TRAINING.read_text() + BY_NAME["dense.md"].read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .*, \d+ \| (.*) \|$", pages, re.MULTILINE))
    assert sorted([*rows, "shapes_detection", "shapes_segmentation"]) == recipes.names()
    number = r"([\d.]+(?: / [\d.]+)?)"  # of detection boxes and masks
    for name, stated in rows.items():
        described = " ".join(recipes.describe(name).split())
        found = re.search(rf"default {number}, lape {number}, pvg {number}, mpvg {number}\.", described)
        assert found or name == "digits"
        assert all(figure in stated for figures in (found.groups() if found else ()) for figure in figures.split(" / "))


@pytest.mark.parametrize("command", of_pages(commands))
def test_fields_have_an_effect(command):
    """What `mpvg train --recipe` is told in a page does something."""
    for argv in words(command.text):
        if "train" in argv and "--recipe" in argv:
            args, rest = parser().parse_known_args(argv[argv.index("train") :])
            default = recipes.load(args.recipe)
            assert set(config.ignored(config.from_args(default, rest))) <= set(config.ignored(default))


# ---- links


def anchors(page) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Files and headings that a page links are there, and every page of docs/ is reached from the README."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists() and linked.is_relative_to(ROOT), f"{page.name} links {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links {target}"
    if page.parent == ROOT / "docs":
        assert f"(docs/{page.name})" in README.read_text()
