"""Something that happens in the middle of a run."""


def at_the(number: int, monkeypatch, where, name: str, do) -> None:
    """Has `do` done before the call of that number, from 1, of where.name."""
    original, calls = getattr(where, name), []

    def called(*args, **kwargs):
        calls.append(0)
        if len(calls) == number:
            do()
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, called)
