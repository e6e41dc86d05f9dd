"""Files: model folders, weights, where they come from, what they say of themselves, and what they may not do."""
