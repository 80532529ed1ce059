// Whether what a program has in its vector registers is there after system calls, forks, signals and turns of
// other threads. A user-mode kernel moves these registers only when it must; this is where it would be noticed.
//
//   registers         prints "ok", or what was lost
//   registers again   a few calls only: what a new program begins with is its own

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS 8

// Fills registers, makes a system call without arguments, and looks at the registers.
static long call(long number, unsigned long seed) {
	unsigned long before[WORDS], after[WORDS];
	long result;
	for (int i = 0; i < WORDS; i++) before[i] = seed * 31 + (unsigned long)i;
	asm volatile(
		"movdqu (%[before]), %%xmm0\n\t"
		"movdqu 16(%[before]), %%xmm1\n\t"
		"movdqu 32(%[before]), %%xmm7\n\t"
		"movdqu 48(%[before]), %%xmm15\n\t"
		"syscall\n\t"
		"movdqu %%xmm0, (%[after])\n\t"
		"movdqu %%xmm1, 16(%[after])\n\t"
		"movdqu %%xmm7, 32(%[after])\n\t"
		"movdqu %%xmm15, 48(%[after])\n\t"
		: "=a"(result)
		: "a"(number), [before] "b"(before), [after] "r"(after)
		: "rcx", "r11", "memory", "xmm0", "xmm1", "xmm7", "xmm15");
	for (int i = 0; i < WORDS; i++) {
		if (after[i] != before[i]) {
			printf("system call %ld: word %d is lost\n", number, i);
			fflush(stdout);
			_exit(1);
		}
	}
	return result;
}

static volatile unsigned long signals;

static void interrupted(int signal) {
	(void)signal;
	call(SYS_getppid, 77 + signals++);
}

static void *turns(void *seed) {
	char *fresh = mmap(NULL, 512 << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (unsigned long i = 0; i < 1000; i++) {
		call(i % 3 ? SYS_sched_yield : SYS_getppid, i * 1000 + (unsigned long)seed);
		// A page that is not there yet.
		fresh[(i % 512) << 12] = 1;
	}
	return NULL;
}

int main(int count, char **arguments) {
	(void)arguments;
	if (count > 1) {
		for (unsigned long i = 0; i < 50; i++) call(SYS_getppid, i);
		return 0;
	}
	struct sigaction action = {.sa_handler = interrupted, .sa_flags = SA_RESTART};
	sigaction(SIGALRM, &action, NULL);
	struct itimerval often = {{0, 15000}, {0, 15000}};
	setitimer(ITIMER_REAL, &often, NULL);
	pthread_t threads[4];
	for (unsigned long i = 0; i < 4; i++) pthread_create(&threads[i], NULL, turns, (void *)(i + 1));
	for (unsigned long i = 0; i < 100; i++) {
		// Looks at the registers in the parent and in the child.
		long child = call(SYS_fork, i + 5);
		if (child == 0) {
			call(SYS_getppid, i);
			if (i % 10 == 0) execl("/proc/self/exe", "registers", "again", NULL);
			_exit(0);
		}
		int status;
		while (waitpid((pid_t)child, &status, 0) < 0) {}
		if (status) return 1;
		raise(SIGALRM);
	}
	for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
	puts("ok");
	return 0;
}
