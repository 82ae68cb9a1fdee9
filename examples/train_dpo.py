"""DPO from Python, without Hydra: the reference's log-probabilities first, once; then preference pairs.

Usage: python examples/train_dpo.py [MODEL] [STEPS]
"""

import sys
from pathlib import Path

import lightning as L

from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import ExamplesDataModule, load_examples
from lit_ft.models.adapt import save_trained
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.load import load_model, load_tokenizer
from lit_ft.models.score import use_packed_attention
from lit_ft.modules import DPOModule
from lit_ft.reference import attach, reference_logprobs

model_id = sys.argv[1] if len(sys.argv) > 1 else "bundled"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 4

tokenizer = load_tokenizer(model_id)
train, _ = load_examples(
    "examples:support_preferences", ChatEncoder(tokenizer), "preference", max_length=1024, max_rows=32
)
model = apply_lora(load_model(model_id), r=16, alpha=32)
use_packed_attention(model)
reference = reference_logprobs(model, train.examples, disable_adapter=False, max_tokens=2048, layout="packed")
trainer = L.Trainer(max_steps=steps, devices=1, logger=False, enable_checkpointing=False)
module = DPOModule(model, beta=0.1, learning_rate=5e-5)
trainer.fit(module, ExamplesDataModule(attach(train.examples, reference), batch_size=8))
save_trained(model, Path("my-adapter"))
print("my-adapter")
