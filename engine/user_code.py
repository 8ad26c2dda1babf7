"""Finds the functions people name in a configuration, `pkg.mod:fn` or `path/file.py:fn`, and names those they give."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.config import UserError

_importing = threading.RLock()
_imports: list[str] = []


def load_object(spec: str, *, what: str) -> Any:
    """Import the callable that `spec` names.

    A file is imported once, under a stable module name in `sys.modules`, so that its classes pickle and dataclasses
    work. Its folder (for a module: the working directory) is put last on `sys.path`, so that it can import neighbours.

    Args:
        spec: `pkg.mod:fn` or `path/file.py:fn`; a relative path starts at the working directory.
        what: who asks, for the message, e.g. "reward function".

    Raises:
        UserError: no colon, no such file, module or attribute, an error while importing, or not callable.
    """
    where = f"{what} {spec!r}"
    target, colon, attribute = spec.rpartition(":")
    if not colon or not target or not attribute:
        raise UserError(f"{where}: must look like pkg.mod:function or path/file.py:function")
    with _importing:
        _imports.append(target)
        try:
            module = _load_file(target, where) if target.endswith(".py") else _load_module(target, where)
        finally:
            _imports.pop()
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UserError(f"{where}: {target} has no {part!r}{_hint(part, found)}") from None
    if not callable(found):
        raise UserError(f"{where}: is a {type(found).__name__}, not a function; name something that can be called")
    return found


def location_of(function: Any) -> str:
    """The location that `load_object` finds a function or class by, in this process and in any other.

    Raises:
        UserError: there is none: a lambda, something made inside a function, or typed into a prompt.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<no name>")
    home = sys.modules.get(module or "")
    file = getattr(home, "__file__", None)
    found: Any = home
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not function or (module == "__main__" and file is None):
        raise UserError(
            f"{function!r}: other processes cannot import it; define it by its own name at the top level of a file, "
            "and give what it depends on as `arguments`"
        )
    if file and (module == "__main__" or ("." not in str(module) and _is_users(file))):
        return f"{os.path.abspath(file)}:{name}"  # wherever its folder is
    return f"{module}:{name}"


def importing() -> str | None:
    """The user's file or module that is being imported by `load_object` just now, if any."""
    return _imports[-1] if _imports else None


def describe_error(error: BaseException) -> str:
    """`Type: message (file:line)` of an exception raised by the user's code, on one line.

    The place is the innermost frame outside the standard library, installed packages and Gnomon itself, if there is
    one, else the innermost frame of all.
    """
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:
        text = "(its message cannot be shown)"
    text = " ".join(str(text).split())
    summary = type(error).__name__ + (f": {text[:500]}" if text else "")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{summary} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return summary
    frame = next((f for f in reversed(frames) if _is_users(f.filename)), frames[-1])
    return f"{summary} ({frame.filename}:{frame.lineno})"


def _is_users(filename: str) -> bool:
    paths = sysconfig.get_paths()
    home = Path(__file__).parent
    others = (str(home), str(home.parent / "actors"), paths["stdlib"], paths["purelib"], paths["platlib"], "<frozen")
    return not filename.startswith(others)


def _hint(name: str, owner: Any) -> str:
    names = [n for n in vars(owner) if not n.startswith("_")] if hasattr(owner, "__dict__") else []
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it defines {', '.join(names[:10]) or 'nothing'}"


def _load_file(target: str, where: str) -> ModuleType:
    path = Path(target).resolve()
    if not path.is_file():
        raise UserError(f"{where}: no such file: {path}; a relative path starts at the working directory")
    stem = re.sub(r"\W", "_", path.stem)
    name = f"gnomon_user_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    _put_last_on_path(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{where}: importing {target} failed: {describe_error(error)}") from error
    return module


def _load_module(target: str, where: str) -> ModuleType:
    if not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"{where}: {target!r} is neither a module (pkg.mod) nor a Python file (path/file.py)")
    _put_last_on_path(os.getcwd())
    try:
        return importlib.import_module(target)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (target == missing or target.startswith(f"{missing}.")):
            raise UserError(
                f"{where}: no module named {missing!r}; install it, run from the folder that holds it, "
                "or name a file: path/file.py:function"
            ) from None
        raise UserError(f"{where}: importing {target} failed: {describe_error(error)}") from error


def _put_last_on_path(folder: str) -> None:
    if folder not in sys.path and not ("" in sys.path and folder == os.getcwd()):
        sys.path.append(folder)
