"""What a chat template reads: its variables, and the keys of a turn. Imports no torch."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes

# Only a message has one of these keys, so an expression that is asked for one is a message.
_OF_MESSAGES = {"role", "content", "tool_calls"}
_FUNCTIONS = {"raise_exception", "strftime_now"}  # transformers gives them to every template
_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")

Access = tuple[str, str | None]  # an expression, and its key that is read; None: any key


class Reads(NamedTuple):
    """What a template reads. keys: of a turn; None where it may read every key."""

    variables: frozenset[str]
    keys: frozenset[str] | None

    def key(self, name: str) -> bool:
        """Return whether the template reads this key of a turn."""
        return self.keys is None or name in self.keys


def reads(template: str) -> Reads:
    """Return what a Jinja template reads. Raise jinja2.TemplateError where it is none."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse(_TAGS.sub("", template))
    accesses = list(_accesses(tree))
    messages = {where for where, key in accesses if key in _OF_MESSAGES}
    keys = {key for where, key in accesses if where in messages}
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    variables = jinja2.meta.find_undeclared_variables(tree) - _FUNCTIONS - (own - _asked(tree))
    if None in keys:
        return Reads(frozenset(variables), None)
    keys |= {
        argument.value
        for node in tree.find_all(nodes.Filter)
        for argument in node.find_all(nodes.Const)
        if node.name in ("attr", "map", "selectattr", "rejectattr", "groupby")
    }
    return Reads(frozenset(variables), frozenset(filter(None, keys)))


def _asked(tree: nodes.Node) -> set[str]:
    """Return the variables that the template sets only where the caller has not."""
    tests = (node.node for node in tree.find_all(nodes.Test) if node.name.endswith("defined"))
    filters = (node.node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d"))
    return {node.name for node in (*tests, *filters) if isinstance(node, nodes.Name)}


def _accesses(tree: nodes.Node) -> Iterator[Access]:
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Filter)):
        match node:
            case nodes.Getattr(node=of, attr="items" | "keys" | "values"):
                yield _name(of), None
            case nodes.Getattr(node=of, attr=key):
                yield _name(of), key
            case nodes.Getitem(node=of, arg=nodes.Const(value=str(key))):
                yield _name(of), key
            case nodes.Getitem(node=of, arg=nodes.Name()):
                yield _name(of), None
            case nodes.Compare(
                expr=nodes.Const(value=str(key)), ops=[nodes.Operand(op="in" | "notin", expr=of)]
            ):
                yield _name(of), key
            case nodes.Filter(node=nodes.Expr() as of, name="tojson" | "string" | "dictsort"):
                yield _name(of), None
    for call in tree.find_all(nodes.Call):
        match call:
            case nodes.Call(
                node=nodes.Getattr(node=of, attr="get"), args=[nodes.Const(value=str(key)), *_]
            ):
                yield _name(of), key


def _name(node: nodes.Node) -> str:
    """Return the same text for the same expression; an index counts as any index."""
    match node:
        case nodes.Name(name=name):
            return name
        case nodes.Getattr(node=of, attr=key):
            return f"{_name(of)}.{key}"
        case nodes.Getitem(node=of, arg=nodes.Const(value=str(key))):
            return f"{_name(of)}.{key}"
        case nodes.Getitem(node=of):
            return f"{_name(of)}[]"
    return f"<{type(node).__name__}>"
