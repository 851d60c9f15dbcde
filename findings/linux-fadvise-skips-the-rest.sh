#!/usr/bin/env bash
# Linux 6.18 (ext4 on a virtio disk): posix_fadvise(…, POSIX_FADV_WILLNEED), which readahead(2) is like.
# Good guess: the kernel begins to read all of the part that is named; the man page only warns that it may read less
#   "depending on virtual memory load".
# Behaviour: of each call, at most the larger of the disk's read_ahead_kb and max_sectors_kb is read, and the rest is
#   skipped, however much memory is free. With the 128 KiB of most disks, that is a small part of 16 MiB.
# Seen: of a file of 256 MiB, named in parts of 16 MiB: 128 MiB cached (read_ahead_kb 8192); in parts of 128 KiB: all.
set -euo pipefail
folder=$(mktemp -d -p "${TMPDIR:-/var/tmp}")
trap 'rm -rf "$folder"' EXIT
head -c 256M /dev/urandom > "$folder/file"
sync "$folder/file"
python3 - "$folder/file" <<'PYTHON'
import os, subprocess, sys, time

path = sys.argv[1]
device = os.stat(path).st_dev
queue = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue"
for name in ("read_ahead_kb", "max_sectors_kb"):
    if os.path.exists(f"{queue}/{name}"):
        print(name, open(f"{queue}/{name}").read().strip())
file = os.open(path, os.O_RDONLY)
size = os.fstat(file).st_size
for step in (16 << 20, 128 << 10):
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    for begin in range(0, size, step):
        os.posix_fadvise(file, begin, step, os.POSIX_FADV_WILLNEED)
    time.sleep(5)
    cached = subprocess.run(["fincore", "-nrb", "-o", "RES", path], capture_output=True, text=True, check=True).stdout
    print(f"parts of {step >> 10} KiB: {int(cached) >> 20} of {size >> 20} MiB are cached")
PYTHON
