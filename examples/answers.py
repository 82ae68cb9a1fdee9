"""What the base and each adapter answer to the same held-out questions, greedily, as Markdown.

Usage: python examples/answers.py [model=MODEL] [ADAPTER_FOLDER ...]
"""

import json
import sys

import torch
from peft import PeftModel

from lit_ft.data.files import examples_folder
from lit_ft.models.load import load_model, load_tokenizer

folders = [argument for argument in sys.argv[1:] if not argument.startswith("model=")]
folders = folders or ["adapters/support/v1", "adapters/support/v2"]
model_id = next((a.removeprefix("model=") for a in sys.argv[1:] if a.startswith("model=")), "bundled")
rows = (examples_folder() / "support_sft" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
questions = [json.loads(rows[k])["messages"][0]["content"] for k in (0, 2, 5)]

tokenizer = load_tokenizer(model_id)
model = PeftModel.from_pretrained(load_model(model_id), folders[0], folders[0]).eval()
for folder in folders[1:]:
    model.load_adapter(folder, folder)


def answer(question: str) -> str:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=200, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


for question in questions:
    print(f"> **{question}**\n")
    with model.disable_adapter():
        replies = {"base": answer(question)}
    for folder in folders:
        model.set_adapter(folder)
        replies[folder] = answer(question)
    for name, reply in replies.items():
        print(f"*{name}*\n\n```text\n{reply}\n```\n")
