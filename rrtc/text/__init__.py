"""Text: from sources to documents, to windows of tokens, to shards on disk; and text that a model writes itself."""
