"""Writes kvlink/_C.pyi (and _cuda.pyi) from the built extension's own signatures.

    python tools/make_stubs.py [--check] [MODULE ...]

--check compares instead and fails, with a diff, when a stub is not what the module says.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = ("kvlink._C", "kvlink._cuda")  # the second where it is built
HEADER = '''\
"""Written by tools/make_stubs.py from the built module; `make stubs` brings it up to date."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import numpy
from numpy.typing import NDArray

'''
SPECIAL_METHODS = {
    *("__init__", "__len__", "__enter__", "__exit__", "__int__", "__index__"),
    *("__dlpack__", "__dlpack_device__"),
}
# What pybind11 says, and what a caller needs to know.
REWRITES = (
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"(typing_extensions|types)\.CapsuleType", "Any"),
    (r"typing\.Annotated\[numpy\.typing\.ArrayLike, numpy\.\w+\]", "Any"),
    (r"numpy\.typing\.NDArray\[[^\]]*\]", "Any"),
    (r"typing\.Annotated\[(collections\.abc\.Sequence\[\w+\]), \"FixedSize\(\d+\)\"\]", r"\1"),
    (r"typing\.Annotated\[numpy\.typing\.ArrayLike, numpy\.\w+\]", "Any"),
    (r"\bnumpy\.typing\.", ""),
    (r"\bkvlink\._\w+\.", ""),
    (r"\b(collections\.abc|typing)\.", ""),
    (r"-> tuple$", "-> tuple[Any, ...]"),
    (r"-> list$", "-> list[Any]"),
    (r"-> dict$", "-> dict[str, Any]"),
    (r"(?<=: )str\b", "str | bytes"),  # as any std::string
    (r"\bobject\b(?!:)", "Any"),
    (r"= <[^>]*>", "= ..."),
)


def split_doc(doc: str) -> tuple[list[str], str]:
    """The signatures at the head of a pybind11 docstring, and the text after them."""
    head, _, rest = doc.strip().partition("\n")
    if head.endswith("Overloaded function."):
        signatures = re.findall(r"^\d+\. (.*)$", rest, re.MULTILINE)
        return signatures, ""
    if rest.startswith("Overloaded function."):
        return re.findall(r"^\d+\. (.*)$", rest, re.MULTILINE), ""
    return [head], rest.strip()


def signature(text: str, indent: str, name: str | None = None) -> str:
    """`name(parameters) -> type` as a def line without the colon, wrapped where it is long."""
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    node = ast.parse(f"def {text}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    if node.args.posonlyargs or node.args.args:
        first = (node.args.posonlyargs + node.args.args)[0]
        if first.arg == "self":
            first.annotation = None
    assert node.returns is not None
    returns = ast.unparse(node.returns)
    parts = parameters(node.args)
    line = f"{indent}def {name or node.name}({', '.join(parts)}) -> {returns}"
    if len(line) < 100:
        return line
    inner = ",\n".join(f"{indent}    {part}" for part in parts)
    return f"{indent}def {name or node.name}(\n{inner},\n{indent}) -> {returns}"


def parameters(arguments: ast.arguments) -> list[str]:
    """Each parameter's source text, in order."""
    text = ast.unparse(arguments)
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", part.strip()) for part in parts]


def docstring(text: str, indent: str) -> str:
    lines = text.splitlines() or [""]
    if len(lines) == 1 and len(lines[0]) + len(indent) <= 94:
        return f'{indent}"""{lines[0]}"""\n'
    body = "".join(f"{indent}{line}".rstrip() + "\n" for line in lines[1:])
    return f'{indent}"""{lines[0]}\n{body}{indent}"""\n'


def function(value: Any, indent: str, decorator: str = "", name: str | None = None) -> str:
    signatures, text = split_doc(value.__doc__)
    overloads = f"{indent}@overload\n" if len(signatures) > 1 else ""
    out = ""
    for each in signatures:
        out += overloads + decorator + signature(each, indent, name)
        out += f":\n{docstring(text, indent + '    ')}" if text else ": ...\n"
    return out


def class_(cls: type) -> str:
    out = f"class {cls.__name__}:\n"
    doc = (cls.__doc__ or "").partition("\n\nMembers:")[0].strip()
    out += docstring(doc, "    ") + "\n" if doc else ""
    members = [
        (name, value)
        for name, value in sorted(vars(cls).items())
        if not name.startswith("_") or name in SPECIAL_METHODS
    ]
    for name, value in members:
        if isinstance(value, property):
            getter, setter = value.fget, value.fset
            assert getter is not None
            if value.__doc__ and getter.__doc__ and value.__doc__ not in getter.__doc__:
                getter_doc = f"{getter.__doc__.strip()}\n\n{value.__doc__}"
            else:
                getter_doc = getter.__doc__ or ""
            signatures, text = split_doc(getter_doc)
            line = signature(re.sub(r"^\w*\([^)]*\)", f"{name}(self)", signatures[0]), "    ")
            out += f"    @property\n{line}"
            out += f":\n{docstring(text, ' ' * 8)}" if text else ": ...\n"
            if setter is not None:
                kind = line.rpartition("-> ")[2]
                out += f"    @{name}.setter\n    def {name}(self, value: {kind}) -> None: ...\n"
        elif isinstance(value, staticmethod):
            out += function(getattr(cls, name), "    ", "    @staticmethod\n")
        elif callable(value) and "->" in (value.__doc__ or ""):
            out += function(value, "    ")
        elif isinstance(value, cls):  # an enum's member
            out += f"    {name}: ClassVar[{cls.__name__}]\n"
    if "__members__" in vars(cls):
        out += f"    __members__: ClassVar[dict[str, {cls.__name__}]]\n"
    return out if members or doc else out.rstrip("\n") + " ...\n"


def stub(module: ModuleType) -> str:
    """The whole stub of a module."""
    classes, functions, values = [], [], []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, type):
            classes.append(class_(value))
        elif callable(value):
            functions.append(function(value, ""))
        else:
            values.append(f"{name}: {type(value).__name__}\n")
    text = "".join(values) + "\n" * bool(values)
    text += "\n".join(classes + functions)
    header = HEADER
    for name in ("Callable", "Sequence", "ClassVar", "overload"):
        if not re.search(rf"\b{name}\b", text):
            header = re.sub(rf"\b{name}, |, {name}\b", "", header)
            header = re.sub(rf"from \S+ import {name}\n", "", header)
    if "NDArray" not in text:
        header = header[: header.index("import numpy\n")]
    if module.__name__ != "kvlink._C" and re.search(r"\bPoolView\b", text):
        header = header.rstrip("\n") + "\n\nfrom kvlink._C import PoolView\n\n"
    return header + text


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    status = 0
    built = [name for name in MODULES if importlib.util.find_spec(name)]
    for name in [a for a in arguments if a != "--check"] or built:
        module = importlib.import_module(name)
        path = Path(__file__).parents[1] / f"{name.replace('.', '/')}.pyi"
        new, old = stub(module), path.read_text() if path.exists() else ""
        if check and new != old:
            status = 1
            diff = difflib.unified_diff(
                old.splitlines(True), new.splitlines(True), str(path), f"built {name}"
            )
            sys.stdout.writelines(diff)
        elif not check:
            path.write_text(new)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
