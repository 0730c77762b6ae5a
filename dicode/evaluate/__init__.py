"""What a model's clips are worth: features, distances, text control, motion, and the JSON of every figure."""
