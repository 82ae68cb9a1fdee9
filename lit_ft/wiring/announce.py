"""What a run says of itself: its first lines, its metrics; and what its libraries say that nobody needs."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from lit_ft.adapter import Adapter
from lit_ft.config import Config, Strategy
from lit_ft.data.chat import show
from lit_ft.data.datamodule import Prepared
from lit_ft.distributed.processes import Ranks
from lit_ft.models import adapt
from lit_ft.models.shard import bytes_held
from lit_ft.progress import say
from lit_ft.wiring.place import Place


def quiet() -> None:
    """Leave out messages that the reader can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # That gathering over two dimensions of devices takes two exchanges.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    ours = (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*You are using `torch.load` with `weights_only=False`.*",
        r".*no CUDA.*",
        r".*It is recommended to use `self\.log\(.*sync_dist=True.*",  # metrics are reduced before they are logged
        r".*Using ModelCheckpoint with manual optimization.*",
        r".*Total length of `list` across ranks is zero.*",
        r".*GPU available but not used.*",
        r".*`broadcast_buffers` is deprecated.*",  # its successor came with PyTorch 2.13
    )
    for message in ours:
        warnings.filterwarnings("ignore", message=message)


def first_lines(
    cfg: Config,
    model: Any,
    start: Adapter | None,
    place: Place,
    rows: str,
    data: Prepared,
    val: Prepared | None,
    tokenizer: Any,
) -> None:
    """What the run is about to do, so that a mistake shows before it costs anything."""
    trained, total = adapt.parameter_counts(model)
    rank = adapt.lora_rank(model)
    kind = cfg.peft.kind.value + (f", r={rank}" if rank else "")
    if start is not None and rank is not None and rank != getattr(cfg.peft, "r", rank):
        kind += f" as {start.ref} has it"
    say(f"model      {cfg.model.id}: {total:,} parameters, {trained:,} trained ({trained / total:.2%}; {kind})")
    say(f"start      {f'adapter {start.ref} ({start.card.algorithm})' if start else 'the base model'}")
    if (factor := cfg.peft.learning_rate_factor) != 1:
        rate = cfg.algorithm.learning_rate
        kind_name = cfg.peft.kind.value
        say(f"rate       {rate * factor:g}: {factor:g} times algorithm.learning_rate={rate:g}, for peft={kind_name}")
    say(f"arithmetic {place.precision.trainer} ({place.precision.why})")
    say(f"threads    {place.threads.count} ({place.threads.why})")
    say(f"rows       {rows}, up to {place.max_tokens:,} tokens a pass")
    say(f"training   {cfg.data.path}: {data.summary()}")
    say(f"held out   {val.summary() if val else 'nothing'}")
    example = data.examples[0]
    if not example.completions:
        say("example    a prompt:")
    elif len(example.completions) > 1:
        say("example    the trained parts between ⟦ ⟧, the preferred one first:")
    else:
        say("example    the trained part between ⟦ ⟧:")
    say("  | " + show(tokenizer, example).replace("\n", "\n  | "))


def devices_line(cfg: Config, model: Any, ranks: Ranks) -> str:
    """How many processes there are, how they share the work, and what each holds of the weights."""
    held, whole = bytes_held(model)
    kind = "ddp" if cfg.strategy.kind is Strategy.auto else cfg.strategy.kind.value
    return (
        f"devices    {ranks.size} processes, {kind}: each holds {held / 1e6:,.1f} of {whole / 1e6:,.1f} MB of weights"
    )
