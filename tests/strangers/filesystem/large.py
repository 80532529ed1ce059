"""What is long, large or much: large.py DIRECTORY NAME."""

import ctypes
import errno
import mmap
import os
import sys
import threading

directory, place = sys.argv[1:]
os.chdir(directory)
MANY = 1_000_000


def check(what):
    def run(function):
        try:
            function()
            print(f"ok {place} {what}", flush=True)
        except (OSError, AssertionError) as error:
            print(f"{what}: {type(error).__name__}: {error}")
            print(f"failed {place} {what}", flush=True)
    return run


@check("names of 255 bytes, and not of 256")
def _():
    for name in (b"n" * 255, "ü".encode() * 127 + b"x", bytes(range(1, 47)) + bytes(range(48, 256))):
        open(name, "wb").close()
        assert name in os.listdir(b".")
        os.rename(name, name[::-1] if b"\xc3" not in name else b"other")
        os.unlink(name[::-1] if b"\xc3" not in name else b"other")
    try:
        open(b"n" * 256, "wb")
        raise AssertionError("a name of 256 bytes")
    except OSError as error:
        assert error.errno == errno.ENAMETOOLONG, error


@check("paths of 4095 bytes")
def _():
    depth = 0
    where = os.getcwd()
    while len(os.getcwd()) < 3800:
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
        depth += 1
    rest = 4095 - len(os.getcwd()) - 1
    path = os.getcwd() + "/" + "f" * rest
    open(path, "w").close()
    assert os.stat(path).st_size == 0
    os.unlink(path)
    for _ in range(depth):
        os.chdir("..")
        os.rmdir("d" * 250)
    os.chdir(where)


@check("holes are found, punched and cost nothing")
def _():
    with open("holes", "w+b") as file:
        fd = file.fileno()
        os.pwrite(fd, b"a" * 4096, 0)
        os.pwrite(fd, b"b" * 4096, 1 << 30)
        assert os.fstat(fd).st_size == (1 << 30) + 4096
        assert os.fstat(fd).st_blocks * 512 < 1 << 20
        os.fsync(fd)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4096
        assert os.lseek(fd, 4096, os.SEEK_DATA) == 1 << 30
        assert os.lseek(fd, 1 << 30, os.SEEK_HOLE) == (1 << 30) + 4096
        libc = ctypes.CDLL(None, use_errno=True)
        punch = libc.fallocate
        punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        assert punch(fd, 3, 1 << 30, 4096) == 0, os.strerror(ctypes.get_errno())
        assert os.pread(fd, 4, 1 << 30) == b"\0" * 4
        try:
            os.lseek(fd, 4096, os.SEEK_DATA)
            raise AssertionError("data in a hole")
        except OSError as error:
            assert error.errno == errno.ENXIO, error
    os.unlink("holes")


@check("extended attributes of the class security")
def _():
    open("secured", "w").close()
    os.setxattr("secured", "security.x", b"value")
    assert os.getxattr("secured", "security.x") == b"value"
    os.unlink("secured")


@check("extended attributes of users, trusted ones, access control lists")
def _():
    open("attributes", "w").close()
    for name in ("user.x", "trusted.x"):
        os.setxattr("attributes", name, b"value")
        assert os.getxattr("attributes", name) == b"value"
        assert name in os.listxattr("attributes")
        os.setxattr("attributes", name, b"v" * 3000)
        assert os.getxattr("attributes", name) == b"v" * 3000
        os.removexattr("attributes", name)
        assert name not in os.listxattr("attributes")
    acl = bytes.fromhex("02000000" "01000600ffffffff" "0200040002000000" "04000400ffffffff" "10000400ffffffff" "20000400ffffffff")
    os.setxattr("attributes", "system.posix_acl_access", acl)
    assert os.getxattr("attributes", "system.posix_acl_access") == acl
    os.unlink("attributes")


@check("a file of 8 EiB less one page is refused or kept")
def _():
    with open("huge", "w+b") as file:
        try:
            os.ftruncate(file.fileno(), (1 << 43))
            assert os.fstat(file.fileno()).st_size == 1 << 43
        except OSError as error:
            assert error.errno == errno.EFBIG, error
    os.unlink("huge")


@check("a shared mapping and writes see each other")
def _():
    with open("mapped", "w+b") as file:
        os.ftruncate(file.fileno(), 1 << 20)
        with mmap.mmap(file.fileno(), 1 << 20) as mapped:
            for at in range(0, 1 << 20, 4096):
                mapped[at] = 65 + at // 4096 % 26
            for at in range(0, 1 << 20, 4096):
                assert os.pread(file.fileno(), 1, at)[0] == 65 + at // 4096 % 26
                os.pwrite(file.fileno(), b"z", at + 1)
                assert mapped[at + 1] == 122
            mapped.flush()
    with open("mapped", "rb") as file:
        data = file.read()
    assert all(data[at] == 65 + at // 4096 % 26 and data[at + 1] == 122 for at in range(0, 1 << 20, 4096))
    os.unlink("mapped")


@check("names that are renamed in storms are there exactly once")
def _():
    for name in ("a", "b"):
        os.mkdir(name)
    for index in range(50):
        open(f"a/{index}", "w").close()
    faults = []

    def storm(step):
        for turn in range(2000):
            index = turn * step % 50
            for source, target in (("a", "b"), ("b", "a")):
                try:
                    os.rename(f"{source}/{index}", f"{target}/{index}")
                except FileNotFoundError:
                    pass
                except OSError as error:
                    faults.append(error)

    threads = [threading.Thread(target=storm, args=(step,)) for step in (1, 3, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[0]
    left = sorted(os.listdir("a") + os.listdir("b"), key=int)
    assert left == [str(index) for index in range(50)], left
    for name in ("a", "b"):
        for file in os.listdir(name):
            os.unlink(f"{name}/{file}")
        os.rmdir(name)


@check("a million files in one directory")
def _():
    os.mkdir("many")
    fd = os.open("many", os.O_RDONLY)
    for index in range(MANY):
        os.close(os.open(f"file-{index}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
    seen = set()
    with os.scandir("many") as entries:
        for entry in entries:
            assert entry.name not in seen, entry.name
            seen.add(entry.name)
    assert len(seen) == MANY, len(seen)
    # Removed while the directory is read, as rm -r does.
    removed = 0
    with os.scandir("many") as entries:
        for entry in entries:
            os.unlink(entry.name, dir_fd=fd)
            removed += 1
    for name in os.listdir("many"):
        os.unlink(name, dir_fd=fd)
        removed += 1
    assert removed == MANY, removed
    os.close(fd)
    os.rmdir("many")
