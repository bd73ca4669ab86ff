"""Messages of wrong input."""

from __future__ import annotations

import pytest
from torch._utils import ExceptionWrapper

from ddetr_mm.errors import DataError, InputError, Problem, RunError, SpecError, shorten


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
