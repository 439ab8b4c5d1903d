"""Damage to bytes, as a strategy of Hypothesis."""

from hypothesis import strategies as st

EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 40), st.binary(max_size=12)), max_size=4)


def damaged(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the seeds, in which at up to four places some bytes are others, fewer or more."""
    return st.builds(_edited, st.sampled_from(seeds), EDITS)


def _edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """edits: where, as a share of the length; how many bytes are taken out, 40: all that follow; what is put in."""
    for share, count, new in edits:
        at = int(share * len(content))
        content = content[:at] + new + (content[at + count :] if count < 40 else b"")
    return content
