"""Lines of a JSONL file, each made once: a benchmark that was stopped goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows(list[Row]):
    """The lines that are there."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(line) for line in (path.read_text().splitlines() if path.exists() else ()))
        self.path = path

    def of(self, key: Row) -> Row | None:
        """The first line that says what the key says."""
        return next((row for row in self if key.items() <= row.items()), None)

    def add(self, row: Row) -> Row:
        """Write one more."""
        self.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row

    def once(self, key: Row, make: Callable[[], Row]) -> Row:
        """The line of this key, made unless it is there."""
        return self.of(key) or self.add({**key, **make()})
