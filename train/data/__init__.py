"""Labelled pictures: where they come from, and how they become augmented batches."""
