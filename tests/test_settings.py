"""Settings: config.py and the placeholders beside it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import cluster
from tests.localcloud.places import PROJECT


def test_config_has_every_setting_with_its_default() -> None:
    settings = cluster.load_settings(PROJECT / "config.py")
    text = (PROJECT / "config.py").read_text()
    for name in cluster.CHECKS:
        assert re.search(rf"^{name}\b.* = ", text, re.M), name
    assert cluster.Settings(S3_PATH="s3://XXXXXX") == settings
    assert set(cluster.CHECKS) == {name for name in cluster.Settings._fields if name.isupper()}


def test_placeholders_carry_no_secret() -> None:
    assert "PRIVATE KEY" not in (PROJECT / "mitsuba-key.pem").read_text()
    for line in (PROJECT / ".s3cfg").read_text().splitlines():
        assert not re.match(r"(access|secret)_key\s*=\s*\S", line)


def test_git_never_picks_up_a_secret(tmp_path: Path) -> None:
    def git(folder: str, *words: str) -> str:
        told = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *words]
        return subprocess.run(told, cwd=tmp_path / folder, check=True, capture_output=True, text=True).stdout

    (tmp_path / "upstream").mkdir()
    git("upstream", "init", "-q", "-b", "main")
    for name in ("mitsuba-key.pem", ".s3cfg", "cluster.py"):
        (tmp_path / "upstream" / name).write_bytes((PROJECT / name).read_bytes())
    git("upstream", "add", "-A")
    git("upstream", "commit", "-qm", "placeholders")
    git(".", "clone", "-q", "upstream", "mine")
    key, s3cfg = tmp_path / "mine" / "mitsuba-key.pem", tmp_path / "mine" / ".s3cfg"
    s3cfg.write_text("[default]\naccess_key = AKIAEXAMPLE\nsecret_key = topsecret\n")
    cluster.ensure_key_file(key)
    cluster.warn_of_secrets(tmp_path / "mine" / "config.py", cluster.Settings(folder=tmp_path / "mine"))
    made = key.read_text()
    assert "PRIVATE KEY" in made
    assert key.stat().st_mode & 0o777 == 0o600

    script = tmp_path / "mine" / "cluster.py"
    script.write_text(script.read_text() + "# work\n")
    (tmp_path / "mine" / "new").write_text("new")
    assert git("mine", "status", "--porcelain").splitlines() == [" M cluster.py", "?? new"]
    git("mine", "stash", "--include-untracked")
    (tmp_path / "upstream" / "README.md").write_text("news")
    git("upstream", "add", "-A")
    git("upstream", "commit", "-qm", "news")
    git("mine", "pull", "-q")
    git("mine", "stash", "pop")
    git("mine", "add", "-A")
    git("mine", "commit", "-qam", "work")
    history = git("mine", "log", "-p", "--all") + git("mine", "stash", "list", "-p")
    assert made.splitlines()[1] not in history
    assert "topsecret" not in history
    assert git("mine", "show", "--name-only", "--format=").split() == ["cluster.py", "new"]
    cluster.ensure_key_file(key)
    assert key.read_text() == made
    assert "topsecret" in s3cfg.read_text()


@pytest.mark.parametrize(
    ("folder", "good"),
    [
        *((one, True) for one in ("/mnt", "/data", "/library", "/var/scenes", "/srv/home", "/mnt/tmp", "/homes")),
        *((one, False) for one in ("/home", "/home/ubuntu", "/root/x", "/tmp/x", "/var/tmp/x", "/run/x", "/dev/shm")),
        *((one, False) for one in ("/etc", "/usr/local/data", "/lib64/x", "/var", "/var/lib", "/proc/1")),
    ],
)
def test_data_is_kept_out_of_folders_that_the_server_cannot_use(folder: str, good: bool) -> None:
    assert cluster.CHECKS["DATA_DIR"][0](folder) is good
