"""A model folder that diffusers reads with trust_remote_code where ditmoe is not installed: our modules in one file."""

import ast
from pathlib import Path

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
    modules = sorted(_needed("ditmoe.pipeline"))
    texts = []
    for name in modules:
        source = _file(name).read_text()
        assert "'''" not in source, f"{name} would end the text that carries it"
        texts.append(f"@ {name}\n" + "".join(f"| {line}\n" for line in source.split("\n")))
    head = _HEAD.format(version=version, count=len(modules))
    (folder / "pipeline.py").write_text(head + "".join(texts) + _TAIL)
    index = read_object(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"_class_name": ["pipeline", "DiTMoEPipeline"]})


def _needed(name: str) -> set[str]:
    """A module of ours, those that it imports, and their packages."""
    found: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module not in found and _file(module).is_file():
            found.add(module)
            todo += [module.rpartition(".")[0] or module, *_imported(module)]
    return found


def _imported(module: str) -> list[str]:
    package = module if _file(module).name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(_file(module).read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            place = ".".join([*base, *([node.module] if node.module else [])])
            found += [place, *(f"{place}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.split(".")[0] in ("ditmoe", "samplers")]


def _file(module: str) -> Path:
    place = ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
