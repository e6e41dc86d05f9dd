"""What a report comes to, in words."""

from fuzzing import sample_report

from rrtc.eval.words import verdict


def score(value: float, dense: float) -> dict:
    return {"value": value, "stderr": None, "difference": {"value": value - dense, "low": None, "high": None}}


def with_scores(bits: dict[str, float], tasks: dict[str, float], dense_bits: float = 1.0) -> dict:
    """A report on a dense model and a compressed one, by text and by task; the dense model solves 0.8 of each."""
    report = sample_report()
    dense, made = report["models"][:2]
    report["models"] = [dense, made]
    dense["scores"]["bits_per_byte"] = {"value": dense_bits, "stderr": None, "difference": None}
    mean = sum(bits.values()) / len(bits)
    made["texts"] = {name: {"bits_per_byte": score(value, dense_bits)} for name, value in bits.items()}
    made["scores"] |= {"bits_per_byte": score(mean, dense_bits), "top1_agreement": score(0.932, 1.0)}
    made |= {"bytes": dense["bytes"] // 2, "params_non_embedding": dense["params_non_embedding"] * 3 // 10}
    for row in (dense, made):
        row.pop("tasks"), row.pop("task_average")
    if tasks:
        dense["tasks"] = {name: {"metric": "acc", "items": 50, **score(0.8, 0.8)} for name in tasks}
        made["tasks"] = {name: {"metric": "acc", "items": 50, **score(value, 0.8)} for name, value in tasks.items()}
        dense["task_average"], made["task_average"] = score(0.8, 0.8), score(sum(tasks.values()) / len(tasks), 0.8)
    return report


def test_it_says_what_is_kept_and_on_what_most_is_lost():
    (said,) = verdict(with_scores({"a book": 1.1, "mail": 1.3}, {"piqa": 0.7, "lambada": 0.5}))
    assert said == (
        "after init takes 50% of the dense model's bytes, 30% of its parameters without embeddings. It keeps 93% of "
        "the dense model's first choices of a token and 75% of its average over tasks (60.0 of 80.0 %). It loses "
        "0.2000 bits per byte (1.2000, 20% more), most on mail (+0.3000); of the tasks it loses most on lambada "
        "(-30.0 points)."
    )


def test_one_text_and_one_task_have_no_worst():
    (said,) = verdict(with_scores({"a book": 1.1}, {"piqa": 0.7}))
    assert " most on " not in said and "87% of its average" in said


def test_what_loses_nothing_does_not_say_that_it_does():
    (said,) = verdict(with_scores({"a book": 0.9, "mail": 0.9}, {"piqa": 0.8, "lambada": 0.9}))
    assert said.endswith("It loses nothing on text: 0.9000 bits per byte, where the dense model has 1.0000.")


def test_each_model_that_is_compared_has_its_sentences_and_stages_on_the_way_have_none():
    report = with_scores({"a book": 1.1}, {})
    report["models"].append(report["models"][1] | {"model": "after uptrain"})
    (said,) = verdict(report)
    assert said.startswith("after uptrain takes") and "tasks" not in said
    assert [one.split(" takes")[0] for one in verdict(report | {"of": None})] == ["after init", "after uptrain"]


def test_a_baseline_that_is_better_at_no_more_bytes_is_named():
    report = with_scores({"a book": 1.1}, {})
    made = report["models"][1]
    for name, share, bits in (("dense in int8", 2, 1.0), ("dense in int4", 0.5, 1.05), ("whitened SVD", 1, 1.2)):
        row = {"model": name, "kind": "baseline", "bytes": int(share * made["bytes"])}
        report["models"].append(made | row | {"scores": made["scores"] | {"bits_per_byte": score(bits, 1.0)}})
    (said,) = verdict(report)
    assert said.endswith("more for less: dense in int4 takes 50% of its bytes and 1.0500 bits per byte.")
    report["models"].pop(-2)
    assert "more for less" not in verdict(report)[0]


def test_a_report_of_nothing_and_one_of_nought_are_met():
    assert verdict(sample_report() | {"models": []}) == []
    report = with_scores({"a book": 1.1}, {"piqa": 0.7}, dense_bits=0.0)
    for row in report["models"]:
        row.update(bytes=0, params_non_embedding=0)
        row["task_average"]["value"] = 0.0
    assert "100% of the dense model's bytes" in verdict(report)[0]
