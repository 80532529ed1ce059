/*
 * Connects to a unix socket, and says what came of it.
 *
 *   unix-client PATH talk           what standard input has goes there, and the answer to standard output
 *   unix-client PATH try            prints the error of connect(2), or "connected" and the server's address
 *   unix-client PATH again          the same twice, with one socket, a line of standard input between
 *   unix-client PATH many NUMBER    NUMBER connections at once, each of which sends its number and gets it back
 *   unix-client PATH hold           connects, says so, and stays
 *   unix-client PATH slow           ends its direction, and reads the answer seven seconds later; prints its length
 *   unix-client PATH early          sends until that fails, and then prints the answer
 *   unix-client PATH idle           connects, and says when the server is gone
 *   unix-client PATH signal         is interrupted by a signal while it connects, and then tries again
 *   unix-client PATH pass           passes a descriptor; prints the error
 *   unix-client PATH serve          listens, and answers one connection with "from the guest"
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static struct sockaddr_un address = {.sun_family = AF_UNIX};

static int attempt(int end)
{
	struct sockaddr_un peer = {0};
	socklen_t length = sizeof peer;

	if (connect(end, (struct sockaddr *)&address, sizeof address)) {
		puts(strerror(errno));
		return 1;
	}
	if (getpeername(end, (struct sockaddr *)&peer, &length))
		return 1;
	printf("connected %s\n", peer.sun_path);
	return 0;
}

static int copy(int from, int to)
{
	static char buffer[1 << 16];
	ssize_t length;

	while ((length = read(from, buffer, sizeof buffer)) > 0)
		for (ssize_t at = 0, written; at < length; at += written)
			if ((written = write(to, buffer + at, length - at)) < 0)
				return -1;
	return length;
}

static int talk(int end)
{
	if (connect(end, (struct sockaddr *)&address, sizeof address)) {
		perror("connect");
		return 1;
	}
	if (copy(0, end) || shutdown(end, SHUT_WR) || copy(end, 1)) {
		perror("talk");
		return 1;
	}
	return 0;
}

static int many(int count)
{
	int end[count];

	for (int at = 0; at < count; at++) {
		end[at] = socket(AF_UNIX, SOCK_STREAM, 0);
		if (connect(end[at], (struct sockaddr *)&address, sizeof address)) {
			perror("connect");
			return 1;
		}
		if (write(end[at], &at, sizeof at) != sizeof at)
			return 1;
	}
	for (int at = count - 1; at >= 0; at--) {
		int answer = -1;
		if (read(end[at], &answer, sizeof answer) != sizeof answer || answer != at) {
			printf("connection %d: %d\n", at, answer);
			return 1;
		}
	}
	printf("%d answers\n", count);
	return 0;
}

static int slow(int end)
{
	static char buffer[1 << 16];
	ssize_t length, total = 0;

	if (attempt(end) || shutdown(end, SHUT_WR))
		return 1;
	sleep(7);
	while ((length = read(end, buffer, sizeof buffer)) > 0)
		total += length;
	printf("%zd bytes\n", total);
	return length != 0;
}

static int early(int end)
{
	static char buffer[1 << 16];

	if (attempt(end))
		return 1;
	while (send(end, buffer, sizeof buffer, MSG_NOSIGNAL) > 0)
		;
	/* An error may follow, as what was not read is lost. */
	copy(end, 1);
	return 0;
}

static int idle(int end)
{
	struct pollfd poll_end = {.fd = end};

	if (attempt(end))
		return 1;
	puts(poll(&poll_end, 1, 10000) == 1 && poll_end.revents & POLLHUP ? "gone" : "there");
	return 0;
}

static void nothing(int signal)
{
	(void)signal;
}

static int interrupted(int end)
{
	sigaction(SIGALRM, &(struct sigaction){.sa_handler = nothing}, 0);
	alarm(1);
	attempt(end);
	return attempt(end);
}

static int pass(int end)
{
	char space[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
	struct iovec text = {.iov_base = "x", .iov_len = 1};
	struct msghdr message = {
		.msg_iov = &text, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space,
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memset(CMSG_DATA(header), 0, sizeof(int));
	if (attempt(end))
		return 1;
	puts(sendmsg(end, &message, MSG_NOSIGNAL) < 0 ? strerror(errno) : "passed");
	return 0;
}

static int serve(int end)
{
	static const char text[] = "from the guest\n";

	unlink(address.sun_path);
	if (bind(end, (struct sockaddr *)&address, sizeof address) || listen(end, 1)) {
		perror("listen");
		return 1;
	}
	int client = accept(end, 0, 0);
	return write(client, text, sizeof text - 1) != sizeof text - 1;
}

int main(int count, char **arguments)
{
	if (count < 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	strncpy(address.sun_path, arguments[1], sizeof address.sun_path - 1);
	int end = socket(AF_UNIX, SOCK_STREAM, 0);
	const char *word = arguments[2];

	if (!strcmp(word, "talk"))
		return talk(end);
	if (!strcmp(word, "try"))
		return attempt(end);
	if (!strcmp(word, "again")) {
		attempt(end);
		getchar();
		return attempt(end);
	}
	if (!strcmp(word, "many") && count > 3)
		return many(atoi(arguments[3]));
	if (!strcmp(word, "hold")) {
		attempt(end);
		pause();
	}
	if (!strcmp(word, "slow"))
		return slow(end);
	if (!strcmp(word, "early"))
		return early(end);
	if (!strcmp(word, "idle"))
		return idle(end);
	if (!strcmp(word, "signal"))
		return interrupted(end);
	if (!strcmp(word, "pass"))
		return pass(end);
	if (!strcmp(word, "serve"))
		return serve(end);
	return 2;
}
