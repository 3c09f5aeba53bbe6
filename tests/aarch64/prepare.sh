#!/usr/bin/env bash
# Lays out an emulated Raspberry Pi 5 in a folder: qemu, Debian's arm64 Python, aarch64 wheels.
#
# Installs nothing into the system and needs no root: apt works in the folder with lists of its own,
# and the packages are unpacked there. Prints nothing when all is there. The folder:
#   bin/qemu-aarch64-static   the emulator
#   root/                     what qemu shows the program as / where a file exists in both
#   env/                      a virtual environment; env/bin/python starts the emulator itself
#   kernels/                  compiled kernels (run.sh)
# It is ~/.cache/sterna-aarch64 unless STERNA_AARCH64_DIR names another; delete it at will.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
DIR=${STERNA_AARCH64_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sterna-aarch64}
MIRROR=${STERNA_DEBIAN_MIRROR:-http://deb.debian.org/debian}
SUITE=bookworm # its Python is 3.11, its qemu (7.2) the first series that knows the Cortex-A76
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
PACKAGES=(python3.11-minimal libpython3.11-stdlib libstdc++6)
WHEELS=(numba numpy llvmlite gguf hypothesis msgpack msgspec platformdirs psutil pytest pytest-timeout pyzmq xxhash)

die() {
  echo "aarch64 suite: $*" >&2
  exit 1
}

need() { command -v "$1" >/dev/null || die "$1 is missing; $2"; }

# Lists, status and downloads of this folder only, for both architectures.
configure_apt() {
  mkdir -p "$DIR"/apt/{lists/partial,cache/archives/partial,etc}
  : >"$DIR/apt/status"
  echo "deb [signed-by=$KEYRING] $MIRROR $SUITE main" >"$DIR/apt/sources.list"
  cat >"$DIR/apt/conf" <<EOF
Dir::State "$DIR/apt";
Dir::State::status "$DIR/apt/status";
Dir::Cache "$DIR/apt/cache";
Dir::Etc::sourcelist "$DIR/apt/sources.list";
Dir::Etc::sourceparts "$DIR/apt/etc";
Dir::Etc::preferencesparts "$DIR/apt/etc";
APT::Architecture "arm64";
APT::Architectures { "arm64"; "amd64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
EOF
}

fetch_packages() {
  need apt-get "this needs Debian or Ubuntu"
  need dpkg "this needs Debian or Ubuntu"
  [ -r "$KEYRING" ] || die "$KEYRING is missing; install the package debian-archive-keyring"
  echo "aarch64 suite: fetching qemu and Debian's arm64 Python (80 MB) ..." >&2
  configure_apt
  local log="$DIR/apt/log"
  export APT_CONFIG="$DIR/apt/conf"
  {
    apt-get -q update && apt-get -q -y --download-only install "${PACKAGES[@]}" &&
      cd "$DIR/apt/cache/archives" && apt-get -q download qemu-user-static:amd64 && cd "$OLDPWD"
  } >"$log" 2>&1 || die "apt-get failed on $MIRROR: $(tail -n 3 "$log")"
  unset APT_CONFIG
  rm -rf "$DIR/root" "$DIR/bin" && mkdir -p "$DIR/root" "$DIR/bin"
  local package
  for package in "$DIR"/apt/cache/archives/*.deb; do
    case $package in
    */qemu-user-static_*)
      dpkg --fsys-tarfile "$package" | tar -x -O ./usr/bin/qemu-aarch64-static >"$DIR/bin/qemu-aarch64-static"
      ;;
    *) dpkg -x "$package" "$DIR/root" ;;
    esac
  done
  chmod +x "$DIR/bin/qemu-aarch64-static"
  rm -rf "$DIR/apt"
}

# LLVM asks /proc/cpuinfo for the CPU's name: a Raspberry Pi 5, as its kernel 6.6 prints it.
write_cpuinfo() {
  mkdir -p "$DIR/root/proc"
  local cpu
  for cpu in 0 1 2 3; do
    printf 'processor\t: %d\nBogoMIPS\t: 108.00\nFeatures\t: %s\n' "$cpu" \
      "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
    printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n'
  done >"$DIR/root/proc/cpuinfo"
}

# The interpreter of a virtual environment that is a script: qemu is named, binfmt is not relied on, and
# what a test starts through sys.executable is emulated too.
write_environment() {
  mkdir -p "$DIR/env/bin"
  printf 'home = %s\ninclude-system-site-packages = false\n' "$DIR/root/usr/bin" >"$DIR/env/pyvenv.cfg"
  cat >"$DIR/env/bin/python" <<EOF
#!/bin/sh
exec "$DIR/bin/qemu-aarch64-static" -cpu cortex-a76 -L "$DIR/root" -0 "$DIR/env/bin/python" "$DIR/root/usr/bin/python3.11" "\$@"
EOF
  chmod +x "$DIR/env/bin/python"
}

# The versions of .venv where it has them, so that both sides run the same compiler.
requirements() {
  "$PYTHON" - "${WHEELS[@]}" <<'EOF'
import sys
from importlib.metadata import version

for name in sys.argv[1:]:
    print(f"{name}=={version(name)}")
EOF
}

fetch_wheels() {
  echo "aarch64 suite: fetching aarch64 wheels (110 MB) ..." >&2
  local site="$DIR/env/lib/python3.11/site-packages" log="$DIR/wheels.log"
  rm -rf "$site" && mkdir -p "$site"
  local pip=("$PYTHON" -m pip install --disable-pip-version-check --implementation cp --python-version 3.11
    --abi cp311 --abi abi3 --abi none --only-binary ':all:' --platform manylinux2014_aarch64)
  local glibc
  for glibc in 17 24 26 27 28 31 34 35; do pip+=(--platform "manylinux_2_${glibc}_aarch64"); done
  local uv=(uv pip install --python-platform aarch64-manylinux_2_35 --python-version 3.11 --only-binary ':all:')
  local install=("${pip[@]}")
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    need uv "the environment .venv has no pip either"
    install=("${uv[@]}")
  fi
  "${install[@]}" --target "$site" "$@" >"$log" 2>&1 || die "no wheels: $(grep -i error "$log" | tail -n 3)"
}

case $(uname -m) in
x86_64) ;;
aarch64) die "this machine is aarch64: 'make test' runs the suite without an emulator" ;;
*) die "made for x86-64, this is $(uname -m)" ;;
esac
[ -x "$PYTHON" ] || die "$PYTHON is missing; run 'make lint' once"
mkdir -p "$DIR"
wanted=$(requirements) || die ".venv lacks a development tool; remove .venv and run 'make lint'"
script=$(sha256sum <tests/aarch64/prepare.sh)
if [ "$(cat "$DIR/packages.done" 2>/dev/null)" != "$script" ]; then
  fetch_packages
  write_cpuinfo
  write_environment
  echo "$script" >"$DIR/packages.done"
fi
if [ "$(cat "$DIR/wheels.done" 2>/dev/null)" != "$wanted" ]; then
  # shellcheck disable=SC2086 # one word each
  fetch_wheels $wanted
  "$DIR/env/bin/python" -c 'import numba' || die "the emulated Python does not start; remove $DIR"
  echo "$wanted" >"$DIR/wheels.done"
fi
