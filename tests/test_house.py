"""The house rules of cassbackup.py, read off its own source. SEEDS, at the end, proves that each can be broken."""

from __future__ import annotations

import ast
import re
import symtable
from collections.abc import Callable
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[1] / "cassbackup.py"
MAX_FUNCTION, MAX_LOCKS = 50, 1
# What may stand in one room, or two, and nowhere else.
HOMES = {
    "Command line": "argparse print os.environ os.getenv sys.exit",
    "Ledger": "sqlite3",
    "Prune": "sqlite3",  # a temporary file, instead of memory
    "Pinner": "pyinotify",
    "Stores": "boto3 botocore google requests os.environ",  # the SDKs have variables of their own
    "Cloud": "requests",
    "Daemon": "prometheus_client",
}
LAZY = {"boto3", "botocore", "google", "pyinotify", "prometheus_client", "requests"}  # imported when they are needed
# These work on a machine that has nothing but the bucket.
BUCKET_ROOMS, NODE_ROOMS = {"Catalog", "Choose", "Restore", "Verify", "Prune", "Report"}, {"Ledger", "Pinner"}
# To write a file whole has nothing to do with watching; it merely stands where it is first needed.
LOCKS = {"threading.Lock", "threading.RLock", "threading.Condition", "threading.Semaphore"}
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
CONTAINERS = {"dict", "list", "set", "bytearray", "defaultdict", "Counter", "deque", "Queue", "Event", "Lock"}


class House:
    """A module, its banners as (line, room), and its top-level statements."""

    def __init__(self, source: str) -> None:
        self.source, self.lines, self.tree = source, source.splitlines(), ast.parse(source)
        self.nodes = list(ast.walk(self.tree))
        rule = re.compile(r"^# =+\n# (.+)\n# =+$", re.MULTILINE)
        self.banners = [(source.count("\n", 0, found.start()) + 1, found[1]) for found in rule.finditer(source)]
        self.functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    def room(self, node: ast.AST) -> str:
        """Return the room in which a node stands, "" above the first banner."""
        return next((name for start, name in reversed(self.banners) if start <= getattr(node, "lineno", 0)), "")

    def names(self, statement: ast.stmt) -> tuple[set[str], set[str]]:
        """Return which names of the module a top-level statement makes, and which it uses, at any depth."""
        first = min([statement.lineno, *(one.lineno for one in getattr(statement, "decorator_list", []))])
        # Compiled alone, without the module's __future__ import, so that annotations count as uses.
        table = symtable.symtable("\n".join(self.lines[first - 1 : statement.end_lineno]), "house", "exec")
        makes = {one.get_name() for one in table.get_symbols() if one.is_assigned() or one.is_imported()}
        scopes, uses = [table], set()
        while scopes:
            scope = scopes.pop()
            scopes += scope.get_children()
            found = [one for one in scope.get_symbols() if one.is_referenced() and (scope is table or one.is_global())]
            uses |= {one.get_name() for one in found}
        return makes, uses


def at(node: ast.AST, what: str) -> str:
    return f"line {getattr(node, 'lineno', 0)}: {what}"


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def names_used_before_they_are_defined_or_defined_twice(house: House) -> list[str]:
    statements = [(one, *house.names(one)) for one in house.tree.body]
    places = {name: index for index, (_, makes, _) in reversed(list(enumerate(statements))) for name in makes}
    early = [(one, {name for name in uses if places.get(name, -1) > i}) for i, (one, _, uses) in enumerate(statements)]
    twice = [(one, {name for name in makes if places[name] < i}) for i, (one, makes, _) in enumerate(statements)]
    return [at(one, f"{name}: below, or twice") for one, names in [*early, *twice] for name in sorted(names)]


def banners_that_differ_from_the_contents(house: House) -> list[str]:
    contents = (ast.get_docstring(house.tree) or "").partition("\nContents\n")[2]
    rooms = [found[1] for found in re.finditer(r"^ +(\S.*?)  +\S", contents, re.MULTILINE)]
    banners = [name for _, name in house.banners]
    return [] if rooms and rooms == banners else [f"contents: {rooms}, banners: {banners}"]


def functions_too_long(house: House) -> list[str]:
    lengths = {one.name: (one.end_lineno or 0) - one.lineno + 1 for one in house.functions}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > MAX_FUNCTION]


def locks_too_many(house: House) -> list[str]:
    made = [node for node in house.nodes if isinstance(node, ast.Attribute) and ast.unparse(node) in LOCKS]
    return [at(node, "a lock") for node in made[MAX_LOCKS:]]


def names_in_the_wrong_room(house: House) -> list[str]:
    inside = {id(inner) for one in house.functions for inner in ast.walk(one)}
    wrong = []
    for node in house.nodes:
        is_import, room = isinstance(node, ast.Import | ast.ImportFrom), house.room(node)
        for name in names_read(node):
            package = name.partition(".")[0]
            homes = [home for home, names in HOMES.items() if {name, package} & set(names.split())]
            if is_import and package in LAZY and id(node) not in inside:
                wrong.append(at(node, f"{package} is imported before it is needed"))
            # Above the first banner stand the imports of all rooms.
            if homes and room not in homes and (room or not is_import):
                wrong.append(at(node, f"{name} in {room}"))
    return wrong


def names_read(node: ast.AST) -> list[str]:
    """Return the dotted names that a node imports or reads; a local may be called like what is imported late."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load) else ""
    return [] if name.partition(".")[0] in {"", *LAZY} else [name]


def commands_on_the_bucket_that_need_the_node(house: House) -> list[str]:
    rooms = {one: house.room(one) for one in house.tree.body}
    theirs = {name for one, room in rooms.items() if room in NODE_ROOMS for name in house.names(one)[0]}
    ours = [one for one, room in rooms.items() if room in BUCKET_ROOMS or getattr(one, "name", "") == "list_"]
    return [at(one, f"names {name}") for one in ours for name in sorted(house.names(one)[1] & theirs)]


def handlers_that_swallow(house: House) -> list[str]:
    handlers = [node for node in house.nodes if isinstance(node, ast.ExceptHandler)]
    silent = [one for one in handlers if one.type is None or (is_broad(one.type) and not is_told(one))]
    calls = [node for node in house.nodes if isinstance(node, ast.Call) and last_name(node.func) == "suppress"]
    return [at(one, "swallows") for one in [*silent, *(call for call in calls if any(map(is_broad, call.args)))]]


def is_broad(node: ast.expr) -> bool:
    return bool({"Exception", "BaseException"} & {one.id for one in ast.walk(node) if isinstance(one, ast.Name)})


def is_told(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler logs, raises, or hands the exception on."""
    text = "\n".join(map(ast.unparse, handler.body))
    return bool(re.search(r"\blog\.\w+\(|\bset_exception\(|^ *raise\b", text, re.MULTILINE))


def state_of_the_module_that_can_change(house: House) -> list[str]:
    wrong = [at(node, "global") for node in house.nodes if isinstance(node, ast.Global)]
    for node in house.tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            is_final = isinstance(node, ast.AnnAssign) and "Final" in ast.unparse(node.annotation)
            called = {last_name(one.func) for one in ast.walk(node.value) if isinstance(one, ast.Call)}
            if called & CONTAINERS or (isinstance(node.value, DISPLAYS) and not is_final):
                wrong.append(at(node, f"{ast.unparse(node)} can change"))
    return wrong


MODEL = '''"""Model.

Contents
    Stores          where it goes
    Ledger          what we know
    Restore         how it comes back
"""
import sqlite3
# ===
# Stores
# ===
log = logging.getLogger("model")  # a comment
SIZES: Final = {"a": 1}
def store(lock=threading.Lock):
    import boto3
    try:
        return boto3
    except Exception:
        log.exception("why")
# ===
# Ledger
# ===
class Ledger:
    db = sqlite3
# ===
# Restore
# ===
def restore(): return store()
'''
Rule = Callable[[House], list[str]]
SEEDS: list[tuple[Rule, str]] = [
    (names_used_before_they_are_defined_or_defined_twice, "def f(): return Ledger"),
    (names_used_before_they_are_defined_or_defined_twice, "def f(x: restore): pass"),
    (names_used_before_they_are_defined_or_defined_twice, "def restore(): pass"),
    (banners_that_differ_from_the_contents, "# ===\n# Attic\n# ===\n"),
    (functions_too_long, "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
    (locks_too_many, "def f(): return threading.Condition()"),
    (names_in_the_wrong_room, "def f(): import pyinotify"),
    (names_in_the_wrong_room, "from google.cloud import storage"),
    (names_in_the_wrong_room, "def f(): return sqlite3.connect('x')"),
    (names_in_the_wrong_room, "def f(): return os.getenv('x')"),
    (names_in_the_wrong_room, "def f(): print(1)"),
    (commands_on_the_bucket_that_need_the_node, "def list_(): return Ledger()"),
    (handlers_that_swallow, "def f():\n    try: pass\n    except: raise"),
    (handlers_that_swallow, "def f():\n    try: pass\n    except (OSError, Exception): pass"),
    (handlers_that_swallow, "def f():\n    with contextlib.suppress(Exception): pass"),
    (state_of_the_module_that_can_change, "CACHE = {}"),
    (state_of_the_module_that_can_change, "CACHE: Final = (dict(), 1)"),
    (state_of_the_module_that_can_change, "def f():\n    global x"),
]
RULES = list(dict(SEEDS))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules_and_so_does_a_model(rule: Rule) -> None:
    assert rule(House(MODEL)) == []
    assert rule(House(MODULE.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(("rule", "seed"), SEEDS)
def test_every_rule_sees_what_breaks_it(rule: Rule, seed: str) -> None:
    assert rule(House(MODEL.replace("SIZES", f"{seed}\nSIZES"))) != []


def test_every_promise_is_made_and_named_by_a_test() -> None:
    promises = {f"p{number}" for number in range(1, 9)}
    docstring = MODULE.read_text(encoding="utf-8").lower().partition('"""\n')[0]
    tests = "".join(path.read_text(encoding="utf-8") for path in MODULE.parent.glob("tests/test_*.py"))
    assert promises <= set(re.findall(r"\bp[1-8]\b", docstring)) & set(re.findall(r"_(p[1-8])(?=[_(])", tests))
