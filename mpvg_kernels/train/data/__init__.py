"""The images: order and augmentation are functions of the run's seed, the epoch and the position in it.

No global random stream matters, nor the number of worker processes; another number of training processes sees the same
updates. order: who takes which image when; images: data sets with an image at every index, and how they are decoded;
streams: data sets without; digits: the small one in memory; sources: finding what the config names; batches: what is
done to a whole batch (mixup, CutMix, random erasing); evaluation: one split alone, to be looked at.
"""

import torch

from .. import InputError
from ..config import Config
from ..distributed import World
from .base import Batch, Data
from .batches import BatchAugmentation
from .digits import Digits, affine_matrices
from .evaluation import EvalImages, ImageBatch, open_images
from .order import EpochOrder, key_seed, keyed_generator, seed_everything
from .sources import DATASETS, STREAMS, prefix

__all__ = [
    "DATASETS",
    "Batch",
    "BatchAugmentation",
    "Data",
    "Digits",
    "EpochOrder",
    "EvalImages",
    "ImageBatch",
    "affine_matrices",
    "create_data",
    "key_seed",
    "keyed_generator",
    "open_images",
    "seed_everything",
]


def create_data(config: Config, device: torch.device, world: World = World()) -> Data:  # noqa: B008
    """The data set that the config names, this process's part of it.

    Raises:
        InputError: there is none of that name, it is not as the config says, or the batch can't be divided.
    """
    if config.data.name == "digits":
        data = Digits(config, device, world)
    elif prefix(config.data.name) in STREAMS:
        from .streams import StreamData

        data = StreamData(config, device, world)
    else:
        from .images import ImageData

        data = ImageData(config, device, world)
    if (config.aug.mixup or config.aug.cutmix) and data.order.micro_batch % 2:
        raise InputError(
            f"a micro-batch has {data.order.micro_batch} images, expected an even number for aug.mixup and aug.cutmix: "
            "choose another batch or dist.micro_batch"
        )
    return data
