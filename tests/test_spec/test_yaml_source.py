"""Reading YAML: values, lines, raw text, and every way a file can be bad."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from ddetr_mm.errors import SpecError
from ddetr_mm.spec.yaml_source import (
    MAX_BYTES,
    Branch,
    Leaf,
    Listing,
    SpecDumper,
    SpecLoader,
    parse_yaml,
    plain_leaf,
    read_text,
)


def plain(tree):
    """A tree as nested dicts and lists."""
    if isinstance(tree, Branch):
        return {key: plain(item) for key, item in tree.items.items()}
    if isinstance(tree, Listing):
        return [plain(item) for item in tree.items]
    return None if tree is None else tree.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("1_000", 1000),
        ("0x10", 16),
        ("0b11", 3),
        ("017", 15),
        ("1.5", 1.5),
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5e+3", -1500.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("No", False),
        ("on", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("=", "="),
        ("e5", "e5"),
        ("089", "089"),
        ("'1'", "1"),
        ('"no"', "no"),
        ("!!str 1", "1"),
        ("!!int '3'", 3),
        ("<<", "<<"),
    ],
)
def test_scalars(text: str, value: object):
    tree, problems = parse_yaml(f"a: {text}")
    assert problems == []
    assert plain(tree) == {"a": value}
    assert type(plain(tree)["a"]) is type(value)


def test_not_a_number():
    assert math.isnan(plain_leaf(".nan", "override").value)


def test_raw_text_and_lines_are_kept():
    tree, problems = parse_yaml("a: 1_000\nb:\n  - x\n  - {c: No}\n")
    assert problems == []
    assert tree.items["a"] == Leaf(1000, "1_000", "line 1")
    assert tree.items["b"].where == "line 2"
    assert tree.items["b"].items[0].where == "line 3"
    assert tree.items["b"].items[1].items["c"] == Leaf(False, "No", "line 4")


def test_the_line_is_that_of_the_key():
    tree, problems = parse_yaml("a: &x 1\nb: *x\nc:\n\n  3\nd: |\n  text\n")
    assert problems == []
    assert [item.where for item in tree.items.values()] == ["line 1", "line 2", "line 3", "line 6"]


def test_keys_are_text():
    tree, problems = parse_yaml("{no: 1, 2: 3, ~: 4, 1.5: 5}")
    assert problems == []
    assert plain(tree) == {"no": 1, "2": 3, "~": 4, "1.5": 5}


def test_anchors_and_merges():
    text = "base: &b {x: 1, y: 2}\none:\n  <<: *b\n  y: 3\ntwo:\n  <<: [{z: 1, x: 9}, *b]\nthree: *b\n"
    tree, problems = parse_yaml(text)
    assert problems == []
    assert plain(tree)["one"] == {"x": 1, "y": 3}
    assert plain(tree)["two"] == {"z": 1, "x": 9, "y": 2}
    assert plain(tree)["three"] == {"x": 1, "y": 2}
    assert plain(tree) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", ["'a' is given twice", "first on line 1", "line 3"]),
        ("a: !!python/object/apply:os.system ['true']", ["YAML tag is not allowed", "!!python/object"]),
        ("a: !env x", ["YAML tag is not allowed", "!env"]),
        ("a: !!set {x}", ["YAML tag is not allowed", "!!set"]),
        ("a: !!binary aGk=", ["YAML tag is not allowed"]),
        ("a: !!int x", ["does not fit the tag !!int", "line 1"]),
        ("a: !!bool 3", ["does not fit the tag !!bool"]),
        ("a: !!float x", ["does not fit the tag !!float"]),
        ("? [a, b]\n: 1", ["a key must be plain text"]),
        ("<<: 3", ["'<<' takes a mapping"]),
        ("a: [1, 2", ["not valid YAML", "line 1"]),
        ("a: 1\n\tb: 2", ["not valid YAML", "line 2", "spaces"]),
        ("a: *nope", ["undefined alias", "line 1"]),
        ("a: 1\n--- \nb: 2", ["not valid YAML", "document"]),
        ("a: &x [*x]", ["contains it"]),
        ("a: &x {b: *x}", ["contains it"]),
        ("a: \x00", ["not valid YAML", "line 1"]),
        ("[" * 100 + "]" * 100, ["levels deep"]),
        ("a: " + "{b: " * 5000, ["levels deep"]),
    ],
)
def test_bad_yaml(text: str, words: list[str]):
    _, problems = parse_yaml(text, "spec.yaml")
    message = "\n".join(map(str, problems))
    assert problems
    assert all(word in message for word in words), message
    assert "spec.yaml" in message


def test_several_problems_are_found_at_once():
    _, problems = parse_yaml("a: 1\na: 2\nb: !x 1\nc: !y 2\n")
    assert len(problems) == 3


def test_aliases_that_expand_without_end_are_bounded():
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    tree, problems = parse_yaml("\n".join(lines))
    assert tree is None
    assert "fewer aliases" in str(problems[0])


def test_numbers_of_absurd_length_stay_text():
    assert plain(parse_yaml("a: 0x" + "f" * 5000)[0])["a"] == "0x" + "f" * 5000
    assert plain(parse_yaml("a: " + "9" * 5000)[0])["a"] == "9" * 5000


def test_empty_document():
    assert parse_yaml("") == (None, [])
    assert parse_yaml("# nothing\n") == (None, [])


@pytest.mark.parametrize(
    "value", ["1e-4", "1_0", "no", "", "~", "1.5", "x: y", "- a", "<<", "2024-01-01", "é"]
)
def test_the_dumper_quotes_what_the_loader_would_misread(value: str):
    text = yaml.dump({"a": value}, Dumper=SpecDumper, allow_unicode=True)
    assert plain(parse_yaml(text)[0]) == {"a": value}


SPECIAL = [
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\x07",
    "\x7f",
    "\x85",
    "\xa0",
    "\xad",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\ufffe",
    "\U0010ffff",
]


@pytest.mark.parametrize("character", SPECIAL, ids=ascii)
@pytest.mark.parametrize("allow_unicode", [True, False])
@pytest.mark.parametrize("flow", [True, False])
def test_the_dumper_keeps_every_character(character: str, allow_unicode: bool, flow: bool):
    for text in (character, f"a{character}b", f"{character}b", f"a{character}", f"a {character} b: '"):
        value = {"a": text, text: [text]}
        written = yaml.dump(
            value, Dumper=SpecDumper, allow_unicode=allow_unicode, default_flow_style=flow, width=20
        )
        tree, problems = parse_yaml(written)
        assert problems == []
        assert plain(tree) == value


def test_the_loader_does_not_change_pyyaml():
    assert yaml.safe_load("a: 2024-01-01")["a"] != "2024-01-01"
    assert SpecLoader.yaml_implicit_resolvers is not yaml.SafeLoader.yaml_implicit_resolvers


def test_missing_file(tmp_path: Path):
    with pytest.raises(SpecError, match=r"nope\.yaml: does not exist"):
        read_text(tmp_path / "nope.yaml")


def test_folder(tmp_path: Path):
    with pytest.raises(SpecError, match="is a folder"):
        read_text(tmp_path)


def test_file_below_a_file(tmp_path: Path):
    (tmp_path / "a").write_text("")
    with pytest.raises(SpecError, match="cannot be read"):
        read_text(tmp_path / "a" / "b.yaml")


def test_name_with_a_null_byte():
    with pytest.raises(SpecError, match=r"cannot be read|does not exist"):
        read_text(Path("a\0b"))


def test_not_utf8(tmp_path: Path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: 1\nb: é".encode("latin-1"))
    with pytest.raises(SpecError, match=r"line 2: is not UTF-8"):
        read_text(path)


def test_byte_order_mark(tmp_path: Path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert plain(parse_yaml(read_text(path))[0]) == {"a": 1, "b": 2}


def test_too_large(tmp_path: Path):
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(SpecError, match="larger than"):
        read_text(path)


def test_many_values_are_refused():
    _, problems = parse_yaml("a: [" + "1," * 500_000 + "]")
    assert "holds more than" in str(problems[0])
