"""The code that loads an exported file: printed in its model card, and run at every export in a process of its own.

That process has seen neither the model nor, where the format is meant to do without, this package, timm or torch.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TIMEOUT_S = 300
"""Seconds that a fresh process may take: torch starts in 5, loads a large model in another 10."""

IMPORTS = {"onnx": ["onnxruntime"], "pt2": ["torch"], "aot": ["torch"], "safetensors": ["timm", "torch"]}
PACKAGE = "mpvg_kernels  # defines the models and operators"
# By format: makes `about`, what the file says of its images and classes, and `logits`, from normalised images
# (B, C, H, W) fp32 to (B, classes), both numpy arrays. FILE, TO and BACK are filled in.
LOAD = {
    "onnx": """\
session = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])


def logits(images):
    return session.run(["logits"], {"images": images})[0]
""",
    "pt2": """\
files = {"preprocessing.json": ""}
with open(FILE, "rb") as file:
    model = torch.export.load(file, extra_files=files).module()
about = json.loads(files["preprocessing.json"])
""",
    "aot": """\
model = torch._inductor.aoti_load_package(FILE)
about = json.loads(model.get_metadata()["preprocessing"])
""",
    "safetensors": """\
model = timm.create_model("local-dir:" + FILE, pretrained=True).eval()
about = model.pretrained_cfg
""",
}
TORCH_LOGITS = """\


def logits(images):
    with torch.no_grad():
        return model(torch.from_numpy(images)TO)BACK.numpy()
"""
LOAD |= {format: code + TORCH_LOGITS for format, code in LOAD.items() if format != "onnx"}

# An image file as (1, C, H, W), as timm's transforms prepare it; those themselves where timm is needed anyway.
PREPARE = """\
def prepare(path):
    channels, *size = about["input_size"]
    image = Image.open(path).convert("L" if channels == 1 else "RGB")
    wanted = [int(side / about["crop_pct"]) for side in size]  # height, width before the crop
    sides = [image.height, image.width]
    if about["crop_mode"] == "center":  # keeps the aspect ratio: the side that is nearer to what is wanted decides
        to, side = max(zip(wanted, sides), key=lambda pair: pair[0] / pair[1])
        round_ = int if wanted[0] == wanted[1] else round
        wanted = [max(least, round_(to * other / side)) for least, other in zip(wanted, sides)]
    image = image.resize(wanted[::-1], Image.Resampling[about["interpolation"].upper()])
    top, left = (round((have - want) / 2) for have, want in zip(wanted, size))
    image = image.crop((left, top, left + size[1], top + size[0]))
    x = np.asarray(image, np.float32).reshape(*size, channels) / 255
    x = (x - np.float32(about["mean"])) / np.float32(about["std"])
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])
"""
TIMM_PREPARE = """\
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))


def prepare(path):
    return transform(Image.open(path).convert("L" if about["input_size"][0] == 1 else "RGB"))[None].numpy()
"""
SHOW = """\
scores = logits(prepare("image.png"))[0]
prob = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
names = about.get("label_names") or range(len(prob))
for i in np.argsort(-prob)[:5]:
    print(f"{100 * prob[i]:5.1f} %  {names[i]}")
"""


class FreshProcessError(Exception):
    """A file does not load, or run, in a fresh process; one sentence."""


def _load(format: str, file: str, device: str) -> str:
    to, back = ("", "") if device == "cpu" else (f'.to("{device}")', ".cpu()")
    load = LOAD[format].replace('"local-dir:" + FILE', json.dumps(f"local-dir:{file}"))
    return load.replace("FILE", json.dumps(file)).replace("TO)", f"{to})").replace("BACK", back)


def _imports(format: str, package: bool) -> str:
    """`package` says whether mpvg_kernels is needed."""
    names = sorted([*IMPORTS[format], "numpy as np", *([PACKAGE] if package else [])])
    return ("" if format == "safetensors" else "import json\n\n") + "".join(f"import {name}\n" for name in names)


def usage(format: str, file: str, device: str = "cpu", package: bool = False) -> str:
    """Python that prints the five likeliest classes of `image.png`; `package` says whether it needs mpvg_kernels."""
    prepare = TIMM_PREPARE if format == "safetensors" else PREPARE
    load = _load(format, file, device)
    return f"{_imports(format, package)}from PIL import Image\n\n{load}\n\n{prepare}\n\n{SHOW}"


def in_fresh_process(
    format: str, path: Path, images: list[np.ndarray], device: str = "cpu", package: bool = False
) -> list[np.ndarray]:
    """The logits of images by a file that a new process loads; importing what it should not need fails there.

    Raises:
        FreshProcessError: it does not load or run, or takes more than TIMEOUT_S seconds.
    """
    without = [] if package else ["mpvg_kernels"] + ([] if format == "safetensors" else ["timm"])
    without += ["torch"] if format == "onnx" else []
    program = f"""\
import sys
sys.modules.update(dict.fromkeys({without}))  # importing these fails
{_imports(format, package)}
{_load(format, str(path), device)}
images = np.load("images.npz")
np.savez("logits.npz", *(logits(images[name]) for name in images.files))
"""
    # The package may be found by the working directory alone, which is another one there.
    own = str(Path(__file__).parents[2])
    paths = os.pathsep.join([own, os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [own])
    env = os.environ | ({"PYTHONPATH": paths} if package else {})
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "images.npz"), *images)
        try:
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise FreshProcessError(f"did not load and run in a fresh process within {TIMEOUT_S} s") from None
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2][:300] or f"exit code {done.returncode}"
            raise FreshProcessError(f"does not load and run in a fresh process ({said})")
        logits = np.load(Path(folder, "logits.npz"))
        return [logits[name] for name in logits.files]
