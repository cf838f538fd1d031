"""Traces: whose traceparent is taken over, and what is derived where there is none."""

from __future__ import annotations

import pytest

from adapter.contract.names import H_TRACEPARENT, author_traceparent, command_traceparent, derive_traceparent

WHOLE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "00-1",
        WHOLE.upper(),
        f"01{WHOLE[2:]}",
        f"{WHOLE}\n",
        f"{WHOLE}-more",
        f"00-{'0' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'0' * 16}-01",
    ],
)
def test_only_a_traceparent_that_tracers_take_is_an_authors(wrong: str) -> None:
    assert author_traceparent({H_TRACEPARENT: WHOLE}) == WHOLE
    assert author_traceparent({H_TRACEPARENT: wrong}) == ""
    assert author_traceparent({}) == ""


def test_what_is_derived_is_one_and_the_same_for_the_same_ids() -> None:
    made = derive_traceparent("in:b:m1")
    assert author_traceparent({H_TRACEPARENT: made}) == made == derive_traceparent("in:b:m1")
    assert made[:36] != derive_traceparent("in:b:m2")[:36]


def test_the_trace_of_a_command_is_its_authors_or_its_questions_or_its_own() -> None:
    message = derive_traceparent("in:b:m1")
    assert command_traceparent(WHOLE, "s1", 1, 2, "in:b:m1") == WHOLE
    answers = [command_traceparent("", "s1", sequence, 2, "in:b:m1") for sequence in (1, 2)]
    assert {answer[:36] for answer in answers} == {message[:36]}
    assert len({*answers, message}) == 3
    alone = [command_traceparent("", sandbox, 1, 2, "")[:36] for sandbox in ("s1", "s2")]
    assert len({*alone, message[:36]}) == 3
