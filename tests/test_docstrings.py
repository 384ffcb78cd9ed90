"""The rules of CONTRIBUTING.md for sentences, as far as a machine can check them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wanquant.testing.hosts import ROOT

FOLDERS = ("quant", "ops", "nodes", "testing", "bench", "research", "workflow_generators", "tests")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
# What a sentence without subject and verb begins with.
NOT_A_BEGINNING = {
    *("Of", "To", "With", "In", "For", "From", "By", "As", "On", "At", "Where", "Whose", "Whether"),
}
SHAPE = re.compile(r"\([^()]*[,*][^()]*\)|\(n\)|\belements\b|\bshape|\bscalar|\bflat\b|\b[0-5]-D\b")
DTYPE = re.compile(r"u?int\d|b?float|\bdtype|\bbool|\bbytes\b")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
            assert docstring.split()[0] not in NOT_A_BEGINNING, f"{getattr(node, 'name', path.name)}: {docstring[:80]}"


def tensor_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the public functions, and methods that override none, which take or return a tensor."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.bases]
    for owner in (tree, *(node for node in classes if not node.name.startswith("_"))):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                annotations = [annotation for a in arguments if (annotation := a.annotation)]
                if node.returns:
                    annotations.append(node.returns)
                if any(re.search(r"\bTensor\b", ast.unparse(annotation)) for annotation in annotations):
                    yield node


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.relative_to(ROOT).parts[0] in ("quant", "ops")], ids=name_of
)
def test_functions_on_tensors_name_shape_and_dtype(path):
    tree = ast.parse(path.read_text())
    # A module can describe all its functions of one kind, as `unpack_*`.
    kinds = re.findall(r"`(\w+_)\*`", ast.get_docstring(tree) or "")
    for node in tensor_functions(tree):
        docstring = ast.get_docstring(node) or ""
        described = SHAPE.search(docstring) and DTYPE.search(docstring)
        assert described or any(node.name.startswith(kind) for kind in kinds), f"{node.name}: {docstring}"
