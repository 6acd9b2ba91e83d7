"""The page's template: it is installed with the code, and a value that is missing is an error, not a gap."""

import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from ditmoe.report import page
from tests.faults.test_security import REPORT


def test_a_value_that_is_missing_is_an_error() -> None:
    assert "Written today by ditmoe 0.1." in page.render(REPORT, {}, {})
    with pytest.raises(UndefinedError, match="written"):
        page.render({name: value for name, value in REPORT.items() if name != "written"}, {}, {})


def test_the_template_is_a_part_of_the_package() -> None:
    packaging = tomllib.loads(Path("pyproject.toml").read_text())
    patterns = packaging["tool"]["setuptools"]["package-data"]["ditmoe"]
    template = Path(page.__file__).with_name("page.html")
    assert any(template in Path(page.__file__).parents[1].glob(pattern) for pattern in patterns)
    assert "jinja2>=3.1" in packaging["project"]["dependencies"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (61, "1 min 01 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text
