"""Files of hashed passwords and of hashed API keys, and the command that writes them: `python -m serve.accounts`.

One account a line, `NAME:HASH`; empty lines and lines that begin with # are comments. A password's hash is scrypt with
its parameters, as other tools write it (`$scrypt$ln=14,r=8,p=5$SALT$HASH`); a key is random, so plain SHA-256 does
(`$sha256$HEX`). The server reads a file again when it has changed.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import fcntl
import getpass
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from lit_ft.errors import UserError

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
NAMES = "letters, digits and . _ @ + -, at most 64, beginning with a letter or digit"
COST = (14, 8, 5)
"""log2 N, r and p of scrypt: what OWASP recommends where a login should take no more than 16 MiB."""

MIN_PASSWORD = 8
MAX_PASSWORD = 1024
KEY_PREFIX = "litft-"

_SCRYPT = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")
_SHA256 = re.compile(r"\$sha256\$([0-9a-f]{64})")


@dataclass(frozen=True)
class Password:
    """A hashed password."""

    salt: bytes
    digest: bytes
    ln: int
    r: int
    p: int

    @classmethod
    def of(cls, password: str) -> Password:
        """Hash a new one."""
        salt = secrets.token_bytes(16)
        return cls(salt, _scrypt(password, salt, *COST, 32), *COST)

    @classmethod
    def parse(cls, text: str) -> Password:
        """Read what `str` writes; raises ValueError."""
        found = _SCRYPT.fullmatch(text)
        if not found:
            raise ValueError("it is not $scrypt$ln=..,r=..,p=..$SALT$HASH")
        ln, r, p = (int(number) for number in found.groups()[:3])
        # The upper ends keep a line from taking all memory at each login, the lower ones from being no protection.
        if not (10 <= ln <= 20 and 1 <= r <= 32 and 1 <= p <= 32 and 128 * r * 2**ln <= 2**28):
            raise ValueError(f"ln={ln}, r={r}, p={p} are too small or too large")
        salt, digest = _unpadded(found[4]), _unpadded(found[5])
        if len(salt) < 8 or not 16 <= len(digest) <= 64:
            raise ValueError("its salt or hash has a wrong length")
        return cls(salt, digest, ln, r, p)

    def __str__(self) -> str:
        return f"$scrypt$ln={self.ln},r={self.r},p={self.p}${_base64(self.salt)}${_base64(self.digest)}"

    def matches(self, password: str) -> bool:
        """Whether it is this one; takes the same time either way, a good part of a second."""
        digest = _scrypt(password, self.salt, self.ln, self.r, self.p, len(self.digest))
        return hmac.compare_digest(digest, self.digest)


def parse_key(text: str) -> bytes:
    """The SHA-256 of a key out of its line; raises ValueError."""
    found = _SHA256.fullmatch(text)
    if not found:
        raise ValueError("it is not $sha256$ and 64 hexadecimal digits")
    return bytes.fromhex(found[1])


Entry = TypeVar("Entry")
_Stamp = tuple[int, int, int] | None


@dataclass
class AccountFile(Generic[Entry]):
    """The accounts of one file by name, as of now.

    A file that is missing while the server runs holds nobody. One with a broken line counts as it was before: a slip
    of the editor must not lock everybody out; the log says so.
    """

    path: Path
    parse: Callable[[str], Entry]
    _entries: dict[str, Entry] = field(default_factory=dict)
    _stamp: _Stamp = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Raises UserError if the file is missing or broken."""
        self._stamp = self._look()
        self._entries = read(self.path, self.parse)

    def entries(self) -> Mapping[str, Entry]:
        """Read again if the file has changed."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp  # looked at before it is read: what changes meanwhile is seen the next time
                try:
                    self._entries = read(self.path, self.parse) if stamp else {}
                except UserError as error:
                    log.warning("%s Until that is mended the accounts stay as they were.", error)
                else:
                    log.info("%s: %d accounts", self.path, len(self._entries))
            return self._entries

    def _look(self) -> _Stamp:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


class Users:
    """The people who may log in."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is missing or broken."""
        self._file = AccountFile(Path(path), Password.parse)
        # For names that do not exist: they must take as long as those that do.
        self._nobody = Password.of(secrets.token_urlsafe(32))

    def __len__(self) -> int:
        return len(self._file.entries())

    def __contains__(self, name: object) -> bool:
        """Whether the name has an account (still)."""
        return name in self._file.entries()

    def get(self, name: str) -> Password | None:
        """The hashed password; another one has another salt."""
        return self._file.entries().get(name)

    def verify(self, name: str, password: str) -> bool:
        """Whether this is the password of that name; blocks for a good part of a second, and remembers nothing."""
        stored = self._file.entries().get(name)
        if len(password) > MAX_PASSWORD:
            password, stored = "", None
        matches = (stored or self._nobody).matches(password)
        return matches and stored is not None


class ApiKeys:
    """The keys that programs show."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is missing or broken."""
        self._file = AccountFile(Path(path), parse_key)

    def __len__(self) -> int:
        return len(self._file.entries())

    def owner(self, key: str) -> str | None:
        """Whose key it is; None if nobody's."""
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        owner = None
        for name, stored in self._file.entries().items():
            if hmac.compare_digest(digest, stored):
                owner = name  # no early end: the time says nothing of which one it was
        return owner


def read(path: Path, parse: Callable[[str], Entry]) -> dict[str, Entry]:
    """The accounts in a file.

    Raises:
        UserError: it cannot be read, or a line is broken; names the line.
    """
    entries: dict[str, Entry] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, text = line.strip().partition(":")
        where = f"{path}:{number}"
        # What is in the line stays out of the message: it may be a password in clear.
        if not colon or not NAME.fullmatch(name):
            raise UserError(f"{where}: this is no account: a line is NAME:HASH, a name is {NAMES}.")
        if name in entries:
            raise UserError(f"{where}: {name} is there twice. Delete one of the two lines.")
        try:
            entries[name] = parse(text)
        except ValueError as error:
            raise UserError(
                f"{where}: the hash of {name} cannot be used: {error}. Delete the line and write it with "
                f"python -m serve.accounts (passwords: add NAME --file {path}; API keys: key NAME --file {path})."
            ) from error
    return entries


def add(path: Path, name: str, password: str) -> bool:
    """Store the password of `name`; returns whether the name is a new one. Raises UserError."""
    _check_name(name)
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise UserError(f"The password has {len(password)} characters; use {MIN_PASSWORD} to {MAX_PASSWORD}.")
    _check_text(password)
    line = f"{name}:{Password.of(password)}"
    with _changing(path):
        known = name in read(path, Password.parse) if path.exists() else False
        _write(path, [*_without(path, name), line])
    return not known


def make_key(path: Path, name: str) -> str:
    """Store the hash of a new key of `name` and return the key: it is nowhere else. Raises UserError."""
    _check_name(name)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    with _changing(path):
        if path.exists() and name in read(path, parse_key):
            raise UserError(
                f"{name} has a key in {path} already, and a key cannot be shown again. Remove it first "
                f"(python -m serve.accounts remove {name} --file {path}), or choose another name for this one."
            )
        line = f"{name}:$sha256${hashlib.sha256(key.encode()).hexdigest()}"
        _write(path, [*_without(path, name), line])
    return key


def remove(path: Path, name: str) -> None:
    """Delete an account of either kind. Raises UserError if there is none."""
    with _changing(path):
        before = _lines(path)
        after = _without(path, name)
        if len(after) == len(before):
            raise UserError(f"There is no {name!r} in {path}.")
        _write(path, after)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist. Make it with python -m serve.accounts: add NAME --file {path} for a password, "
            f"key NAME --file {path} for an API key."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a file of accounts: {error}.") from error


def _without(path: Path, name: str) -> list[str]:
    if not path.exists():
        return []
    return [line for line in _lines(path) if line.strip().partition(":")[0] != name]


def _write(path: Path, lines: Sequence[str]) -> None:
    """Beside it and renamed, so that the server never reads half a file; readable by its owner only."""
    path = path.resolve()  # a link stays one
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One writer at a time, by a lock on the folder: two that read and then write would lose one's account."""
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path} cannot be written: its folder: {error.strerror or error}.") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be a name: use {NAMES}.")


def _check_text(password: str) -> None:
    try:
        password.encode()
    except UnicodeEncodeError as error:
        raise UserError("The password is not valid text; is the terminal set to UTF-8?") from error


def _scrypt(password: str, salt: bytes, ln: int, r: int, p: int, length: int) -> bytes:
    # Composed, since one keyboard types é as one character and another as two.
    secret = unicodedata.normalize("NFC", password).encode("utf-8", "replace")
    memory = 128 * r * (2**ln + p + 2) + 2**20
    return hashlib.scrypt(secret, salt=salt, n=2**ln, r=r, p=p, maxmem=memory, dklen=length)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _unpadded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError("its salt or hash is no base64") from error


def _asked() -> str:
    """A password from the terminal, twice; or one line of standard input."""
    if not sys.stdin.isatty():
        try:
            return sys.stdin.readline().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError("The password on standard input is not UTF-8.") from error
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise UserError("The two are not the same; nothing was changed.")
    return password


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m serve.accounts", description="Who may use this server.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("add", "store a password, typed when asked for or given on standard input"),
        ("key", "make an API key and print it, this once"),
        ("remove", "delete an account"),
    ):
        one = commands.add_parser(command, help=text, description=text)
        one.add_argument("name")
        one.add_argument("--file", type=Path, required=True, help="the file of accounts")
    given = parser.parse_args(arguments)
    try:
        if given.command == "add":
            _check_name(given.name)
            new = add(given.file, given.name, _asked())
            sys.stderr.write(f"{'Added' if new else 'Changed the password of'} {given.name} in {given.file}.\n")
        elif given.command == "key":
            sys.stdout.write(f"{make_key(given.file, given.name)}\n")
            sys.stderr.write(f"This is the key of {given.name}. It is stored as a hash only: keep it now.\n")
        else:
            remove(given.file, given.name)
            sys.stderr.write(f"Removed {given.name} from {given.file}.\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (KeyboardInterrupt, EOFError):
        sys.stderr.write("\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
