"""Lets an adapter's kind follow the training: the run's length, each step, checkpoints and the best of them."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_ft.models.kinds import AdapterKind


class FollowKind(Callback):
    """Tells `kind` of the run's steps, and keeps its state in checkpoints. Before those that save, in the list."""

    def __init__(self, kind: AdapterKind) -> None:
        self.kind = kind

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.kind.schedule(int(trainer.estimated_stepping_batches))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.kind.after_step(module.model, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return self.kind.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kind.load_state_dict(state_dict)


class BestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that passes over steps whose weights are not what the kind promises."""

    def __init__(self, kind: AdapterKind, **settings: Any) -> None:
        super().__init__(**settings)
        self._kind = kind

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self._kind.may_be_published(trainer.global_step):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
