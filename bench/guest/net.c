// Servers and clients for the measurements of the network. Static: it runs on any root file system, the servers in a
// container, the clients on the host. Each ends by itself, whatever becomes of who started it.
//
//   net serve HTTP_PORT CLOSE_PORT SECONDS       answers each HTTP request with the same few bytes and keeps the
//                                                connection; on the second port, closes each connection at once
//   net wait ADDRESS PORT SECONDS                until a server accepts connections
//   net connect ADDRESS PORT SECONDS CLIENTS     connects, waits until the server closes, and again; prints how many
//                                                connections per second
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// Most connections of one client.
#define MOST 50000

static const char answer[] =
	"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 64\r\n\r\n"
	"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";

static double now(void) {
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void fail(const char *what) {
	perror(what);
	exit(1);
}

static int listening(const char *port) {
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (fd < 0) fail("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) fail("bind");
	if (listen(fd, 1024) < 0) fail("listen");
	return fd;
}

// One connection's readiness: a request is taken to come in one piece, as the client sends it.
static void serve_one(int fd) {
	char request[4096];
	ssize_t count = read(fd, request, sizeof request);
	if (count < 0 && errno == EAGAIN) return;
	if (count <= 0 || write(fd, answer, sizeof answer - 1) != sizeof answer - 1) close(fd);
}

static void serve(const char *http_port, const char *close_port) {
	int http = listening(http_port), closing = listening(close_port), one = 1;
	int epoll = epoll_create1(0);
	int servers[] = {http, closing};
	for (int i = 0; i < 2; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data.fd = servers[i]};
		if (epoll_ctl(epoll, EPOLL_CTL_ADD, servers[i], &event) < 0) fail("epoll_ctl");
	}
	for (;;) {
		struct epoll_event events[64];
		int count = epoll_wait(epoll, events, 64, -1);
		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd, client;
			if (fd == closing) {
				while ((client = accept4(closing, NULL, NULL, SOCK_NONBLOCK)) >= 0) close(client);
			} else if (fd == http) {
				while ((client = accept4(http, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					struct epoll_event event = {.events = EPOLLIN, .data.fd = client};
					setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
					if (epoll_ctl(epoll, EPOLL_CTL_ADD, client, &event) < 0) close(client);
				}
			} else {
				serve_one(fd);
			}
		}
	}
}

// Connects and waits for the end; false when nobody listens.
static int connect_once(const char *host, const char *port, int wait) {
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	if (inet_pton(AF_INET, host, &address.sin_addr) != 1) fail("inet_pton");
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0) fail("socket");
	int connected = connect(fd, (struct sockaddr *)&address, sizeof address) == 0;
	char byte;
	if (connected && wait && read(fd, &byte, 1) < 0) connected = 0;
	close(fd);
	return connected;
}

static void connect_many(const char *host, const char *port, double seconds, int clients) {
	int pipes[2];
	if (pipe(pipes) < 0) fail("pipe");
	double begin = now();
	for (int i = 0; i < clients; i++) {
		pid_t pid = fork();
		if (pid < 0) fail("fork");
		if (pid == 0) {
			int count = 0;
			while (count < MOST && now() - begin < seconds) {
				if (!connect_once(host, port, 1)) fail("connect");
				count++;
			}
			if (write(pipes[1], &count, sizeof count) != sizeof count) fail("write");
			exit(0);
		}
	}
	close(pipes[1]);
	int sum = 0, answers = 0, count;
	while (read(pipes[0], &count, sizeof count) == sizeof count) {
		sum += count;
		answers++;
	}
	double took = now() - begin;
	while (wait(NULL) > 0) {}
	if (answers != clients) exit(1);
	printf("%.1f\n", sum / took);
}

int main(int argc, char **argv) {
	signal(SIGPIPE, SIG_IGN);
	if (argc == 5 && strcmp(argv[1], "serve") == 0) {
		alarm((unsigned)atoi(argv[4]));
		serve(argv[2], argv[3]);
	} else if (argc == 5 && strcmp(argv[1], "wait") == 0) {
		alarm((unsigned)atoi(argv[4]));
		while (!connect_once(argv[2], argv[3], 0)) usleep(10000);
	} else if (argc == 6 && strcmp(argv[1], "connect") == 0) {
		alarm((unsigned)atoi(argv[4]) + 20);
		connect_many(argv[2], argv[3], atof(argv[4]), atoi(argv[5]));
	} else {
		fputs("usage: see net.c\n", stderr);
		return 2;
	}
	return 0;
}
