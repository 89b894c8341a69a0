"""A small build of Mitsuba as upstream's is: real programs and libraries, compiled here, around the stand-in server.

dist/mtssrv, mitsuba        need libmitsuba-core.so, and load plugins/glass.so by its path
dist/libmitsuba-core.so     needs libspectrum.so.1, which only its run path finds (in paths/)
dist/plugins/glass.so       needs libglass.so.2, which only LD_LIBRARY_PATH finds (in search/)
dist/data/                  the stand-ins, which the programs become once all is loaded
dist/mtsgui, mtsimport, python/   what is not packed; mtsgui's library does not exist
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.localcloud.places import HERE

COMPILER = shutil.which("gcc")

PROGRAM = r"""
#include <dlfcn.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int spectrum(void);

/* glibc 2.36 has this one; 22.04's does not. */
#if NEWER
unsigned arc4random(void);
#define DICE arc4random()
#else
#define DICE 1
#endif

int main(int count, char **words) {
  char self[4096] = {0}, plugin[5000], script[5000], name[64];
  readlink("/proc/self/exe", self, sizeof self - 1);
  snprintf(name, sizeof name, "%s", basename(strdup(self)));
  snprintf(plugin, sizeof plugin, "%s/plugins/glass.so", dirname(self));
  snprintf(script, sizeof script, "%s/data/%s", self, name);
#if TRAP
  __builtin_trap();
#endif
  void *loaded = dlopen(plugin, RTLD_NOW);
  if (!loaded || spectrum() + (int)(DICE & 0) != 3) {
    fprintf(stderr, "%s\n", loaded ? "a wrong spectrum" : dlerror());
    return 1;
  }
  char **given = calloc(count + 2, sizeof *given);
  given[0] = "python3";
  given[1] = script;
  memcpy(given + 2, words + 1, (count - 1) * sizeof *given);
  execv("/usr/bin/python3", given);
  return 1;
}
"""


def compile_c(target: Path, text: str, *options: str | Path) -> None:
    """Compile TEXT into TARGET, a shared library unless it has no suffix."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shared = [] if target.suffix == "" else ["-shared", "-fPIC", f"-Wl,-soname,{target.name}"]
    words = [
        COMPILER or "gcc",
        "-w",
        "-x",
        "c",
        "-",
        *shared,
        "-o",
        target,
        "-Wl,--no-as-needed",
        "-x",
        "none",
        *options,
    ]
    subprocess.run(words, input=text, text=True, check=True)


def make_build(root: Path, newer: bool = False, trap: bool = False) -> Path:
    """Make a build in ROOT; return its dist folder. NEWER: with a symbol of glibc 2.36; TRAP: SIGILL at the start."""
    dist, paths, search = root / "dist", root / "paths", root / "search"
    compile_c(paths / "libspectrum.so.1", "int samples(void) { return 3; }")
    compile_c(search / "libglass.so.2", "int glass(void) { return 1; }")
    core = dist / "libmitsuba-core.so"
    run_path: list[str | Path] = [paths / "libspectrum.so.1", f"-Wl,-rpath,{paths}"]
    compile_c(core, "int samples(void); int spectrum(void) { return samples(); }", *run_path)
    compile_c(
        dist / "plugins/glass.so", "int glass(void); int make(void) { return glass(); }", search / "libglass.so.2"
    )
    for name in ("mtssrv", "mitsuba"):
        options: list[str | Path] = [
            core,
            "-ldl",
            f"-Wl,-rpath-link,{paths}",
            f"-DNEWER={int(newer)}",
            f"-DTRAP={int(trap)}",
        ]
        compile_c(dist / name, PROGRAM, *options)
        (dist / "data").mkdir(exist_ok=True)
        shutil.copy(HERE / "mitsuba" / name, dist / "data" / name)
    compile_c(root / "libQt4Gui.so.4", "int gui;")
    compile_c(dist / "mtsgui", "int main(void) { return 0; }", root / "libQt4Gui.so.4")
    (root / "libQt4Gui.so.4").unlink()
    (dist / "mtsimport").write_text("")
    (dist / "python").mkdir()
    (dist / "python/mitsuba.so").write_text("")
    return dist
