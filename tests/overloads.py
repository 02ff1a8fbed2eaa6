"""Types of `generate` and `stream`. mypy and pyright check this file; nothing runs it."""

from collections.abc import Iterator
from typing import Any, assert_type

from gpt2 import generate, stream

params: Any = {}

assert_type(generate([1], params, 2, 3, temperature=0.5), list[int])
assert_type(generate([1], params, 2, 3, n_samples=None), list[int])
assert_type(generate([1], params, 2, 3, n_samples=2), list[list[int]])
assert_type(stream([1], params, 2, 3, 5, temperature=0.5), Iterator[int])
assert_type(stream([1], params, 2, 3, stop_id=[5], n_samples=2), Iterator[list[int | None]])


def either(n_samples: int | None):
    ids = generate([1], params, 2, 3, n_samples=n_samples)
    assert_type(ids, list[int] | list[list[int]])
