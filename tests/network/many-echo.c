/* many-echo PORT: sends back what comes, on any number of connections at a time. */
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_port = htons(atoi(argv[1])) };
	int listener = socket(AF_INET6, SOCK_STREAM, 0), epoll = epoll_create1(0), on = 1;
	struct epoll_event event = { .events = EPOLLIN, .data.fd = listener }, ready[256];
	char bytes[4096];

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096))
		fail("listen");
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event))
		fail("epoll");
	puts("listening");
	fflush(stdout);
	for (;;) {
		int count = epoll_wait(epoll, ready, 256, -1);

		for (int i = 0; i < count; i++) {
			int fd = ready[i].data.fd;
			ssize_t length;

			if (fd == listener) {
				event.data.fd = accept(listener, NULL, NULL);
				if (event.data.fd < 0)
					fail("accept");
				if (epoll_ctl(epoll, EPOLL_CTL_ADD, event.data.fd, &event))
					fail("epoll");
				continue;
			}
			length = read(fd, bytes, sizeof bytes);
			if (length <= 0 || write(fd, bytes, length) != length)
				close(fd);
		}
	}
}
