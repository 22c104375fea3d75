"""Folders for results: one run at a time, apart from all input, and only its own files are replaced.

A folder that a command writes to has a folder ``.bayes_kernels`` (`PRIVATE`) with

* ``run.json``: which run it was, its command, the files that are its own, and whether it ended.
  Written before the first of those files, so that a killed run is known by it.
* ``lock``: held (flock) while a run writes. It vanishes with its process, however that ends.
* ``old/``: while a run replaces an earlier one, the files of the earlier one. They come back if the new run
  ends without anything to keep, also after a kill; they go when it has ended.

No file that ``run.json`` does not list is ever removed or replaced; empty folders in those of a run are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ..files import write_json
from ..hf.checkpoint_folders import is_checkpoint, is_whole_checkpoint
from ..hf.checks import CONFIG_NAME
from ..hf.method import METHODS
from ..hf.tasks.record import FORMAT

PRIVATE = ".bayes_kernels"
# Scores of an adapter go below it by default, which is why `evaluate` may write there.
EVALUATION = "evaluation"
PICTURES = ("reliability.png", "risk_coverage.png", "entropy.png")
_RECORD, _LOCK, _OLD = "run.json", "lock", "old"
# Commands that go on from what a stopped run left.
_RESUMABLE = ("train", "compare", "sweep")


def method_files() -> list[str]:
    """Names of the files that methods add to an adapter of PEFT."""
    return sorted({name for method in METHODS.values() for name in method.files})


def adapter_files() -> list[str]:
    """What `save_adapter` writes, README.md being PEFT's card, and what a killed run left of it."""
    peft = [CONFIG_NAME, "adapter_model.safetensors"]
    return [*peft, "experiment.json", *method_files(), "README.md", unfinished(CONFIG_NAME)]


def unfinished(name: str) -> str:
    """Names of files and folders that are written, and get their own name when they are whole."""
    return f".{name}.*.tmp"


class Stopped(KeyboardInterrupt):
    """SIGTERM, where a run has something to put away; like Ctrl-C otherwise."""

    signal = signal.SIGTERM


@dataclass(frozen=True)
class _Record:
    """``run.json``.

    Attributes:
        kind: The command.
        command, cwd: Its words, and where it was called.
        files: Names or patterns of its files, relative to the folder; folders stand for all in them.
            Of a run that has ended: every file by its name, unless it was killed after `complete`.
        ended: Whether it has.
    """

    kind: str
    command: list[str]
    cwd: str
    files: list[str]
    ended: bool
    format: int = FORMAT

    @property
    def resumable(self) -> bool:
        return self.kind in _RESUMABLE

    def way_on(self) -> str:
        """The command that goes on where the run was stopped."""
        words = self.command
        if self.resumable:
            words = [word for word in words if word not in ("--overwrite", "--resume")]
            words = [*words, "--resume"]
        return shlex.join(words) + ("" if self.cwd == os.getcwd() else f" (in {self.cwd})")


def check_apart(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Whether results that go to a folder leave all input alone.

    Links and ``..`` are followed. An adapter's folder `EVALUATION` is apart from the adapter.

    Args:
        folder: For results; need not exist.
        inputs: What is read, by the option that names it: a path, several, or None. Words that are
            no path are left out: names of the hub.

    Raises:
        ValueError: The folder is, holds or lies in one of them.
    """
    out = os.path.realpath(folder)
    for what, names in inputs.items():
        for name in [names] if isinstance(names, (str, os.PathLike)) else names or ():
            if not os.path.lexists(name):
                continue
            place = os.path.realpath(name)
            if what == "adapter" and out == os.path.join(place, EVALUATION):
                continue
            if out == place:
                relation = "is"
            elif os.path.commonpath([out, place]) == out:
                relation = "holds"
            elif os.path.commonpath([out, place]) == place:
                relation = "lies in"
            else:
                continue
            raise ValueError(
                f"out {str(folder)!r}: expected a folder apart from all input, got one that "
                f"{relation} {what} {str(name)!r}; choose another folder"
            )


def stopped_run(folder: str | os.PathLike[str]) -> str:
    """Advice for who looks for results where a run is, or was stopped; empty elsewhere."""
    holder = _holder(Path(folder))
    if holder is not None:
        return f"{holder} writes there now, wait for its end"
    own = _read(Path(folder) / PRIVATE)
    if own is None or own.ended:
        return ""
    return f"a run was stopped there before it ended, go on with: {own.way_on()}"


class Output:
    """The folder of one run: a context that holds it from `begin` to its end.

    When the context ends without an exception, or after `complete`, the run has ended. With one, what the run
    wrote goes and what it replaced comes back; runs of `train` and `compare` with something to go on from
    (a checkpoint, a finished part) stay as they are. Between `begin` and the end SIGTERM raises
    `Stopped`, so that all this happens then too.

    Args:
        folder: For results; need not exist.
        files: Names or patterns of the files that the run writes, relative to the folder.
        kind, command: The command, and its words.
        inputs: As `check_apart` takes them.
        overwrite, resume: The command's options.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        *,
        kind: str,
        command: Sequence[str],
        inputs: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder, self.kind = folder, kind
        self.files: list[str] = []
        self.add(files)
        self.command, self.inputs = list(command), inputs
        self.overwrite, self.resume = overwrite, resume
        self._lock: int | None = None
        self._made: list[Path] = []
        self._handler: Any = None
        self._begun = False
        self.completed = False

    def add(self, files: Sequence[str]) -> None:
        """More files that the run writes, with what `write_text` and `compare` make of them first."""
        for name in map(Path, files):
            self.files += [str(name), str(name.with_name(unfinished(name.name)))]

    # --- Whether it may begin ---

    def check(self) -> None:
        """Whether the run may write to the folder; writes nothing.

        Raises:
            ValueError: It is or holds input, holds other results or files, or is held by another run.
        """
        folder, where = self.folder, f"out {str(self.folder)!r}"
        check_apart(folder, self.inputs)
        if os.path.lexists(folder) and not folder.is_dir():
            raise ValueError(f"{where}: expected a folder, got a file; choose another")
        if not folder.is_dir():
            above = next(path for path in folder.absolute().parents if os.path.lexists(path))
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise ValueError(f"{where}: expected a place to write, got {above}; choose another")
            return
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{where}: expected a folder to write to, got a protected one")
        if self._lock is None and _holder(folder) is not None:
            self._refuse_second()
        records = _read(folder / PRIVATE), _read(folder / PRIVATE / _OLD)
        known: set[Path] = set()
        for record in records:
            known |= _owned(folder, record.files) | _scores(folder, record) if record else set()
        present = set(_files_in(folder))
        foreign = sorted(str(path.relative_to(folder)) for path in present - known)
        for pattern in self.files:
            self._check_free(pattern, known)
        earlier = _what_is_there(folder)
        if earlier is None:
            if foreign and self.overwrite and not any(records):
                raise ValueError(
                    f"{where}: --overwrite replaces results of an earlier run, and this folder has "
                    f"none, but {_some(foreign)}; choose another folder"
                )
            if foreign and not (self.overwrite or (self.resume and any(records))):
                raise ValueError(
                    f"{where}: expected a new or empty folder, got {_some(foreign)}; choose another "
                    "folder"
                )
        if self.overwrite:
            self._check_unused(records)
        if earlier is None or self.overwrite:
            return
        if self.resume:
            if earlier.kind != self.kind:
                raise ValueError(
                    f"resume: expected results of `{self.kind}` in {str(folder)!r}, got those of "
                    f"`{earlier.kind}`; choose another folder"
                )
        elif not earlier.ended:
            raise ValueError(
                f"{where}: a run was stopped there before it ended; go on with: {earlier.way_on()}"
            )
        else:
            resume = ", --resume" if self.kind in _RESUMABLE else ""
            raise ValueError(
                f"{where}: expected a new or empty folder, got the results of an earlier run; use "
                f"--overwrite{resume} or another folder"
            )

    def _check_free(self, pattern: str, known: set[Path]) -> None:
        """No file that is not ours stands where the run writes."""
        parts = Path(pattern).parts
        for depth in range(1, len(parts)):
            above = self.folder.joinpath(*parts[:depth])
            if os.path.lexists(above) and (above.is_symlink() or not above.is_dir()):
                self._refuse_foreign(above)
        for path in sorted(_matches(self.folder, pattern)):
            for file in _files_in(path):
                if file not in known:
                    self._refuse_foreign(file)

    def _check_unused(self, records: Sequence[_Record | None]) -> None:
        """No process scores an adapter that is to be replaced."""
        for record in records:
            for scores in _score_folders(self.folder, record) if record else ():
                if (holder := _holder(scores)) is not None:
                    raise ValueError(
                        f"out {str(self.folder)!r}: expected results that nothing uses, got {holder}, "
                        f"which writes to {scores}; wait for its end or choose another folder"
                    )

    def _refuse_foreign(self, path: Path) -> NoReturn:
        raise ValueError(
            f"out {str(self.folder)!r}: expected no file in the way, got {path}, which no run wrote; "
            "move it away or choose another folder"
        )

    def _refuse_second(self) -> NoReturn:
        raise ValueError(
            f"out {str(self.folder)!r}: expected a folder for this run alone, got one that "
            f"{_holder(self.folder) or 'another run'} writes to; wait for its end or choose another "
            "folder"
        )

    # --- The run ---

    def hold(self) -> None:
        """Keep other runs from the folder, which is made where it does not exist.

        Raises:
            ValueError: As `check`.
        """
        if self._lock is None:
            self._take_lock()
            self._catch_sigterm()
            self.check()

    def begin(self) -> None:
        """From now on the run writes: put away what it replaces; `hold` comes before or with it.

        Raises:
            ValueError: As `check`.
        """
        self.hold()
        folder = self.folder
        _recover(folder)
        earlier, files = _what_is_there(folder), self.files
        if earlier is not None and self.resume:
            half = _owned(folder, earlier.files) - _worth(folder, earlier)
            _remove(folder, half, earlier.files)
            files = [*earlier.files, *(name for name in files if name not in earlier.files)]
        elif earlier is not None:
            _put_away(folder, earlier)
        record = _Record(self.kind, self.command, os.getcwd(), files, ended=False)
        _write(folder / PRIVATE, record)
        self._begun = True

    def complete(self) -> None:
        """From now on what there is stays, whatever happens: only pictures, say, are left to write.

        What was replaced is thrown away. A process that is killed later leaves a run that has ended.
        """
        private = self.folder / PRIVATE
        record = _read(private)
        if self._begun and record is not None:
            _write(private, replace(record, ended=True))
            _throw_away(private)
            self.completed = True

    def __enter__(self) -> Output:
        self.check()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._lock is None:
            return
        try:
            record = _read(self.folder / PRIVATE)
            if (kind is None or self.completed) and self._begun and record is not None:
                self._end(record)
            else:
                _recover(self.folder)
        finally:
            self._release()

    def starts_anew(self) -> bool:
        """Whether the run was to go on from an earlier one, and there is none."""
        return self.resume and _what_is_there(self.folder) is None

    def kept(self) -> bool:
        """Whether the run, which an exception has ended, left something to go on from."""
        there = _what_is_there(self.folder)
        return there is not None and not there.ended

    def way_on(self) -> str:
        """The command that goes on after an exception has ended the context."""
        there = _what_is_there(self.folder)
        kept = there is not None and not there.ended
        return there.way_on() if there is not None and kept else shlex.join(self.command)

    def _end(self, record: _Record) -> None:
        folder, private = self.folder, self.folder / PRIVATE
        owned = _owned(folder, record.files)
        _remove(folder, {path for path in owned if _hidden(folder, path)}, record.files)
        names = sorted(str(p.relative_to(folder)) for p in owned if os.path.lexists(p))
        files = [glob.escape(name) for name in names]
        _write(private, _Record(record.kind, record.command, record.cwd, files, ended=True))
        _throw_away(private)

    # --- The lock ---

    def _take_lock(self) -> None:
        private = self.folder / PRIVATE
        while True:
            missing = [p for p in (self.folder, *self.folder.parents) if not os.path.lexists(p)]
            private.mkdir(parents=True, exist_ok=True)
            self._made = [*self._made, *missing]
            try:
                handle = os.open(private / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the run that held it has just removed the folder
                continue
            for last in (False, False, True):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if last:
                        os.close(handle)
                        self._refuse_second()
                    time.sleep(0.05)  # `_holder` of another process takes it for a moment
                except OSError as error:
                    # Some network file systems have no locks: two runs there are the user's care.
                    if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                        os.close(handle)
                        raise
                    break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(private / _LOCK)):
                    break
            os.close(handle)  # the file of a run that has just ended
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._lock = handle

    def _release(self) -> None:
        assert self._lock is not None
        private = self.folder / PRIVATE
        with contextlib.suppress(OSError):
            (private / _LOCK).unlink()
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):
            private.rmdir()  # only where nothing is left in it
            for path in self._made:
                path.rmdir()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _catch_sigterm(self) -> None:
        def stop(number: int, frame: Any) -> None:
            raise Stopped

        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, stop) or signal.SIG_DFL


# --- Files ---------------------------------------------------------------------------------------


def _read(private: Path) -> _Record | None:
    """``run.json``; None where there is none.

    Raises:
        ValueError: It is not what a run wrote.
    """
    path = private / _RECORD
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        fields = error
    try:
        record = _Record(**fields)
        plain = all(isinstance(x, str) for x in (*record.command, *record.files, record.cwd))
        inside = all(
            not os.path.isabs(name) and ".." not in Path(name).parts for name in record.files
        )
        whole = plain and inside and isinstance(record.kind, str)
        if whole and record.format == FORMAT:
            return record
        if whole and isinstance(record.format, int):
            raise ValueError(
                f"{path}: expected format {FORMAT}, got {record.format}, which another version wrote; "
                "choose another folder, or move this one away"
            )
    except TypeError:
        pass
    raise ValueError(
        f"{path}: expected what a run wrote, got something else; choose another folder"
    )


def _write(private: Path, record: _Record) -> None:
    write_json(private / _RECORD, asdict(record))


def _holder(folder: Path) -> str | None:
    """Which process holds a folder; None for none."""
    try:
        handle = os.open(folder / PRIVATE / _LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(handle, 300).decode(errors="replace") or "another run"
    except OSError:
        return None
    else:
        return None
    finally:
        os.close(handle)


def _files_in(path: Path, private: bool = False) -> Iterator[Path]:
    """A file, or all files and links in a folder; private ones only if asked for, no link followed."""
    if path.is_symlink() or not path.is_dir():
        if os.path.lexists(path):
            yield path
        return
    for above, folders, files in os.walk(path):
        links = [name for name in folders if (Path(above) / name).is_symlink()]
        folders[:] = [
            name for name in folders if name not in links and (private or name != PRIVATE)
        ]
        yield from (Path(above) / name for name in (*files, *links))


def _matches(folder: Path, pattern: str) -> list[Path]:
    return [Path(name) for name in glob.glob(os.path.join(glob.escape(str(folder)), pattern))]


def _own(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """What patterns stand for in the folder of a run; a link on the way leads to files of others."""
    real = os.path.realpath(folder)
    for pattern in patterns:
        for match in _matches(folder, pattern):
            relative = match.parent.relative_to(folder)
            if os.path.realpath(match.parent) == os.path.normpath(os.path.join(real, relative)):
                yield match


def _owned(folder: Path, patterns: Sequence[str]) -> set[Path]:
    """The files of a run."""
    return {path for match in _own(folder, patterns) for path in _files_in(match)}


def _score_folders(folder: Path, record: _Record) -> Iterator[Path]:
    """Where `evaluate` writes by default below the adapters of a run."""
    for place in {folder, *(path.parent for path in _owned(folder, record.files))}:
        scores = place / EVALUATION
        if not scores.is_symlink() and (scores / PRIVATE).is_dir():
            yield scores


def _scores(folder: Path, record: _Record) -> set[Path]:
    """What `evaluate` put below the adapters of a run; it goes with them."""
    found: set[Path] = set()
    for scores in _score_folders(folder, record):
        own = _read(scores / PRIVATE)
        if own is not None:
            found |= _owned(scores, own.files)
        found |= set(_files_in(scores / PRIVATE, private=True)) - {scores / PRIVATE / _LOCK}
    return found


def _hidden(folder: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _worth(folder: Path, record: _Record) -> set[Path]:
    """What a run has written to keep: nothing half written, and what it can go on from if it must."""
    found = set()
    for path in _owned(folder, record.files):
        above = [place for place in path.parents if folder in place.parents]
        half = [p for p in above if is_checkpoint(p) and not is_whole_checkpoint(p)]
        if not half and not _hidden(folder, path):
            found.add(path)
    return found if record.ended or record.resumable else set()


def _what_is_there(folder: Path) -> _Record | None:
    """The run whose results a folder holds, once `_recover` has undone what a killed run left."""
    private = folder / PRIVATE
    own, old = _read(private), _read(private / _OLD)
    if own is not None and (_worth(folder, own) or _half_put_away(private, own, old)):
        return own
    return old


def _half_put_away(private: Path, own: _Record | None, old: _Record | None) -> bool:
    """Whether a run was killed while it put away the earlier one's files, whose record is last."""
    return own is not None and old is None and (private / _OLD).is_dir()


def _remove(folder: Path, files: set[Path], patterns: Sequence[str]) -> None:
    """Delete files, and the folders in which nothing is left of what patterns stand for."""
    for path in files:
        path.unlink(missing_ok=True)
    _remove_empty(folder, files, patterns)


def _remove_empty(folder: Path, files: set[Path], patterns: Sequence[str]) -> None:
    ours = {folder / Path(pattern).parent for pattern in patterns}
    ours |= {path.parent for path in files}
    below: set[Path] = set()  # a killed run may have left nothing but folders
    for match in _own(folder, patterns):
        ours.add(match)
        if not match.is_symlink():
            below |= {Path(above) for above, *_ in os.walk(match)}
    below = {place for place in below if PRIVATE not in place.relative_to(folder).parts}
    places = {place for path in ours for place in (path, *path.parents) if folder in place.parents}
    for place in sorted(places | below, key=lambda path: len(path.parts), reverse=True):
        if not place.is_dir() or place.is_symlink():
            continue
        left = {path.name for path in place.iterdir()}
        files = set(_files_in(place / PRIVATE, private=True)) if left == {PRIVATE} else {place}
        known = {place / PRIVATE / name for name in (_LOCK, _RECORD)}
        if files <= known and _holder(place) is None:
            shutil.rmtree(place)  # of an evaluation that was killed, or whose scores are gone
        elif not left:
            with contextlib.suppress(OSError):
                place.rmdir()


def _put_away(folder: Path, earlier: _Record) -> None:
    """Move the earlier run's files to ``old``, its record last: until then it is the one that counts."""
    private = folder / PRIVATE
    _throw_away(private)
    owned = _owned(folder, earlier.files) | _scores(folder, earlier)
    for path in sorted(owned):
        _move(path, private / _OLD / path.relative_to(folder))
    _remove_empty(folder, owned, earlier.files)
    _move(private / _RECORD, private / _OLD / _RECORD)


def _recover(folder: Path) -> None:
    """Undo what a run left that was stopped and has nothing to keep; may itself be killed."""
    private = folder / PRIVATE
    own, old = _read(private), _read(private / _OLD)
    half = _half_put_away(private, own, old)
    if own is not None and not half:
        if own.ended:
            _throw_away(private)
        elif not _worth(folder, own):
            _remove(folder, _owned(folder, own.files), own.files)
            (private / _RECORD).unlink()
            own = None
    if (private / _OLD).is_dir() and (own is None or half):
        for path in sorted(_files_in(private / _OLD, private=True)):
            if path != private / _OLD / _RECORD:
                _move(path, folder / path.relative_to(private / _OLD))
        if old is not None:
            _move(private / _OLD / _RECORD, private / _RECORD)
        shutil.rmtree(private / _OLD)
    if private.is_dir():
        for path in private.glob(".*"):  # a record half written, ``old`` half deleted
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _throw_away(private: Path) -> None:
    """Remove ``old``: gone at once, deleted after that."""
    gone = private / f".{_OLD}.{secrets.token_hex(4)}"
    if (private / _OLD).is_dir():
        os.rename(private / _OLD, gone)
        shutil.rmtree(gone)


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    os.rename(path, to)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
