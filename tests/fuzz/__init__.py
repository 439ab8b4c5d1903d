"""Damaged pictures, checkpoints and requests, of which none may break a promise; and a soak."""
