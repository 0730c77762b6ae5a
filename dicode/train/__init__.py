"""The training loop, its three stages (first stage, tokenizer, language model) and its checkpoints."""
