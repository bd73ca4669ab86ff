"""Messages of wrong input."""

from __future__ import annotations

import pytest
from torch._utils import ExceptionWrapper

from ddetr_mm.errors import DataError, InputError, Problem, RunError, SpecError, printable, shorten


def test_a_problem_names_everything_it_knows():
    problem = Problem(
        "is not an option",
        file="a.yaml",
        where="model.backbone, line 3",
        value="resnet",
        allowed=["resnet_50", "gc_vit_tiny"],
        hint="did you mean resnet_50?",
    )
    assert str(problem) == (
        "a.yaml: model.backbone, line 3: is not an option (got 'resnet'); "
        "allowed: resnet_50, gc_vit_tiny; did you mean resnet_50?"
    )


def test_none_is_a_value_that_can_be_wrong():
    assert str(Problem("is needed", value=None)) == "is needed (got None)"
    assert str(Problem("is needed")) == "is needed"


def test_collect_raises_all_or_nothing():
    SpecError.collect([])
    with pytest.raises(SpecError) as caught:
        SpecError.collect([Problem("first"), Problem("second")])
    assert len(caught.value.problems) == 2 and str(caught.value) == "first\nsecond"


def test_kinds_share_the_exit_status():
    assert DataError("x").exit_status == 2 and isinstance(DataError("x"), InputError)


def test_long_values_are_cut():
    assert len(shorten("x" * 1000)) == 120 and shorten(5) == "5"


def test_an_error_of_a_data_worker_keeps_its_message_alone():
    try:
        raise DataError(Problem("does not exist", file="x.png"), Problem("is broken", file="y.png"))
    except DataError:
        handed_on = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError) as caught:
        handed_on.reraise()
    assert str(caught.value) == "x.png: does not exist\ny.png: is broken"
    assert str(DataError("any text")) == "any text"


def test_an_ended_run_is_no_wrong_input():
    assert RunError("killed").exit_status == 1


# --- Names on a terminal ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.png", "a.png"),
        ("ä 人 \U0001f600", "ä 人 \U0001f600"),
        ("a\nerror: all is lost", r"a\nerror: all is lost"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b31m", r"\x9b31m"),
        ("bell\x07 back\x08 null\x00", r"bell\x07 back\x08 null\x00"),
        ("a\r\tb\x7f", r"a\r\tb\x7f"),
        ("\u2028\u2066\ufeff", r"\u2028\u2066\ufeff"),
    ],
)
def test_no_character_of_a_name_acts_on_the_terminal(text, shown):
    assert printable(text) == shown
    problem = str(Problem(f"class {text}", file=text, where=text, value=text, allowed=[text], hint=text))
    assert "\n" not in problem and "\x1b" not in problem and "\u202e" not in problem
    assert problem.count(shown) >= 5
