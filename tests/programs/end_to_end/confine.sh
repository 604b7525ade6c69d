#!/bin/sh
# In a mount namespace of its own: all mounts read-only, /tmp and /dev/shm fresh, then away with every privilege. What
# is needed of /tmp, and of root's home, which is closed to others, is put back there.
#
# NEEDED, REPOSITORY, KERNELS and USER_ID are set; the arguments are the command, whose home is empty but for KERNELS,
# compiled machine code, where that is a folder.
set -e
mount --make-rprivate /
findmnt --raw --noheadings --output TARGET | grep -vE '^/(proc|sys|dev)' | while read -r target; do
    mount -o remount,bind,ro "$target"
done
mount -t tmpfs tmpfs /media
for path in $NEEDED; do
    mkdir -p "/media$path"
    mount --bind "$path" "/media$path"
done
if [ -d "$KERNELS" ]; then
    mkdir /media/kernels
    cp -r "$KERNELS" /media/kernels
fi
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /root
for path in $NEEDED; do
    if [ ! -e "$path" ]; then
        mkdir -p "$path"
        mount --bind "/media$path" "$path"
        mount -o remount,bind,ro "$path"
    fi
done
mount -o remount,bind,ro /root
mkdir /tmp/home
if [ -d /media/kernels ]; then
    (umask 077 && mkdir -p /tmp/home/.cache/manta && cp -r /media/kernels /tmp/home/.cache/manta/kernels)
fi
chown -R "$USER_ID" /tmp/home
umount --lazy --recursive /media
cd /tmp/home
exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups --bounding-set -all --inh-caps -all --no-new-privs \
    env --ignore-environment HOME=/tmp/home PATH="$PATH" PYTHONPATH="$REPOSITORY" \
    RAY_worker_niceness="${RAY_worker_niceness:-0}" "$@"
