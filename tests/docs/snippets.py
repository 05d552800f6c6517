"""The Python of a page, run from the page itself: ``python -m tests.docs.snippets PAGE ...`` renews what it shows.

Blocks of ``python`` run one after the other, in one namespace and an empty folder. A block of ``text`` after one is
what it prints; ``...`` on a line of its own stands for any lines. Code of other libraries, which is not run, is in
blocks of ``py``. A block of ``py`` with a title is written to the file that it names, and a block of ``bash`` by which
``torchrun`` starts this file is run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^```(?P<kind>\w+)(?: title=\"(?P<title>[\w.]+)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]*\]\((\w+\.svg)\)")


@dataclass
class Snippet:
    """A block of code, where it stands, and the output that the page shows."""

    code: str
    line: int
    kind: str = "python"
    title: str | None = None  # of a file
    shown: str | None = None
    span: tuple[int, int] = (0, 0)  # of the output within the page


def snippets(text: str) -> list[Snippet]:
    """Return the Python of a page."""
    found: list[Snippet] = []
    for block in BLOCK.finditer(text):
        kind, title, code = block["kind"], block["title"], block["code"]
        starts = kind == "bash" and code.startswith("torchrun ") and code.split()[-1] in {one.title for one in found}
        if kind == "python" or (kind == "py" and title) or starts:
            found.append(Snippet(code, text.count("\n", 0, block.start()) + 1, kind, title))
        elif kind == "text" and found and found[-1].shown is None:
            found[-1].shown, found[-1].span = code, block.span("code")
    return found


def run(page: Path) -> Iterator[tuple[Snippet, str]]:
    """Run the Python of a page in the current folder; yield each block with what it printed."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in snippets(page.read_text(encoding="utf-8")):
        if snippet.title is not None:
            Path(snippet.title).write_text(snippet.code, encoding="utf-8")
            yield snippet, ""
            continue
        if snippet.kind == "bash":
            yield snippet, _torchrun(snippet.code)
            continue
        printed = io.StringIO()
        code = compile("\n" * snippet.line + snippet.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        yield snippet, printed.getvalue()


def _torchrun(command: str) -> str:
    """Run a command of torchrun with this Python, one thread per process, and return what it printed."""
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def shape(text: str) -> list[str]:
    """Return the words of an output without what differs from machine to machine: numbers, widths of columns."""
    plain = re.sub(r"[-+]?\d[\d,.]*(e-?\d+)?%?", "#", text)
    plain = re.sub(r"\[[#, ]+\]", "[#]", plain)
    return [" ".join(line.split()) for line in plain.strip().splitlines()]


def agrees(printed: str, shown: str) -> bool:
    """Compare an output with what the page shows.

    Examples:
        >>> agrees("epoch 1\\nmember 0  0.25\\nensemble  0.50", "...\\nensemble  0.49")
        True
        >>> agrees("member 0  0.25\\nensemble  0.50", "ensemble  0.50")
        False
    """
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in shape(shown))
    return re.fullmatch(pattern, "".join(line + "\n" for line in shape(printed))) is not None


def renew(page: Path) -> None:
    """Put what the code prints now, and the pictures that it saves, into the page."""
    text, home = page.read_text(encoding="utf-8"), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            done = list(run(home / page))
        finally:
            os.chdir(home)
        for name in PICTURE.findall(text):
            if (Path(folder) / name).exists():
                shutil.copy(Path(folder) / name, page.parent / name)
    for snippet, printed in reversed(done):
        if snippet.shown is not None and "..." not in snippet.shown.splitlines():
            text = text[: snippet.span[0]] + printed.rstrip() + "\n" + text[snippet.span[1] :]
        elif snippet.shown is not None and not agrees(printed, snippet.shown):
            print(f"{page}:{snippet.line} prints\n{printed}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        renew(Path(name))
