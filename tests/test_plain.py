"""JSON and YAML that others wrote: what is data is read, and nothing else; and what is written is read."""

import pytest

from rrtc.plain import DEEPEST, from_json, from_yaml, read_json, read_yaml, to_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "aliases"),
        ("a: &a\n  b: *a", "aliases"),
        ("seed: !!int x", "invalid literal"),
        ("seed: !!int ''", "out of range"),
        ("seed: " + "9" * 5000, "number of 5000"),
        ("seed: " + ":".join("1" for _ in range(5000)), "number of 9999"),
        ("[" * 3000, "nested"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "nested"),
        ("a: !!set {x}", "set"),
        ("a: !!binary aGk=", "binary"),
        ("a: !!python/object/apply:os.getcwd []", "python"),
        ("? [a]\n: 1", "unhashable"),
        ("a: b: c", "mapping"),
        ("a: 1\nb: {c: 1, d: 2, c: 3}", "'c' is there twice"),
        ("init: {rank: 1}\n'init': {rank: 2}", "'init' is there twice"),
        ("\x00", "unacceptable"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused_on_one_line(text, says):
    with pytest.raises(ValueError, match=says) as found:
        from_yaml(text)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "1" * 101, "1" * 5000, "", "{", "\x00"],
)
def test_json_that_is_no_plain_data_is_refused(text):
    with pytest.raises(ValueError):
        from_json(text)


def test_plain_data_is_read():
    assert from_yaml("a: [1, 0x10, 1.5, yes, null, '2024-01-01', 2024-99-99, x]\nb: {c: .inf}") == {
        "a": [1, 16, 1.5, True, None, "2024-01-01", "2024-99-99", "x"],
        "b": {"c": float("inf")},
    }
    depth = "[" * DEEPEST + "]" * DEEPEST
    assert from_yaml(depth) == from_json(depth)
    assert from_json('{"model_max_length": 1000000000000000019884624838656}') == {"model_max_length": int(1e30)}


def test_what_is_written_is_read():
    shared = {"path": "a\udcff", "made": "2024-01-01", "n": [1, 2.5, None, True]}
    value = {"one": shared, "two": shared, "three": [shared["n"], shared["n"]]}
    assert from_yaml(to_yaml(value)) == value


def test_files_that_are_too_large_or_not_text_are_refused(tmp_path):
    (tmp_path / "large").write_bytes(b"#" * 1_000_001)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for file in ("large", "binary"):
        with pytest.raises(ValueError):
            read_yaml(tmp_path / file)
    with pytest.raises(ValueError):
        read_json(tmp_path / "binary")
    with pytest.raises(OSError):
        read_json(tmp_path / "none")
