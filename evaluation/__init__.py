"""What a model is worth: held-out loss and generated text. Knows torch, `model`, and tokenizers."""
