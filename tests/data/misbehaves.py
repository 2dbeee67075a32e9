"""A handler that raises or returns what it should not; the text says what."""


class Evil(Exception):
    @property
    def __cause__(self):
        raise SystemExit


def handle(text):
    match text:
        case "raises":
            raise LookupError("the secret")
        case "raises lines":
            raise LookupError("the secret\n2026-11-23T10:00:00.123+0900 * 1 Server Terminated.")
        case "exits":
            raise SystemExit("the secret")
        case "is interrupted":
            raise KeyboardInterrupt
        case "stops":
            raise GeneratorExit
        case "recurses":
            return handle(text)
        case "returns nothing":
            return None
        case "returns bytes":
            return b"the secret"
        case "raises what cannot be formatted":
            raise SyntaxError("x", ("f", 1, 2, 5))
        case "raises what cannot be followed":
            raise Evil
        case "returns a surrogate":
            return "the secret \udc80"
    return "good"
