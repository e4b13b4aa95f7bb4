"""The manifest of a fleet: which slides wait, which are being done and by whom, which are done, which failed and why.

It is a SQLite file in the folder of the results, so that a change is whole or did not happen, and several schedulers on
one folder see the same. A scheduler claims slides before it hands them out, and says now and then that it still runs.
The claims of one that does not are free again: at once where it ran on this host, else after ``LEASE`` seconds.

The journal is SQLite's plain one, since its newer one needs memory that hosts cannot share. As with every database, the
folder's file system must have locks that work: local disks, Lustre, GPFS, NFS 4 have.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wholegrad.aside import host_number, process_runs
from wholegrad.errors import ConfigError, WholegradError

NAME = "fleet.sqlite"
LEASE = 120.0  # seconds without a word after which another host's scheduler counts as gone
AT_MOST = 5  # leases after which one of this host does: another process may have got its number
WAITING, CLAIMED, DONE, FAILED = "waiting", "claimed", "done", "failed"

TABLES = """
CREATE TABLE IF NOT EXISTS job (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS owners (
  owner TEXT PRIMARY KEY, host TEXT NOT NULL, process INTEGER NOT NULL, beat REAL NOT NULL);
CREATE TABLE IF NOT EXISTS slides (
  name TEXT PRIMARY KEY, path TEXT NOT NULL, stamp TEXT NOT NULL, state TEXT NOT NULL, owner TEXT,
  attempts INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0,
  cause TEXT, result TEXT, seconds REAL, changed REAL NOT NULL);
"""


@dataclass(frozen=True)
class Slide:
    """A slide as it is handed out.

    Attributes:
        name: among the results; ``path``: its file.
        attempts: how often it was tried before; ``deaths``: how often its worker died then.
    """

    name: str
    path: str
    attempts: int = 0
    deaths: int = 0


@dataclass(frozen=True)
class Row:
    """A slide as the manifest has it; ``result`` has figures once it is done, ``cause`` says why it failed."""

    name: str
    path: str
    state: str
    attempts: int
    cause: str | None
    result: dict[str, Any] | None
    seconds: float | None


class Manifest:
    """The manifest in ``folder``, as one scheduler uses it.

    Args:
        folder: of the results; must be there.
        job: what is done to each slide: a manifest is of one job.

    Raises:
        ConfigError: the manifest there is of another job.
        WholegradError: it cannot be written.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.path = folder / NAME
        self.owner = f"{host_number()}-{os.getpid()}-{secrets.token_hex(4)}"
        with self._writing():
            self._base = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA synchronous = FULL")
        with self._change() as base:
            for statement in TABLES.strip().split(";\n"):
                base.execute(statement)
            known = dict(base.execute("SELECT key, value FROM job"))
            for key, value in job.items():
                text = json.dumps(value)
                if key in known and known[key] != text:
                    cause = f"was made with {key} = {known[key]}, and {text} is asked for"
                    raise ConfigError(str(folder), cause, "choose another --out, or the same settings")
                base.execute("INSERT OR IGNORE INTO job VALUES (?, ?)", (key, text))
            self._beat(base)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            remedy = "check space, rights and, on a network disk, that it has locks"
            raise WholegradError(str(self.path), f"cannot be used ({error})", remedy) from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """All of a block, or nothing of it, while nobody else writes."""
        with self._writing():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def give_back(self) -> None:
        """Let others have what is claimed and not done."""
        with self._change() as base:
            self._free(base, self.owner)

    def close(self) -> None:
        """Give back what is claimed, and leave."""
        self.give_back()
        self._base.close()

    # Slides in.

    def add(self, slides: Mapping[str, Path], missing: Sequence[str] = (), again: bool = False) -> None:
        """Enter slides that are new, or whose file is another than it was.

        Args:
            slides: by name.
            missing: names whose results are not there, done or not.
            again: whether those that failed are to be tried again.

        Raises:
            ConfigError: two slides have one name.
        """
        now, lost = time.time(), set(missing)
        new = "INSERT INTO slides (name, path, stamp, state, changed) VALUES (?, ?, ?, ?, ?)"
        anew = (
            "UPDATE slides SET state = ?, stamp = ?, attempts = 0, deaths = 0, cause = NULL, changed = ? WHERE name = ?"
        )
        with self._change() as base:
            known = {row[0]: row[1:] for row in base.execute("SELECT name, path, stamp, state FROM slides")}
            for name, path in slides.items():
                stamp = _stamp(path)
                if name not in known:
                    base.execute(new, (name, str(path), stamp, WAITING, now))
                    continue
                before, old, state = known[name]
                if before != str(path):
                    cause = f"is the name of {before} and of {path}"
                    raise ConfigError(name, cause, "put their results into different folders")
                other = stamp != old or (state == DONE and name in lost) or (state == FAILED and again)
                if other and state != CLAIMED:
                    base.execute(anew, (WAITING, stamp, now, name))

    # Claims.

    def claim(self, names: Sequence[str], most: int) -> list[Slide]:
        """Up to so many of the slides of these names, which nobody else gets from now on."""
        wanted = set(names)
        with self._change() as base:
            self._beat(base)
            self._free_lost(base)
            query = "SELECT name, path, attempts, deaths FROM slides WHERE state = ? ORDER BY attempts, rowid"
            rows = [row for row in base.execute(query, (WAITING,)) if row[0] in wanted][:most]
            for row in rows:
                said = "UPDATE slides SET state = ?, owner = ?, attempts = attempts + 1, changed = ? WHERE name = ?"
                base.execute(said, (CLAIMED, self.owner, time.time(), row[0]))
        return [Slide(*row) for row in rows]

    def beat(self) -> None:
        """Say that this scheduler runs."""
        with self._change() as base:
            self._beat(base)

    def _beat(self, base: sqlite3.Connection) -> None:
        """Also of one that others gave up on while it was suspended: what it claims now must be free if it dies."""
        values = (self.owner, host_number(), os.getpid(), time.time())
        base.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)", values)

    def _free_lost(self, base: sqlite3.Connection) -> None:
        """Free what those hold that run no more."""
        for owner, host, process, beat in base.execute("SELECT * FROM owners").fetchall():
            here, silent = host == host_number(), time.time() - beat
            gone = silent > LEASE if not here else not process_runs(process) or silent > AT_MOST * LEASE
            if gone and owner != self.owner:
                self._free(base, owner)

    @staticmethod
    def _free(base: sqlite3.Connection, owner: str) -> None:
        said = "UPDATE slides SET state = ?, owner = NULL, attempts = attempts - 1 WHERE owner = ? AND state = ?"
        base.execute(said, (WAITING, owner, CLAIMED))
        base.execute("DELETE FROM owners WHERE owner = ?", (owner,))

    def finish(self, name: str, result: Mapping[str, Any], seconds: float) -> bool:
        """Note that a slide is done; False if its claim had gone to another."""
        return self._settle(name, DONE, json.dumps(result), None, seconds)

    def fail(self, name: str, cause: str, again: bool, died: bool = False) -> bool:
        """Note that a slide failed, for good or to be tried ``again``; False if its claim had gone to another.

        Args:
            died: whether its worker did, which may have been another slide's doing.
        """
        return self._settle(name, WAITING if again else FAILED, None, cause, None, died)

    def _settle(
        self, name: str, state: str, result: str | None, cause: str | None, seconds: float | None, died: bool = False
    ) -> bool:
        said = (
            "UPDATE slides SET state = ?, owner = NULL, result = ?, cause = ?, seconds = ?, deaths = deaths + ?,"
            " changed = ? WHERE name = ? AND owner = ? AND state = ?"
        )
        values = (state, result, cause, seconds, int(died), time.time(), name, self.owner, CLAIMED)
        with self._change() as base:
            return base.execute(said, values).rowcount == 1

    # Looking.

    def counts(self, names: Sequence[str]) -> dict[str, int]:
        """How many of these slides are in each state."""
        found, wanted = dict.fromkeys((WAITING, CLAIMED, DONE, FAILED), 0), set(names)
        with self._writing():
            for name, state in self._base.execute("SELECT name, state FROM slides"):
                found[state] += name in wanted
        return found

    def rows(self) -> list[Row]:
        """Every slide, in the order in which they were entered."""
        query = "SELECT name, path, state, attempts, cause, result, seconds FROM slides ORDER BY rowid"
        with self._writing():
            found = self._base.execute(query).fetchall()
        return [Row(a, b, c, d, e, result and json.loads(result), s) for a, b, c, d, e, result, s in found]


def _stamp(path: Path) -> str:
    """Size and time of a file or folder, by which another of its name is known."""
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"
