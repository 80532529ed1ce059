/* Sends every datagram back to where it came from, in capitals; IPv4 and IPv6, from the address that it was sent to.
 *
 *   udp-echo PORT */
#include <arpa/inet.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(argv[1]))};
	int fd = socket(AF_INET6, SOCK_DGRAM, 0);
	if (argc != 2 || fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address)) {
		perror("udp-echo");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		static char bytes[65536];
		struct sockaddr_in6 from;
		socklen_t length = sizeof from;
		ssize_t n = recvfrom(fd, bytes, sizeof bytes, 0, (struct sockaddr *)&from, &length);
		for (ssize_t i = 0; i < n; i++)
			bytes[i] = toupper(bytes[i]);
		if (n >= 0)
			sendto(fd, bytes, n, 0, (struct sockaddr *)&from, length);
	}
}
