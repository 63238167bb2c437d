"""The log of paid calls: every answer is on disk before it is used, and is never asked for again."""

import sqlite3
from pathlib import Path

from multiverse_hf.curator.replies import Reply
from multiverse_hf.errors import FAILURE, CommandError


class CallLog:
    """The replies of a task by the key of the request. SQLite, for one process at a time. Close it after use."""

    def __init__(self, path: Path) -> None:
        """Open a log, or create one.

        Raises:
            CommandError: if the file is damaged, or the disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._database = sqlite3.connect(path, isolation_level=None)  # no transaction delays a statement
        # An exclusive lock needs no memory shared between processes, which network file systems lack.
        self._execute("PRAGMA locking_mode = EXCLUSIVE")
        self._execute("PRAGMA journal_mode = WAL")
        self._execute("PRAGMA synchronous = NORMAL")  # survives a kill of the process, not a power failure
        self._execute(
            "CREATE TABLE IF NOT EXISTS calls (key BLOB PRIMARY KEY, text TEXT, finish_reason TEXT, "
            "prompt_tokens INTEGER, completion_tokens INTEGER)"
        )

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        """Run a statement.

        Raises:
            CommandError: if the file is damaged, or the disk is full.
        """
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as err:  # the disk, not the file
            raise CommandError(
                f"cannot read or write {self.path}: {err}; free disk space, then run the same command again", FAILURE
            ) from err
        except sqlite3.DatabaseError as err:
            raise CommandError(
                f"cannot read {self.path}: {err}; move it away, then its calls are made again", FAILURE
            ) from err

    def get(self, key: bytes) -> Reply | None:
        """Return the reply to an earlier request, None if there is none."""
        columns = "text, finish_reason, prompt_tokens, completion_tokens"
        found = self._execute(f"SELECT {columns} FROM calls WHERE key = ?", (key,)).fetchone()
        return Reply(*found) if found else None

    def put(self, key: bytes, reply: Reply) -> None:
        """Store a reply. Once this returns, a kill of the process cannot lose it."""
        values = (key, reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens)
        self._execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?)", values)

    def close(self) -> None:
        """Write everything to the file and unlock it."""
        self._database.close()
