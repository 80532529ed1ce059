/* Makes system calls of which a container's filter lets some through, and prints what became of each: "NAME: ok" or
 * "NAME: " and the name of the error. The arguments are such that the kernel itself would not answer EPERM. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* In a process of its own: some of them change the caller. */
#define CALL(name, ...) \
  do { \
    fflush(stdout); \
    pid_t child = fork(); \
    if (child == 0) { \
      errno = 0; \
      long result = syscall(__VA_ARGS__); \
      printf("%s: %s\n", name, result < 0 ? strerrorname_np(errno) : "ok"); \
      fflush(stdout); \
      _exit(0); \
    } \
    int status; \
    waitpid(child, &status, 0); \
    if (WIFSIGNALED(status)) printf("%s: signal %d\n", name, WTERMSIG(status)); \
  } while (0)

static void *thread(void *argument) { return argument; }

int main(void) {
  CALL("getpid", SYS_getpid);
  CALL("mount", SYS_mount, 0, 0, 0, 0, 0);
  CALL("unshare", SYS_unshare, CLONE_NEWUSER);
  CALL("clone", SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
  CALL("clone plain", SYS_clone, SIGCHLD, 0, 0, 0, 0);
  CALL("clone3", SYS_clone3, 0, 0);
  CALL("bpf", SYS_bpf, 0xffff, 0, 0);
  CALL("perf_event_open", SYS_perf_event_open, 0, 0, -1, -1, 0);
  CALL("keyctl", SYS_keyctl, 0, -3, 1);
  CALL("add_key", SYS_add_key, 0, 0, 0, 0, 0);
  CALL("io_uring_setup", SYS_io_uring_setup, 1, 0);
  CALL("socket inet", SYS_socket, 2, 1, 0);
  CALL("socket unix", SYS_socket, 1, 1, 0);
  CALL("socket vsock", SYS_socket, 40, 1, 0);
  CALL("socket vsock, long", SYS_socket, 1L << 32 | 40, 1, 0);
  CALL("personality", SYS_personality, 0xffffffff);
  CALL("personality read-implies-exec", SYS_personality, 0x0400000);
  CALL("ptrace", SYS_ptrace, PTRACE_TRACEME, 0, 0, 0);
  CALL("fchmodat2", 452, -100, "/tmp", 0777, 0);
  CALL("unknown", 999);
  pthread_t other;
  int error = pthread_create(&other, 0, thread, 0);
  if (!error) error = pthread_join(other, 0);
  printf("thread: %s\n", error ? strerrorname_np(error) : "ok");
  return 0;
}
