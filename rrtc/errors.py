"""The errors that a user can cause: one sentence that says what is wrong, and a hint that says what to do."""


class RrtcError(Exception):
    """Work that cannot go on. `sentence` says what is wrong, `hint` what to do about it (may be empty).

    The command line prints both and exits with `exit_code`, without a traceback.
    """

    exit_code = 1
    of_all_processes = False  # whether all processes of a run meet it alike, so that it is enough if one says it
    says_what_is_kept = False  # whether the sentence or the hint says what can be gone on with

    def __init__(self, sentence: str, hint: str = ""):
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint


class WrongUsage(RrtcError):
    """The command or the recipe itself is wrong: an unknown key, an impossible value, a missing option."""

    exit_code = 2


def short(error: BaseException) -> str:
    """What somebody else's error says, as a part of a sentence."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def nearest(name: str, valid) -> str:
    """A hint for a misspelled `name`: the closest of `valid`, or all of them where none is close."""
    import difflib

    valid = [str(v) for v in valid]
    close = difflib.get_close_matches(name, valid, n=1)
    return f"Did you mean '{close[0]}'?" if close else "Valid: " + ", ".join(valid) + "."
