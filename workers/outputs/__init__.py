"""What a render leaves: PNG, film strip, checkpoint."""
