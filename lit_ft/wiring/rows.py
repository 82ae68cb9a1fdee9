"""The rows of a run: those that its settings name, or the votes of a preference store, with held-out ones."""

from __future__ import annotations

from lit_ft.adapter import Base
from lit_ft.checkpoint import Resumed
from lit_ft.config import Algorithm, Config
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import Mix, Prepared, load_examples
from lit_ft.data.formats import Kind
from lit_ft.data.votes import Votes, read_votes
from lit_ft.progress import say
from lit_ft.wiring.settings import mapping

# What rows are to give, by what is trained on them.
_ROWS: dict[Algorithm, Kind] = {
    Algorithm.sft: "sft",
    Algorithm.dpo: "preference",
    Algorithm.reward: "ranked",
    Algorithm.ppo: "prompt",
    Algorithm.grpo: "prompt",
}


def votes_of(cfg: Config, base: Base, resumed: Resumed | None) -> Votes:
    """The votes to train on; for a resumed run those that there were when it began.

    Raises:
        UserError: there is no such store, or too few of its votes are decisive.
    """
    until = resumed.identity.get("votes.until") if resumed else None
    votes = read_votes(
        cfg.data.path,
        base,
        min_votes=cfg.data.min_votes,  # type: ignore[attr-defined]
        val_split=0 if cfg.data.val_path is not None or cfg.data.max_val_rows == 0 else cfg.data.val_split,
        until=int(until) if until else None,
        any_weights=cfg.model.tiny,
    )
    say(f"votes      {votes.summary}")
    return votes


def read_rows(cfg: Config, encoder: ChatEncoder, votes: Votes | None) -> tuple[Prepared, Prepared | None]:
    """The training rows and the held-out ones, if there are any.

    Raises:
        UserError: they cannot be read, or too many of them cannot be used.
    """
    kind = _ROWS[cfg.algorithm.kind]
    return load_examples(
        votes.train if votes else cfg.data.path,
        encoder,
        kind,
        val_path=votes.held_out if votes and votes.held_out else cfg.data.val_path,
        val_split=0 if votes else cfg.data.val_split,  # votes come split, by prompt
        split=cfg.data.split,
        held_out_split=cfg.data.held_out_split,
        mix=[Mix(part.path, part.weight, part.split) for part in cfg.data.mix],
        max_val_rows=cfg.data.max_val_rows,
        max_rows=cfg.data.max_rows,
        seed=cfg.seed,
        max_length=cfg.data.max_length,
        columns=mapping("data.columns", cfg.data.columns),
        overflow=cfg.data.overflow.value,
        max_dropped=cfg.data.max_dropped,
        room=getattr(cfg.algorithm, "max_new_tokens", 0),
    )
