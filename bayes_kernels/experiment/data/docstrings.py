"""Short texts that every Python installation has: the first paragraphs of docstrings.

:func:`stdlib_corpus` gives those of the standard library with the area that each belongs to,
:func:`library_corpus` those of numpy or torch. :func:`stdlib_docs` makes a classification task of them.

Docstrings of Python modules are read from the sources with ``ast``: no module is imported, so
nothing can open a window or a browser, a missing tkinter or a removed module does no harm, no
deprecation is reported, and neither ``python -OO`` nor what the program has imported or replaced
before changes anything. Extension modules have no sources and are imported, from a
list of modules whose import has no side effect.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...task import Example, Task
from .splits import choose_subset, fraction_of, hash_of

# Modules and packages of each area, all of them optional: what an interpreter lacks (modules
# removed since 3.10, tkinter left out by a distribution) contributes nothing.
AREAS: dict[str, str] = {
    "concurrency": (
        "asyncio concurrent multiprocessing threading _threading_local queue sched subprocess "
        "selectors contextvars signal dummy_threading asyncore asynchat socketserver"
    ),
    "internet": (
        "http urllib ftplib imaplib nntplib poplib smtplib smtpd telnetlib ssl socket xmlrpc "
        "wsgiref cgi cgitb ipaddress webbrowser netrc uuid nturl2path"
    ),
    "text and mail": (
        "email mailbox mailcap mimetypes string textwrap re difflib codecs encodings locale "
        "gettext quopri base64 binhex uu stringprep shlex _strptime sre_parse sre_compile"
    ),
    "numbers and time": (
        "datetime _pydatetime calendar decimal _pydecimal fractions numbers statistics random "
        "_pylong zoneinfo timeit colorsys heapq bisect operator secrets"
    ),
    "files and archives": (
        "pathlib tarfile zipfile gzip bz2 lzma compression _compression zipapp shutil tempfile os "
        "posixpath ntpath genericpath glob fnmatch filecmp fileinput _pyio io dbm shelve stat "
        "linecache mmap sndhdr imghdr wave aifc sunau chunk xdrlib"
    ),
    "language tools": (
        "ast inspect dis pydoc typing unittest doctest bdb pdb trace traceback tokenize "
        "symtable importlib pkgutil modulefinder runpy code codeop compileall py_compile pyclbr "
        "pickletools enum abc _py_abc dataclasses functools types warnings weakref tracemalloc "
        "profile cProfile pstats opcode tabnanny zipimport rlcompleter keyword copyreg "
        "_collections_abc"
    ),
    "markup": "xml html json configparser plistlib tomllib csv _markupbase sgmllib",
    "desktop": "tkinter turtle turtledemo curses",
}

# Extension modules have no source to read; importing these has no side effect.
_EXTENSIONS: dict[str, str] = {
    "concurrency": (
        "_thread _asyncio _queue _multiprocessing _posixsubprocess select _signal _contextvars"
    ),
    "internet": "_socket _ssl",
    "text and mail": (
        "_string _codecs _sre unicodedata _locale binascii builtins:str builtins:bytes"
    ),
    "numbers and time": (
        "math cmath time _datetime _decimal _random _statistics _zoneinfo _bisect _heapq "
        "_operator builtins:int builtins:float builtins:complex"
    ),
    "files and archives": "_io zlib _bz2 _lzma _zstd posix nt mmap _stat _gdbm _dbm fcntl",
    "language tools": (
        "_imp _tracemalloc _warnings _weakref _functools _abc _symtable _ast _opcode marshal gc "
        "sys _lsprof atexit faulthandler"
    ),
    "markup": "_elementtree pyexpat _json _csv",
    "desktop": "_tkinter _curses _curses_panel",
}

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__"})
_DOC_CHARACTERS = 500
_DOC_WORDS = 4

# Names of modules that are also everyday words: removing them would damage ordinary sentences.
_EVERYDAY_WORDS = frozenset(
    "abc array ast bisect calendar chunk code compression concurrent copy csv datetime dbm "
    "decimal email enum fractions functools glob heapq html http io json keyword locale "
    "mailbox math mmap numbers opcode operator os pathlib platform posix profile queue "
    "random re runpy sched secrets select selectors shelve signal socket ssl stat "
    "statistics string symtable sys test time trace traceback turtle types typing uuid "
    "warnings wave weakref xml zipfile".split()
)


# Templates and samples of broken code that some packages ship; ast.parse raises the last two for
# expressions that are nested too deep.
_UNREADABLE = (SyntaxError, ValueError, OSError, RecursionError, MemoryError)


def _documented_sources(path: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of every function, class and method in a source file."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}"
                doc = ast.get_docstring(child, clean=True)
                if doc and not child.name.startswith("_"):
                    yield name, doc
                if isinstance(child, ast.ClassDef):
                    yield from visit(child, name)
            elif isinstance(child, (ast.If, ast.Try, ast.With)):
                yield from visit(child, prefix)

    stem = path.parent.name if path.stem == "__init__" else path.stem
    with warnings.catch_warnings():
        # Old sources have invalid escape sequences, which newer compilers warn about.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except _UNREADABLE:
            return
    yield from visit(tree, stem)


def _documented_extension(name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the functions, types and methods of an extension module."""
    module_name, _, member = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return
    owners: list[tuple[str, Any]] = [(module_name, module)]
    if member:
        owners = [(member, getattr(module, member))]
    else:
        owners += [
            (f"{module_name}.{key}", value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, type) and value.__module__ not in ("builtins", "typing")
        ]
    for owner_name, owner in owners:
        if isinstance(owner, type) and isinstance(owner.__doc__, str):
            yield owner_name, inspect.cleandoc(owner.__doc__)
        for key, value in sorted(vars(owner).items()):
            # Special methods all share the texts of their slots ("Return self<value.").
            if key.startswith("_") or isinstance(value, type) or not callable(value):
                continue
            # Functions of Python come from elsewhere, such as a hook set in sys.
            if inspect.isfunction(value):
                continue
            doc = getattr(value, "__doc__", None)
            if isinstance(doc, str):
                yield f"{owner_name}.{key}", inspect.cleandoc(doc)


_ROLE = re.compile(r":[a-z:+-]+:`([^`]*)`")
# "name(arguments) -> result", also as "result = <instance>.name(arguments)", alone on its line ...
_SIGNATURE = re.compile(
    r"^(?:[^=\n]*=\s*)?(?:<instance>\.)?[\w.]+\s*\([^\n]*(?:\)|->\s*[\w., \[\]|]+)\s*(?:--)?$"
)
# ... and followed by the first sentence.
_CALL = re.compile(r"^[\w.]+\s*\([^()]*\)\s*(?:->\s*[^\n:.]*?)?(?:--|:|\.)?\s+(?=[A-Z])")


def first_paragraph(docstring: str, module_names: frozenset[str] = frozenset()) -> str | None:
    """First paragraph of a docstring that says something in words, on one line.

    Call signatures at the start (usual in extension modules) and the markup of cross-references are
    removed, and so are names of modules that would give the area away: ``asyncio.Queue`` becomes
    ``Queue``, and a module's name that is no everyday word becomes ``module``.

    Returns:
        The paragraph, cut at a word to 500 characters, or None if fewer than four words remain.
    """
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and (lines[0] == "--" or _SIGNATURE.match(lines[0])):
            lines.pop(0)
        if lines and lines[0].startswith(">>>"):
            return None
        text = _ROLE.sub(r"\1", " ".join(lines)).replace("`", "")
        text = _CALL.sub("", " ".join(text.split()))
        # An escape in a source can be half a surrogate pair, which no tokenizer takes.
        text = text.encode("utf-8", "ignore").decode()
        if module_names:
            text = re.sub(
                r"\b([a-z_]\w*)\b(\.(?=[A-Za-z_]))?",
                lambda match: _mask_module(match, module_names),
                text,
            )
        if len(text) > _DOC_CHARACTERS:
            text = text[:_DOC_CHARACTERS].rsplit(" ", 1)[0]
        if len(re.findall(r"[A-Za-z]{2,}", text)) >= _DOC_WORDS:
            return text
        if lines:
            return None
    return None


def _mask_module(match: re.Match[str], module_names: frozenset[str]) -> str:
    name, dot = match.group(1), match.group(2)
    if name not in module_names:
        return match.group(0)
    if dot:
        return ""
    return name if name in _EVERYDAY_WORDS else "module"


def normalise(text: str) -> str:
    """The text up to case, punctuation and white space."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _package_name(path: Path, root: Path) -> str:
    """Dotted name of the package that holds the module ``path``, empty at the root."""
    folder = path.parent.parent if path.stem == "__init__" else path.parent
    return ".".join(folder.relative_to(root).parts)


def _source_files(root: Path, name: str) -> list[Path]:
    """The source files of a module or package, in a fixed order, test folders left out."""
    module = root / f"{name}.py"
    if module.is_file():
        return [module]
    package = root / name
    return [
        path
        for path in sorted(package.rglob("*.py"))
        if not _TEST_FOLDERS.intersection(path.relative_to(package).parts[:-1])
    ]


@functools.cache
def stdlib_corpus() -> tuple[tuple[str, str, int], ...]:
    """(name, text, area) of every distinct docstring; texts found in two areas are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise ValueError(
            f"stdlib_docs: expected the sources of the standard library in {root}, found none; "
            "use an interpreter that ships them, or load_files with data of your own"
        )
    module_names = frozenset(
        name.partition(":")[0].strip("_")
        for names in (*AREAS.values(), *_EXTENSIONS.values())
        for name in names.split()
    ) - {"builtins"}
    found: dict[str, tuple[str, str, int]] = {}
    conflicts: set[str] = set()

    def add(name: str, doc: str, area: int) -> None:
        text = first_paragraph(doc, module_names)
        if text is None:
            return
        key = normalise(text)
        kept = found.setdefault(key, (name, text, area))
        if kept[2] != area:
            conflicts.add(key)

    for area, (area_name, names) in enumerate(AREAS.items()):
        for module in names.split():
            for path in _source_files(root, module):
                prefix = _package_name(path, root)
                for name, doc in _documented_sources(path):
                    add(f"{prefix}.{name}" if prefix else name, doc, area)
        for module in _EXTENSIONS[area_name].split():
            for name, doc in _documented_extension(module):
                add(name, doc, area)
    return tuple(value for key, value in found.items() if key not in conflicts)


# Parts of numpy and torch about arrays and networks. Parts about processes, files or the compiler
# would be in distribution.
LIBRARIES = {
    "numpy": "lib linalg fft ma polynomial matrixlib _core/numeric.py _core/fromnumeric.py "
    "_core/_add_newdocs.py",
    "torch": "nn optim distributions functional.py _torch_docs.py",
}


def _documented_calls(path: Path) -> Iterator[tuple[str, str]]:
    """Docstrings attached from outside, as in ``add_newdoc(place, name, doc)``."""
    calls = {"add_newdoc", "add_docstr", "_add_docstr", "add_docstr_all", "merge_dicts"}
    try:
        tree = ast.parse(path.read_bytes())
    except _UNREADABLE:
        return
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id not in calls:
            continue
        for argument in node.args[1:]:
            # Docstrings with placeholders are "...".format(...).
            while isinstance(argument, (ast.Call, ast.Attribute)):
                argument = argument.func if isinstance(argument, ast.Call) else argument.value
            if isinstance(argument, ast.Tuple):
                argument = argument.elts[-1]
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                continue
            doc = inspect.cleandoc(argument.value)
            if " " in doc:
                yield f"{path.stem}.{node.lineno}", doc


@functools.cache
def library_corpus(library: str) -> tuple[tuple[str, str], ...]:
    """(name, text) of every distinct docstring in the parts of numpy or torch listed above."""
    module = importlib.import_module(library)
    root = Path(str(module.__file__)).parent
    found: dict[str, tuple[str, str]] = {}
    for part in LIBRARIES[library].split():
        single = part.endswith(".py")
        for path in [root / part] if single else _source_files(root, part):
            if not path.is_file():
                continue
            prefix = f"{library}.{_package_name(path, root)}".rstrip(".")
            documented = [*_documented_sources(path)]
            documented += _documented_calls(path) if single else []
            for name, doc in documented:
                text = first_paragraph(doc, frozenset({library}))
                if text is not None:
                    found.setdefault(normalise(text), (f"{prefix}.{name}", text))
    return tuple(found.values())


def stdlib_docs(
    seed: int = 0,
    *,
    train_size: int | None = 400,
    ood_size: int = 1000,
) -> Task:
    """Docstrings of Python's standard library, classified into eight areas.

    About 5,000 texts (the number follows the interpreter's version): the first paragraph of the
    docstring of each public function, class and method, one area per text. Texts that are equal
    up to case and punctuation count once, and a text found in two areas is left out. Names of
    modules are masked, see :func:`bayes_kernels.experiment.data.docstrings.first_paragraph`. Out of
    distribution (``ood["numpy_torch"]``, without labels): the same extraction from numpy and
    torch, half from each. Takes a few seconds at the first call, which the process remembers.

    Splits by hash of the text: 20 % test, 10 % validation, the rest for training, of which
    ``train_size`` are chosen by ``seed``. Deterministic for a given interpreter, numpy and torch.

    Args:
        seed: Chooses the training subset; splits do not depend on it.
        train_size: Number of training examples; None for all of them.
        ood_size: Number of out-of-distribution texts (fewer if the libraries have fewer).

    Raises:
        ValueError: ``train_size`` is out of range, or the interpreter has no sources.
    """
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    texts = set()
    for name, text, area in stdlib_corpus():
        key = normalise(text)
        texts.add(key)
        position = fraction_of(f"stdlib-docs, second split\n{key}")
        split = "test" if position < 0.2 else "validation" if position < 0.3 else "train"
        parts[split].append(_doc_example(name, text, key, area))
    ood: list[Example] = []
    for library in sorted(LIBRARIES):
        found = [
            _doc_example(name, text, key, None)
            for name, text in library_corpus(library)
            if (key := normalise(text)) not in texts
        ]
        ood += choose_subset(found, min(len(found), (ood_size + 1) // 2)) if found else []
    return Task(
        name="stdlib-docs",
        kind="classification",
        label_names=tuple(AREAS),
        train=choose_subset(parts["train"], train_size, seed),
        validation=parts["validation"],
        test=parts["test"],
        ood={"numpy_torch": ood[:ood_size]},
    )


def _doc_example(name: str, text: str, key: str, label: int | None) -> Example:
    return Example(id=f"{name}#{hash_of(key):016x}", question=text, label=label)
