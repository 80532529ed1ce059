// Work to be timed inside a container. Each command prints the seconds that it took, measured by itself, so that
// starting the container is not in them. Static: it runs on any root file system.
//
//   work cpu                     an integer loop
//   work syscalls                200,000 calls of getppid
//   work forks                   a thousand fork, exit, wait
//   work small DIRECTORY COUNT   as git does: COUNT small files written beside their names and renamed; looked at; read;
//                                removed. Prints one line for each of the four.
//   work time COMMAND ARG...     another program, its output thrown away
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void fail(const char *what) {
	perror(what);
	exit(1);
}

static void cpu(void) {
	uint64_t x = 88172645463325252ULL;
	for (int i = 0; i < 400000000; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
	}
	if (x == 0) puts("never");
}

static void name_of(char *path, size_t size, const char *directory, int number, const char *suffix) {
	// Spread over 256 directories, as object names are.
	unsigned hash = (unsigned)number * 2654435761u;
	snprintf(path, size, "%s/%02x/%08x%s", directory, hash >> 24, (unsigned)number, suffix);
}

static void small(const char *directory, int count) {
	char path[512], other[512], content[2048];
	memset(content, 'c', sizeof content);
	if (mkdir(directory, 0755)) fail(directory);
	double begin = now();
	for (int i = 0; i < 256; i++) {
		snprintf(path, sizeof path, "%s/%02x", directory, (unsigned)i);
		if (mkdir(path, 0755)) fail(path);
	}
	for (int i = 0; i < count; i++) {
		name_of(path, sizeof path, directory, i, ".new");
		name_of(other, sizeof other, directory, i, "");
		int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0644);
		if (fd < 0 || write(fd, content, 100 + (size_t)(i * 37 % 1900)) < 0 || close(fd) || rename(path, other)) fail(path);
	}
	printf("%.6f\n", now() - begin);
	begin = now();
	struct stat st;
	for (int i = 0; i < count; i++) {
		name_of(path, sizeof path, directory, i, "");
		if (lstat(path, &st)) fail(path);
	}
	printf("%.6f\n", now() - begin);
	begin = now();
	for (int i = 0; i < count; i++) {
		name_of(path, sizeof path, directory, i, "");
		int fd = open(path, O_RDONLY);
		if (fd < 0 || read(fd, content, sizeof content) < 0) fail(path);
		close(fd);
	}
	printf("%.6f\n", now() - begin);
	begin = now();
	for (int i = 0; i < count; i++) {
		name_of(path, sizeof path, directory, i, "");
		if (unlink(path)) fail(path);
	}
	for (int i = 0; i < 256; i++) {
		snprintf(path, sizeof path, "%s/%02x", directory, (unsigned)i);
		if (rmdir(path)) fail(path);
	}
	if (rmdir(directory)) fail(directory);
	printf("%.6f\n", now() - begin);
}

int main(int count, char **arguments) {
	const char *what = count > 1 ? arguments[1] : "";
	double begin = now();
	if (!strcmp(what, "cpu")) {
		cpu();
	} else if (!strcmp(what, "syscalls")) {
		for (int i = 0; i < 200000; i++) syscall(SYS_getppid);
	} else if (!strcmp(what, "forks")) {
		for (int i = 0; i < 1000; i++) {
			pid_t child = fork();
			if (child == 0) _exit(0);
			waitpid(child, NULL, 0);
		}
	} else if (!strcmp(what, "small") && count == 4) {
		small(arguments[2], atoi(arguments[3]));
		return 0;
	} else if (!strcmp(what, "time") && count > 2) {
		pid_t child = fork();
		if (child == 0) {
			int null = open("/dev/null", O_WRONLY);
			dup2(null, 1);
			execvp(arguments[2], arguments + 2);
			fail(arguments[2]);
		}
		int status = 1;
		waitpid(child, &status, 0);
		if (status) return 1;
	} else {
		fprintf(stderr, "usage: work cpu|syscalls|forks | small DIRECTORY COUNT | time COMMAND ARG...\n");
		return 2;
	}
	printf("%.6f\n", now() - begin);
	return 0;
}
