"""The processes of one run: which of them this is, what they agree on, and who speaks.

Everything here is a no-op in a run of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from lit_ft.errors import UserError

T = TypeVar("T")

# How long a process waits for the others in one exchange. Losing a process is noticed much sooner, by whoever started
# them; this bounds what nobody notices.
PATIENCE = timedelta(minutes=30)
# Above are the batch file's own step, the interactive one and the like.
_SLURM_SPECIAL_STEPS = 0xFFFFFFF0
# By these launchers tell a process which of several it is.
_MARKS = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks(NamedTuple):
    """Where this process stands.

    Attributes:
        rank, size: among all processes of the run.
        local_rank, local_size: among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def started_by_others() -> bool:
    """Whether torchrun, Slurm or our own launcher started this process as one of several."""
    if "LOCAL_RANK" in os.environ:
        return True
    # In a batch file itself Slurm counts tasks, too, but only srun starts them, as a step with a number.
    step = os.environ.get("SLURM_STEP_ID", "")
    in_step = step.isdigit() and int(step) < _SLURM_SPECIAL_STEPS
    return in_step and int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))) > 1


def rank() -> int:
    """This process's number, known before the processes have met, from what started them."""
    if not started_by_others():
        return 0
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ["LOCAL_RANK"])


def join(device_type: str, devices: int, nodes: int, *, alone: bool = False) -> Ranks:
    """Meet the other processes of the run.

    Args:
        device_type: `cpu` (they talk through gloo) or `cuda` (NCCL, with gloo for what lies in main memory).
        devices: processes on each machine.
        nodes: machines.
        alone: make a group of one where there are no others (sharding wants a group).

    Raises:
        UserError: another number of processes was started than the settings speak of.
    """
    import torch.distributed as dist

    # Both, so that small things (random states, counts, offloaded weights) need no GPU memory to travel.
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if not started_by_others():
        if alone and not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Ranks()
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    kinds = (TorchElasticEnvironment, SLURMEnvironment)  # torchrun may run inside a Slurm job
    cluster: Any = next((kind() for kind in kinds if kind.detect()), None)
    if cluster is None:  # started by hand, with LOCAL_RANK and NODE_RANK
        cluster = LightningEnvironment()
        cluster.set_world_size(devices * nodes)
        cluster.set_global_rank(cluster.node_rank() * devices + cluster.local_rank())
    where = Ranks(cluster.global_rank(), cluster.world_size(), cluster.local_rank(), devices)
    if where.size != devices * nodes:
        raise UserError(
            f"{where.size} processes were started, but trainer.devices={devices} on trainer.num_nodes={nodes} make "
            f"{devices * nodes}. Start as many as that, or set trainer.devices to the processes of one machine."
        )
    if (where.size > 1 or alone) and not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", cluster.main_address)
        os.environ.setdefault("MASTER_PORT", str(cluster.main_port))
        dist.init_process_group(backend, rank=where.rank, world_size=where.size, timeout=PATIENCE)
    return where


@contextmanager
def marks_removed() -> Iterator[None]:
    """Take away afterwards what marks this process as one of several where nobody had marked it.

    Lightning sets these variables even for a single process with a strategy for several, and the next run in this
    process (a sweep's) would take itself for one that a launcher started, and wait for the others.
    """
    before = {name: os.environ.get(name) for name in _MARKS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def leave() -> None:
    """Part from the other processes; without it they would wait for this one, or complain."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes have met."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def group_with_patience(patience: timedelta) -> Any:
    """All processes once more, for exchanges in which one may have others wait longer than `PATIENCE`; None if alone.

    Every process calls this.
    """
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=patience) if size() > 1 else None


def agree(decide: Callable[[], T], group: Any = None) -> T:
    """What `decide` returns in the first process, in all of them (of `group`); its UserError is raised in all.

    For whatever depends on the moment: a measurement, the newest file in a folder, a fresh name.
    """
    import torch.distributed as dist

    if size() == 1:
        return decide()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = decide()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, 0, group=group)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def together(act: Callable[[], T]) -> T:
    """What `act` returns in this process, once it has in all; a UserError of any process is raised in all.

    For work of which each process has a share: who fails does not leave the others waiting for it.
    """
    found: Any = None
    mistake: str | None = None
    try:
        found = act()
    except UserError as error:
        if size() == 1:
            raise
        mistake = str(error)
    if (first := next((one for one in gathered(mistake) if one is not None), None)) is not None:
        raise UserError(first)
    return found  # type: ignore[no-any-return]


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process goes through the block before the others: it fills a cache that they then read."""
    import torch.distributed as dist

    if size() == 1:
        yield
        return
    if dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.get_rank() == 0:
            dist.barrier()


def gathered(value: T, group: Any = None) -> list[T]:
    """`value` of every process (of `group`), in the order of their ranks."""
    import torch.distributed as dist

    if size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def greatest(number: int) -> int:
    """The greatest `number` that any process has."""
    import torch
    import torch.distributed as dist

    if size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def as_in_the_first(tensors: Iterable[Any]) -> None:
    """Overwrite `tensors` by those of the first process: what was drawn at random is then the same everywhere."""
    import torch.distributed as dist

    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def lost_another(error: BaseException) -> bool:
    """Whether `error` is only that another process of the run has gone."""
    import torch.distributed as dist

    if size() == 1:
        return False
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, dist.DistNetworkError) or any(words in str(error) for words in gone)
