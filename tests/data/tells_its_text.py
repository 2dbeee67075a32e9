"""A handler that looks its text up in a table, and whose exception, when it is not there, contains the text."""

TABLE = {"": ""}


def handle(text):
    if text.startswith("lines"):
        raise LookupError(text)
    if text.startswith("chain"):
        try:
            return TABLE[text]
        except KeyError as why:
            raise ValueError(f"no such word: {text}") from why
    if text.startswith("good"):
        return "good"
    return TABLE[text]
