"""The command line, and nothing else: flags, the commands that parse them, and the tables that show results."""
