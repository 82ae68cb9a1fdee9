"""Passwords and keys: what is stored, who is let in, and what becomes of broken files."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_ft.errors import UserError
from serve import accounts
from serve.accounts import ApiKeys, Password, Users

ROOT = Path(__file__).resolve().parents[2]
SECRET = "correct horse"


def command(folder: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.accounts", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.txt"
    assert accounts.add(path, "ann", SECRET)
    return path


def test_a_password_lets_its_owner_in_and_nobody_else(users: Path) -> None:
    accounts.add(users, "bob@example.org", "battery staple")
    known = Users(users)
    assert len(known) == 2 and "ann" in known and "eve" not in known
    assert known.verify("ann", SECRET)
    for name, password in [
        ("ann", SECRET + " "),
        ("ann", ""),
        ("ann", "battery staple"),
        ("Ann", SECRET),
        ("eve", SECRET),
        ("", ""),
        ("ann", "x" * 100_000),
        ("ann", "\ud800"),
        ("ann\n", SECRET),
    ]:
        assert not known.verify(name, password), (name, password[:20])


def test_what_is_stored_is_scrypt_as_the_standard_library_computes_it(users: Path) -> None:
    name, line = users.read_text().strip().split(":", 1)
    assert name == "ann" and SECRET not in line
    _, kind, parameters, salt, digest = line.split("$")
    assert (kind, parameters) == ("scrypt", "ln=14,r=8,p=5")
    decoded = [base64.b64decode(part + "=" * (-len(part) % 4)) for part in (salt, digest)]
    assert decoded[1] == hashlib.scrypt(SECRET.encode(), salt=decoded[0], n=2**14, r=8, p=5, maxmem=2**26, dklen=32)
    assert len(decoded[0]) == 16
    assert str(Password.parse(line)) == line
    assert str(Password.of(SECRET)) != str(Password.of(SECRET))  # salted


def test_the_two_ways_to_write_an_accent_are_one_password(tmp_path: Path) -> None:
    path = tmp_path / "users.txt"
    accounts.add(path, "ann", "caf\u00e9 au lait")
    assert Users(path).verify("ann", "cafe\u0301 au lait")


def test_an_unknown_name_costs_as_much_as_a_known_one(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Users(users)
    costs: list[tuple[int, int, int]] = []
    real = hashlib.scrypt

    def scrypt(secret: bytes, *, n: int, r: int, p: int, **rest: object) -> bytes:
        costs.append((n, r, p))
        return real(secret, n=n, r=r, p=p, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    for name, password in (("ann", "wrong one"), ("eve", "wrong one"), ("ann", "x" * 5000), ("ann", SECRET)):
        known.verify(name, password)
    assert costs == [(2**14, 8, 5)] * 4  # each time, and nothing is remembered


def test_files_are_for_their_owner_only_and_leave_nothing_beside(users: Path) -> None:
    users.chmod(0o644)
    accounts.add(users, "bob", "battery staple")
    assert users.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in users.parent.iterdir()] == ["users.txt"]


def test_comments_stay_and_a_link_stays_a_link(users: Path, tmp_path: Path) -> None:
    users.write_text("# the office\n\n" + users.read_text())
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.txt"
    link.symlink_to(users)
    accounts.add(link, "bob", "battery staple")
    accounts.remove(link, "ann")
    assert link.is_symlink()
    assert re.fullmatch(r"# the office\n\nbob:\$scrypt\$.*\n", users.read_text())


def test_changes_need_no_restart(users: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = Users(users)
    accounts.add(users, "bob", "battery staple")
    assert known.verify("bob", "battery staple")
    accounts.add(users, "bob", "staple battery")
    assert known.verify("bob", "staple battery") and not known.verify("bob", "battery staple")
    accounts.remove(users, "bob")
    assert "bob" not in known and not known.verify("bob", "staple battery")

    good = users.read_text()
    users.write_text(good + "half a li")
    assert known.verify("ann", SECRET)  # a slip of the editor does not lock everybody out
    assert "users.txt:2" in caplog.text
    users.unlink()
    assert len(known) == 0 and not known.verify("ann", SECRET)
    users.write_text(good)
    assert known.verify("ann", SECRET)


def hashed(parameters: str = "ln=14,r=8,p=5", salt: str = "A" * 22, digest: str = "A" * 43) -> str:
    return f"$scrypt${parameters}${salt}${digest}"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("bob", "NAME:HASH"),
        ("bob:hunter2hunter2", "cannot be used"),
        (f":{hashed()}", "NAME:HASH"),
        (f"bob smith:{hashed()}", "NAME:HASH"),
        (f"../bob:{hashed()}", "NAME:HASH"),
        (f"ann:{hashed()}", "twice"),
        (f"bob:{hashed('ln=40,r=8,p=1')}", "too small or too large"),
        (f"bob:{hashed('ln=20,r=32,p=1')}", "too small or too large"),
        (f"bob:{hashed('ln=1,r=8,p=1')}", "too small or too large"),
        (f"bob:{hashed('ln=14,r=0,p=1')}", "too small or too large"),
        (f"bob:{hashed(salt='AAAA')}", "wrong length"),
        (f"bob:{hashed(digest='A')}", "base64|wrong length"),
        ("bob:$sha256$" + "0" * 64, "cannot be used"),
        ("\ufeff", "NAME:HASH"),
    ],
)
def test_broken_lines_are_named_and_not_shown(users: Path, line: str, says: str) -> None:
    users.write_text(f"{users.read_text()}# more\n{line}\n")
    with pytest.raises(UserError, match=rf"users\.txt:3: .*({says})") as raised:
        Users(users)
    assert "hunter2" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist.*add NAME --file"):
        Users(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="cannot be read"):
        Users(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        ApiKeys(tmp_path / "binary")


@pytest.mark.parametrize("name", ["", "a:b", "a\nb:c", "../x", " ann", "x" * 65, "ann\n", "#ann"])
def test_names_that_would_break_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a name"):
        accounts.add(tmp_path / "users.txt", name, SECRET)
    with pytest.raises(UserError, match="cannot be a name"):
        accounts.make_key(tmp_path / "keys.txt", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
def test_passwords_of_a_wrong_length(tmp_path: Path, password: str) -> None:
    with pytest.raises(UserError, match="8 to 1024"):
        accounts.add(tmp_path / "users.txt", "ann", password)


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    key = accounts.make_key(path, "ci")
    other = accounts.make_key(path, "eval")
    assert key != other and len(base64.urlsafe_b64decode(key.removeprefix("litft-") + "=")) == 32
    assert key not in path.read_text() and hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    keys = ApiKeys(path)
    assert keys.owner(key) == "ci" and keys.owner(other) == "eval"
    for wrong in ("", key[:-1], key + "x", key.upper(), "\ud800", hashlib.sha256(key.encode()).hexdigest()):
        assert keys.owner(wrong) is None
    with pytest.raises(UserError, match="ci has a key"):
        accounts.make_key(path, "ci")
    accounts.remove(path, "ci")
    assert keys.owner(key) is None and keys.owner(other) == "eval"
    with pytest.raises(UserError, match="no 'ci'"):
        accounts.remove(path, "ci")


def test_a_file_holds_one_kind(users: Path, tmp_path: Path) -> None:
    before = users.read_text()
    with pytest.raises(UserError, match=r"users\.txt:1"):
        accounts.make_key(users, "ci")
    assert users.read_text() == before


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    names = [f"program{number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda name: accounts.make_key(path, name), names))
    known = ApiKeys(path)
    assert [known.owner(key) for key in keys] == names


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        accounts.add(tmp_path / "missing" / "users.txt", "ann", SECRET)


def test_the_command(tmp_path: Path) -> None:
    done = command(tmp_path, "add", "ann", "--file", "users.txt", typed=SECRET + "\n")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Added ann" in done.stderr and SECRET not in done.stderr
    assert Users(tmp_path / "users.txt").verify("ann", SECRET)

    done = command(tmp_path, "add", "ann", "--file", "users.txt", typed="battery staple\r\n")
    assert "Changed the password of ann" in done.stderr
    assert Users(tmp_path / "users.txt").verify("ann", "battery staple")

    done = command(tmp_path, "key", "ci", "--file", "keys.txt")
    assert done.returncode == 0 and ApiKeys(tmp_path / "keys.txt").owner(done.stdout.strip()) == "ci"

    done = command(tmp_path, "remove", "ann", "--file", "users.txt")
    assert done.returncode == 0 and len(Users(tmp_path / "users.txt")) == 0


@pytest.mark.parametrize(
    ("arguments", "typed", "says"),
    [
        (("add", "ann", "--file", "users.txt"), "", "0 characters"),
        (("add", "a:b", "--file", "users.txt"), SECRET, "cannot be a name"),
        (("remove", "ann", "--file", "users.txt"), "", "does not exist"),
        (("add", "ann", SECRET, "--file", "users.txt"), "", "unrecognized arguments"),  # no password on a command line
        (("add", "ann"), SECRET, "--file"),
    ],
)
def test_the_command_given_something_wrong(tmp_path: Path, arguments: tuple[str, ...], typed: str, says: str) -> None:
    done = command(tmp_path, *arguments, typed=typed)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_is_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([SECRET, SECRET, SECRET, "something else"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    path = tmp_path / "users.txt"
    assert accounts.main(["add", "ann", "--file", str(path)]) == 0
    assert Users(path).verify("ann", SECRET)
    assert accounts.main(["add", "bob", "--file", str(path)]) == 2
    assert "bob" not in Users(path)


def test_reading_a_key_is_cheap(tmp_path: Path) -> None:
    """It stands before every request of the API: a hundred keys must cost far below a millisecond."""
    path = tmp_path / "keys.txt"
    keys = [accounts.make_key(path, "first")]
    digest = hashlib.sha256(b"x").hexdigest()
    path.write_text(path.read_text() + "".join(f"other{number}:$sha256${digest}\n" for number in range(100)))
    known = ApiKeys(path)
    known.owner(keys[0])
    began = time.process_time()
    for _ in range(200):
        assert known.owner(keys[0]) == "first"
    assert (time.process_time() - began) / 200 < 0.001
