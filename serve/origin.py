"""What an adapter remembers of the place of its base model, and whether that was a folder rather than a Hub id."""

from __future__ import annotations

from pathlib import Path

from lit_ft.adapter import Adapter

BUNDLED = "bundled"


def trained_on(adapter: Adapter) -> str | None:
    """`model.id` of the training, from the adapter's config.yaml; None where it cannot be read. A hint, no more."""
    import yaml

    try:
        model_id = yaml.safe_load((adapter.path / "config.yaml").read_text(encoding="utf-8"))["model"]["id"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return model_id if isinstance(model_id, str) and model_id else None


def on_a_local_model(adapter: Adapter) -> bool:
    """Whether the card's base is the name of a folder: where the folder is, a card does not tell."""
    name = adapter.card.base.id
    if name == BUNDLED or "/" in name:
        return False
    # The Hub's oldest models have no owner in their id (`gpt2`). They were given under just this name.
    return trained_on(adapter) != name or Path(name).is_dir()
