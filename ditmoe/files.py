"""Files and folders that are on the disk whole or not at all, digests, locks; what others wrote, read safely."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

LOCK, _OWNER = ".lock", "process "  # the name of a lock, and how it begins; it is empty where nobody holds it
_OURS = (b"", _OWNER.encode())
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a component's weights
CODE = ("auto_map", "quantization_config")  # entries that name further code


@contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write into that stands at `path` once the block is done, in place of an older one; else nothing does.

    What a kill leaves is named `path`.tmp and is written over the next time. With `durable` the bytes are on the disk
    before the file has its name. ValueError where another process is writing it.
    """
    temporary, free = path.with_name(f"{path.name}.tmp"), True
    with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "w+b") as file:  # which opens and empties nothing
        with suppress(OSError):  # of a disk without locks
            free = _taken(file, temporary)
        if not free:
            raise ValueError(f"{path} is being written by another process; wait for it, or give another place")
        try:
            file.truncate(0)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _taken(file: IO[Any], path: Path) -> bool:
    """Take a file, which is open, for this process until it is closed; False where another process has it.

    It ends with the process, however that ends; readers that are forked do not inherit it. OSError on a disk without
    locks.
    """
    import fcntl  # which Windows lacks: there a model can be drawn from, and no folder be held

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return _is_at(path, file)  # its holder may just have removed or renamed it, and another one made the next


def _is_at(path: Path, file: IO[Any]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all; what cannot be encoded becomes a question mark."""
    with whole(path) as file:
        file.write(text.encode(errors="replace"))


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds. ValueError, naming the file, where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))  # some editors begin with its mark
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no file {file}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{file} is a folder, not a JSON file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def check_no_code(folder: Path) -> None:
    """ValueError where a folder that others made holds a script."""
    for script in sorted(folder.glob("*.py")):
        raise ValueError(f"{script} is code, and a model folder holds settings and weights alone; remove it")


def check_component(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the `.safetensors` files of a component's folder, once it was found harmless."""
    check_no_code(folder)
    for file in sorted(folder.glob("*.json")):
        values = read_object(file)
        for entry in values.keys() & CODE:
            raise ValueError(f"{file} has the entry {entry}, which names code; remove it")
        shards = values.get("weight_map") if file.name.endswith(".index.json") else {}
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{file} names {shard!r}; weights are .safetensors files in the same folder")
    return {name: shape for file in sorted(folder.glob("*.safetensors")) for name, shape in _shapes(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that diffusers reads of a folder, variants' left out; `check_component` comes first."""
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    names = {*read_object(index)["weight_map"].values()} if index.is_file() else {f"{WEIGHTS}.safetensors"}
    return [folder / name for name in sorted(names)]


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """From the file's header; safetensors checks its length and that the tensors fill the rest of the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from error


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, *, kept: bool = True) -> Iterator[None]:
    """Hold a folder, which is made when missing. The lock ends with the process; its file stays where it is `kept`.

    Raises:
        ValueError: Another process holds it, its lock is a file of somebody else's, or it cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ValueError(f"out {folder} cannot be written ({error.strerror})") from error
    with file:
        try:
            free = _taken(file, path)
        except OSError as error:
            free = True
            print(f"note: {folder} is on a disk without locks ({error.strerror}); start only one run on it")
        file.seek(0)
        said = file.read()
        if not said.startswith(_OWNER) and said:
            raise ValueError(f"{path} is a file of another program; give another --out")
        if not free:
            fix = "wait for it, stop it, or give another --out"
            raise ValueError(f"{folder} is in use by {said.strip() or 'another process'}; {fix}")
        owner = f"{_OWNER}{os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with suppress(OSError):  # it holds on a full disk too
            file.truncate(0)
            os.write(file.fileno(), owner.encode())
        try:
            yield
        finally:
            file.truncate(0)
            if not kept and _is_at(path, file):
                path.unlink()


def is_bare(folder: Path, first: str) -> bool:
    """Whether a folder has nothing but what one that was killed at once leaves, its lock and its `first` file begun.

    Not to be asked by who holds it: to close a file ends all locks on it.
    """
    lock, names = folder / LOCK, {entry.name for entry in folder.iterdir()}
    return names <= {LOCK, f"{first}.tmp"} and (LOCK not in names or lock.read_bytes()[: len(_OWNER)] in _OURS)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place once all that was written is on the disk.

    The older one stays until then. Where the block or the disk fails, nothing is left of the new one; what a kill
    leaves is named `folder`.tmp-*, and is removed when the next one is in place.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    old = folder.with_name(f"{temporary.name}-old")
    remove(temporary)
    try:
        yield temporary
        os.umask(mask := os.umask(0o077))
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors makes files that their owner alone may read
            sync(path)
        remove(old)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        remove(temporary)
        raise
    sync(folder.parent)
    for leftover in folder.parent.glob(f"{escape(folder.name)}.tmp-*"):
        remove(leftover)


def remove(path: Path) -> None:
    """A folder, file or link; what cannot be removed now is a leftover for the next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
