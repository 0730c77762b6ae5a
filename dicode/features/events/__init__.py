"""What happens in videos of `blocks`, from their pixels alone, and how much of it is what a script says."""
