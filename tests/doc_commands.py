"""The commands of the documentation: found in its pages, put into classes, shortened, and run or checked.

A code block of a page is indented by four spaces or fenced as bash: commands, every line of it; fenced as python:
examples; or fenced as text: neither. A command is run as it stands, in the order of its page and in one folder, but for
this:

- `mpvg train` with a recipe gets --smoke, on 224 pixels and more smaller images (`SMALL`), and its run folder gets the
  name that the page uses;
- `mpvg study` and `mpvg bench` get their own options for a small run (`shorter`);
- torchrun and srun start two processes, in which the variables that they set are set;
- a line that another page has too is run once, and its run is copied;
- paths at the root of the file system lead into a folder of small generated data;
- nothing is downloaded: networks are random, CIFAR and streams are generated, and torch.compile does nothing.

What can't be run is checked as far as it goes: make by `make -n`, scripts by `bash -n`, pip by the extras and packages
that it names, pytest by its paths, marks and words, git by its subcommand. A command that no class knows is an error.
"""

import functools
import hashlib
import importlib.util
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = {"vit_lite": "vit_lite_7_4_cifar100", "t2t_vit_7": "t2t_vit_7_in1k", "leaves": "deit_tiny_in1k"}
"""Recipes of runs that pages name otherwise than by the recipe's own name, or its beginning."""
RUNS |= {"coco": "mask_rcnn_adapter_tiny_coco", "ade20k": "upernet_adapter_tiny_ade20k"}
DATA_OF = {"leaves": "leaves", "vit_lite": "cifar", "t2t_vit_7_cifar100": "cifar", "coco": "coco"}
DATA_OF |= {"ade20k": "ADEChallengeData2016"}
"""Where in /data the images of such runs are, if not in imagenet."""
SMALL = {
    "classification": "--data.img_size 64 64",
    "detection": """--detection.short_sides 64 --detection.crop_short_sides 64 --detection.crop_sides 48 64
    --detection.test_short_side 64 --detection.proposals 50""",
    "segmentation": """--data.img_size 64 64 --segmentation.short_side 64 --segmentation.long_side 128
    --segmentation.window 64 --segmentation.stride 42 --dist.sync_bn False""",
}
"""Options for smaller images, by task."""
STUDY = """--seeds 1 --schemes gap mpvg --jobs 1 --epochs 1 --sched.warmup_epochs 0 --sched.cooldown_epochs 0 --batch 4
--data.epoch_updates 2 --data.max_test_images 8 --data.workers 0"""
DATA = ("/data", "/other", "/scratch")
SBATCH = set("job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal requeue open-mode".split())
# In a job script: what is the shell's own.
SHELL = re.compile(r'(#.*|code=\$\?|if \[ .* \]; then scontrol requeue "\$SLURM_JOB_ID"; fi|exit "\$code"|)')


class Unknown(Exception):
    """A command of no known class, or one with an option that there is not."""


class Command(NamedTuple):
    """One command of a page, continued lines joined."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line} {' '.join(self.text.split())[:60]}"


class Block(NamedTuple):
    """A code block: its language (bash for an indented one), its first line's number, its lines."""

    page: Path
    line: int
    language: str
    lines: list[str]


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page."""
    found: list[Block] = []
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                found.append(Block(page, number + 1, line[3:], []))
        elif fenced:
            found[-1].lines.append(line)
        elif line.startswith("    "):
            last = found[-1] if found else None
            if last is None or last.language != "indented" or last.line + len(last.lines) != number:
                found.append(Block(page, number, "indented", []))
            found[-1].lines.append(line[4:])
    assert not fenced, f"{page.name} has a fence that does not end"
    return found


def is_script(block: Block) -> bool:
    return block.language == "bash" and block.lines[0].startswith("#!")


def commands(page: Path) -> list[Command]:
    """Every command of a page, in order; of a script those that are not the shell's own.

    Raises:
        Unknown: a block of a language that is neither commands, Python nor text.
    """
    found = []
    for block in blocks(page):
        if block.language not in ("indented", "bash", "python", "text"):
            raise Unknown(f"{page.name}:{block.line} has a block of {block.language!r}: bash, python or text?")
        if block.language in ("python", "text"):
            continue
        joined, start = "", block.line
        for number, line in enumerate(block.lines, block.line):
            start = start if joined else number
            joined += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            if not (is_script(block) and SHELL.fullmatch(joined.strip())):
                found.append(Command(page, start, joined.strip()))
            joined = ""
    return found


def words(text: str) -> list[list[str]]:
    """The words of each command of a line, `A && B` being two; comments are left out."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(text, comments=True):
        parts.append([]) if word == "&&" else parts[-1].append(word)
    return parts


# ---- what is not run, but checked


def check_script(block: Block) -> None:
    """A job script is one that bash reads, with options that sbatch has."""
    subprocess.run(["bash", "-n"], input="\n".join(block.lines), text=True, check=True)
    for line in block.lines:
        if line.startswith("#SBATCH") and (name := re.match(r"#SBATCH --([\w-]+)", line)[1]) not in SBATCH:
            raise Unknown(f"sbatch --{name}: is that one of its options?")


def check_make(args: list[str]) -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    targets = [arg for arg in args if "=" not in arg]
    if not targets or not set(targets) <= set(phony):
        raise Unknown(f"make {' '.join(args)}: the Makefile has {', '.join(phony)}")
    subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True)


def project() -> dict:
    """The extras of the project, and the packages that anything of it can need."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = (\[.*\])$", section, re.MULTILINE))
    packages = re.findall(r'"([\w.-]+)', text) + re.findall(r"[\w.-]+", " ".join(extras.values()))
    from mpvg_kernels.train.data import sources

    installs = " ".join(what for _, what in sources.PACKAGES.values()).split()
    return {"extras": set(extras), "packages": {*packages, *installs, "torch", "torchvision", "numpy"}}


def check_pip(args: list[str]) -> None:
    if args[:1] != ["install"]:
        raise Unknown(f"pip {' '.join(args)}: only pip install is known")
    known = project()
    for arg in args[1:]:
        if arg in ("--no-build-isolation", "-e", "--upgrade", "--force-reinstall", "--no-deps", "-v"):
            continue
        name, extras = re.fullmatch(r"([\w.-]+?)(?:\[([\w,]+)\])?(?:[<>=]+[\w.]+)?", arg).groups()
        if name in (".", "mpvg_kernels") and set(filter(None, (extras or "").split(","))) <= known["extras"]:
            continue
        if extras or name not in known["packages"]:
            raise Unknown(f"pip install {arg}: no package or extra of the project")


def check_pytest(args: list[str]) -> None:
    """Paths, marks and the words of -k are there."""
    marks = re.findall(r'^    "(\w+)[(:]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    args = list(args)
    paths = [ROOT / "tests"]
    while args:
        arg = args.pop(0)
        if arg == "-m" and args[0] in marks:
            args.pop(0)
        elif arg in ("-n", "--dist"):
            args.pop(0)
        elif arg == "-k":
            names = set(re.findall(r"\w+", args.pop(0))) - {"and", "or", "not"}
            text = "".join(path.read_text() for path in paths if path.is_file()) + "cpp triton cuda reference"
            if missing := [name for name in names if name not in text]:
                raise Unknown(f"pytest -k {missing[0]}: no test's name has it")
        elif not arg.startswith("-") and (ROOT / arg).exists():
            paths.append(ROOT / arg)
        elif arg not in ("-x", "-q", "--benchmark-only"):
            raise Unknown(f"pytest {arg}: no such file, mark or option")


def check_git(args: list[str]) -> None:
    if args[0] not in ("clone", "switch", "commit", "push", "diff"):
        raise Unknown(f"git {args[0]}: not known here")


def check_program(args: list[str]) -> None:
    """A program of the repository, whose options are words of its source; setup.py's are setuptools'."""
    script = ROOT / args[0]
    if not script.is_file():
        raise Unknown(f"{args[0]}: no such file")
    known = "".join(path.read_text() for path in {script, script.with_suffix(".py")} if path.exists())
    missing = [arg for arg in args[1:] if not arg.isupper() and arg not in known]
    if missing and args != ["setup.py", "build_ext", "--inplace"]:
        raise Unknown(f"{args[0]} {missing[0]}: the program does not know it")


def check_bash(args: list[str]) -> None:
    """A script of the repository that bash reads, with options that it has."""
    check_program(args)
    subprocess.run(["bash", "-n", ROOT / args[0]], check=True)


def check_variable(word: str) -> None:
    """`NAME=value` before a command, or behind `export`: something reads it."""
    name = word.partition("=")[0]
    outside = ("CUDA_HOME", "CXX", "CC", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS", "MAX_JOBS", "MASTER_PORT")
    sources = [ROOT / "setup.py", *(ROOT / "mpvg_kernels").rglob("*.py")]
    if name not in outside and not any(name in path.read_text() for path in sources):
        raise Unknown(f"{name}: nothing reads this variable")


CHECKS = {"make": check_make, "pip": check_pip, "pytest": check_pytest, "git": check_git, "bash": check_bash}
CHECKS |= {"cd": lambda args: None, "nvcc": lambda args: None, "ruff": lambda args: None}


# ---- what is run


def is_long(args: list[str]) -> bool:
    """Whether it is an `mpvg train` that would train for long: not one that goes on with a run's own config."""
    return args[0] == "train" and "--recipe" in args and "--print-config" not in args and "--smoke" not in args


def shorter(args: list[str]) -> list[str]:
    """What is put behind an `mpvg` command to make it take seconds: options that it documents."""
    if args[0] == "train":
        recipe = args[args.index("--recipe") + 1] if "--recipe" in args else "digits"
        large = recipe not in ("digits", "vit_lite_7_4_cifar100") and "--data.img_size" not in args
        large &= recipe in recipe_names() and not recipe.startswith("shapes_")
        return ["--smoke", *(SMALL[task_of(recipe)].split() if large else ())] if is_long(args) else []
    if args[0] == "study":
        return STUDY.split()
    if args[0] == "bench":
        few = {
            "memory": [],
            "adapter": ["--rounds", "1", "--dtypes", "fp32"],
            "train": ["--rounds", "2", "--dtypes", "fp32", "--schemes", "mpvg", "--batch", "2"],
        }
        return ["--quick", *few.get(args[1], ["--rounds", "2"])]
    return []


class Shell:
    """Runs the commands of one page in a folder of its own.

    Args:
        warm: the process that starts them, see warm_process.py.
        folder: where they run.
        shared: what the pages share: data and the runs that none of their commands makes.
    """

    def __init__(self, warm, folder: Path, shared: Path):
        self.warm, self.folder, self.shared = warm, folder, shared
        self.outside = folder.parent / "root"
        self.done = folder.parent / "done"
        self.done.mkdir(exist_ok=True)
        generate(self.outside)

    def run(self, text: str) -> str:
        """Run or check a line of commands; what it printed.

        Raises:
            Unknown: a command of no class, or a wrong option of one that is only checked.
            AssertionError: it ended with another code than 0.
        """
        printed, done = "", self.done / hashlib.sha256(repr(words(text)).encode()).hexdigest()
        if done.exists():
            return done.read_text()
        for argv in words(text):
            while argv and re.match(r"\w+=", argv[0]):
                check_variable(argv.pop(0))
            printed += self._run(argv) if argv else ""
        done.write_text(printed)
        return printed

    def _run(self, argv: list[str]) -> str:
        program, args = argv[0], argv[1:]
        if program == "export":
            check_variable(args[0])
        elif program in CHECKS:
            CHECKS[program](args)
        elif program == "mpvg":
            return self.mpvg(args)
        elif program == "python":
            return self.python(args)
        elif program == "torchrun":
            return self.torchrun(args)
        elif program == "srun":
            start = args.index("mpvg")
            if not all(re.fullmatch(r"--(cpus-per-task|ntasks|nodes)=\d+", arg) for arg in args[:start]):
                raise Unknown(f"srun {' '.join(args[:start])}: are these its options?")
            return self.mpvg(args[start + 1 :], processes=2, launcher="srun")
        else:
            raise Unknown(f"{program}: a command of no class that this test knows; see tests/doc_commands.py")
        return ""

    def torchrun(self, args: list[str]) -> str:
        from torch.distributed.run import get_args_parser

        try:
            found = get_args_parser().parse_args(args)
        except SystemExit:
            raise Unknown(f"torchrun does not take {' '.join(args)}") from None
        if not (found.module and found.training_script == "mpvg_kernels"):
            raise Unknown(f"torchrun starts {found.training_script}, expected -m mpvg_kernels")
        return self.mpvg(found.training_script_args, processes=2)

    def python(self, args: list[str]) -> str:
        if args[:2] == ["-m", "mpvg_kernels"]:
            return self.mpvg(args[2:])
        if args[:1] == ["-m"]:
            if args[1] != "venv" and importlib.util.find_spec(args[1]) is None:
                raise Unknown(f"python -m {args[1]}: no such module")
            return ""
        if args[:1] == ["-c"]:
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            run = [sys.executable, "-c", args[1]]
            return subprocess.run(run, cwd=self.folder, env=env, check=True, capture_output=True, text=True).stdout
        if args[0].startswith("benchmarks/bench_"):
            return self.mpvg(["bench", Path(args[0]).stem.removeprefix("bench_"), *args[1:]])
        check_program(args)
        return ""

    def mpvg(self, args: list[str], processes: int = 1, launcher: str = "torchrun") -> str:
        """Run an `mpvg` command, shortened."""
        args = [self.path(arg) for arg in args]
        name = args[0]
        out = Path(args[args.index("--out") + 1]) if "--out" in args else None
        for i, arg in enumerate(args):
            if arg.startswith("runs/") and args[i - 1] != "--out":
                self.make_run(arg)
                args[i] = self.checkpoint(arg)
        if name == "bench":
            (self.folder / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
        printed = self.start([*args, *shorter(args)], processes, launcher)
        if is_long(args) and out is not None:
            made = max((self.folder / out.parent).glob(f"{out.name}-smoke-*"))
            target = self.folder / out
            shutil.rmtree(made) if target.exists() else made.rename(target)
        return printed

    def start(self, args: list[str], processes: int = 1, launcher: str = "torchrun") -> str:
        """Run it as it is; what it printed."""
        printed = self.folder.parent / "printed.txt"
        printed.write_text("")
        requests = []
        port = str(20000 + (os.getpid() * 7 + int(time.monotonic() * 1000)) % 20000)
        for rank in range(processes):
            env = {"HOME": str(self.outside / "home"), "HF_HUB_OFFLINE": "1"}
            if processes > 1 and launcher == "srun":
                env |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(processes)}
                env |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": port}
            elif processes > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            request = {"argv": args, "env": env, "out": str(printed), "cwd": str(self.folder)}
            requests.append(request | {"patch": {"call": ["doc_commands", "stay_offline"]}})
        codes = self.warm.wait(self.warm.start(requests), 300)
        text = printed.read_text()
        assert set(codes) == {0}, f"mpvg {shlex.join(args)} ended with {codes}:\n{text}"
        return text

    def path(self, word: str) -> str:
        """A word as the shell gives it to the command, roots and home led into the generated data."""
        if word.startswith("~/"):
            return str(self.outside / "home") + word[1:]
        return str(self.outside) + word if word.startswith(DATA) else word

    def make_run(self, path: str) -> None:
        """Have the run that a path is in, where no command of the page has made it."""
        name = path.split("/")[1]
        target = self.folder / "runs" / name
        if target.exists():
            return
        kept = self.shared / name
        if not kept.exists():
            base, _, scheme = name.partition("-")
            recipe = RUNS.get(base) or next((n for n in recipe_names() if n.startswith(base)), "digits")
            root = self.outside / "data" / DATA_OF.get(base, "imagenet")
            argv = ["train", "--recipe", recipe, "--out", f"made/{name}"]
            argv += [] if recipe == "digits" or recipe.startswith("shapes_") else ["--data.root", str(root)]
            if scheme in ("default", "gap", "lape", "lape_gap", "pvg", "mpvg"):
                argv += ["--model.scheme", scheme]
            self.start([*argv, *shorter(argv)])
            (made,) = (self.folder / "made").glob(f"{name}-smoke-*")
            kept.parent.mkdir(exist_ok=True)
            shutil.move(made, kept)
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(kept, target)

    def checkpoint(self, path: str) -> str:
        """A checkpoint's path with the number of one that the shortened run has."""
        if not re.search(r"/step-\d+$", path):
            return path
        there = sorted((self.folder / path).parent.glob("step-*"))
        return str(there[-1].relative_to(self.folder))


@functools.cache
def recipe_names() -> list[str]:
    from mpvg_kernels.train import recipes

    return recipes.names()


def task_of(recipe: str) -> str:
    from mpvg_kernels.train import recipes

    return recipes.load(recipe).task


# ---- data


def pictures(folder: Path, count: int) -> None:
    """Some images in a folder, of which each is a hard link to one of four."""
    folder.mkdir(parents=True)
    first = folder.parent / f".{folder.name}"
    for i in range(min(count, 4)):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        first.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(first / f"{i}.jpg")
    for i in range(count):
        os.link(first / f"{i % 4}.jpg", folder / f"{i}.jpg")
    shutil.rmtree(first)


def generate(root: Path) -> None:
    """Small data at the places that the pages name: /data/imagenet has its 1000 classes, with an image each."""
    if root.exists():
        return
    pictures(root / "data" / "photos", 5)
    one = root / "data" / "photos" / "0.jpg"
    kinds = [f"n{i:08}" for i in range(1000)], ["ash", "beech", "oak"]
    for name, classes in (("data/imagenet", kinds[0]), ("other/imagenet", kinds[0]), ("data/leaves", kinds[1])):
        for split, count in (("train", 1 if classes is kinds[0] else 8), ("val", 1)):
            for label in classes:
                (root / name / split / label).mkdir(parents=True)
                for i in range(count):
                    os.link(one, root / name / split / label / f"{i}.jpg")
    (root / "data" / "shards").mkdir()
    for place in ("data/cifar", "home/cifar"):
        cifar(root / place)
    scenes(root)


def scenes(root: Path) -> None:
    """Small data for detection and segmentation in the layouts that the pages name."""
    from mpvg_kernels.train.data import shapes

    made = root / "home" / ".cache" / "mpvg_kernels" / f"shapes-{shapes.VERSION}"
    made.parent.mkdir(parents=True)
    shapes.write(made, {"train": 8, "val": 4})
    for name in ("boats", "fields"):
        shutil.copytree(made, root / "data" / name)
    coco, ade20k = root / "data" / "coco", root / "data" / "ADEChallengeData2016"
    for split, training in (("train", "training"), ("val", "validation")):
        shutil.copytree(made / "images" / split, coco / f"{split}2017")
        shutil.copytree(made / "images" / split, ade20k / "images" / training)
        shutil.copytree(made / "masks" / split, ade20k / "annotations" / training)
        (coco / "annotations").mkdir(exist_ok=True)
        shutil.copy(
            made / "annotations" / f"instances_{split}.json", coco / "annotations" / f"instances_{split}2017.json"
        )
    rows = (f"{i}\t0.1\t10\t1\t1\tclass {i}\n" for i in range(1, 151))
    (ade20k / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(rows))


def cifar(root: Path) -> None:
    """A CIFAR-100 of 200 and 20 images."""
    import pickle

    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    for name, count in (("train", 200), ("test", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [i % 100 for i in range(count)]}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))


class Shards:
    """In the place of timm's reader of webdataset's shards: images of one colour, dealt out as timm deals them."""

    dist_rank, dist_num_replicas = 0, 1

    def __init__(self, split: str):
        self.reader, self.num_samples = self, int(split.rpartition("|")[2])

    def set_epoch(self, epoch: int) -> None:
        pass

    def set_loader_cfg(self, num_workers: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for i in range(40):
            yield Image.new("RGB", (64, 48), (i, 100, 100)), i


def stay_offline() -> None:
    """In the process of a command: what would be downloaded is generated, and what takes minutes does nothing."""
    import timm
    import torch
    import torchvision

    from mpvg_kernels.train.data import sources

    create_model, create_dataset = timm.create_model, sources.create_dataset

    def random_model(name, pretrained=False, **kwargs):
        pretrained &= str(name).startswith("local-dir:")
        name, large = ("regnety_002", name) if str(name).startswith("regnety_160") else (name, None)
        model = create_model(name, pretrained, **kwargs)
        if large:
            model.pretrained_cfg["architecture"] = large.partition(".")[0]
        return model

    def dataset(name, *args, split="train", **kwargs):
        return Shards(split) if name.startswith("wds/") else create_dataset(name, *args, split=split, **kwargs)

    timm.create_model, sources.create_dataset = random_model, dataset
    sources.PACKAGES["wds"] = ("torch", "torch")
    torchvision.datasets.CIFAR100._check_integrity = lambda self: True
    torchvision.datasets.cifar.check_integrity = lambda *args: True
    torch.compile = lambda model, *args, **kwargs: model
    # A study's runs are processes of their own, and so are benchmarks: neither is to import everything again.
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "forkserver" else method)
    subprocess.call = run_here


def run_here(argv: list) -> int:
    """`python FILE ARGUMENTS` in this process."""
    import runpy

    sys.argv = [str(arg) for arg in argv[1:]]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        return error.code or 0
    return 0


# ---- options in the text


INLINE = re.compile(r"`(?:python -m mpvg_kernels|mpvg) ([a-z]+)([^`]*)`")


def inline(page: Path) -> Iterator[tuple[str, list[str]]]:
    """What the text names in passing: an `mpvg` command and the options given to it."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for name, rest in INLINE.findall(text):
        yield name, re.findall(r"--[\w.-]+", rest)


def options() -> dict[str, set[str]]:
    """Every `mpvg` command's own options."""
    from mpvg_kernels.__main__ import parser

    (commands,) = (a for a in parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict))
    return {name: set(sub._option_string_actions) for name, sub in commands.choices.items()}
