"""The recursive form in vLLM: what vLLM calls where rrtc is installed beside it."""
