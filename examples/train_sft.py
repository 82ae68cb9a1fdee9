"""SFT from Python, without Hydra: LoRA on a model, the project's support conversations, Lightning's own Trainer.

Usage: python examples/train_sft.py [MODEL] [STEPS]
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
from lit_ft.modules import SFTModule

model_id = sys.argv[1] if len(sys.argv) > 1 else "bundled"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 4

tokenizer = load_tokenizer(model_id)
train, _ = load_examples("examples:support_sft", ChatEncoder(tokenizer), "sft", max_length=1024)
model = apply_lora(load_model(model_id), r=16, alpha=32)
use_packed_attention(model)
trainer = L.Trainer(max_steps=steps, devices=1, logger=False, enable_checkpointing=False)
trainer.fit(SFTModule(model, learning_rate=1e-3), ExamplesDataModule(train.examples, batch_size=8))
save_trained(model, Path("my-adapter"))  # PEFT and vLLM load this folder
print("my-adapter")
