"""`python -m rrtc …`: the same as the `rrtc` command; and `torchrun -m rrtc uptrain …` for several processes."""

from rrtc.cli.app import main

if __name__ == "__main__":
    main()
