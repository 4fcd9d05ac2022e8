"""Which images an update takes, and the random numbers that belong to them: functions of keys, never of what ran
before.

A key is a tuple of numbers and words, for example (seed, "order", epoch). Two integers, the epoch and the step in it,
are the whole state of the data: nothing is replayed to enter a run in the middle.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from .. import InputError
from ..config import Config
from ..distributed import World


def key_seed(*key: int | str) -> int:
    """A seed of 63 bits that depends on the whole key alone; close keys give unrelated seeds."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A random generator of torch for the key."""
    return torch.Generator().manual_seed(key_seed(*key))


def seed_cpu(*key: int | str) -> None:
    """Set the global streams of Python, numpy (its legacy one, of which timm draws) and torch on the CPU."""
    seed = key_seed(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed: where CUDA is not in use that appends to a list at every call.
    torch.default_generator.manual_seed(seed)


def seed_everything(*key: int | str) -> None:
    """Set the global streams of Python, numpy, torch and, where it is in use, CUDA."""
    seed_cpu(*key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(key_seed(*key))


@contextlib.contextmanager
def streams_put_back():
    """Behind it the CPU's global streams are as they were before."""
    state = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.default_generator.set_state(state[2])


def accumulation(config: Config, world: World) -> int:
    """Equal micro-batches of a process's share of a batch: as few as keep to dist.micro_batch.

    Raises:
        InputError: the batch, or a process's share of it, can't be divided so.
    """
    share, rest = divmod(config.batch, world.size)
    if rest:
        near = " or ".join(str(size) for size in (share * world.size, (share + 1) * world.size) if size)
        raise InputError(
            f"config field batch is {config.batch}, expected a multiple of the {world.size} processes, "
            f"for example {near}"
        )
    most = min(config.dist.micro_batch or share, share)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    size = max(size for size in sizes if size <= most)
    if 2 * size < most:
        above = min(s for s in sizes if s > most)
        raise InputError(
            f"config field dist.micro_batch is {config.dist.micro_batch}, expected {size} or {above}, into which the "
            f"{share} images of a batch on each process can be divided equally; or choose another batch"
        )
    return share // size


class EpochOrder:
    """The order of the training images in each epoch, and who takes which of them.

    An epoch's list is a permutation of the images, each repeated `repeats` times in a row, cut to whole batches of the
    number of images there are. Step s takes the positions [s*batch, (s+1)*batch) of the list, and process r every
    world.size-th of these, beginning with its rank: so another number of processes sees the same updates, and the
    repeats of an image go to different processes (repeated augmentation, Hoffer et al. 2020, as DeiT has it).

    With `epoch_updates` an epoch has that many updates, and the passes over the images follow one another: the lists,
    one behind the other, are cut into epochs of that length.

    Attributes:
        steps: updates of an epoch.
        micro_batch: images of a micro-batch.

    Raises:
        InputError: there are fewer images than a batch.
    """

    def __init__(
        self,
        n: int,
        batch: int,
        seed: int,
        repeats: int,
        world: World,
        accumulation: int,
        epoch_updates: int | None = None,
    ):
        self.n, self.batch, self.seed, self.repeats = n, batch, seed, repeats
        self.world, self.accumulation = world, accumulation
        self.whole, self.micro_batch = n // batch * batch, batch // world.size // accumulation
        if not self.whole:
            raise InputError(f"config field batch is {batch}, expected at most the {n} training images")
        self.steps = epoch_updates or n // batch

    def images(self, epoch: int) -> np.ndarray:
        """The image at each position of an epoch's list: (steps * batch,) int64."""
        count = self.steps * self.batch
        done, begin = divmod((epoch - 1) * count, self.whole)
        passes = range(done + 1, done + 1 - (-(begin + count) // self.whole))
        return np.concatenate([self._pass(number) for number in passes])[begin : begin + count]

    def _pass(self, number: int) -> np.ndarray:
        """The images of a pass, from 1: (whole,) int64."""
        seed = key_seed(self.seed, "order", number)
        # numpy promises that this legacy generator's numbers stay the same in all its versions.
        order = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).permutation(self.n)
        return np.repeat(order[: -(-self.whole // self.repeats)], self.repeats)[: self.whole]

    def positions(self, step: int) -> np.ndarray:
        """The positions of this process's part of an update: (batch / world.size,) int64."""
        return np.arange(step * self.batch, (step + 1) * self.batch)[self.world.rank :: self.world.size]

    def micro_batches(self, start: int = 0) -> Iterator[np.ndarray]:
        """The positions of this process's micro-batches from update `start` to the epoch's end."""
        for step in range(start, self.steps):
            yield from np.split(self.positions(step), self.accumulation)


def held_out(n: int, micro_batch: int, world: World, most: int | None = None) -> Iterator[np.ndarray]:
    """This process's part of n held-out images in batches of as many and as large ones on every process; -1 pads.

    Of more than `most` images that many are taken, evenly over the whole list, in which classes often lie together.
    """
    count = min(n, most or n)
    mine = np.arange(count)[world.rank :: world.size] * n // count
    mine = np.pad(mine, (0, -(-count // world.size) - len(mine)), constant_values=-1)
    for start in range(0, len(mine), micro_batch):
        yield mine[start : start + micro_batch]
