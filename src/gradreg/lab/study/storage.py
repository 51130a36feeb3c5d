"""Where studies are kept: a journal file in a folder, or a database."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning

from gradreg._install import how
from gradreg.lab.folder import BadInput
from gradreg.lab.study.journal import Journal, Spoiled

DEFAULT_GRACE = 120


@dataclass(frozen=True)
class Place:
    """Where a study is: the journal in a folder, or under a name in a database. Can be sent to another process."""

    name: str
    folder: Path | None = None
    url: str | None = None
    grace: int = DEFAULT_GRACE
    """Of a study that is begun; one that is joined has its own."""

    @property
    def locks(self) -> Path:
        """Beside a journal: a file for each lock, and one for each worker."""
        assert self.folder is not None
        return self.folder / ".locks"

    def __str__(self) -> str:
        if self.url is None:
            return f"{self.folder}/study.log"
        return f"{self.name} in {without_password(self.url)}"


def open_storage(place: Place) -> optuna.storages.BaseStorage:
    """The storage of a place; tables are made if need be.

    Raises:
        BadInput: the URL cannot be used, or its driver is missing. What SQLAlchemy and the file system raise is theirs.
    """
    return _journal(place) if place.url is None else _database(place)


def _journal(place: Place) -> optuna.storages.BaseStorage:
    assert place.folder is not None
    place.locks.mkdir(exist_ok=True)
    return _JournalStorage(Journal(place.folder / "study.log", place.locks / "journal"))


class _JournalStorage(optuna.storages.JournalStorage):
    """Names the line that is no record of a study, in a journal whose lines have no checks."""

    def _sync_with_backend(self) -> None:
        try:
            super()._sync_with_backend()
        except Spoiled:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
            assert isinstance(self._backend, Journal)
            raise Spoiled(f"line {self._backend.num_read} is not a record of a study") from error


def _database(place: Place) -> optuna.storages.BaseStorage:
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    assert place.url is not None
    url = with_driver(place.url)
    engine = {"connect_args": {"timeout": 30}} if sqlite_file(url) else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=max(1, place.grace // 4),
                grace_period=place.grace,
            )
    except ImportError as error:
        raise BadInput(
            f"--storage needs a driver for {without_password(url)}: {error.__cause__ or error}. "
            f"For PostgreSQL: {how('postgres')}"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise BadInput(f"--storage must be a URL such as postgresql://USER@HOST/DATABASE: {error}.") from error


def with_driver(url: str) -> str:
    """PostgreSQL by psycopg, which the extra `postgres` installs, where the URL names no driver."""
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url[len(scheme) :]
    return url


def without_password(url: str) -> str:
    """For messages and files."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        raise BadInput("--storage must be a URL such as postgresql://USER@HOST/DATABASE.") from None


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database; None for any other."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise BadInput("--storage must be a database that other processes can open, got one in memory.")
    return Path(parsed.database)
