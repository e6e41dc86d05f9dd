"""The section `eval` of a recipe."""

from pydantic import Field, field_validator

from rrtc.recipe.section import Amount, Section


class EvalRecipe(Section):
    """What is measured, always beside the dense original on the same items."""

    text: list[str] = Field(
        [],
        description="Text to score on; by default what training held out, as the folder names it: files are read, and "
        "a dataset of the hub only where a recipe names it too.",
    )
    text_field: str = Field(
        "text", description="The field of a row that holds the text; else messages or conversations, as chat data has."
    )
    tokens: Amount = Field(
        16_384, ge=2, le=10**12, description="Tokens to score from each text, rounded up to whole windows."
    )
    context: int = Field(512, ge=8, le=10**9, description="Tokens in one scored window.")
    tasks: list[str] = Field(
        [],
        description="Tasks of lm-evaluation-harness by name; paper is the paper's seven. Needs the extra rrtc[eval].",
    )
    tasks_dir: str | None = Field(
        None,
        description="A folder of task files of your own, in the harness's format, which runs the Python that they name "
        "or hold: take none that you would not run.",
    )
    tasks_data: str | None = Field(None, description="The folder that stands for {data} in these task files.")
    fewshot: int = Field(0, ge=0, le=1000, description="Solved examples before each item of a task.")
    task_items: int | None = Field(None, ge=1, le=10**12, description="Items of each task at most; by default all.")
    task_batch: int = Field(8, ge=1, le=10**6, description="Requests of a task that are run at once.")
    passkey_lengths: list[int] = Field(
        [256, 512], max_length=100, description="Lengths in tokens of the texts in which a pass key is hidden."
    )
    passkey_trials: int = Field(4, ge=0, le=1000, description="Pass keys hidden at each length and depth; 0: none.")
    speed_rounds: int = Field(
        5, ge=0, le=1000, description="Rounds in which dense and compressed are timed in turn; 0: none."
    )
    speed_context: int = Field(
        8192,
        ge=8,
        le=10**9,
        description="Where visits see a window, they are also timed at the end of so many tokens of context, or of the "
        "model's longest.",
    )
    engine: bool = Field(
        False,
        description="Also time what early exits, speculation and many requests at once are worth here, beside what was "
        "to be expected.",
    )
    baselines: bool = Field(
        False,
        description="Also make and measure what untied low rank and dropping layers give at the same size, and the "
        "dense model in 8 and 4 bits.",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Draws the pass keys, the few-shot examples and the bootstrap's samples."
    )
    prompt: str = Field(
        "Explain in two sentences why the sky is blue.", description="What the sample continuation answers."
    )
    sample_tokens: int = Field(48, ge=0, le=10**6, description="Length of the sample continuation; 0: none.")

    _one_is_a_list = field_validator("text", "tasks", mode="before", json_schema_input_type=str | list[str])(
        lambda v: [v] if isinstance(v, str) else v
    )
