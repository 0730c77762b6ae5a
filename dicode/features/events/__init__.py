"""What happens in videos of `blocks`, from their pixels alone, and how much of it a script asks for."""
