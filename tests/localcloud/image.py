"""The nodes' base image: the host's own release, dressed as an EC2 Ubuntu image.

Built once with mmdebstrap (about a minute) and kept in the cache, under a name that
changes with the recipe. Needs root.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.localcloud.places import cache

PACKAGES = (
    "ca-certificates cloud-init curl dbus gnupg iproute2 iptables iputils-ping kmod less "
    "libnss-myhostname libpam-systemd locales lsb-release netbase nftables openssh-client "
    "openssh-server procps psmisc python3 rsync sudo systemd systemd-sysv udev wget xz-utils zstd"
).split()

# What a container has no use for, what would only slow its boot, and nftables.service, which would
# flush the rules that stand for the security group.
MASKED_UNITS = (
    "getty@tty1.service console-getty.service systemd-udevd.service systemd-udev-trigger.service "
    "systemd-timesyncd.service systemd-networkd-wait-online.service dpkg-db-backup.timer "
    "e2scrub_all.timer fstrim.timer man-db.timer cloud-init-hotplugd.socket "
    "systemd-resolved.service systemd-firstboot.service systemd-hwdb-update.service nftables.service"
).split()

# /mnt takes the place of the instance store; cloud-init finds the metadata server as on EC2.
CLOUD_CONFIG = """\
datasource_list: [ Ec2 ]
datasource:
  Ec2:
    metadata_urls: [ "http://169.254.169.254" ]
    strict_id: false
    timeout: 5
    max_wait: 30
network: {config: disabled}
system_info:
  default_user:
    name: ubuntu
    lock_passwd: true
    gecos: Ubuntu
    groups: [adm, audio, cdrom, dialout, floppy, video, plugdev, dip, netdev, sudo]
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
ssh_genkeytypes: [ed25519]
locale: C.UTF-8
locale_configfile: /dev/null
manage_etc_hosts: false
resize_rootfs: false
growpart: {mode: off}
cloud_init_modules: [seed_random, bootcmd, write-files, set_hostname, update_hostname, users-groups, ssh]
cloud_config_modules: [runcmd, apt-configure, set-passwords]
cloud_final_modules: [package-update-upgrade-install, write-files-deferred, scripts-per-once, \
scripts-per-boot, scripts-per-instance, scripts-user, final-message, power-state-change]
"""
JOURNAL_CONFIG = "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n"


def release() -> dict[str, str]:
    """Return the host's /etc/os-release as a dict."""
    pairs = re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.M)
    return dict(pairs)


def mirror() -> str:
    """Return the apt mirror that the host itself uses for its own release."""
    codename = release()["VERSION_CODENAME"]
    sources = Path("/etc/apt/sources.list")
    for text in [sources.read_text() if sources.exists() else ""]:
        if found := re.search(rf"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+{codename}\s", text, re.M):
            return found[1]
    for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        text = file.read_text()
        found = re.search(r"^URIs:\s*(\S+)", text, re.M)
        if found and re.search(rf"^Suites:.*\b{codename}\b", text, re.M):
            return found[1]
    raise RuntimeError(f"no apt mirror for {codename} in /etc/apt")


def base_image(say: Callable[[str], None]) -> Path:
    """Return the base image's folder; build it first where it is not in the cache."""
    recipe = Path(__file__).read_bytes()
    codename = release()["VERSION_CODENAME"]
    target = cache() / f"image-{codename}-{hashlib.sha256(recipe).hexdigest()[:10]}"
    if not target.exists():
        say(f"building the nodes' image ({codename}) in {target}: about a minute, 400 MB, once")
        part = target.with_name(f"{target.name}.part{os.getpid()}")
        build(part)
        part.rename(target)
    return target


def build(root: Path) -> None:
    """Build the image in ROOT with mmdebstrap, then dress it."""
    host = release()
    components = "main universe" if host["ID"] == "ubuntu" else "main"
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        ["mmdebstrap", "--variant=minbase", "--mode=root", "--skip=check/empty"]
        + ["--aptopt=APT::Install-Recommends false", f"--include={','.join(PACKAGES)}"]
        + [host["VERSION_CODENAME"], str(root)]
        + [f"deb {mirror()} {host['VERSION_CODENAME']} {components}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        shutil.rmtree(root, ignore_errors=True)
        raise RuntimeError(f"mmdebstrap failed:\n{result.stderr[-2000:]}")
    dress(root)


def dress(root: Path) -> None:
    """Make the fresh system in ROOT look and boot like an EC2 Ubuntu image."""
    write(root / "etc/cloud/cloud.cfg.d/90_ec2.cfg", CLOUD_CONFIG)
    write(root / "etc/systemd/journald.conf.d/localcloud.conf", JOURNAL_CONFIG)
    for unit in MASKED_UNITS:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    for stale in [*root.glob("etc/ssh/ssh_host_*"), root / "etc/hostname"]:
        stale.unlink(missing_ok=True)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    write(root / "etc/resolv.conf", "nameserver 172.31.0.2\nsearch ec2.internal\n")
    write(root / "etc/machine-id", "uninitialized\n")
    write(root / "etc/fstab", "")
    write(root / "etc/apt/sources.list", "")
    for lists in [*root.glob("etc/apt/sources.list.d/*"), *root.glob("var/cache/apt/archives/*.deb")]:
        lists.unlink()
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)


def write(path: Path, text: str) -> None:
    """Write TEXT to PATH, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
