"""Many processes: where this one stands among them, and what they do together.

Started by torchrun, or by srun with a task for each device; nothing has to be set by hand. Everything here also works
in a single process, where it does nothing.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .. import backends
from ..models.dense import DenseModel
from . import InputError, TrainingError
from .config import Config

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process on its machine, which is the number of its GPU."""


def first_host(nodes: str) -> str:
    """The first machine of Slurm's list of nodes: `gpu[007-009,12],login` is gpu007 first."""
    name, bracket, rest = nodes.partition("[") if "[" in nodes.split(",")[0] else (nodes.split(",")[0], "", "")
    return name + re.match(r"\d+", rest)[0] if bracket else name


def find_world() -> World:
    """What torchrun or srun say of this process; alone where neither started it.

    Slurm's variables are turned into those that torch.distributed reads.

    Raises:
        InputError: the launcher's variables are no numbers.
    """
    env = os.environ
    try:
        if "RANK" in env and "WORLD_SIZE" in env:  # torchrun, also inside a Slurm job
            return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
        # The batch script itself has SLURM_PROCID too: only a step of srun has tasks of its own.
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            world = World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
            env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
            env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
            return world
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"the variables that torchrun or srun set can't be read ({error}): start `mpvg train` by one of them, or "
            "unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS"
        ) from None
    return World()


def pick_device(name: str, world: World = World()) -> torch.device:  # noqa: B008, it is frozen
    """The torch device that a config's `device` means, for this process."""
    try:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            count = torch.cuda.device_count()
            if world.local_rank >= count:
                raise InputError(
                    f"process {world.local_rank} of this machine has no GPU: there are {count}; start at most as many "
                    "processes as a machine has GPUs, or use --device cpu"
                )
            name = f"cuda:{world.local_rank}"
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise InputError(f"config field device is {name!r}: {str(error).splitlines()[0].rstrip('.')}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_backend(device: torch.device | str, compiled: bool = False) -> str:
    """The kernels' backend on a device, in eager or in compiled code.

    Raises:
        InputError: MPVG_BACKEND names one that there is not, or that can't run there.
    """
    try:
        return backends.resolve(torch.device(device).type, compiled)
    except (ValueError, backends.BackendUnavailableError) as error:
        raise InputError(str(error)) from None


@contextlib.contextmanager
def process_group(world: World, device: torch.device, config: Config) -> Iterator[None]:
    """The processes' connection, open inside; closed without waiting for the others where an error leaves.

    Raises:
        InputError: the backend does not fit the device, or the others were not reached.
    """
    if world.size == 1:
        yield
        return
    backend = config.dist.backend
    if backend == "nccl" and device.type != "cuda":
        raise InputError(f"config field dist.backend is 'nccl', which needs a GPU, and the device is {device.type}")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",  # what is agreed on goes between CPUs
            rank=world.rank,
            world_size=world.size,
            timeout=datetime.timedelta(minutes=config.dist.timeout),
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"the {world.size} processes did not find each other at MASTER_ADDR={os.environ.get('MASTER_ADDR')}, "
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} ({reason})"
        ) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def together(world: World, run: Callable[[], Result], *, main_only: bool = False) -> Result | None:
    """`run()` on every process (or the first alone); where it fails on one, all raise that one's error.

    Without this the others would wait for it for ever.

    Raises:
        InputError, TrainingError: whichever the first process that failed did raise.
    """
    if world.size == 1:
        return run()
    result, failed = None, None
    if world.rank == 0 or not main_only:
        try:
            result = run()
        except (InputError, TrainingError) as error:
            failed = error
    errors = [error for error in gather(failed, world) if error is not None]
    if errors:
        errors[0].shared = True  # the first process says it for all
        raise errors[0]
    return result


def gather(value: Any, world: World) -> list[Any]:
    """Every process's `value`, in the order of their ranks."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any, world: World) -> Any:
    """The first process's `value`, on every process."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def add_up(tensor: Tensor, world: World) -> Tensor:
    """The sum of every process's `tensor`."""
    if world.size > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


class Agreement:
    """Whether any process has been told to stop, asked at every update and costing none of them a wait.

    Each question starts a sum of one number between the CPUs, and answers with the one that was started before it: all
    processes learn of a signal at the same update, one after it came. Every process has to ask equally often.
    """

    def __init__(self, world: World):
        self._alone = world.size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, told: bool) -> bool:
        if self._alone:
            return told
        agreed = False
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            agreed = bool(value)
        value = torch.tensor(int(told))
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value
        return agreed


def shard(model: nn.Module) -> None:
    """FSDP2: each block's weights, then the rest, shared out between all processes, in place."""
    # Said of every module that returns a view, as whoever changes that in place would lose gradients; nobody here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                # One that only holds others is never called, and its weights would stay shared out.
                if type(block).forward is not nn.Module.forward and any(True for _ in block.parameters()):
                    fully_shard(block)
    if isinstance(model, DenseModel):
        fully_shard(model.trunk)  # which is called alone too, to look at its norms
        register_fsdp_forward_method(model.trunk, "forward_intermediates")
    fully_shard(model)


def replicate(model: nn.Module, device: torch.device, deterministic: bool) -> nn.Module:
    """DDP around `model`, whose parameters become the first process's."""
    if not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Otherwise DDP puts the gradients into new buckets after a run's first update, and with three processes or more
        # a sum's order hangs on its place in a bucket: a resumed run would differ in the last bit.
        find_unused_parameters=deterministic or device.type == "cpu",
    )


@contextlib.contextmanager
def gradients_stay(model: nn.Module, stay: bool) -> Iterator[None]:
    """Inside, where `stay`, backward leaves each process its own gradients: more micro-batches follow."""
    if stay and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(not stay)
        yield
    else:
        yield


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Give every process the first one's buffers (batch norms' running statistics, which differ between them)."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def whole(tensor: Any) -> Any:
    """A tensor that FSDP2 has shared out, in one piece (every process has to ask); anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, every tensor in one piece."""
    return {name: whole(value.detach()) for name, value in model.state_dict().items()}


def load_whole_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `whole_state` gave into a model that may be shared out otherwise."""
    own = model.state_dict()
    model.load_state_dict({name: _like(value, own[name]) if name in own else value for name, value in state.items()})


def _like(value: Tensor, own: Any) -> Tensor:
    if isinstance(own, DTensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """What the optimizer remembers: of each parameter, by its name and in one piece, and of each group.

    (timm's LAMB, for one, counts its steps in the group.)
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "parameters": {
            names[parameter]: {key: whole(value) for key, value in optimizer.state[parameter].items()}
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in optimizer.state
        },
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` gave into an optimizer of the same groups, with any number of processes."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if name in state["parameters"]:
            optimizer.state[parameter] = {
                key: _like(value.to(parameter.device, copy=True), parameter)
                if isinstance(value, Tensor) and value.shape == parameter.shape
                # A counter of steps stays on the CPU, unless a kernel on the device reads it.
                else value.to(parameter.device if value.ndim or on_device else "cpu", copy=True)
                if isinstance(value, Tensor)
                else value
                for key, value in state["parameters"][name].items()
            }
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(saved)
