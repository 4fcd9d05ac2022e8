"""`mpvg report`: pages that are well-formed and load nothing, one set of numbers in all of them, runs in bad shape."""

import base64
import html.parser
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from mpvg_kernels import __main__ as cli
from mpvg_kernels.tools import class_report, page, report
from mpvg_kernels.train import curves, loop, recipes, record
from mpvg_kernels.train.config import from_args, to_dict
from mpvg_kernels.train.figures import FIGURES
from mpvg_kernels.train.metrics import read_log
from mpvg_kernels.train.record import collect, collect_all
from mpvg_kernels.train.report import write_report
from mpvg_kernels.train.run_folder import RunFolder
from mpvg_kernels.train.table import Table, escape

LOSS = curves.measured(curves.LOSS, FIGURES["classification"])
pytestmark = pytest.mark.xdist_group(__name__)  # one run for all tests
HOSTILE = "<script>alert('1')</script> & \"a|b\" $x\\y$ `c` [d](http://e) _f_"
VOID = ("meta", "img", "br", "hr", "link", "input")


class Reader(html.parser.HTMLParser):
    """Reads a page, and fails where it is not well-formed, or loads or runs something."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tables, self.text, self.images, self.ids, self.links = [], [], [], [], [], []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == [] and len(self.ids) == len(set(self.ids)) and set(self.links) <= set(self.ids)
        assert "http" not in self.style and "url(" not in self.style and "@import" not in self.style

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "base") and not any(n.startswith("on") for n in given)
        if tag == "img":
            assert given["src"].startswith("data:image/") and given["alt"]
            self.images.append(given)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "a":
            assert given["href"].startswith("#")
            self.links.append(given["href"][1:])
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text.append(data)


def read(path: Path) -> Reader:
    return Reader(path.read_text())


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as a reader of the rendered page sees them."""
    tables = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in block.splitlines() if not line.startswith("| ---")]
        tables.append([[html.unescape(re.sub(r"\\(\W|_)", r"\1", cell)) for cell in row] for row in rows])
    return tables


def same_tables(pages: tuple[Path, Path]) -> Reader:
    """The page, whose tables are those of the Markdown; only the images' captions are a table there alone."""
    found, written = read(pages[0]), markdown_tables(pages[1].read_text())
    written = [table for table in written if table[0][0] != "image"]
    cells = [[[" ".join(cell.split()) for cell in row] for row in table] for table in found.tables]
    # A matrix leaves its zeros out for the eye.
    zeros = [
        [["0" if cell == "" and i and j else cell for j, cell in enumerate(row)] for i, row in enumerate(t)]
        for t in cells
    ]
    for shown, also, table in zip(cells, zeros, written, strict=True):
        assert table in (shown, also)
    return found


def drawing(image: dict) -> str:
    return base64.b64decode(image["src"].partition(",")[2]).decode()


def train_rows(count: int, **more) -> list[dict]:
    rows = [
        {
            "kind": "train",
            "time": 1000.0 + i,
            "epoch": 1 + i // 5,
            "step": 10 * (i + 1),
            "lr": 1e-3,
            "loss": 2.0 / (i + 1),
        }
        | {"acc": 5.0 * i, "grad_norm": 1.0 + i, "skipped": 0, "img_s": 100.0, "memory_mb": 500.0}
        | more
        for i in range(count)
    ]
    for i in range(0, count // 5):
        epoch = {"kind": "epoch", "time": 1000.5 + 5 * i + 4, "epoch": i + 1, "step": 50 * (i + 1), "lr": 1e-3}
        epoch |= {"train_loss": 1.0, "train_acc": 50.0, "test_loss": 0.5 / (i + 1), "test_acc": 80.0 + i}
        rows.insert(6 * i + 5, epoch | {"grad_norm": 1.0, "skipped": 0, "bad_images": 0, "img_s": 100.0})
    return rows


def pos_row(step: int, layers=(1, 2, "last"), by: float = 0.1) -> dict:
    values = [by * step * (i + 1) / 100 for i in range(len(layers))]
    return {"kind": "pos", "time": 1000.0, "epoch": 1, "step": step, "layers": list(layers), "pos_norm": values} | {
        "correlation": [-value for value in values]
    }


def make_run(path: Path, rows: list[dict] | None = None, **info) -> Path:
    """A run's folder with a log made by hand, and no weights."""
    settings = to_dict(recipes.load("digits"))
    info = {"recipe": "digits", "updates": 704, "parameters": 1000, "flops": 1e6, "config": settings} | info
    RunFolder.create(path, info)
    rows = train_rows(20) if rows is None else rows
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "starts.jsonl").write_text(
        json.dumps({"time": "1970-01-01T00:16:30+0000", "step": 0, "processes": 1}) + "\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of a tiny model, finished."""
    fields = "--epochs 2 --sched.warmup_epochs 1 --model.patch_size 4 --model.embed_dim 32 --model.depth 2"
    fields += " --model.num_heads 2 --device cpu --optim.ema_decay 0.9"
    settings = from_args(recipes.load("digits"), fields.split())
    folder = tmp_path_factory.mktemp("report") / "tiny"
    loop.train(settings, folder, "digits")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny"))


@pytest.fixture
def undrawn(monkeypatch):
    """Curves are made and not drawn, which takes most of a report's time."""
    plain = Figure.savefig

    def savefig(self, file, format, **kwargs):
        file.write("<svg >") if format == "svg" else plain(self, file, format=format, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)


# ---- one run


@pytest.fixture(scope="module")
def one(trained, tmp_path_factory):
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("one") / "tiny"))
    return folder, report.report([folder])


def test_one_run(one):
    folder, pages = one
    assert pages == (folder / "report.html", folder / "report.md")
    found, (*_, last) = same_tables(pages), read_log(folder, "epoch")
    results = found.tables[0]
    assert results[1] == [
        "last",
        "2",
        f"{last['test_acc']:.2f} %",
        f"{last['test_loss']:.4f}",
        f"{last['train_loss']:.4f}",
    ]
    assert results[3][2] == f"{last['ema_acc']:.2f} %"
    loss = next(table for table in found.tables if "lowest" in table[0])
    assert loss[2][5] == f"{last['test_loss']:.4f}" and [row[0] for row in loss[1:]] == [n.name for n in LOSS.lines]
    evaluated = next(table for table in found.tables if "calibration error" in table[0])
    assert evaluated[1][2] == f"{last['test_acc']:.2f} %" and evaluated[1][4] == f"{last['test_loss']:.4f}"
    text = " ".join(found.text)
    assert "finished" in text and "update 44 of 44, epoch 2 of 2" in text and "1970" not in text
    assert pages[0].stat().st_size < 600_000
    changed = next(table for table in found.tables if table[0][:2] == ["field", "recipe digits"])
    assert ["epochs", "32", "2"] in changed and "seed" not in [row[0] for row in changed]


def test_samples_are_the_most_confident_mistakes(one):
    folder, pages = one
    evaluation = class_report.evaluate(collect(folder), "last")
    (block,) = (block for block in class_report._samples(evaluation, 24) if isinstance(block, page.Gallery))
    assert len(block.samples) == 24
    wrong = [sample for sample in block.samples if not sample.right]
    assert block.samples[: len(wrong)] == wrong and 0 < len(wrong) <= 18
    sure = [float(sample.caption[2].rstrip(" %")) for sample in wrong]
    assert sure == sorted(sure, reverse=True)
    assert all((sample.caption[0] == sample.caption[1]) == sample.right for sample in block.samples)
    # By hand: the model's own answers on the pictures' images.
    (x, y, index), *_ = evaluation.images.batches(360)
    prob = RunFolder(folder).model("last")(x).softmax(-1)
    mistakes = prob.max(-1).values.where(prob.argmax(-1) != y, torch.tensor(0.0))
    assert evaluation.images.name(int(index[mistakes.argmax()])) == wrong[0].name
    found = [image for image in read(pages[0]).images if image["alt"].startswith(wrong[0].name + ":")]
    assert f"label {wrong[0].caption[0]}, predicted {wrong[0].caption[1]}" in found[0]["alt"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[0]["src"].partition(",")[2]))))
    assert np.array_equal(pixels, evaluation.images.picture(x[mistakes.argmax()]))


def test_confusion_matrix_and_classes(one):
    folder, pages = one
    found, evaluation = read(pages[0]), class_report.evaluate(collect(folder), "last")
    matrix = next(table for table in found.tables if table[0] == ["label", *map(str, range(10))])
    counts = [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]]
    assert counts == evaluation.summary["confusion"].tolist() and sum(map(sum, counts)) == 360
    classes = next(table for table in found.tables if table[0][0] == "class")
    right, of = counts[3][3], sum(counts[3])
    assert classes[4][:3] == ["3", str(of), f"{100 * right / of:.1f} %"]


@pytest.mark.usefixtures("undrawn")
def test_what_a_report_was_given_stays(copy, monkeypatch, capsys):
    monkeypatch.setattr("mpvg_kernels.train.report.plot_curves", lambda _: None)
    write_report(RunFolder(copy), "## More\n\ntext |")
    assert cli.main(["report", str(copy), "--no-model"]) == cli.main(["report", str(copy), "--no-model"]) == 0
    text = (copy / "report.md").read_text()
    assert text.count("## More\n\ntext |\n") == 1 and text.count("## Results") == 1
    out, err = capsys.readouterr()
    assert out == f"{copy / 'report.html'}\n{copy / 'report.md'}\n" * 2 and err == ""


def test_write_report_and_report_have_the_same_results(one, copy):
    write_report(RunFolder(copy))
    assert markdown_tables((copy / "report.md").read_text())[0] == read(one[1][0]).tables[0]
    assert "- Model: mpvg_deit_tiny_patch16_224, scheme mpvg" in (copy / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_out_and_images(copy, tmp_path):
    assert cli.main(["report", str(copy), "--out", str(tmp_path / "x.html"), "--images", "3", "--weights", "ema"]) == 0
    found = same_tables((tmp_path / "x.html", tmp_path / "x.md"))
    assert sum("predicted" in image["alt"] for image in found.images) == 3
    assert "The ema weights" in " ".join(found.text)
    assert report.report([copy], images=0, out=tmp_path / "y.html")
    same_tables((tmp_path / "y.html", tmp_path / "y.md"))


@pytest.mark.usefixtures("undrawn")
def test_config_fields_are_options(copy, capsys):
    assert cli.main(["report", str(copy), "--data.val_split", "train", "--device", "nonsense"]) == 0
    assert "no predictions of the last weights are shown" in capsys.readouterr().err


# ---- from the logs alone


def test_curves_of_a_run_by_hand(tmp_path):
    rows = train_rows(20)
    rows[3]["loss"] = None  # not finite
    rows += [
        {"kind": "spike", "epoch": 4, "step": 190, "loss": 1.5},
        {"kind": "skipped", "epoch": 4, "step": 40, "updates": 2},
    ]
    folder = make_run(tmp_path / "run", [*rows, *(pos_row(step) for step in range(20, 201, 20))])
    pages = report.report([folder], use_model=False)
    found = same_tables(pages)
    loss = next(table for table in found.tables if "lowest" in table[0])
    assert loss[1] == ["training (augmented)", "2.0000", "0.3333", "0.1818", "0.1333", "0.1000", "0.1000", "200"]
    assert loss[2] == ["held-out images", "0.5000", "0.5000", "0.2500", "0.1667", "0.1250", "0.1250", "200"]
    shown = drawing(found.images[0])
    assert "loss spike" in shown and "skipped updates" in shown and "prefers-color-scheme:dark" in shown
    text = " ".join(found.text)
    assert "Skipped updates" in text and "2 (loss or gradient not finite)" in text and "1, at update 190" in text
    pos = [table for table in found.tables if table[0][0] == "layer"]
    assert len(pos) == 4 and len(found.images) == 9
    assert pos[0][0] == ["layer", "update 20", "60", "100", "160", "200"] or pos[0][0][-1] == "200"
    assert pos[1][3][-1] == "0.600" and pos[0][3][0] == "last norm" and pos[2][1] == ["layer 1", "-0.200"]


@pytest.mark.parametrize("count, scale", [(9, "linear"), (11, "log"), (1, "linear")])
def test_axis_is_logarithmic_from_a_decade_on(tmp_path, count, scale):
    axes = Figure().subplots()
    curves.draw(axes, LOSS, [collect(make_run(tmp_path / "run", train_rows(count)))])  # 2 / 1, 2 / 2, ...
    assert axes.get_yscale() == scale


@pytest.mark.parametrize("threads, words", [(1, "1 thread,"), (2, "2 threads,")])
def test_what_a_run_without_a_look_at_the_embedding_says(tmp_path, threads, words):
    found = same_tables(report.report([make_run(tmp_path / "run", machine={"threads": threads})], use_model=False))
    text = " ".join(found.text)
    assert "no norm of the model takes one (default, gap), log.pos_interval is None, or none was due yet." in text
    assert words in text + str(found.tables)


def test_time_and_cost(tmp_path):
    folder = make_run(tmp_path / "run", machine={"threads": 2})
    starts = [
        {"time": "1970-01-01T00:16:30+0000", "step": 0},
        {"time": "1970-01-01T00:16:50+0000", "step": 100, "processes": 2},
    ]
    rows = train_rows(20)
    for row in rows:
        row["time"] = (990 if row["step"] <= 100 else 1010) + row["step"] / 100
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = collect(folder)
    assert found.seconds() == pytest.approx(1 + 2)  # the time between the two is not the run's
    assert curves.resumed_at(found) == [100]
    cost = report._facts([found])[0].rows
    assert ("Time", "3 s with evaluation, last line of the log 1970-01-01 00:16 UTC, resumed at update 100") in cost
    work = 3e-15 * 1e6 * 64 * 200
    assert (
        "Cost",
        f"{3 * 2 * 2 / 3600:.3g} core hours, {work:.3g} PFLOP of training, at most 500 MB of memory",
    ) in cost


def test_lines_of_an_earlier_start_are_replaced(tmp_path):
    rows = [row for row in train_rows(6) if row["kind"] == "train"]
    again = [row | {"loss": 9.0} for row in rows[2:4]]
    found = collect(make_run(tmp_path / "run", [*rows[:5], *again]))
    assert [(row["step"], row["loss"]) for row in found.train] == [(10, 2.0), (20, 1.0), (30, 9.0), (40, 9.0)]


def test_long_lines_keep_their_extremes():
    y = [math.sin(i / 50) for i in range(10_000)]
    y[1234], y[4321], y[5000] = 7.0, -7.0, math.nan
    x, thin = curves._thin(list(range(10_000)), y)
    assert len(x) <= 2 * curves.POINTS and x == sorted(x) and (x[0], x[-1]) == (0, 9999)
    assert 1234 in x and 4321 in x and any(map(math.isnan, thin))


# ---- several runs


def test_runs_side_by_side(copy, tmp_path):
    second = Path(shutil.copytree(copy, copy.with_name("other")))
    info = json.loads((second / "run.json").read_text())
    info["config"] |= {"seed": 5}
    (second / "run.json").write_text(json.dumps(info))
    shutil.rmtree(second / "last")
    (second / "best").rename(second / "last")
    (second / "ema").rename(second / "best")
    weights = [timm.models.load_state_dict(path / "last" / "model.safetensors") for path in (copy, second)]
    torch.manual_seed(1)
    import safetensors.torch

    safetensors.torch.save_file(
        {key: value + 0.05 * torch.randn_like(value) for key, value in weights[1].items()},
        second / "last" / "model.safetensors",
        {"format": "pt"},
    )
    pages = report.report([copy, second])
    assert pages == (copy.parent / "comparison.html", copy.parent / "comparison.md")
    found = same_tables(pages)
    differ = next(table for table in found.tables if table[0] == ["field", "tiny", "other"])
    assert differ[1:] == [["seed", "0", "5"]]
    assert [row[0] for row in found.tables[1]] == ["run", *["tiny"] * 3, *["other"] * 3]
    assert "tiny" in drawing(found.images[0]) and "other" in drawing(found.images[0])
    said = [class_report.evaluate(collect(path), "last").found.top[:, 0] for path in (copy, second)]
    count = int((said[0] != said[1]).sum())
    assert count and f"The runs disagree on {count} of 360 images." in " ".join(found.text)
    assert sum("tiny" in image["alt"] and "label" in image["alt"] for image in found.images) == min(count, 24)


@pytest.mark.usefixtures("undrawn")
def test_runs_of_different_data(tmp_path, capsys):
    config = to_dict(recipes.load("digits"))
    runs = [make_run(tmp_path / name, class_names=list("ab" if name == "a" else "abc")) for name in "ab"]
    info = json.loads((runs[0] / "run.json").read_text()) | {
        "config": config | {"data": config["data"] | {"name": "folder"}}
    }
    (runs[0] / "run.json").write_text(json.dumps(info))
    found = same_tables(report.report(runs, use_model=False))
    sentence = "The runs are of different data: a: folder, 2 classes; b: digits, 3 classes."
    assert sentence in " ".join(found.text) and sentence in capsys.readouterr().err
    assert "Confusion matrix" not in " ".join(found.text)


@pytest.mark.usefixtures("undrawn")
def test_different_data_shows_no_predictions_side_by_side(copy, tmp_path):
    other = make_run(tmp_path / "b", class_names=["x"])
    found = same_tables(report.report([copy, other]))
    assert (
        "Evaluation" in found.text and "Confusion matrix" not in found.text and "Sample predictions" not in found.text
    )


@pytest.mark.usefixtures("undrawn")
def test_other_images_show_no_predictions_side_by_side(copy):
    """Of one data set by name, but it has changed between the two."""
    second = Path(shutil.copytree(copy, copy.with_name("other")))
    plain, calls = class_report.predictions, []

    def predictions(*args, **kwargs):
        calls.append(plain(*args, **kwargs))
        return calls[-1]._replace(label=calls[-1].label.roll(len(calls)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_report, "predictions", predictions)
        found = same_tables(report.report([copy, second]))
    assert "Confusion matrix" not in found.text
    assert "The runs' held-out images are not the same: no predictions are shown side by side." in found.text


def test_runs_of_one_name(tmp_path):
    runs = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    records, said = collect_all([*runs, tmp_path / "a" / ".." / "a" / "run"])
    assert [each.label for each in records] == ["a/run", "b/run"]
    assert len(said) == 2 and "is given twice" in said[0] and "2 runs are called run" in said[1]


def test_batches_that_differ_are_compared_by_images(tmp_path):
    config = to_dict(recipes.load("digits"))
    runs = [make_run(tmp_path / str(batch), config=config | {"batch": batch}) for batch in (32, 64)]
    found = same_tables(report.report(runs, use_model=False))
    assert "count images and not updates" in " ".join(found.text) and ">images<" in drawing(found.images[0])


@pytest.mark.usefixtures("undrawn")
def test_damaged_runs_among_others(tmp_path, capsys):
    good = make_run(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text('{"config": {')
    paths = [str(path) for path in (tmp_path / "bad", tmp_path / "nowhere", good)]
    assert cli.main(["report", *paths, "--no-model"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == str(good / "report.html")
    assert len(err.splitlines()) == 2 and "run.json can't be read" in err and "nowhere is not a run folder" in err
    assert "nowhere is not a run folder" in " ".join(read(good / "report.html").text)


# ---- bad input: a sentence, and the rest


def cut(folder):
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "step": 21')


def strange(folder):
    rows = [[1], {"kind": "train"}, {"kind": "train", "step": "x"}, {"kind": "epoch", "step": 300, "test_acc": "high"}]
    rows += [{"kind": "pos", "step": 300, "layers": [1, 2], "pos_norm": [1.0], "correlation": [1.0, 2.0]}]
    rows += [{"kind": "pos", "step": 301, "layers": [1, {}], "pos_norm": ["a", None], "correlation": [None, 2.0]}]
    with open(folder / "log.jsonl", "a") as log:
        log.write(
            "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "step": 210, "loss": NaN}\n\x00\xff\n'
        )


def edit(**changes):
    def spoil(folder):
        info = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(info | changes))

    return spoil


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "spoil, said",
    [
        (cut, "log.jsonl: 1 line can't be read and is left out."),
        (strange, "log.jsonl: 2 lines can't be read and are left out."),
        (lambda f: (f / "log.jsonl").write_text(""), "log.jsonl has no update yet."),
        (lambda f: (f / "log.jsonl").unlink(), "log.jsonl can't be read (No such file or directory)."),
        (
            lambda f: (f / "log.jsonl").write_text(json.dumps(train_rows(1)[0]) + "\n"),
            "log.jsonl has no evaluated epoch yet.",
        ),
        (lambda f: (f / "status.json").write_text("{"), "status.json can't be read"),
        (lambda f: (f / "status.json").write_text("[]"), None),
        (lambda f: (f / "starts.jsonl").write_text('{"time": 5}\n{"time": "x", "step": "y"}\n'), None),
        (edit(config=None), "run.json has no config."),
        (edit(config={"optim": 3, "sched": [], "epochs": "many", "batch": "x"}, recipe=["x"]), None),
        (edit(versions=3, machine="x", class_names=7, command="mpvg", updates="all", flops=None), None),
        (edit(recipe="gone"), None),
        (edit(recipe=None), None),
    ],
)
def test_runs_in_bad_shape(tmp_path, capsys, spoil, said):
    folder = make_run(tmp_path / "run", [*train_rows(20), pos_row(50), pos_row(100)])
    spoil(folder)
    assert cli.main(["report", str(folder), "--no-model"]) == 0
    err = capsys.readouterr().err
    found = same_tables((folder / "report.html", folder / "report.md"))
    if said is None:
        assert err == ""
    else:
        assert said in err and said in " ".join(found.text)
    (tmp_path / "second").mkdir()
    make_run(tmp_path / "second" / "run")
    assert cli.main(["report", str(folder), str(tmp_path / "second" / "run"), "--no-model"]) == 0
    same_tables((folder.parent / "comparison.html", folder.parent / "comparison.md"))


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_goes_on(tmp_path):
    found = same_tables(report.report([make_run(tmp_path / "run")], use_model=False))
    assert "running" in found.text and "update 200 of 704, epoch 4 of 32" in " ".join(found.text)


def other_classes(folder):
    edit(class_names=list("abcdefghij"))(folder)


def other_data(folder):
    info = json.loads((folder / "run.json").read_text())
    info["config"]["data"] |= {"name": "folder", "root": str(folder / "nowhere")}
    (folder / "run.json").write_text(json.dumps(info))


def newer_version(folder):
    info = json.loads((folder / "run.json").read_text())
    info["config"]["model"]["wings"] = 2
    (folder / "run.json").write_text(json.dumps(info))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: shutil.rmtree(f / "last"), "the run has not saved its last weights"),
        (lambda f: (f / "last" / "model.safetensors").write_bytes(b"12345678"), "can't be read"),
        (lambda f: (f / "last" / "config.json").write_text("{}"), "config.json"),
        (other_classes, "the data has other classes"),
        (other_data, "nowhere"),
        (newer_version, "unknown config field 'model.wings'"),
    ],
)
def test_without_predictions(copy, capsys, spoil, said):
    spoil(copy)
    assert cli.main(["report", str(copy)]) == 0
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "no predictions of the last weights are shown: " in sentence and said in sentence
    found = same_tables((copy / "report.html", copy / "report.md"))
    assert "Confusion matrix" not in found.text and len(found.tables) > 6
    assert html.unescape(sentence.removeprefix("mpvg: warning: ")) in " ".join(found.text)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "args, said",
    [
        (["nowhere"], "nowhere is not a run folder"),
        (["run", "--out", "report.md"], "expected a name that ends in .html"),
        (["run", "--out", "no/such/x.html"], "no/such is not a folder: make it, or choose another place"),
        (["run", "--images", "-1"], "--images -1: expected 0 or more"),
        (["run", "--wieghts", "best"], "unknown option or config field 'wieghts'; did you mean 'weights'"),
        ([], "required: RUN"),
    ],
)
def test_usage(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", [])
    assert cli.main(["report", *args, "--no-model"]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.rglob("*.html"))


# ---- hostile names, many classes


@pytest.fixture
def folder_run(tmp_path):
    """Makes a run of a folder of images with the class names, its weights random."""

    def make(names: list[str], name: str = "run") -> Path:
        for i, _ in enumerate(names):
            for split in ("train", "val"):
                folder = tmp_path / "data" / split / f"c{i:03}"
                folder.mkdir(parents=True)
                pixels = np.random.default_rng(i).integers(0, 255, (90, 70, 3), "uint8")
                Image.fromarray(pixels).save(folder / f"image_{HOSTILE.replace('/', '')[:30]}.png")
        fields = ["--data.name", "folder", "--data.root", str(tmp_path / "data"), "--data.img_size", "32", "32"]
        fields += ["--data.workers", "0", "--model.patch_size", "16", "--model.embed_dim", "16", "--model.depth", "2"]
        fields += ["--model.num_heads", "1", "--device", "cpu"]
        settings = from_args(recipes.load("digits"), fields)
        labels = [f"c{i:03}" for i in range(len(names))]
        run = make_run(tmp_path / name, recipe=HOSTILE, class_names=labels, config=to_dict(settings))
        size = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 1, "scheme": "mpvg"}
        model = timm.create_model("mpvg_deit_tiny_patch16_224", num_classes=len(names), **size)
        RunFolder(run).save("last", model)
        return run

    return make


def test_hostile_names(folder_run, monkeypatch):
    names = [HOSTILE, "b\n# c", "_d"]
    folder = folder_run(names, "_r$x\\y$ <b> & c")
    plain = class_report.summary
    monkeypatch.setattr(class_report, "summary", lambda found, classes, _: plain(found, classes, names))
    pages = report.report([folder])
    found = same_tables(pages)  # no script, no other address
    text = pages[1].read_text()
    assert HOSTILE in found.text and "<script" not in text and "\n# c" not in text
    assert all(len(set(map(len, table))) == 1 for table in markdown_tables(text))
    samples = [image for image in found.images if "predicted" in image["alt"]]
    assert len(samples) == 3 and all(image["src"].startswith("data:image/") for image in samples)
    second = make_run(folder.with_name("$y$_"), class_names=[])
    drawn = read(report.report([folder, second], use_model=False)[0])
    assert "_r$x\\y$ &lt;b&gt; &amp; c" in drawing(drawn.images[0]) and "$y$_" in drawing(drawn.images[0])


@pytest.mark.usefixtures("undrawn")
def test_many_classes(folder_run, monkeypatch):
    folder = folder_run([str(i) for i in range(25)])
    plain = class_report.summary
    names = [f"$x\\y$ {i}" for i in range(25)]

    def summary(found, classes, _):
        made = plain(found, classes, names)
        for i, row in enumerate(made["per_class"]):
            row["acc"] = 100.0 - i
        return made

    monkeypatch.setattr(class_report, "summary", summary)
    found = same_tables(report.report([folder]))
    assert any(image["alt"].startswith("Confusion matrix of 25 classes") for image in found.images)
    assert "Table of 25 classes" in found.text
    monkeypatch.setattr(class_report, "CLASS_ROWS", 10)
    found = same_tables(report.report([folder]))
    assert "The 10 least accurate of 25 classes." in found.text
    classes = next(table for table in found.tables if table[0][0] == "class")
    assert [row[0] for row in classes[1:]] == names[:14:-1]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a_b snake_case", "a_b snake_case"),
        ("_a_", "\\_a\\_"),
        ("a|b", "a\\|b"),
        ("<b>\n\n x", "&lt;b&gt; x"),
        ("`*[x](y)", "\\`\\*\\[x\\](y)"),
    ],
)
def test_escape(text, expected):
    assert escape(text) == expected and Table(("h",), [(text,)]).markdown().endswith(f"| {expected} |")


def test_durations():
    assert [record.duration(s) for s in (4.4, 59.4, 185, 25_920)] == ["4 s", "59 s", "3 min 5 s", "7 h 12 min"]
