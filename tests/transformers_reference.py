"""Evaluate an exported folder with transformers in a separate process; print JSON to stdout.

    python transformers_reference.py FOLDER WINDOWS.pt PROMPT LOGITS.pt

WINDOWS.pt contains tokens and labels, each (batch, seq); masked labels are -100.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Write logits to a file; print loss and greedy text."""
    folder, windows, prompt, logits_file = sys.argv[1:]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, labels = torch.load(windows, weights_only=True)
    with torch.no_grad():
        logits = model(tokens).logits  # (batch, seq, vocab)
    torch.save(logits, logits_file)
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    ids = tokenizer(prompt, return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=40, do_sample=False)[0]
    results = {
        "dtype": str(model.dtype),
        "loss": loss.item(),
        "text": tokenizer.decode(text, skip_special_tokens=True),
        "ids": tokenizer(prompt)["input_ids"],
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
