"""Full fine-tuning: every weight is trained, and a whole model published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_ft.errors import UserError
from lit_ft.models.kinds.base import AdapterKind, kind_in
from lit_ft.models.load import check_not_quantized


class Full(AdapterKind):
    """Trains all weights, in float32."""

    whole_model = True

    def begin(self, model: Any) -> Any:
        check_not_quantized(model)
        return train_all(model)

    def why_not_from(self, folder: Path) -> str:
        if kind_in(folder) == "full":
            return f"is a whole model: go on from it with model.id={folder} start_from=none."
        return (
            "is an adapter, and peft=full trains a whole model. Merge it into its base first: python -m lit_ft.export "
            f"adapter={folder} to=merged output=FOLDER, then train with model.id=FOLDER start_from=none."
        )

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        raise UserError(f"{ref} {self.why_not_from(folder)}")


def train_all(model: Any) -> Any:
    """Every weight trained, in float32."""
    model = model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
