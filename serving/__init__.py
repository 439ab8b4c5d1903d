"""What keeps the server up and busy: pictures decoded in processes, requests gathered into batches, one watcher."""


class RequestError(ValueError):
    """What the client is told: one line that names none of the server's files."""


def one_line(text: str) -> str:
    """``text`` as one line that any terminal can print."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
