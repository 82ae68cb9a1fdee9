"""Full fine-tuning: every weight is trained, and a whole model published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_ft.errors import UserError
from lit_ft.models.kinds.base import AdapterKind
from lit_ft.models.load import check_not_quantized


class Full(AdapterKind):
    """Trains all weights, in float32."""

    whole_model = True

    def begin(self, model: Any) -> Any:
        check_not_quantized(model)
        return train_all(model)

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        raise UserError(
            f"peft=full cannot go on from {ref}. A whole model is gone on from by giving its folder as the base: "
            f"model.id={folder} start_from=none. An adapter can be merged into its base first: "
            f"python -m lit_ft.export adapter={folder} to=merged output=FOLDER, then model.id=FOLDER."
        )


def train_all(model: Any) -> Any:
    """Every weight trained, in float32."""
    model = model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
