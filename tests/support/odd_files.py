"""Files as no tool should write them: drawn from a seed, for tests and `benchmarks.attack`.

`odd_content` changes a file of any kind, `odd_text` texts, `odd_bytes` the bytes of any file.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from runkey.hashing import sha256_bytes
from runkey.inference.extras import import_extra
from runkey.registry.archive import INDEX

MARKER = "called-by-a-file"
"""A file of this name appears in the current folder if code in an odd file is executed."""
_DEEP = 10_000
RAW_JSON = (
    "1e999", "-1e999", "1" * 5000, "-" + "9" * 400, "0.0" + "1" * 5000, "NaN", "Infinity",
    "[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * _DEEP,
    '"\\ud800"', '"\\u0000"', '"\\u202e\\u001b[31m"', '"a\\qb"', '"', "'x'", "01", "+1", "0x1f",
    '{"a": 1, "a": 2}', "// no", "[1, 2,]", "tru", "\t", "\x00", '"' + "x" * 100_000 + '"',
)  # fmt: skip
RAW_YAML = (
    "2020-13-45", "2020-02-30T25:61:61", "!!int abc", "!!int ''", "!!float x", "!!bool x",
    "!!timestamp x", "!!binary '%'", "!!null 5", "!!set [a]", "!!omap [a: 1]", "!!str [1]",
    f'!!python/object/apply:os.system ["touch {MARKER}"]',
    f'!!python/object/new:os.system ["touch {MARKER}"]',
    "*nope", "&a [*a]", "{a: 1, a: 2}", "{[1]: 2}", "{? {a: 1} : 2}", "1:30:45", "0o17", "0b12",
    ".inf", "-.inf", ".nan", "9" * 5000, "1e999", "|", ">-\n  x", "@x", "`x`", "%x", "'",
    '"\\ud800"', "[" * _DEEP + "]" * _DEEP, "[" * 60_000, "{a: " * _DEEP + "1" + "}" * _DEEP,
    "- " * 5000 + "x",
    "[&a [x,x,x,x,x,x,x,x,x], "
    + ", ".join(
        f"&{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]",
    "<<: 5", "? x", "\x00", "\x1b[31m", "\ufeff", "~", "", "[]", "{}", "-1", "true", "x" * 50_000,
)  # fmt: skip
RAW_XML = (
    "", "-5", "nan", "1e999", "9" * 5000, "x", "&nope;", "&a;", "<", "]]>", "<![CDATA[7]]>", "&#0;",
    "\x00", "\x1b[31m", "<!-- 5 -->", "<b>" * _DEEP + "</b>" * _DEEP, "<b>" * _DEEP, "&#x202e;",
    "<?x y?>", "1 2", "../../outside", "1" * 100_000, "1,5", "&passwd;",
)  # fmt: skip
_ENTITIES = (
    '<!DOCTYPE x [<!ENTITY a "7">]>',
    '<!DOCTYPE x [<!ENTITY passwd SYSTEM "file:///etc/passwd"><!ENTITY a "&passwd;">]>',
    '<!DOCTYPE x [<!ENTITY % p SYSTEM "http://127.0.0.1:9/"> %p;]>',
    "<!DOCTYPE x ["
    + '<!ENTITY z "lol">'
    + "".join(
        f'<!ENTITY {a} "{f"&{b};" * 10}">' for a, b in zip("ihgfedcba", "zihgfedcb", strict=True)
    )
    + "]>",
)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**70), 10**30, 1.5, -0.0,
    1e308, float("nan"), float("inf"), "", " ", "x", "5", "nan", "../../outside", "/etc/passwd",
    "a" * 5000, "\u202e\x1b[31m\x00", "\ud800", "2020-13-45", "rk2-" + "0" * 64, "a\nb", "$_{x",
    [], {}, [[]], [None], {"": None}, ["x"] * 3, {"key": 1}, [1, 2, 3, 4], [[1, 2], [3]],
)  # fmt: skip


def odd_content(
    kind: str, before: bytes, path: Path, draw: random.Random
) -> tuple[str, bytes | str]:
    """Change a file of a kind; for sqlite in its place.

    Args:
        kind: json, jsonl, yaml, xml, rows (words in lines), zip, weights, image, sqlite,
            onnx (its metadata) or bytes.
        before: what is in the file at `path`.

    Returns:
        What was done, and for `place_odd` the bytes, or the name of something that is no file.
    """
    if draw.random() < 0.04:
        what = draw.choice(("folder", "pipe", "link to itself", "link to /dev/zero", "gone"))
        return what, what
    if kind == "sqlite":
        return _odd_cells(path, draw), "changed"
    if kind == "zip" and draw.random() < 0.8:
        return _odd_zip(before, draw, INDEX)
    if kind == "weights" and draw.random() < 0.6:
        return _odd_safetensors(before, draw)
    if kind == "image" and draw.random() < 0.5:
        return _odd_png(draw)
    if kind == "onnx":
        return _odd_metadata(before, draw)
    if kind in ("json", "jsonl", "yaml", "xml", "rows"):
        return odd_text(before.decode(), kind, draw)
    return odd_bytes(before, draw)


def place_odd(path: Path, content: bytes | str) -> None:
    """Put what `odd_content` made in the place of a file."""
    if content == "changed":
        return
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content.startswith("link"):
        path.symlink_to(path if "itself" in content else "/dev/zero")


def odd_value(draw: random.Random) -> Any:
    """A value of a wrong type, range or length."""
    return copy.deepcopy(draw.choice(_VALUES))


def odd_text(text: str, kind: str, draw: random.Random) -> tuple[str, bytes]:
    """Change text of a kind, see `odd_content`; return what was done, and the bytes."""
    if draw.random() < 0.2:
        return odd_bytes(text.encode(), draw)
    if kind in ("yaml", "xml", "rows"):
        return {"yaml": _odd_yaml, "xml": _odd_xml, "rows": _odd_rows}[kind](text, draw)
    if kind == "jsonl":
        lines = text.splitlines()
        place = draw.randrange(len(lines))
        what, changed = _odd_json(lines[place], draw)
        lines[place] = changed.decode("utf-8", "surrogatepass")
        return what, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    return _odd_json(text, draw)


def _odd_json(text: str, draw: random.Random) -> tuple[str, bytes]:
    tree = json.loads(text)
    raw, what = "", ""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = _places(tree)
        if not places:
            tree = odd_value(draw)
            return "whole", json.dumps(tree).encode()
        holder, name = draw.choice(places)
        action = draw.random()
        what = f"{name}"
        if action < 0.15:
            del holder[name]
        elif action < 0.25 and isinstance(holder, list):
            holder.append(holder[name])
        elif action < 0.25:
            holder[f"{name}2"] = holder.pop(name)
        elif action < 0.5 and not raw:
            raw = draw.choice(RAW_JSON)
            holder[name] = "@@raw@@"
        else:
            holder[name] = odd_value(draw)
    return f"json {what}", json.dumps(tree).replace('"@@raw@@"', raw).encode()


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Container and index of every value, fewer of the deep ones."""
    found, waiting = [], [tree]
    while waiting and len(found) < 3000:
        holder = waiting.pop(0)
        names = holder.keys() if isinstance(holder, dict) else range(len(holder))
        for name in names:
            found.append((holder, name))
            if isinstance(holder[name], dict | list):
                waiting.append(holder[name])
    return found if isinstance(tree, dict | list) else []


def _odd_yaml(text: str, draw: random.Random) -> tuple[str, bytes]:
    lines = text.splitlines()
    numbers = [i for i, line in enumerate(lines) if re.match(r"\s*(- )?[\w./-]+:", line)]
    place = draw.choice(numbers)
    head = re.match(r"\s*(- )?[\w./-]+:", lines[place])
    assert head
    action = draw.random()
    if action < 0.1:
        del lines[place]
    elif action < 0.15:
        lines[place] = " " + lines[place]
    elif action < 0.2:
        lines.insert(place, lines[place])
    elif action < 0.7:
        lines[place] = f"{head[0]} {draw.choice(RAW_YAML)}"
    else:
        lines[place] = f"{head[0]} {json.dumps(odd_value(draw))}"
    return f"yaml {head[0].strip()}", ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _odd_xml(text: str, draw: random.Random) -> tuple[str, bytes]:
    """Change an element's text or name, leave it out or repeat it, or declare entities."""
    elements = list(re.finditer(r"<(\w+)>([^<]*)</\1>", text))
    chosen = draw.choice(elements)
    name, action = chosen[1], draw.random()
    raw = draw.choice(RAW_XML)
    changed = {
        0: "",
        1: chosen[0] * 2,
        2: f"<{name[1:]}2>{chosen[2]}</{name[1:]}2>",
        3: f"<{name}>{chosen[2]}",
    }.get(int(action * 16), f"<{name}>{raw}</{name}>")
    text = text[: chosen.start()] + changed + text[chosen.end() :]
    if draw.random() < 0.3 or raw in ("&a;", "&passwd;"):
        text = draw.choice(_ENTITIES) + text
    return f"xml {name}", text.encode()


def _odd_rows(text: str, draw: random.Random) -> tuple[str, bytes]:
    """Change a word of a line, leave it out or repeat it; or the line."""
    lines = [line.split(" ") for line in text.splitlines()]
    row, action = draw.randrange(len(lines)), draw.random()
    words = lines[row]
    place = draw.randrange(len(words))
    if action < 0.1:
        del words[place]
    elif action < 0.2:
        words.insert(place, words[place])
    elif action < 0.3:
        lines[row:row] = [words] * draw.choice((1, 100_000))
    elif action < 0.6:
        words[place] = draw.choice((*RAW_JSON, "1e-400", "٣", "1_0", "0x1", "1,5", "--1", "-0"))
    else:
        value = odd_value(draw)
        words[place] = value if isinstance(value, str) else json.dumps(value)
    changed = "\n".join(map(" ".join, lines)) + "\n"
    return f"row {row}", changed.encode("utf-8", "surrogatepass")


def odd_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Change the bytes of any file; return what was done, and the bytes."""
    half = draw.randrange(len(data) + 1)
    flipped = bytearray(data)
    for _ in range(draw.choice((1, 3, 30))):
        if flipped:
            flipped[draw.randrange(len(flipped))] = draw.randrange(256)
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[:half],
        "empty": lambda: b"",
        "zeros": lambda: bytes(len(data)),
        "zeros at the end": lambda: data[:half] + bytes(len(data) - half),
        "flipped": lambda: bytes(flipped),
        "inserted": lambda: data[:half] + draw.randbytes(8) + data[half:],
        "byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode("latin-1").encode("utf-16"),
        "latin-1": lambda: data[:half] + b"\xe4\xf6" + data[half:],
        "twice": lambda: data * 2,
        "turned": lambda: data[half:] + data[:half],
        "noise": lambda: draw.randbytes(200),
        "spaces": lambda: b" " * 3_000_000,
        "brackets": lambda: b"[" * 300_000,
        "digits": lambda: b"9" * 300_000,
        "pickle": lambda: f"cos\nsystem\n(S'touch {MARKER}'\ntR.".encode(),
    }
    what = draw.choice(list(ways))
    return what, ways[what]()


def _odd_png(draw: random.Random) -> tuple[str, bytes]:
    """A small PNG whose header promises another size, depth or colour than it holds."""
    size = draw.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1))
    depth, colour = draw.choice((0, 1, 8, 16, 77)), draw.choice((0, 2, 3, 4, 6, 9))
    header = struct.pack(">IIBBBBB", size, draw.choice((1, 48, size)), depth, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return f"PNG {size} {depth} {colour}", b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _odd_safetensors(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Change the header of a safetensors file, or promise another length of it."""
    if draw.random() < 0.3:
        length = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data) * 2))
        return f"header of {length}", length.to_bytes(8, "little") + data[8:]
    length = int.from_bytes(data[:8], "little")
    what, header = _odd_json(data[8 : 8 + length].decode(), draw)
    return what, len(header).to_bytes(8, "little") + header + data[8 + length :]


def _odd_metadata(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Change the card in the metadata of an ONNX file."""
    model = import_extra("onnx").load_model_from_string(data)
    (entry,) = model.metadata_props
    what, text = _odd_json(entry.value, draw)
    entry.value = text.decode("utf-8", "replace")
    return what, model.SerializeToString()


def _odd_zip(data: bytes, draw: random.Random, index: str) -> tuple[str, bytes]:
    """Change a member of an archive; its list of members, a JSON file, is honest about it."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    name = draw.choice(list(members))
    content = members[name]
    if name.endswith(".json"):
        what, content = odd_text(content.decode(), "json", draw)
    else:
        what, content = odd_bytes(content, draw)
    target = name if draw.random() < 0.8 else draw.choice(_BAD_NAMES)
    members[target] = content
    if name != index and draw.random() < 0.9:
        listed = json.loads(members[index])
        listed["members"][target] = {"size": len(content), "sha256": sha256_bytes(content)}
        members[index] = json.dumps(listed).encode()
    target_file = io.BytesIO()
    with zipfile.ZipFile(target_file, "w") as new:
        for member, inner in members.items():
            new.writestr(member, inner)
    return f"{name} as {target}: {what}", target_file.getvalue()


_BAD_NAMES = (
    "../outside", "/tmp/outside", "run/../../outside", ".git/hooks/post-checkout",
    "run/.dvc/config", "a\\..\\b", "C:x", "x" * 2000, "run/\x1b[31m", "run/\u202e",
    "objects/zz/../../../x", "lock",
)  # fmt: skip


def _odd_cells(path: Path, draw: random.Random) -> str:
    """Change cells of the cache of runs, as a broken program would."""
    columns = (
        "run key name status started ended experiment artifact_uri metrics tags params details"
    )
    column = draw.choice(columns.split())
    value = odd_value(draw)
    if draw.random() < 0.4:
        value = draw.choice(RAW_JSON)
    elif not isinstance(value, str | float | None):
        value = json.dumps(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()
    with closing(sqlite3.connect(path)) as database:
        few = " WHERE rowid = 1" if draw.random() < 0.7 else ""
        try:
            database.execute(f"UPDATE runs SET {column} = ?{few}", (value,))
        except sqlite3.IntegrityError:
            database.execute("DELETE FROM runs")
        database.commit()
    return f"{column} = {str(value)[:60]!r}"
