"""What a model takes before it is trained: parameters, FLOPs, memory, days."""
