#!/usr/bin/env bash
# An old Linux in a folder: Debian 11, glibc 2.31, with a Python 3.11 compiled there. As root, minutes:
#   tests/wheels/debian11.sh FOLDER
#   python -m tests.wheels --root FOLDER --place "Debian 11" --python cp311=/opt/python/bin/python3.11 \
#     --torch cp311=torch==2.13.0
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "chroot needs root" >&2; exit 2; }
root=$(realpath -m "$1")
packages=gcc,g++,make,zlib1g-dev,libssl-dev,libffi-dev,libbz2-dev,liblzma-dev,libsqlite3-dev,ca-certificates,xz-utils
[ -x "$root/bin/bash" ] || debootstrap --variant=minbase --include=$packages bullseye "$root"
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev"
for file in /etc/resolv.conf /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  [ ! -f $file ] || cp $file "$root$file"
done
[ -x "$root/opt/python/bin/python3.11" ] && exit
# Debian 11's own Python is 3.9. The sources are those of Debian 12.
mkdir -p "$root/opt/source" "$root/apt/partial"
echo "deb-src [trusted=yes] http://deb.debian.org/debian-security bookworm-security main" > "$root/apt/sources.list"
apt="-q -o Dir::Etc::sourcelist=$root/apt/sources.list -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists=$root/apt"
# shellcheck disable=SC2086
(cd "$root/opt/source" && apt-get $apt update && apt-get $apt source --download-only python3.11)
chroot "$root" bash -ec 'cd /opt/source && tar xf python3.11_*.orig.tar.* && cd Python-3.11* &&
  ./configure -q --prefix=/opt/python && make -s -j"$(nproc)" && make -s install'
