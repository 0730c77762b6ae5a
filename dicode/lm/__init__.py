"""The language model: text and deep tokens in, deep tokens out. Knows nothing of pixels."""
