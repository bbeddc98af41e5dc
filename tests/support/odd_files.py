"""Files as no tool should write them: drawn from a seed, for tests and `benchmarks.attack`.

`odd_text(text, kind, draw)` changes JSON, JSON lines or YAML; `odd_bytes(data, draw)` any file.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from runkey.hashing import sha256_bytes

MARKER = "called-by-a-file"
"""A file of this name appears in the current folder if code in an odd file is executed."""
_DEEP = 10_000
RAW_JSON = (
    *("1e999", "-1e999", "1" * 5000, "-" + "9" * 400, "0.0" + "1" * 5000, "NaN", "Infinity"),
    *("[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * _DEEP),
    *('"\\ud800"', '"\\u0000"', '"\\u202e\\u001b[31m"', '"a\\qb"', '"', "'x'", "01", "+1", "0x1f"),
    *('{"a": 1, "a": 2}', "// no", "[1, 2,]", "tru", "\t", "\x00", '"' + "x" * 100_000 + '"'),
)
RAW_YAML = (
    *("2020-13-45", "2020-02-30T25:61:61", "!!int abc", "!!int ''", "!!float x", "!!bool x"),
    *("!!timestamp x", "!!binary '%'", "!!null 5", "!!set [a]", "!!omap [a: 1]", "!!str [1]"),
    f'!!python/object/apply:os.system ["touch {MARKER}"]',
    f'!!python/object/new:os.system ["touch {MARKER}"]',
    *("*nope", "&a [*a]", "{a: 1, a: 2}", "{[1]: 2}", "{? {a: 1} : 2}", "1:30:45", "0o17", "0b12"),
    *(
        ".inf",
        "-.inf",
        ".nan",
        "9" * 5000,
        "1e999",
        "|",
        ">-\n  x",
        "@x",
        "`x`",
        "%x",
        "'",
        '"\\ud800"',
    ),
    *(
        "[" * _DEEP + "]" * _DEEP,
        "[" * 60_000,
        "{a: " * _DEEP + "1" + "}" * _DEEP,
        "- " * 5000 + "x",
    ),
    "[&a [x,x,x,x,x,x,x,x,x], "
    + ", ".join(
        f"&{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]",
    *(
        "<<: 5",
        "? x",
        "\x00",
        "\x1b[31m",
        "\ufeff",
        "~",
        "",
        "[]",
        "{}",
        "-1",
        "true",
        "x" * 50_000,
    ),
)


def odd_value(draw: random.Random) -> Any:
    """A value of a wrong type, range or length."""
    return draw.choice(
        (
            *(
                None,
                True,
                False,
                0,
                -1,
                2**31,
                2**53 + 1,
                2**63,
                2**64,
                -(2**70),
                10**30,
                1.5,
                -0.0,
            ),
            *(
                1e308,
                float("nan"),
                float("inf"),
                "",
                " ",
                "x",
                "5",
                "nan",
                "../../outside",
                "/etc/passwd",
            ),
            *(
                "a" * 5000,
                "\u202e\x1b[31m\x00",
                "\ud800",
                "2020-13-45",
                "rk2-" + "0" * 64,
                "a\nb",
                "$_{x",
            ),
            *([], {}, [[]], [None], {"": None}, ["x"] * 3, {"key": 1}, [1, 2, 3, 4], [[1, 2], [3]]),
        )
    )


def odd_text(text: str, kind: str, draw: random.Random) -> tuple[str, bytes]:
    """Change text of a kind (`json`, `jsonl` or `yaml`); return what was done, and the bytes."""
    if draw.random() < 0.2:
        return odd_bytes(text.encode(), draw)
    if kind == "yaml":
        return _odd_yaml(text, draw)
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


def odd_png(draw: random.Random) -> tuple[str, bytes]:
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


def odd_safetensors(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Change the header of a safetensors file, or promise another length of it."""
    if draw.random() < 0.3:
        length = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data) * 2))
        return f"header of {length}", length.to_bytes(8, "little") + data[8:]
    length = int.from_bytes(data[:8], "little")
    what, header = _odd_json(data[8 : 8 + length].decode(), draw)
    return what, len(header).to_bytes(8, "little") + header + data[8 + length :]


def odd_zip(data: bytes, draw: random.Random, index: str) -> tuple[str, bytes]:
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
    *(
        "../outside",
        "/tmp/outside",
        "run/../../outside",
        ".git/hooks/post-checkout",
        "run/.dvc/config",
    ),
    *("a\\..\\b", "C:x", "x" * 2000, "run/\x1b[31m", "run/\u202e", "objects/zz/../../../x", "lock"),
)
