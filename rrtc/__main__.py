"""`python -m rrtc …` and `torchrun -m rrtc …`: the same as the `rrtc` command."""

from rrtc.cli import main

if __name__ == "__main__":
    main()
