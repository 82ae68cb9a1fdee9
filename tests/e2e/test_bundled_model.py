"""The default commands on the bundled model, with part of the data: what is learnt is what the README promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.server import trained

pytestmark = pytest.mark.alone


@pytest.mark.timeout(1500)
def test_sft_lowers_the_loss_by_a_third_and_dpo_prefers_the_chosen(tmp_path: Path) -> None:
    sft = trained(tmp_path, "+experiment=sft", "data.max_rows=160").card
    assert sft.base.id == "bundled" and sft.servable
    assert sft.metrics["eval/loss"] <= 0.7 * sft.metrics["before/loss"]
    dpo = trained(tmp_path, "+experiment=dpo", "data.max_rows=32", "data.max_val_rows=20").card
    assert dpo.parent == "support@v1"
    assert dpo.metrics["eval/rewards/accuracies"] >= 0.8
