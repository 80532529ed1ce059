/* POSIX shared memory that two processes map. `ask` makes an object and waits in it for an answer; `answer` gives it.
 * Neither calls the kernel in between: what one writes, the other sees, or does not. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int ask = argc == 2 && !strcmp(argv[1], "ask");
	int fd = shm_open("/question", ask ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
	if (fd < 0 || (ask && ftruncate(fd, 4096))) {
		perror("/question");
		return 1;
	}
	volatile int *state = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (state == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	if (ask) {
		*state = 1;
		puts("asked");
		fflush(stdout);
	}
	for (int waited = 0; *state != (ask ? 2 : 1); waited++) {
		struct timespec moment = {0, 10 * 1000 * 1000};
		if (waited == 2000) {
			puts("nothing came");
			return 1;
		}
		nanosleep(&moment, 0);
	}
	*state = 2;
	puts("answered");
	return 0;
}
