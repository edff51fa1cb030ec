"""Damage valid files: hypothesis strategies for bytes, JSON, YAML, safetensors and zip files."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

DEEP = 100_000  # nested brackets: beyond any parser's limit on recursion
VALUES = (  # JSON texts, some of which only Python accepts, or nobody
    *("null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e-320", "1e999", "-1e999"),
    *(str(2**bits + more) for bits in (31, 32, 53, 60, 63, 64) for more in (-1, 0)),
    *("1" + "0" * 400, "9" * 5000, "NaN", "Infinity", "-Infinity", "[]", "{}", "[[]]", "[null]"),
    *('""', '"0"', '"a b"', '"\\ud800"', '"\\u0000"', '"é😀"', '"../../etc/passwd"', '"/"', '"."'),
    *('"2026-01-01T00:00:00+00:00"', '"9999-99-99"', '"${oc.env:HOME}"', '"%s{}"', '"nan"'),
    *('{"":{}}', '{"a":1,"a":2}', '[0,"a",null,{}]', "[1,2,3]", "[-1]", f'"{"x" * 9000}"', "abc"),
    *("[" * 300 + "]" * 300, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900),
    *("[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "[" * 300 + "0" + "]" * 300),
)
TOKENS = (
    *(text.encode() for text in VALUES),
    *(b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\0", b"\0" * 4096, b"\r\n", b"\n"),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"---\n",
        b"- ",
        b"# ",
        b"\t",
        b" ",
        b"=" * 9,
    ),
    *(b"&a ", b"*a", b"&a [*a, *a]", b"!!python/object:os.system ", b'!!int ""', b"!!timestamp x "),
    *(
        b"!!binary x ",
        b"!!bool x ",
        b"<<: *a",
        b"? ",
        b"| ",
        b"!!float x ",
        b"!!set {a, b}",
        b"!x ",
    ),
    *((2**bits - 1).to_bytes(8, "little") for bits in (8, 16, 31, 32, 60, 63, 64)),
    *((2**bits - 1).to_bytes(4, "little") for bits in (8, 16, 31, 32)),
)
MARK = "\u2603"  # not in the files; stands for a JSON text


def damaged_bytes(draw: Draw, content: bytes, n_edits: int | None = None) -> bytes:
    """Return content after one to four flips, cuts, copies, insertions or replacements."""
    for _ in range(n_edits or draw(st.integers(1, 4))):
        n = len(content)
        # Footers and headers decide what a reader allocates.
        near = draw(st.sampled_from((0, n, None)))
        far = draw(st.integers(0, max(n - 1, 0) if near is None else min(n, 64)))
        start = min(far, max(n - 1, 0)) if near in (0, None) else max(n - 1 - far, 0)
        stop = min(n, start + draw(st.sampled_from((0, 1, 2, 4, 8, 64, 4096))))
        match draw(st.sampled_from(("flip", "insert", "replace", "delete", "copy", "cut", "byte"))):
            case "flip" if n:
                changed = content[start] ^ (1 << draw(st.integers(0, 7)))
                content = content[:start] + bytes([changed]) + content[start + 1 :]
            case "byte" if n:
                changed = draw(st.integers(0, 255))
                content = content[:start] + bytes([changed]) + content[start + 1 :]
            case "insert":
                content = content[:start] + draw(st.sampled_from(TOKENS)) + content[start:]
            case "replace":
                token = draw(st.sampled_from(TOKENS))
                content = content[:start] + token + content[start + len(token) :]
            case "delete":
                content = content[:start] + content[stop:]
            case "copy":
                target = draw(st.integers(0, n))
                content = content[:target] + content[start:stop] + content[target:]
            case "cut":
                content = content[:start]
    return content


def damaged_json(draw: Draw, content: bytes) -> bytes:
    """Return JSON with one to three values or keys replaced, added, removed or repeated."""
    root = [json.loads(content)]
    texts: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = root
        key: Any = 0
        while isinstance(child := parent[key], (dict, list)) and child:
            if parent is not root and draw(st.integers(0, 3)) == 0:
                break
            parent, key = child, draw(st.sampled_from(list(_keys(child))))
        text = draw(st.sampled_from(VALUES))
        match draw(st.sampled_from(("value", "value", "value", "remove", "add", "rename", "type"))):
            case "remove" if parent is not root:
                del parent[key]
                continue
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(("", "extra", "../x", "é", *map(str, parent))))] = MARK
            case "rename" if isinstance(parent, dict):
                parent[draw(st.sampled_from(("", "extra", "../x", "\ud800")))] = parent.pop(key)
                continue
            case "type":
                value = parent[key]
                parent[key] = draw(
                    st.sampled_from(([value], {"a": value}, str(value), [value] * 3))
                )
                continue
            case _:
                parent[key] = MARK
        texts.append(text)
    encoded = json.dumps(root[0])
    for text in texts:
        encoded = encoded.replace(json.dumps(MARK), text, 1)
    return encoded.encode("utf-8", "surrogatepass")


def _keys(container: Any) -> Any:
    return container.keys() if isinstance(container, dict) else range(len(container))


def damaged_lines(draw: Draw, content: bytes) -> bytes:
    """Return JSON lines with some lines damaged, removed, repeated or moved."""
    lines = content.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, max(len(lines) - 1, 0)))
        match draw(st.sampled_from(("json", "json", "json", "remove", "copy", "bytes"))):
            case "json" if lines:
                try:
                    lines[index] = damaged_json(draw, lines[index]) + b"\n"
                except (ValueError, RecursionError):  # damaged before
                    lines[index] = damaged_bytes(draw, lines[index])
            case "remove" if lines:
                del lines[index]
            case "copy" if lines:
                lines.insert(draw(st.integers(0, len(lines))), lines[index])
            case _ if lines:
                lines[index] = damaged_bytes(draw, lines[index])
    return b"".join(lines)


def damaged_yaml(draw: Draw, content: bytes) -> bytes:
    """Return YAML with other values (JSON is YAML)."""
    import yaml

    values = yaml.safe_load(content)
    return damaged_json(draw, json.dumps(values, default=str).encode())


def damaged_safetensors(draw: Draw, content: bytes) -> bytes:
    """Return a safetensors file with another header, header length or data."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match draw(st.sampled_from(("header", "header", "length", "data"))):
        case "header":
            header = damaged_json(draw, header)
            length = len(header)
        case "length":
            lengths = (0, 1, length - 1, length + 1, 2**31, 2**60, 2**63, 2**64 - 1)
            length = draw(st.sampled_from(lengths))
        case _:
            data = damaged_bytes(draw, data)
    return length.to_bytes(8, "little") + header + data


def damaged_zip(draw: Draw, content: bytes) -> bytes:
    """Return a zip file, as of `torch.save`, in which one member is damaged, with a valid CRC."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    pickles = [name for name in names if name.endswith("data.pkl")]
    name = draw(st.sampled_from(pickles * 3 + names))
    members[name] = damaged_bytes(draw, members[name])
    if draw(st.integers(0, 9)) == 0:
        del members[draw(st.sampled_from(names))]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return target.getvalue()


BY_KIND = {
    "bytes": damaged_bytes,
    "json": damaged_json,
    "lines": damaged_lines,
    "yaml": damaged_yaml,
    "safetensors": damaged_safetensors,
    "zip": damaged_zip,
}


@st.composite
def damaged(draw: Draw, content: bytes, kind: str) -> bytes:
    """Return damaged content of a file: by its structure, by bytes or both."""
    mode = draw(st.integers(0, 3)) if kind != "bytes" else 3
    if mode < 3:
        content = BY_KIND[kind](draw, content)
    return damaged_bytes(draw, content) if mode >= 2 else content
