// What POSIX and Linux promise of a file system, one line for each promise: `name: result`, where the result is
// `ok`, the name of an error, or a number that was seen. The end to end tests run this program on the host's own file
// system and in a container, and compare the lines: the host's results are the right ones, whatever they are.
//
// usage: checks DIRECTORY     an existing directory, empty afterwards; needs root
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static void say(const char *name, const char *result) { printf("%s: %s\n", name, result); fflush(stdout); }

static const char *error_name(int number) {
	const char *name = strerrorname_np(number);
	return name ? name : "unknown";
}

// A call that returns -1 on error.
#define CALL(name, call) say(name, (long)(call) == -1 ? error_name(errno) : "ok")
#define TRUE(name, condition) say(name, (condition) ? "yes" : "no")
#define NUMBER(name, value) do { char text[32]; snprintf(text, sizeof text, "%lld", (long long)(value)); say(name, text); } while (0)

static int put(const char *path, const char *content, mode_t mode) {
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, mode);
	if (fd < 0) return -1;
	if (write(fd, content, strlen(content)) < 0) { close(fd); return -1; }
	return close(fd);
}

static const char *get(const char *path) {
	static char content[4096];
	int fd = open(path, O_RDONLY);
	if (fd < 0) return error_name(errno);
	ssize_t n = read(fd, content, sizeof content - 1);
	close(fd);
	content[n < 0 ? 0 : n] = 0;
	return content;
}

static struct stat look(const char *path) {
	struct stat st;
	memset(&st, 0, sizeof st);
	lstat(path, &st);
	return st;
}

// Runs the rest of the line as another user; its result is that process's, which prints it.
#define AS_NOBODY(statement) do { \
	fflush(stdout); \
	pid_t child = fork(); \
	if (child == 0) { \
		if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534)) _exit(1); \
		statement; \
		fflush(stdout); \
		_exit(0); \
	} \
	waitpid(child, NULL, 0); \
} while (0)

static void opening(void) {
	CALL("open O_CREAT|O_EXCL", close(open("a", O_CREAT | O_EXCL | O_WRONLY, 0640)));
	CALL("open O_CREAT|O_EXCL again", open("a", O_CREAT | O_EXCL | O_WRONLY, 0640));
	NUMBER("mode of a new file", look("a").st_mode & 07777);
	CALL("open missing", open("missing", O_RDONLY));
	CALL("open file O_DIRECTORY", open("a", O_RDONLY | O_DIRECTORY));
	mkdir("d", 0755);
	CALL("open directory for writing", open("d", O_WRONLY));
	CALL("open directory O_CREAT", open("d", O_RDONLY | O_CREAT, 0600));
	CALL("open below a file", open("a/b", O_RDONLY));
	CALL("open empty name", open("", O_RDONLY));
	CALL("open file with slash", open("a/", O_RDONLY));
	CALL("create file with slash", open("new/", O_CREAT | O_WRONLY, 0600));
	symlink("a", "l");
	CALL("open O_NOFOLLOW", open("l", O_RDONLY | O_NOFOLLOW));
	symlink("nowhere", "dangling");
	CALL("open dangling", open("dangling", O_RDONLY));
	CALL("open dangling O_EXCL", open("dangling", O_CREAT | O_EXCL | O_WRONLY, 0600));
	CALL("create through dangling", close(open("dangling", O_CREAT | O_WRONLY, 0600)));
	TRUE("created where the link leads", look("nowhere").st_mode != 0);
	symlink("loop2", "loop1");
	symlink("loop1", "loop2");
	CALL("open loop", open("loop1", O_RDONLY));
	char name[300];
	memset(name, 'n', sizeof name);
	name[255] = 0;
	CALL("name of 255 bytes", close(open(name, O_CREAT | O_WRONLY, 0600)));
	unlink(name);
	name[255] = 'n', name[256] = 0;
	CALL("name of 256 bytes", open(name, O_CREAT | O_WRONLY, 0600));
	put("a", "content", 0600);
	int fd = open("a", O_RDWR | O_TRUNC);
	NUMBER("size after O_TRUNC", look("a").st_size);
	close(fd);
	fd = open("a", O_RDONLY);
	CALL("write to a read-only descriptor", write(fd, "x", 1));
	CALL("ftruncate a read-only descriptor", ftruncate(fd, 0));
	close(fd);
	fd = open("a", O_PATH);
	CALL("read O_PATH", read(fd, name, 1));
	CALL("fchmod O_PATH", fchmod(fd, 0600));
	close(fd);
	fd = open(".", O_TMPFILE | O_RDWR, 0600);
	CALL("open O_TMPFILE", fd);
	if (fd >= 0) {
		CALL("write O_TMPFILE", write(fd, "temporary", 9));
		char path[64];
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		CALL("link O_TMPFILE", linkat(AT_FDCWD, path, AT_FDCWD, "was-temporary", AT_SYMLINK_FOLLOW));
		say("content of linked O_TMPFILE", get("was-temporary"));
		close(fd);
	}
	mode_t old = umask(027);
	close(open("masked", O_CREAT | O_WRONLY, 0777));
	mkdir("masked-d", 0777);
	umask(old);
	NUMBER("umask of files", look("masked").st_mode & 07777);
	NUMBER("umask of directories", look("masked-d").st_mode & 07777);
	void *buffer = NULL;
	if (posix_memalign(&buffer, 4096, 4096)) return;
	memset(buffer, 'x', 4096);
	fd = open("direct", O_CREAT | O_RDWR | O_DIRECT, 0600);
	CALL("open O_DIRECT", fd);
	NUMBER("write O_DIRECT", write(fd, buffer, 4096));
	NUMBER("read O_DIRECT", pread(fd, buffer, 4096, 0));
	close(fd);
	fd = open("sync", O_CREAT | O_RDWR | O_SYNC, 0600);
	CALL("write O_SYNC", write(fd, "x", 1));
	CALL("fsync", fsync(fd));
	CALL("fdatasync", fdatasync(fd));
	CALL("syncfs", syncfs(fd));
	close(fd);
	fd = open("d", O_RDONLY);
	CALL("fsync a directory", fsync(fd));
	close(fd);
}

static void names(void) {
	CALL("mkdir", mkdir("d", 0755));
	CALL("mkdir again", mkdir("d", 0755));
	CALL("mkdir with slash", mkdir("d2/", 0755));
	CALL("mkdir below nothing", mkdir("no/d", 0755));
	put("d/f", "x", 0600);
	CALL("rmdir not empty", rmdir("d"));
	CALL("rmdir file", rmdir("d/f"));
	CALL("rmdir .", rmdir("d/."));
	CALL("rmdir ..", rmdir("d/.."));
	CALL("unlink directory", unlink("d"));
	CALL("unlink with slash", unlink("d/f/"));
	NUMBER("links of a directory", look("d").st_nlink);
	mkdir("d/sub", 0755);
	NUMBER("links of a directory with another", look("d").st_nlink);
	put("f", "first", 0600);
	CALL("link", link("f", "g"));
	TRUE("link is the same inode", look("f").st_ino == look("g").st_ino && look("f").st_nlink == 2);
	CALL("link exists", link("f", "g"));
	CALL("link directory", link("d", "dd"));
	unlink("f");
	NUMBER("links after unlink", look("g").st_nlink);
	say("content after unlink of the other name", get("g"));
	CALL("symlink", symlink("target", "s"));
	CALL("symlink exists", symlink("target", "s"));
	NUMBER("size of a symlink", look("s").st_size);
	char text[PATH_MAX];
	NUMBER("readlink", readlink("s", text, sizeof text));
	NUMBER("readlink cut", readlink("s", text, 3));
	CALL("readlink file", readlink("g", text, sizeof text));
	CALL("link of a symlink", link("s", "s2"));
	TRUE("is a symlink", S_ISLNK(look("s2").st_mode));
	char *longest = malloc(4096);
	memset(longest, 't', 4095);
	longest[4095] = 0;
	CALL("symlink of 4095 bytes", symlink(longest, "longest"));
	free(longest);
	put("a", "a", 0600);
	put("b", "b", 0600);
	CALL("rename over", rename("a", "b"));
	say("content after rename over", get("b"));
	CALL("rename missing", rename("a", "c"));
	CALL("rename file over directory", rename("b", "d"));
	CALL("rename directory over file", rename("d2", "b"));
	CALL("rename into itself", rename("d", "d/sub/d"));
	CALL("rename over not empty", rename("d2", "d"));
	mkdir("empty", 0755);
	CALL("rename directory over empty", rename("d2", "empty"));
	CALL("rename to the same", rename("b", "b"));
	link("b", "b2");
	CALL("rename to another name of the same", rename("b", "b2"));
	TRUE("both names stay", look("b").st_ino == look("b2").st_ino);
	put("c", "c", 0600);
	CALL("RENAME_NOREPLACE", renameat2(AT_FDCWD, "b", AT_FDCWD, "c", RENAME_NOREPLACE));
	CALL("RENAME_EXCHANGE", renameat2(AT_FDCWD, "b", AT_FDCWD, "c", RENAME_EXCHANGE));
	say("content after exchange", get("b"));
	CALL("RENAME_EXCHANGE file and directory", renameat2(AT_FDCWD, "b", AT_FDCWD, "d", RENAME_EXCHANGE));
	TRUE("exchanged kinds", S_ISDIR(look("b").st_mode) && S_ISREG(look("d").st_mode));
	CALL("rename file with slash", rename("c", "e/"));
	int fd = open("c", O_RDWR);
	unlink("c");
	struct stat st;
	CALL("write unlinked", write(fd, "later", 5));
	char back[6] = "";
	NUMBER("read unlinked", pread(fd, back, 5, 0));
	CALL("fstat unlinked", fstat(fd, &st));
	NUMBER("links of unlinked", st.st_nlink);
	CALL("fchmod unlinked", fchmod(fd, 0604));
	CALL("ftruncate unlinked", ftruncate(fd, 2));
	close(fd);
	put("over", "old", 0600);
	put("new", "new", 0600);
	fd = open("over", O_RDONLY);
	rename("new", "over");
	NUMBER("read replaced", read(fd, back, 5));
	TRUE("replaced file's own content", !memcmp(back, "old", 3));
	close(fd);
	mkdir("gone", 0755);
	fd = open("gone", O_RDONLY | O_DIRECTORY);
	rmdir("gone");
	CALL("create in a removed directory", openat(fd, "x", O_CREAT | O_WRONLY, 0600));
	close(fd);
	CALL("mkfifo", mkfifo("fifo", 0600));
	fd = open("fifo", O_RDWR | O_NONBLOCK);
	CALL("write fifo", write(fd, "x", 1));
	NUMBER("read fifo", read(fd, back, 5));
	close(fd);
	CALL("mknod character device", mknod("null", S_IFCHR | 0666, 0x103));
	NUMBER("device number", look("null").st_rdev);
	CALL("mknod file", mknod("node", S_IFREG | 0600, 0));
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};
	int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
	CALL("bind a socket", bind(server, (void *)&address, sizeof address));
	listen(server, 1);
	CALL("connect to a socket", connect(client, (void *)&address, sizeof address));
	TRUE("is a socket", S_ISSOCK(look("socket").st_mode));
	close(server), close(client);
	CALL("connect to nobody", connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof address));
}

static void directories(void) {
	char name[32];
	for (int i = 0; i < 1000; i++) {
		snprintf(name, sizeof name, "entry-%d", i);
		close(open(name, O_CREAT | O_WRONLY, 0600));
	}
	DIR *dir = opendir(".");
	struct dirent *entry;
	int seen = 0, dots = 0, typed = 0, same = 0;
	while ((entry = readdir(dir))) {
		if (entry->d_name[0] == '.') { dots++; continue; }
		seen++;
		typed += entry->d_type == DT_REG;
		same += look(entry->d_name).st_ino == entry->d_ino;
	}
	NUMBER("entries read", seen);
	NUMBER("dots read", dots);
	NUMBER("entries of the right type", typed);
	NUMBER("entries with the inode of stat", same);
	rewinddir(dir);
	for (int i = 0; i < 500; i++) entry = readdir(dir);
	long place = telldir(dir);
	entry = readdir(dir);
	snprintf(name, sizeof name, "%s", entry->d_name);
	for (int i = 0; i < 100; i++) readdir(dir);
	seekdir(dir, place);
	entry = readdir(dir);
	TRUE("seekdir returns to the same entry", entry && !strcmp(entry->d_name, name));
	rewinddir(dir);
	int removed = 0;
	while ((entry = readdir(dir)))
		if (entry->d_name[0] != '.') removed += unlink(entry->d_name) == 0;
	NUMBER("removed while reading", removed);
	rewinddir(dir);
	seen = 0;
	while ((entry = readdir(dir))) seen += entry->d_name[0] != '.';
	NUMBER("left after that", seen);
	closedir(dir);
	char deep[4000] = "";
	for (int i = 0; i < 100; i++) strcat(deep, "0123456789abcdef/"), mkdir(deep, 0755);
	strcat(deep, "f");
	CALL("a path of 1700 bytes", put(deep, "x", 0600));
	char whole[PATH_MAX];
	mkdir("cwd", 0755);
	chdir("cwd");
	TRUE("getcwd", getcwd(whole, sizeof whole) && !strcmp(strrchr(whole, '/'), "/cwd"));
	rename("../cwd", "../moved");
	TRUE("getcwd after rename", getcwd(whole, sizeof whole) && !strcmp(strrchr(whole, '/'), "/moved"));
	chdir("..");
}

static void data(void) {
	char buffer[8192];
	int fd = open("f", O_CREAT | O_RDWR, 0600);
	NUMBER("pwrite beyond the end", pwrite(fd, "end", 3, 10000));
	NUMBER("size then", look("f").st_size);
	NUMBER("read of the hole", pread(fd, buffer, 4, 5000));
	TRUE("hole is zero", !memcmp(buffer, "\0\0\0\0", 4));
	NUMBER("read at the end", pread(fd, buffer, 100, 10000));
	NUMBER("read beyond the end", pread(fd, buffer, 100, 20000));
	CALL("truncate longer", ftruncate(fd, 20000));
	CALL("truncate shorter", truncate("f", 5));
	CALL("truncate negative", ftruncate(fd, -1));
	NUMBER("size after truncate", look("f").st_size);
	CALL("truncate a directory", truncate(".", 0));
	pwrite(fd, "abcde", 5, 0);
	ftruncate(fd, 3);
	ftruncate(fd, 5);
	pread(fd, buffer, 5, 0);
	TRUE("cut bytes come back as zero", !memcmp(buffer, "abc\0\0", 5));
	close(fd);
	fd = open("huge", O_CREAT | O_RDWR, 0600);
	NUMBER("write at 1 TiB", pwrite(fd, "x", 1, 1LL << 40));
	NUMBER("size of it", look("huge").st_size);
	TRUE("few blocks", look("huge").st_blocks < 1000);
	NUMBER("SEEK_DATA", lseek(fd, 0, SEEK_DATA) > 1LL << 39);
	NUMBER("SEEK_HOLE", lseek(fd, 0, SEEK_HOLE));
	CALL("SEEK_DATA beyond", lseek(fd, 1LL << 41, SEEK_DATA));
	close(fd);
	fd = open("room", O_CREAT | O_RDWR, 0600);
	CALL("fallocate", fallocate(fd, 0, 0, 100000));
	NUMBER("size after fallocate", look("room").st_size);
	CALL("fallocate KEEP_SIZE", fallocate(fd, FALLOC_FL_KEEP_SIZE, 100000, 100000));
	NUMBER("size after KEEP_SIZE", look("room").st_size);
	memset(buffer, 'x', sizeof buffer);
	pwrite(fd, buffer, 8192, 0);
	CALL("fallocate PUNCH_HOLE", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096));
	pread(fd, buffer, 8192, 0);
	TRUE("punched", buffer[0] == 0 && buffer[4096] == 'x');
	CALL("fallocate ZERO_RANGE", fallocate(fd, FALLOC_FL_ZERO_RANGE, 4096, 4096));
	CALL("posix_fadvise", posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
	close(fd);
	fd = open("append", O_CREAT | O_RDWR | O_APPEND, 0600);
	write(fd, "one", 3);
	lseek(fd, 0, SEEK_SET);
	write(fd, "two", 3);
	say("append", get("append"));
	NUMBER("pwrite to O_APPEND", pwrite(fd, "three", 5, 0));
	say("append after pwrite", get("append"));
	close(fd);
	fd = open("vector", O_CREAT | O_RDWR, 0600);
	struct iovec parts[2] = {{"ab", 2}, {"cd", 2}};
	NUMBER("writev", writev(fd, parts, 2));
	int to = open("copy", O_CREAT | O_RDWR, 0600);
	off_t from = 0;
	NUMBER("sendfile", sendfile(to, fd, &from, 4));
	loff_t in = 0, out = 4;
	NUMBER("copy_file_range", copy_file_range(fd, &in, to, &out, 4, 0));
	say("copied", get("copy"));
	int pipes[2];
	pipe(pipes);
	in = 0;
	NUMBER("splice out", splice(fd, &in, pipes[1], NULL, 4, 0));
	out = 8;
	NUMBER("splice in", splice(pipes[0], NULL, to, &out, 4, 0));
	say("spliced", get("copy"));
	close(to), close(fd);
	fd = open("map", O_CREAT | O_RDWR, 0600);
	ftruncate(fd, 8192);
	char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	TRUE("mmap shared", map != MAP_FAILED);
	if (map != MAP_FAILED) {
		memcpy(map + 4096, "mapped", 6);
		pread(fd, buffer, 6, 4096);
		TRUE("written by map, seen by read", !memcmp(buffer, "mapped", 6));
		pwrite(fd, "file", 4, 0);
		TRUE("written by write, seen by map", !memcmp(map, "file", 4));
		CALL("msync", msync(map, 8192, MS_SYNC));
		munmap(map, 8192);
	}
	map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	TRUE("mmap private", map != MAP_FAILED);
	if (map != MAP_FAILED) {
		memcpy(map, "mine", 4);
		pread(fd, buffer, 4, 0);
		TRUE("private writes stay private", !memcmp(buffer, "file", 4));
		munmap(map, 8192);
	}
	close(fd);
	fflush(stdout);
	for (int child = 0; child < 4; child++)
		if (fork() == 0) {
			int log = open("log", O_CREAT | O_WRONLY | O_APPEND, 0600);
			for (int i = 0; i < 100; i++) if (write(log, "0123456789", 10) != 10) _exit(1);
			_exit(0);
		}
	while (wait(NULL) > 0) {}
	NUMBER("size after four writers appended", look("log").st_size);
	int winners = 0, status;
	for (int child = 0; child < 8; child++)
		if (fork() == 0) _exit(open("race", O_CREAT | O_EXCL | O_WRONLY, 0600) >= 0);
	while (wait(&status) > 0) winners += WEXITSTATUS(status);
	NUMBER("winners of a race to create", winners);
}

static void attributes(void) {
	put("f", "x", 0600);
	CALL("chmod", chmod("f", 07777));
	NUMBER("mode", look("f").st_mode & 07777);
	CALL("chown", chown("f", 1000, 2000));
	NUMBER("owner", look("f").st_uid * 10000LL + look("f").st_gid);
	NUMBER("mode after chown", look("f").st_mode & 07777);
	symlink("f", "l");
	CALL("lchown", lchown("l", 5, 6));
	NUMBER("owner of the link", look("l").st_uid);
	NUMBER("owner of its target", look("f").st_uid);
	chmod("f", 06777);
	AS_NOBODY({ int fd = open("f", O_WRONLY); CALL("write by another user", write(fd, "y", 1)); });
	NUMBER("set-user-id cleared by the write", look("f").st_mode & 07777);
	AS_NOBODY(CALL("chmod by another user", chmod("f", 0777)));
	AS_NOBODY(CALL("chown by another user", chown("f", 65534, -1)));
	AS_NOBODY(CALL("utimes of another user's file", utimensat(AT_FDCWD, "f", (struct timespec[]){{1, 0}, {1, 0}}, 0)));
	AS_NOBODY(CALL("utimes now of a writable file", utimensat(AT_FDCWD, "f", NULL, 0)));
	chmod("f", 0600);
	AS_NOBODY(CALL("open by another user", open("f", O_RDONLY)));
	AS_NOBODY(CALL("access by another user", access("f", R_OK)));
	CALL("access by root", access("f", R_OK | W_OK));
	CALL("access X_OK by root", access("f", X_OK));
	AS_NOBODY(CALL("create where one may not", open("theirs", O_CREAT | O_WRONLY, 0600)));
	AS_NOBODY(CALL("unlink where one may not", unlink("f")));
	mkdir("closed", 0700);
	put("closed/f", "x", 0666);
	AS_NOBODY(CALL("open behind a closed directory", open("closed/f", O_RDONLY)));
	mkdir("sticky", 01777);
	chmod("sticky", 01777);
	put("sticky/roots", "x", 0666);
	AS_NOBODY(CALL("unlink in a sticky directory", unlink("sticky/roots")));
	AS_NOBODY(CALL("rename in a sticky directory", rename("sticky/roots", "sticky/mine")));
	AS_NOBODY(CALL("create in a sticky directory", put("sticky/own", "x", 0600)));
	NUMBER("owner of what another user makes", look("sticky/own").st_uid);
	AS_NOBODY(CALL("unlink one's own there", unlink("sticky/own")));
	mkdir("shared", 0777);
	chown("shared", 0, 3000);
	chmod("shared", 02777);
	put("shared/f", "x", 0600);
	mkdir("shared/d", 0755);
	NUMBER("group inherited", look("shared/f").st_gid);
	NUMBER("set-group-id inherited", look("shared/d").st_mode & 07777);
	AS_NOBODY(CALL("mknod device by another user", mknod("shared/dev", S_IFCHR | 0666, 0x103)));
	struct timespec times[2] = {{1000000000, 123456789}, {2000000000, 987654321}};
	CALL("utimensat", utimensat(AT_FDCWD, "f", times, 0));
	NUMBER("mtime", look("f").st_mtim.tv_sec * 1000000000LL + look("f").st_mtim.tv_nsec);
	NUMBER("atime", look("f").st_atim.tv_sec * 1000000000LL + look("f").st_atim.tv_nsec);
	times[0].tv_nsec = UTIME_OMIT;
	times[1].tv_sec = 5, times[1].tv_nsec = 0;
	CALL("utimensat OMIT", utimensat(AT_FDCWD, "f", times, 0));
	NUMBER("atime kept", look("f").st_atim.tv_sec);
	times[1].tv_nsec = UTIME_NOW;
	CALL("utimensat NOW", utimensat(AT_FDCWD, "f", times, 0));
	TRUE("mtime is now", labs(look("f").st_mtim.tv_sec - time(NULL)) < 5);
	times[0] = (struct timespec){-5, 0}, times[1] = times[0];
	CALL("time before 1970", utimensat(AT_FDCWD, "f", times, 0));
	NUMBER("mtime before 1970", look("f").st_mtim.tv_sec);
	times[0] = (struct timespec){7, 0}, times[1] = times[0];
	CALL("utimensat of a link", utimensat(AT_FDCWD, "l", times, AT_SYMLINK_NOFOLLOW));
	NUMBER("mtime of the link", look("l").st_mtim.tv_sec);
	struct timespec before = look(".").st_mtim;
	usleep(20000);
	put("touches-directory", "x", 0600);
	struct timespec after = look(".").st_mtim;
	TRUE("creating changes the directory's mtime", after.tv_sec != before.tv_sec || after.tv_nsec != before.tv_nsec);
	before = look("f").st_ctim;
	usleep(20000);
	chmod("f", 0640);
	after = look("f").st_ctim;
	TRUE("chmod changes ctime", after.tv_sec != before.tv_sec || after.tv_nsec != before.tv_nsec);
	before = look("f").st_mtim;
	usleep(20000);
	int fd = open("f", O_WRONLY);
	write(fd, "z", 1);
	close(fd);
	after = look("f").st_mtim;
	TRUE("writing changes mtime", after.tv_sec != before.tv_sec || after.tv_nsec != before.tv_nsec);
	struct statx extended;
	CALL("statx", statx(AT_FDCWD, "f", 0, STATX_ALL, &extended));
	TRUE("statx knows the size", extended.stx_mask & STATX_SIZE);
	TRUE("statx knows the birth", extended.stx_mask & STATX_BTIME);
	struct statvfs fs;
	CALL("statvfs", statvfs(".", &fs));
	NUMBER("longest name", fs.f_namemax);
	TRUE("space", fs.f_blocks > 0 && fs.f_bfree > 0);
	int flags;
	fd = open("f", O_RDONLY);
	CALL("FS_IOC_GETFLAGS", ioctl(fd, FS_IOC_GETFLAGS, &flags));
	CALL("an unknown ioctl", ioctl(fd, _IO('z', 99), 0));
	close(fd);

	CALL("setxattr", setxattr("f", "user.name", "value", 5, 0));
	char value[64];
	NUMBER("getxattr", getxattr("f", "user.name", value, sizeof value));
	NUMBER("getxattr size only", getxattr("f", "user.name", NULL, 0));
	CALL("getxattr too short", getxattr("f", "user.name", value, 2));
	CALL("getxattr missing", getxattr("f", "user.none", value, sizeof value));
	CALL("setxattr XATTR_CREATE", setxattr("f", "user.name", "x", 1, XATTR_CREATE));
	CALL("setxattr XATTR_REPLACE", setxattr("f", "user.none", "x", 1, XATTR_REPLACE));
	CALL("setxattr empty", setxattr("f", "user.empty", "", 0, 0));
	NUMBER("listxattr", listxattr("f", value, sizeof value));
	CALL("removexattr", removexattr("f", "user.name"));
	CALL("removexattr again", removexattr("f", "user.name"));
	CALL("setxattr without a class", setxattr("f", "name", "x", 1, 0));
	CALL("setxattr of a link", lsetxattr("l", "user.name", "x", 1, 0));
	char big[2048];
	memset(big, 'v', sizeof big);
	CALL("setxattr 2 KiB", setxattr("f", "user.big", big, sizeof big, 0));
	AS_NOBODY(CALL("setxattr by another user", setxattr("f", "user.x", "x", 1, 0)));
	// CAP_NET_BIND_SERVICE permitted: version 2, little endian.
	unsigned char capability[20] = {1, 0, 0, 2, 0, 4};
	CALL("setxattr security.capability", setxattr("f", "security.capability", capability, sizeof capability, 0));
	NUMBER("getxattr security.capability", getxattr("f", "security.capability", value, sizeof value));
	fd = open("f", O_WRONLY);
	write(fd, "q", 1);
	close(fd);
	CALL("security.capability after a write", getxattr("f", "security.capability", value, sizeof value));
	// user:1000:rwx beside rw-r-----: version 2, entries of tag, permissions, id.
	unsigned char acl[] = {2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 7, 0, 232, 3, 0, 0,
		4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 7, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255};
	CALL("setxattr posix acl", setxattr("f", "system.posix_acl_access", acl, sizeof acl, 0));
	NUMBER("mode with acl", look("f").st_mode & 07777);
}

static void locks(void) {
	int a = open("lock", O_CREAT | O_RDWR, 0600), b = open("lock", O_RDWR);
	CALL("flock", flock(a, LOCK_EX | LOCK_NB));
	CALL("flock by another", flock(b, LOCK_EX | LOCK_NB));
	CALL("flock shared by another", flock(b, LOCK_SH | LOCK_NB));
	CALL("flock released", flock(a, LOCK_UN));
	CALL("flock then", flock(b, LOCK_EX | LOCK_NB));
	flock(b, LOCK_UN);
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 10};
	CALL("fcntl lock", fcntl(a, F_SETLK, &lock));
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		struct flock other = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 5, .l_len = 10};
		CALL("fcntl lock by another process", fcntl(b, F_SETLK, &other));
		other.l_start = 10;
		CALL("fcntl lock of another range", fcntl(b, F_SETLK, &other));
		other = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 10};
		fcntl(b, F_GETLK, &other);
		TRUE("F_GETLK names the owner", other.l_type == F_WRLCK && other.l_pid == getppid());
		fflush(stdout);
		_exit(0);
	}
	waitpid(child, NULL, 0);
	lock.l_type = F_UNLCK;
	CALL("fcntl unlock", fcntl(a, F_SETLK, &lock));
	lock = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 10};
	CALL("OFD lock", fcntl(a, F_OFD_SETLK, &lock));
	CALL("OFD lock by another descriptor", fcntl(b, F_OFD_SETLK, &lock));
	close(a), close(b);
}

static void programs(void) {
	char self[PATH_MAX];
	ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
	self[n < 0 ? 0 : n] = 0;
	int from = open(self, O_RDONLY), to = open("program", O_CREAT | O_WRONLY, 0755);
	while (sendfile(to, from, NULL, 1 << 20) > 0) {}
	close(from), close(to);
	fflush(stdout);
	int ready[2];
	pipe(ready);
	pid_t child = fork();
	if (child == 0) {
		dup2(ready[1], 1);
		execl("./program", "program", "--wait", (char *)NULL);
		_exit(errno == ETXTBSY ? 98 : 99);
	}
	close(ready[1]);
	char byte;
	NUMBER("execute a program", read(ready[0], &byte, 1));
	CALL("write to a running program", open("program", O_WRONLY));
	CALL("unlink a running program", unlink("program"));
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	put("script", "#!/bin/sh\nexit 3\n", 0755);
	child = fork();
	if (child == 0) { execl("./script", "script", (char *)NULL); _exit(99); }
	int status;
	waitpid(child, &status, 0);
	NUMBER("execute a script", WEXITSTATUS(status));
	chmod("script", 0644);
	CALL("execute without permission", execl("./script", "script", (char *)NULL));
}

static unsigned events(int fd, unsigned wanted) {
	unsigned seen = 0;
	struct pollfd poll_fd = {fd, POLLIN, 0};
	while ((seen & wanted) != wanted && poll(&poll_fd, 1, 1000) > 0) {
		char buffer[4096] __attribute__((aligned(8)));
		ssize_t n = read(fd, buffer, sizeof buffer);
		for (char *at = buffer; at < buffer + n;) {
			struct inotify_event *event = (void *)at;
			seen |= event->mask;
			at += sizeof *event + event->len;
		}
	}
	return seen;
}

static void notifications(void) {
	int fd = inotify_init1(IN_CLOEXEC);
	CALL("inotify_add_watch", inotify_add_watch(fd, ".", IN_ALL_EVENTS));
	put("watched", "x", 0600);
	unsigned seen = events(fd, IN_CREATE | IN_MODIFY | IN_CLOSE_WRITE);
	TRUE("inotify create", seen & IN_CREATE);
	TRUE("inotify modify", seen & IN_MODIFY);
	TRUE("inotify close", seen & IN_CLOSE_WRITE);
	rename("watched", "renamed");
	seen = events(fd, IN_MOVED_FROM | IN_MOVED_TO);
	TRUE("inotify rename", (seen & IN_MOVED_FROM) && (seen & IN_MOVED_TO));
	unlink("renamed");
	TRUE("inotify delete", events(fd, IN_DELETE) & IN_DELETE);
	close(fd);
}

// Each group of checks in a directory of its own.
static void group(const char *name, void (*checks)(void)) {
	if (mkdir(name, 0755) || chdir(name)) { perror(name); exit(1); }
	checks();
	if (chdir("..")) exit(1);
	char command[64];
	snprintf(command, sizeof command, "rm -rf %s", name);
	if (system(command)) exit(1);
}

int main(int count, char **arguments) {
	if (count == 2 && !strcmp(arguments[1], "--wait")) {
		if (write(1, "r", 1) < 0) return 1;
		pause();
	}
	if (count != 2 || chdir(arguments[1])) {
		fprintf(stderr, "usage: checks DIRECTORY\n");
		return 2;
	}
	umask(022);
	group("opening", opening);
	group("names", names);
	group("directories", directories);
	group("data", data);
	group("attributes", attributes);
	group("locks", locks);
	group("programs", programs);
	group("notifications", notifications);
	return 0;
}
