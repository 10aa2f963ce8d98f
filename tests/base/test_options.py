"""Values of options of the command line."""

import pytest

from specdec.base.errors import SpecDecError
from specdec.base.options import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0.25", 0.25),
        ("25%", 0.25),
        ("1", 1.0),
        ("1000000", 10**6),
        ("1e9", 10**9),
        ("2.5e3", 2500),
        ("300MB", 300 * 10**6),
        ("1.5 GiB", 3 * 2**29),
    ],
)
def test_a_size_is_a_share_or_a_number_of_bytes(text: str, size: float) -> None:
    found = parse_size("--size", text)
    assert found == size and type(found) is type(size)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "150%", "inf", "nan", "much", "3 MB more", "8gbit", "8 Kibit", "80bit"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(SpecDecError, match="--size takes a share in"):
        parse_size("--size", text)
