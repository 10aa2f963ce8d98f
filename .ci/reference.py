"""Write the reference pages docs/cli.md and docs/api.md from the code: python .ci/reference.py

The order, the headings and the examples of docs/api.md are those of .ci/api.md, where a line "::: NAME" before an
example stands for the documentation of that name.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

import specdec
from specdec.cli import app

ROOT = Path(__file__).parents[1]
NOTICE = "<!-- Written by .ci/reference.py from the code. Change the code, and run it again. -->"

# --- the command line -------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Return the page docs/cli.md: every command with its arguments and options, as Markdown."""
    parts, seen = ["# Command line", "", NOTICE, "", "Every command prints this with `--help`.", ""], dict[str, str]()
    for path, command in commands("specdec", typer.main.get_command(app)):
        names = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
        text = " ".join((command.help or "").replace("\b", "").split())
        parts += [f"## {path}", "", escaped(text), "", "```text", " ".join([path, *names, "[OPTIONS]"]), "```", ""]
        table = "\n".join(row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False))
        first = seen.setdefault(table, path)
        head = ["| option | meaning |", "|---|---|", table, ""]
        parts += head if first == path else [f"The options are those of `{first}`.", ""]
    return "\n".join(parts)


def commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, command) of all commands that can be run, recursively; a path is such as "specdec train m2r2".

    path, command: the command or group of commands to begin with.
    """
    if path != "specdec" and getattr(command, "invoke_without_command", True):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(f"{path} {name}", inner)


def row(parameter: Any) -> str:
    """Return a command's argument or option as a line of a Markdown table: names, meaning and default."""
    named = parameter.param_type_name == "argument"
    choices = getattr(getattr(parameter, "type", None), "choices", None)
    metavar = parameter.metavar or ("|".join(choices) if choices else parameter.name.upper())
    name = metavar if named else ", ".join(parameter.opts + parameter.secondary_opts)
    name += "" if named or parameter.is_flag else f" {metavar}"
    text, default = (parameter.help or "").strip(), getattr(parameter.default, "value", parameter.default)
    if default is True:
        default = parameter.opts[0]
    if not (callable(default) or default is False or default in (None, "", (), [])):
        text += f" Default: {', '.join(map(str, default)) if isinstance(default, list | tuple) else default}."
    code = name.replace("|", "\\|")
    return f"| `{code}` | {escaped(' '.join(text.split()) + ' Required.' * parameter.required)} |"


def escaped(text: str) -> str:
    """Return plain text for a cell of a Markdown table: Markdown is escaped, and quoted commands become code."""
    text = re.sub(r"([\\*_<>|\[\]])", r"\\\1", text)
    return re.sub(r"'((?:specdec|--)[^']*)'", lambda found: f"`{found[1].replace(chr(92), '')}`", text)


# --- Python -----------------------------------------------------------------------------------------------------------

TYPES = (
    "base.settings",
    "base.options",
    "engine.request",
    "api.prompts",
    "api.text",
    "api.generation",
    "api.decoder",
)  # with aliases
CHECKS = "Raises SpecDecError for an argument of a wrong type, out of range or unknown."
NAMED = re.compile(r"(\w+(?:(?:, | / | to )\w+)*(?:\[b\])?)( \[[^\]]*\])?: (?=\S)")
WIDTH = 100
Function = ast.FunctionDef | ast.AsyncFunctionDef


def python() -> str:
    """Return the page docs/api.md: the text of .ci/api.md with the documentation of every name that it mentions."""
    text = (ROOT / ".ci/api.md").read_text("utf-8")
    head, rest = text.split("\n", 1)
    named = re.compile(r"^::: (\w+)\n\n(```python.*?^```)$", re.M | re.S)
    pages = named.sub(lambda found: documentation(found[1], found[2]), rest)
    return f"{head}\n\n{NOTICE}\n{pages}"


def parsed(made: type) -> ast.ClassDef:
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(made))).body
    assert isinstance(tree, ast.ClassDef)
    return tree


def documentation(name: str, example: str) -> str:
    """Return the documentation of a public class as Markdown: signature, docstring, example, methods and properties.

    name: the class in ``specdec``. example: Markdown that follows the docstring.
    """
    made = getattr(specdec, name)
    tree = parsed(made)
    bases = [ast.unparse(base) for base in tree.bases if ast.unparse(base) not in ("ABC", "TypedDict", "NamedTuple")]
    inner = [each for each in tree.body if isinstance(each, Function) and ast.get_docstring(each) is not None]
    init = next((each for each in tree.body if isinstance(each, Function) and each.name == "__init__"), None)
    keywords = getattr(made, "__total__", None) is False
    takes = keywords or hasattr(made, "__dataclass_fields__") or hasattr(made, "_fields")
    fields = list(fields_of(tree)) if takes else []
    if keywords:  # also those of options that are not public themselves
        inner_bases = [base for base in made.__orig_bases__ if base.__name__ not in ("TypedDict", *specdec.__all__)]
        fields += [field for base in inner_bases for field in fields_of(parsed(base))]
        bases = [base for base in bases if base in specdec.__all__]
    parts = [f"### {name}", ""]
    if init is not None:
        parts += signature(f"class {name}", init)
        checked = marks(init) | marks(tree)
    else:
        shown = f"class {name}({', '.join(bases)})" if bases and (keywords or not fields) else f"class {name}"
        parts += lines(shown, [] if keywords else [argument(*field) for field in fields])
        checked = marks(tree)
    parts += described(ast.get_docstring(tree) or "", "checked" in " ".join(checked))
    parts += [example, ""]
    if keywords:
        parts += ["| option | type |", "|---|---|"]
        parts += [f"| `{field}` | {cell(kind)} |" for field, kind, _ in fields] + [""]
    for each in inner:
        if not each.name.startswith("_") and "overload" not in marks(each):
            parts += member(name, each)
    return "\n".join(parts).rstrip()


def fields_of(tree: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Yield (name, type, default) of each field that the constructor of a dataclass takes; default None: it has none.

    tree: the syntax tree of the class.
    """
    for each in tree.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            default = each.value
            if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
                if any(given.arg == "init" for given in default.keywords):
                    continue
                default = next((g.value for g in default.keywords if g.arg == "default"), ast.Constant(...))
            yield each.target.id, each.annotation, default


def marks(tree: Function | ast.ClassDef) -> set[str]:
    return {ast.unparse(each) for each in tree.decorator_list}


def member(owner: str, tree: Function) -> list[str]:
    """Return the documentation of a method or property as lines of Markdown.

    owner: name of its class. tree: its syntax tree.
    """
    own, doc = marks(tree), ast.get_docstring(tree) or ""
    if "property" in own:
        kind = f"Property, `{simple(tree.returns)}`." if tree.returns else "Property."
        return [f"#### {owner}.{tree.name}", "", kind, "", *described(doc, False)]
    word = "async def" if isinstance(tree, ast.AsyncFunctionDef) else "def"
    head = ["@classmethod"] * ("classmethod" in own)
    found = signature(f"{word} {tree.name}", tree)
    return [f"#### {owner}.{tree.name}", "", found[0], *head, *found[1:], *described(doc, "checked" in own)]


def signature(name: str, tree: Function) -> list[str]:
    """Return the signature of a function as lines of a Markdown code block, without ``self``.

    name: what stands before the parentheses, such as "def generate". tree: the function's syntax tree.
    """
    given = tree.args
    plain = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    shown = [argument(a.arg, a.annotation, d) for a, d in zip(plain, defaults, strict=True)]
    shown = [each for each in shown if each not in ("self", "cls")]
    if given.vararg is not None:
        shown.append(f"*{argument(given.vararg.arg, given.vararg.annotation, None)}")
    elif given.kwonlyargs:
        shown.append("*")
    pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    shown += [argument(a.arg, a.annotation, d) for a, d in pairs]
    if given.kwarg is not None:
        shown.append(f"**{argument(given.kwarg.arg, given.kwarg.annotation, None)}")
    returns = f" -> {simple(tree.returns)}" if tree.returns is not None and tree.name != "__init__" else ""
    return lines(name, shown, returns)


def lines(name: str, shown: list[str], returns: str = "") -> list[str]:
    """Return a signature as lines of a Markdown code block, with an argument in each line if it is long.

    name: what stands before the parentheses. shown: the arguments as text. returns: what stands after the parentheses.
    """
    whole = f"{name}({', '.join(shown)}){returns}" if shown or not name.startswith("class") else name
    if len(whole) > WIDTH:
        whole = "\n".join([f"{name}(", *(f"    {each}," for each in shown), f"){returns}"])
    return ["```py", *whole.splitlines(), "```", ""]


def argument(name: str, kind: ast.expr | None, default: ast.expr | None) -> str:
    text = name if kind is None else f"{name}: {simple(kind)}"
    if default is None:
        return text
    shown = "..." if isinstance(default, ast.Constant) and default.value is ... else ast.unparse(default)
    return f"{text} = {shown}" if kind is not None else f"{name}={shown}"


@cache
def aliases() -> dict[str, ast.expr]:
    """Return {name: type} for the type aliases in the package, such as ``Count``, as syntax trees."""
    found = dict[str, ast.expr]()
    for module in TYPES:
        source = Path(str(import_module(f"specdec.{module}").__file__)).read_text("utf-8")
        for each in ast.parse(source).body:
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
                kind = isinstance(each.value, ast.Subscript | ast.BinOp) and re.match("[A-Z][a-z]", each.targets[0].id)
                if kind:
                    found[each.targets[0].id] = each.value
    return found


class Simple(ast.NodeTransformer):
    """A transformer of syntax trees that replaces type aliases by their types and removes rules for checking values."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.visit(aliases()[node.id]) if node.id in aliases() else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        outer = ast.unparse(node.value)
        if outer in ("Annotated", "SkipValidation", "Unpack"):
            inner = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
            return self.visit(inner)  # type: ignore[no-any-return]
        return self.generic_visit(node)  # type: ignore[return-value]


def simple(kind: ast.expr) -> str:
    """Return a type annotation as text, without the package's aliases and rules for checking values."""
    return ast.unparse(Simple().visit(ast.parse(ast.unparse(kind), mode="eval").body))


def cell(kind: ast.expr) -> str:
    """Return a type annotation as text for a cell of a Markdown table, with the bounds of its values."""
    node, bounds = kind, list[str]()
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    while True:
        if isinstance(node, ast.Name) and node.id in aliases():
            node = aliases()[node.id]
        elif isinstance(node, ast.BinOp):  # or None
            node = node.left
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            for each in node.slice.elts[1:]:
                if isinstance(each, ast.Call) and ast.unparse(each.func) == "Field":
                    pairs = [(g.arg, ast.unparse(g.value)) for g in each.keywords if g.arg in signs]
                    bounds += [
                        f"{signs[str(arg)]} {'2**63 - 1' if value == 'MAX_SEED' else value}" for arg, value in pairs
                    ]
            node = node.slice.elts[0]
        else:
            break
    code = simple(kind).replace("|", "\\|")
    return f"`{code}`" + (f", {' and '.join(bounds)}" if bounds else "")


def described(doc: str, checked: bool) -> list[str]:
    """Return a docstring as lines of Markdown; its lines "name: ..." become a list.

    checked: whether wrong arguments raise SpecDecError, which is then said if the docstring does not.
    """
    out, listed = list[str](), False
    for line in doc.splitlines():
        name = NAMED.match(line)
        ends = not line.strip() or line.startswith(("Raises ", "Returns "))
        if name and name[1] not in ("Note", "None"):
            out += [] if listed else [""]
            line, listed = f"- **{name[1]}**{name[2] or ''}: {line[name.end() :]}", True
        elif listed and ends:
            out.append("")
            listed = False
        elif listed:
            line = f"  {line.strip()}"
        out.append(escaped_text(line))
    if checked and "Raises SpecDecError" not in doc:
        out += ["", CHECKS]
    return [re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip(), ""]


def escaped_text(line: str) -> str:
    """Return a line of a docstring as Markdown: brackets are escaped, except between double backticks."""
    parts = line.split("``")
    return "`".join(re.sub(r"([\[\]<])", r"\\\1", part) if place % 2 == 0 else part for place, part in enumerate(parts))


PAGES = {"cli.md": command_line, "api.md": python}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (ROOT / "docs" / page).write_text(write().rstrip() + "\n", "utf-8")
