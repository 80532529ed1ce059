/* Prints what inotify(7) tells of its arguments, a line for each event: the argument, the event, the name. */
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

static const struct { unsigned bit; const char *word; } words[] = {
	{IN_MODIFY, "modify"}, {IN_ATTRIB, "attributes"}, {IN_CLOSE_WRITE, "written"}, {IN_MOVED_FROM, "from"},
	{IN_MOVED_TO, "to"}, {IN_CREATE, "create"}, {IN_DELETE, "delete"}, {IN_DELETE_SELF, "gone"},
	{IN_MOVE_SELF, "moved"}, {IN_IGNORED, "ignored"}, {IN_Q_OVERFLOW, "overflow"},
};

int main(int count, char **arguments)
{
	char buffer[65536] __attribute__((aligned(8)));
	int notify = inotify_init();
	unsigned mask = IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVE | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF;

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (int at = 1; at < count; at++)
		/* Watches are numbered from 1. */
		if (inotify_add_watch(notify, arguments[at], mask) != at) {
			perror(arguments[at]);
			return 1;
		}
	puts("ready");
	for (;;) {
		ssize_t length = read(notify, buffer, sizeof buffer);
		if (length <= 0)
			return 1;
		for (char *next = buffer; next < buffer + length;) {
			struct inotify_event *event = (struct inotify_event *)next;
			const char *name = event->len ? event->name : "";
			next += sizeof *event + event->len;
			if (!strcmp(name, "end"))
				return 0;
			for (size_t word = 0; word < sizeof words / sizeof *words; word++)
				if (event->mask & words[word].bit)
					printf("%s %s%s %s\n", event->wd > 0 ? arguments[event->wd] : "",
					       event->mask & IN_ISDIR ? "directory-" : "", words[word].word, name);
		}
	}
}
