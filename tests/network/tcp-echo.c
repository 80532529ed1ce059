/* Sends back what it gets on 127.0.0.1, to any number of clients at once. Says "ready" when it listens.
 *
 *   tcp-echo PORT */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void *serve(void *argument)
{
	int client = (int)(intptr_t)argument;
	char piece[16384];
	ssize_t length, n = 1;
	while (n > 0 && (length = read(client, piece, sizeof piece)) > 0)
		for (ssize_t sent = 0; sent < length && n > 0; sent += n)
			n = send(client, piece + sent, length - sent, MSG_NOSIGNAL);
	close(client);
	return NULL;
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (argc != 2 || fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 512)) {
		perror("tcp-echo");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		pthread_t thread;
		int client = accept(fd, NULL, NULL);
		if (client < 0 || pthread_create(&thread, NULL, serve, (void *)(intptr_t)client)) {
			perror("tcp-echo");
			return 1;
		}
		pthread_detach(thread);
	}
}
