"""What changes the hash of a Python file, and what does not."""

import ast
import io
import itertools
import os
import random
import re
import shutil
import subprocess
import tokenize
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runkey.errors import RecipeError
from runkey.identity.code import RULE, hash_code, syntax_digest
from runkey.identity.key import make_recipe

REPOSITORY = Path(__file__).parents[2]
RUFF = shutil.which("ruff", path=f"{REPOSITORY}/.venv-tools/bin:{os.environ['PATH']}")
LOGGER = "import logging\nlogger = logging.getLogger(__name__)\n"


@pytest.fixture(scope="module")
def reached():
    """The Python files that training reaches, with their text."""
    files = make_recipe("train", REPOSITORY).preimages["code"]["files"]
    return {path: (REPOSITORY / path).read_text() for path in files}


def digest(text):
    return hash_code("a.py", text.encode() if isinstance(text, str) else text)


def same(a, b):
    return digest(a) == digest(b)


# --- what does not count


SAME = {
    "quotes": ("x = 'a'", 'x = "a"'),
    "a text in two pieces": ("x = 'ab'", "x = ('a'\n  'b')"),
    "an escape": (r"x = 'A\n'", r"x = '\x41\x0a'"),
    "an f-string's quotes": ("x = f'a{y!r:>3}' 'b'", 'x = f"a{y!r:>3}b"'),
    "u before a text": ("x = 'a'", "x = u'a'"),
    "parentheses": ("x = a + b * c", "x = (a + (b * c))"),
    "a tuple's parentheses": ("x = 1, 2", "x = (1, 2)"),
    "a trailing comma": ("f(a, b)", "f(\n    a,\n    b,\n)"),
    "digits in groups": ("x = 1000", "x = 1_000"),
    "another base": ("x = 255", "x = 0xff"),
    "an exponent": ("x = 1000.0", "x = 1e3"),
    "a semicolon": ("a = 1\nb = 2", "a = 1; b = 2"),
    "a line's end": ("a = 1\nb = '''c\nd'''\n", "a = 1\r\nb = '''c\r\nd'''\r\n"),
    "a byte order mark": (b"a = 1", b"\xef\xbb\xbfa = 1"),
    "a declared encoding": ("x = '\u00e4'".encode(), b"# coding: latin-1\nx = '\xe4'"),
    "a type comment": ("x = []", "x = []  # type: list[int]"),
    "a docstring": ("def f():\n    return 1", "def f():\n    'Why.'\n    return 1"),
    "a body that is a docstring": ("class A:\n    pass", "class A:\n    'Why.'"),
    "a docstring of an attribute": ("lr = 1\nseed = 2", "lr = 1\n'Rate.'\nseed = 2"),
    "a docstring of a module": ("x = 1", "'''Why.'''\nx = 1"),
    "a statement of three dots": ("def f(): pass", "def f(): ..."),
    "the unicode form of a name": ("\u212b = 1", "\u00c5 = 1"),
}


@pytest.mark.parametrize("name", SAME)
def test_writing_does_not_count(name):
    assert same(*SAME[name])


DIFFERENT = {
    "int, float": ("x = 1", "x = 1.0"),
    "int, bool": ("x = 1", "x = True"),
    "int, text": ("x = 1", "x = '1'"),
    "text, bytes": ("x = 'a'", "x = b'a'"),
    "float, complex": ("x = 1.0", "x = 1j"),
    "two complex": ("x = 1j", "x = 2j"),
    "the last bit": ("x = 0.1", "x = 0.10000000000000002"),
    "infinity": ("x = 1e999", "x = 1.7e308"),
    "a sign": ("x = 0.0", "x = -0.0"),
    "None, a text": ("x = None", "x = 'None'"),
    "a huge number": (f"x = 0x{'f' * 5000}", f"x = 0x{'f' * 4999}e"),
    "two look-alikes": ("x = '\u00c5'", "x = 'A\u030a'"),
    "half a character": (r"x = '\ud800'", r"x = '\ud801'"),
    "a grouping": ("x = a + b * c", "x = (a + b) * c"),
    "a tuple": ("x = 1", "x = 1,"),
    "a default": ("def f(x=1): pass", "def f(x=2): pass"),
    "a default's place": ("def f(a, b=1): pass", "def f(a=1, b=1): pass"),
    "a keyword-only argument": ("def f(a, b): pass", "def f(a, *, b): pass"),
    "a decorator": ("@a\ndef f(): pass", "def f(): pass"),
    "decorators' order": ("@a\n@b\ndef f(): pass", "@b\n@a\ndef f(): pass"),
    "an annotation": ("x: int = 1", "x: float = 1"),
    "an annotated attribute": ("x: int = 1", "(x): int = 1"),
    "async": ("def f(): pass", "async def f(): pass"),
    "an import's name": ("from a import b", "from a import c as b"),
    "an import's dots": ("from . import b", "from .. import b"),
    "imports' order": ("import a\nimport b", "import b\nimport a"),
    "an else": ("if a:\n  b()\nc()", "if a:\n  b()\nelse:\n  c()"),
    "except order": (
        "try: f()\nexcept A: g()\nexcept B: h()",
        "try: f()\nexcept B: h()\nexcept A: g()",
    ),
    "a text that is used": ("x = ['Why.']", "x = ['How.']"),
    "a returned text": ("def f(): return 'a'", "def f(): return 'b'"),
    "an f-string's format": ("x = f'{y:.2f}'", "x = f'{y:.3f}'"),
    "an f-string's conversion": ("x = f'{y}'", "x = f'{y!r}'"),
    "an error's text": ("raise ValueError('a')", "raise ValueError('b')"),
    "an assertion": ("assert x", "assert x, 'why'"),
    "a lone name": ("x = 1", "x = 1\nx"),
    "a type parameter": ("def f[T](x): pass", "def f[T: int](x): pass"),
    "a case": ("match x:\n  case 1: f()", "match x:\n  case 2: f()"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_python_does_counts(name):
    assert not same(*DIFFERENT[name])


def test_the_rule_is_in_the_hash_and_other_files_are_hashed_by_bytes():
    assert RULE == "ast1"
    # Fixed once and for all: a rule that gives another hash needs another name.
    assert digest("def f(x=1.5):\n    return f'{x!r:>3}' + 'a'\n") == (
        "db269b9ce55e71b2e139a5537860fd5ca318a67685ef7a8620be9b7ccfc5817d"
    )
    assert hash_code("a.csv", b"1,2") != hash_code("a.csv", b"1, 2")
    assert hash_code("a.csv", b"1\r\n") == hash_code("a.csv", b"1\n")
    assert hash_code("a.py", b"x = 1", "bytes") != hash_code("a.py", b"x  = 1", "bytes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "a.py, line 1: '(' was never closed"),
        ("x = 1\n  y = 2", "a.py, line 2: unexpected indent"),
        ("x = '\0'", "a.py, line "),
        ("x = " + "-" * 5000 + "1", "a.py: "),
        ("print(__doc__)", "a.py, line 1: __doc__ reads docstrings or source text, which are not"),
        ("\nf(A.__doc__)", "a.py, line 2: __doc__ reads docstrings"),
        ("getattr(a, '__doc__')", "a.py, line 1: __doc__ reads"),
        ("from inspect import getsource", "a.py, line 1: getsource reads"),
        ("import inspect\ninspect.getdoc(a)", "a.py, line 2: getdoc reads"),
    ],
)
def test_a_file_that_cannot_be_hashed_is_named_in_one_line(text, message):
    with pytest.raises(RecipeError) as caught:
        digest(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# --- log messages


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("logger.info('a')", "logger.info('b')"),
        ("logger.info('a')", "logger.warning('a')"),
        ("logger.info('a')", ""),
        ("if x:\n  logger.info('a %s', y, stacklevel=2)", "if x:\n  pass"),
        ("logger.info(f'a {y} b')", "logger.info('b', z)"),
        ("logger.info('a %s', f(x))", "logger.info('after %s', y, f(x))"),
        ("logger.info(f'a {f(x)}')", "logger.info(f'b {f(x)}')"),
    ],
)
def test_the_text_of_a_log_message_does_not_count(a, b):
    assert same(LOGGER + a, LOGGER + b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("logger.info('a', next(it))", "logger.info('a')"),
        ("logger.info(f'{next(it)}')", "logger.info(f'{it}')"),
        ("logger.info('a', x.item)", "logger.info('a', x)"),
        ("logger.info('a', (y := 3))", "logger.info('a', y)"),
        ("logger.info(f'{y:.2f}')", "logger.info(f'{y}')"),
        ("logger.info('a', *b)", "logger.info('a')"),
        ("logger.info('a', **b)", "logger.info('a')"),
        ("logger.info('a', extra=f())", "logger.info('a')"),
        ("x = logger.info('a')", "x = logger.info('b')"),
        ("logger.setLevel('INFO')", ""),
        ("logger.isEnabledFor(10)", ""),
        ("self.logger.info('a')", "self.logger.info('b')"),
        ("logger.info('a').x", "logger.info('b').x"),
    ],
)
def test_what_a_log_message_runs_counts(a, b):
    assert not same(LOGGER + a, LOGGER + b)


@pytest.mark.parametrize(
    "start",
    [
        "from a import logger\n",
        "logger = Loader()\n",
        "import logging\nlogger = logging.getLogger(f())\n",
        "logger = logging.getLogger(__name__)\n",
        "import mine as logging\nlogger = logging.getLogger(__name__)\n",
        LOGGER + "from mine import *\n",
        LOGGER + "logger = Loader()\n",
        LOGGER + "logger.info = f\n",
        LOGGER + "logging.getLogger = f\n",
        LOGGER + "def f(logger): pass\n",
        LOGGER + "def f():\n  global logger\n",
        LOGGER + "for logger in x: pass\n",
        LOGGER + "try: pass\nexcept A as logger: pass\n",
        LOGGER + "match x:\n  case [*logger]: pass\n",
        LOGGER + "with x as logger: pass\n",
        LOGGER + "class logger: pass\n",
        LOGGER + "import b.c as logger\n",
        LOGGER + "if x:\n  import logging\n",
        "if x:\n  import logging\n  logger = logging.getLogger(__name__)\n",
    ],
)
def test_what_may_be_no_logger_counts(start):
    assert not same(start + "logger.info('a')", start + "logger.info('b')")


# --- every file that training reaches


def with_docstrings_and_comments(text, rng):
    """The file with a comment above every third statement, and a docstring wherever none stands."""
    tree = ast.parse(text)
    lines = text.splitlines()
    inserted = {}
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and body[0].lineno > node.lineno:
            first = body[0]
            line = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))])
            if ast.get_docstring(node) is None:
                inserted[line] = [" " * first.col_offset + f'"""Added {rng.random()}.\n\n  x"""']
        if isinstance(node, ast.stmt) and rng.random() < 0.3:
            line = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            if line not in inserted and lines[line - 1][: node.col_offset].strip() == "":
                inserted[line] = ["", " " * node.col_offset + f"# added {rng.random()}"]
    result = []
    for number, line in enumerate(lines, 1):
        result += [*inserted.get(number, ()), line]
    return "\n".join(result) + "\n"


def rewrapped(text):
    """The file with a line break after every comma and operator in brackets, and other quotes."""
    result, depth, in_format = [], 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, string = token.type, token.string
        in_format += (kind == tokenize.FSTRING_START) - (kind == tokenize.FSTRING_END)
        if kind == tokenize.OP and not in_format:
            depth += (string in "([{") - (string in ")]}")
        if kind == tokenize.COMMENT:
            continue
        if kind == tokenize.STRING and not in_format and re.fullmatch(r"'[^'\"\\]*'", string):
            string = f'"{string[1:-1]}"'
        elif kind == tokenize.STRING and not in_format and re.fullmatch(r'"[^\'"\\]*"', string):
            string = f"'''{string[1:-1]}'''"
        result.append((kind, string))
        if kind == tokenize.OP and string in ",+-*/([{" and depth and not in_format:
            result.append((tokenize.NL, "\n"))
    return tokenize.untokenize(result)


def test_formatting_comments_and_docstrings_do_not_count(reached):
    rng = random.Random(0)
    for path, text in reached.items():
        before = hash_code(path, text.encode())
        for other in (
            ast.unparse(ast.parse(text)),
            with_docstrings_and_comments(text, rng),
            rewrapped(text),
            text.replace("\n", "\n\n") if '"""' not in text else text,
        ):
            assert hash_code(path, other.encode()) == before, path
            assert other != text or len(text.splitlines()) < 20 or '"""' in text, path


@pytest.mark.skipif(RUFF is None, reason="ruff is in no environment of this checkout")
@pytest.mark.parametrize("width", [50, 140])
def test_another_line_length_does_not_count(reached, width, tmp_path):
    for path, text in reached.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    options = f"line-length = {width}\nformat.quote-style = 'single'\n"
    (tmp_path / "ruff.toml").write_text(options + "format.skip-magic-trailing-comma = true\n")
    subprocess.run([RUFF, "format", "-q", "."], cwd=tmp_path, check=True)
    changed = 0
    for path, text in reached.items():
        other = (tmp_path / path).read_bytes()
        assert hash_code(path, other) == hash_code(path, text.encode()), path
        changed += other != text.encode()
    assert changed > len(reached) / 2


def is_log(node):
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="logger")))):
            return True
    return False


def mutations(tree):
    """Pairs (change it, change it back) for every part of a tree that counts."""
    doc = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    logs = {id(n) for log in ast.walk(tree) if is_log(log) for n in ast.walk(log)}

    def field(node, name, value):
        old = getattr(node, name)
        return (lambda: setattr(node, name, value)), (lambda: setattr(node, name, old))

    def swapped(items, at):
        def swap():
            items[at], items[at + 1] = items[at + 1], items[at]

        return swap, swap

    def without(items, at):
        item = items[at]
        return (lambda: items.pop(at)), (lambda: items.insert(at, item))

    others = {
        **{ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Div(), ast.Div: ast.FloorDiv()},
        **{
            ast.FloorDiv: ast.Div(),
            ast.Mod: ast.Mult(),
            ast.Pow: ast.Mult(),
            ast.BitOr: ast.BitAnd(),
        },
        **{ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt()},
        **{ast.Eq: ast.NotEq(), ast.NotEq: ast.Eq(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is()},
        **{ast.In: ast.NotIn(), ast.NotIn: ast.In(), ast.And: ast.Or(), ast.Or: ast.And()},
        **{ast.Not: ast.USub(), ast.USub: ast.UAdd(), ast.MatMult: ast.Mult()},
    }
    for node in ast.walk(tree):
        if id(node) in logs:
            continue
        match node:
            case ast.Constant(value=value) if id(node) not in doc:
                yield "constant", *field(node, "value", other_constant(value))
            case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) | ast.UnaryOp(op=op):
                yield "operator", *field(node, "op", others.get(type(op), ast.MatMult()))
            case ast.Compare(ops=[op, *rest]):
                yield "operator", *field(node, "ops", [others[type(op)], *rest])
            case ast.Name(id=name):
                yield "name", *field(node, "id", f"{name}_")
            case ast.Attribute(attr=name):
                yield "name", *field(node, "attr", f"{name}_")
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield "argument", *field(node, "arg", f"{name}_")
            case ast.alias(name=name):
                yield "import", *field(node, "name", f"{name}_")
            case ast.ImportFrom(level=level):
                yield "import", *field(node, "level", level + 1)
        if isinstance(node, ast.Call):
            for at in range(len(node.args) - 1):
                yield "argument order", *swapped(node.args, at)
            for at in range(len(node.keywords)):
                yield "keyword", *without(node.keywords, at)
        if isinstance(node, ast.arguments):
            for at in range(len(node.args) - 1):
                yield "argument order", *swapped(node.args, at)
            for at in range(len(node.defaults)):
                yield "default", *without(node.defaults, at)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield "name", *field(node, "name", f"{node.name}_")
            for at in range(len(node.decorator_list)):
                yield "decorator", *without(node.decorator_list, at)
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                real = [at for at, one in enumerate(body) if runs(one)]
                for at in real:
                    yield "statement", *without(body, at)
                for at, after in itertools.pairwise(real):
                    if after == at + 1:
                        yield "statement order", *swapped(body, at)


def runs(statement):
    nothing = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not nothing and not isinstance(statement, ast.Pass) and not is_log(statement)


def other_constant(value):
    match value:
        case bool():
            return not value
        case int() | float() | complex():
            return value + 1
        case str():
            return f"{value}_"
        case bytes():
            return value + b"_"
    return 0


def test_every_mutation_counts(reached):
    """Of each file that training reaches a sample of all mutations, drawn by kind."""
    rng, seen = random.Random(1), {}
    for path, text in reached.items():
        tree = ast.parse(text)
        before = syntax_digest(path, tree)
        by_kind = {}
        for kind, change, undo in mutations(tree):
            by_kind.setdefault(kind, []).append((change, undo))
        for kind, found in by_kind.items():
            for change, undo in rng.choices(found, k=2):
                written = ast.dump(tree) if kind.endswith("order") else ""
                change()
                after = syntax_digest(path, tree)
                # Two equal arguments or statements that change places are the same code.
                same_order = kind.endswith("order") and ast.dump(tree) == written
                undo()
                assert (after == before) == same_order, (path, kind)
                seen[kind] = seen.get(kind, 0) + 1
        assert syntax_digest(path, tree) == before
    assert set(seen) == {
        *("constant", "operator", "name", "argument", "import", "argument order", "keyword"),
        *("default", "decorator", "statement", "statement order"),
    }
    assert sum(seen.values()) > 1000


NUMBERS = st.integers() | st.floats(allow_nan=False) | st.booleans()
CONSTANTS = NUMBERS | st.text() | st.binary() | st.none()


@settings(max_examples=200, deadline=None)
@given(CONSTANTS, CONSTANTS)
def test_two_constants_hash_alike_only_if_they_are_the_same(a, b):
    def of(value):
        return ast.unparse(ast.Assign([ast.Name("x")], ast.Constant(value), lineno=1))

    is_same = type(a) is type(b) and repr(a) == repr(b)
    assert same(of(a), of(b)) == is_same
