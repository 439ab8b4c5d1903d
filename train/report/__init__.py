"""What a run tells: the console and its logs, the model card, the pictures."""
