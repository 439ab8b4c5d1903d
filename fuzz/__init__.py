"""Fuzzing and soaking of the doors that strangers' bytes come through; see run.py and soak.py."""
