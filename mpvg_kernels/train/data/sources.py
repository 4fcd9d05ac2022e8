"""Finds the data set that a config names, by timm's readers, and says what is wrong with it."""

import dataclasses
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import timm
from timm.data import create_dataset, resolve_data_config

from .. import InputError, near_matches
from ..config import Config

TORCH = "cifar10 cifar100 mnist kmnist fashion_mnist qmnist imagenet places365 inaturalist".split()
DATASETS = (
    "digits",
    "folder",
    *(f"torch/{name}" for name in TORCH),
    "hfds/NAME",
    "hfids/NAME",
    "tfds/NAME",
    "wds/NAME",
)
STREAMS = ("hfids", "tfds", "wds")
# What a prefix needs: the module, and what installs it.
PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}
SPLITS = {"train": ["train", "training"], "validation": ["validation", "val", "valid", "eval", "evaluation", "test"]}
EXTENSIONS = ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm".split()


@dataclasses.dataclass
class Splits:
    """timm's or torchvision's data sets of both parts, and the classes that they agree on."""

    train: Any
    test: Any
    num_classes: int
    class_names: list[str] | None


@dataclasses.dataclass
class Split:
    """timm's or torchvision's data set of one part."""

    images: Any
    num_classes: int
    class_names: list[str] | None


def prefix(name: str) -> str:
    """`wds` for `wds/imagenet`; `folder` for `folder`."""
    return name.partition("/")[0].lower()


def open_splits(config: Config, main: bool, **stream_options: Any) -> Splits:
    """Open both parts of the data set.

    Args:
        main: whether this process is the one that warns.
        stream_options: for timm's create_dataset of the training part of a stream.

    Raises:
        InputError: it is not there, or not as the config says.
    """
    data = config.data
    kind = prefix(data.name)
    _check_name(data.name, kind)
    _check_root(config, kind)
    if kind == "folder":
        return _folders(config, main)
    train = _create(config, "train_split", **stream_options)
    test = _create(config, "val_split")
    names = _class_names(train)
    if names is None and data.num_classes is None:
        raise InputError(
            f"config field data.num_classes is None, expected a number, as {data.name} does not name its classes"
        )
    if names is not None:
        _check_count(config, len(names), f"classes of {data.name}")
    return Splits(train, test, len(names) if names is not None else data.num_classes, names)


def open_split(config: Config, field: str | None, name: str, class_names: list[str] | None = None) -> Split:
    """Open one part of the data set alone.

    Args:
        field: the config field of section data that names it, or None:
        name: the name that it has in the data set.
        class_names: the classes in the order of their labels; a folder may lack some of them.

    Raises:
        InputError: it is not there, not as the config says, or of other classes.
    """
    data = config.data
    kind = prefix(data.name)
    _check_name(data.name, kind)
    _check_root(config, kind)
    told = None
    if field is None:
        told = f"--split is {name!r}"
        if kind == "torch" and name not in sum(SPLITS.values(), []):  # which torchvision would take for validation
            raise InputError(f"{told}, expected train or validation for {data.name}")
        field, config = "val_split", dataclasses.replace(config, data=dataclasses.replace(data, val_split=name))
    if kind == "folder":
        return open_folder(_find_split(config, field, told), class_names)
    images = _create(config, field)
    found = _class_names(images)
    if found is None and class_names is None and data.num_classes is None:
        raise InputError(
            f"config field data.num_classes is None, expected a number, as {data.name} does not name its classes"
        )
    if found is not None and class_names is not None and found != class_names:
        said = _some([each for each in found if each not in class_names] or ["the same in another order"])
        raise InputError(f"{data.name} has other classes than the run: {len(found)}, not {len(class_names)} ({said})")
    names = found or class_names
    return Split(images, len(names) if names is not None else data.num_classes, names)


def open_folder(path: Path, class_names: list[str] | None = None) -> Split:
    """Open a folder, or a tar file, with a folder of images for each class.

    Args:
        class_names: the classes in the order of their labels, of which the folder may lack some; None takes those that
            it has.

    Raises:
        InputError: it is not there, has no images, or classes that are not in `class_names`.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist, expected a folder with a folder of images for each class")
    inside = {entry.name for entry in os.scandir(path) if entry.is_dir()} if path.is_dir() else set()
    if all(inside & set(names) for names in SPLITS.values()) and not inside & set(class_names or ()):
        # Classes deeper down are found, so that all splits would be taken for one.
        raise InputError(f"{path} has the splits {_some(sorted(inside))} in it, expected one of them")
    images = _read_folder(path)
    found = _class_names(images)
    if class_names is None or found == class_names:
        return Split(images, len(found), found)
    if unknown := [name for name in found if name not in class_names]:
        close = near_matches(unknown[0], class_names) if len(unknown) == 1 else ""
        raise InputError(
            f"{path} has class folders that the run does not know: {_some(unknown)}; its {len(class_names)} classes "
            f"are {_some(class_names)}{close}"
        )
    images = _read_folder(path, {name: label for label, name in enumerate(class_names)})
    return Split(images, len(class_names), class_names)


def _check_name(name: str, kind: str) -> None:
    rest = name.partition("/")[2]
    if kind == "torch":
        known = rest.lower() in TORCH
    else:
        known = name == "folder" or (kind in PACKAGES and bool(rest))
    if not known:
        close = near_matches(name, DATASETS)
        raise InputError(f"config field data.name is {name!r}, expected one of {', '.join(DATASETS)}{close}")
    if kind in PACKAGES and importlib.util.find_spec(PACKAGES[kind][0]) is None:
        module, install = PACKAGES[kind]
        raise InputError(f"config field data.name is {name!r}, which needs {module}: pip install {install}")


def _check_root(config: Config, kind: str) -> None:
    root = config.data.root
    if root is None:
        if kind in ("folder", "torch", "wds"):
            raise InputError(
                f"config field data.root is None, expected the place where {config.data.name}'s images are"
            )
        return
    elsewhere = kind == "wds" and (":" in root)  # a URL, or a command
    made = kind != "folder" and config.data.download or kind in ("hfds", "hfids")
    if not elsewhere and not made and not os.path.exists(root):
        raise InputError(f"config field data.root is {root!r}, where there is no folder or file")


def _create(config: Config, field: str, **options: Any) -> Any:
    data = config.data
    # Images as they are stored, to be converted here; TensorFlow has no such mode.
    mode = "" if prefix(data.name) != "tfds" else "L" if data.mean is not None and len(data.mean) == 1 else "RGB"
    split = getattr(data, field)
    options |= {"split": split, "download": data.download, "input_img_mode": mode}
    try:
        return create_dataset(data.name, data.root, **options)
    except Exception as error:  # whatever the readers' libraries raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{data.name} with data.root {data.root!r} and data.{field} {split!r}: {reason}") from error


def _class_names(dataset: Any) -> list[str] | None:
    """The classes' names in the order of their labels; None where the data set does not say."""
    for source in (dataset, getattr(dataset, "reader", None)):
        if getattr(source, "classes", None):
            return [name if isinstance(name, str) else ", ".join(name) for name in source.classes]
        for attribute in ("class_to_idx", "class_name_to_idx"):
            if labels := getattr(source, attribute, None):
                return sorted(labels, key=labels.get)
    return None


def _check_count(config: Config, found: int, what: str) -> None:
    if config.data.num_classes not in (None, found):
        raise InputError(f"config field data.num_classes is {config.data.num_classes}, expected {found}, the {what}")


def _folders(config: Config, main: bool) -> Splits:
    """Folders or tar files of the two splits, with the same classes."""
    paths = {field: _find_split(config, field) for field in ("train_split", "val_split")}
    train, test = (_read_folder(path) for path in paths.values())
    names, others = _class_names(train), _class_names(test)
    empty = {
        field: _empty_folders(path, set(found))
        for (field, path), found in zip(paths.items(), (names, others), strict=True)
    }
    for field, folders in empty.items():
        if folders and main:
            warnings.warn(f"{paths[field]} has class folders without images: {_some(folders)}", stacklevel=2)
    only_train = [name for name in names if name not in others and name not in empty["val_split"]]
    only_test = [name for name in others if name not in names]
    if only_train or only_test:
        told = [f"only in {paths['train_split']}: {_some(only_train)}"] * bool(only_train)
        told += [f"only in {paths['val_split']}: {_some(only_test)}"] * bool(only_test)
        raise InputError(f"the class folders differ, expected the same in both splits: {'; '.join(told)}")
    _check_count(config, len(names), f"class folders in {paths['train_split']}")
    if len(others) < len(names):  # the labels are the training split's
        test = _read_folder(paths["val_split"], {name: label for label, name in enumerate(names)})
    return Splits(train, test, len(names), names)


def _find_split(config: Config, field: str, told: str | None = None) -> Path:
    """Where a split's images are; `told` begins the error, by default with the config field."""
    root, split = Path(config.data.root), getattr(config.data, field)
    if not root.is_dir():
        raise InputError(
            f"config field data.root is {str(root)!r}, expected a folder with one folder or tar file a split"
        )
    names = next((names for names in SPLITS.values() if split == names[0]), [split])
    for name in names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    raise InputError(
        f"{told or f'config field data.{field} is {split!r}'}, but data.root {str(root)!r} has no folder or tar file "
        f"{' or '.join(names)}; expected one with a folder of images for each class"
    )


def _read_folder(path: Path, class_map: dict[str, int] | None = None) -> Any:
    options = {"input_key": ";".join(EXTENSIONS)} if path.is_dir() else {}
    try:
        dataset = create_dataset("", str(path), search_split=False, class_map=class_map, **options)
    except PermissionError as error:
        raise InputError(f"{path} can't be read: {error}") from None
    except Exception as error:  # timm says that there are no images in several ways, and tarfile what is broken in more
        if path.is_dir() or isinstance(error, ValueError):
            raise InputError(f"{path} has no images ({' '.join(EXTENSIONS)}) in folders, one a class") from error
        raise InputError(f"{path} can't be read as a tar file: {error}") from error
    if class_map is None and "" in _class_names(dataset):
        raise InputError(f"{path} has images outside of class folders, expected a folder of images for each class")
    return dataset


def _empty_folders(path: Path, names: set[str]) -> list[str]:
    """Folders in `path` that are no class, nor hold one deeper down."""
    if not path.is_dir():
        return []
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    return [
        name
        for name in folders
        if name not in names and not any(folder in names for _, inner, _ in os.walk(path / name) for folder in inner)
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")


def preprocessing(config: Config) -> dict[str, Any]:
    """How images are made ready for the model, in timm's pretrained_cfg keys: the config's, else the model's own.

    Raises:
        InputError: mean and std are not for one or three channels.
    """
    data, model = config.data, timm.models.get_pretrained_cfg(config.model.name)
    own = resolve_data_config(pretrained_cfg=model.to_dict() if model is not None else {"input_size": (3, 224, 224)})
    channels = len(data.mean) if data.mean is not None else own["input_size"][0]
    if channels not in (1, 3):
        raise InputError(f"config field data.mean is {data.mean}, expected one or three numbers, one for each channel")
    found = {
        "input_size": (channels, *(data.img_size or own["input_size"][1:])),
        "mean": data.mean or own["mean"],
        "std": data.std or own["std"],
        "crop_pct": data.crop_pct or own["crop_pct"],
        "interpolation": data.interpolation,
        "crop_mode": own["crop_mode"],
    }
    for key in ("mean", "std"):
        if len(found[key]) != channels:
            raise InputError(
                f"config field data.{key} is {getattr(data, key)}, expected {channels} numbers, one for each channel"
            )
    return found
