"""The log of paid calls: whatever was answered is on disk before it counts, and is never asked again."""

import sqlite3
from pathlib import Path

from multiverse_hf.curator.replies import Reply
from multiverse_hf.errors import FAILURE, CommandError


class CallLog:
    """The replies of a task, by the key of what was asked. SQLite, one process at a time; to be closed."""

    def __init__(self, path: Path) -> None:
        """Open a log, or make one.

        Raises:
            CommandError: if the file is damaged, or there is no room for it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._database = sqlite3.connect(path, isolation_level=None)  # a statement is on its way to the disk at once
        # A lock for as long as the log is open: then the write-ahead log needs no memory shared between processes,
        # which network file systems lack.
        self._execute("PRAGMA locking_mode = EXCLUSIVE")
        self._execute("PRAGMA journal_mode = WAL")
        self._execute("PRAGMA synchronous = NORMAL")  # outlives the process, if not the power
        self._execute(
            "CREATE TABLE IF NOT EXISTS calls (key BLOB PRIMARY KEY, text TEXT, finish_reason TEXT, "
            "prompt_tokens INTEGER, completion_tokens INTEGER)"
        )

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        """Run a statement.

        Raises:
            CommandError: if the file is damaged, or there is no room for it.
        """
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as err:  # the disk, not what is on it
            raise CommandError(
                f"cannot read or write {self.path}: {err}; make room there, then the same command goes on", FAILURE
            ) from err
        except sqlite3.DatabaseError as err:
            raise CommandError(
                f"cannot read {self.path}: {err}; move it away, and the calls in it are made again", FAILURE
            ) from err

    def get(self, key: bytes) -> Reply | None:
        """Give the reply to something asked before."""
        columns = "text, finish_reason, prompt_tokens, completion_tokens"
        found = self._execute(f"SELECT {columns} FROM calls WHERE key = ?", (key,)).fetchone()
        return Reply(*found) if found else None

    def put(self, key: bytes, reply: Reply) -> None:
        """Keep a reply; once this returns, a kill of the process cannot lose it."""
        values = (key, reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens)
        self._execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?)", values)

    def close(self) -> None:
        """Write all to the one file and let go of it."""
        self._database.close()
