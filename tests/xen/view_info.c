/*
 * Prints what the guest view's module counts, as JSON: view_info. In C, since a Python that imports the agent takes an
 * emulated guest ten seconds, and stages ask often.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#include "../../guest-agent/kmod/shareview.h"

int main(void)
{
	struct shareview_info info = { .size = sizeof(info) };
	int fd = open("/dev/shareview", O_RDWR | O_CLOEXEC);

	if (fd < 0 || ioctl(fd, SHAREVIEW_INFO, &info)) {
		fprintf(stderr, "view_info: /dev/shareview: %s\n", strerror(errno));
		return 1;
	}
#define COUNT(name) "\"" #name "\": %llu"
	printf("{" COUNT(tables) ", " COUNT(attached_pages) ", " COUNT(pending_pages) ", " COUNT(read_bytes) ", "
	       COUNT(faults) "}\n",
	       info.tables, info.attached_pages, info.pending_pages, info.read_bytes, info.faults);
	return 0;
}
