"""A model folder that diffusers reads with trust_remote_code where ditmoe is not installed: our modules in one file."""

from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from ..files import read_object, write_json

ROOT = Path(__file__).parents[2]
_HEAD = '''"""ditmoe {version}, carried along by `python -m ditmoe export --standalone`: {count} of its modules.

"@ NAME" begins a module, and "| " every line of it, without which diffusers would take their imports for this file's.
Where ditmoe is installed, that is used, and nothing here.
"""

import importlib
import importlib.abc
import importlib.util
import sys

TEXT = r\'\'\'
'''
_TAIL = """'''


class Carried(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def __init__(self, text):
        parts = [part.partition("\\n") for part in ("\\n" + text.lstrip("\\n")).split("\\n@ ")[1:]]
        self.sources = {name: "".join(line[2:] + "\\n" for line in lines.splitlines()) for name, _, lines in parts}

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.sources else None

    def get_source(self, name):
        return self.sources[name]

    def is_package(self, name):
        return any(other.startswith(name + ".") for other in self.sources)


if importlib.util.find_spec("ditmoe") is None:
    if "samplers" in sys.modules:
        raise ImportError("another module called samplers has been imported; load this model before it")
    sys.meta_path.insert(0, Carried(TEXT))
DiTMoEPipeline = importlib.import_module("ditmoe.pipeline").DiTMoEPipeline
"""


def make_standalone(folder: Path, version: str) -> None:
    """Put pipeline.py, which carries all that `ditmoe.pipeline` imports, into a pipeline folder, and name it there."""
    others = {place.name.partition(".")[0] for place in ROOT.iterdir()} - {"ditmoe", "samplers"}
    finder = ModuleFinder([str(ROOT)], excludes=others)
    finder.import_hook("ditmoe.pipeline")
    modules: dict[str, Any] = finder.modules
    files = {name: module.__file__ for name, module in sorted(modules.items()) if module.__file__}  # sys has none
    texts = []
    for name, file in files.items():
        source = Path(file).read_text()
        assert "'''" not in source, f"{name} would end the text that carries it"
        texts.append(f"@ {name}\n" + "".join(f"| {line}\n" for line in source.split("\n")))
    head = _HEAD.format(version=version, count=len(files))
    (folder / "pipeline.py").write_text(head + "".join(texts) + _TAIL)
    index = read_object(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"_class_name": ["pipeline", "DiTMoEPipeline"]})
