"""Stock transformers models: read off a config, run in parts, streamed layer by layer, and watched."""
