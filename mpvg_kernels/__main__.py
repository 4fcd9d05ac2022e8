"""The `mpvg` command: train, eval, predict, analyze, report, export, study, recipes, info, bench, demo.

Exit codes: 0 ok, 1 failure, 2 usage or bad input, 75 training saved on a signal, 130 interrupted. What a command needs
is imported by that command alone, so that `mpvg info` works without the extras.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from .train import InputError, Stopped, TrainingError, near_matches
from .train.run_folder import RunFolder, finite, printable, show, write_json
from .train.signals import EXIT_SAVED

# The extra that brings a package, for a message in place of an ImportError.
EXTRAS = dict.fromkeys(("tyro", "sklearn", "scipy", "matplotlib", "pycocotools"), "train")
EXTRAS |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one sentence."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        raise InputError(f"{message.rstrip('.')}; see `{self.prog} --help`")

    def options(self) -> list[str]:
        """Names of the options, without their dashes."""
        return [option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"]


def train(args: argparse.Namespace, fields: list[str]) -> int:
    from .train import config

    if args.help:
        args.parser.print_help()
        if args.recipe is None:
            return 0
        fields = ["--help"]
    default, recipe = start_of_run(args)
    config.check_options(fields, args.parser.options())
    resolved, out = config.from_args(default, fields, f"mpvg train --recipe {recipe}"), args.out
    if args.smoke:
        from .train import distributed, smoke

        whole, resolved = resolved, smoke.smoke(resolved, distributed.find_world())
        out, recipe = smoke.run_folder(out, recipe, args.resume), f"{recipe.removesuffix('-smoke')}-smoke"
        logging.getLogger(__package__).info(smoke.cuts(whole, resolved))
    if args.print_config:
        show(json.dumps(config.to_dict(resolved), indent=2))
        return 0
    from .train import loop

    loop.train(resolved, out, recipe, args.resume)
    return 0


def start_of_run(args: argparse.Namespace):
    """The config to begin with and its recipe's name: the recipe's, or that of the run that is gone on with."""
    from .train import recipes

    if args.recipe is not None:
        return recipes.load(args.recipe), args.recipe
    folder = args.out if args.resume == "auto" else None if args.resume == "never" else Path(args.resume)
    while folder is not None and not (folder / "run.json").exists() and folder.name:
        folder = folder.parent if folder.name.startswith(("step-", "checkpoints")) else None
    if folder is None and args.resume not in ("never", "auto"):
        raise InputError(
            f"{args.resume} is not a run folder, nor a checkpoint in one; expected what `mpvg train` wrote"
        )
    if folder is None:
        raise InputError(f"mpvg train needs --recipe NAME: there is {', '.join(recipes.names())}")
    run = RunFolder(folder)
    return run.config(), run.info.get("recipe", "")


def evaluate(args: argparse.Namespace, fields: list[str]) -> int:
    from .train import config

    config.check_options(fields, args.parser.options())  # before what takes seconds to import
    if args.folder is not None and args.split is not None:
        raise InputError("--split and --folder are both given: give one of them")
    if args.batch_sizes and not args.latency:
        raise InputError("--batch-sizes are those of --latency, which is not given: add it")
    if (args.images is None) != (args.annotations is None):
        raise InputError("of --images and --annotations one is given: give both, or none for a split")
    if args.images is not None and args.split is not None:
        raise InputError("--split and --images are both given: give one of them")
    task = RunFolder(args.run_folder).config().task
    dense = task != "classification"
    for name in ("folder", "batch") if dense else ("images",):
        if getattr(args, name) is not None:
            of = "classification" if dense else "detection and segmentation"
            raise InputError(f"--{name} is for {of}, and {args.run_folder} is a run of {task}: leave it out")
    sizes = (args.batch_sizes or ((1,) if dense else (1, 8, 64))) if args.latency else ()
    options = {"split": args.split or "validation", "out": args.out, "batch_sizes": sizes, "progress": True}
    if dense:
        from .tools import dense_evaluate as evaluate

        options |= {"images": args.images, "annotations": args.annotations}
    else:
        from .tools import evaluate

        options |= {"folder": args.folder, "batch": args.batch}
    result = evaluate.evaluate_run(args.run_folder, args.weights, fields, **options)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        show(evaluate.describe(result))
        write_result(args.json, result)
    return 0


def predict(args: argparse.Namespace, _: list[str]) -> int:
    from .tools import predict

    if args.draw is not None and not args.pictures:
        raise InputError("--draw and --no-draw are both given: give one of them")
    names = ("top", "format", "out", "batch", "device", "threshold", "draw", "pictures")
    options = {name: getattr(args, name) for name in names}
    return predict.predict_files(args.model, args.paths, args.weights, **options)


def analyze(args: argparse.Namespace, fields: list[str]) -> int:
    from .train import config

    config.check_options(fields, args.parser.options())  # before what takes seconds to import
    if args.folder is not None and args.split is not None:
        raise InputError("--split and --folder are both given: give one of them")
    if args.images < 1:
        raise InputError(f"--images {args.images}: expected 1 or more")
    from .tools import analyze

    split = args.split or "validation"
    options = {"split": split, "folder": args.folder, "images": args.images, "out": args.out}
    result = analyze.analyze_run(args.run_folder, args.weights, fields, **options)
    analyze.warn(result)
    show(analyze.describe(result))
    write_result(args.json, result)
    return 0


def at_least_1(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def new_file(text: str) -> Path:
    """A file that can be made: that there is no folder for it is said before the work, not after it."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder: make it, or choose another place")
    return path


def write_result(path: Path | None, result: dict) -> None:
    """Write what a command found as JSON, where it was asked for."""
    if path is None:
        return
    try:
        write_json(path, finite(result))
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror})") from None


def export(args: argparse.Namespace, _: list[str]) -> int:
    from .tools import export

    names = ("weights", "scheme", "img_size", "batch", "kernels", "opset", "device", "card", "fresh_check")
    options = {name: getattr(args, name) for name in names}
    try:
        done = export.export(args.source, args.format, args.out, **options)
    except export.CheckError as error:
        show(f"mpvg: {printable(str(error))}", sys.stderr)
        return 1
    show(export.describe(done, args.format, args.batch))
    paths = {"path": str(done.path), "card": str(done.card) if done.card else None}
    write_result(args.json, done._asdict() | paths | {"allowed": export.TOLERANCES[args.format]})
    return 0


def report(args: argparse.Namespace, fields: list[str]) -> int:
    from .train import config

    config.check_options(fields, args.parser.options())  # before what takes seconds to import
    from .tools import report

    options = {"out": args.out, "images": args.images, "use_model": not args.no_model}
    for path in report.report(args.folders, args.weights, fields, **options):
        show(path)
    return 0


def image_size(text: str) -> tuple[int, int]:
    """`224` or `224x160`, height first."""
    sides = text.split("x")
    if not (all(side.isdecimal() for side in sides) and len(sides) in (1, 2)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected pixels, 224, or height x width, 224x160")
    return int(sides[0]), int(sides[-1])


def study(args: argparse.Namespace, fields: list[str]) -> int:
    from .train import config

    config.check_options(fields, args.parser.options())  # before what takes seconds to import
    from .tools import study

    options = {name: getattr(args, name) for name in ("seeds", "out", "jobs")}
    schemes = {"schemes": args.schemes} if args.schemes else {}
    result = study.study(args.recipe, fields=fields, **options, **schemes)
    return 1 if result["failed"] else 0


def recipes(args: argparse.Namespace, _: list[str]) -> int:
    from .train import recipes

    show("\n\n".join(recipes.describe(name) for name in recipes.names()))
    return 0


def info(args: argparse.Namespace, _: list[str]) -> int:
    from . import show_config

    show_config()
    return 0


def bench(args: argparse.Namespace, _: list[str]) -> int:
    there = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))
    if not there:
        raise InputError("the benchmarks do not come with the package: run `mpvg bench` in a clone of the repository")
    if args.name not in there:
        close = near_matches(args.name, there)
        raise InputError(f"unknown benchmark {args.name!r}: there is {', '.join(there)}{close}")
    return subprocess.call([sys.executable, BENCHMARKS / f"bench_{args.name}.py", *args.args])


def demo(args: argparse.Namespace, _: list[str]) -> int:
    from .demo import main

    return main(args.out)


def parser() -> Parser:
    top = Parser(prog="mpvg", description="Fused position-embedding kernels for vision transformers, and a trainer.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run, help: str, **kwargs) -> Parser:
        sub = commands.add_parser(
            name, help=help, description=textwrap.fill(help[0].upper() + help[1:] + ".", 78), **kwargs
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command(
        "train",
        train,
        "train a recipe's model",
        epilog="Any field of the config is an option, for example --optim.lr 1e-3 --epochs 8;\n"
        "mpvg train --recipe NAME --help lists them with what they mean.",
        add_help=False,
    )
    sub.add_argument("-h", "--help", action="store_true", help="show this help, with --recipe every field too")
    sub.add_argument("--recipe", metavar="NAME", help="what to train; `mpvg recipes` lists them")
    sub.add_argument(
        "--out", metavar="DIR", type=Path, help="run folder (default: runs/NAME-TIME; resuming, runs/NAME)"
    )
    sub.add_argument(
        "--resume",
        metavar="never|auto|PATH",
        default="never",
        help="auto: go on from the run folder's newest whole checkpoint, or start; PATH: from that run or checkpoint",
    )
    sub.add_argument(
        "--smoke",
        action="store_true",
        help="the same in seconds, to see that all fits: two updates of a small batch, in the folder DIR-smoke-TIME",
    )
    sub.add_argument("--print-config", action="store_true", help="print the resolved config as JSON and stop")
    sub = command(
        "eval",
        evaluate,
        "evaluate a run's weights on any split or folder: accuracy, AP or mean IoU, by class too, and latency",
        epilog="Fields of the run's config are options, for example\n--data.root DIR --device cpu.\n"
        "Started by torchrun, the processes share the images out.",
    )
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="run folder")
    sub.add_argument("--weights", choices=("best", "last", "ema"), default="last", help="which weights (default: last)")
    sub.add_argument("--split", metavar="NAME", help="train, validation (default), or a name that the data set has")
    sub.add_argument(
        "--folder", metavar="DIR", type=Path, help="classification: in its place a folder of images, a folder a class"
    )
    sub.add_argument("--images", metavar="DIR", type=Path, help="detection, segmentation: in its place these images")
    sub.add_argument(
        "--annotations", metavar="PATH", type=Path, help="of --images: COCO's JSON file, or the folder of label maps"
    )
    sub.add_argument(
        "--batch", metavar="N", type=at_least_1, help="classification: images at a time (default: as in training)"
    )
    sub.add_argument(
        "--out", metavar="DIR", type=Path, help="where figures and pictures go (default: RUN/eval/WEIGHTS-SPLIT)"
    )
    sub.add_argument("--json", metavar="FILE", type=new_file, help="write the result there as well")
    sub.add_argument("--latency", action="store_true", help="measure latency and throughput by batch size too")
    sub.add_argument(
        "--batch-sizes",
        metavar="N",
        type=at_least_1,
        nargs="+",
        help="of --latency (default: 1 8 64; of detection and segmentation 1)",
    )
    sub = command(
        "predict",
        predict,
        "classify images with a run's model, or one in timm's format; of detection and segmentation draw what it finds",
    )
    sub.add_argument("model", metavar="MODEL", type=Path, help="run folder, or a folder in timm's format (RUN/best)")
    sub.add_argument("paths", metavar="PATH", nargs="+", help="image files, and folders, searched to the bottom")
    sub.add_argument("--weights", choices=("best", "last", "ema"), help="which weights of a run (default: last)")
    sub.add_argument("--top", metavar="K", type=at_least_1, help="classes of each image (default: 5)")
    sub.add_argument("--threshold", metavar="S", type=share, help="detection: least score, 0 to 1 (default: 0.5)")
    sub.add_argument(
        "--draw", metavar="DIR", type=Path, help="detection, segmentation: where pictures go (default: predictions)"
    )
    sub.add_argument("--no-draw", dest="pictures", action="store_false", help="draw no pictures")
    sub.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    sub.add_argument("--out", metavar="FILE", type=Path, help="write there, not to the standard output")
    sub.add_argument("--batch", metavar="N", type=at_least_1, help="classification: images at a time (default: 32)")
    sub.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    sub = command(
        "analyze",
        analyze,
        "draw what the position embedding does in a run's model: the paper's figures, with their numbers",
        epilog="Fields of the run's config are options, for example\n--data.root DIR --device cpu.",
    )
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="run folder")
    sub.add_argument("--weights", choices=("best", "last", "ema"), default="last", help="which weights (default: last)")
    sub.add_argument("--split", metavar="NAME", help="train, validation (default), or a name that the data set has")
    sub.add_argument("--folder", metavar="DIR", type=Path, help="images in place of a split, a folder for each class")
    sub.add_argument("--images", metavar="N", type=int, default=64, help="how many, over the whole split (default: 64)")
    sub.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where pictures and analysis.json go (default: RUN/analysis/WEIGHTS-SPLIT)",
    )
    sub.add_argument("--json", metavar="FILE", type=new_file, help="write the numbers there as well")
    sub = command("export", export, "write a run's model, or one of random weights, for other programs, and check it")
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help="run folder, folder in timm's format (RUN/best), or model name (random weights)",
    )
    sub.add_argument("--format", choices=("onnx", "pt2", "aot", "safetensors"), required=True, help="what to write")
    sub.add_argument("--out", metavar="PATH", type=Path, help="file (safetensors: folder) to make (default: NAME here)")
    sub.add_argument("--weights", choices=("best", "last", "ema"), help="which weights of a run (default: last)")
    sub.add_argument("--scheme", metavar="SCHEME", help="position scheme of a model's name, for example mpvg(last=8)")
    sub.add_argument("--img-size", metavar="SIZE", type=image_size, help="image size, 224 or 224x160 (default: own)")
    sub.add_argument("--batch", metavar="N", type=int, help="fix the number of images a call (default: any number)")
    sub.add_argument("--kernels", action="store_true", help="pt2, aot: keep the fused operators (needs this package)")
    sub.add_argument("--opset", metavar="N", type=int, help="onnx: operator set (default: PyTorch's)")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="aot: what it is compiled for")
    sub.add_argument("--no-card", dest="card", action="store_false", help="write no model card beside the model")
    sub.add_argument(
        "--no-fresh-check", dest="fresh_check", action="store_false", help="do not load it in a fresh process as well"
    )
    sub.add_argument("--json", metavar="FILE", type=new_file, help="write path, card and difference there as well")
    sub = command(
        "report",
        report,
        "write curves, tables and sample predictions of a run, or of several, as one HTML file and as Markdown",
        epilog="Fields of the run's config are options behind the runs, for example\n--data.root DIR --device cpu.",
    )
    sub.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="run folder; several are compared")
    sub.add_argument("--weights", choices=("best", "last", "ema"), default="last", help="which weights (default: last)")
    sub.add_argument(
        "--out",
        metavar="FILE.html",
        type=new_file,
        help="default: RUN/report.html; of several runs comparison.html beside",
    )
    sub.add_argument("--images", metavar="N", type=int, default=24, help="sample images to show (default: 24)")
    sub.add_argument("--no-model", action="store_true", help="read the logs alone: no predictions, nothing evaluated")
    sub = command(
        "study",
        study,
        "train every position scheme with several seeds, and say what the differences are worth",
        epilog="Any field of the config is an option, for example --epochs 8, and applies to all\n"
        "runs. "
        "Stopped or killed, the same command goes on.",
    )
    sub.add_argument("recipe", metavar="RECIPE", help="what to train; `mpvg recipes` lists them")
    sub.add_argument("--seeds", metavar="N", type=int, default=5, help="runs of each scheme (default: 5)")
    sub.add_argument("--schemes", metavar="S", nargs="+", help="position schemes (default: the paper's, and Table 6's)")
    sub.add_argument("--out", metavar="DIR", type=Path, help="the study's folder (default: runs/study-RECIPE)")
    sub.add_argument(
        "--jobs", metavar="N", type=int, help="runs at once (default: what the CPU cores allow; one on a GPU)"
    )
    command("recipes", recipes, "list the recipes")
    command("info", info, "print which backends there are, which are not and why")
    sub = command("bench", bench, "run a benchmark of the repository; what follows its name goes to it")
    sub.add_argument("name", metavar="NAME", help="dual_ln, norm_pool, train, memory, ...")
    sub.add_argument(
        "args", metavar="...", nargs=argparse.REMAINDER, help="arguments of the benchmark, --help included"
    )
    sub = command("demo", demo, "train on real images, check the fused kernels against the plain formula, time both")
    sub.add_argument("--out", metavar="DIR", type=Path, help="run folder to make (default: runs/demo-TIME)")
    return top


@contextlib.contextmanager
def log_shown():
    """Inside, the first process shows on stderr what the package logs: which weights were loaded, and how changed."""
    logger, handler = logging.getLogger(__package__), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mpvg: %(message)s"))
    level = logger.level
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started us has closed it
            setattr(sys, name, open(os.devnull, "w"))
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has the letters that names have
    try:
        args, rest = parser().parse_known_args(argv)
        if rest and args.run not in (train, evaluate, analyze, report, study):
            raise InputError(f"mpvg {args.command} does not take {' '.join(rest)!r}; see `mpvg {args.command} --help`")
        with log_shown():
            return args.run(args, rest)
    except (InputError, TrainingError, Stopped) as error:
        # What many processes agreed on, the first one says.
        if not getattr(error, "shared", False) or os.environ.get("RANK", "0") == "0":
            show(f"mpvg: {printable(str(error))}", sys.stderr)
        return {InputError: 2, TrainingError: 1, Stopped: EXIT_SAVED}[type(error)]
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise
        print(f"mpvg: {name} is not installed; `pip install 'mpvg_kernels[{EXTRAS[name]}]'` brings it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        show("mpvg: interrupted", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
