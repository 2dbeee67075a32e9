# Runs as process 1 of new namespaces and becomes systemd.  BASE is an empty directory.
set -eu
base=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
mkdir "$base/changes" "$base/work" "$base/root"
root=$base/root
mount -t overlay -o "lowerdir=/,upperdir=$base/changes,workdir=$base/work" overlay "$root"

mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for directory in dev run tmp; do
    mount -t tmpfs -o mode=755 tmpfs "$root/$directory"
done
chmod 1777 "$root/tmp"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -p "$root/dev/pts" "$root/dev/shm" "$root/opt/python"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs tmpfs "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
mount --bind "$2" "$root/opt/python"  # the Python of the tests, out of any home directory

# None of the machine's own services: only what basic.target needs.
rm -rf "$root/etc/systemd/system"
mkdir "$root/etc/systemd/system"
for service in binfmt firstboot modules-load networkd remount-fs resolved sysctl timesyncd udev-trigger udevd; do
    ln -s /dev/null "$root/etc/systemd/system/systemd-$service.service"
done
: > "$root/etc/fstab"
echo 0123456789abcdef0123456789abcdef > "$root/etc/machine-id"
ip link set lo up

cd "$root"
mkdir -p mnt/old
pivot_root . mnt/old
umount -l /mnt/old
exec env -i container=other TERM=dumb PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=no
