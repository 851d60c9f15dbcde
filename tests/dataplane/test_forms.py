"""Forms in which one field is replaced are otherwise unchanged, whatever they contain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dataplane.forms import text_fields, with_text
from router.http.errors import ApiError

TYPE = b'multipart/form-data; boundary="b0undary"'
CONTENTS = st.binary(max_size=200).filter(lambda content: b"--b0undary" not in content)


def form(*parts: tuple[str, bytes]) -> bytes:
    said = (
        b'--b0undary\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), content)
        for name, content in parts
    )
    return b"".join(said) + b"--b0undary--\r\n"


def replaced(body: bytes, text: str) -> bytes:
    return b"".join(map(bytes, with_text(body, TYPE, "model", text).parts))


@given(before=st.lists(CONTENTS, max_size=3), after=st.lists(CONTENTS, max_size=3), model=CONTENTS)
def test_one_field_is_replaced_and_the_others_stay(before: list[bytes], after: list[bytes], model: bytes) -> None:
    first = [(f"before{number}", content) for number, content in enumerate(before)]
    last = [(f"after{number}", content) for number, content in enumerate(after)]
    body = form(*first, ("model", model), *last)
    assert replaced(body, "whisper-1") == form(*first, ("model", b"whisper-1"), *last)


@given(contents=st.lists(CONTENTS, min_size=1, max_size=3))
def test_a_field_that_is_not_there_is_added(contents: list[bytes]) -> None:
    parts = [(f"part{number}", content) for number, content in enumerate(contents)]
    added = replaced(form(*parts), "whisper-1")
    assert added == form(("model", b"whisper-1"), *parts)
    assert text_fields(added, TYPE, ("model",)) == {"model": "whisper-1"}


def test_one_that_is_there_twice_says_the_same_twice() -> None:
    body = form(("model", b"a"), ("file", b"..."), ("model", b"b"))
    assert replaced(body, "c") == form(("model", b"c"), ("file", b"..."), ("model", b"c"))


def test_what_is_no_form_is_refused() -> None:
    with pytest.raises(ApiError, match="cut off"):
        with_text(form(("model", b"a"))[:-10], TYPE, "model", "b")
