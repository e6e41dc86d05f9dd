"""An OpenAI-compatible server: HTTP from starlette and uvicorn, answers from the engine in `rrtc/generate`."""
