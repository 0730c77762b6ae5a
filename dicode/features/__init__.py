"""Networks that look at frames, and the distances between what they see."""
